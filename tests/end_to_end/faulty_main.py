"""Run torchrun_main.py or main_vit.py, record what each rank holds, and cause faults.

Environment variables control it:

* `SCRIPT`: `torchrun_main` (the default) or `main_vit`.
* `TRACE=FILE`: each rank appends a line for each update to FILE.rank<r>: hashes of the weights and
  the optimizer state, and the decays; with `TRACE_RANDOM=1` also of the random state.
* `FAULT=WHAT@UPDATE@WHO`: cause a fault in that update on that rank (or on `all`). WHAT is one of
    * `kill`: SIGKILL,
    * `nan`: one gradient is NaN before the ranks exchange gradients; `nan+`: from that update on,
    * `data`: there is no batch,
    * `slow`: the update takes a minute,
    * `raise`: an exception that nobody expects,
    * `evaluate`: the same in the evaluation after that update,
    * `SIGTERM` or any other signal; `SIGTERM>agent` sends it to torchrun, `SIGKILL>wandb` to W&B's
      helper process, `SIGKILL>reader` to a process that reads data.
* `FAULT_ONCE=FILE`: cause the fault only if FILE does not exist, and create it.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path

import torch

from peft_pretraining.cli.main import end, run_script
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.launch import read_launch
from tests.support.fork_server import descendants

RANK = int(os.environ.get("RANK", 0))
script = importlib.import_module(os.environ.get("SCRIPT", "torchrun_main"))
forward_backward, build_optimizer, build_model, evaluate = (
    script.forward_backward,
    script.build_optimizer,
    script.build_model,
    script.evaluate,
)
now = {"update": None, "nan": False}


def fault(what: str, update: int) -> bool:
    wanted, at, who = os.environ.get("FAULT", "none@-1@-1").split("@")
    once = os.environ.get("FAULT_ONCE")
    due = (
        wanted.rstrip("+") == what
        and (update == int(at) or wanted.endswith("+") and update > int(at))
        and who in ("all", str(RANK))
    )
    if not due or once and Path(once).exists():
        return False
    if once:
        Path(once).touch()
    return True


def with_faults(steps, done: int):
    for update in itertools.count(done + 1):
        if fault("data", update):
            raise UserError("corpus.jsonl cannot be read")
        now["update"] = update
        yield next(steps)


def put_faults_into_data() -> None:
    """Let the iterator over this rank's data fail in the update that FAULT names."""
    if script.__name__ == "main_vit":
        build_train_loader = script.build_train_loader
        script.build_train_loader = lambda args, data, done, ranks: with_faults(
            build_train_loader(args, data, done, ranks), done
        )
        return
    training_batches = script.training_batches

    def batches_with_faults(*arguments, position, total_batch_size, **named):
        steps = training_batches(
            *arguments, position=position, total_batch_size=total_batch_size, **named
        )
        return with_faults(steps, (position["rows"] if position else 0) // total_batch_size)

    script.training_batches = batches_with_faults


def send(name: str, target: str = "self") -> None:
    """Send a signal to this process, to torchrun, or to a child process."""
    if target in ("self", "agent"):
        pids = [os.getpid() if target == "self" else os.getppid()]
    else:
        words = {"wandb": b"wandb", "reader": b"spawn_main"}[target]
        pids = [
            pid
            for pid in descendants(os.getpid())
            if words in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert pids, f"there is no {target}"
    for pid in pids:
        os.kill(pid, getattr(signal, name))
    if target != "self":
        time.sleep(0.5)  # until the process has ended


def forward_backward_with_faults(*arguments):
    now["nan"] = fault("nan", now["update"])
    what = os.environ.get("FAULT", "").split("@")[0]
    if what.startswith("SIG") and fault(what, now["update"]):
        send(*what.split(">"))
    if fault("raise", now["update"]):
        raise LookupError("an exception that nobody expects")
    if fault("slow", now["update"]):
        end = time.monotonic() + 60
        while time.monotonic() < end:  # a signal would cut one long sleep short
            time.sleep(0.1)
    if fault("kill", now["update"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return forward_backward(*arguments)


def evaluate_with_faults(*arguments):
    if fault("evaluate", now["update"]):
        raise LookupError("an exception that nobody expects")
    return evaluate(*arguments)


def build_model_with_faults(*arguments):
    model = build_model(*arguments)
    next(model.parameters()).register_hook(
        lambda gradient: gradient * math.nan if now["nan"] else gradient
    )
    return model


def build_optimizer_with_trace(*arguments):
    optimizer = build_optimizer(*arguments)
    if "TRACE" in os.environ:
        optimizer.register_step_post_hook(write_trace)
    return optimizer


def write_trace(optimizer, *_) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [value for p in parameters for _, value in sorted(optimizer.state[p].items())]
    line = {
        "update": now["update"],
        "weights": digest(parameters),
        "optimizer": digest(moments),
        "decays": {
            group.get("module") or "rest": group["weight_decay"] for group in optimizer.param_groups
        },
    }
    if "TRACE_RANDOM" in os.environ:
        line["random"] = digest([torch.get_rng_state()])
    # A full disk is the program's problem, not this file's. The first newline ends a line that a
    # killed process has left half written.
    with contextlib.suppress(OSError), open(f"{os.environ['TRACE']}.rank{RANK}", "a") as file:
        file.write(f"\n{json.dumps(line, separators=(',', ':'))}\n")


def digest(tensors: list[torch.Tensor]) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        if hasattr(tensor, "to_local"):  # of a sharded model: this rank's part
            tensor = tensor.to_local()
        content.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


if __name__ == "__main__":
    put_faults_into_data()
    script.forward_backward = forward_backward_with_faults
    script.build_model = build_model_with_faults
    script.evaluate = evaluate_with_faults
    script.build_optimizer = build_optimizer_with_trace
    end(run_script(lambda: script.main(script.parse_arguments(), read_launch())))
