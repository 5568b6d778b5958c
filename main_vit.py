"""Train vision transformers, or any other classifier of timm, with AlphaDecay.

    torchrun --nproc_per_node=2 main_vit.py --model deit_tiny_patch16_224 --data_path IMAGENET \
        --use_modulewise_wd --alpha_positively_with_WD --weight_decay 5e-6

The method, module-wise weight decay from heavy-tailed spectra, is that of He et al., NeurIPS 2025
(arXiv 2506.14562); the recipe is that of ConvNeXt (Liu et al. 2022, arXiv 2201.03545). The script
runs on one process (plain python) or on several (torchrun), on CPUs or on GPUs, and detects which.

Sections: arguments, schedules, set-up, model and optimizer, data, training loop, gradients,
evaluation and checkpoints.
"""

import argparse
import contextlib
import functools
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alphadecay.cli.describe import MethodDescription, check_method, describe_method
from alphadecay.cli.flags import add_flags, decay_from_flags, register_decay_hooks
from alphadecay.cli.presets import method_name
from alphadecay.cli.presets import parse_arguments as parse_with_method
from peft_pretraining.cli.main import end, parse_or_exit, run_script
from peft_pretraining.cli.published import VIT, published_differences
from peft_pretraining.cli.vit import DATA_ARGUMENTS, RESUME_ARGUMENTS, complete, vit_parser
from peft_pretraining.parallel.launch import Launch, read_launch

# -------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Raises UserError for arguments that do not fit each other."""
    parser = vit_parser()
    add_flags(parser)
    args = parse_with_method(parser)
    # The size of an update follows from the number of processes.
    return complete(args, read_launch().world_size, method_name(vars(args)))


# The command line is parsed before the imports below, which take seconds because of torch and timm:
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
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch.optim import Optimizer

from alphadecay import AlphaDecay
from alphadecay.param_groups import split_hidden
from peft_pretraining.checkpoint.find import find_checkpoint
from peft_pretraining.checkpoint.format import WEIGHTS
from peft_pretraining.checkpoint.random_state import seed_random_generators
from peft_pretraining.checkpoint.retention import tidy
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.errors import UserError
from peft_pretraining.optim.gradients import clip_gradients, mean_decay
from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer, scaled_decays
from peft_pretraining.optim.schedule import lr_factor
from peft_pretraining.parallel.ddp import data_parallel, zero_gradients
from peft_pretraining.parallel.fsdp import exchange_gradients
from peft_pretraining.parallel.process_group import DistributedContext, process_group
from peft_pretraining.records.console import block, start_logging
from peft_pretraining.records.run_dir import run_lock
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.records.wandb import describe_wandb
from peft_pretraining.train.flops import BACKWARD_TO_FORWARD_RATIO
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
from peft_pretraining.vision.batchnorm import BatchNormSync
from peft_pretraining.vision.datasets import ImageData, load_images
from peft_pretraining.vision.evaluation import evaluate
from peft_pretraining.vision.export import export, timm_config
from peft_pretraining.vision.loader import (
    Batch,
    TrainingSamples,
    ValidationSamples,
    training_steps,
    validation_batches,
)
from peft_pretraining.vision.models import build_model, current_name, forward_flops, load_weights
from peft_pretraining.vision.transforms import training_transform, validation_transform

if __name__ == "__main__":
    gc.enable()
    gc.freeze()  # later collections do not examine the objects of the libraries again

# The baseline AWD (Ghiasi et al. 2023) takes a coefficient lambda_awd. The published ViT runs set
# it to 50 times the weight decay eta.
AWD_FACTOR = 50

# -------------------------------------------------------------------------------------- schedules
#
# The recipe counts in epochs, the loop in updates. An epoch is a pass over the training images,
# without those that do not fill a whole update. Learning rate and weight decay follow cosines over
# the whole run and are functions of the update's number alone.


@dataclass(frozen=True)
class Schedule:
    """The lengths of a run in updates.

    Args:
        epoch: updates in an epoch.
        warmup: updates of linear warm-up.
        total: updates of the whole run.
    """

    epoch: int
    warmup: int
    total: int

    @classmethod
    def of(cls, args: argparse.Namespace, images: int) -> "Schedule":
        """Return the lengths of a run on a training set of so many images.

        The images that do not fill a whole update are left out of an epoch.

        Raises:
            UserError: an update has more images than the training set.
        """
        epoch = images // args.total_batch_size
        if not epoch:
            raise UserError(
                f"an update of {args.total_batch_size} images is more than the {images} there "
                "are: give a smaller --batch_size"
            )
        warmup = args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * epoch
        return cls(epoch, warmup, args.epochs * epoch)


def rates(args: argparse.Namespace, update: int, schedule: Schedule) -> tuple[float, float]:
    """Return the learning rate of an update, and the factor on all weight decays.

    The factor is 1 without --weight_decay_end. With it, it follows a cosine that ends at
    --weight_decay_end / --weight_decay.
    """
    lr = args.lr * lr_factor(
        update, "cosine", schedule.total, schedule.warmup, args.min_lr / args.lr
    )
    if args.weight_decay_end is None:
        return lr, 1.0
    end = args.weight_decay_end / args.weight_decay
    return lr, lr_factor(update, "cosine", schedule.total, 0, end)


# ----------------------------------------------------------------------------------------- set-up
#
# Words used below. An update is one step of the optimizer on a global batch of images. A rank is
# one process with one device. Each rank processes its part of the global batch in --update_freq
# micro-batches of --batch_size images.


@dataclass(frozen=True)
class Training:
    """Model, moving average, optimizer and weight-decay scheduler of a run.

    Args:
        model: on this rank's device; not wrapped for data-parallel training.
        ema: exponential moving average of the weights, if --model_ema asks for it.
        optimizer: its groups carry a weight decay each.
        decay: sets the decays of the groups; None: they are uniform.
        config: timm's description of the model, which a checkpoint contains; see `timm_config`.
        flops: operations of the forward pass of one image.
    """

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    decay: WeightDecayScheduler | None
    config: dict
    flops: int

    def averages(self) -> dict[str, nn.Module]:
        """Return the modules that a checkpoint contains beside the model, by name."""
        return {"ema": self.ema.module} if self.ema else {}


@dataclass(frozen=True)
class Run:
    """What the training loop works on.

    Args:
        training: what an update changes.
        data: training and validation images.
        schedule: lengths in updates.
        work: operations and images of an update.
        checkpoints: saves in the background.
        log: records of the run.
    """

    training: Training
    data: ImageData
    schedule: Schedule
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
            device_type=args.device, launch=launch, timeout_minutes=args.timeout_minutes
        ) as ranks,
        contextlib.ExitStack() as stack,
    ):
        # All ranks start from the same seed, so they build the same initial weights and no rank
        # has to send its own to the others.
        start_logging(ranks)
        seed_random_generators(args.seed)

        # Data. Rank 0 downloads what is missing before the other ranks look for it. The lengths of
        # the schedules follow from the number of images.
        data = load_images(
            args.data_set,
            args.data_path,
            args.eval_data_path,
            args.nb_classes,
            ranks.rank_zero_first,
        )
        logger.info(f"data: {data.description}")
        schedule = Schedule.of(args, len(data.train))
        if args.eval:
            return evaluate_only(args, data, ranks)

        # Where to start. The lock keeps a second process, for instance a job that was queued twice,
        # from writing to the same folder.
        run_folder = Path(args.output_dir)
        if ranks.is_main:
            stack.enter_context(run_lock(run_folder))
        args.continue_from, checkpoint = resolve_checkpoint(args.continue_from, run_folder, ranks)
        if args.same_settings_only:
            names = (*RESUME_ARGUMENTS, *DATA_ARGUMENTS)
            check_same_settings(checkpoint, run_folder, vars(args), names)
        if checkpoint and ranks.is_main:
            tidy(run_folder, checkpoint, args.save_ckpt_num, None)
        own = args.continue_from == "auto"
        if checkpoint and own and has_finished(checkpoint, schedule.total):
            logger.info(f"{run_folder} has made all {schedule.total} updates: nothing to do")
            if ranks.is_main:
                # The run may have been killed after its last update and before its report.
                write_run_report(run_folder)
            return

        # Model, weight-decay scheduler, optimizer.
        model = build_model(args)
        method, lines = describe_run(args, model, schedule, ranks.world_size, ranks.device.type)
        logger.info(block(args.name, lines))
        for warning in method.warnings:
            logger.warning(warning)
        for sentence in published_differences(VIT, args, sys.argv[1:]):
            logger.info(f"not as in the published code: {sentence}")
        training = make_training(args, model.to(ranks.device))

        # Resume. Records that the earlier process wrote after its last checkpoint are removed,
        # because these updates will be made again.
        progress = {"update_step": args.start_epoch * schedule.epoch, "images_seen": 0, "best": {}}
        if checkpoint:
            progress = resume(
                checkpoint,
                vars(args),
                schedule.total,
                training.model,
                training.optimizer,
                training.decay,
                data.fingerprint,
                ranks,
                config=training.config,
                extra=training.averages(),
            )
        elif isinstance(training.decay, AlphaDecay):
            # With --start_epoch the analyses keep to the numbers of the updates.
            training.decay.updates = progress["update_step"]
        if ranks.is_main:
            truncate_records_after(checkpoint, run_folder)

        # Derived numbers, printed and written to run.json: operations per image, and the peak rate
        # of the devices, which the utilization (MFU) is a fraction of.
        work = WorkPerStep.measure(
            "images",
            args.total_batch_size,
            1,
            training.flops * (1 + BACKWARD_TO_FORWARD_RATIO),
            torch.bfloat16 if args.use_amp else torch.float32,
            ranks,
        )
        description = {
            "name": args.name,
            "arguments": vars(args),
            "data": data.description,
            "model_config": training.config,
            "parameters": sum(p.numel() for p in training.model.parameters()),
        }
        log = RunLog(
            run_folder,
            ranks,
            description | method.record() | work.record(),
            args.wandb_name,
            args.tags,
            project=wandb_project(args),
            unit="images",
            done=progress["update_step"],
            source=checkpoint.parents[1] if checkpoint else None,
        )
        checkpoints = Checkpoints(
            run_folder,
            ranks,
            keep=args.save_ckpt_num,
            on_error=args.on_save_error,
            every_minutes=args.save_every_minutes if args.save_ckpt else 0,
        )
        stack.enter_context(without_garbage_collection())
        train(args, Run(training, data, schedule, work, checkpoints, log), progress, ranks)


def wandb_project(args: argparse.Namespace) -> str | None:
    """Return the W&B project of the run; None if it is not recorded there."""
    return args.project if args.enable_wandb and not args.no_wandb else None


def describe_run(
    args: argparse.Namespace, model: nn.Module, schedule: Schedule, world_size: int, device: str
) -> tuple[MethodDescription, dict[str, str]]:
    """Return the weight-decay method, and the lines that are logged before the training."""
    method = describe_method(args, model, AWD_FACTOR)
    parameters = sum(p.numel() for p in model.parameters())
    saves = (
        f"a checkpoint every {args.save_ckpt_freq} epochs" if args.save_ckpt else "nothing saved"
    )
    return method, {
        "method": f"{method.name}: {method.details}",
        "optimizer": f"{args.optimizer}, learning rate {args.lr:g} after {schedule.warmup:,} "
        f"updates of warm-up, then cosine to {args.min_lr:g}",
        "model": f"{current_name(args.model)}, {parameters / 1e6:.1f}M parameters, "
        f"{'bfloat16 autocast' if args.use_amp else 'float32'}, {world_size} x {device}",
        "length": f"{args.epochs} epochs of {schedule.epoch:,} updates, {schedule.total:,} updates",
        "update": f"{args.total_batch_size:,} images = micro-batches of {args.batch_size:,} x "
        f"{args.update_freq} accumulated x {world_size} process{'es' if world_size > 1 else ''}",
        "records": f"{args.output_dir}, {describe_wandb(wandb_project(args))}; {saves}",
    }


def dry_run(args: argparse.Namespace) -> None:
    """Print what the command would do. Raises UserError for what the training would refuse."""
    world_size = read_launch().world_size
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data = load_images(args.data_set, args.data_path, args.eval_data_path, args.nb_classes)
    model = build_model(args)
    schedule = Schedule.of(args, len(data.train))
    method, lines = describe_run(args, model, schedule, world_size, device)
    try:
        check_method(args, model, AWD_FACTOR)
        groups = [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
        optimizer = build_optimizer(args.optimizer, split_hidden(groups, model), args.lr)
        register_decay_hooks(args, optimizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # The gradients are kept twice if they are exchanged; Adam has two moments.
    state = size * (4 + (world_size > 1) + args.model_ema)
    flops = forward_flops(model, args.input_size)
    lines["model"] += f", {flops / 1e9:.3g} GFLOPs for a {args.input_size}-pixel image forward"
    lines["data"] = data.description
    lines["memory"] = (
        f"{state / 1e9:.2g} GB on each device for weights, gradients and moments, and the "
        "activations of a micro-batch, which are not estimated"
    )
    names = (*RESUME_ARGUMENTS, *DATA_ARGUMENTS)
    lines["start"] = describe_start(vars(args), Path(args.output_dir), names)
    print(block(f"{args.name} (dry run: nothing is trained)", lines))
    notes = [*method.warnings, *published_differences(VIT, args, sys.argv[1:])]
    print("".join(f"note: {note}\n" for note in notes), end="")


# ---------------------------------------------------------------------------- model and optimizer
#
# AlphaDecay gives each module of the model, such as the attention projection of a block, a weight
# decay of its own. So each module is a parameter group of the optimizer, and changing a decay means
# writing a number into its group: any optimizer with decoupled or L2 decay can be used as it is.


def make_training(args: argparse.Namespace, model: nn.Module) -> Training:
    """Build what the flags ask for around a model: weight-decay scheduler, optimizer, average.

    Raises:
        UserError: flags that do not fit each other, the model or the optimizer.
    """
    try:
        # The scheduler analyses the initial weights and decides how the parameters are grouped, so
        # it comes before the optimizer.
        decay = decay_from_flags(args, model, AWD_FACTOR)
        if decay is None:
            # Uniform decay: one group, whose decay nobody changes.
            groups = [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
        else:
            # One group for each module that is balanced, and one for the other parameters.
            groups = decay.param_groups()
        # Muon takes the hidden matrices only, so the groups are split by whether they are hidden.
        optimizer = build_optimizer(
            args.optimizer,
            split_hidden(groups, model),
            args.lr,
            tuple(args.opt_betas),
            args.opt_eps,
        )
        register_decay_hooks(args, optimizer)  # --adamc, --cautious_decay
    except ValueError as error:
        raise UserError(str(error)) from error
    ema = None
    if args.model_ema:
        # The average needs memory for the weights once more. It can be kept in CPU memory, which
        # costs a copy of the weights in each update.
        device = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, args.model_ema_decay, device=device)
    return Training(
        model,
        ema,
        optimizer,
        decay,
        timm_config(args, model),
        forward_flops(model, args.input_size),
    )


def loss_and_mixup(args: argparse.Namespace) -> tuple[nn.Module, Mixup | None]:
    """Build the loss and, if --mixup or --cutmix ask for it, the mixing of images."""
    if not args.mixes:
        return LabelSmoothingCrossEntropy(args.smoothing), None
    # Mixup returns a distribution over the classes for each image, already smoothed. The loss must
    # take such soft targets and not smooth them again.
    mixup = Mixup(
        args.mixup,
        args.cutmix,
        args.cutmix_minmax,
        args.mixup_prob,
        args.mixup_switch_prob,
        args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.nb_classes,
    )
    return SoftTargetCrossEntropy(), mixup


# ------------------------------------------------------------------------------------------- data
#
# An image is augmented with random numbers that depend on the seed, the epoch and the image only:
# the result is the same for any number of ranks and of reading processes, and after a resume.


def build_train_loader(
    args: argparse.Namespace, data: ImageData, update: int, ranks: DistributedContext
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each update after `update` updates."""
    samples = TrainingSamples(
        data.train, training_transform(args, data.allow_flip), args.skip_bad_images, args.seed
    )
    return training_steps(
        samples,
        update=update,
        total_batch_size=args.total_batch_size,
        batch_size=args.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=args.num_workers,
        pin_memory=args.pin_mem and ranks.device.type == "cuda",
    )


def build_val_loader(
    args: argparse.Namespace, data: ImageData, ranks: DistributedContext
) -> Iterator[Batch]:
    """Yield this rank's share of the validation images; without --dist_eval rank 0 has them all."""
    samples = ValidationSamples(data.validation, validation_transform(args), args.skip_bad_images)
    rank, world_size = (ranks.rank, ranks.world_size) if args.dist_eval else (0, 1)
    if rank != ranks.rank:
        # The other ranks evaluate nothing, and wait for the sums of rank 0.
        return iter(())
    pin_memory = args.pin_mem and ranks.device.type == "cuda"
    return validation_batches(
        samples, args.batch_size, rank, world_size, args.num_workers, pin_memory
    )


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
    training, schedule, checkpoints, log = run.training, run.schedule, run.checkpoints, run.log
    model, optimizer = training.model, training.optimizer
    criterion, mixup = loss_and_mixup(args)
    # From here on a signal ends the run after the current update.
    stop = StopRequest(ranks.launcher)
    guard = NonFiniteGuard(optimizer, ranks, args.max_skipped_updates)
    # DistributedDataParallel orders its gradient buckets in its first pass. A pass on a dummy batch
    # makes the order the same in new and in resumed runs, and with it the rounding of the sums.
    parallel = data_parallel(
        model,
        guard.record_nonfinite,
        ranks,
        lambda wrapped: dummy_forward(wrapped, args.input_size, ranks),
    )
    statistics = BatchNormSync(model, ranks)
    meter = ThroughputMeter(
        run.work,
        progress["update_step"],
        progress["images_seen"],
        ranks.device,
        log.earlier_totals,
    )
    steps = meter.time_data(build_train_loader(args, run.data, progress["update_step"], ranks))
    # The analysis of the initial weights.
    log.modules(training.decay.history if training.decay else [])
    log.start_progress(schedule.total, progress["update_step"])
    # Whatever ends the loop, a checkpoint of the last whole update is saved if that is possible.
    state = SavePoint(progress, functools.partial(save, args, run, meter, statistics))
    updates = range(progress["update_step"] + 1, schedule.total + 1)
    with saved_on_failure(state, checkpoints, ranks):
        if progress.get("evaluation_due"):
            # The earlier process ended between its last update and the evaluation of that update.
            with meter.exclude():
                best = evaluate_and_log(args, run, progress, schedule, ranks)
                state.reach(best=best, evaluation_due=False)
                state.save()
        for update in profiled(updates, args.profile, log.folder, ranks):
            # 1. Data. All ranks agree here whether to go on: a signal, an image that cannot be read
            #    or a failed save on one rank must stop all of them at the same update. They also
            #    agree whether the last checkpoint is so old that the state is saved in between.
            agreed = next_step(steps, stop, checkpoints, ranks)
            micro_batches, stop_reason = agreed.step, agreed.stop_reason
            if agreed.saves:
                state.save(temporary=True)

            # 2. Gradients of the mean loss of the global batch, summed over micro-batches and
            #    ranks.
            if micro_batches is not None:
                loss = forward_backward(
                    parallel, micro_batches, update, args, criterion, mixup, ranks
                )
                # Whether the previous update was finite is read only now, when the device finished
                # it long ago and this update is queued behind it: the host does not have to wait.
                stop_reason = guard.failure(update - 1, "--clip_grad")
            if stop_reason is not None:
                state.save()
                checkpoints.finish()
                advice = "the same command goes on" if args.save_ckpt else "nothing was saved"
                return stop_early(stop_reason, update - 1, log, advice)

            # 3. Clip the gradients to --clip_grad, if it is given. The norm stays on the device.
            norm = clip_gradients(model, args.clip_grad or 0.0)

            # 4. Check that loss and gradients are finite on all ranks. If they are not, the
            #    optimizer skips this update; it reads the result on the device, so the host need
            #    not wait.
            guard.check_update(update, loss, norm)

            # 5. A checkpoint of the previous update may still be being copied to host memory. From
            #    here on the weights change, so the copy must be complete.
            checkpoints.before_update()
            state.whole = False

            # 6. Learning rate, and the factor on the weight decays. Both depend on the update's
            #    number alone: resuming needs no state for them.
            lr, decay_factor = rates(args, update, schedule)
            set_learning_rate(optimizer, lr)

            # 7. Weight decays. Every --unbalancedWD_every updates the spectra of the weights are
            #    analysed and each module's group gets a new decay: this is the method.
            update_weight_decays(training.decay, optimizer, update, meter, log)

            # 8. Optimizer step. All decays are scaled by the same factor during the step only, so
            #    that the ratios between the modules stay as the analysis assigned them.
            with scaled_decays(optimizer, decay_factor):
                optimizer.step()
            zero_gradients(parallel, optimizer, len(micro_batches))
            log.advance()
            # The running statistics of BatchNorm were changed in the forward pass. If the update
            # was skipped they are restored.
            statistics.commit_or_roll_back(optimizer.found_inf)  # type: ignore[attr-defined]  # set in step 4
            if training.ema:
                # After a skipped update the average moves once more towards the same weights.
                training.ema.update(model)
            epochs, updates_in_epoch = divmod(update, schedule.epoch)
            ends_epoch = updates_in_epoch == 0
            last = update == schedule.total
            logs = last or update % args.log_every == 0
            evaluates = ends_epoch and not args.disable_eval
            saves = (
                last
                or (ends_epoch and epochs % args.save_ckpt_freq == 0)
                or (args.save_every and update % args.save_every == 0)
            )
            images_seen = state.progress["images_seen"] + args.total_batch_size
            state.reach(update_step=update, images_seen=images_seen, evaluation_due=evaluates)

            # 9. Log. Loss and norm are the only numbers that the host waits for, so they are read
            #    in logged updates only.
            if logs or update == 1:
                guard.resolve_pending()
                record = {
                    "update_step": update,
                    "epoch": update / schedule.epoch,
                    "loss": float(ranks.sum(loss)),
                    "lr": lr,
                    "weight_decay": decay_factor * mean_decay(optimizer),
                    "grad_norm": float(norm),
                    "skipped_updates": guard.skipped,
                    "images_seen": images_seen,
                }
                log.metrics(record | meter.rates(update, images_seen))

            # 10. Evaluate and save. Neither counts as training time.
            if evaluates:
                with meter.exclude():
                    best = evaluate_and_log(args, run, state.progress, schedule, ranks)
                    state.reach(best=best, evaluation_due=False)
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
# The loss of an update is the mean over the images of the global batch. All micro-batches of all
# ranks have the same size, so it is the mean of their means: each contributes its mean divided by
# their number, and the gradients of micro-batches and ranks only have to be added.


def forward_backward(
    model: nn.Module,
    micro_batches: list[Batch],
    update: int,
    args: argparse.Namespace,
    criterion: nn.Module,
    mixup: Mixup | None,
    ranks: DistributedContext,
) -> torch.Tensor:
    """Accumulate the gradients of one update.

    Args:
        model: the model, wrapped for data-parallel training.
        micro_batches: this rank's part of the global batch.
        update: number of the update, which seeds mixup and stochastic depth.
        args: the arguments of the script.
        criterion: the loss of a batch, a mean over its images.
        mixup: mixes images and their labels; None: they are not mixed.
        ranks: the processes of the run.

    Returns:
        This rank's share of the mean loss over the global batch, a scalar on the device. The shares
        of all ranks add up to the mean.
    """
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        images, targets = (
            batch[key].to(ranks.device, non_blocking=True) for key in ("images", "labels")
        )
        # Mixup and stochastic depth draw the same numbers for a micro-batch whatever rank it is on
        # and whatever was drawn before, so a run can be resumed with another number of ranks.
        seed_everything(args.seed, TRAINING, update, ranks.rank * len(micro_batches) + i)
        if mixup:
            images, targets = mixup(images, targets)
        # The ranks sum their gradients once for each update, in the backward pass of the last
        # micro-batch. Before it each rank accumulates its own.
        with (
            exchange_gradients(model, i == len(micro_batches) - 1),
            autocast_context(args, ranks),
        ):
            loss = criterion(model(images), targets) / (len(micro_batches) * ranks.world_size)
        loss.backward()
        total += loss.detach()
    return total


def dummy_forward(model: nn.Module, size: int, ranks: DistributedContext) -> torch.Tensor:
    """Pass zeros through the model in evaluation mode, and return a scalar to differentiate.

    Evaluation mode leaves the statistics of BatchNorm as they are and drops no block.
    """
    model.eval()
    logits = model(torch.zeros(2, 3, size, size, device=ranks.device))
    model.train()
    return logits.sum()


def autocast_context(args: argparse.Namespace, ranks: DistributedContext) -> torch.autocast:
    """Return the context in which --use_amp computes in bfloat16."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.use_amp)


# --------------------------------------------------------------------- evaluation and checkpoints
#
# A checkpoint contains the model and its moving average, timm's description of the model, the
# optimizer, the random states of all ranks, the state of the weight-decay scheduler and the
# counters. It is copied to host memory while the next update's gradients are computed, and written
# by a thread while the training goes on. The models with the best accuracy are exported besides, in
# a format that timm loads.


def evaluate_only(args: argparse.Namespace, data: ImageData, ranks: DistributedContext) -> None:
    """Evaluate the model of --continue_from or --finetune and print its accuracy."""
    model = build_model(args)  # with the weights of --finetune, if it is given
    forward_flops(model, args.input_size)  # refuses an image size that the model does not take
    if args.continue_from and not args.same_settings_only:
        checkpoint = find_checkpoint(args.continue_from, Path(args.output_dir), ranks)
        assert checkpoint is not None  # only `auto` finds none without an error
        load_weights(model, checkpoint / WEIGHTS)
    model = model.to(ranks.device)
    batches = build_val_loader(args, data, ranks)
    result = evaluate(model, batches, ranks, autocast_context(args, ranks))
    logger.info(f"{accuracy_line(result)} over {result['eval_images']:,} images")


def evaluate_and_log(
    args: argparse.Namespace,
    run: Run,
    progress: dict,
    schedule: Schedule,
    ranks: DistributedContext,
) -> dict:
    """Evaluate the model and its moving average, and export each that is the best so far.

    Returns:
        The best top-1 accuracy of each in percent, by the name of its export.
    """
    start, autocast, best = time.perf_counter(), autocast_context(args, ranks), progress["best"]
    training, update = run.training, progress["update_step"]
    models = {"best": training.model}
    if args.model_ema_eval and training.ema:
        models["best_ema"] = training.ema.module
    results = {
        name: evaluate(model, build_val_loader(args, run.data, ranks), ranks, autocast)
        for name, model in models.items()
    }
    record = dict(results["best"])
    if "best_ema" in results:
        record |= {f"ema_{key}": results["best_ema"][key] for key in ("top1", "top5")}
    run.log.metrics(
        {
            "update_step": update,
            **record,
            "eval_seconds": time.perf_counter() - start,
            "final": update == schedule.total,
        }
    )
    best = dict(best)
    for name, result in results.items():
        which = " of the moving average" if name == "best_ema" else ""
        logger.info(f"update {update}: {accuracy_line(result)}{which}")
        if result["top1"] > best.get(name, -1.0):
            best[name] = result["top1"]
            if ranks.is_main and args.save_ckpt:
                folder = Path(args.output_dir) / name
                try:
                    export(models[name], training.config, {"update_step": update} | result, folder)
                except Exception as error:  # a full disk, in the words of several libraries
                    run.checkpoints.note_failure(str(folder), error)
    return best


def accuracy_line(result: dict) -> str:
    """Return accuracies and loss as a part of a log line."""
    return (
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
        f"loss {result['eval_loss']:.4f}"
    )


def save(
    args: argparse.Namespace,
    run: Run,
    meter: ThroughputMeter,
    statistics: BatchNormSync,
    progress: dict,
    temporary: bool,
) -> None:
    """Start to save a checkpoint in the background, with everything that a resumed run needs."""
    if not args.save_ckpt:
        return
    statistics.roll_back()  # a forward pass of the next update may have changed them
    run.log.checkpoint(progress["update_step"], meter.totals())
    training = run.training
    trainer = {
        "progress": progress,
        "decay": training.decay.state_dict() if training.decay else None,
        "data": run.data.fingerprint,
        "arguments": {name: getattr(args, name) for name in RESUME_ARGUMENTS},
    }
    run.checkpoints.save(
        progress["update_step"],
        training.model,
        training.optimizer,
        trainer,
        config=training.config,
        extra=training.averages(),
        temporary=temporary,
    )


if __name__ == "__main__":
    end(run_script(main, ARGUMENTS, LAUNCH))
