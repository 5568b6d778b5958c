"""Differences in meaning from the published code: which command lines are told, and the page."""

from pathlib import Path

import pytest

from alphadecay.cli.flags import add_flags
from peft_pretraining.cli.llama import llama_parser
from peft_pretraining.cli.published import LLAMA, VIT, published_differences
from peft_pretraining.cli.vit import vit_parser

PAGE = Path(__file__).resolve().parents[3] / "docs/published_code.md"


def sentences(parser, differences, words):
    add_flags(parser)
    argv = words.split()
    return published_differences(differences, parser.parse_args(argv), argv)


@pytest.mark.parametrize(
    "words, told",
    [
        ("", []),
        ("--scheduler cosine", []),
        ("--scheduler linear", ["--scheduler: linear: the published schedule ends at"]),
        ("--scheduler linear --min_lr_ratio 0", []),
        ("--max_train_tokens 1B", ["--max_train_tokens: the published code counts sequences"]),
        ("--beta1 0.9", ["--beta1: it has no effect"]),
        ("--seed=5", ["--seed: it also decides the order"]),
        ("--pl_fitting fix-finger", ["--pl_fitting: fix-finger"]),
        ("--use_modulewise_wd False", ["--use_modulewise_wd False: the published code reads"]),
        ("--use_modulewise_wd True", []),
    ],
)
def test_llama(words, told):
    found = sentences(llama_parser(), LLAMA, f"--model_config x {words}")
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))


@pytest.mark.parametrize(
    "words, told",
    [
        ("--method uniform", []),
        ("--use_modulewise_wd", ["--unbalancedWD_every: the published ViT code analyses"]),
        ("--log_dir logs --wandb_ckpt true", ["--log_dir: no TensorBoard", "--wandb_ckpt: check"]),
        ("--wandb_ckpt false", []),
    ],
)
def test_vit(words, told):
    found = sentences(vit_parser(), VIT, words)
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))


def test_the_page_lists_every_difference():
    section = PAGE.read_text(encoding="utf8").split("## What a flag means")[1].split("\n## ")[0]
    for difference in (*LLAMA, *VIT):
        assert f"`--{difference.flag}" in section, difference.flag
