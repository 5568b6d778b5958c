"""Schedule, evaluation, optimizer, arguments and records, each alone."""

import contextlib
import json
import math
import resource

import pytest
import torch
import transformers

import torchrun_main
from peft_pretraining import run_log
from peft_pretraining.cli.llama import llama_parser, packing_of
from peft_pretraining.errors import UserError
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.optim.gradients import clip_gradients, mean_decay
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.optim.schedule import lr_factor
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records.jsonl import append_json
from peft_pretraining.records.run_dir import copy_records_up_to
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


# ---------------------------------------------------------------------------------------------------------------- schedule


def test_cosine():
    factors = [lr_factor(u, "cosine", 100, 10, 0.1) for u in range(1, 101)]
    assert (
        factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[99] == pytest.approx(0.1)
    )
    assert factors[54] == pytest.approx(0.55)  # halfway
    assert all(a > b for a, b in zip(factors[9:], factors[10:], strict=False))


def test_linear():
    factors = [lr_factor(u, "linear", 100, 0, 0.0) for u in (1, 50, 100)]
    assert factors == pytest.approx([0.99, 0.5, 0.0])


def test_restarts():
    factors = [lr_factor(u, "cosine_restarts", 100, 10, 0.1, 30) for u in (11, 26, 40, 41, 71)]
    assert factors == pytest.approx(
        [1.0, 0.55, 0.1 + 0.9 * (1 + math.cos(math.pi * 29 / 30)) / 2, 1.0, 1.0]
    )


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


# --------------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_decay_is_not_rounded_away_in_bfloat16(name):
    """With lr * weight_decay far below bfloat16's resolution the fused kernel still lets the decay act on the moments'
    side (adam) or in float32 (adamw) beside the update."""
    plain, decayed = (
        [torch.nn.Parameter(torch.linspace(0.5, 2, 512).to(torch.bfloat16))] for _ in range(2)
    )
    for parameters, decay in ((plain, 0.0), (decayed, 0.1)):
        optimizer = build_optimizer(name, [{"params": parameters, "weight_decay": decay}], lr=1e-2)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            parameters[0].grad = torch.randn(512, generator=generator).to(torch.bfloat16)
            optimizer.step()
    assert float(decayed[0].detach().float().norm()) < float(plain[0].detach().float().norm())


@pytest.mark.parametrize("name, after", [("adam", 1.99), ("adamw", 1.998)])
def test_adam_is_coupled_and_adamw_is_not(name, after):
    """No gradient, a decay of 0.1: Adam takes it for a gradient and makes a whole step of lr, AdamW shrinks by lr * 0.1."""
    parameter = torch.nn.Parameter(torch.full((4,), 2.0))
    parameter.grad = torch.zeros(4)
    build_optimizer(name, [{"params": [parameter], "weight_decay": 0.1}], lr=0.01).step()
    assert parameter.tolist() == pytest.approx([after] * 4, rel=1e-6)


def test_clipping_and_the_mean_decay():
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.zeros(2))
    model.p.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients(model, 0.0)) == 5 and model.p.grad.tolist() == [3, 4]
    assert float(clip_gradients(model, 1.0)) == 5
    assert model.p.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-4)
    groups = [
        {"params": [torch.zeros(n, requires_grad=True)], "weight_decay": d}
        for n, d in ((1, 1.0), (3, 5.0))
    ]
    assert mean_decay(torch.optim.SGD(groups)) == 4.0


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


# ----------------------------------------------------------------------------------------------------------------- records


def test_records_know_no_nan(tmp_path):
    append_json(tmp_path / "metrics.jsonl", [{"loss": math.nan, "perplexity": math.inf, "lr": 0.5}])
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"loss": null, "perplexity": null, "lr": 0.5}\n'


def test_records_are_cut_at_the_checkpoint(tmp_path):
    (tmp_path / "a").mkdir()
    append_json(tmp_path / "a/metrics.jsonl", [{"update_step": i} for i in range(6)])
    append_json(tmp_path / "a/modules.jsonl", [{"step": i} for i in (0, 3, 6)])
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"update_step": 2')  # torn
    copy_records_up_to(tmp_path / "a", tmp_path / "b", 3)
    assert [
        json.loads(x)["update_step"]
        for x in (tmp_path / "b/metrics.jsonl").read_text().splitlines()
    ] == [0, 1, 2, 3]
    assert [
        json.loads(x)["step"] for x in (tmp_path / "b/modules.jsonl").read_text().splitlines()
    ] == [0, 3]


def test_a_full_disk_costs_records_and_one_warning(tmp_path, monkeypatch):
    """No line is torn, so that those which come when there is room again are whole."""
    from loguru import logger

    warnings = []
    sink = logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING")
    monkeypatch.setattr(run_log, "_start_wandb", lambda *arguments: None)
    log = run_log.RunLog(tmp_path, ALONE, {"name": "a"}, "a", [])
    log.metrics({"update_step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (30, limits[1])
    )  # bytes a file may have: half a second line
    try:
        log.metrics({"update_step": 2})
        log.modules([{"step": 2, "module": "a" * 30, "alpha": None, "weight_decay": None}])
        log.finish({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        logger.remove(sink)
    log.metrics({"update_step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"update_step": 1}\n{"update_step": 3}\n'
    assert json.loads((tmp_path / "run.json").read_text())["name"] == "a"
    assert len(warnings) == 1 and "metrics.jsonl cannot be written (File too large)" in warnings[0]


@pytest.mark.parametrize(
    "flags, packing",
    [("", False), ("--packing", True), ("--packing --packing_attention within", "within")],
)
def test_what_the_packing_flags_ask_for(flags, packing):
    assert packing_of(llama_parser().parse_args(["--model_config", "x", *flags.split()])) is packing


class FakeWandb:
    def __init__(self):
        self.lines = []

    def log(self, line):
        self.lines.append(line)


def test_wandb_gets_the_published_names(tmp_path, monkeypatch):
    """Means over the blocks of each projection, and the last evaluation, as the published runs call them; without a project nothing."""
    fake = FakeWandb()
    monkeypatch.setattr(run_log, "_start_wandb", lambda *arguments: fake)
    types = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rows = [
        {
            "step": 5,
            "module": f"{block}.{kind}",
            "type": kind,
            "alpha": 2.0 + block,
            "weight_decay": 0.1,
        }
        for block in (0, 1)
        for kind in types
    ]
    rows[0]["alpha"] = None  # undefined: it counts for nothing
    for project in ("alphadecay", None):
        log = run_log.RunLog(tmp_path, ALONE, {"name": "a"}, "a", [], project)
        log.modules(rows)
        log.metrics({"update_step": 5, "eval_loss": 3.0, "eval_tokens": 7, "final": False})
        log.metrics({"update_step": 6, "eval_loss": 2.0, "eval_tokens": 7, "final": True})
    modules, during, last = fake.lines
    assert {name: value for name, value in modules.items() if "/" not in name} == {
        "update_step": 5,
        "alpha_Q": 3.0,
    } | {f"alpha_{name}": 2.5 for name in ("K", "V", "O", "MLPgate", "MLPup", "MLPdown")}
    assert (
        modules["alpha/1.q_proj"] == 3.0
        and modules["weight_decay/0.q_proj"] == 0.1
        and "alpha/0.q_proj" not in modules
    )
    assert "final_eval_loss" not in during and (
        last["final_eval_loss"],
        last["final_eval_tokens"],
    ) == (2.0, 7)
