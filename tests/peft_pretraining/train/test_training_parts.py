"""Evaluation and arguments, each alone."""

import contextlib
import math

import pytest
import torch
import transformers

import torchrun_main
from peft_pretraining.cli.llama import llama_parser, packing_of
from peft_pretraining.errors import UserError
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train.evaluation import evaluate, perplexity

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))


def small_model():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return build_model(transformers.LlamaConfig(**sizes, pad_token_id=None))


# -------------------------------------------------------------------------------------------------------------- evaluation


def test_perplexity_counts_every_target_once():
    """Pads, a short last batch, and the published code's count that starts at 1."""
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows in (4, 4, 1):
        ids = torch.randint(64, (rows, 10), generator=generator)
        labels = ids.clone()
        for row in range(rows):
            labels[row, int(torch.randint(1, 11, (), generator=generator)) :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    losses, means = [], []
    with torch.no_grad():
        for batch in batches:
            log_p = model(batch["input_ids"]).log_softmax(-1)
            targets = [
                (r, t)
                for r, row in enumerate(batch["labels"])
                for t in range(1, 10)
                if row[t] != -100
            ]
            batch_losses = [-float(log_p[r, t - 1, batch["labels"][r, t]]) for r, t in targets]
            losses += batch_losses
            means.append(sum(batch_losses) / max(1, len(batch_losses)))
    result = evaluate(model, batches, ALONE, contextlib.nullcontext())
    assert result["eval_tokens"] == len(losses)
    assert result["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert result["reference_perplexity"] == pytest.approx(math.exp(sum(means) / 4), rel=1e-6)


def test_a_batch_without_targets():
    model = small_model()
    ids = torch.arange(10)[None]
    batches = [{"input_ids": ids, "labels": labels} for labels in (ids, torch.full_like(ids, -100))]
    result = evaluate(model, batches, ALONE, contextlib.nullcontext())
    assert model.training
    assert result["reference_perplexity"] == pytest.approx(
        math.exp(result["eval_loss"] / 2)
    )  # it counts for nothing
    assert perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))


# --------------------------------------------------------------------------------------------------------------- arguments


def arguments(monkeypatch, *words, world_size=1):
    monkeypatch.setattr(
        "sys.argv", ["torchrun_main.py", "--model_config", "configs/llama_60m.json", *words]
    )
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return torchrun_main.parse_arguments()


def test_defaults_are_the_published_settings(monkeypatch):
    args = arguments(monkeypatch, world_size=2)
    expected = dict(
        optimizer="adam", lr=1e-3, weight_decay=1e-5, total_batch_size=512, batch_size=256, gradient_accumulation=1, max_length=256,
        num_training_steps=10_000, warmup_steps=1_000, scheduler="cosine", min_lr_ratio=0.1, dtype="bfloat16", grad_clipping=0.0,
        dataset="c4", tokenizer=None, packing=False, seed=5, unbalancedWD_every=500, esd_metric_for_tb="alpha", assign_func="tb_linear_map",
        wd_min_ratio=0.6666, wd_max_ratio=3.0, pl_fitting="median", xmin_pos=2.0, filter_zeros=False, remove_first_layer=True,
        remove_last_layer=True, batchnorm=True, batchnorm_type="name", balance_scope="reference", use_modulewise_wd=False,
        alpha_positively_with_WD=False, use_AWD_NeurIPS2023=False, single_cuda=False, name="llama_60m-uniform-adam-lr0.001-wd1e-05-seed5",
        save_dir="runs/llama_60m-uniform-adam-lr0.001-wd1e-05-seed5",
    )  # fmt: skip
    assert {k: getattr(args, k) for k in expected} == expected


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
        ("--max_train_tokens lots", "'lots' is no number of tokens"),
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
        ("--keep_checkpoints 0", "--keep_checkpoints 0: it must be above 0"),
        ("--keep_every 100", "--keep_every says what --keep_checkpoints N leaves: give that too"),
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
    assert packing_of(llama_parser().parse_args(["--model_config", "x", *flags.split()])) is packing
