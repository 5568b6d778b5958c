"""The flags of main_vit.py: contradictions and booleans."""

import pytest

from alphadecay.cli.flags import add_flags
from peft_pretraining.cli.vit import complete, vit_parser
from peft_pretraining.errors import UserError
from tests.support.vision import arguments


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
        ("--timeout_minutes 0", "--timeout_minutes 0.0: it must be above 0"),
        ("--save_every_minutes -1", "--save_every_minutes -1.0: it must be 0 or more"),
    ],
)
def test_contradicting_flags_are_refused(flags, expected):
    with pytest.raises(UserError, match=expected):
        arguments(*flags.split())


def test_booleans_are_true_or_false():
    args = arguments("--model_ema", "true", "--auto_resume", "False")
    assert args.model_ema is True and args.auto_resume is False and args.save_ckpt is True


@pytest.mark.parametrize(
    "words, classes",
    [
        ("--data_set CIFAR --nb_classes 10", 10),
        ("--data_set CIFAR --nb_classes 100", 100),
        ("--data_set CIFAR10", 10),
        ("--data_set CIFAR100", 100),
        ("--data_set digits", 10),
        ("", 1000),
    ],
)
def test_numbers_of_classes(words, classes):
    parser = vit_parser()
    add_flags(parser)
    assert complete(parser.parse_args(words.split()), 1, "uniform").nb_classes == classes


@pytest.mark.parametrize(
    "words, message",
    [
        ("--data_set CIFAR", "is CIFAR-100 in the published code.*give --data_set CIFAR10 or"),
        ("--data_set CIFAR100 --nb_classes 10", "has 100 classes: leave --nb_classes 10 out"),
        ("--test_code true", "give --dry_run"),
    ],
)
def test_unclear_data_sets_are_refused(words, message):
    parser = vit_parser()
    add_flags(parser)
    with pytest.raises(UserError, match=message):
        complete(parser.parse_args(words.split()), 1, "uniform")
