"""Pretrain LLaMA with AlphaDecay: module-wise weight decay from the spectra of the weights (arXiv 2506.14562).

    torchrun --nproc_per_node=2 torchrun_main.py --model_config configs/llama_60m.json --use_modulewise_wd \
        --alpha_positively_with_WD --weight_decay 1e-5

Runs on one process (plain python) or several (torchrun), on CPU or GPU, and finds out by itself which. Sections:
arguments, set-up, the training loop.
"""

import argparse
import contextlib
import gc
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from loguru import logger

from alphadecay.cli.flags import add_flags, decay_from_flags, register_decay_hooks
from alphadecay.cli.presets import parse_arguments as parse_with_method
from alphadecay.param_groups import split_hidden
from peft_pretraining.checkpoint.format import step_of
from peft_pretraining.checkpoint.random_state import seed_random_generators
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.cli.llama import complete, llama_parser, packing_of
from peft_pretraining.cli.main import run_script
from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.data.dataset import load_data
from peft_pretraining.data.loader import Step, merge_positions, training_batches, validation_batches
from peft_pretraining.errors import UserError
from peft_pretraining.model.linear_cross_entropy import choose
from peft_pretraining.model.modeling_llama import build_model, load_config, target_rows
from peft_pretraining.optim.gradients import mean_decay
from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.optim.schedule import lr_factor
from peft_pretraining.parallel.ddp import data_parallel
from peft_pretraining.parallel.fsdp import exchange_gradients, shard_model
from peft_pretraining.parallel.process_group import (
    DistributedContext,
    process_group,
    world_size_of_environment,
)
from peft_pretraining.records.console import start_logging
from peft_pretraining.records.run_dir import run_lock
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.train.evaluation import evaluate
from peft_pretraining.train.flops import llama_flops
from peft_pretraining.train.loop import (
    finish,
    next_step,
    report,
    stop_early,
    without_garbage_collection,
)
from peft_pretraining.train.profiler import profiled
from peft_pretraining.train.resume import (
    resolve_checkpoint,
    resume,
    saved_argument,
    truncate_records_after,
)
from peft_pretraining.train.signals import StopRequest
from peft_pretraining.train.step import Updates
from peft_pretraining.train.throughput import ThroughputMeter, Work

AWD_FACTOR = 100  # lambda_awd = 100 * eta in the published LLaMA runs

# -------------------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = llama_parser()
    add_flags(parser)
    return complete(parse_with_method(parser), world_size_of_environment())


# ----------------------------------------------------------------------------------------------------------------- set-up


def main() -> None:
    args = parse_arguments()
    with process_group(args.single_cuda) as ranks, contextlib.ExitStack() as held:
        start_logging(ranks)
        seed_random_generators(args.seed)
        config = load_config(args.model_config)
        run_folder = Path(args.save_dir)
        if ranks.is_main:
            held.enter_context(run_lock(run_folder))
        args.continue_from, checkpoint = resolve_checkpoint(args.continue_from, run_folder, ranks)
        done = step_of(checkpoint) if checkpoint else 0
        if done >= args.num_training_steps and args.continue_from == "auto":
            logger.info(f"{run_folder} has made all {done} updates: nothing to do")
            if ranks.is_main:
                report(run_folder)  # it may have been killed just before its end
            return

        data = load_data(
            args.dataset, args.tokenizer, config.vocab_size, args.max_length, args.seed, args.target_eval_tokens,
            args.validation_file, stream=args.stream, packing=packing_of(args), rank_zero_first=ranks.first,
        )  # fmt: skip
        logger.info(f"data: {data.description}")

        model = make_model(args, config, data.tokenizer.eos_id, checkpoint, ranks)
        parameters = sum(p.numel() for p in model.parameters())
        logger.info(
            f"model: {parameters / 1e6:.1f}M parameters, {args.dtype}, {ranks.world_size} x {ranks.device.type}"
        )

        decay, optimizer = make_optimizer(args, model)

        progress = {"update_step": 0, "tokens_seen": 0, "position": None}
        if checkpoint:
            progress = resume(
                checkpoint,
                args,
                args.num_training_steps,
                model,
                optimizer,
                decay,
                data.fingerprint,
                ranks,
            )
        if ranks.is_main:
            truncate_records_after(checkpoint, run_folder)
        description = {
            "name": args.name,
            "arguments": vars(args),
            "model_config": config.to_dict(),
            "parameters": parameters,
        }
        dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
        flops = llama_flops(config, args.max_length) * args.max_length
        work = Work.of("tokens", args.total_batch_size, args.max_length, flops, dtype, ranks)
        project = None if args.no_wandb else "alphadecay"
        log = RunLog(
            run_folder, ranks, description | work.record(), args.wandb_name, args.tags, project
        )
        checkpoints = Checkpoints(
            run_folder, ranks, args.keep_checkpoints, args.keep_every, args.on_save_error
        )
        held.enter_context(without_garbage_collection())
        train(args, model, optimizer, decay, data, progress, work, checkpoints, log, ranks)


def make_model(
    args: argparse.Namespace,
    config,
    end_of_document: int,
    checkpoint: Path | None,
    ranks: DistributedContext,
) -> nn.Module:
    """The model on this rank's device, with initial weights, as the flags ask for it."""
    model = build_model(config, args.use_hf_model)
    if args.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if args.packing_attention == "within":
        model.confine_attention(end_of_document)
    configure_loss_and_compile(args, model, checkpoint, ranks)
    if args.parallel == "fsdp" and ranks.world_size > 1:
        return shard_model(
            model, ranks, args.dtype, args.fsdp_shard_size
        )  # before anything holds its parameters
    return model.to(ranks.device)


def make_optimizer(args: argparse.Namespace, model: nn.Module):
    """What sets the decays (None: they are uniform), and the optimizer with its groups. Raises UserError for what does not go together."""
    try:
        decay = decay_from_flags(args, model, AWD_FACTOR)
        groups = (
            decay.param_groups()
            if decay
            else [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
        )
        optimizer = build_optimizer(args.optimizer, split_hidden(groups, model), args.lr)
        register_decay_hooks(args, optimizer)  # --adamc, --cautious_decay
    except ValueError as error:
        raise UserError(str(error)) from error
    return decay, optimizer


def configure_loss_and_compile(
    args: argparse.Namespace, model: nn.Module, checkpoint: Path | None, ranks: DistributedContext
) -> None:
    """Settle what `--loss auto` and `--compile auto` mean here, and prepare the model for it."""
    before = saved_argument(checkpoint, "loss") if checkpoint else None
    head = model.lm_head.weight
    tokens = args.batch_size * (args.max_length - 1)
    args.loss = choose(
        args.loss, tokens, tuple(head.shape), head.dtype, autocast_of(args, ranks), ranks, before
    )
    model.set_loss(args.loss)
    if args.compile == "auto":
        args.compile = "on" if ranks.device.type == "cuda" else "off"
    if args.compile == "on":
        model.compile_blocks()
    logger.info(f"loss: {args.loss}, compiled blocks: {args.compile}")


# ------------------------------------------------------------------------------------------------------ the training loop


def train(
    args,
    model: nn.Module,
    optimizer,
    decay,
    data,
    progress: dict,
    work: Work,
    checkpoints: Checkpoints,
    log: RunLog,
    ranks: DistributedContext,
) -> None:
    autocast = autocast_of(args, ranks)
    guard = NonFiniteGuard(optimizer, ranks, args.max_skipped_updates)
    two_tokens = torch.zeros(1, 2, dtype=torch.long, device=ranks.device)
    parallel = data_parallel(model, guard, ranks, lambda parallel: parallel(two_tokens, two_tokens))
    stop = StopRequest()
    clock = ThroughputMeter(work, progress["update_step"], progress["tokens_seen"], ranks.device)
    steps = training_batches(
        data.train, seed=args.seed, position=progress["position"], total_batch_size=args.total_batch_size, batch_size=args.batch_size,
        rank=ranks.rank, world_size=ranks.world_size, workers=args.workers, pin_memory=ranks.device.type == "cuda",
        max_passes=args.max_passes,
    )  # fmt: skip
    steps = clock.timed(steps)
    updates = Updates(model, optimizer, decay, args.grad_clipping, guard, checkpoints, clock, log)
    log.modules(decay.history if decay else [])
    log.start_bar(args.num_training_steps, progress["update_step"])
    saved = progress["update_step"]

    for update in profiled(
        range(saved + 1, args.num_training_steps + 1), args.profile, log.folder, ranks
    ):
        step, (tokens, targets), ending = next_step(steps, stop, checkpoints, ranks, count_tokens)
        if ending is None:
            # Gradient of the mean loss over the global batch's target tokens, summed over micro-batches and ranks.
            loss = forward_backward(parallel, step.micro_batches, targets, autocast, ranks)
            ending = guard.failure(
                update - 1, "--grad_clipping"
            )  # of the update before, which the device has long finished
        if ending is not None:
            if saved < update - 1:
                save(args, model, optimizer, decay, data, progress, checkpoints, ranks)
            checkpoints.finish()
            return stop_early(
                ending, update - 1, log, "the same command with --continue_from auto goes on"
            )

        # Clip, leave out what is not finite, set the decays (an analysis every `unbalancedWD_every` updates), step.
        factor = lr_factor(
            update,
            args.scheduler,
            args.num_training_steps,
            args.warmup_steps,
            args.min_lr_ratio,
            args.cycle_length,
        )
        norm = updates.make(update, loss, args.lr * factor)
        progress = {
            "update_step": update,
            "tokens_seen": progress["tokens_seen"] + tokens,
            "position": step.position,
        }

        last = update == args.num_training_steps
        logs, evaluates, saves = (
            last or update % every == 0
            for every in (args.log_every, args.eval_every, args.save_every)
        )
        if logs or update == 1:
            guard.read()
            loss = float(
                ranks.sum(loss)
            )  # this and the norm are the only numbers that the step waits for
            record = {
                "update_step": update,
                "loss": loss,
                "lr": args.lr * factor,
                "weight_decay": mean_decay(optimizer),
            }
            record |= {
                "grad_norm": float(norm),
                "tokens_seen": progress["tokens_seen"],
                "skipped_updates": guard.skipped,
            }
            log.metrics(record | clock.rates(update, progress["tokens_seen"]))
        if evaluates:
            with clock.pause():
                evaluate_and_log(args, model, data, update, autocast, log, ranks)
        if saves:
            with clock.pause():
                save(args, model, optimizer, decay, data, progress, checkpoints, ranks)
                saved = update
        if logs or evaluates or saves:
            gc.collect()  # on all ranks at once, see without_garbage_collection
    finish(clock, log, ranks)
    checkpoints.finish()


def count_tokens(step: Step | None) -> list[int]:
    """Tokens without pads, and target tokens, of this rank's part of an update."""
    labels = [batch["labels"] for batch in step.micro_batches] if step else []
    return [sum(int((y[:, start:] != IGNORE_INDEX).sum()) for y in labels) for start in (0, 1)]


def forward_backward(
    model: nn.Module, micro_batches: list[dict], targets: int, autocast, ranks: DistributedContext
) -> torch.Tensor:
    """Gradients of one update. Returns this rank's share of the mean loss per target token of the global batch."""
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        rows = target_rows(
            batch["labels"]
        )  # on the CPU: how many there are is not asked of the device
        rows = rows.pin_memory() if ranks.device.type == "cuda" else rows
        inputs = (
            x.to(ranks.device, non_blocking=True)
            for x in (batch["input_ids"], batch["labels"], rows)
        )
        # Gradients are exchanged with the last micro-batch only.
        with exchange_gradients(model, i == len(micro_batches) - 1), autocast:
            loss = model(*inputs) / max(targets, 1)
        loss.backward()
        total += loss.detach()
    return total


def autocast_of(args: argparse.Namespace, ranks: DistributedContext) -> torch.autocast:
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.dtype == "bf16_mixed")


def evaluate_and_log(
    args, model: nn.Module, data, update: int, autocast, log: RunLog, ranks: DistributedContext
) -> None:
    start = time.perf_counter()
    batches = validation_batches(data.validation, args.batch_size, ranks.rank, ranks.world_size)
    result = evaluate(model, batches, ranks, autocast)
    final = update == args.num_training_steps
    log.metrics(
        {
            "update_step": update,
            **result,
            "eval_seconds": time.perf_counter() - start,
            "final": final,
        }
    )
    logger.info(
        f"update {update}: validation loss {result['eval_loss']:.4f}, perplexity {result['perplexity']:.2f} over "
        f"{result['eval_tokens']:,} tokens (reference_perplexity {result['reference_perplexity']:.2f})"
    )


def save(
    args,
    model: nn.Module,
    optimizer,
    decay,
    data,
    progress: dict,
    checkpoints: Checkpoints,
    ranks: DistributedContext,
) -> None:
    arguments = {name: getattr(args, name) for name in RESUME_ARGUMENTS}
    positions = ranks.gather(progress["position"])
    if (
        ranks.is_main
    ):  # where the data stand for all ranks, so that another number of them can go on
        progress = progress | {"position": merge_positions(positions)}
    trainer = {
        "progress": progress,
        "decay": decay.state_dict() if decay else None,
        "data": data.fingerprint,
        "arguments": arguments,
    }
    checkpoints.save(progress["update_step"], model, optimizer, trainer, data.tokenizer.hf)


# Arguments that a resumed run must share with the checkpoint to be the same run.
RESUME_ARGUMENTS = (
    "use_hf_model", "loss", "compile", "optimizer", "lr", "weight_decay", "total_batch_size", "num_training_steps", "warmup_steps",
    "scheduler", "cycle_length", "min_lr_ratio", "grad_clipping", "dtype", "seed", "use_modulewise_wd", "alpha_positively_with_WD",
    "unbalancedWD_every", "esd_metric_for_tb", "assign_func", "wd_min_ratio", "wd_max_ratio", "pl_fitting", "xmin_pos",
    "filter_zeros", "remove_first_layer", "remove_last_layer", "balance_scope", "esd_async", "esd_lag", "use_AWD_NeurIPS2023",
    "use_AdaDecay", "iso_budget", "one_shot", "shuffle_decays", "shuffle_seed", "type_constant", "type_multipliers", "adamc",
    "cautious_decay",
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_script(main))
