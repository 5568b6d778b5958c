"""Images, their batches, models and accuracy, against plain loops."""

import argparse
import math
import threading

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import alphadecay
import main_vit
from peft_pretraining.checkpoint.load import load_checkpoint
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.cli.vit import complete, vit_parser
from peft_pretraining.errors import UserError
from peft_pretraining.optim.optimizer import build_optimizer, scaled_decays
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.vision.batchnorm import BatchNormSync
from peft_pretraining.vision.datasets import load_images, read_class_folders
from peft_pretraining.vision.evaluation import evaluate
from peft_pretraining.vision.export import export, timm_config
from peft_pretraining.vision.loader import (
    TrainingSamples,
    ValidationSamples,
    training_steps,
    validation_batches,
)
from peft_pretraining.vision.models import build_model, current_name, forward_flops, load_weights
from peft_pretraining.vision.transforms import training_transform, validation_transform
from tests.end_to_end.common import write_images
from tests.support.reference import balanced, decays, statistics

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))


def arguments(*more) -> argparse.Namespace:
    """The flags of a small run, as parsed."""
    parser = vit_parser()
    alphadecay.flags.add_flags(parser)
    base = [
        "--input_size",
        "32",
        "--nb_classes",
        "4",
        "--data_path",
        "unused",
        "--warmup_epochs",
        "1",
    ]
    return complete(parser.parse_args([*base, *map(str, more)]), world_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), train=12, val=3)


# ------------------------------------------------------------------------------------------------------------------- images


def test_class_folders(folder):
    data = load_images("IMNET", str(folder), None, 4)
    assert (
        data.train.classes == ("blue", "green", "red", "white")
        and len(data.train) == 48
        and len(data.validation) == 12
    )
    for i in (0, 13, 47):
        name = f"{data.train.classes[data.train.labels[i]]}/{i % 12:02}.png"
        assert data.train.files[i].decode() == name
        assert data.train.read(i).tobytes() == Image.open(folder / "train" / name).tobytes()
    again = load_images("image_folder", str(folder / "train"), str(folder / "val"), 4)
    assert again.fingerprint == data.fingerprint


def test_digits():
    data = load_images("digits", None, None, 10)
    assert (len(data.train), len(data.validation), data.mirrors) == (1437, 360, False)
    assert (
        np.bincount(data.validation.labels, minlength=10).min() > 20
    )  # every digit is on both sides
    image = np.asarray(data.train.read(0))
    assert image.shape == (8, 8, 3) and image.max() == 255


def test_cifar(tmp_path, monkeypatch):
    """Without a network: what torchvision would have read."""
    import torchvision

    class Fake:
        classes = [str(i) for i in range(10)]

        def __init__(self, root, train, download):
            self.data, self.targets = (
                np.zeros((20 if train else 10, 32, 32, 3), np.uint8),
                list(range(10)) * (2 if train else 1),
            )

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_images("CIFAR", str(tmp_path), None, 10)
    assert (len(data.train), len(data.validation)) == (20, 10) and data.train.read(3).size == (
        32,
        32,
    )


def no_split(folder):
    (folder / "val").rename(folder / "test")


def empty_class(folder):
    for file in (folder / "train/red").iterdir():
        file.unlink()


def other_classes(folder):
    (folder / "val/green").rename(folder / "val/lime")


@pytest.mark.parametrize(
    "break_it, n_classes, expected",
    [
        (no_split, 4, "/val is missing: IMNET has class folders"),
        (empty_class, 4, "train/red holds no image"),
        (other_classes, 4, r"green is in .*/train but not in .*/val, and 1 more"),
        (
            lambda folder: None,
            1000,
            r"--nb_classes 1000, but .* has 4 classes: give --nb_classes 4",
        ),
    ],
)
def test_folders_that_are_wrong(tmp_path, break_it, n_classes, expected):
    break_it(write_images(tmp_path / "images", train=2, val=1))
    with pytest.raises(UserError, match=expected):
        load_images("IMNET", str(tmp_path / "images"), None, n_classes)


# ------------------------------------------------------------------------------------------------------------------ batches


def training_batches(folder, update=0, rank=0, world_size=1, workers=0, batch_size=4, n=7):
    args = arguments()
    samples = TrainingSamples(
        read_class_folders(folder / "train"), training_transform(args, True), False, seed=3
    )
    steps = training_steps(
        samples, update=update, total_batch_size=16, batch_size=batch_size, rank=rank, world_size=world_size, workers=workers,
        pin_memory=False,
    )  # fmt: skip
    return [[(b["images"], b["labels"]) for b in next(steps)] for _ in range(n)]


def joined(parts):
    """The global batches of all ranks' parts: images and labels of each update."""
    return [
        tuple(
            torch.cat(tensors)
            for tensors in zip(*(b for part in parts for b in part[t]), strict=True)
        )
        for t in range(len(parts[0]))
    ]


def assert_same(ours, theirs):
    for (images, labels), (their_images, their_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, their_labels) and torch.equal(images, their_images)


def test_batches_do_not_depend_on_ranks_workers_or_restarts(folder):
    straight = joined([training_batches(folder)])
    assert_same(joined([training_batches(folder, batch_size=8)]), straight)
    assert_same(
        joined([training_batches(folder, rank=r, world_size=2, workers=r) for r in (0, 1)]),
        straight,
    )
    assert_same(
        joined([training_batches(folder, rank=r, world_size=4) for r in range(4)]), straight
    )
    assert_same(joined([training_batches(folder, update=4, workers=2, n=3)]), straight[4:])


def test_an_epoch_is_a_permutation(folder):
    """48 images, 3 updates of 16: each image once in each epoch, in another order and otherwise augmented in the next."""
    args = arguments()
    plain = validation_transform(args)
    images = read_class_folders(folder / "train")
    samples = TrainingSamples(images, plain, False, seed=3)
    steps = training_steps(
        samples,
        update=0,
        total_batch_size=16,
        batch_size=16,
        rank=0,
        world_size=1,
        workers=0,
        pin_memory=False,
    )
    epochs = [torch.cat([next(steps)[0]["images"] for _ in range(3)]) for _ in range(2)]
    everything = {plain(images.read(i)).numpy().tobytes() for i in range(48)}
    seen = [[image.numpy().tobytes() for image in epoch] for epoch in epochs]
    assert set(seen[0]) == set(seen[1]) == everything and len(seen[0]) == 48 and seen[0] != seen[1]
    augmented = TrainingSamples(images, training_transform(args, True), False, seed=3)
    assert torch.equal(augmented[0, 5][0], augmented[0, 5][0])
    assert not torch.equal(augmented[0, 5][0], augmented[1, 5][0])


def test_posterize_at_its_greatest_strength():
    """timm asks for 0 bits there, which new versions of Pillow refuse."""
    transform = training_transform(arguments("--aa", "rand-m10-n16-inc1"), True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    assert all(transform(image).isfinite().all() for _ in range(30))


def test_bad_images(folder, tmp_path):
    images = read_class_folders(write_images(tmp_path / "images", train=3, val=1) / "train")
    bad = tmp_path / "images/train/blue/01.png"
    bad.write_bytes(bad.read_bytes()[:200])
    plain = validation_transform(arguments())
    assert f"{bad} cannot be read as an image" in str(
        TrainingSamples(images, plain, False, 0)[0, 1]
    )
    image, label, left_out = TrainingSamples(images, plain, True, 0)[0, 1]
    assert torch.equal(image, plain(images.read(2))) and label == 0 and str(bad) in left_out[0]
    batches = list(validation_batches(ValidationSamples(images, plain, True), 2, 0, 1, 0, False))
    assert [len(b["labels"]) for b in batches] == [1, 2, 2, 2, 2, 2]
    with pytest.raises(UserError, match="blue/01.png cannot be read"):
        list(validation_batches(ValidationSamples(images, plain, False), 2, 0, 1, 0, False))


def test_evaluation_sees_the_standard_middle():
    """7/8 of a side at 224 pixels, as ImageNet always was; all of a small image."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    )
    args = arguments("--input_size", 224)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    middle = torch.from_numpy(np.asarray(image)[16:240, 16:240].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(
        validation_transform(args)(image), (middle - mean) / std, rtol=0, atol=1e-5
    )
    small = image.resize((32, 32))
    whole = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(
        validation_transform(arguments())(small), (whole - mean) / std, rtol=0, atol=1e-5
    )


# ----------------------------------------------------------------------------------------------------------------- accuracy


class Shares(DistributedContext):
    """A rank whose sums are taken by the test."""

    def sum(self, values):
        self.__dict__["part"] = values.clone()
        return values


@pytest.mark.parametrize("world_size", [1, 2, 3, 13])
@pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
def test_accuracy_counts_every_image_once(folder, world_size, batch_size):
    """12 images: their sums over all ranks are those of a plain loop, even where ranks have none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    images, plain = read_class_folders(folder / "val"), validation_transform(arguments())
    with torch.no_grad():
        logits = torch.cat([model(plain(images.read(i))[None]) for i in range(12)])
    labels = torch.from_numpy(images.labels)
    right = sum(int(logits[i].argmax() == labels[i]) for i in range(12))
    among = sum(
        int(labels[i] in sorted(range(7), key=lambda c: -float(logits[i][c]))[:5])
        for i in range(12)
    )  # noqa: B023
    total = torch.zeros(4, dtype=torch.float64)
    for rank in range(world_size):
        share = Shares(rank, rank, 1, torch.device("cpu"))
        batches = validation_batches(
            ValidationSamples(images, plain, False), batch_size, rank, world_size, 0, False
        )
        if rank < 12:
            evaluate(model, batches, share, torch.autocast("cpu", enabled=False))
            total += share.part
        else:
            assert list(batches) == []
    assert total[1:].tolist() == [right, among, 12]
    assert float(total[0]) == pytest.approx(
        float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-6
    )


# ------------------------------------------------------------------------------------------------------------------- models


def test_names():
    assert current_name("vit_deit_tiny_patch16_224") == "deit_tiny_patch16_224"
    assert current_name("vit_deit_base_distilled_patch16_384") == "deit_base_distilled_patch16_384"
    assert all(timm.is_model(current_name(f"vit_{name}")) for name in timm.list_models("deit_*"))
    assert current_name("vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    with pytest.raises(UserError, match="did you mean deit_tiny_patch16_224"):
        build_model(arguments("--model", "diet_tiny_patch16_224"))
    with pytest.raises(UserError, match="cannot be built .*patch_sise"):
        build_model(arguments("--model_kwargs", "patch_sise=8"))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_alpha_and_decays_agree_with_the_reference(name):
    torch.manual_seed(0)
    model = build_model(arguments("--model", name, "--input_size", 224))
    ours = alphadecay.AlphaDecay(model, 5e-6, 0.6666, 3.0)
    expected = {module: statistics(weight)["alpha"] for module, weight in balanced(model)}
    found = {row["module"]: row["alpha"] for row in ours.history}
    assert found == pytest.approx(expected, rel=1e-4)
    wanted = decays(list(expected.values()), 5e-6, "tb_linear_map", 0.6666, 3.0, None)
    assert list(ours.weight_decays.values()) == pytest.approx(wanted, rel=1e-4)


def test_flops():
    """Of DeiT-tiny: 1.26 billion multiplications and additions (Touvron et al. 2021), by hand 12 blocks, patches and head."""
    tokens, dim = 197, 192
    block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
    expected = 2 * (12 * block + 196 * dim * 3 * 16**2 + dim * 1000)
    model = timm.create_model("deit_tiny_patch16_224")
    assert forward_flops(model, 224) == expected == pytest.approx(2 * 1.26e9, rel=0.01)
    assert next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "convnext_atto"])
def test_timm_loads_an_export(tmp_path, name):
    args = arguments("--model", name)
    model = build_model(args).eval()
    export(model, timm_config(args, model), {"top1": 1.0}, tmp_path / "best")
    image = torch.randn(2, 3, 32, 32)
    size = {"img_size": 32} if name == "test_vit" else {}
    for loaded in (
        timm.create_model(
            name, num_classes=4, checkpoint_path=str(tmp_path / "best/model.safetensors"), **size
        ),
        timm.create_model(f"local-dir:{tmp_path}/best", pretrained=True),
    ):
        assert torch.equal(loaded.eval()(image), model(image))
        assert loaded.num_classes == 4


def test_finetune(tmp_path):
    """Weights where they fit, under a key and a prefix; a classifier of other classes stays fresh; what does not fit is refused."""
    saved = build_model(arguments("--model", "test_vit", "--nb_classes", 7))
    torch.save(
        {"model": {f"net.{k}": v for k, v in saved.state_dict().items()}, "epoch": 3},
        tmp_path / "a.pth",
    )
    model = build_model(
        arguments("--model", "test_vit", "--finetune", tmp_path / "a.pth", "--model_prefix", "net.")
    )
    for name, tensor in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, saved.state_dict()[name])
    assert model.head.out_features == 4
    save_file(
        {k: v for k, v in saved.state_dict().items() if k != "norm.weight"},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(UserError, match="norm.weight is missing"):
        load_weights(model, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"pos_embed has shape \(1, 5, 64\), not \(1, 17, 64\)"):
        load_weights(
            build_model(arguments("--model", "test_vit", "--input_size", 64)),
            export_of(saved, tmp_path),
        )
    (tmp_path / "torn.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="torn.pth cannot be read"):
        load_weights(model, tmp_path / "torn.pth")


def export_of(model, folder):
    save_file(model.state_dict(), folder / "whole.safetensors")
    return folder / "whole.safetensors"


def test_head_init_scale():
    torch.manual_seed(0)
    one = build_model(arguments("--model", "test_resnet"))
    torch.manual_seed(0)
    tenth = build_model(arguments("--model", "test_resnet", "--head_init_scale", 0.1))
    assert torch.equal(tenth.fc.weight, one.fc.weight * 0.1) and torch.equal(
        tenth.conv1[0].weight, one.conv1[0].weight
    )


def test_statistics_of_an_update_that_is_left_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    statistics = BatchNormSync(model, ALONE)
    model(torch.randn(8, 3, 4, 4))
    kept = model[1].running_mean.clone()
    statistics.settle(torch.tensor(0.0))
    assert torch.equal(model[1].running_mean, kept) and kept.abs().sum() > 0
    model(torch.full((8, 3, 4, 4), math.nan))
    assert model[1].running_mean.isnan().all()
    statistics.settle(torch.tensor(1.0))
    assert torch.equal(model[1].running_mean, kept) and model[1].running_var.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- schedules


def test_scaled_decays_do_not_add_up():
    layers = [nn.Linear(2, 2) for _ in range(2)]
    optimizer = build_optimizer(
        "adamw",
        [
            {"params": [m.weight], "weight_decay": d}
            for m, d in zip(layers, (0.1, 0.4), strict=True)
        ],
        1e-3,
    )
    for _ in range(3):
        with scaled_decays(optimizer, 0.5):
            assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.2]
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.4]


def test_rates():
    schedule = main_vit.Schedule.of(
        arguments("--epochs", 10, "--warmup_epochs", 2, "--batch_size", 10), 105
    )
    assert (schedule.epoch, schedule.warmup, schedule.total) == (10, 20, 100)
    args = arguments(
        "--weight_decay", 0.1, "--weight_decay_end", 0.2, "--lr", 1e-2, "--min_lr", 1e-4
    )
    assert main_vit.rates(args, 5, schedule)[0] == pytest.approx(1e-2 / 4)
    assert main_vit.rates(args, 100, schedule) == pytest.approx((1e-4, 2.0))
    middle = main_vit.rates(args, 60, schedule)
    assert middle[0] == pytest.approx((1e-2 + 1e-4) / 2) and middle[1] == pytest.approx(
        1 + (1 - math.cos(0.6 * math.pi)) / 2
    )
    with pytest.raises(UserError, match="an update of 64 images is more than the 60 there are"):
        main_vit.Schedule.of(arguments(), 60)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--batch_size 3", "give an even --batch_size"),
        ("--resplit true", "--resplit true needs augmentation splits"),
        ("--weight_decay 0 --weight_decay_end 1e-6", "--weight_decay_end scales --weight_decay"),
        ("--warmup_epochs 200", "--warmup_epochs 200 is more than --epochs 120"),
        ("--model_ema_eval true", "needs --model_ema true"),
        ("--model_ema yes", "'yes' is neither true nor false"),
        ("--eval true", "needs a model to evaluate"),
        ("--reprob 1.5", "--reprob 1.5: it must be from 0 to 1"),
        ("--model_kwargs patch_size", "'patch_size' is not KEY=VALUE"),
        ("--min_lr 1", "--min_lr 1 is above --lr"),
    ],
)
def test_flags_that_contradict(flags, expected):
    with pytest.raises(UserError, match=expected):
        arguments(*flags.split())


def test_booleans_mean_what_they_say():
    args = arguments("--model_ema", "true", "--auto_resume", "False")
    assert args.model_ema is True and args.auto_resume is False and args.save_ckpt is True


# -------------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_has_the_statistics_of_its_call(tmp_path, monkeypatch):
    """The next forward pass writes them while the thread that saves still copies weights."""
    model = build_model(arguments("--model", "test_resnet"))
    optimizer = build_optimizer("adam", [{"params": list(model.parameters())}], 1e-3)
    checkpoints, passed = Checkpoints(tmp_path, ALONE), threading.Event()
    make = checkpoints._copy.make
    monkeypatch.setattr(checkpoints._copy, "make", lambda: passed.wait(20) and make())
    wanted = {name: buffer.clone() for name, buffer in model.named_buffers()}
    checkpoints.save(
        1, model, optimizer, {}, config={"architecture": "test_resnet"}, extra={"ema": model}
    )
    model(torch.randn(4, 3, 32, 32))
    passed.set()
    checkpoints.finish()
    saved = load_file(tmp_path / "checkpoints/model_1/model.safetensors")
    assert all(torch.equal(saved[name], buffer) for name, buffer in wanted.items())


def test_a_checkpoint_keeps_the_moving_average(tmp_path):
    args = arguments("--model", "test_resnet", "--model_ema", "true")
    torch.manual_seed(0)
    training = main_vit.make_training(args, build_model(args))
    with torch.no_grad():
        training.model.fc.weight.add_(1)
    training.ema.update(training.model)
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(
        1,
        training.model,
        training.optimizer,
        {"data": "x"},
        config=training.config,
        extra=training.averages(),
    )
    checkpoints.finish()
    other = main_vit.make_training(args, build_model(args))
    folder = tmp_path / "checkpoints/model_1"
    assert load_checkpoint(
        folder, other.model, other.optimizer, ALONE, other.config, other.averages()
    ) == {"data": "x"}
    for ours, theirs in ((other.model, training.model), (other.ema.module, training.ema.module)):
        assert all(
            torch.equal(a, b)
            for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )
    assert not torch.equal(other.model.fc.weight, other.ema.module.fc.weight)
    with pytest.raises(
        UserError, match="was trained with num_classes 4, but the model config says 5"
    ):
        load_checkpoint(
            folder, other.model, other.optimizer, ALONE, other.config | {"num_classes": 5}
        )
    (folder / "training_state/ema.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights of ema: it was trained without"):
        load_checkpoint(folder, other.model, other.optimizer, ALONE, other.config, other.averages())
