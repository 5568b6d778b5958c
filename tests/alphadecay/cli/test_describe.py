"""The description of a run's method agrees with the objects that the flags build."""

import argparse

import pytest
import torch
import torch.nn as nn

from alphadecay.cli.describe import balanced_by_flags, check_method, describe_method
from alphadecay.cli.flags import add_flags, decay_from_flags
from alphadecay.cli.presets import parse_arguments


def network() -> nn.Sequential:
    """Five matrices in blocks of their own, of which two are too small to be balanced."""
    sizes = ((64, 64), (64, 64), (64, 16), (16, 64), (64, 64))
    return nn.Sequential(*(nn.Sequential(nn.Linear(*size)) for size in sizes))


def parsed(words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weight_decay", type=float, default=1e-5)
    parser.add_argument("--optimizer", default="adam")
    add_flags(parser)
    return parse_arguments(parser, words.split())


@pytest.mark.parametrize(
    "words",
    [
        "--method alphadecay",
        "--method gradnorm",
        "--method alphadecay --remove_first_layer false --remove_last_layer false",
        "--method alphadecay --balance_scope all_blocks",
    ],
)
def test_the_coverage_is_that_of_the_method(words):
    model, args = network(), parsed(words)
    decay = decay_from_flags(args, model, 100)
    assert [m.name for m in balanced_by_flags(args, model)] == [m.name for m in decay.modules]
    coverage = describe_method(args, model, 100).settings["coverage"]
    balanced = {module.name for module in decay.modules}
    assert coverage["balanced"] == len(balanced) and coverage["matrices"] == 5
    assert set(coverage["others"]) == {f"{i}.0" for i in range(5)} - balanced
    groups = [g for g in decay.param_groups() if g["module"] is not None]
    share = sum(p.numel() for g in groups for p in g["params"])
    assert coverage["share"] == share / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "words, details",
    [
        ("--method wd0", "no weight decay on all 14.6k parameters"),
        ("--method uniform", "decay 1e-05 for all 14.6k parameters"),
        ("--method awd", "renewed in each update: 100 x 1e-05 x norm of the gradient"),
        ("--method adadecay", "a decay of its own for each element of all 14.6k parameters"),
        (
            "--method alphadecay",
            "1 of 5 matrices balanced, 28% of the parameters, decay 0.667 to 3 x 1e-05 by alpha, "
            "renewed every 500 updates",
        ),
        ("--method inverted", "by alpha, in reversed order, renewed every 500 updates"),
        ("--method one_shot --unbalancedWD_every 9", "frozen after update 9"),
        ("--method alphadecay+tb_sqrt", "decay tb_sqrt x 1e-05 by alpha"),
        ("--method shuffled+iso_budget", "the mean is 1e-05, permuted over the modules with seed"),
        ("--method type_constant", "one constant decay for each module type, times 1e-05"),
        ("--method uniform+adamc", "AdamC"),
    ],
)
def test_details(words, details):
    with torch.device("meta"):
        model = network()
    assert details in describe_method(parsed(words), model, 100).details


def test_settings_that_have_no_effect_are_left_out():
    sqrt = describe_method(parsed("--method alphadecay+tb_sqrt"), network(), 100).settings
    linear = describe_method(parsed("--method alphadecay"), network(), 100).settings
    uniform = describe_method(parsed("--method uniform"), network(), 100).settings
    assert "wd_max_ratio" not in sqrt and linear["wd_max_ratio"] == 3.0
    assert linear["optimizer"] == "adam" and linear["balance_scope"] == "reference"
    assert uniform == {"weight_decay": 1e-5, "optimizer": "adam"}


def test_a_reversed_order_is_told_unless_it_was_asked_for_by_name():
    (warning,) = describe_method(parsed("--use_modulewise_wd"), network(), 100).warnings
    assert "--alpha_positively_with_WD" in warning and "'inverted'" in warning
    assert not describe_method(parsed("--method inverted"), network(), 100).warnings
    assert not describe_method(parsed("--method alphadecay"), network(), 100).warnings
    words = "--use_modulewise_wd --alpha_positively_with_WD --weight_decay 0"
    (warning,) = describe_method(parsed(words), network(), 100).warnings
    assert "nothing decays" in warning


def test_flags_are_checked_without_weights():
    with torch.device("meta"):
        model, small = network(), nn.Sequential(nn.Linear(8, 8))
    check_method(parsed("--method alphadecay"), model, 100)
    check_method(parsed("--method awd"), model, 100)
    with pytest.raises(ValueError, match="exclude each other"):
        check_method(parsed("--use_modulewise_wd --use_AdaDecay"), model, 100)
    with pytest.raises(ValueError, match="no module to balance"):
        check_method(parsed("--method alphadecay"), small, 100)
