"""Pretrain LLaMA with AlphaDecay: module-wise weight decay from heavy-tailed spectra.

    torchrun --nproc_per_node=2 torchrun_main.py --model_config configs/llama_60m.json \
        --use_modulewise_wd --alpha_positively_with_WD --weight_decay 1e-5

The method is that of He et al., NeurIPS 2025 (arXiv 2506.14562). The script runs on one process
(plain python) or on several (torchrun), on CPUs or on GPUs, and detects which.

Sections: arguments, set-up, model and optimizer, training loop, gradients, evaluation and
checkpoints.
"""

import argparse
import contextlib
import functools
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from alphadecay.cli.describe import MethodDescription, check_method, describe_method
from alphadecay.cli.flags import add_flags, decay_from_flags, register_decay_hooks
from alphadecay.cli.presets import method_name
from alphadecay.cli.presets import parse_arguments as parse_with_method
from peft_pretraining.cli.llama import (
    DATA_ARGUMENTS,
    RESUME_ARGUMENTS,
    complete,
    llama_parser,
    packing_mode,
)
from peft_pretraining.cli.main import end, parse_or_exit, run_script
from peft_pretraining.cli.published import LLAMA, published_differences
from peft_pretraining.parallel.launch import Launch, read_launch

# -------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Raises UserError for arguments that do not fit each other."""
    parser = llama_parser()
    add_flags(parser)
    args = parse_with_method(parser)
    # Batch sizes are checked against the number of processes before anything is loaded.
    return complete(args, read_launch().world_size, method_name(vars(args)))


# The command line is parsed before the imports below, which take seconds because of torch:
# --help and a mistyped flag are answered at once. The imports create hundreds of thousands of
# objects and hardly any garbage, so that searching for garbage meanwhile would waste half a second.
if __name__ == "__main__":
    ARGUMENTS = parse_or_exit(parse_arguments)
    LAUNCH = parse_or_exit(read_launch)
    if ARGUMENTS.dry_run and LAUNCH.rank > 0:
        sys.exit()  # rank 0 alone prints what the command would do
    gc.disable()

import torch
import torch.nn as nn
from loguru import logger
from torch.optim import Optimizer

from alphadecay.param_groups import split_hidden
from peft_pretraining.checkpoint.format import step_of
from peft_pretraining.checkpoint.random_state import seed_random_generators
from peft_pretraining.checkpoint.retention import tidy
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.data.dataset import Data, load_data
from peft_pretraining.data.loader import Step, merge_positions, training_batches, validation_batches
from peft_pretraining.data.preview import preview_data
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.model.compilation import resolve_compile
from peft_pretraining.model.config import LlamaConfig, load_config, rope_of
from peft_pretraining.model.linear_cross_entropy import resolve_loss
from peft_pretraining.model.modeling_llama import TrainableLlama, build_model, target_positions
from peft_pretraining.optim.gradients import clip_gradients, mean_decay
from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.optim.schedule import lr_factor
from peft_pretraining.parallel.ddp import data_parallel, zero_gradients
from peft_pretraining.parallel.fsdp import exchange_gradients, shard_model
from peft_pretraining.parallel.process_group import DistributedContext, process_group
from peft_pretraining.records.console import block, start_logging
from peft_pretraining.records.run_dir import run_lock
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.records.wandb import describe_wandb
from peft_pretraining.train.evaluation import evaluate
from peft_pretraining.train.flops import llama_flops
from peft_pretraining.train.loop import (
    SavePoint,
    finish,
    next_step,
    saved_on_failure,
    stop_early,
    without_garbage_collection,
    write_run_report,
)
from peft_pretraining.train.profiler import profiled
from peft_pretraining.train.resume import (
    check_same_settings,
    describe_start,
    has_finished,
    resolve_checkpoint,
    resume,
    saved_argument,
    truncate_records_after,
)
from peft_pretraining.train.signals import StopRequest
from peft_pretraining.train.step import (
    WeightDecayScheduler,
    set_learning_rate,
    update_weight_decays,
)
from peft_pretraining.train.throughput import ThroughputMeter, WorkPerStep
from peft_pretraining.utils.determinism import use_deterministic_algorithms
from peft_pretraining.utils.seeding import TRAINING, seed_everything

if __name__ == "__main__":
    gc.enable()
    gc.freeze()  # later collections do not examine the objects of the libraries again

# The baseline AWD (Ghiasi et al. 2023) takes a coefficient lambda_awd. The published LLaMA runs set
# it to 100 times the weight decay eta.
AWD_FACTOR = 100

# ----------------------------------------------------------------------------------------- set-up
#
# Words used below. An update is one step of the optimizer on a global batch of --total_batch_size
# sequences. A rank is one process with one device. Each rank processes its part of the global batch
# in micro-batches of --batch_size sequences, as many as its memory allows.


@dataclass(frozen=True)
class Run:
    """What the training loop works on.

    Args:
        model: on this rank's device; not wrapped for data-parallel training.
        optimizer: its groups carry a weight decay each.
        decay: sets the decays of the groups; None: they are uniform.
        data: training and validation sequences.
        work: operations and tokens of an update.
        checkpoints: saves in the background.
        log: records of the run.
    """

    model: nn.Module
    optimizer: Optimizer
    decay: WeightDecayScheduler | None
    data: Data
    work: WorkPerStep
    checkpoints: Checkpoints
    log: RunLog


def main(args: argparse.Namespace, launch: Launch | None = None) -> None:
    """Set a run up, or resume it, and train. Raises UserError for what the user can fix.

    Args:
        args: the arguments.
        launch: the place of this process among the others; by default as the environment says.
    """
    if args.dry_run:
        return dry_run(args)
    if args.deterministic:
        use_deterministic_algorithms()
    # The stack releases the lock of the run folder and turns garbage collection on again, however
    # the run ends.
    with (
        process_group(
            args.single_cuda, launch=launch, timeout_minutes=args.timeout_minutes
        ) as ranks,
        contextlib.ExitStack() as stack,
    ):
        # All ranks start from the same seed, so they build the same initial weights and no rank
        # has to send its own to the others.
        start_logging(ranks)
        seed_random_generators(args.seed)
        config = load_config(args.model_config)
        method, lines = describe_run(args, config, ranks.world_size, ranks.device.type)
        logger.info(block(args.name, lines))
        for warning in method.warnings:
            logger.warning(warning)
        for sentence in published_differences(LLAMA, args, sys.argv[1:]):
            logger.info(f"not as in the published code: {sentence}")
        run_folder = Path(args.save_dir)

        # Where to start. The lock keeps a second process, for instance a job that was queued twice,
        # from writing to the same folder.
        if ranks.is_main:
            stack.enter_context(run_lock(run_folder))
        args.continue_from, checkpoint = resolve_checkpoint(args.continue_from, run_folder, ranks)
        if args.same_settings_only:
            names = (*RESUME_ARGUMENTS, *DATA_ARGUMENTS)
            check_same_settings(checkpoint, run_folder, vars(args), names)
        if checkpoint and ranks.is_main:
            tidy(run_folder, checkpoint, args.keep_checkpoints, args.keep_every)
        total, own = args.num_training_steps, args.continue_from == "auto"
        if checkpoint and own and has_finished(checkpoint, total):
            logger.info(f"{run_folder} has made all {step_of(checkpoint)} updates: nothing to do")
            if ranks.is_main:
                # The run may have been killed after its last update and before its report.
                write_run_report(run_folder)
            return

        # Data. Rank 0 fills the caches before the other ranks look into them.
        data = load_data(
            args.dataset,
            args.tokenizer,
            config.vocab_size,
            args.max_length,
            args.seed,
            args.target_eval_tokens,
            args.validation_file,
            stream=args.stream,
            packing=packing_mode(args.packing, args.packing_attention),
            rank_zero_first=ranks.rank_zero_first,
        )
        logger.info(f"data: {data.description}")

        # Model, weight-decay scheduler, optimizer. The scheduler analyses the initial weights and
        # decides how the parameters are grouped, so it comes before the optimizer.
        model = prepare_model(args, config, data.tokenizer.eos_id, checkpoint, ranks)
        decay, optimizer = build_decay_and_optimizer(args, model)

        # Resume. Records that the earlier process wrote after its last checkpoint are removed,
        # because these updates will be made again.
        progress = {"update_step": 0, "tokens_seen": 0, "position": None}
        if checkpoint:
            progress = resume(
                checkpoint,
                vars(args),
                args.num_training_steps,
                model,
                optimizer,
                decay,
                data.fingerprint,
                ranks,
            )
        if ranks.is_main:
            truncate_records_after(checkpoint, run_folder)

        # Derived numbers, printed and written to run.json: operations per token, and the peak rate
        # of the devices, which the utilization (MFU) is a fraction of.
        work = WorkPerStep.measure(
            "tokens",
            args.total_batch_size,
            args.max_length,
            llama_flops(config, args.max_length) * args.max_length,
            torch.float32 if args.dtype == "float32" else torch.bfloat16,
            ranks,
        )
        description = {
            "name": args.name,
            "arguments": vars(args),
            "data": data.description,
            "model_config": config.to_dict(),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        log = RunLog(
            run_folder,
            ranks,
            description | method.record() | work.record(),
            args.wandb_name,
            args.tags,
            project=None if args.no_wandb else args.project,
            done=progress["update_step"],
            source=checkpoint.parents[1] if checkpoint else None,
        )
        checkpoints = Checkpoints(
            run_folder,
            ranks,
            args.keep_checkpoints,
            args.keep_every,
            args.on_save_error,
            args.save_every_minutes,
        )
        stack.enter_context(without_garbage_collection())
        train(args, Run(model, optimizer, decay, data, work, checkpoints, log), progress, ranks)


def describe_run(
    args: argparse.Namespace, config: LlamaConfig, world_size: int, device: str
) -> tuple[MethodDescription, dict[str, str]]:
    """Return the weight-decay method, and the lines that are logged before anything else."""
    with torch.device("meta"):  # shapes without values: this needs neither time nor memory
        model = build_model(config, args.use_hf_model)
    method = describe_method(args, model, AWD_FACTOR)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = args.total_batch_size * args.max_length
    return method, {
        "method": f"{method.name}: {method.details}",
        "optimizer": f"{args.optimizer}, learning rate {args.lr:g} after {args.warmup_steps:,} "
        f"updates of warm-up, then {args.scheduler} to {args.min_lr_ratio * args.lr:g}",
        "model": f"{args.model_config}, {parameters / 1e6:.1f}M parameters, {args.dtype}, "
        f"{world_size} x {device}" + f", {args.parallel}" * (world_size > 1),
        "length": f"{args.num_training_steps:,} updates, {args.num_training_steps * tokens:,} "
        "tokens with padding",
        "update": f"{tokens:,} tokens = sequences of {args.max_length:,} x micro-batches of "
        f"{args.batch_size:,} x {args.gradient_accumulation} accumulated x {world_size} "
        f"process{'es' if world_size > 1 else ''}",
        "records": f"{args.save_dir}, "
        f"{describe_wandb(None if args.no_wandb else args.project)}; a checkpoint every "
        f"{args.save_every:,} updates and at the end",
    }


def dry_run(args: argparse.Namespace) -> None:
    """Print what the command would do. Raises UserError for what the training would refuse."""
    world_size = read_launch().world_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = load_config(args.model_config)
    method, lines = describe_run(args, config, world_size, device)
    with torch.device("meta"):
        model = build_model(config, args.use_hf_model)
    model = model.to(torch.bfloat16) if args.dtype == "bfloat16" else model
    try:
        check_method(args, model, AWD_FACTOR)
        groups = [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
        optimizer = build_optimizer(args.optimizer, split_hidden(groups, model), args.lr)
        register_decay_hooks(args, optimizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    lines["data"] = preview_data(
        args.dataset, args.tokenizer, args.validation_file, args.stream, args.packing
    )
    lines["memory"] = memory_plan(args, world_size)
    names = (*RESUME_ARGUMENTS, *DATA_ARGUMENTS)
    lines["start"] = describe_start(vars(args), Path(args.save_dir), names)
    print(block(f"{args.name} (dry run: nothing is trained)", lines))
    notes = [*method.warnings, *published_differences(LLAMA, args, sys.argv[1:])]
    print("".join(f"note: {note}\n" for note in notes), end="")


def memory_plan(args: argparse.Namespace, world_size: int) -> str:
    """Return the estimated memory of the fullest GPU as a line."""
    from scripts.cluster.cost_model import estimate_memory, read_model

    strategy = args.parallel if world_size > 1 else "ddp"
    if strategy == "fsdp" and args.fsdp_shard_size:
        strategy = "hsdp"
    memory = estimate_memory(
        read_model(args.model_config),
        strategy,
        world_size,
        args.batch_size,
        args.max_length,
        args.dtype,
        args.gradient_accumulation,
        args.compile != "off",
    )
    parts = ", ".join(
        f"{name} {getattr(memory, name) / 1e9:.2g}"
        for name in ("weights", "gradients", "moments", "activations", "logits")
    )
    return f"about {memory.peak / 1e9:.2g} GB on each GPU at the peak ({parts}); estimated"


# ---------------------------------------------------------------------------- model and optimizer
#
# The model is LLaMA (Touvron et al. 2023, arXiv 2302.13971) in the sizes of configs/. AlphaDecay
# gives each of its modules, such as the query projection of a block, a weight decay of its own. So
# each module is a parameter group of the optimizer, and changing a decay means writing a number
# into its group: any optimizer with decoupled or L2 decay can be used as it is.


def prepare_model(
    args: argparse.Namespace,
    config: LlamaConfig,
    end_of_document: int,
    checkpoint: Path | None,
    ranks: DistributedContext,
) -> nn.Module:
    """Build the model with initial weights on this rank's device, as the flags ask for it."""
    model = build_model(config, args.use_hf_model)
    if args.dtype == "bfloat16":
        # The published runs hold the parameters themselves in bfloat16. bf16_mixed keeps them in
        # float32 and computes in bfloat16 under autocast.
        model = model.to(torch.bfloat16)
    if args.activation_checkpointing:
        # Activations need most of the memory at long sequences and large micro-batches.
        model.gradient_checkpointing_enable()
    if args.packing_attention == "within":
        # A packed sequence contains several documents. By default a token attends to all before it,
        # also to those of other documents, as in most published pretraining runs.
        model.confine_attention(end_of_document)
    configure_loss_and_compile(args, model, checkpoint, ranks)
    if args.parallel == "fsdp" and ranks.world_size > 1:
        # Sharding replaces the parameters, so it comes before the optimizer and the weight-decay
        # scheduler hold references to them.
        return shard_model(model, ranks, args.dtype, args.fsdp_shard_size)
    return model.to(ranks.device)


def configure_loss_and_compile(
    args: argparse.Namespace,
    model: TrainableLlama,
    checkpoint: Path | None,
    ranks: DistributedContext,
) -> None:
    """Resolve --loss auto and --compile auto, then configure the model."""
    # A resumed run uses the loss of the run that it continues: another one would round otherwise,
    # and the run would no longer be bit-identical to one that was never stopped.
    of_checkpoint = saved_argument(checkpoint, "loss") if checkpoint else None
    args.loss = resolve_loss(args.loss, ranks.device, of_checkpoint)
    model.set_loss(args.loss)
    args.compile = resolve_compile(args.compile, ranks, args.deterministic)
    if args.compile == "on":
        model.compile_blocks()
    logger.info(f"loss: {args.loss}, compiled blocks: {args.compile}")


def build_decay_and_optimizer(
    args: argparse.Namespace, model: nn.Module
) -> tuple[WeightDecayScheduler | None, Optimizer]:
    """Build the weight-decay scheduler (None: uniform decay) and the optimizer with its groups.

    Raises:
        UserError: flags that do not fit each other, the model or the optimizer.
    """
    try:
        decay = decay_from_flags(args, model, AWD_FACTOR)
        if decay is None:
            # Uniform decay: one group, whose decay nobody changes.
            groups = [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
        else:
            # One group for each module that is balanced, and one for the other parameters.
            groups = decay.param_groups()
        # Muon takes the hidden matrices only, so the groups are split by whether they are hidden.
        optimizer = build_optimizer(args.optimizer, split_hidden(groups, model), args.lr)
        register_decay_hooks(args, optimizer)  # --adamc, --cautious_decay
    except ValueError as error:
        raise UserError(str(error)) from error
    return decay, optimizer


# ---------------------------------------------------------------------------------- training loop
#
# In an update that is neither logged nor analysed the host does not wait for the device (Muon
# excepted): what it must know is computed on the CPU or read one update later. So on a GPU the host
# runs ahead, and the device is never idle.
#
# A run that is stopped after any update and resumed from its checkpoint is bit-identical to one
# that was never stopped. Therefore nothing in the loop may depend on time, on earlier random draws
# or on counters that are not in the checkpoint.


def train(args: argparse.Namespace, run: Run, progress: dict, ranks: DistributedContext) -> None:
    """Make the remaining updates, with evaluations and checkpoints, and write the summary."""
    model, optimizer, checkpoints, log = run.model, run.optimizer, run.checkpoints, run.log
    autocast = autocast_context(args, ranks)
    # From here on a signal ends the run after the current update.
    stop = StopRequest(ranks.launcher)
    guard = NonFiniteGuard(optimizer, ranks, args.max_skipped_updates)
    # DistributedDataParallel orders its gradient buckets in its first pass. A pass on a dummy batch
    # makes the order the same in new and in resumed runs, and with it the rounding of the sums.
    parallel = data_parallel(
        model,
        guard.record_nonfinite,
        ranks,
        lambda wrapped: dummy_forward(wrapped, args, autocast, ranks),
    )
    meter = ThroughputMeter(
        run.work,
        progress["update_step"],
        progress["tokens_seen"],
        ranks.device,
        log.earlier_totals,
    )
    # What a global batch contains depends on the seed and the number of the update only, not on the
    # number of ranks. A resumed run starts reading at `position`.
    steps = meter.time_data(
        training_batches(
            run.data.train,
            seed=args.seed,
            position=progress["position"],
            total_batch_size=args.total_batch_size,
            batch_size=args.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=args.workers,
            pin_memory=ranks.device.type == "cuda",
            max_passes=args.max_passes,
        )
    )
    log.modules(run.decay.history if run.decay else [])  # the analysis of the initial weights
    log.start_progress(args.num_training_steps, progress["update_step"])
    # Whatever ends the loop, a checkpoint of the last whole update is saved if that is possible.
    state = SavePoint(progress, functools.partial(save, args, run, ranks, meter))
    updates = range(progress["update_step"] + 1, args.num_training_steps + 1)
    with saved_on_failure(state, checkpoints, ranks):
        if progress.get("evaluation_due"):
            # The earlier process ended between its last update and the evaluation of that update.
            with meter.exclude():
                evaluate_and_log(args, run, progress["update_step"], autocast, ranks)
                state.reach(evaluation_due=False)
                state.save()
        for update in profiled(updates, args.profile, log.folder, ranks):
            # 1. Data. All ranks agree here whether to go on: a signal, data that cannot be read or
            #    a failed save on one rank must stop all of them at the same update. They also agree
            #    whether the last checkpoint is so old that the state is saved in between.
            agreed = next_step(steps, stop, checkpoints, ranks, count_tokens)
            step, (tokens, targets), stop_reason = agreed.step, agreed.counts, agreed.stop_reason
            if agreed.saves:
                state.save(temporary=True)

            # 2. Gradients of the mean loss per target token of the global batch, summed over
            #    micro-batches and ranks.
            if step is not None:
                micro_batches = step.micro_batches
                loss = forward_backward(
                    parallel, micro_batches, update, targets, args.seed, autocast, ranks
                )
                # Whether the previous update was finite is read only now, when the device finished
                # it long ago and this update is queued behind it: the host does not have to wait.
                stop_reason = guard.failure(update - 1, "--grad_clipping")
            if stop_reason is not None:
                state.save()
                checkpoints.finish()
                advice = "the same command goes on"
                return stop_early(stop_reason, update - 1, log, advice)
            assert step is not None  # `next_step` returns a step or a reason to stop

            # 3. Clip the gradients to --grad_clipping, if it is above 0. The norm stays on the
            #    device.
            norm = clip_gradients(model, args.grad_clipping)

            # 4. Check that loss and gradients are finite on all ranks. If they are not, the
            #    optimizer skips this update; it reads the result on the device, so the host need
            #    not wait.
            guard.check_update(update, loss, norm)

            # 5. A checkpoint of the previous update may still be being copied to host memory. From
            #    here on the weights change, so the copy must be complete.
            checkpoints.before_update()
            state.whole = False

            # 6. Learning rate, a function of the update's number alone: resuming needs no state for
            #    it.
            lr = args.lr * lr_factor(
                update,
                args.scheduler,
                args.num_training_steps,
                args.warmup_steps,
                args.min_lr_ratio,
                args.cycle_length,
            )
            set_learning_rate(optimizer, lr)

            # 7. Weight decays. Every --unbalancedWD_every updates the spectra of the weights are
            #    analysed and each module's group gets a new decay: this is the method.
            update_weight_decays(run.decay, optimizer, update, meter, log)

            # 8. Optimizer step.
            optimizer.step()
            zero_gradients(parallel, optimizer, len(step.micro_batches))
            log.advance()
            last = update == args.num_training_steps
            logs, evaluates, saves = (
                last or update % every == 0
                for every in (args.log_every, args.eval_every, args.save_every)
            )
            tokens_seen = state.progress["tokens_seen"] + tokens
            state.reach(
                update_step=update,
                tokens_seen=tokens_seen,
                position=step.position,
                evaluation_due=evaluates,
            )

            # 9. Log. Loss and norm are the only numbers that the host waits for, so they are read
            #    in logged updates only.
            if logs or update == 1:
                guard.resolve_pending()
                record = {
                    "update_step": update,
                    "loss": float(ranks.sum(loss)),
                    "lr": lr,
                    "weight_decay": mean_decay(optimizer),
                    "grad_norm": float(norm),
                    "tokens_seen": tokens_seen,
                    "skipped_updates": guard.skipped,
                }
                log.metrics(record | meter.rates(update, tokens_seen))

            # 10. Evaluate and save. Neither counts as training time.
            if evaluates:
                with meter.exclude():
                    evaluate_and_log(args, run, update, autocast, ranks)
                    state.reach(evaluation_due=False)
            if saves:
                with meter.exclude():
                    state.save()
            if logs or evaluates or saves:
                # Python's garbage collector is off, see `without_garbage_collection`. Here it runs
                # on all ranks at the same time, so that no rank waits for another one's.
                gc.collect()
    finish(meter, log, ranks)
    checkpoints.finish()


# -------------------------------------------------------------------------------------- gradients
#
# The loss of an update is the mean over all target tokens of the global batch,
#     L = (sum of the negative log-likelihoods over ranks, micro-batches and tokens) / targets.
# Each micro-batch contributes its sum divided by the global number of targets, so that the
# gradients of micro-batches and ranks only have to be added. Averaging the means of micro-batches
# instead would give tokens in batches with much padding a larger weight.


def forward_backward(
    model: nn.Module,
    micro_batches: list[dict],
    update: int,
    targets: int,
    seed: int,
    autocast: contextlib.AbstractContextManager,
    ranks: DistributedContext,
) -> torch.Tensor:
    """Accumulate the gradients of one update.

    Args:
        model: the model, wrapped for data-parallel training.
        micro_batches: this rank's part of the global batch.
        update: number of the update.
        targets: target tokens of the global batch, over all ranks.
        seed: of the run; with the number of the update it seeds dropout.
        autocast: the context of the forward pass.
        ranks: the processes of the run.

    Returns:
        This rank's share of the mean loss per target token of the global batch, a scalar on the
        device. The shares of all ranks add up to the mean.
    """
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        # Dropout draws the same numbers for a micro-batch whatever rank it is on and whatever was
        # drawn before, so a run can be resumed, also with another number of ranks.
        seed_everything(seed, TRAINING, update, ranks.rank * len(micro_batches) + i)
        # The positions of the targets are found on the CPU. On a GPU the host would have to wait
        # for their number, which the shapes that follow depend on.
        positions = target_positions(batch["labels"])
        positions = positions.pin_memory() if ranks.device.type == "cuda" else positions
        inputs = (
            x.to(ranks.device, non_blocking=True)
            for x in (batch["input_ids"], batch["labels"], positions)
        )
        # The ranks sum their gradients once for each update, in the backward pass of the last
        # micro-batch. Before it each rank accumulates its own.
        with exchange_gradients(model, i == len(micro_batches) - 1), autocast:
            loss = model(*inputs) / max(targets, 1)
        loss.backward()
        total += loss.detach()
    return total


def dummy_forward(
    model: nn.Module,
    args: argparse.Namespace,
    autocast: contextlib.AbstractContextManager,
    ranks: DistributedContext,
) -> torch.Tensor:
    """Pass a batch of zeros through the model, and return its loss.

    Compiled blocks get a batch of the training's shape and dtype: for another one they would be
    compiled twice.
    """
    shape = (args.batch_size, args.max_length) if args.compile == "on" else (1, 2)
    batch = torch.zeros(shape, dtype=torch.long)
    inputs = (x.to(ranks.device) for x in (batch, batch, target_positions(batch)))
    with autocast:
        return model(*inputs)


def count_tokens(step: Step | None) -> list[int]:
    """Count the tokens without padding, and the target tokens, of this rank's part of an update."""
    labels = [batch["labels"] for batch in step.micro_batches] if step else []
    # The first token of a sequence is a token, but nothing predicts it.
    return [sum(int((y[:, start:] != IGNORE_INDEX).sum()) for y in labels) for start in (0, 1)]


def autocast_context(args: argparse.Namespace, ranks: DistributedContext) -> torch.autocast:
    """Return the context in which --dtype bf16_mixed computes in bfloat16."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.dtype == "bf16_mixed")


# --------------------------------------------------------------------- evaluation and checkpoints
#
# A checkpoint contains the model in transformers' format, the tokenizer, the optimizer, the random
# states of all ranks, the state of the weight-decay scheduler and the position in the data. It is
# copied to host memory while the next update's gradients are computed, and written by a thread
# while the training goes on.


def evaluate_and_log(
    args: argparse.Namespace,
    run: Run,
    update: int,
    autocast: contextlib.AbstractContextManager,
    ranks: DistributedContext,
) -> None:
    """Evaluate on the validation data, and log loss and perplexity."""
    start = time.perf_counter()
    batches = validation_batches(run.data.validation, args.batch_size, ranks.rank, ranks.world_size)
    # The model itself is evaluated, not its data-parallel wrapper: no gradients are exchanged.
    result = evaluate(run.model, batches, ranks, autocast)
    run.log.metrics(
        {
            "update_step": update,
            **result,
            "eval_seconds": time.perf_counter() - start,
            "final": update == args.num_training_steps,
        }
    )
    # The published code averages with a bias; its perplexity is printed for comparison with
    # published tables only.
    logger.info(
        f"update {update}: validation loss {result['eval_loss']:.4f}, "
        f"perplexity {result['perplexity']:.2f} over {result['eval_tokens']:,} tokens "
        f"(reference_perplexity {result['reference_perplexity']:.2f})"
    )


def save(
    args: argparse.Namespace,
    run: Run,
    ranks: DistributedContext,
    meter: ThroughputMeter,
    progress: dict,
    temporary: bool,
) -> None:
    """Start to save a checkpoint in the background, with everything that a resumed run needs."""
    run.log.checkpoint(progress["update_step"], meter.totals())
    positions = ranks.gather_objects(progress["position"])
    if positions is not None:  # on rank 0
        # The positions of all ranks are merged, so that a run can be resumed with another number
        # of ranks.
        progress = progress | {"position": merge_positions(positions)}
    trainer = {
        "progress": progress,
        "decay": run.decay.state_dict() if run.decay else None,
        "data": run.data.fingerprint,
        "arguments": {name: getattr(args, name) for name in RESUME_ARGUMENTS},
    }
    run.checkpoints.save(
        progress["update_step"],
        run.model,
        run.optimizer,
        trainer,
        run.data.tokenizer.hf,
        changes=saved_config(run.model, run.data.tokenizer, args.max_length),
        temporary=temporary,
    )


def saved_config(model: nn.Module, tokenizer: Tokenizer, max_length: int) -> dict[str, object]:
    """Return the keys of a checkpoint's config.json that follow from the data.

    With the token ids of the tokenizer, `generate()` stops at the end of a document. The ids of the
    model config are those of another tokenizer.
    """
    changes: dict[str, object] = {
        "bos_token_id": tokenizer.hf.bos_token_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    if rope_of(model.config)["rope_type"] == "default":
        # Other kinds of rotary embedding compute their angles from this number.
        changes["max_position_embeddings"] = max_length
    return changes


if __name__ == "__main__":
    end(run_script(main, ARGUMENTS, LAUNCH))
