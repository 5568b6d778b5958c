"""The arguments of torchrun_main.py."""

import pytest

import torchrun_main
from peft_pretraining.cli.llama import llama_parser, packing_mode
from peft_pretraining.errors import UserError
from tests.support.launch import set_launch


def arguments(monkeypatch, *words, world_size=1):
    monkeypatch.setattr(
        "sys.argv", ["torchrun_main.py", "--model_config", "configs/llama_60m.json", *words]
    )
    set_launch(monkeypatch, world_size)
    return torchrun_main.parse_arguments()


def test_defaults_are_the_published_settings(monkeypatch):
    args = arguments(monkeypatch, world_size=2)
    expected = dict(
        optimizer="adam",
        lr=1e-3,
        weight_decay=1e-5,
        total_batch_size=512,
        batch_size=256,
        gradient_accumulation=1,
        max_length=256,
        num_training_steps=10_000,
        warmup_steps=1_000,
        scheduler="cosine",
        min_lr_ratio=0.1,
        dtype="bfloat16",
        grad_clipping=0.0,
        dataset="c4",
        tokenizer=None,
        packing=False,
        seed=5,
        unbalancedWD_every=500,
        esd_metric_for_tb="alpha",
        assign_func="tb_linear_map",
        wd_min_ratio=0.6666,
        wd_max_ratio=3.0,
        pl_fitting="median",
        xmin_pos=2.0,
        filter_zeros=False,
        remove_first_layer=True,
        remove_last_layer=True,
        batchnorm=True,
        batchnorm_type="name",
        balance_scope="reference",
        use_modulewise_wd=False,
        alpha_positively_with_WD=False,
        use_AWD_NeurIPS2023=False,
        single_cuda=False,
        name="llama_60m-uniform-adam-lr0.001-wd1e-05-seed5",
        save_dir="runs/llama_60m-uniform-adam-lr0.001-wd1e-05-seed5",
    )
    assert {k: getattr(args, k) for k in expected} == expected


@pytest.mark.parametrize(
    "words, processes, expected",
    [  # micro-batch, accumulation, total
        ("", 1, (256, 2, 512)),
        ("", 2, (256, 1, 512)),
        ("", 8, (64, 1, 512)),
        ("", 64, (8, 1, 512)),
        ("--total_batch_size 510", 6, (85, 1, 510)),
        ("--total_batch_size 600", 1, (200, 3, 600)),
        ("--total_batch_size 1024 --gradient_accumulation 8", 2, (64, 8, 1024)),
        ("--gradient_accumulation 4", 2, (64, 4, 512)),
        ("--total_batch_size 514", 1, (2, 257, 514)),
    ],
)
def test_the_micro_batch_follows_from_total_batch_and_processes(
    monkeypatch, words, processes, expected
):
    args = arguments(monkeypatch, *words.split(), world_size=processes)
    assert (args.batch_size, args.gradient_accumulation, args.total_batch_size) == expected
    assert args.batch_size * args.gradient_accumulation * processes == args.total_batch_size


@pytest.mark.parametrize(
    "words, processes, message",
    [
        ("", 6, "--total_batch_size 512 cannot be divided evenly among 6 processes: .* 510 or 516"),
        ("--total_batch_size 4", 8, "give for instance 8 or 8"),
        ("--total_batch_size 512 --gradient_accumulation 3", 1, "not a multiple of"),
    ],
)
def test_batches_that_cannot_be_divided(monkeypatch, words, processes, message):
    with pytest.raises(UserError, match=message):
        arguments(monkeypatch, *words.split(), world_size=processes)


@pytest.mark.parametrize(
    "word, name",
    [("bf16", "bfloat16"), ("BF16", "bfloat16"), ("fp32", "float32"), ("bf16_mixed", "bf16_mixed")],
)
def test_words_for_dtypes(monkeypatch, word, name):
    assert arguments(monkeypatch, "--dtype", word).dtype == name


@pytest.mark.parametrize("word, message", [("fp16", "float16 is not supported"), ("x", "none of")])
def test_dtypes_that_do_not_exist(monkeypatch, word, message):
    with pytest.raises(UserError, match=message):
        arguments(monkeypatch, "--dtype", word)


def test_words_of_published_commands(monkeypatch):
    args = arguments(
        monkeypatch,
        *("--optimizer", "Adam", "--beta1", "0.0", "--activation_checkpointing", "False"),
        *("--packing", "true", "--resume", "runs/a"),
    )
    assert (args.optimizer, args.packing, args.activation_checkpointing) == ("adam", True, False)
    assert args.continue_from == "runs/a"


@pytest.mark.parametrize(
    "words, place, same_settings_only",
    [
        ("", "auto", True),
        ("--continue_from auto", "auto", False),
        ("--continue_from none", None, False),
        ("--auto_resume false", None, True),
        ("--continue_from runs/a", "runs/a", False),
    ],
)
def test_where_a_run_starts(monkeypatch, words, place, same_settings_only):
    args = arguments(monkeypatch, *words.split())
    assert (args.continue_from, args.same_settings_only) == (place, same_settings_only)
    with pytest.raises(UserError, match="contradicts --continue_from auto"):
        arguments(monkeypatch, "--auto_resume", "false", "--continue_from", "auto")


def test_the_project(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert arguments(monkeypatch).project == "alphadecay"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert arguments(monkeypatch).project == "mine"
    assert arguments(monkeypatch, "--project", "other").project == "other"


def test_batch_sizes_follow_from_each_other(monkeypatch):
    args = arguments(monkeypatch, "--batch_size", "8", "--gradient_accumulation", "3", world_size=2)
    assert args.total_batch_size == 48
    args = arguments(monkeypatch, "--batch_size", "8", "--total_batch_size", "64", world_size=4)
    assert args.gradient_accumulation == 2


def test_max_train_tokens(monkeypatch):
    assert arguments(
        monkeypatch, "--max_train_tokens", "100M"
    ).num_training_steps == 100_000_000 // (512 * 256)
    assert arguments(
        monkeypatch, "--max_train_tokens", "1B"
    ).num_training_steps == 1_000_000_000 // (512 * 256)
    assert arguments(monkeypatch, "--max_train_tokens", "2_000_000").num_training_steps == 15


@pytest.mark.parametrize(
    "words, message",
    [
        ("--batch_size 100", "--total_batch_size 512 is not a multiple of --batch_size 100"),
        (
            "--batch_size 8 --total_batch_size 64 --gradient_accumulation 3",
            "contradicts the batch sizes",
        ),
        ("--num_training_steps 0", "--num_training_steps 0: it must be above 0"),
        ("--num_training_steps -5", "--num_training_steps -5: it must be above 0"),
        ("--num_training_steps ten", "invalid int value: 'ten'"),
        ("--batch_size 0", "--batch_size 0: it must be above 0"),
        ("--warmup_steps 20000", "--warmup_steps 20000 is more than --num_training_steps 10000"),
        ("--max_train_tokens lots", "'lots' is not a number of tokens"),
        ("--max_train_tokens 5", "less than one update"),
        ("--max_train_tokens 1B --num_training_steps 5", "exclude each other"),
        (
            "--use_modulewise_wd --wd_min_ratio 3 --wd_max_ratio 1",
            "--wd_min_ratio 3.0 is above --wd_max_ratio 1.0: swap them",
        ),
        ("--esd_metric_for_tb beta", "invalid choice: 'beta' .choose from '?alpha"),
        ("--assign_func cubic", "invalid choice: 'cubic' .choose from '?tb_linear_map"),
        ("--remove_first_layer yes", "'yes' is neither true nor false"),
        ("--scheduler cosine_restarts", "needs --cycle_length"),
        ("--weight_decay -1", "--weight_decay -1.0: it must be 0 or more"),
        ("--tags " + "x" * 65, "tags of at most 64 characters"),
        ("--timeout_minutes 0", "--timeout_minutes 0.0: it must be above 0"),
        ("--save_every_minutes -1", "--save_every_minutes -1.0: it must be 0 or more"),
        ("--keep_checkpoints 0", "--keep_checkpoints 0: it must be above 0"),
        (
            "--keep_every 100",
            "--keep_every has an effect only with --keep_checkpoints N: give both",
        ),
        ("--lr nan", "--lr nan: it must be above 0"),
        ("--optimiser adam", "unrecognized arguments: --optimiser adam"),
    ],
)
def test_bad_arguments(monkeypatch, words, message):
    with pytest.raises(UserError, match=message):
        arguments(monkeypatch, *words.split())


@pytest.mark.parametrize(
    "flags, packing",
    [("", False), ("--packing", True), ("--packing --packing_attention within", "within")],
)
def test_what_the_packing_flags_ask_for(flags, packing):
    args = llama_parser().parse_args(["--model_config", "x", *flags.split()])
    assert packing_mode(args.packing, args.packing_attention) is packing
