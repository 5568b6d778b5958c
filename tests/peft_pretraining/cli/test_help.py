"""What --help shows for both scripts."""

import argparse
import re

import pytest

from alphadecay.cli.flags import add_flags
from peft_pretraining.cli.llama import llama_parser
from peft_pretraining.cli.vit import vit_parser

NO_DEFAULT = {"help", "model_config"}


@pytest.mark.parametrize("make", [llama_parser, vit_parser])
def test_every_flag_is_in_a_group_and_shows_its_default(make):
    parser = make()
    add_flags(parser)
    grouped = [action for group in parser._action_groups[2:] for action in group._group_actions]
    for action in parser._actions:
        if action.dest in NO_DEFAULT:
            continue
        assert action in grouped, action.dest
        assert "default" in action.help, action.dest
        if isinstance(action.default, float | int) and not isinstance(action.default, bool):
            shown = re.search(r"default:?\D*?(-?[\d._,e-]*\d)", action.help)
            assert shown and float(re.sub("[_,]", "", shown[1])) == action.default, action.dest


@pytest.mark.parametrize("make", [llama_parser, vit_parser])
def test_help_ends_with_an_example_that_is_accepted(make):
    parser = make()
    add_flags(parser)
    example = parser.format_help().split("example:")[1].replace("\\\n", " ").split()
    words = example[next(i for i, word in enumerate(example) if word.endswith(".py")) + 1 :]
    assert isinstance(parser.parse_args(words), argparse.Namespace) and len(words) > 6
