"""Command-line arguments of main_vit.py, named and preset as in the ConvNeXt recipe.

The recipe is that of Liu et al. 2022 (arXiv 2201.03545).
"""

import argparse
import ast
import os

from peft_pretraining.cli.common import (
    Parser,
    add_deterministic,
    add_optimizer,
    add_records,
    add_resume,
    add_saving,
    check_numbers,
    complete_resume,
    name_run,
    str_to_bool,
)
from peft_pretraining.constants import DATA_SETS
from peft_pretraining.errors import UserError

# Arguments that are stored in a checkpoint and compared when a run is resumed. A difference is a
# warning: the resumed run is then another one than the run that it continues.
RESUME_ARGUMENTS = (
    "drop_path",
    "imagenet_default_mean_and_std",
    "skip_bad_images",
    "seed",
    "color_jitter",
    "aa",
    "smoothing",
    "train_interpolation",
    "reprob",
    "remode",
    "recount",
    "mixup",
    "cutmix",
    "cutmix_minmax",
    "mixup_prob",
    "mixup_switch_prob",
    "mixup_mode",
    "batch_size",
    "total_batch_size",
    "epochs",
    "optimizer",
    "lr",
    "weight_decay",
    "weight_decay_end",
    "opt_eps",
    "opt_betas",
    "clip_grad",
    "min_lr",
    "warmup_epochs",
    "warmup_steps",
    "model_ema",
    "model_ema_decay",
    "use_amp",
    "use_modulewise_wd",
    "alpha_positively_with_WD",
    "unbalancedWD_every",
    "esd_metric_for_tb",
    "assign_func",
    "wd_min_ratio",
    "wd_max_ratio",
    "pl_fitting",
    "xmin_pos",
    "filter_zeros",
    "remove_first_layer",
    "remove_last_layer",
    "batchnorm",
    "batchnorm_type",
    "balance_scope",
    "esd_async",
    "esd_lag",
    "use_AWD_NeurIPS2023",
    "use_AdaDecay",
    "iso_budget",
    "one_shot",
    "shuffle_decays",
    "shuffle_seed",
    "type_constant",
    "type_multipliers",
    "adamc",
    "cautious_decay",
)

# A checkpoint stores a fingerprint of the data and timm's description of the model instead.
DATA_ARGUMENTS = ("model", "data_set", "data_path", "eval_data_path", "nb_classes", "input_size")

POSITIVE = (
    "batch_size",
    "update_freq",
    "epochs",
    "input_size",
    "nb_classes",
    "lr",
    "opt_eps",
    "clip_grad",
    "crop_pct",
    "recount",
    "save_ckpt_freq",
    "save_ckpt_num",
    "save_every",
    "log_every",
    "unbalancedWD_every",
    "max_skipped_updates",
    "timeout_minutes",
)
NOT_NEGATIVE = (
    "save_every_minutes",
    "weight_decay",
    "weight_decay_end",
    "min_lr",
    "warmup_epochs",
    "start_epoch",
    "seed",
    "num_workers",
    "mixup",
    "cutmix",
    "color_jitter",
)
FROM_0_TO_1 = (
    "drop_path",
    "smoothing",
    "reprob",
    "mixup_prob",
    "mixup_switch_prob",
    "model_ema_decay",
)


EXAMPLE = """example:
  torchrun --nproc_per_node=2 main_vit.py --model deit_tiny_patch16_224 \\
      --model_kwargs patch_size=4 depth=4 embed_dim=64 num_heads=2 --data_set digits \\
      --input_size 32 --batch_size 16 --epochs 20 --warmup_epochs 2 --method alphadecay
"""


def vit_parser() -> Parser:
    """Return the parser of main_vit.py without the flags of the weight-decay method."""
    parser = Parser(
        prog="main_vit.py",
        description="Train image classifiers with module-wise weight decay.",
        epilog=EXAMPLE,
    )
    _add_model_and_data(parser.add_argument_group("model and data"))
    _add_augmentation(parser.add_argument_group("augmentation (timm)"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("evaluation, checkpoints and the run's records"))
    return parser


def keyword(text: str) -> tuple[str, object]:
    """Parse a keyword argument: `patch_size=8` is ("patch_size", 8).

    A value that is not a Python literal is a string.

    Raises:
        argparse.ArgumentTypeError: the text contains no `=`.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_boolean(group: argparse._ArgumentGroup, name: str, default: bool, help: str) -> None:
    """Add a flag that takes true or false; the help text gets the default."""
    group.add_argument(
        f"--{name}",
        type=str_to_bool,
        default=default,
        metavar="BOOL",
        help=f"{help} (default {str(default).lower()}).",
    )


def _add_model_and_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default="deit_tiny_patch16_224",
        help="Name of a timm model; names that timm used in 2021 (vit_deit_...) work too (default "
        "deit_tiny_patch16_224).",
    )
    group.add_argument(
        "--model_kwargs",
        type=keyword,
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="More arguments for timm.create_model, for instance patch_size=8 (default: none).",
    )
    group.add_argument(
        "--drop_path",
        type=float,
        default=0.0,
        help="Rate of stochastic depth in the last block (default 0).",
    )
    group.add_argument(
        "--input_size",
        type=int,
        default=224,
        help="Side of the input images in pixels (default 224).",
    )
    group.add_argument(
        "--data_set",
        choices=DATA_SETS,
        default="IMNET",
        help="IMNET: one folder for each class in FOLDER/train and in FOLDER/val (default). "
        "image_folder: one folder for each class in --data_path and in --eval_data_path. CIFAR10, "
        "CIFAR100; CIFAR is one of them, depending on --nb_classes. digits: scikit-learn's "
        "handwritten digits.",
    )
    group.add_argument(
        "--data_path",
        metavar="FOLDER",
        help="The images (no default; --data_set digits needs none).",
    )
    group.add_argument(
        "--eval_data_path",
        metavar="FOLDER",
        help="Class folders of the validation images (default: FOLDER/val of --data_path).",
    )
    group.add_argument(
        "--nb_classes",
        type=int,
        help="Number of classes (default 1000; for CIFAR10, CIFAR100 and digits 10, 100 and 10).",
    )
    add_boolean(
        group,
        "imagenet_default_mean_and_std",
        True,
        "Normalise images with ImageNet's mean and standard deviation; false normalises to [-1, 1]",
    )
    add_boolean(
        group,
        "skip_bad_images",
        False,
        "Skip images that cannot be read, with a warning, instead of stopping",
    )
    group.add_argument(
        "--num_workers",
        type=int,
        default=8,
        help="Number of processes of each rank that read images, limited to the number of cores "
        "(default 8).",
    )
    add_boolean(group, "pin_mem", True, "Copy batches to a GPU from pinned memory")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="Seed of the initial weights, the order of the data, augmentation and stochastic "
        "depth (default 0).",
    )
    group.add_argument(
        "--finetune",
        metavar="FILE",
        help="Start with the weights of this checkpoint (.pth or .safetensors) (default: "
        "fresh weights).",
    )
    group.add_argument(
        "--head_init_scale",
        type=float,
        default=1.0,
        help="Factor on the initial weights of the classifier (default 1).",
    )
    group.add_argument(
        "--model_key",
        default="model|module",
        help="With --finetune: keys under which the file may hold the weights, separated by | "
        "(default model|module).",
    )
    group.add_argument(
        "--model_prefix",
        default="",
        help="With --finetune: prefix of the names in the file, which is removed (default: none).",
    )


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--color_jitter",
        type=float,
        default=0.4,
        help="Strength of the colour jitter, which is used with --aa none only (default 0.4).",
    )
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help="AutoAugment policy, or none (default rand-m9-mstd0.5-inc1).",
    )
    group.add_argument(
        "--smoothing", type=float, default=0.1, help="Label smoothing (default 0.1)."
    )
    group.add_argument(
        "--train_interpolation",
        choices=("random", "bilinear", "bicubic"),
        default="bicubic",
        help="Interpolation when a training image is resized (default bicubic).",
    )
    group.add_argument(
        "--crop_pct",
        type=float,
        help="Evaluate the centre of an image: this is its side divided by the side of the image "
        "(default 0.875; 1 for inputs up to 32 pixels and from 384 pixels).",
    )
    group.add_argument(
        "--reprob", type=float, default=0.25, help="Probability of random erasing (default 0.25)."
    )
    group.add_argument(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="How erased areas are filled (default pixel).",
    )
    group.add_argument(
        "--recount", type=int, default=1, help="Number of erased areas in an image (default 1)."
    )
    add_boolean(
        group,
        "resplit",
        False,
        "Only for recipes with augmentation splits, which are not supported; leave it out",
    )
    group.add_argument(
        "--mixup", type=float, default=0.8, help="Alpha of mixup; 0 turns it off (default 0.8)."
    )
    group.add_argument(
        "--cutmix", type=float, default=1.0, help="Alpha of CutMix; 0 turns it off (default 1)."
    )
    group.add_argument(
        "--cutmix_minmax",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="Minimum and maximum side ratio of CutMix, used instead of its alpha (default: none).",
    )
    group.add_argument(
        "--mixup_prob",
        type=float,
        default=1.0,
        help="Probability that mixup or CutMix is applied to a batch (default 1).",
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=float,
        default=0.5,
        help="Probability of CutMix if mixup and CutMix are both on (default 0.5).",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="Draw the mixing parameters once for a batch, for each pair or for each image "
        "(default batch).",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="Images in a micro-batch of one process (default 64).",
    )
    group.add_argument(
        "--update_freq",
        type=int,
        default=1,
        help="Micro-batches of each process in an update (default 1).",
    )
    group.add_argument("--epochs", type=int, default=120, help="Number of epochs (default 120).")
    group.add_argument(
        "--start_epoch",
        type=int,
        default=0,
        help="Epoch at which the schedules start if no checkpoint is resumed (default 0).",
    )
    add_optimizer(group, lr=4e-3, weight_decay=5e-6)
    group.add_argument(
        "--weight_decay_end",
        type=float,
        help="Weight decay at the end of a cosine schedule that scales the decays of all modules "
        "by the same factor (default: no schedule).",
    )
    group.add_argument(
        "--opt_eps", type=float, default=1e-8, help="Epsilon of the optimizer (default 1e-8)."
    )
    group.add_argument(
        "--opt_betas",
        type=float,
        nargs=2,
        default=[0.9, 0.999],
        metavar=("B1", "B2"),
        help="Betas of the optimizer (default 0.9 0.999).",
    )
    group.add_argument(
        "--clip_grad", type=float, help="Maximum norm of the gradients (default: no clipping)."
    )
    group.add_argument(
        "--min_lr",
        type=float,
        default=1e-6,
        help="Learning rate at the end of the cosine schedule (default 1e-6).",
    )
    group.add_argument(
        "--warmup_epochs", type=int, default=20, help="Epochs of linear warm-up (default 20)."
    )
    group.add_argument(
        "--warmup_steps",
        type=int,
        default=-1,
        help="Updates of linear warm-up; -1 means that --warmup_epochs is used (default -1).",
    )
    add_boolean(
        group,
        "model_ema",
        False,
        "Keep an exponential moving average of the weights (timm's ModelEmaV3)",
    )
    group.add_argument(
        "--model_ema_decay",
        type=float,
        default=0.9999,
        help="Decay of the moving average (default 0.9999).",
    )
    add_boolean(group, "model_ema_force_cpu", False, "Keep the moving average in CPU memory")
    add_boolean(group, "model_ema_eval", False, "Evaluate the moving average too")
    add_deterministic(group)
    add_boolean(group, "use_amp", False, "Use bfloat16 autocast in forward and backward passes")
    group.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="Device to train on (default: cuda if there is one).",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    add_boolean(group, "eval", False, "Only evaluate the model of --resume or --finetune")
    add_boolean(group, "disable_eval", False, "Do not evaluate during the training")
    add_boolean(
        group,
        "dist_eval",
        True,
        "Distribute the evaluation over the processes; false evaluates on rank 0 only",
    )
    group.add_argument("--output_dir", metavar="FOLDER", help="Run folder (default runs/NAME).")
    add_saving(group)
    add_resume(group)
    add_boolean(group, "save_ckpt", True, "Save checkpoints")
    group.add_argument(
        "--save_ckpt_freq",
        type=int,
        default=1,
        metavar="N",
        help="Epochs between two checkpoints (default 1). The last update is always saved.",
    )
    group.add_argument(
        "--save_every",
        type=int,
        metavar="N",
        help="Updates between two additional checkpoints (default: none).",
    )
    group.add_argument(
        "--save_ckpt_num",
        type=int,
        default=3,
        metavar="N",
        help="Number of checkpoints to keep, the newest ones (default 3).",
    )
    add_boolean(group, "enable_wandb", True, "Record the run in W&B too, offline without a key")
    add_records(group)
    group.add_argument(
        "--log_dir",
        metavar="FOLDER",
        help="Accepted for published commands; no TensorBoard files are written, the records are "
        "in the run folder (default: none).",
    )
    add_boolean(
        group,
        "wandb_ckpt",
        False,
        "Accepted for published commands; checkpoints are not sent to W&B",
    )
    add_boolean(
        group, "test_code", False, "For published commands; true is refused, use --dry_run instead"
    )


def complete(args: argparse.Namespace, world_size: int, method: str) -> argparse.Namespace:
    """Fill in the arguments that follow from others, and check that they fit each other.

    Args:
        args: the parsed arguments, changed in place.
        world_size: number of processes.
        method: name of the weight-decay method.

    Returns:
        The same arguments. `mixes` says whether mixup or CutMix is on.

    Raises:
        UserError: an argument contradicts another one or is out of range.
    """
    check_numbers(args, POSITIVE, NOT_NEGATIVE)
    for name in FROM_0_TO_1:
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: it must be from 0 to 1")
    args.aa = None if args.aa.lower() in ("none", "") else args.aa
    args.mixes = bool(args.mixup or args.cutmix or args.cutmix_minmax)
    args.num_workers = min(args.num_workers, os.cpu_count() or 1)
    args.total_batch_size = args.batch_size * args.update_freq * world_size
    known = {"CIFAR10": 10, "CIFAR100": 100, "digits": 10}.get(args.data_set)
    if args.data_set == "CIFAR" and args.nb_classes is None:
        raise UserError(
            "--data_set CIFAR is CIFAR-100 in the published code, and CIFAR-10 or CIFAR-100 here: "
            "give --data_set CIFAR10 or CIFAR100"
        )
    args.nb_classes = args.nb_classes or known or 1000
    if known not in (None, args.nb_classes):
        raise UserError(
            f"--data_set {args.data_set} has {known} classes: leave --nb_classes "
            f"{args.nb_classes} out"
        )
    complete_resume(args)
    name_run(args, args.model, method)
    args.output_dir = args.output_dir or f"runs/{args.name}"
    _check_combinations(args)
    return args


def _check_combinations(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that contradict each other."""
    if args.mixes and args.batch_size % 2:
        raise UserError(
            "mixup and CutMix mix images in pairs: give an even --batch_size instead of "
            f"{args.batch_size}"
        )
    if args.resplit:
        raise UserError(
            "--resplit true needs augmentation splits, which are not supported: leave it out"
        )
    if args.weight_decay_end is not None and args.use_AdaDecay:
        raise UserError(
            "--use_AdaDecay applies a decay of its own to each element: leave --weight_decay_end "
            "out"
        )
    if args.weight_decay_end is not None and not args.weight_decay:
        raise UserError("--weight_decay_end scales --weight_decay, which is 0: give one above 0")
    if args.warmup_epochs > args.epochs and args.warmup_steps < 0:
        raise UserError(
            f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}: give fewer"
        )
    if args.start_epoch >= args.epochs:
        raise UserError(
            f"--start_epoch {args.start_epoch} must be less than --epochs {args.epochs}: give a "
            "smaller one"
        )
    if args.min_lr > args.lr:
        raise UserError(f"--min_lr {args.min_lr:g} is above --lr {args.lr:g}: give a smaller one")
    if args.model_ema_eval and not args.model_ema:
        raise UserError("--model_ema_eval true needs --model_ema true")
    if args.eval and args.same_settings_only and not args.finetune:
        raise UserError(
            "--eval true needs a model to evaluate: give --resume CHECKPOINT or --finetune FILE"
        )
    if args.test_code:
        raise UserError(
            "--test_code true is not supported: give --dry_run to check a command, or --epochs 1"
        )
