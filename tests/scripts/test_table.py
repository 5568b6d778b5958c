"""Tables from run folders, the scripts that make them, and the pool that spreads their runs."""

import csv
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alphadecay.cli.flags import add_flags
from alphadecay.cli.presets import method_name, parse_arguments
from peft_pretraining.cli.llama import complete, llama_parser
from peft_pretraining.cli.vit import vit_parser
from peft_pretraining.errors import UserError
from scripts.paper import cells, table
from scripts.paper.published import TABLES
from scripts.paper.results import Result, settings_of, to_frame
from scripts.pool import Pool
from tests.support import fork_server

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.stem for path in (ROOT / "scripts/tables").glob("*.sh") if path.stem != "table"
)
PATH = (
    f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # torchrun and python beside this python
)


def make_run(folder, words, loss=None, reference=None, **values):
    """A run folder as training leaves it; without a loss it is still training."""
    parser = llama_parser()
    add_flags(parser)
    args = parse_arguments(
        parser, ["--model_config", "configs/llama_60m.json", *shlex.split(words)]
    )
    complete(args, 1, method_name(vars(args)))
    place = Path(folder) / f"{args.name}-{len(list(Path(folder).glob('*')))}"
    place.mkdir(parents=True)
    (place / "run.json").write_text(
        json.dumps({"name": args.name, "arguments": vars(args), "summary": values})
    )
    record = {"update_step": 1, "loss": 3.0}
    if loss is not None:
        record = {
            "update_step": 2,
            "eval_loss": loss,
            "perplexity": loss,
            "reference_perplexity": reference or loss,
            "final": True,
        }
    (place / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return place


def table_of(capsys, *words):
    args = list(map(str, words))
    sys_argv, sys.argv = sys.argv, ["table.py", *args]
    try:
        table.main()
    finally:
        sys.argv = sys_argv
    return capsys.readouterr().out


def row_of(text, name):
    return next(
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith(f"| {name} |")
    )


def test_means_spreads_published_values_and_missing_cells(tmp_path, capsys):
    for seed, loss in ((5, 33.0), (6, 33.5), (7, 34.6)):
        make_run(tmp_path, f"--method uniform --weight_decay 1e-5 --seed {seed}", loss, loss - 1)
    make_run(tmp_path, "--method alphadecay --weight_decay 1e-5", 32.5, 31.6)
    make_run(tmp_path, "--weight_decay 0", 35.0, 33.25)
    going_on = make_run(tmp_path, "--method awd --weight_decay 1e-5")
    (going_on / "metrics.jsonl").write_text(
        '{"update_step": 2, "eval_loss": 3.0, "perplexity": 20.1, "final": false}'
    )
    text = table_of(capsys, tmp_path, "--table", "adam", "--csv", tmp_path / "adam.csv")
    columns = row_of(text, "method")
    assert (
        row_of(text, "uniform")[columns.index("60m 1e-05")]
        == "33.70 ± 0.82 [3] (32.70 ± 0.82 / 32.39)"
    )
    assert row_of(text, "alphadecay")[columns.index("60m 1e-05")] == "32.50 [1] (31.60 / 31.56)"
    for decay in ("1e-05", "5e-06", "1e-06"):  # no decay stands beside each
        assert row_of(text, "wd0")[columns.index(f"60m {decay}")] == "35.00 [1] (33.25 / 33.23)"
    assert row_of(text, "awd")[columns.index("60m 1e-05")] == "(– / 33.78)"
    assert row_of(text, "adadecay-module")[columns.index("1b 5e-06")] == "(– / 18.14)"
    assert "Missing (55): " in text and "awd 60m 1e-05;" in text and "Not finished: " in text
    lines = list(csv.DictReader((tmp_path / "adam.csv").open()))
    assert len(lines) == 60 and sum(int(line["runs"]) for line in lines) == 7
    uniform = next(
        line
        for line in lines
        if (line["method"], line["model"], line["weight_decay"]) == ("uniform", "60m", "1e-05")
    )
    assert (
        float(uniform["perplexity_std"]) == pytest.approx(statistics.stdev([33.0, 33.5, 34.6]))
        and uniform["published"] == "32.39"
    )


@pytest.mark.parametrize(
    "words, data, differs",
    [
        ("", "", ""),
        ("", "c4, 9 documents; validation: 1 documents; tokenizer t5-base", ""),
        ("--dataset pydocs --tokenizer bpe", "", "data pydocs, tokenizer bpe"),
        ("--dataset x", "news, 9 documents; tokenizer my/t5", "data news, tokenizer t5"),
        ("--lr 0.002 --max_length 128", "", "max_length 128, lr 0.002"),
        ("--num_training_steps 9000", "", "num_training_steps 9000, warmup_steps 900"),
        ("--total_batch_size 64 --grad_clipping 1", "", "total_batch_size 64, grad_clipping 1.0"),
        (
            "--dtype float32 --packing --lr 1 --min_lr_ratio 0",
            "",
            "min_lr_ratio 0.0, packing True, dtype float32 and 1 more",
        ),
        ("--method alphadecay --wd_max_ratio 5", "", "wd_max_ratio 5.0"),
        ("--method alphadecay --wd_max_ratio 3", "", ""),
    ],
)
def test_published_numbers_stand_beside_comparable_runs_only(
    words, data, differs, tmp_path, capsys
):
    place = make_run(tmp_path, words or "--method uniform", 33.0, 32.0)
    info = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps(info | {"data": data}))
    text = table_of(capsys, tmp_path, "--table", "adam")
    name = "alphadecay" if "alphadecay" in words else "uniform"
    cell = row_of(text, name)[row_of(text, "method").index("60m 1e-05")]
    published = {"alphadecay": 31.56, "uniform": 32.39}[name]
    assert cell == "33.00 [1] " + (
        f"(not as published: {differs})" if differs else f"(32.00 / {published})"
    )


def test_a_rehearsal_is_called_one(tmp_path, capsys):
    make_run(tmp_path, "--method uniform --tags 'rehearses 60m'", 33.0)
    text = table_of(capsys, tmp_path, "--table", "adam")
    columns = row_of(text, "method")
    assert row_of(text, "uniform")[columns.index("60m 1e-05")] == "33.00 [1] (rehearsal)"


def test_a_table_without_its_baseline_is_printed(tmp_path, capsys):
    """As after `controls.sh --only shuffled`."""
    make_run(tmp_path, "--method shuffled --weight_decay 5e-6", 30.0)
    text = table_of(capsys, tmp_path, "--table", "controls")
    assert row_of(text, "shuffled")[1] == "30.00 [1]"
    assert "No differences: there is no finished run of uniform" in text


def test_a_cell_without_a_difference_says_why(tmp_path, capsys):
    make_run(tmp_path, "--method uniform --seed 5", 30.0)
    make_run(tmp_path, "--method shuffled --seed 6", 31.0)
    make_run(tmp_path, "--method inverted --seed 5 --optimizer adamw", 31.0)
    text = table_of(capsys, tmp_path, "--columns", "optimizer", "--against", "uniform")
    differences, columns = text.split("minus that of")[1], row_of(text, "method")
    shuffled, inverted = (row_of(differences, name) for name in ("shuffled", "inverted"))
    assert shuffled[columns.index("adam")] == "no common seed: 6, uniform 5"
    assert inverted[columns.index("adamw")] == "no run of uniform"


def test_a_damaged_run_is_named(tmp_path, capsys):
    (make_run(tmp_path, "--method uniform", 30.0) / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is not valid JSON: repair it"):
        table_of(capsys, tmp_path)


@pytest.mark.parametrize(
    "words, name",
    [
        ("--use_modulewise_wd", "inverted"),
        ("--use_modulewise_wd --alpha_positively_with_WD --esd_metric_for_tb gradnorm", "gradnorm"),
        ("", "uniform"),
        ("--use_modulewise_wd --alpha_positively_with_WD", "alphadecay"),
    ],
)
def test_rows_are_named_by_what_was_computed(words, name, tmp_path, capsys):
    """Four runs by published flags alone."""
    make_run(tmp_path, words, 30.0)
    assert row_of(table_of(capsys, tmp_path), name)[1] == "30.00 [1]"


def test_differences_are_paired_by_seed(tmp_path, capsys):
    for seed, base, difference in (
        (5, 30.0, -0.5),
        (6, 33.0, -0.7),
        (7, 31.0, -0.9),
        (8, 20.0, None),
    ):
        make_run(tmp_path, f"--method uniform --seed {seed}", base)
        if difference:
            make_run(tmp_path, f"--method inverted --seed {seed}", base + difference)
    text = table_of(capsys, tmp_path, "--columns", "optimizer", "--against", "uniform")
    half = 4.302653 * 0.2 / 3**0.5  # the 97.5 % quantile of Student's t with 2 degrees of freedom
    assert (
        row_of(text.split("minus that of")[1], "inverted")[1]
        == f"-0.70 [{-0.7 - half:+.2f}, {-0.7 + half:+.2f}]"
    )


@pytest.mark.parametrize("seed", [5, 6])
def test_two_different_runs_of_one_cell_are_refused(seed, tmp_path, capsys):
    """Whatever their seeds: a mean over them would be of nothing."""
    make_run(tmp_path, "--method uniform --weight_decay 1e-5 --seed 5", 30.0)
    make_run(tmp_path, f"--method uniform --weight_decay 1e-4 --seed {seed}", 29.0)
    with pytest.raises(
        UserError,
        match="differ in weight_decay: give --where weight_decay=VALUE, --pick weight_decay",
    ):
        table_of(capsys, tmp_path, "--columns", "optimizer")
    assert row_of(
        table_of(capsys, tmp_path, "--columns", "optimizer", "--where", "weight_decay=1e-5"),
        "uniform",
    )[1].startswith("30.00")
    assert row_of(
        table_of(capsys, tmp_path, "--columns", "optimizer", "--where", "weight_decay=1e-4"),
        "uniform",
    )[1].startswith("29.00")


def test_runs_of_other_places_are_of_one_cell_and_the_same_run_is_not_counted_twice(
    tmp_path, capsys
):
    make_run(tmp_path, "--method uniform --dataset /here/c4 --batch_size 64 --seed 5", 30.0)
    make_run(tmp_path, "--method uniform --dataset /there/c4 --workers 1 --seed 6", 32.0)
    saving = "--save_every_minutes 5 --timeout_minutes 30"
    make_run(tmp_path, f"--method uniform --dataset /there/c4 {saving} --seed 7", 31.0)
    assert (
        row_of(table_of(capsys, tmp_path, "--columns", "optimizer"), "uniform")[1]
        == "31.00 ± 1.00 [3]"
    )
    make_run(tmp_path, "--method uniform --dataset /there/c4 --seed 6", 32.0)
    with pytest.raises(UserError, match="are the same run: leave one of them out"):
        table_of(capsys, tmp_path, "--columns", "optimizer")
    make_run(tmp_path / "more", "--method awd --dataset /there/wikipedia --seed 5", 30.0)
    make_run(tmp_path / "more", "--method awd --dataset /there/c4 --seed 6", 30.0)
    with pytest.raises(UserError, match="differ in dataset"):
        table_of(capsys, tmp_path / "more", "--columns", "optimizer")


def test_of_each_cell_the_best_value_is_picked(tmp_path, capsys):
    for eta, loss in (("1e-5", 30.0), ("1e-4", 29.0)):
        make_run(tmp_path, f"--method uniform --weight_decay {eta}", loss)
        make_run(tmp_path, f"--method awd --weight_decay {eta}", 60 - loss)
    text = table_of(capsys, tmp_path, "--columns", "optimizer", "--pick", "weight_decay")
    assert row_of(text, "uniform")[1] == "29.00 [1]" and row_of(text, "awd")[1] == "30.00 [1]"


def test_the_best_value_is_that_of_the_seeds_they_share(tmp_path, capsys):
    for eta, seed, loss in (("1e-5", 5, 30.0), ("1e-4", 5, 29.0), ("1e-5", 6, 10.0)):
        make_run(tmp_path, f"--method uniform --weight_decay {eta} --seed {seed}", loss)
    assert (
        table_of(capsys, tmp_path, "--where", "method=uniform", "--best", "weight_decay")
        == "0.0001\n"
    )
    text = table_of(capsys, tmp_path, "--columns", "seed", "--where", "weight_decay=1e-4,1e-3")
    assert row_of(text, "method")[1:] == ["5"] and row_of(text, "uniform")[1:] == ["29.00 [1]"]
    with pytest.raises(UserError, match="none of the runs"):
        table_of(capsys, tmp_path, "--where", "method=awd", "--best", "weight_decay")


def test_variants_of_a_method_stay_out_of_the_tables_of_others(tmp_path, capsys):
    make_run(tmp_path, "--method alphadecay --weight_decay 1e-5 --esd_metric_for_tb fnorm", 30.0)
    make_run(tmp_path, "--method adadecay-module --weight_decay 1e-5", 31.0)
    text = table_of(capsys, tmp_path, "--table", "adam")
    columns = row_of(text, "method")
    assert row_of(text, "alphadecay")[columns.index("60m 1e-05")] == "(– / 31.56)"
    assert row_of(text, "adadecay-module")[columns.index("60m 1e-05")].startswith("31.00")


def test_runs_without_decay_alone_keep_their_column(tmp_path, capsys):
    make_run(tmp_path, "--weight_decay 0", 35.0)
    text = table_of(capsys, tmp_path, "--columns", "weight_decay")
    assert row_of(text, "method")[1] == "0" and row_of(text, "wd0")[1] == "35.00 [1]"


def test_an_export_of_wandb(tmp_path, capsys):
    export = tmp_path / "wandb.csv"
    name = {
        "arguments.method": "alphadecay",
        "arguments.optimizer": "adamw",
        "arguments.weight_decay": "0.1",
        "arguments.seed": "5",
    }
    switches = {
        f"arguments.{switch}": "False" for switch in ("iso_budget", "adamc", "cautious_decay")
    }
    row = {
        "Name": "a",
        "State": "finished",
        **name,
        **switches,
        "perplexity": "31.4",
        "final_eval_loss": "3.4",
        "eval_loss": "3.4",
    }
    with export.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
        writer.writerow(row | {"arguments.seed": "6", "perplexity": "32.4"})
        writer.writerow(row | {"State": "running", "arguments.seed": "7", "perplexity": "99"})
    text = table_of(capsys, export, "--columns", "optimizer")
    assert (
        row_of(text, "alphadecay") == ["alphadecay", "31.90 ± 0.71 [2]"]
        and "Not finished: " in text
    )


def test_evaluations_on_other_text(tmp_path, capsys):
    run = make_run(tmp_path, "--method uniform", 30.0)
    (run / "evaluations.jsonl").write_text(
        json.dumps({"documents": "c4", "eval_loss": 4.0, "perplexity": 54.6}) + "\n"
    )
    assert (
        row_of(
            table_of(capsys, tmp_path, "--columns", "optimizer", "--measure", "c4:perplexity"),
            "uniform",
        )[1]
        == "54.60 [1]"
    )


# -------------------------------------------------------------------------------------- the scripts


def commands_of(name):
    """The arguments of each command that a table's script prints."""
    data = ["--data", "IMAGENET"] if name == "vit" else []
    words = ["bash", f"scripts/tables/{name}.sh", "--dry_run", *data]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_table_script_names_its_cells(name):
    """A table's script prints commands that are accepted and belong to its table.

    Each command has a folder of its own, and every published cell has a command.
    """
    layout, results, folders = TABLES[name], [], set()
    for words in commands_of(name):
        assert words[:2] == ["torchrun", "--standalone"]
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        is_vit = words[script] == "main_vit.py"
        parser = vit_parser() if is_vit else llama_parser()
        add_flags(parser)
        args = parse_arguments(parser, words[script + 1 :])
        if not is_vit:
            args = complete(args, int(words[2].split("=")[1]), "any")
        results.append(Result("", settings_of(vars(args)), {"eval_loss": 1.0}))
        folders.add(args.output_dir if is_vit else args.save_dir)
    assert len(folders) == len(results)
    runs = cells.filter_runs(to_frame(results), layout.where, layout.may_vary)
    assert len(runs) == len(results)
    by_cell = cells.finished_runs_by_cell(runs, layout)
    by_cell = cells.repeat_baseline_in_every_column(by_cell, layout)
    found = set(by_cell[cells.label_names(layout)].itertuples(index=False, name=None))
    assert set(layout.published) <= found


@pytest.mark.slow
def test_a_rehearsed_table_killed_in_the_middle_goes_on(tmp_path):
    """`fit.sh` is killed, ended by SIGTERM and started again, and repeats no finished run."""
    words = [
        "bash",
        "scripts/tables/fit.sh",
        "--scale",
        "0.001",
        "--only",
        "60m",
        "--runs",
        str(tmp_path),
    ]
    settings = dict(cwd=ROOT, env=os.environ | {"PATH": PATH}, text=True)
    begun = settings | dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    first = subprocess.Popen(words, **begun)
    assert any(line.startswith("[1/3] done") for line in first.stdout)
    for pid in (*fork_server.descendants(first.pid), first.pid):
        fork_server.kill(pid)
    first.communicate()
    finished = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.glob("*/run.json")
        if "summary" in json.loads(path.read_text())
    }
    assert len(finished) in (1, 2)  # on a busy machine another one ends before the kill

    second = subprocess.Popen(words, **begun)
    assert any(" TFLOP/s (" in line for line in second.stdout)
    started = fork_server.descendants(second.pid)
    second.terminate()
    second.communicate(timeout=60)
    assert (
        second.returncode == 1
        and len(started) > 2
        and not any(fork_server.is_running(pid) for pid in started)
    )

    third = subprocess.run(words, capture_output=True, timeout=240, **settings)
    assert third.returncode == 0, third.stdout + third.stderr
    for path, before in finished.items():
        assert path.stat().st_mtime_ns == before
        assert f"{path.parent} is finished" in third.stdout
    assert "Rehearsed at a small scale" in third.stdout
    for fit in ("median", "goodness-of-fit", "fix-finger"):
        assert row_of(third.stdout, fit)[1].split(" [1]")[0].replace(".", "").isdigit()


@pytest.mark.parametrize(
    "words, names",
    [
        ("--method uniform --decay 1e-5", "--model"),
        ("--model 61m --method uniform --decay 1e-5", "61m"),
        ("--model 60m --decay 1e-5", "--method"),
        ("--model 60m --method uniform", "--decay"),
        ("--model 60m --method uniform --decay much", "much"),
        ("--model 60m --method wd0 --decay 1e-5", "wd0"),
        ("--model 60m --method uniform --decay 1e-5 --processes 3", "--processes 3"),
        ("--model vit --method uniform --decay 1e-6", "--data"),
        ("--model 60m --method uniform --decay 1e-5 --lr", "--lr needs a value"),
        ("--model 60m --method uniform --decay 1e-5 --scale 2", "--scale 2"),
        ("--model 60m --method uniform --decay 1e-5 --dtype float32", "--dtype"),
    ],
)
def test_run_refuses_in_a_sentence(words, names):
    done = subprocess.run(
        ["bash", "scripts/run.sh", "--dry_run", *words.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "error: " in done.stderr and done.stderr.count("\n") == 1 and names in done.stderr


# ----------------------------------------------------------------------------------------- the pool


def pool(lines, *words, **settings):
    command = [sys.executable, "scripts/pool.py", *words]
    return subprocess.run(
        command,
        input="\n".join(lines),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **settings,
    )


def test_the_pool_fills_its_slots_and_names_what_failed(tmp_path):
    line = (
        f"bash -c 'echo $CUDA_VISIBLE_DEVICES > {tmp_path}/{{}}; until test -e {tmp_path}/{{}}; do "
        f"sleep 0.05; done; exit {{}}'"
    )
    done = pool(
        [line.format("a", "b", 0), line.format("b", "a", 3), line.format("c", "a", 0)],
        "--gpus",
        "2,3",
        "4",
    )
    assert done.returncode == 1 and done.stdout.count("] done in") == 2
    assert (
        len(done.stderr.splitlines()) == 1
        and "exit 3" in done.stderr
        and done.stderr.startswith("failed: ")
    )
    assert {(tmp_path / name).read_text().strip() for name in "ab"} == {"2,3", "4"}


def test_commands_on_one_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Pool([None] * 3).threads == {"OMP_NUM_THREADS": "2"} and Pool([None] * 9).threads == {
        "OMP_NUM_THREADS": "1"
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert Pool([None] * 3).threads == {"OMP_NUM_THREADS": "5"}


def test_the_pool_passes_a_signal_on(tmp_path):
    line = (
        f'bash -c \'trap "touch {tmp_path}/saved; exit 0" TERM; touch {tmp_path}/begun; while '
        "true; do sleep 0.05; done'"
    )
    running = subprocess.Popen(
        [sys.executable, "scripts/pool.py"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    running.stdin.write(f"{line}\ntouch {tmp_path}/never\n")
    running.stdin.close()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 1
    assert (tmp_path / "saved").exists() and not (tmp_path / "never").exists()
