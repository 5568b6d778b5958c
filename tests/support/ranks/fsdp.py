"""Train a small LLaMA on 4 ranks, sharded and with DistributedDataParallel, for test_fsdp.py.

Each rank writes its results to the folder that is the argument.
"""

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from loguru import logger

import torchrun_main
from alphadecay.cli.flags import add_flags, decay_from_flags, register_decay_hooks
from alphadecay.param_groups import split_hidden
from peft_pretraining.checkpoint.load import load_checkpoint
from peft_pretraining.checkpoint.random_state import seed_random_generators
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.cli.main import end, run_script
from peft_pretraining.data.loader import validation_batches
from peft_pretraining.data.sequences import Sequences, Shard, document_offsets
from peft_pretraining.model.modeling_llama import build_model, load_config
from peft_pretraining.optim.gradients import clip_gradients, mean_decay
from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.ddp import data_parallel
from peft_pretraining.parallel.fsdp import full_tensor, shard_model
from peft_pretraining.parallel.process_group import DistributedContext, process_group
from peft_pretraining.train.evaluation import evaluate

LENGTH, LR = 16, 1e-3
PLAIN = contextlib.nullcontext()


class Run:
    """What `main` of torchrun_main.py sets up, for one way to be parallel."""

    def __init__(
        self,
        config,
        parallel: str,
        flags: str,
        ranks: DistributedContext,
        optimizer: str = "adam",
        checkpointing: bool = False,
        hf: bool = False,
    ):
        seed_random_generators(3)
        self.ranks, self.model = ranks, build_model(config, hf)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        if parallel == "fsdp":
            self.model = shard_model(self.model, ranks, "float32", shard_size=2)
        parser = argparse.ArgumentParser()
        add_flags(parser)
        args = parser.parse_args(
            ["--unbalancedWD_every", "2", *flags.split()],
            argparse.Namespace(weight_decay=0.1, lr=LR),
        )
        self.decay = decay_from_flags(args, self.model, 10)
        groups = (
            self.decay.param_groups()
            if self.decay
            else [{"params": list(self.model.parameters()), "weight_decay": 0.1}]
        )
        self.optimizer = build_optimizer(optimizer, split_hidden(groups, self.model), LR)
        register_decay_hooks(args, self.optimizer)
        self.guard = NonFiniteGuard(self.optimizer, ranks, 3)
        nothing = torch.zeros(1, 2, dtype=torch.long)
        self.parallel = data_parallel(
            self.model,
            self.guard.record_nonfinite,
            ranks,
            lambda parallel: parallel(nothing, nothing),
        )

    def update(self, number: int, scale: float = 1.0) -> list[float]:
        """Make one update of two micro-batches, and return numbers that are equal on all ranks."""
        generator = torch.Generator().manual_seed(10 * number + self.ranks.rank)
        batches = [torch.randint(100, (2, LENGTH), generator=generator) for _ in range(2)]
        labels = [
            batch.masked_fill(torch.arange(LENGTH) >= LENGTH - 3 - self.ranks.rank, -100)
            for batch in batches
        ]
        micro_batches = [
            {"input_ids": x, "labels": y} for x, y in zip(batches, labels, strict=True)
        ]
        loss = (
            torchrun_main.forward_backward(
                self.parallel, micro_batches, number, 180, 0, PLAIN, self.ranks
            )
            * scale
        )
        norm = clip_gradients(self.model, 0.5)
        self.guard.check_update(number, loss, norm)
        if self.decay:
            self.decay.step(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.guard.resolve_pending()
        return [float(self.ranks.sum(loss)), float(norm), mean_decay(self.optimizer)]

    def decays(self) -> dict[str, float]:
        return {
            f"{group.get('module')} {group['hidden']}": group["weight_decay"]
            for group in self.optimizer.param_groups
        }

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: full_tensor(p.detach()).clone() for name, p in self.model.named_parameters()}


# The linear map multiplies the rounding of the alphas by the width of its range over that of the
# alphas, which here is narrow as well.
NARROW = "--use_modulewise_wd --wd_min_ratio 1 --wd_max_ratio 1.5"
SETTINGS = {
    "gradnorm": {
        "flags": "--use_modulewise_wd --esd_metric_for_tb gradnorm --iso_budget",
        "checkpointing": True,
    },
    "asynchronous": {
        "flags": f"{NARROW} --esd_async --esd_lag 1 --cautious_decay --adamc",
        "optimizer": "adamw",
    },
    "awd": {"flags": "--use_AWD_NeurIPS2023"},
    "adadecay": {"flags": "--use_AdaDecay", "optimizer": "adamw"},
    "transformers": {"flags": NARROW, "hf": True},
}


def methods(config, ranks: DistributedContext) -> dict:
    """Return the numbers of 4 updates of each setting, and the greatest difference of weights."""
    results = {}
    for name, setting in SETTINGS.items():
        runs = [Run(config, parallel, ranks=ranks, **setting) for parallel in ("ddp", "fsdp")]
        numbers = [[run.update(i) for i in range(4)] for run in runs]
        weights = [run.weights() for run in runs]
        furthest = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0])
        results[name] = {
            "numbers": numbers,
            "decays": [run.decays() for run in runs],
            "furthest": furthest,
        }
    return results


def interchange(config, folder: Path, ranks: DistributedContext) -> dict:
    """Save either way, go on the same way and the other: the two updates that follow."""
    flags, results = "--use_modulewise_wd", {}
    for saved in ("ddp", "fsdp"):
        run = Run(config, saved, flags, ranks)
        for i in range(3):
            run.update(i)
        checkpoints = Checkpoints(folder / saved, ranks)
        checkpoints.save(3, run.model, run.optimizer, {"decay": run.decay.state_dict()})
        checkpoints.before_update()
        results[f"{saved}, straight"] = [run.update(i) for i in range(3, 5)]
        checkpoints.finish()
        ranks.barrier()
        again = Run(config, {"ddp": "fsdp", "fsdp": "ddp"}[saved], flags, ranks)
        trainer = load_checkpoint(
            folder / saved / "checkpoints/model_3", again.model, again.optimizer, ranks
        )
        again.decay.load_state_dict(trainer["decay"])
        results[f"{saved}, continued otherwise"] = [again.update(i) for i in range(3, 5)]
    return results


def evaluation(config, ranks: DistributedContext) -> dict:
    """Evaluate five sequences, one in a batch, so ranks have 2 or 1 batches; then a single one."""
    results = {}
    for rows in (5, 1):
        ids = np.random.default_rng(0).integers(100, size=rows * LENGTH)
        validation = Sequences(
            (Shard(ids, document_offsets(np.full(rows, LENGTH))),), LENGTH, pad_id=0, eos_id=1
        )
        for parallel in ("ddp", "fsdp"):
            run = Run(config, parallel, "", ranks)
            own = validation_batches(validation, 1, ranks.rank, ranks.world_size)
            result = evaluate(run.model, own, ranks, PLAIN)
            names = [
                name
                for name, p in run.model.named_parameters()
                if parallel == "fsdp" and not hasattr(p, "placements")
            ]
            results[f"{rows} {parallel}"] = [*result.values(), names]
    return results


def not_finite(config, ranks: DistributedContext) -> dict:
    """A gradient, then a loss, on one rank each."""
    messages: list[str] = []
    logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    run = Run(config, "fsdp", "", ranks)
    run.update(0)
    before, exchange = run.weights(), torchrun_main.forward_backward

    def broken(model, *rest):
        if ranks.rank != 3:
            return exchange(model, *rest)
        block = model.model.layers[1]
        hook = block.register_full_backward_hook(
            lambda _, gradients, __: tuple(g if g is None else g * math.nan for g in gradients)
        )
        loss = exchange(model, *rest)
        hook.remove()
        return loss

    torchrun_main.forward_backward = broken
    run.update(1)
    torchrun_main.forward_backward = exchange
    run.update(2, scale=math.nan if ranks.rank == 1 else 1.0)
    same = all(torch.equal(before[name], weight) for name, weight in run.weights().items())
    run.update(3)
    moved = any(not torch.equal(before[name], weight) for name, weight in run.weights().items())
    return {"messages": messages, "same": same, "moved": moved, "skipped": run.guard.skipped}


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group() as ranks:
        config = load_config(folder / "config.json")
        result = {
            "methods": methods(config, ranks),
            "interchange": interchange(config, folder, ranks),
            "evaluation": evaluation(config, ranks),
            "not finite": not_finite(config, ranks),
        }
        (folder / f"rank{ranks.rank}.json").write_text(json.dumps(result))
        ranks.barrier()


if __name__ == "__main__":
    end(run_script(main))
