"""Flags whose meaning differs from that in the published code (docs/published_code.md lists all).

The scripts log the sentences that concern a given command line.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """A flag that means something else than in the published code.

    Args:
        flag: its name without the dashes.
        sentence: what is different, and what to type for the published meaning.
        applies: returns True if the difference concerns a run with these arguments. It is asked
            only if the flag was typed.
        typed_only: False: ask even if the flag was not typed.
    """

    flag: str
    sentence: str
    applies: Callable[[argparse.Namespace], bool] = lambda args: True
    typed_only: bool = True


BOTH = (
    Difference(
        "pl_fitting",
        "fix-finger: the published code compares the threshold with a wrong lower bound; give "
        "--pl_fitting fix-finger-reference for the published fit",
        lambda args: args.pl_fitting == "fix-finger",
    ),
)
LLAMA = (
    *BOTH,
    Difference(
        "scheduler",
        "linear: the published schedule ends at a learning rate of 0, this one at --min_lr_ratio; "
        "give --min_lr_ratio 0 for the published one",
        lambda args: args.scheduler == "linear" and args.min_lr_ratio > 0,
    ),
    Difference(
        "max_train_tokens",
        "the published code counts sequences, not tokens: multiply the published number by "
        "--max_length",
    ),
    Difference("beta1", "it has no effect; the published code reads it for Adafactor only"),
    Difference(
        "seed",
        "it also decides the order of the data, which is always that of seed 42 in the published "
        "code",
    ),
)
VIT = (
    *BOTH,
    Difference(
        "unbalancedWD_every",
        "the published ViT code analyses the weights once an epoch; here the interval counts "
        "updates: give the updates of an epoch, which the log names, for the published interval",
        lambda args: args.use_modulewise_wd and not args.type_constant,
        typed_only=False,
    ),
    Difference(
        "data_set",
        "CIFAR is CIFAR-100 in the published code, whatever --nb_classes is; give --data_set "
        "CIFAR100 for that",
        lambda args: args.data_set == "CIFAR" and args.nb_classes == 10,
    ),
    Difference("log_dir", "no TensorBoard files are written; the records are in the run folder"),
    Difference(
        "wandb_ckpt",
        "checkpoints are not sent to W&B; they are in the run folder",
        lambda args: args.wandb_ckpt,
    ),
)


def published_differences(
    differences: Sequence[Difference], args: argparse.Namespace, argv: Sequence[str]
) -> list[str]:
    """Return one sentence for each difference that concerns a command line.

    Args:
        differences: LLAMA or VIT.
        args: the parsed arguments.
        argv: the command line.
    """
    typed = {word.split("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    sentences = [
        f"--{d.flag}: {d.sentence}"
        for d in differences
        if (d.flag in typed or not d.typed_only) and d.applies(args)
    ]
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag == "--use_modulewise_wd" and "false" in (value.lower(), following.lower()):
            sentences.append(
                "--use_modulewise_wd False: the published code reads the word False as true; here "
                "it means false"
            )
    return sentences
