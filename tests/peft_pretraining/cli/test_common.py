"""Arguments that both scripts have."""

import argparse

import pytest

from peft_pretraining.cli.common import (
    Parser,
    check_numbers,
    name_run,
    str_to_bool,
)
from peft_pretraining.errors import UserError

RUN = {
    "use_modulewise_wd": False,
    "project": None,
    "name": None,
    "wandb_name": None,
    "tags": "",
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-5,
    "seed": 5,
    "wd_min_ratio": 0.5,
    "wd_max_ratio": 3.0,
}


def arguments(base=RUN, **changes):
    return argparse.Namespace(**base | changes)


def test_booleans():
    assert [str_to_bool(text) for text in ("true", "True", "false", "FALSE", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    for text in ("yes", "1"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither true nor false"):
            str_to_bool(text)


def test_an_error_of_the_parser_is_a_user_error():
    with pytest.raises(UserError, match="unrecognized arguments: --x; see --help"):
        Parser(prog="a").parse_args(["--x"])


def test_names_of_runs():
    args = arguments(tags=" a, b ,,")
    name_run(args, "llama_60m", "uniform")
    assert args.name == args.wandb_name == "llama_60m-uniform-adam-lr0.001-wd1e-05-seed5"
    assert args.tags == ["a", "b"]
    for given in ({"name": "x"}, {"wandb_name": "x"}):
        args = arguments(**given)
        name_run(args, "llama_60m", "uniform")
        assert (args.name, args.wandb_name) == ("x", "x")
    args = arguments(name="x", wandb_name="y")
    name_run(args, "llama_60m", "uniform")
    assert (args.name, args.wandb_name) == ("x", "y")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tags": "a," + "x" * 65}, "at most 64 characters"),
        ({"use_modulewise_wd": True, "wd_min_ratio": 4.0}, "swap them"),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(UserError, match=message):
        name_run(arguments(**changes), "llama_60m", "uniform")


def test_limits_are_allowed():
    name_run(arguments(tags="x" * 64), "llama_60m", "uniform")
    name_run(arguments(use_modulewise_wd=True, wd_min_ratio=3.0), "llama_60m", "uniform")
    name_run(
        arguments(wd_min_ratio=4.0), "llama_60m", "uniform"
    )  # uniform decay does not use the ratios


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_numbers_that_must_be_positive(value):
    with pytest.raises(UserError, match=f"--lr {value}: it must be above 0"):
        check_numbers(arguments(lr=value), ("lr",), ())


@pytest.mark.parametrize("value", [-1e-9, float("nan")])
def test_numbers_that_must_not_be_negative(value):
    with pytest.raises(UserError, match=f"--lr {value}: it must be 0 or more"):
        check_numbers(arguments(lr=value), (), ("lr",))


def test_numbers_within_their_range():
    check_numbers(arguments(lr=1e-9, seed=0, name=None), ("lr", "name"), ("seed", "name"))
