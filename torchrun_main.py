"""Pretrain LLaMA with AlphaDecay: module-wise weight decay from the spectra of the weights (arXiv 2506.14562).

    torchrun --nproc_per_node=2 torchrun_main.py --model_config configs/llama_60m.json --use_modulewise_wd \
        --alpha_positively_with_WD --weight_decay 1e-5

Runs on one process (plain python) or several (torchrun), on CPU or GPU, and finds out by itself which. Sections:
arguments, set-up, the training loop, the end.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from loguru import logger

from alphadecay.flags import add_flags, decay_from_flags
from peft_pretraining import run_log
from peft_pretraining.arguments import complete, llama_parser
from peft_pretraining.checkpoint import (
    checkpoints_of,
    find_checkpoint,
    load_checkpoint,
    seed_random_generators,
    set_aside_newer,
    step_of,
)
from peft_pretraining.data import Step, load_data, merge_positions, training_batches, validation_batches
from peft_pretraining.distributed import Ranks, process_group, run_script, world_size_of_environment
from peft_pretraining.errors import UserError
from peft_pretraining.evaluation import evaluate
from peft_pretraining.finite import FiniteGuard
from peft_pretraining.interruption import StopRequest, was_restarted
from peft_pretraining.modeling_llama import build_model, load_config
from peft_pretraining.optimizer import build_optimizer
from peft_pretraining.report import write_report
from peft_pretraining.rows import IGNORED
from peft_pretraining.saving import Checkpoints
from peft_pretraining.schedule import lr_factor

AWD_FACTOR = 100  # lambda_awd = 100 * eta in the published LLaMA runs

# -------------------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = llama_parser()
    add_flags(parser)
    return complete(parser.parse_args(), world_size_of_environment())


# ----------------------------------------------------------------------------------------------------------------- set-up


def main() -> None:
    args = parse_arguments()
    with process_group(args.single_cuda) as ranks, contextlib.ExitStack() as held:
        run_log.start_logging(ranks)
        seed_random_generators(args.seed)
        config = load_config(args.model_config)
        run_folder = Path(args.save_dir)
        if ranks.is_main:
            held.enter_context(run_log.run_lock(run_folder))
        if was_restarted() and (checkpoints_of(run_folder) or not args.continue_from):
            args.continue_from = "auto"
        checkpoint = find_checkpoint(args.continue_from, run_folder, ranks) if args.continue_from else None
        done = step_of(checkpoint) if checkpoint else 0
        if done >= args.num_training_steps and args.continue_from == "auto":
            logger.info(f"{run_folder} has made all {done} updates: nothing to do")
            if ranks.is_main:
                write_report(run_folder)  # it may have been killed just before its end
            return
        if ranks.is_main:
            # A folder without a checkpoint of its own has nothing to lose but the records of a run that must begin again.
            begun_again = bool(args.continue_from) and not checkpoints_of(run_folder)
            own = args.continue_from == "auto" or checkpoint and checkpoint.parents[1] == run_folder.resolve()
            if not (own or begun_again):
                run_log.refuse_to_mix(run_folder)
            if args.continue_from == "auto" and not checkpoint:
                logger.info(f"no checkpoint in {run_folder} yet: training from the start")

        data = load_data(
            args.dataset, args.tokenizer, config.vocab_size, args.max_length, args.seed, args.target_eval_tokens,
            args.validation_file, stream=args.stream, packing=args.packing, first=ranks.first,
        )  # fmt: skip
        logger.info(f"data: {data.description}")

        model = build_model(config, args.use_hf_model).to(ranks.device)
        if args.dtype == "bfloat16":
            model = model.to(torch.bfloat16)
        if args.activation_checkpointing:
            model.gradient_checkpointing_enable()
        parameters = sum(p.numel() for p in model.parameters())
        logger.info(f"model: {parameters / 1e6:.1f}M parameters, {args.dtype}, {ranks.world_size} x {ranks.device.type}")

        try:
            decay = decay_from_flags(args, model, AWD_FACTOR)  # None: uniform
        except ValueError as error:
            raise UserError(str(error)) from error
        groups = decay.param_groups() if decay else [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
        optimizer = build_optimizer(args.optimizer, groups, args.lr)

        progress = {"update_step": 0, "tokens_seen": 0, "position": None}
        if checkpoint:
            progress = resume(checkpoint, args, model, optimizer, decay, data.fingerprint, ranks)
        if ranks.is_main:  # a run that went on past its checkpoint, or never had one, has records that will be made again
            run_log.carry_records(checkpoint.parents[1] if checkpoint else run_folder, run_folder, done if checkpoint else -1)
            for newer in set_aside_newer(run_folder, done):
                logger.warning(f"{newer} is of the history that ends here: renamed to {newer.name}.abandoned")
        description = {"name": args.name, "arguments": vars(args), "model_config": config.to_dict(), "parameters": parameters}
        log = run_log.RunLog(run_folder, ranks, description, args.wandb_name, args.tags)
        checkpoints = Checkpoints(run_folder, ranks, args.keep_checkpoints, args.keep_every, args.on_save_error)
        train(args, model, optimizer, decay, data, progress, checkpoints, log, ranks)


def resume(checkpoint: Path, args, model, optimizer, decay, data_fingerprint: str, ranks: Ranks) -> dict:
    """Load a checkpoint into everything that decides the future; returns the counters."""
    trainer = load_checkpoint(checkpoint, model, optimizer, ranks)
    if trainer["data"] != data_fingerprint:
        raise UserError(f"{checkpoint} was trained on other data: give the --dataset, --tokenizer, --max_length and --packing of it")
    if (decay is None) != (trainer["decay"] is None):
        raise UserError(f"{checkpoint} was trained with another kind of weight decay: give the decay flags it was trained with")
    if decay:
        try:
            decay.load_state_dict(trainer["decay"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{checkpoint} does not fit the decay flags: {error}") from error
        decay.history.clear()  # the decays of construction are of weights that were just replaced
    for name, value in trainer["arguments"].items():
        if getattr(args, name, value) != value:
            logger.warning(f"--{name} is {getattr(args, name)}, was {value} in the checkpoint: the run will not be the one it continues")
    if trainer["progress"]["update_step"] >= args.num_training_steps:
        raise UserError(f"{checkpoint} has made all {args.num_training_steps} updates already: give more --num_training_steps")
    logger.info(f"continue from {checkpoint}")
    return trainer["progress"]


# ------------------------------------------------------------------------------------------------------ the training loop


def train(
    args, model: nn.Module, optimizer, decay, data, progress: dict, checkpoints: Checkpoints, log: run_log.RunLog, ranks: Ranks
) -> None:
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.dtype == "bf16_mixed")
    guard = FiniteGuard(optimizer, ranks, args.max_skipped_updates)
    parallel = data_parallel(model, guard, ranks)
    stop = StopRequest()
    steps = training_batches(
        data.train, seed=args.seed, position=progress["position"], total_batch_size=args.total_batch_size, batch_size=args.batch_size,
        rank=ranks.rank, world_size=ranks.world_size, workers=args.workers, pin_memory=ranks.device.type == "cuda",
        max_passes=args.max_passes,
    )  # fmt: skip
    log.modules(decay.history if decay else [])
    log.start_bar(args.num_training_steps, progress["update_step"])
    clock = Clock(progress["tokens_seen"])
    saved = progress["update_step"]

    for update in range(saved + 1, args.num_training_steps + 1):
        step, tokens, targets, ending = next_step(steps, stop, checkpoints, ranks)
        if ending is None:
            # Gradient of the mean loss over the global batch's target tokens, summed over micro-batches and ranks.
            loss = forward_backward(parallel, step.micro_batches, targets, autocast, ranks)
            if not guard.read():  # of the update before, which the device has long finished
                ending = UserError(
                    f"the loss or a gradient was not finite in {args.max_skipped_updates} updates in a row, up to update {update - 1}: "
                    "lower --lr or set --grad_clipping 1.0"
                )
        if ending is not None:
            if saved < update - 1:
                save(args, model, optimizer, decay, data, progress, checkpoints, ranks)
            checkpoints.finish()
            return end_early(ending, update - 1, log)

        norm = clip_gradients(model, args.grad_clipping)
        guard.judge(update, loss, norm)  # what is not finite on one rank is applied on none
        checkpoints.before_update()

        # Every `unbalancedWD_every` updates the weights are analysed and each group gets a new decay.
        before = time.perf_counter()
        rebalanced = decay is not None and decay.step(optimizer)
        clock.analysis_took(time.perf_counter() - before, rebalanced)
        if rebalanced:
            log.modules([row for row in decay.history if row["step"] == update])
        factor = lr_factor(update, args.scheduler, args.num_training_steps, args.warmup_steps, args.min_lr_ratio, args.cycle_length)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        optimizer.step()
        optimizer.zero_grad()
        log.advance()
        progress = {"update_step": update, "tokens_seen": progress["tokens_seen"] + tokens, "position": step.position}

        last = update == args.num_training_steps
        logs, evaluates, saves = (last or update % every == 0 for every in (args.log_every, args.eval_every, args.save_every))
        if logs or update == 1:
            guard.read()
            loss = float(ranks.sum(loss))  # this and the norm are the only numbers that the step waits for
            record = {"update_step": update, "loss": loss, "lr": args.lr * factor, "weight_decay": mean_decay(optimizer)}
            record |= {"grad_norm": float(norm), "tokens_seen": progress["tokens_seen"], "skipped_updates": guard.skipped}
            log.metrics(record | clock.rates(update, progress["tokens_seen"], args.total_batch_size))
        if evaluates:
            with clock.pause():
                evaluate_and_log(args, model, data, update, autocast, log, ranks)
        if saves:
            with clock.pause():
                save(args, model, optimizer, decay, data, progress, checkpoints, ranks)
                saved = update
    checkpoints.finish()
    finish(clock, log, ranks)


def data_parallel(model: nn.Module, guard: FiniteGuard, ranks: Ranks) -> nn.Module:
    """The model with gradients summed over the ranks, each rank's own seen by the guard before."""
    if ranks.world_size == 1:
        return model
    parallel = nn.parallel.DistributedDataParallel(model, device_ids=[ranks.local_rank] if ranks.device.type == "cuda" else None)
    guard.sum_over_ranks(parallel)
    # After its first pass DistributedDataParallel packs the gradients anew, and may then add them in another order. A resumed
    # run must add in the order of the run that it continues, so every run makes that pass here, on two tokens.
    two_tokens = torch.zeros(1, 2, dtype=torch.long, device=ranks.device)
    parallel(two_tokens, two_tokens).backward()
    model.zero_grad()
    return parallel


def next_step(steps, stop: StopRequest, checkpoints: Checkpoints, ranks: Ranks) -> tuple[Step | None, int, int, Exception | None]:
    """This rank's data of the next update with the tokens and targets of the global batch, or, agreed by all ranks, why there is none."""
    try:
        step, problem = next(steps), checkpoints.failure()
    except UserError as error:
        step, problem = None, str(error)
    labels = [batch["labels"] for batch in step.micro_batches] if step else []
    tokens, targets = (sum(int((y[:, start:] != IGNORED).sum()) for y in labels) for start in (0, 1))
    # On the CPU, so that no rank waits for its device.
    tokens, targets, endings = ranks.sum(torch.tensor([tokens, targets, bool(problem or stop.signal)])).tolist()
    if not endings:
        return step, tokens, targets, None
    said = ranks.broadcast(ranks.gather((problem, stop.signal)))
    problems = [f"{problem} (rank {rank})" if ranks.world_size > 1 else problem for rank, (problem, _) in enumerate(said) if problem]
    signals = [signal for _, signal in said if signal]
    return None, 0, 0, UserError(problems[0]) if problems else Stopped(signals[0].name)


class Stopped(Exception):
    """A signal asked for the end of the run."""


def end_early(ending: Exception, update: int, log: run_log.RunLog) -> None:
    """A run that goes no further than this update, whose checkpoint is on the disk."""
    if not isinstance(ending, Stopped):
        raise ending
    log.close()
    logger.warning(f"{ending}: stopped after update {update}; the same command with --continue_from auto goes on")


def forward_backward(model: nn.Module, micro_batches: list[dict], targets: int, autocast, ranks: Ranks) -> torch.Tensor:
    """Gradients of one update. Returns this rank's share of the mean loss per target token of the global batch."""
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        input_ids, target_ids = (batch[key].to(ranks.device, non_blocking=True) for key in ("input_ids", "labels"))
        # Gradients are exchanged with the last micro-batch only.
        synchronise = i == len(micro_batches) - 1 or ranks.world_size == 1
        with contextlib.nullcontext() if synchronise else model.no_sync(), autocast:
            loss = model(input_ids, target_ids) / max(targets, 1)
        loss.backward()
        total += loss.detach()
    return total


def clip_gradients(model: nn.Module, greatest_norm: float) -> torch.Tensor:
    """The L2 norm of all gradients together, which is brought down to `greatest_norm` where that is not 0."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if greatest_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), greatest_norm, norm)
    return norm


def evaluate_and_log(args, model: nn.Module, data, update: int, autocast, log: run_log.RunLog, ranks: Ranks) -> None:
    start = time.perf_counter()
    result = evaluate(model, validation_batches(data.validation, args.batch_size, ranks.rank, ranks.world_size), ranks, autocast)
    final = update == args.num_training_steps
    log.metrics({"update_step": update, **result, "eval_seconds": time.perf_counter() - start, "final": final})
    logger.info(
        f"update {update}: validation loss {result['eval_loss']:.4f}, perplexity {result['perplexity']:.2f} over "
        f"{result['eval_tokens']:,} tokens (reference_perplexity {result['reference_perplexity']:.2f})"
    )


def save(args, model: nn.Module, optimizer, decay, data, progress: dict, checkpoints: Checkpoints, ranks: Ranks) -> None:
    arguments = {name: getattr(args, name) for name in DECIDES_THE_FUTURE}
    positions = ranks.gather(progress["position"])
    if ranks.is_main:  # where the data stand for all ranks, so that another number of them can go on
        progress = progress | {"position": merge_positions(positions)}
    trainer = {"progress": progress, "decay": decay.state_dict() if decay else None, "data": data.fingerprint, "arguments": arguments}
    checkpoints.save(progress["update_step"], model, optimizer, trainer, data.tokenizer.hf)


# Arguments that a resumed run must share with the checkpoint to be the same run.
DECIDES_THE_FUTURE = (
    "use_hf_model", "optimizer", "lr", "weight_decay", "total_batch_size", "num_training_steps", "warmup_steps",
    "scheduler", "cycle_length", "min_lr_ratio", "grad_clipping", "dtype", "seed", "use_modulewise_wd", "alpha_positively_with_WD",
    "unbalancedWD_every", "esd_metric_for_tb", "assign_func", "wd_min_ratio", "wd_max_ratio", "pl_fitting", "xmin_pos",
    "filter_zeros", "remove_first_layer", "remove_last_layer", "balance_scope", "esd_async", "esd_lag", "use_AWD_NeurIPS2023",
)  # fmt: skip


def mean_decay(optimizer) -> float:
    """The parameter-weighted mean of the groups' decays."""
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return sum(n * group["weight_decay"] for n, group in zip(sizes, optimizer.param_groups, strict=True)) / sum(sizes)


# ---------------------------------------------------------------------------------------------------------------- the end


class Clock:
    """Seconds of training without evaluations and checkpoints, and how many of them the analyses took."""

    def __init__(self, tokens_seen: int):
        self.started = self.last = time.perf_counter()
        self.paused = self.analysing = 0.0
        self.analyses = 0
        self.first_tokens = self.last_tokens = tokens_seen
        self.last_update = None

    @contextlib.contextmanager
    def pause(self):
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start
        self.last += time.perf_counter() - start

    def analysis_took(self, seconds: float, rebalanced: bool) -> None:
        self.analysing += seconds
        self.analyses += rebalanced

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused

    def rates(self, update: int, tokens_seen: int, examples: int) -> dict[str, float]:
        """Throughput since the last call: tokens (no pads), rows and updates a second."""
        now = time.perf_counter()
        updates = update - (self.last_update if self.last_update is not None else update - 1)
        elapsed, tokens = max(now - self.last, 1e-9), tokens_seen - self.last_tokens
        self.last, self.last_tokens, self.last_update = now, tokens_seen, update
        rates = {"tokens": tokens / elapsed, "examples": updates * examples / elapsed, "batches": updates / elapsed}
        return {f"throughput_{name}": rate for name, rate in rates.items()} | {"seconds": self.seconds()}


def finish(clock: Clock, log: run_log.RunLog, ranks: Ranks) -> None:
    """Summary and report."""
    seconds = clock.seconds()
    summary = {
        "train_seconds": seconds,
        "tokens_per_second": (clock.last_tokens - clock.first_tokens) / seconds,
        "analyses": clock.analyses,
        "analysis_seconds": clock.analysing,
        "analysis_share": clock.analysing / seconds,
    }
    log.finish(summary)
    if ranks.is_main:
        logger.info(f"{summary['tokens_per_second']:,.0f} tokens/s; analyses took {clock.analysing:.2f} s, {clock.analysing / seconds:.2%}")
        logger.info(f"report: {write_report(log.folder)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
