"""Names of methods: each name gives flags, and the flags give the name."""

import argparse
import itertools

import pytest

from alphadecay.cli.flags import add_flags
from alphadecay.cli.presets import (
    METHOD_OPTIONS,
    METHOD_PRESETS,
    method_flags,
    method_name,
    parse_arguments,
)


def name_of(words: str) -> str:
    """Return the name of the method that a command line computes."""
    return method_name(vars(parsed(words)))


def parsed(words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weight_decay", type=float, default=1e-5)
    add_flags(parser)
    return parse_arguments(parser, words.split())


M = "--use_modulewise_wd --alpha_positively_with_WD"


@pytest.mark.parametrize(
    "words, name",
    [
        ("", "uniform"),
        ("--weight_decay 0", "wd0"),
        (f"{M} --weight_decay 0", "wd0"),
        (M, "alphadecay"),
        ("--use_modulewise_wd True --alpha_positively_with_WD true", "alphadecay"),
        ("--use_modulewise_wd False", "uniform"),
        ("--use_modulewise_wd=", "uniform"),
        ("--use_modulewise_wd", "inverted"),
        (f"{M} --esd_metric_for_tb gradnorm", "gradnorm"),
        (f"{M} --esd_metric_for_tb gradnorm --assign_func layerwise_sigmoid", "adadecay-module"),
        (f"{M} --esd_metric_for_tb gradnorm --assign_func tb_sqrt", "gradnorm+tb_sqrt"),
        (f"{M} --assign_func tb_quantile", "quantile"),
        (f"{M} --assign_func tb_sqrt --esd_metric_for_tb fnorm", "alphadecay+fnorm+tb_sqrt"),
        (f"{M} --esd_metric_for_tb alpha_farms", "farms"),
        (f"{M} --one_shot", "one_shot"),
        (f"{M} --shuffle_decays --iso_budget", "shuffled+iso_budget"),
        (f"{M} --shuffle_decays --one_shot", "shuffled+one_shot"),
        ("--use_modulewise_wd --type_constant", "type_constant"),  # the order is not used
        ("--use_AWD_NeurIPS2023 --adamc", "awd+adamc"),
        ("--use_AdaDecay", "adadecay"),
        ("--method gradnorm+iso_budget", "gradnorm+iso_budget"),
        ("--method inverted", "inverted"),
    ],
)
def test_the_name_says_what_is_computed(words, name):
    assert name_of(words) == name


def test_each_name_stands_for_flags_that_have_this_name():
    """So a name from run.json can be typed after --method."""
    for name in METHOD_PRESETS:
        assert name_of(f"--method {name}") == name
    for base, *options in itertools.product(("alphadecay", "gradnorm"), METHOD_OPTIONS):
        name = name_of(f"--method {'+'.join([base, *options])}")
        assert name_of(f"--method {name}") == name


def test_options_are_flags():
    flags = method_flags("gradnorm+inverted+iso_budget")
    assert flags["esd_metric_for_tb"] == "gradnorm" and flags["iso_budget"] is True
    assert flags["alpha_positively_with_WD"] is False and flags["use_modulewise_wd"] is True


@pytest.mark.parametrize(
    "name, message",
    [
        ("alphadecy", "'alphadecy' is not a method: choose from wd0, uniform"),
        ("alphadecay+isobudget", "'isobudget' cannot be added to a method: choose from inverted"),
        ("uniform+inverted", "inverted concerns module-wise decays, which uniform does not have"),
    ],
)
def test_wrong_names(name, message, capsys):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        method_flags(name)
    with pytest.raises(SystemExit):
        parsed(f"--method {name}")
    assert message in capsys.readouterr().err
