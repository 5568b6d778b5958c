"""torchrun_main.py as its users start it, on 2 CPU processes."""

import json
import math
import os
import re
import shlex

import pytest
import torch

from end_to_end.common import ROOT, read_lines, run, write_config, write_text

REFERENCE_COMMAND = (
    "torchrun --nproc_per_node=2 --master_port=20301 --master_addr=localhost torchrun_main.py --model_config configs/llama_130m.json "
    "--optimizer adam --seed 5 --lr 0.001 --batch_size 256 --total_batch_size 512 --num_training_steps 20000 --warmup_steps 2000 "
    "--weight_decay 0.00001 --use_modulewise_wd --alpha_positively_with_WD --unbalancedWD_every 500 --esd_metric_for_tb alpha "
    "--assign_func tb_linear_map --wd_min_ratio 0.6666 --wd_max_ratio 3 --dtype bfloat16 --eval_every 1000 "
    "--wandb_name ours-adam-1.5-3unb-130M-lr0.001-WD0.00001-repeat1 --target_eval_tokens 10_000_000 --save_every 10000"
)
FINAL = "checkpoints/model_40"


def reference_arguments(**changes):
    """The published command's arguments, some of them changed or added."""
    words = shlex.split(REFERENCE_COMMAND)
    words = words[words.index("torchrun_main.py") + 1 :]
    for flag, value in changes.items():
        if f"--{flag}" in words:
            words[words.index(f"--{flag}") + 1] = str(value)
        else:
            words += [f"--{flag}", str(value)]
    return words


def small(folder, **changes):
    sizes = {"max_length": 64, "batch_size": 4, "total_batch_size": 16, "warmup_steps": 4}
    inputs = {"model_config": folder / "config.json", "dataset": folder / "corpus.jsonl", "tokenizer": "bpe"}
    return reference_arguments(**inputs | sizes | changes)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a small config and a corpus, and a cache of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    write_config(folder)
    write_text(folder)
    os.environ["ALPHADECAY_CACHE"] = str(folder / "cache")
    yield folder
    del os.environ["ALPHADECAY_CACHE"]


def test_the_readme_prints_the_reference_command():
    readme = (ROOT / "README.md").read_text()
    commands = [" ".join(block.replace("\\\n", " ").split()) for block in re.findall(r"```bash\n(.*?)```", readme, re.S)]
    assert any(REFERENCE_COMMAND in command for command in commands)


def test_the_reference_command_is_accepted_verbatim(monkeypatch):
    import torchrun_main

    words = shlex.split(REFERENCE_COMMAND)
    monkeypatch.setattr("sys.argv", words[words.index("torchrun_main.py") :])
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = torchrun_main.parse_arguments()
    assert args.target_eval_tokens == 10_000_000 and args.gradient_accumulation == 1
    assert args.name == args.wandb_name == "ours-adam-1.5-3unb-130M-lr0.001-WD0.00001-repeat1"


@pytest.fixture(scope="module")
def reference_run(inputs):
    """The published command with a small config, local data and 20 steps."""
    arguments = small(inputs, num_training_steps=20, unbalancedWD_every=5, eval_every=10, save_every=10, save_dir=inputs / "reference")
    done = run(arguments)
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


def test_transformers_loads_the_checkpoint(reference_run):
    import transformers

    from peft_pretraining.modeling_llama import LlamaForCausalLM

    folder = reference_run[0] / "checkpoints/model_20"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder))
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a word").input_ids


def exact(inputs, name, *more, **changes):
    arguments = small(
        inputs, num_training_steps=40, unbalancedWD_every=7, eval_every=20, save_every=20, log_every=1, dtype="float32",
        save_dir=inputs / name, **changes,
    )  # fmt: skip
    return [*arguments, *more]


@pytest.fixture(scope="module")
def straight_run(inputs):
    run(exact(inputs, "straight"), script="tests/end_to_end/rank_hashes.py")
    return inputs / "straight"


def test_ranks_are_bit_identical(straight_run):
    for step in (20, 40):
        ranks = [json.loads((straight_run / f"checkpoints/model_{step}.rank{r}.json").read_text()) for r in (0, 1)]
        assert ranks[0] == ranks[1]
        assert len(ranks[0]["decays"]) == 14


def test_stopped_and_resumed_is_bit_exact(inputs, straight_run):
    """Killed in update 27, after the checkpoint of update 20, and continued to 40, with updates of the decays on both sides."""
    arguments = exact(inputs, "stopped", "--continue_from", "auto")
    script = "tests/end_to_end/rank_hashes.py"
    assert run(arguments, script=script, check=False, environment={"KILL_AT_UPDATE": "27"}).returncode != 0
    assert [r["update_step"] for r in read_lines(inputs / "stopped/metrics.jsonl")][-1] == 26
    assert not (inputs / "stopped" / FINAL).exists()
    with (inputs / "stopped/metrics.jsonl").open("a") as file:
        file.write('{"update_step": 39, "loss": 1')  # a line torn by the kill
    assert "continue from" in run(arguments, script=script).stderr
    assert comparable(inputs / "stopped") == comparable(straight_run)
    assert "has made all 40 updates" in run(arguments, script=script).stderr  # and ends well: there is nothing to do


def comparable(folder):
    """Everything of a run that must not depend on whether it was stopped."""
    timings = ("throughput_", "seconds", "eval_seconds")
    metrics = [{k: v for k, v in r.items() if not k.startswith(timings)} for r in read_lines(folder / "metrics.jsonl")]
    hashes = [(folder / f"{FINAL}.rank{r}.json").read_text() for r in (0, 1)]
    manifest = (folder / FINAL / "manifest.json").read_text()
    return metrics, (folder / "modules.jsonl").read_text(), hashes, manifest


def test_one_process_sees_the_same_batches(inputs, straight_run):
    """Without torchrun: the same global batches, so the same losses but for the order of float additions."""
    run(exact(inputs, "alone", batch_size=16), processes=1)
    runs = [read_lines(folder / "metrics.jsonl") for folder in (inputs / "alone", straight_run)]
    for name in ("loss", "eval_loss", "grad_norm", "weight_decay", "tokens_seen", "eval_tokens"):
        alone, together = ([r[name] for r in records if name in r] for records in runs)
        assert alone == pytest.approx(together, rel=5e-5), name


def test_an_existing_run_is_not_overwritten(inputs, reference_run):
    before = (inputs / "reference/metrics.jsonl").read_bytes()
    done = run(small(inputs, num_training_steps=20, save_dir=inputs / "reference"), check=False)
    assert done.returncode != 0
    assert done.stderr.count("already holds a run: go on with it by --continue_from auto") == 1
    assert (inputs / "reference/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [
        "--use_hf_model --use_modulewise_wd --dtype float32",
        "--use_modulewise_wd --esd_async --esd_lag 1 --esd_metric_for_tb alpha_farms",
        "--use_AWD_NeurIPS2023 --dtype bf16_mixed --optimizer adamw",
        "--activation_checkpointing --scheduler cosine_restarts --cycle_length 2 --grad_clipping 1.0",
        "--use_modulewise_wd --esd_metric_for_tb gradnorm --assign_func layerwise_sigmoid --scheduler linear",
    ],
)
def test_other_flags_run(inputs, flags, tmp_path):
    base = ["--model_config", inputs / "config.json", "--dataset", inputs / "corpus.jsonl", "--tokenizer", "bpe", "--max_length", 32]
    base += ["--batch_size", 4, "--total_batch_size", 8, "--num_training_steps", 4, "--unbalancedWD_every", 2]
    base += ["--save_dir", tmp_path / "run"]
    run([*base, *flags.split()], processes=1)
    final = read_lines(tmp_path / "run/metrics.jsonl")[-1]
    assert final["final"] and 3 < final["eval_loss"] < 7
