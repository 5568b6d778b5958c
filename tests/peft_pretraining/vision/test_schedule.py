"""Learning rate and weight decay over a run of main_vit.py."""

import math

import pytest

import main_vit
from peft_pretraining.errors import UserError
from tests.support.vision import arguments


def test_learning_rate_and_decay_follow_their_schedules():
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
