"""The helper of the quickstarts: sample, progress lines, repeated and interrupted steps, spread."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from scripts import quickstart
from tests.end_to_end.common import ROOT

HELPER = [sys.executable, str(ROOT / "scripts/quickstart.py")]
# Stands for every python that a script starts: answers questions about versions, notes the rest.
STUB = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo same; else (printf '%s\\x1f' "$@"; echo) >> {log}; fi
"""
MEASURED = {"text": 40.0, "wd0": 50.0, "uniform": 50.0, "alphadecay": 60.0, "report": 5.0}


@pytest.fixture
def step(tmp_path, capsys):
    """Run one step whose command appends a line to its product; return the printed text."""

    def run(name, code="", expect=0, measured=MEASURED):
        product = tmp_path / f"{name}.product"
        words = [sys.executable, "-c", f"{code}\nopen({str(product)!r}, 'a').write('x')"]
        made = quickstart.Step(name, f"do {name}", product, words)
        assert quickstart.run_step(tmp_path, measured, made) == expect
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def take(folder, name, seconds):
    """Record a finished step that took so many seconds."""
    path = folder / quickstart.STATE
    state = quickstart.read_json(path) if path.exists() else {}
    state[name] = {"command": [], "seconds": seconds, "finished": True}
    path.write_text(json.dumps(state))


def test_the_sample_is_drawn_from_all_documents_and_its_parts_share_none(tmp_path):
    texts = [f"{i:05d} " + "word " * 40 for i in range(6000)]
    with gzip.open(tmp_path / "gathered.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    index = {"stamp": [[[str(tmp_path / "gathered.gz"), 1]], []]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    quickstart.sample(tmp_path, tmp_path / "out")
    parts = {}
    for name in ("train", "validation"):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        parts[name] = [json.loads(line)["text"] for line in lines]
        numbers = [int(text[:5]) for text in parts[name]]
        assert (
            min(numbers) < 100
            and max(numbers) > 5900
            and abs(sum(numbers) / len(numbers) - 3000) < 250
        )
    assert not set(parts["train"]) & set(parts["validation"])
    for name, wanted in (("train", 600_000), ("validation", 250_000)):
        assert 0 <= sum(map(len, parts[name])) - wanted < len(texts[0])


def test_a_progress_line_has_position_estimate_and_time_left(step):
    assert "[1 of 5] do text, about 40 s; 3 min 25 s left\n" in step("text")
    assert "[2 of 5] do wd0, about 50 s; 2 min 45 s left\n" in step("wd0")


def test_estimates_follow_the_training_runs_of_this_machine(tmp_path, step):
    take(tmp_path, "text", 1.0)  # gathered before: says nothing about the speed of the machine
    assert "about 50 s; 2 min 45 s left" in step("wd0", "import time")
    take(tmp_path, "wd0", 100.0)
    assert "[3 of 5] do uniform, about 1 min 40 s; 3 min 50 s left" in step("uniform")


def test_a_finished_step_is_not_repeated_unless_its_command_or_product_changed(tmp_path, step):
    step("text")
    assert "[1 of 5] do text: finished before" in step("text")
    assert (tmp_path / "text.product").read_text() == "x"
    step("text", "other = 1")
    assert (tmp_path / "text.product").read_text() == "xx"
    (tmp_path / "text.product").unlink()
    step("text", "other = 1")
    assert (tmp_path / "text.product").read_text() == "x"


def test_a_failed_step_shows_the_end_of_its_output_and_runs_again(tmp_path, step):
    shown = step("wd0", "import sys; print('what went wrong'); sys.exit(3)", expect=3)
    assert "what went wrong" in shown and f"{tmp_path}/wd0.log has its output" in shown
    assert "finished before" not in step("wd0", "import sys; print('again'); sys.exit(3)", expect=3)


def test_an_interrupted_step_waits_for_its_command_and_counts_its_seconds(tmp_path):
    """Ctrl-C reaches the command too, which ends by itself, as a training run does."""
    code = (
        "import signal, time, pathlib\n"
        "def save(*_): time.sleep(1); print('saved', flush=True); exit(1)\n"
        "signal.signal(signal.SIGINT, save)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\ntime.sleep(60)"
    )
    words = [*HELPER, "step", tmp_path, tmp_path / "none.json", "wd0", "train", tmp_path / "p"]
    process = subprocess.Popen(
        [*map(str, words), sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # it leads a group of its own, as under a terminal
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "start the same command again" in output
    assert "saved" in (tmp_path / "wd0.log").read_text()
    state = quickstart.read_json(tmp_path / quickstart.STATE)["wd0"]
    assert state["finished"] is False and state["seconds"] >= 1


def runs_of(folder, losses):
    """Write the records of a quickstart for each seed; losses: method -> loss of each seed."""
    folders = []
    for i in range(len(losses["wd0"])):
        folders.append(folder / str(i))
        for method, values in losses.items():
            run = folders[-1] / method
            run.mkdir(parents=True)
            records = [
                {"eval_loss": 9.0},
                {"eval_loss": values[i], "perplexity": 2.0, "final": True},
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
            (run / "run.json").write_text(json.dumps({"arguments": {"seed": 5 + i}}))
            take(folders[-1], method, 60.0 + i)
    return folders


def test_the_spread_between_seeds_and_what_it_says_about_two_runs(tmp_path):
    losses = {
        "wd0": [3.40, 3.42, 3.44],  # standard deviation 0.02
        "uniform": [3.30, 3.30, 3.30],
        "alphadecay": [3.28, 3.30, 3.32],
    }
    folders = runs_of(tmp_path, losses)
    measured = quickstart.measure(folders)
    assert measured["seeds"] == [5, 6, 7] and measured["seconds"]["uniform"] == 60.0
    assert measured["methods"]["wd0"]["eval_loss"] == pytest.approx({"mean": 3.42, "sd": 0.02})
    # Both differences vary by 0.02, with 4 degrees of freedom in all: Student's t is 2.7764.
    assert measured["limit"] == pytest.approx(2.7764 * 0.02, rel=1e-4)
    paired = measured["paired_differences"]["uniform - wd0"]
    assert paired == pytest.approx({"mean": -0.12, "sd": 0.02})
    finals = {method: quickstart.final_evaluation(folders[0] / method) for method in losses}
    text = "\n".join(quickstart.table(finals, measured))
    assert re.search(r"no decay +3\.4000 +2\.00 +3\.4200 ± 0\.0200 +2\.00 ± 0\.00", text)
    assert (
        "uniform decay minus no decay: -0.1000, more than the spread (all seeds: -0.1200 ±" in text
    )
    assert (
        "AlphaDecay minus uniform decay: -0.0200, within the spread (all seeds: +0.0000 ±" in text
    )


def test_results_of_an_unfinished_run_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"eval_loss": 3.0}\n')
    with pytest.raises(SystemExit, match="is not finished"):
        quickstart.final_evaluation(tmp_path)


@pytest.mark.parametrize("script, name", [("quickstart.sh", "llama"), ("quickstart_vit.sh", "vit")])
def test_the_committed_spread_was_measured_with_the_commands_of_the_script(tmp_path, script, name):
    """A changed setting needs a new measurement: the printed spread would be of another one."""
    stub = tmp_path / "venv/bin/python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB.format(log=tmp_path / "calls"))
    stub.chmod(0o755)
    (tmp_path / "venv/installed").write_text("same\n")
    surroundings = os.environ | {"PYTHON": str(stub), "ALPHADECAY_VENV": str(tmp_path / "venv")}
    surroundings.pop("SEED", None)
    words = ["bash", str(ROOT / "scripts" / script), str(tmp_path / "runs")]
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = [line.split("\x1f")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    # python scripts/quickstart.py step FOLDER MEASURED NAME TITLE PRODUCT COMMAND...
    steps = {call[4]: call[7:] for call in calls if call[1] == "step"}
    measured = quickstart.read_json(ROOT / f"results/quickstart/{name}.json")
    assert measured["commands"]["report"][-1].endswith("/report.html")
    folder = measured["commands"]["report"][-1].removesuffix("/report.html")
    recorded = {
        step: [word.replace(folder, str(tmp_path / "runs")) for word in command]
        for step, command in measured["commands"].items()
    }
    assert steps == recorded and list(steps) == list(measured["seconds"])
    assert len(measured["seeds"]) >= 4 and measured["seeds"][0] == 5
