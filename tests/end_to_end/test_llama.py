"""torchrun_main.py as its users start it, on 2 CPU processes."""

import json
import math
import re
import shlex

import pytest
import torch

from alphadecay.cli.presets import METHOD_PRESETS
from tests.end_to_end.common import REFERENCE_COMMAND, ROOT, exact, read_lines, run, small, trace
from tests.support.launch import set_launch

# A method's name settles these.
PUBLISHED_METHOD = (
    "--use_modulewise_wd",
    "--alpha_positively_with_WD",
    "--esd_metric_for_tb",
    "alpha",
    "--assign_func",
    "tb_linear_map",
)


def test_the_documentation_shows_the_reference_command():
    text = (ROOT / "docs/pretrain_llama.md").read_text()
    commands = [
        " ".join(block.replace("\\\n", " ").split())
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    ]
    assert any(REFERENCE_COMMAND in command for command in commands)


def test_the_reference_command_is_accepted_verbatim(monkeypatch):
    import torchrun_main

    words = shlex.split(REFERENCE_COMMAND)
    monkeypatch.setattr("sys.argv", words[words.index("torchrun_main.py") :])
    set_launch(monkeypatch, 2)
    args = torchrun_main.parse_arguments()
    assert args.target_eval_tokens == 10_000_000 and args.gradient_accumulation == 1
    assert args.name == args.wandb_name == "ours-adam-1.5-3unb-130M-lr0.001-WD0.00001-repeat1"


@pytest.fixture(scope="module")
def reference_run(inputs):
    """The published command with a small config, local data and 20 steps."""
    arguments = small(
        inputs,
        num_training_steps=20,
        unbalancedWD_every=5,
        eval_every=10,
        save_every=10,
        save_dir=inputs / "reference",
    )
    done = run(arguments, environment={"WANDB_MODE": "offline"})
    return inputs / "reference", done


def test_it_trains_evaluates_saves_and_reports(reference_run):
    folder, done = reference_run
    metrics = read_lines(folder / "metrics.jsonl")
    losses = {r["update_step"]: r["loss"] for r in metrics if "loss" in r}
    assert list(losses) == [1, 10, 20] and losses[20] < losses[1]
    evaluations = [r for r in metrics if "eval_loss" in r]
    assert [(r["update_step"], r["final"]) for r in evaluations] == [(10, False), (20, True)]
    for r in evaluations:
        assert r["perplexity"] == pytest.approx(math.exp(r["eval_loss"]))
        assert r["reference_perplexity"] < r["perplexity"]
    assert sorted({r["step"] for r in read_lines(folder / "modules.jsonl")}) == [0, 5, 10, 15, 20]
    assert json.loads((folder / "run.json").read_text())["summary"]["analyses"] == 4
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["model_10", "model_20"]
    assert "<svg" in (folder / "report.html").read_text()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert "%|" not in done.stderr  # no bar where there is no terminal
    assert done.stderr.count("data:") == 1  # one rank speaks


def test_a_finished_run_is_evaluated_on_other_text(
    reference_run, inputs, tmp_path, monkeypatch, capsys
):
    """On the run's own validation text it gives the run's own loss."""
    from peft_pretraining import evaluate_checkpoint
    from peft_pretraining.data.sources.registry import open_source
    from peft_pretraining.data.sources.split import split_documents

    folder, _ = reference_run
    held_out = split_documents(open_source(str(inputs / "corpus.jsonl"), 5, tmp_path)).validation
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in held_out)
    )
    monkeypatch.setattr(
        "sys.argv",
        [
            "evaluate_checkpoint",
            str(folder),
            "--documents",
            str(tmp_path / "own.jsonl"),
            "--as",
            "own",
        ],
    )
    evaluate_checkpoint.main(evaluate_checkpoint.parse_arguments())
    (record,) = read_lines(folder / "evaluations.jsonl")
    final = read_lines(folder / "metrics.jsonl")[-1]
    assert record["checkpoint"] == "model_20" and record["eval_tokens"] == final["eval_tokens"] > 0
    assert record["eval_loss"] == pytest.approx(
        final["eval_loss"], rel=1e-5
    )  # in batches of other shapes
    monkeypatch.setattr(evaluate_checkpoint, "evaluate", None)
    evaluate_checkpoint.main(evaluate_checkpoint.parse_arguments())
    assert (
        len(read_lines(folder / "evaluations.jsonl")) == 1
        and capsys.readouterr().out.count("on own: loss") == 2
    )


def test_transformers_loads_the_checkpoint(reference_run):
    import transformers

    from peft_pretraining.model.modeling_llama import LlamaForCausalLM

    folder = reference_run[0] / "checkpoints/model_20"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a word").input_ids


def test_ranks_are_bit_identical(straight_run):
    ranks = [trace(straight_run, rank) for rank in (0, 1)]
    assert ranks[0] == ranks[1] and list(ranks[0]) == list(range(1, 41))
    assert len(ranks[0][1]["decays"]) == 14 and ranks[0][6]["decays"] != ranks[0][7]["decays"]


def test_one_process_sees_the_same_batches(inputs, straight_run):
    """One process gives the losses of two, except for the order in which floats are added."""
    run(exact(inputs, "alone", batch_size=16), processes=1)
    assert_same_numbers(inputs / "alone", straight_run)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_another_number_of_processes_goes_on(inputs, straight_run, processes):
    """From the checkpoint that two processes made after update 20."""
    name = f"on-{processes}"
    run(
        exact(inputs, name, "--continue_from", straight_run / "checkpoints/model_20"),
        processes=processes,
    )
    assert_same_numbers(inputs / name, straight_run)


def assert_same_numbers(folder, other):
    runs = [read_lines(path / "metrics.jsonl") for path in (folder, other)]
    for name in ("loss", "eval_loss", "grad_norm", "weight_decay", "tokens_seen", "eval_tokens"):
        found, wanted = ([r[name] for r in records if name in r] for records in runs)
        assert found == pytest.approx(wanted, rel=5e-5), name


def test_an_existing_run_is_not_overwritten(inputs, reference_run):
    before = (inputs / "reference/metrics.jsonl").read_bytes()
    again = small(inputs, num_training_steps=20, save_dir=inputs / "reference")
    done = run([*again, "--continue_from", "none"], check=False)
    assert done.returncode != 0
    assert done.stderr.count("already holds a run: continue it with --continue_from auto") >= 1
    # By default a run continues, but not with other settings.
    done = run([*again, "--lr", "0.5"], check=False)
    assert done.returncode != 0 and "--lr 0.001 there, 0.5 here" in done.stderr
    assert (inputs / "reference/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [
        "--use_hf_model --use_modulewise_wd --dtype float32",
        "--use_modulewise_wd --esd_async --esd_lag 1 --esd_metric_for_tb alpha_farms",
        "--use_AWD_NeurIPS2023 --dtype bf16_mixed --optimizer adamw",
        "--activation_checkpointing --scheduler cosine_restarts --cycle_length 2 "
        "--grad_clipping 1.0",
        "--use_modulewise_wd --esd_metric_for_tb gradnorm --assign_func layerwise_sigmoid "
        "--scheduler linear",
        "--method type_constant --type_multipliers up_proj=2 --optimizer adamw "
        "--cautious_decay --dtype float32",
        "--method adadecay --dtype bf16_mixed --name adadecay",
    ],
)
def test_other_flags_run(inputs, flags, tmp_path):
    base = [
        "--model_config",
        inputs / "config.json",
        "--dataset",
        inputs / "corpus.jsonl",
        "--tokenizer",
        "bpe",
        "--max_length",
        32,
    ]
    base += [
        "--batch_size",
        4,
        "--total_batch_size",
        8,
        "--num_training_steps",
        4,
        "--unbalancedWD_every",
        2,
    ]
    base += ["--save_dir", tmp_path / "run"]
    run([*base, *flags.split()], processes=1)
    final = read_lines(tmp_path / "run/metrics.jsonl")[-1]
    assert final["final"] and 3 < final["eval_loss"] < 7


@pytest.mark.parametrize(
    "flags",
    [
        "--method adadecay --optimizer adamw",
        "--method gradnorm --iso_budget --optimizer muon --adamc",
        "--method one_shot",
    ],
)
def test_methods_resume_exactly(inputs, flags, tmp_path):
    """A run resumed in the middle ends with the weights and moments of an undisturbed one."""
    base = exact(
        inputs,
        "unused",
        *flags.split(),
        num_training_steps=8,
        unbalancedWD_every=2,
        save_every=4,
        eval_every=8,
    )
    for name, more in (
        ("straight", []),
        ("resumed", ["--continue_from", tmp_path / "straight/checkpoints/model_4"]),
    ):
        base[base.index("--save_dir") + 1] = tmp_path / name
        run(
            [word for word in base if word not in PUBLISHED_METHOD] + more,
            processes=1,
            environment={"WANDB_MODE": "disabled"},
        )
    manifests = [
        json.loads((tmp_path / name / "checkpoints/model_8/manifest.json").read_text())
        for name in ("straight", "resumed")
    ]
    for file in ("model.safetensors", "training_state/optimizer.pt"):
        assert manifests[0][file] == manifests[1][file]
    arguments = json.loads((tmp_path / "straight/run.json").read_text())["arguments"]
    expected = METHOD_PRESETS[arguments["method"]]
    assert {name: arguments[name] for name in expected} == expected
