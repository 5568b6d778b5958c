"""A run is named by the method that it computes: in its records, its log, a table and its report.

And --dry_run prints the same names, and writes nothing.
"""

import json
import re
import subprocess
import sys

import pytest

from tests.end_to_end.common import FAULTY, ROOT, read_lines, run, small, vit

ALPHADECAY = (
    "--use_modulewise_wd --alpha_positively_with_WD --esd_metric_for_tb alpha "
    "--assign_func tb_linear_map --wd_min_ratio 0.6666 --wd_max_ratio 3"
)
# The flags of the published code, without a name for what they compute.
FLAGS = {
    "alphadecay": ALPHADECAY,
    "inverted": ALPHADECAY.replace("--alpha_positively_with_WD ", ""),
    "gradnorm": ALPHADECAY.replace("tb alpha", "tb gradnorm"),
    "uniform": "",
}
OPTIONS_OF_THE_METHOD = re.compile(
    r"--use_modulewise_wd|--alpha_positively_with_WD"
    r"|--(esd_metric_for_tb|assign_func|wd_min_ratio|wd_max_ratio|wandb_name) \S+"
)


def words_of(inputs, method, folder, **changes):
    """Return the published command with the flags of another method."""
    words = " ".join(small(inputs, save_dir=folder, **changes))
    return [*OPTIONS_OF_THE_METHOD.sub("", words).split(), *FLAGS[method].split()]


@pytest.fixture(scope="module")
def four_runs(inputs, tmp_path_factory):
    """Return {method: (run folder, what the command printed)}."""
    root = tmp_path_factory.mktemp("four")
    settings = {"num_training_steps": 4, "warmup_steps": 1, "unbalancedWD_every": 2}
    settings |= {"target_eval_tokens": 500, "save_every": 4, "log_every": 1}
    runs = {}
    for method in FLAGS:
        words = words_of(inputs, method, root / method, **settings)
        runs[method] = root / method, run(words, processes=1).stderr
    return runs


@pytest.mark.parametrize("method", FLAGS)
def test_a_run_by_published_flags_has_the_name_of_its_method(four_runs, method):
    folder, printed = four_runs[method]
    info = json.loads((folder / "run.json").read_text())
    assert info["method"] == method
    assert re.search(rf"(^|-){method}-", info["name"])
    settings = info["method_settings"]
    assert settings["weight_decay"] == 1e-5 and settings["optimizer"] == "adam"
    page = (folder / "report.html").read_text()
    assert f"<title>{info['name']}</title>" in page and f">{method}: " in page
    block = printed.split("records")[0]
    assert f"method     {method}: " in block
    assert ("order of the decays is reversed" in printed) == (method == "inverted")


def test_a_table_keeps_the_four_methods_apart(four_runs):
    folders = [str(folder) for folder, _ in four_runs.values()]
    command = [sys.executable, "scripts/paper/table.py", *folders, "--columns", "optimizer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for method, (folder, _) in four_runs.items():
        perplexity = read_lines(folder / "metrics.jsonl")[-1]["perplexity"]
        (row,) = re.findall(rf"^\W*{method}\b.*$", done.stdout, re.M)
        assert f"{perplexity:.2f}" in row


@pytest.mark.parametrize("method", FLAGS)
def test_a_dry_run_prints_the_same_block_and_writes_nothing(four_runs, inputs, method, tmp_path):
    words = words_of(inputs, method, tmp_path / "run", num_training_steps=4, unbalancedWD_every=2)
    done = run([*words, "--dry_run"], processes=1)
    (line,) = [x for x in four_runs[method][1].splitlines() if f"method     {method}: " in x]
    assert line.split("method  ")[1] in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_other_settings_than_the_run_was_made_with(four_runs, inputs):
    folder, _ = four_runs["uniform"]
    before = sorted(folder.iterdir())
    settings = {"num_training_steps": 4, "warmup_steps": 1, "unbalancedWD_every": 2}
    words = words_of(inputs, "uniform", folder, target_eval_tokens=500, save_every=4, **settings)
    done = run([*words, "--dry_run"], processes=1)
    assert "model_4, the newest checkpoint of this run" in done.stdout
    done = run([*words, "--dry_run", "--lr", "0.5"], processes=1, check=False)
    assert done.returncode == 2 and "--lr 0.001 there, 0.5 here" in done.stderr
    assert sorted(folder.iterdir()) == before


def test_a_dry_run_of_a_classifier(inputs, tmp_path):
    words = vit(inputs, tmp_path / "run")
    done = run([*words, "--dry_run"], "main_vit.py")
    output = done.stderr + done.stdout
    for part in ("method     alphadecay: ", "160 images of 4 classes", "44 images", "2 processes"):
        assert output.count(part) == 1, (part, output)
    assert list(tmp_path.iterdir()) == []


def test_a_continued_run_sums_up_all_its_pieces(inputs, tmp_path):
    """Three processes make it: the summary covers the updates of all, and W&B has one run."""
    settings = {"num_training_steps": 6, "warmup_steps": 1, "save_every": 100, "log_every": 1}
    settings |= {"target_eval_tokens": 500, "unbalancedWD_every": 1, "save_dir": tmp_path / "run"}
    for fault in ("SIGTERM@2@all", "SIGTERM@4@all", "none@9@all"):
        environment = {"WANDB_MODE": "offline", "FAULT": fault}
        run(small(inputs, **settings), FAULTY, 1, False, environment)
    info = json.loads((tmp_path / "run/run.json").read_text())
    firsts = [piece["first_update"] for piece in info["pieces"]]
    assert firsts[0] == 1 and len(firsts) == 3 and firsts == sorted(set(firsts))
    records = read_lines(tmp_path / "run/metrics.jsonl")
    assert [r["update_step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    summary = info["summary"]
    assert summary["analyses"] == 6
    seen = [r for r in records if "tokens_seen" in r][-1]["tokens_seen"]
    assert summary["updates"] == 6
    assert summary["train_seconds"] * summary["tokens_per_second"] == pytest.approx(seen)
    assert info["totals"]["2"]["seconds"] < info["totals"]["4"]["seconds"]
    ids = {folder.name.split("-")[-1] for folder in (tmp_path / "run/wandb").glob("offline-run-*")}
    assert ids == {info["wandb"]["id"]}
