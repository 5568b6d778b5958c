"""The environment variables of torchrun, whole, incomplete and contradictory."""

import os

import pytest

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.launch import Launch, read_launch
from tests.support.launch import launch_variables


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, Launch(0, 0, 1)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, Launch(0, 0, 1)),
        (launch_variables(4, 3), Launch(3, 3, 4)),
        (launch_variables(4, 3) | {"LOCAL_RANK": "1"}, Launch(3, 1, 4)),
    ],
)
def test_what_fits_is_read(environment, expected):
    assert read_launch(environment) == expected


def test_torchrun_is_the_launcher_and_nothing_else_is():
    environment = launch_variables(2) | {"TORCHELASTIC_RUN_ID": "none"}
    assert read_launch(environment).launcher == os.getppid()


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "1"}, "RANK=1 is set, but WORLD_SIZE is not set: .*(unset RANK)"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is set, but WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 is set, but WORLD_SIZE is only 1"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but RANK is not: .*(unset WORLD_SIZE)"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 is set, but LOCAL_RANK is not"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a"},
            "but MASTER_PORT is not",
        ),
        (launch_variables(2, 2), "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1 is not a number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a number of processes"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number of processes"),
    ],
)
def test_what_does_not_fit_is_one_sentence(environment, message):
    with pytest.raises(UserError, match=message) as error:
        read_launch(environment)
    assert "start several processes with torchrun" in str(error.value)
