r"""Compare the images per second of main_vit.py with those of timm's training loop.

    python benchmarks/bench_vit.py [--model deit_tiny_patch16_224] [--input_size 64] \
        [--updates 8] [--rounds 5]

The other loop is that of timm's train.py, made of timm's parts: create_loader with its prefetcher
and timm's collation, Mixup, create_optimizer_v2 and ModelEmaV3. Both take turns, `--updates`
updates each, after one to warm up, over `--rounds` rounds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import alphadecay  # noqa: E402
import main_vit  # noqa: E402
from peft_pretraining.cli.vit import complete, vit_parser  # noqa: E402
from peft_pretraining.optim.gradients import clip_gradients  # noqa: E402
from peft_pretraining.optim.nonfinite import NonFiniteGuard  # noqa: E402
from peft_pretraining.optim.optimizer import scaled_decays  # noqa: E402
from peft_pretraining.parallel.process_group import DistributedContext  # noqa: E402
from peft_pretraining.vision.batchnorm import BatchNormSync  # noqa: E402
from peft_pretraining.vision.datasets import load_images  # noqa: E402
from peft_pretraining.vision.models import build_model  # noqa: E402
from peft_pretraining.vision.transforms import patch_posterize  # noqa: E402

RANKS = DistributedContext(0, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
RESULT = ROOT / "benchmarks/results"


def write_photographs(folder: Path, size: int, classes: int = 4, each: int = 64) -> None:
    """Write JPEG files of smooth noise, which take as long to decode as photographs."""
    rng = np.random.default_rng(0)
    for split, count in (("train", each), ("val", 1)):
        for label in range(classes):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(
                    rng.integers(0, 256, (size // 8, size // 8, 3)).astype(np.uint8)
                )
                coarse.resize((size * 9 // 8, size * 9 // 8), Image.Resampling.BICUBIC).save(
                    place / f"{i}.jpg", quality=90
                )


def settings(options: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """The flags of main_vit.py, the recipe's defaults but for what the benchmark sets."""
    parser = vit_parser()
    alphadecay.cli.flags.add_flags(parser)
    words = (
        f"--model {options.model} --input_size {options.input_size} --batch_size "
        f"{options.batch_size} --nb_classes 4 --drop_path 0.1"
    )
    words += (
        f" --data_path {folder} --model_ema true --num_workers {options.num_workers} --epochs "
        "1000000"
    )
    return complete(parser.parse_args(words.split()), 1, "uniform")


class Ours:
    """The updates of main_vit.py's loop, without records and checkpoints."""

    def __init__(self, args: argparse.Namespace, data):
        self.args = args
        self.training = main_vit.make_training(args, build_model(args).to(RANKS.device))
        self.schedule = main_vit.Schedule.of(args, len(data.train))
        self.loss = main_vit.loss_and_mixup(args)
        self.guard = NonFiniteGuard(self.training.optimizer, RANKS, 10)
        self.statistics = BatchNormSync(self.training.model, RANKS)
        self.steps = main_vit.build_train_loader(args, data, 0, RANKS)
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        model, optimizer = self.training.model, self.training.optimizer
        loss = main_vit.forward_backward(
            model, next(self.steps), self.updates, self.args, *self.loss, RANKS
        )
        self.guard.resolve_pending()
        self.guard.check_update(self.updates, loss, clip_gradients(model, 0.0))
        lr, eta = main_vit.rates(self.args, self.updates, self.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with scaled_decays(optimizer, eta):
            optimizer.step()
        optimizer.zero_grad()
        self.statistics.commit_or_roll_back(optimizer.found_inf)
        self.training.ema.update(model)


class Theirs:
    """The updates of timm's train.py with the same flags."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.model = build_model(args).to(RANKS.device)
        self.optimizer = create_optimizer_v2(
            self.model, opt=args.optimizer, lr=args.lr, weight_decay=args.weight_decay
        )
        self.ema = ModelEmaV3(self.model, args.model_ema_decay)
        self.criterion, self.mixup = SoftTargetCrossEntropy(), main_vit.loss_and_mixup(args)[1]
        self.loader = create_loader(
            create_dataset("", str(folder), split="train", is_training=True),
            (3, args.input_size, args.input_size),
            args.batch_size,
            is_training=True,
            re_prob=args.reprob,
            re_mode=args.remode,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=args.train_interpolation,
            num_workers=args.num_workers,
            device=RANKS.device,
            persistent_workers=args.num_workers > 0,
        )
        for augmentation in self.loader.dataset.transform.transforms:
            patch_posterize(
                augmentation
            )  # as in main_vit.py: timm 1.0.31 does not get along with Pillow 13
        self.batches = self.endless()

    def endless(self):
        while True:
            yield from self.loader

    def update(self) -> None:
        images, targets = self.mixup(*next(self.batches))
        self.criterion(self.model(images), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)


def seconds_of(loop: Ours | Theirs, updates: int) -> float:
    start = time.perf_counter()
    for _ in range(updates):
        loop.update()
    if RANKS.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second beside timm's loop.")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--input_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that read images (default 0)"
    )
    parser.add_argument("--updates", type=int, default=8, help="in a turn (default 8)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), options.input_size)
        args = settings(options, Path(folder))
        loops = {
            "main_vit.py": Ours(args, load_images("IMNET", folder, None, 4)),
            "timm": Theirs(args, Path(folder)),
        }
        for loop in loops.values():
            seconds_of(loop, 1)
        seconds = {name: [] for name in loops}
        for _ in range(options.rounds):
            for name, loop in loops.items():
                seconds[name].append(seconds_of(loop, options.updates))
    images = options.updates * args.batch_size
    rates = {name: images / statistics.median(taken) for name, taken in seconds.items()}
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*seconds.values(), strict=True))
    device = (
        torch.cuda.get_device_name()
        if RANKS.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    result = {
        "device": device,
        "settings": vars(options),
        "images_per_second": rates,
        "main_vit_over_timm": ratio,
        "seconds": seconds,
    }
    print("\n".join(f"{name:<12} {rate:8.1f} images/s" for name, rate in rates.items()))
    print(f"main_vit.py over timm, median of {options.rounds} rounds: {ratio:.3f} ({device})")
    RESULT.mkdir(exist_ok=True)
    (RESULT / f"vit_{RANKS.device.type}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
