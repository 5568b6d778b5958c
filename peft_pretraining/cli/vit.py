"""Command-line arguments of main_vit.py, named and preset as in the ConvNeXt recipe (Liu et al. 2022, arXiv 2201.03545)."""

import argparse
import ast
import os

from peft_pretraining.cli.common import (
    Parser,
    add_optimizer,
    add_records,
    check_numbers,
    name_run,
    str_to_bool,
)
from peft_pretraining.errors import UserError
from peft_pretraining.vision.datasets import DATA_SETS


def vit_parser() -> Parser:
    """The parser of main_vit.py, without the method's own flags."""
    parser = Parser(
        prog="main_vit.py",
        description="Train image classifiers with module-wise weight decay.",
        allow_abbrev=False,
    )
    _add_model_and_data(parser.add_argument_group("model and data"))
    _add_augmentation(parser.add_argument_group("augmentation (timm)"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("evaluation, checkpoints and the run's records"))
    return parser


def keyword(text: str) -> tuple[str, object]:
    """`patch_size=8` -> ("patch_size", 8); a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_boolean(g, name: str, default: bool, help: str) -> None:
    """A flag that takes true or false."""
    g.add_argument(
        f"--{name}",
        type=str_to_bool,
        default=default,
        metavar="BOOL",
        help=f"{help} (default {str(default).lower()})",
    )


def _add_model_and_data(g) -> None:
    g.add_argument(
        "--model",
        default="deit_tiny_patch16_224",
        help="a model of timm, also by its name of 2021 (vit_deit_...)",
    )
    g.add_argument(
        "--model_kwargs",
        type=keyword,
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="more for timm.create_model, e.g. patch_size=8",
    )
    g.add_argument(
        "--drop_path",
        type=float,
        default=0.0,
        help="stochastic depth, the last block's rate (default 0)",
    )
    g.add_argument("--input_size", type=int, default=224, help="pixels on a side (default 224)")
    g.add_argument(
        "--data_set",
        choices=DATA_SETS,
        default="IMNET",
        help="IMNET: class folders in FOLDER/train and FOLDER/val (default)",
    )
    g.add_argument("--data_path", metavar="FOLDER", help="the images; --data_set digits needs none")
    g.add_argument(
        "--eval_data_path",
        metavar="FOLDER",
        help="class folders of validation images, if not --data_path FOLDER/val",
    )
    g.add_argument(
        "--nb_classes", type=int, help="number of classes (default 1000; CIFAR and digits: 10)"
    )
    add_boolean(
        g,
        "imagenet_default_mean_and_std",
        True,
        "normalise by ImageNet's mean and deviation; false: to [-1, 1]",
    )
    add_boolean(
        g,
        "skip_bad_images",
        False,
        "leave out images that cannot be read, with a warning, instead of stopping",
    )
    g.add_argument(
        "--num_workers",
        type=int,
        default=8,
        help="processes that read images, for each rank; at most one a core (default 8)",
    )
    add_boolean(g, "pin_mem", True, "copy batches to a GPU from pinned memory")
    g.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of initial weights, order, augmentation and drop path (default 0)",
    )
    g.add_argument(
        "--finetune",
        metavar="FILE",
        help="begin with the weights of this checkpoint (.pth, .safetensors)",
    )
    g.add_argument(
        "--head_init_scale",
        type=float,
        default=1.0,
        help="of --finetune: scales the initial classifier (default 1)",
    )
    g.add_argument(
        "--model_key",
        default="model|module",
        help="of --finetune: where in the file the weights are (default model|module)",
    )
    g.add_argument(
        "--model_prefix", default="", help="of --finetune: what every name in the file begins with"
    )


def _add_augmentation(g) -> None:
    g.add_argument(
        "--color_jitter", type=float, default=0.4, help="strength, where --aa is none (default 0.4)"
    )
    g.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help="AutoAugment policy, or none (default rand-m9-mstd0.5-inc1)",
    )
    g.add_argument("--smoothing", type=float, default=0.1, help="label smoothing (default 0.1)")
    g.add_argument(
        "--train_interpolation",
        choices=("random", "bilinear", "bicubic"),
        default="bicubic",
        help="(default bicubic)",
    )
    g.add_argument(
        "--crop_pct",
        type=float,
        help="side of the evaluated middle over the image's (default 0.875; 1 up to 32 and from 384 pixels)",
    )
    g.add_argument(
        "--reprob", type=float, default=0.25, help="probability of random erasing (default 0.25)"
    )
    g.add_argument(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="what erased areas are filled with (default pixel)",
    )
    g.add_argument("--recount", type=int, default=1, help="erased areas (default 1)")
    add_boolean(g, "resplit", False, "of recipes with augmentation splits, which this one has not")
    g.add_argument("--mixup", type=float, default=0.8, help="alpha of mixup; 0: none (default 0.8)")
    g.add_argument("--cutmix", type=float, default=1.0, help="alpha of cutmix; 0: none (default 1)")
    g.add_argument(
        "--cutmix_minmax",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="side ratios of cutmix, instead of its alpha",
    )
    g.add_argument(
        "--mixup_prob",
        type=float,
        default=1.0,
        help="probability that a batch is mixed (default 1)",
    )
    g.add_argument(
        "--mixup_switch_prob",
        type=float,
        default=0.5,
        help="probability of cutmix where both are on (default 0.5)",
    )
    g.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="what shares its parameters (default batch)",
    )


def _add_training(g) -> None:
    g.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="images in a micro-batch of one process (default 64)",
    )
    g.add_argument(
        "--update_freq",
        type=int,
        default=1,
        help="micro-batches of each process in an update (default 1)",
    )
    g.add_argument("--epochs", type=int, default=120, help="(default 120)")
    g.add_argument(
        "--start_epoch",
        type=int,
        default=0,
        help="begin the schedules here where no checkpoint is continued (default 0)",
    )
    add_optimizer(g, lr=4e-3, weight_decay=5e-6)
    g.add_argument(
        "--weight_decay_end",
        type=float,
        help="eta at the end of a cosine; every module's decay is scaled alike (default: constant)",
    )
    g.add_argument(
        "--opt_eps", type=float, default=1e-8, help="the optimizer's epsilon (default 1e-8)"
    )
    g.add_argument(
        "--opt_betas",
        type=float,
        nargs=2,
        default=[0.9, 0.999],
        metavar=("B1", "B2"),
        help="(default 0.9 0.999)",
    )
    g.add_argument("--clip_grad", type=float, help="greatest gradient norm (default: none)")
    g.add_argument(
        "--min_lr",
        type=float,
        default=1e-6,
        help="learning rate at the end of the cosine (default 1e-6)",
    )
    g.add_argument("--warmup_epochs", type=int, default=20, help="of linear warm-up (default 20)")
    g.add_argument(
        "--warmup_steps",
        type=int,
        default=-1,
        help="updates of warm-up instead of epochs (default -1: epochs)",
    )
    add_boolean(g, "model_ema", False, "keep a moving average of the weights (timm's ModelEmaV3)")
    g.add_argument("--model_ema_decay", type=float, default=0.9999, help="(default 0.9999)")
    add_boolean(g, "model_ema_force_cpu", False, "keep it in CPU memory")
    add_boolean(g, "model_ema_eval", False, "evaluate it too")
    add_boolean(g, "use_amp", False, "forward and backward under bfloat16 autocast")
    g.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")


def _add_run(g) -> None:
    add_boolean(g, "eval", False, "only evaluate, the model of --resume or --finetune")
    add_boolean(g, "disable_eval", False, "do not evaluate during training")
    add_boolean(
        g,
        "dist_eval",
        True,
        "share the evaluation between the processes; false: the first does it alone",
    )
    g.add_argument("--output_dir", metavar="FOLDER", help="the run folder (default runs/NAME)")
    g.add_argument("--resume", metavar="WHERE", help="continue from a checkpoint or a run folder")
    add_boolean(
        g, "auto_resume", True, "continue from the newest checkpoint of the run folder, if any"
    )
    add_boolean(g, "save_ckpt", True, "save checkpoints")
    g.add_argument(
        "--save_ckpt_freq",
        type=int,
        default=1,
        metavar="N",
        help="epochs between two (default 1); one follows the last",
    )
    g.add_argument("--save_every", type=int, metavar="N", help="besides, updates between two")
    g.add_argument(
        "--save_ckpt_num",
        type=int,
        default=3,
        metavar="N",
        help="so many of the newest are kept (default 3)",
    )
    add_boolean(g, "enable_wandb", True, "record the run in W&B too, offline unless a key is set")
    g.add_argument("--project", default="alphadecay", help="of W&B (default alphadecay)")
    add_records(g)


def complete(args: argparse.Namespace, world_size: int) -> argparse.Namespace:
    """Fill in what follows from other arguments. Raises UserError where they contradict each other."""
    check_numbers(
        args,
        ("batch_size", "update_freq", "epochs", "input_size", "nb_classes", "lr", "opt_eps", "clip_grad", "crop_pct", "recount",
         "save_ckpt_freq", "save_ckpt_num", "save_every", "log_every", "unbalancedWD_every", "max_skipped_updates"),
        ("weight_decay", "weight_decay_end", "min_lr", "warmup_epochs", "start_epoch", "seed", "num_workers", "mixup", "cutmix",
         "color_jitter"),
    )  # fmt: skip
    for name in (
        "drop_path",
        "smoothing",
        "reprob",
        "mixup_prob",
        "mixup_switch_prob",
        "model_ema_decay",
    ):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: it must be from 0 to 1")
    args.aa = None if args.aa.lower() in ("none", "") else args.aa
    args.mixes = bool(args.mixup or args.cutmix or args.cutmix_minmax)
    args.num_workers = min(args.num_workers, os.cpu_count() or 1)
    args.total_batch_size = args.batch_size * args.update_freq * world_size
    args.nb_classes = args.nb_classes or (10 if args.data_set in ("CIFAR", "digits") else 1000)
    name_run(args, args.model)
    args.output_dir = args.output_dir or f"runs/{args.name}"
    _refuse_contradictions(args)
    return args


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.mixes and args.batch_size % 2:
        raise UserError(
            f"mixup and cutmix mix images in pairs: give an even --batch_size instead of {args.batch_size}"
        )
    if args.resplit:
        raise UserError(
            "--resplit true needs augmentation splits, which this recipe has not: leave it out"
        )
    if args.weight_decay_end is not None and args.use_AdaDecay:
        raise UserError(
            "--use_AdaDecay applies its decays itself, element by element: leave --weight_decay_end out"
        )
    if args.weight_decay_end is not None and not args.weight_decay:
        raise UserError("--weight_decay_end scales --weight_decay, which is 0: give one above 0")
    if args.warmup_epochs > args.epochs and args.warmup_steps < 0:
        raise UserError(
            f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}: give fewer"
        )
    if args.start_epoch >= args.epochs:
        raise UserError(
            f"--start_epoch {args.start_epoch} leaves none of --epochs {args.epochs}: give less"
        )
    if args.min_lr > args.lr:
        raise UserError(f"--min_lr {args.min_lr:g} is above --lr {args.lr:g}: give less")
    if args.model_ema_eval and not args.model_ema:
        raise UserError("--model_ema_eval true needs --model_ema true")
    if args.eval and not (args.resume or args.finetune):
        raise UserError(
            "--eval true needs a model to evaluate: give --resume CHECKPOINT or --finetune FILE"
        )
