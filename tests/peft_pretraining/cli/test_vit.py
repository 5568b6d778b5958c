"""The flags of main_vit.py: contradictions and booleans."""

import pytest

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
    ],
)
def test_contradicting_flags_are_refused(flags, expected):
    with pytest.raises(UserError, match=expected):
        arguments(*flags.split())


def test_booleans_are_true_or_false():
    args = arguments("--model_ema", "true", "--auto_resume", "False")
    assert args.model_ema is True and args.auto_resume is False and args.save_ckpt is True
