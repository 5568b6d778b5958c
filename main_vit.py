"""Train vision transformers, or any other classifier of timm, with AlphaDecay: module-wise weight decay from the spectra of the weights
(arXiv 2506.14562).

    torchrun --nproc_per_node=2 main_vit.py --model deit_tiny_patch16_224 --data_path IMAGENET --use_modulewise_wd \
        --alpha_positively_with_WD --weight_decay 5e-6

Runs on one process (plain python) or several (torchrun), on CPU or GPU, and finds out by itself which. Sections:
arguments, set-up, the training loop.
"""

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from loguru import logger
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch.optim import Optimizer

from alphadecay import AWD, AdaDecay, AlphaDecay
from alphadecay.cli.flags import add_flags, decay_from_flags, register_decay_hooks
from alphadecay.cli.presets import parse_arguments as parse_with_method
from alphadecay.param_groups import split_hidden
from peft_pretraining.checkpoint.find import find_checkpoint
from peft_pretraining.checkpoint.format import WEIGHTS, step_of
from peft_pretraining.checkpoint.random_state import seed_random_generators
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.cli.main import run_script
from peft_pretraining.cli.vit import complete, vit_parser
from peft_pretraining.errors import UserError
from peft_pretraining.optim.gradients import mean_decay
from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.optim.schedule import lr_factor
from peft_pretraining.parallel.ddp import data_parallel
from peft_pretraining.parallel.process_group import (
    DistributedContext,
    process_group,
    world_size_of_environment,
)
from peft_pretraining.records.console import start_logging
from peft_pretraining.records.run_dir import run_lock
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.train.flops import BACKWARD_TO_FORWARD_RATIO
from peft_pretraining.train.loop import (
    finish,
    next_step,
    report,
    stop_early,
    without_garbage_collection,
)
from peft_pretraining.train.profiler import profiled
from peft_pretraining.train.resume import resolve_checkpoint, resume, truncate_records_after
from peft_pretraining.train.signals import StopRequest
from peft_pretraining.train.step import Updates
from peft_pretraining.train.throughput import ThroughputMeter, Work
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
from peft_pretraining.vision.seeding import TRAINING, seed_everything
from peft_pretraining.vision.transforms import training_transform, validation_transform

AWD_FACTOR = 50  # lambda_awd = 50 * eta in the published ViT runs

# -------------------------------------------------------------------------------------------------------------- arguments


def parse_arguments() -> argparse.Namespace:
    parser = vit_parser()
    add_flags(parser)
    return complete(parse_with_method(parser), world_size_of_environment())


@dataclass(frozen=True)
class Schedule:
    """The lengths of a run, in updates."""

    epoch: int
    warmup: int
    total: int

    @classmethod
    def of(cls, args: argparse.Namespace, images: int) -> "Schedule":
        """images: of the training set; those that do not fill an update are left out of an epoch."""
        epoch = images // args.total_batch_size
        if not epoch:
            raise UserError(
                f"an update of {args.total_batch_size} images is more than the {images} there are: give a smaller --batch_size"
            )
        warmup = args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * epoch
        return cls(epoch, warmup, args.epochs * epoch)


# ----------------------------------------------------------------------------------------------------------------- set-up


@dataclass(frozen=True)
class Training:
    """What an update changes, and what it means. config: see `timm_config`; flops: of one image's forward pass."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    decay: AlphaDecay | AWD | AdaDecay | None  # None: uniform
    config: dict
    flops: int

    def averages(self) -> dict[str, nn.Module]:
        """What a checkpoint keeps beside the model."""
        return {"ema": self.ema.module} if self.ema else {}


def main() -> None:
    args = parse_arguments()
    with process_group(kind=args.device) as ranks, contextlib.ExitStack() as held:
        start_logging(ranks)
        seed_random_generators(args.seed)
        data = load_images(
            args.data_set, args.data_path, args.eval_data_path, args.nb_classes, ranks.first
        )
        logger.info(f"data: {data.description}")
        schedule = Schedule.of(args, len(data.train))
        if args.eval:
            return evaluate_only(args, data, ranks)

        run_folder = Path(args.output_dir)
        if ranks.is_main:
            held.enter_context(run_lock(run_folder))
        place, checkpoint = resolve_checkpoint(
            args.resume or ("auto" if args.auto_resume else None), run_folder, ranks
        )
        if checkpoint and place == "auto" and step_of(checkpoint) >= schedule.total:
            logger.info(f"{run_folder} has made all {schedule.total} updates: nothing to do")
            if ranks.is_main:
                report(run_folder)  # it may have been killed just before its end
            return

        training = make_training(args, build_model(args).to(ranks.device))
        model = training.model
        parameters = sum(p.numel() for p in model.parameters())
        logger.info(
            f"model: {current_name(args.model)}, {parameters / 1e6:.1f}M parameters, {training.flops / 1e9:.2f} GFLOPs an image, "
            f"{ranks.world_size} x {ranks.device.type}"
        )

        progress = {"update_step": args.start_epoch * schedule.epoch, "images_seen": 0, "best": {}}
        if checkpoint:
            progress = resume(
                checkpoint, args, schedule.total, model, training.optimizer, training.decay, data.fingerprint, ranks,
                config=training.config, extra=training.averages(),
            )  # fmt: skip
        elif isinstance(training.decay, AlphaDecay):
            training.decay.updates = progress["update_step"]
        if ranks.is_main:
            truncate_records_after(checkpoint, run_folder)
        description = {
            "name": args.name,
            "arguments": vars(args),
            "model_config": training.config,
            "parameters": parameters,
        }
        project = args.project if args.enable_wandb and not args.no_wandb else None
        dtype = torch.bfloat16 if args.use_amp else torch.float32
        work = Work.of(
            "images",
            args.total_batch_size,
            1,
            training.flops * (1 + BACKWARD_TO_FORWARD_RATIO),
            dtype,
            ranks,
        )
        log = RunLog(
            run_folder,
            ranks,
            description | work.record(),
            args.wandb_name,
            args.tags,
            project,
            unit="images",
        )
        checkpoints = Checkpoints(
            run_folder, ranks, keep=args.save_ckpt_num, on_error=args.on_save_error
        )
        held.enter_context(without_garbage_collection())
        train(args, training, data, schedule, progress, work, checkpoints, log, ranks)


def make_training(args: argparse.Namespace, model: nn.Module) -> Training:
    """The model with the optimizer and the decays that the flags ask for."""
    try:
        decay = decay_from_flags(args, model, AWD_FACTOR)  # None: uniform
        groups = (
            decay.param_groups()
            if decay
            else [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
        )
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
    ema = (
        ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
        if args.model_ema
        else None
    )
    return Training(
        model,
        ema,
        optimizer,
        decay,
        timm_config(args, model),
        forward_flops(model, args.input_size),
    )


def evaluate_only(args: argparse.Namespace, data: ImageData, ranks: DistributedContext) -> None:
    model = build_model(args)
    if args.resume:
        load_weights(model, find_checkpoint(args.resume, Path(args.output_dir), ranks) / WEIGHTS)
    result = evaluate(
        model.to(ranks.device), build_val_loader(args, data, ranks), ranks, autocast_of(args, ranks)
    )
    logger.info(f"{accuracy_line(result)} over {result['eval_images']:,} images")


# ------------------------------------------------------------------------------------------------------ the training loop


def train(
    args, training: Training, data: ImageData, schedule: Schedule, progress: dict, work: Work, checkpoints: Checkpoints,
    log: RunLog, ranks: DistributedContext,
) -> None:  # fmt: skip
    model, optimizer, decay = training.model, training.optimizer, training.decay
    criterion, mixup = loss_and_mixup(args)
    guard = NonFiniteGuard(optimizer, ranks, args.max_skipped_updates)
    parallel = data_parallel(
        model, guard, ranks, lambda parallel: dummy_forward(parallel, args.input_size, ranks)
    )
    statistics = BatchNormSync(model, ranks)
    stop = StopRequest()
    clock = ThroughputMeter(work, progress["update_step"], progress["images_seen"], ranks.device)
    steps = clock.timed(build_train_loader(args, data, progress["update_step"], ranks))
    updates = Updates(
        model, optimizer, decay, args.clip_grad or 0.0, guard, checkpoints, clock, log
    )
    log.modules(decay.history if decay else [])
    log.start_bar(schedule.total, progress["update_step"])
    saved = progress["update_step"]

    for update in profiled(range(saved + 1, schedule.total + 1), args.profile, log.folder, ranks):
        micro_batches, _, ending = next_step(steps, stop, checkpoints, ranks)
        if ending is None:
            loss = forward_backward(parallel, micro_batches, update, args, criterion, mixup, ranks)
            ending = guard.failure(
                update - 1, "--clip_grad"
            )  # of the update before, which the device has long finished
        if ending is not None:
            if saved < update - 1:
                save(args, training, data, progress, checkpoints)
            checkpoints.finish()
            return stop_early(
                ending,
                update - 1,
                log,
                "the same command goes on" if args.save_ckpt else "nothing was saved",
            )

        # Clip, leave out what is not finite, set the decays (an analysis every `unbalancedWD_every` updates), step.
        lr, eta = rates(args, update, schedule)
        norm = updates.make(update, loss, lr, eta)
        statistics.settle(optimizer.found_inf)
        if training.ema:
            training.ema.update(model)
        progress = progress | {
            "update_step": update,
            "images_seen": progress["images_seen"] + args.total_batch_size,
        }

        epochs, inside = divmod(update, schedule.epoch)
        last = update == schedule.total
        logs = last or update % args.log_every == 0
        evaluates = inside == 0 and not args.disable_eval
        saves = (
            last
            or inside == 0
            and epochs % args.save_ckpt_freq == 0
            or args.save_every
            and update % args.save_every == 0
        )
        if logs or update == 1:
            guard.read()
            record = {
                "update_step": update,
                "epoch": update / schedule.epoch,
                "loss": float(ranks.sum(loss)),
                "lr": lr,
            }
            record |= {
                "weight_decay": eta * mean_decay(optimizer),
                "grad_norm": float(norm),
                "skipped_updates": guard.skipped,
            }
            log.metrics(
                record
                | {"images_seen": progress["images_seen"]}
                | clock.rates(update, progress["images_seen"])
            )
        if evaluates:
            with clock.pause():
                try:
                    progress["best"] = evaluate_and_log(
                        args, training, data, progress, last, log, ranks
                    )
                except (
                    UserError
                ):  # an image that cannot be read, say: nothing trained is lost for it
                    save(args, training, data, progress, checkpoints)
                    checkpoints.finish()
                    raise
        if saves:
            with clock.pause():
                save(args, training, data, progress, checkpoints)
                saved = update
        if logs or evaluates or saves:
            gc.collect()  # on all ranks at once, see without_garbage_collection
    finish(clock, log, ranks)
    checkpoints.finish()


def loss_and_mixup(args: argparse.Namespace) -> tuple[nn.Module, Mixup | None]:
    """Mixed labels are smoothed by mixup itself."""
    if not args.mixes:
        return LabelSmoothingCrossEntropy(args.smoothing), None
    mixup = Mixup(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=args.nb_classes,
    )  # fmt: skip
    return SoftTargetCrossEntropy(), mixup


def dummy_forward(model: nn.Module, size: int, ranks: DistributedContext) -> torch.Tensor:
    """A pass that leaves the model as it is: BatchNorm's statistics too, and no block dropped."""
    model.eval()
    logits = model(torch.zeros(2, 3, size, size, device=ranks.device))
    model.train()
    return logits.sum()


def forward_backward(
    model: nn.Module, micro_batches: list[Batch], update: int, args: argparse.Namespace, criterion: nn.Module, mixup: Mixup | None,
    ranks: DistributedContext,
) -> torch.Tensor:  # fmt: skip
    """Gradients of one update. Returns this rank's share of the mean loss over the global batch."""
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        images, targets = (
            batch[key].to(ranks.device, non_blocking=True) for key in ("images", "labels")
        )
        # Mixup and drop path draw the same for a micro-batch, whatever rank it is on and whatever came before.
        seed_everything(args.seed, TRAINING, update, ranks.rank * len(micro_batches) + i)
        if mixup:
            images, targets = mixup(images, targets)
        # Gradients are exchanged with the last micro-batch only.
        synchronise = i == len(micro_batches) - 1 or ranks.world_size == 1
        with contextlib.nullcontext() if synchronise else model.no_sync(), autocast_of(args, ranks):
            loss = criterion(model(images), targets) / (len(micro_batches) * ranks.world_size)
        loss.backward()
        total += loss.detach()
    return total


def rates(args: argparse.Namespace, update: int, schedule: Schedule) -> tuple[float, float]:
    """The learning rate of an update, and eta over --weight_decay."""
    lr = args.lr * lr_factor(
        update, "cosine", schedule.total, schedule.warmup, args.min_lr / args.lr
    )
    if args.weight_decay_end is None:
        return lr, 1.0
    return lr, lr_factor(
        update, "cosine", schedule.total, 0, args.weight_decay_end / args.weight_decay
    )


def evaluate_and_log(
    args: argparse.Namespace,
    training: Training,
    data: ImageData,
    progress: dict,
    last: bool,
    log: RunLog,
    ranks: DistributedContext,
) -> dict:
    """Evaluate the model and its moving average, and export them where they are the best so far. Returns the best top-1 of each."""
    start, autocast, best = time.perf_counter(), autocast_of(args, ranks), dict(progress["best"])
    models = {"best": training.model} | (
        {"best_ema": training.ema.module} if args.model_ema_eval else {}
    )
    results = {
        name: evaluate(model, build_val_loader(args, data, ranks), ranks, autocast)
        for name, model in models.items()
    }
    record = results["best"] | {
        f"ema_{key}": results["best_ema"][key] for key in ("top1", "top5") if "best_ema" in results
    }
    update = progress["update_step"]
    log.metrics(
        {
            "update_step": update,
            **record,
            "eval_seconds": time.perf_counter() - start,
            "final": last,
        }
    )
    for name, result in results.items():
        logger.info(
            f"update {update}: {accuracy_line(result)}{' of the moving average' if name == 'best_ema' else ''}"
        )
        if result["top1"] > best.get(name, -1.0):
            best[name] = result["top1"]
            if ranks.is_main and args.save_ckpt:
                export(
                    models[name],
                    training.config,
                    {"update_step": update} | result,
                    Path(args.output_dir) / name,
                )
    return best


def accuracy_line(result: dict) -> str:
    return f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['eval_loss']:.4f}"


def build_train_loader(
    args: argparse.Namespace, data: ImageData, update: int, ranks: DistributedContext
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each update after `update` updates."""
    samples = TrainingSamples(
        data.train, training_transform(args, data.mirrors), args.skip_bad_images, args.seed
    )
    return training_steps(
        samples, update=update, total_batch_size=args.total_batch_size, batch_size=args.batch_size, rank=ranks.rank,
        world_size=ranks.world_size, workers=args.num_workers, pin_memory=args.pin_mem and ranks.device.type == "cuda",
    )  # fmt: skip


def build_val_loader(
    args: argparse.Namespace, data: ImageData, ranks: DistributedContext
) -> Iterator[Batch]:
    """This rank's share of the validation images: with --dist_eval false all of them on rank 0."""
    samples = ValidationSamples(data.validation, validation_transform(args), args.skip_bad_images)
    rank, world_size = (ranks.rank, ranks.world_size) if args.dist_eval else (0, 1)
    if rank != ranks.rank:
        return iter(())
    pin_memory = args.pin_mem and ranks.device.type == "cuda"
    return validation_batches(
        samples, args.batch_size, rank, world_size, args.num_workers, pin_memory
    )


def autocast_of(args: argparse.Namespace, ranks: DistributedContext) -> torch.autocast:
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=args.use_amp)


def save(
    args: argparse.Namespace,
    training: Training,
    data: ImageData,
    progress: dict,
    checkpoints: Checkpoints,
) -> None:
    if not args.save_ckpt:
        return
    arguments = {name: getattr(args, name) for name in RESUME_ARGUMENTS}
    decay = training.decay.state_dict() if training.decay else None
    trainer = {
        "progress": progress,
        "decay": decay,
        "data": data.fingerprint,
        "arguments": arguments,
    }
    checkpoints.save(
        progress["update_step"],
        training.model,
        training.optimizer,
        trainer,
        config=training.config,
        extra=training.averages(),
    )


# Arguments that a resumed run must share with the checkpoint to be the same run.
RESUME_ARGUMENTS = (
    "drop_path", "imagenet_default_mean_and_std", "skip_bad_images", "seed", "color_jitter", "aa", "smoothing", "train_interpolation",
    "reprob", "remode", "recount", "mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "batch_size",
    "total_batch_size", "epochs", "optimizer", "lr", "weight_decay", "weight_decay_end", "opt_eps", "opt_betas", "clip_grad", "min_lr",
    "warmup_epochs", "warmup_steps", "model_ema", "model_ema_decay", "use_amp", "use_modulewise_wd", "alpha_positively_with_WD",
    "unbalancedWD_every", "esd_metric_for_tb", "assign_func", "wd_min_ratio", "wd_max_ratio", "pl_fitting", "xmin_pos", "filter_zeros",
    "remove_first_layer", "remove_last_layer", "batchnorm", "batchnorm_type", "balance_scope", "esd_async", "esd_lag",
    "use_AWD_NeurIPS2023", "use_AdaDecay", "iso_budget", "one_shot", "shuffle_decays", "shuffle_seed", "type_constant",
    "type_multipliers", "adamc", "cautious_decay",
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_script(main))
