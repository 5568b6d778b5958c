"""What a user can get wrong: one clear sentence, exit code 2, and nothing already saved is lost."""

import json
import re

import pytest

import torchrun_main
from peft_pretraining.cli.main import run_script
from tests.end_to_end.common import run, write_config, write_text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPHADECAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_config(tmp_path)
    write_text(tmp_path)
    return tmp_path


def flags(folder, *more):
    """A command that would train; argparse lets later flags win."""
    base = (
        f"--model_config {folder}/config.json --dataset {folder}/corpus.jsonl --tokenizer bpe "
        "--max_length 32 --dtype float32"
    )
    base += f" --batch_size 4 --total_batch_size 8 --num_training_steps 2 --save_dir {folder}/run"
    return [*base.split(), *map(str, more)]


def sentence(monkeypatch, capfd, arguments):
    """The one sentence that the script ends with."""
    monkeypatch.setattr("sys.argv", ["torchrun_main.py", *arguments])
    assert run_script(lambda: torchrun_main.main(torchrun_main.parse_arguments())) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


def write(path, text):
    path.write_text(text)
    return path


CORRUPT = '{"text": "a fine document"}\n{"text": "another"}\n{"text": broken}\n'
CASES = {
    "unknown config": (
        lambda f: ["--model_config", f / "llama_61m.json"],
        "llama_61m.json: no such file",
    ),
    "malformed config": (
        lambda f: ["--model_config", write(f / "bad.json", "{,}")],
        "bad.json is not valid JSON",
    ),
    "batch sizes": (
        lambda f: ["--total_batch_size", 10],
        "--total_batch_size 10 is not a multiple of --batch_size 4",
    ),
    "zero steps": (
        lambda f: ["--num_training_steps", 0],
        "--num_training_steps 0: it must be above 0",
    ),
    "negative steps": (
        lambda f: ["--num_training_steps", -1],
        "--num_training_steps -1: it must be above 0",
    ),
    "missing data": (lambda f: ["--dataset", f / "nothing.jsonl"], "nothing.jsonl"),
    "corrupt line": (
        lambda f: ["--dataset", write(f / "corrupt.jsonl", CORRUPT)],
        "corrupt.jsonl, line 3",
    ),
    "empty corpus": (lambda f: ["--dataset", write(f / "empty.jsonl", "")], "empty.jsonl"),
    "no network for c4": (lambda f: ["--dataset", "c4"], "--dataset pydocs"),
    "no network for t5-base": (lambda f: ["--tokenizer", "t5-base"], "--tokenizer bpe"),
    "ratios": (
        lambda f: ["--use_modulewise_wd", "--wd_min_ratio", 3, "--wd_max_ratio", 1],
        "swap them",
    ),
    "metric": (lambda f: ["--esd_metric_for_tb", "beta"], "invalid choice: 'beta'"),
    "map": (lambda f: ["--assign_func", "cubic"], "invalid choice: 'cubic'"),
    "no checkpoint": (lambda f: ["--continue_from", f / "nowhere"], "no checkpoint there"),
    "run folder": (
        lambda f: ["--save_dir", f / "config.json" / "run"],
        "cannot be written (Not a directory)",
    ),
    "two decays": (
        lambda f: ["--use_modulewise_wd", "--use_AWD_NeurIPS2023"],
        "exclude each other",
    ),
    "muon in parts": (
        lambda f: ["--parallel", "fsdp", "--optimizer", "muon"],
        "give --parallel ddp or another optimizer",
    ),
    "shards of nothing": (
        lambda f: ["--fsdp_shard_size", 2],
        "--fsdp_shard_size is for --parallel fsdp",
    ),
    "shards that do not divide": (
        lambda f: ["--parallel", "fsdp", "--fsdp_shard_size", 2],
        "divide the number of processes, 1;",
    ),
    "single_cuda": (lambda f: ["--single_cuda"], "there is no CUDA device here"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(monkeypatch, capfd, folder, case):
    more, expected = CASES[case]
    assert expected in sentence(monkeypatch, capfd, flags(folder, *more(folder)))


def test_token_outside_the_vocabulary(monkeypatch, capfd, folder):
    """A tokenizer of 512 ids for a model of 300."""
    run(flags(folder, "--num_training_steps", 1, "--save_dir", folder / "first"), processes=1)
    small = write(
        folder / "small.json",
        json.dumps(json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}),
    )
    tokenizer = folder / "first/checkpoints/model_1"
    text = sentence(
        monkeypatch, capfd, flags(folder, "--model_config", small, "--tokenizer", tokenizer)
    )
    assert re.search(
        r"gives the id (3|4|5)\d\d but the model's vocab_size is 300; .* a vocab_size of 512 "
        r"or more",
        text,
    )


def test_a_checkpoint_of_another_run(monkeypatch, capfd, folder):
    decay = ["--use_modulewise_wd", "--unbalancedWD_every", 1]
    run(
        flags(folder, *decay, "--num_training_steps", 1, "--save_dir", folder / "first"),
        processes=1,
    )
    saved = {p: p.read_bytes() for p in (folder / "first").rglob("*") if p.is_file()}
    more = ["--continue_from", folder / "first", "--num_training_steps", 3]
    wide = write(
        folder / "wide.json",
        json.dumps(json.loads((folder / "config.json").read_text()) | {"intermediate_size": 128}),
    )
    text = sentence(monkeypatch, capfd, flags(folder, *decay, *more, "--model_config", wide))
    assert "trained with intermediate_size 96, but the model config says 128" in text
    assert "trained on other data" in sentence(
        monkeypatch, capfd, flags(folder, *decay, *more, "--max_length", 16)
    )
    assert "another kind of weight decay" in sentence(monkeypatch, capfd, flags(folder, *more))
    text = sentence(
        monkeypatch, capfd, flags(folder, *decay, *more, "--balance_scope", "all_blocks")
    )
    assert "does not fit the decay flags" in text and "q_proj" in text
    text = sentence(
        monkeypatch,
        capfd,
        flags(folder, *decay, "--continue_from", folder / "first", "--num_training_steps", 1),
    )
    assert "has made all 1 updates already" in text
    assert saved == {p: p.read_bytes() for p in (folder / "first").rglob("*") if p.is_file()}


def test_a_continued_run_that_died_early_begins_again(folder):
    """A run that continues another and dies before its first checkpoint can be started again."""
    run(flags(folder, "--num_training_steps", 1, "--save_dir", folder / "first"), processes=1)
    again = flags(
        folder, "--num_training_steps", 3, "--continue_from", folder / "first/checkpoints/model_1"
    )
    (folder / "run").mkdir()
    (folder / "run/metrics.jsonl").write_text((folder / "first/metrics.jsonl").read_text())
    assert "continue from" in run(again, processes=1).stderr
    (folder / "run/report.html").unlink()  # killed just before the end
    assert "nothing to do" in run([*again, "--continue_from", "auto"], processes=1).stderr
    assert (folder / "run/report.html").exists()


def test_other_settings_are_refused_before_the_first_checkpoint_too(monkeypatch, capfd, folder):
    """Otherwise the records of the other run would be lost."""
    (folder / "run").mkdir()
    record = json.dumps({"arguments": {"lr": 0.5, "loss": "chunked"}})
    (folder / "run/run.json").write_text(record)
    text = sentence(monkeypatch, capfd, flags(folder))
    assert "was made with other settings (--lr 0.5 there, 0.001 here): give --name NEW" in text
    assert (folder / "run/run.json").read_text() == record


@pytest.mark.parametrize("flag", ["--dataset", "--lr"])
def test_under_torchrun_the_sentence_comes_last(folder, flag):
    """One rank prints it, and torchrun prints it again below its traceback."""
    wrong = {"--dataset": folder / "nothing.jsonl", "--lr": "0"}[flag]
    done = run(flags(folder, flag, wrong), check=False)
    assert done.returncode != 0
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip(" =")]
    assert sum(line.startswith("error: ") for line in lines) == 2
    assert lines[-1].startswith("error: ") and str(wrong) in lines[-1]
