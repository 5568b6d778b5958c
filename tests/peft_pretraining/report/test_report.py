"""The report page: every kind of run gives a page with the right numbers, and bad input gives one sentence."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from peft_pretraining import report
from peft_pretraining.errors import UserError

LLAMA_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
ETA = 1e-5
INFINITE = '{"update_step": Infinity, "step": NaN, "loss": 1.0}'  # Python writes and reads these, though JSON has no such numbers


def llama_modules(blocks):
    """(module, type, block) of a LLaMA with that many blocks, in named_modules() order."""
    owner = {kind: "self_attn" if kind in LLAMA_TYPES[:4] else "mlp" for kind in LLAMA_TYPES}
    return [
        (f"model.layers.{b}.{owner[kind]}.{kind}", kind, f"model.layers.{b}")
        for b in range(blocks)
        for kind in LLAMA_TYPES
    ]


def resnet_modules():
    """(module, type, block) as a ResNet and a ViT name them: a stem and a head outside the blocks, not every type in every block."""
    names = [("conv1", "conv1", None)]
    for stage in range(1, 5):
        for i in range(3):
            block = f"layer{stage}.{i}"
            names += [(f"{block}.conv{c}", f"conv{c}", block) for c in (1, 2, 3)]
            names += [(f"{block}.downsample.0", "downsample", block)] if i == 0 else []
    for i in range(3):
        names += [
            (f"blocks.{i}.{part}", part.split(".")[-1], f"blocks.{i}")
            for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ]
    return [*names, ("fc", "fc", None)]


def history(modules, steps, last, seed=0):
    """Lines of modules.jsonl whose alphas start near a Gaussian's and part as training goes on; the first module is not balanced."""
    rng = np.random.default_rng(seed)
    kinds = list(dict.fromkeys(kind for _, kind, _ in modules))
    offset = rng.normal(0, 0.12, len(modules))
    lines = []
    for step in steps:
        learnt = 1 - math.exp(-3 * step / max(last, 1))
        depth = np.linspace(-1, 1, len(modules))
        start = np.array([2.12 if kinds.index(kind) < 4 else 2.99 for _, kind, _ in modules])
        end = (
            np.array([1.9 + 0.28 * kinds.index(kind) for _, kind, _ in modules])
            + 0.35 * depth**2
            + offset
        )
        alpha = start + learnt * (end - start) + rng.normal(0, 0.015, len(modules))
        decay = ETA * (0.6666 + (alpha - alpha.min()) / (np.ptp(alpha) or 1) * (3 - 0.6666))
        for i, (name, kind, block) in enumerate(modules):
            lines.append({
                "step": step, "module": name, "type": kind, "block": block, "balanced": i > 0, "alpha": float(alpha[i]), "D": 0.05,
                "spectral_norm": 3.1, "score": float(alpha[i]), "weight_decay": float(decay[i]) if i else ETA, "reason": None,
            })  # fmt: skip
    return lines


def metrics(steps, log_every, eval_every, floor=3.3, seed=0, tokens=131072, mean_decay=1.4 * ETA):
    """Lines of metrics.jsonl of a finished run: a power-law loss with noise, warm-up and cosine, a final evaluation."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(log_every, steps + 1, log_every):
        true = floor + 7 * (1 + step / (0.004 * steps)) ** -0.6
        rate = 1e-3 * min(step / (0.1 * steps), 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        lines.append({
            "update_step": step, "loss": true + rng.normal(0, 0.05), "lr": rate, "weight_decay": mean_decay, "tokens_seen": step * tokens,
            "throughput_tokens": 5000 + rng.normal(0, 50), "grad_norm": 0.7, "seconds": step * 26.0,
        })  # fmt: skip
        if step % eval_every == 0 or step == steps:
            lines.append(evaluation(step, true + 0.02, final=step == steps))
    return lines


def evaluation(step, loss, final):
    """An evaluation line over 100 batches."""
    return {"update_step": step, "eval_loss": loss, "perplexity": math.exp(loss), "reference_perplexity": math.exp(loss * 100 / 101),
            "eval_tokens": 200000, "eval_seconds": 3.2, "final": final}  # fmt: skip


def write_run(folder, name, lines, modules=(), arguments=None, summary=True):
    """Write the three files of a run and return its folder."""
    folder.mkdir(parents=True)
    info = {
        "name": name,
        "arguments": {"model_config": "configs/llama_9m.json", "optimizer": "adam", "weight_decay": ETA, "wd_min_ratio": 0.6666,
                      "wd_max_ratio": 3, "esd_metric_for_tb": "alpha", "assign_func": "tb_linear_map", **(arguments or {})},
        "model_config": {"hidden_size": 128, "model_type": "llama"}, "versions": {"torch": "2.9.0"}, "device": "cpu",
        "git_commit": "abc123", "parameters": 9_612_345, "started": "2026-01-01T00:00:00",
    }  # fmt: skip
    if summary:
        info["summary"] = {
            "tokens_per_second": 5123.4,
            "analyses": 20,
            "analysis_seconds": 12.0,
            "analysis_share": 0.0123,
        }
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if modules:
        (folder / "modules.jsonl").write_text("".join(json.dumps(line) + "\n" for line in modules))
    return folder


def small_run(folder, name="llama 9m"):
    """4 blocks, 1000 updates, an analysis every 50."""
    return write_run(
        folder, name, metrics(1000, 10, 100), history(llama_modules(4), range(0, 1001, 50), 1000)
    )


def tiny_run(folder, name="tiny"):
    """1 block, 100 updates, an analysis at the start: for tests that draw often."""
    return write_run(folder, name, metrics(100, 20, 50), history(llama_modules(1), [0], 100))


def nulls_and_flags(folder):
    """Alphas that are null in some modules and updates, with reasons; one module never gets one; fields missing; a NaN loss."""
    modules = history(llama_modules(4), range(0, 1001, 100), 1000)
    for i, line in enumerate(modules):
        if line["module"].endswith("2.self_attn.k_proj") or i % 23 == 5:
            line.update(
                alpha=None,
                D=None,
                score=None,
                weight_decay=ETA,
                reason="spectrum is <degenerate> & flat",
            )
        if i % 31 == 7:
            del line["D"], line["spectral_norm"]
    lines = metrics(1000, 10, 100)
    lines[50]["loss"] = None
    lines[53]["loss"] = math.nan
    return write_run(folder, "flagged", lines, modules)


def large_run(folder):
    """350M: 24 blocks, 168 modules, 60,000 updates, an analysis every 500."""
    return write_run(
        folder,
        "llama 350m",
        metrics(60000, 20, 1000),
        history(llama_modules(24), range(0, 60001, 500), 60000),
    )


def gradnorm_run(folder):
    """A run scored by the gradient's norm: no alpha anywhere."""
    modules = history(llama_modules(4), range(0, 1001, 100), 1000)
    for line in modules:
        line.update(alpha=None, score=line["score"] / 10)
    return write_run(
        folder, "by gradient", metrics(1000, 10, 100), modules, {"esd_metric_for_tb": "gradnorm"}
    )


RUNS = {
    # name: (writer, figures on the page)
    "small": (small_run, 5),
    "large": (large_run, 5),
    "resnet": (lambda f: write_run(f, "resnet", metrics(500, 10, 100), history(resnet_modules(), range(0, 501, 50), 500)), 5),
    "uniform": (lambda f: write_run(f, "uniform", metrics(1000, 10, 100, floor=3.4, seed=1, mean_decay=ETA)), 1),
    "flagged": (nulls_and_flags, 5),
    "gradnorm": (gradnorm_run, 5),
    "one evaluation": (lambda f: write_run(f, "one", [evaluation(3, 9.5, True)], history(llama_modules(4), [0], 3), summary=False), 4),
    "one line": (lambda f: write_run(f, "line", metrics(10, 10, 99)[:1], history(llama_modules(4), [0], 3), summary=False), 4),
    "one module": (lambda f: write_run(f, "tiny", metrics(20, 10, 10), [{**line, "balanced": True} for line in
                   history(llama_modules(1)[:1], [0, 10], 20)]), 5),
}  # fmt: skip


class Wellformed(HTMLParser):
    """Checks that tags are closed in order, and gathers ids, references and text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.note(attributes)

    def handle_startendtag(self, tag, attributes):
        self.note(attributes)

    def note(self, attributes):
        for key, value in attributes:
            self.ids += [value] if key == "id" else []
            self.references += re.findall(r"url\(#([^)]+)\)", value or "") + (
                [value[1:]] if key.endswith("href") else []
            )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parsed(path):
    """The page after the checks that hold for every page: closed tags, unique ids, no dangling reference, nothing from outside."""
    text = path.read_text(encoding="utf-8")
    reader = Wellformed()
    reader.feed(text)
    assert not reader.open
    assert len(reader.ids) == len(set(reader.ids))
    assert set(reader.references) <= set(reader.ids)
    assert "<script" not in text and "<image" not in text and "@import" not in text
    assert re.findall(r'https?://(?!www\.w3\.org/)[^"\s<]+', text) == []
    assert report.FOREGROUND not in text and report.BACKGROUND not in text
    return text, " ".join(" ".join(reader.words).split())


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """A function kind -> path of the report of that kind of run, written once for all tests of this file."""
    pages = {}

    def write(kind):
        if kind not in pages:
            folder = RUNS[kind][0](tmp_path_factory.mktemp("report") / "run")
            pages[kind] = report.write_report(folder)
            assert pages[kind] == folder / "report.html"
        return pages[kind]

    return write


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_run_gives_a_page(kind, page_of):
    path, figures = page_of(kind), RUNS[kind][1]
    text, _ = parsed(path)
    assert text.count("<figure>") == text.count("<svg ") == figures
    assert [int(n) for n in re.findall(r"Figure (\d+)\.", text)] == list(range(1, figures + 1))
    assert len(text) < 3_000_000
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_page_holds_the_numbers_of_the_run(page_of):
    lines = metrics(1000, 10, 100)
    final = lines[-1]
    _, words = parsed(page_of("small"))
    assert f"final validation loss {final['eval_loss']:.4f}" in words
    assert f"final validation perplexity {final['perplexity']:.2f}" in words
    assert f"reference perplexity ¹ {final['reference_perplexity']:.2f}" in words
    assert "tokens seen 131,072,000 " in words
    assert "tokens per second 5,123 " in words
    assert "seconds of one analysis 0.6 " in words  # 12 s over 20 analyses
    assert "analysis, share of the run 1.2 % " in words
    lead = "llama_9m · 9.61M parameters · decay by module (alpha, tb_linear_map, 0.6666 η to 3 η) · adam · η = 1e-05 · 1,000 updates"
    assert f"{lead} · 131M tokens · cpu" in words
    for kind in LLAMA_TYPES:
        assert kind in words
    assert "hidden_size 128" in words and "torch 2.9.0" in words and "abc123" in words


def test_heat_map_prints_the_last_alpha_of_every_module(page_of):
    modules = history(llama_modules(4), range(0, 1001, 50), 1000)
    text, _ = parsed(page_of("small"))
    heat_map = text.split("<figure>")[4]
    printed = re.findall(r">(\d\.\d\d)</text>", heat_map)
    expected = [f"{line['alpha']:.2f}" for line in modules[-28:]]
    assert "Figure 4" in heat_map
    for value in set(expected):
        assert printed.count(value) >= expected.count(value)


def test_module_table_keeps_each_value_in_its_place(tmp_path):
    modules = history(llama_modules(4), [0, 500, 1000], 1000)
    held = report.module_table(
        modules[::-1]
    )  # the order of the lines in the file does not matter to where a value lands
    for line in modules:
        u, m = held.steps.tolist().index(line["step"]), held.names.index(line["module"])
        assert held.alpha[u, m] == line["alpha"] and held.decay[u, m] == line["weight_decay"]
        assert (held.types[m], held.rows[m], held.balanced[m]) == (
            line["type"],
            line["block"],
            line["balanced"],
        )


def test_uniform_run_says_why_there_are_no_module_figures(tmp_path):
    run = write_run(tmp_path / "run", "u", metrics(100, 10, 50))
    _, words = parsed(report.write_report(run))
    assert "No figures of single modules: this run set no decay by module" in words
    assert "uniform weight decay" in words
    (run / "modules.jsonl").write_text("")
    assert parsed(report.write_report(run))[1] == words


def test_changing_decay_without_modules_is_not_called_uniform(tmp_path):
    lines = metrics(100, 10, 50)
    lines[0]["weight_decay"] = 3 * ETA
    _, words = parsed(report.write_report(write_run(tmp_path / "run", "awd", lines)))
    assert "one decay for the whole network, changing over time" in words
    assert "uniform" not in words


def test_flagged_modules_are_listed_with_their_reason(page_of):
    text, words = parsed(page_of("flagged"))
    assert "model.layers.2.self_attn.k_proj spectrum is <degenerate> & flat 11 of 11 1,000" in words
    assert "spectrum is &lt;degenerate&gt; &amp; flat" in text and "<degenerate>" not in text


def test_run_without_alpha_shows_its_score(page_of):
    _, words = parsed(page_of("gradnorm"))
    assert "gradnorm of every balanced module" in words
    assert "α" not in words


def test_text_from_the_run_is_escaped(tmp_path):
    evil = '<b onload="x">$\\alpha$&'
    lines = metrics(100, 10, 50)
    lines[-1][evil] = 0.5
    modules = history(
        [(evil + name, evil, evil + block) for name, _, block in llama_modules(2)], [0, 50], 100
    )
    run = write_run(tmp_path / "run", evil, lines, modules, {evil: evil})
    text, words = parsed(report.write_report(run))
    assert "<b onload" not in text
    assert f"{evil} 0.5000" in words
    text, _ = parsed(report.write_report(run, tiny_run(tmp_path / "other", name="_hidden")))
    assert "<b onload" not in text


@pytest.mark.parametrize(
    "torn", ['{"update_step": 999, "lo', '{"update_step": 999, "lo\n', '"\x00\x00\x00', "{\ufffd"]
)
def test_torn_last_line_is_left_out(torn, tmp_path):
    run = tiny_run(tmp_path / "run")
    whole = report.write_report(run).read_text()
    for name in ("metrics.jsonl", "modules.jsonl"):
        with (run / name).open("a") as file:
            file.write(torn)
    assert report.write_report(run).read_text() == whole


@pytest.mark.parametrize("name", ["metrics.jsonl", "modules.jsonl"])
@pytest.mark.parametrize(
    "broken",
    [
        '{"update_step": 10, "lo',
        '{"loss": 3.0}',
        "[1, 2]",
        '{"update_step": "ten", "step": null}',
        INFINITE,
    ],
)
def test_broken_middle_line_names_file_and_line(name, broken, tmp_path):
    run = tiny_run(tmp_path / "run")
    lines = (run / name).read_text().splitlines()
    lines[4] = broken
    (run / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=re.escape(f"{run / name}, line 5: ")):
        report.write_report(run)
    assert not (run / "report.html").exists()


def test_steps_repeated_after_a_resume_count_once(tmp_path):
    run = report.read_run(
        write_run(tmp_path / "run", "r", metrics(100, 10, 50) + metrics(100, 10, 50, floor=9)[6:])
    )
    assert [row["update_step"] for row in run.training] == list(range(10, 101, 10))
    assert [row["loss"] > 8 for row in run.training] == [False] * 5 + [True] * 5
    assert [row["update_step"] for row in run.evaluations] == [50, 100]


def test_running_mean_follows_the_plain_definition():
    values = np.array([3.0, 1.0, math.nan, 5.0, 2.0, 8.0])
    for window in (3, 5, 9):
        reach = [
            min(window // 2, i, len(values) - 1 - i) for i in range(len(values))
        ]  # the same on both sides
        plain = [np.nanmean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]
        np.testing.assert_allclose(report.running_mean(values, window), plain)
    np.testing.assert_array_equal(
        report.running_mean(np.array([math.nan, 4.0]), 9), [math.nan, 4.0]
    )


def test_comparison_sets_runs_side_by_side(tmp_path):
    first = small_run(tmp_path / "a", "AlphaDecay")
    second = write_run(
        tmp_path / "b", "uniform", metrics(1000, 10, 100, floor=3.4, seed=1), arguments={"seed": 6}
    )
    path = report.write_report(first, second)
    text, words = parsed(path)
    assert (
        "share" in words and "5,123 0.6 1.2 %" in words and "5,123 – –" in words
    )  # a uniform run has no analysis to time
    assert path == first / "comparison.html" and not (first / "report.html").exists()
    assert text.count("<svg ") == 1
    for label, floor, seed in (("AlphaDecay", 3.3, 0), ("uniform", 3.4, 1)):
        final = metrics(1000, 10, 100, floor=floor, seed=seed)[-1]
        row = re.search(rf"<tr><th>{label}</th>.*?</tr>", text).group()
        assert (
            f"<td>{final['eval_loss']:.4f}</td><td>{final['perplexity']:.2f}</td><td>{final['reference_perplexity']:.2f}</td>"
            in row
        )
    assert "Arguments that differ" in words and "seed – 6" in words
    steps, difference = report.loss_difference(report.read_run(second), report.read_run(first))
    assert steps.tolist() == list(range(100, 1001, 100))
    np.testing.assert_allclose(difference, 0.1)


def test_comparison_of_runs_with_one_name_tells_them_apart(tmp_path):
    one, two = small_run(tmp_path / "a", "same"), small_run(tmp_path / "b", "same")
    runs = [report.read_run(folder) for folder in (one, two, two)]
    report.make_labels_unique(runs)
    assert [run.label for run in runs] == ["a", "b #2", "b #3"]


def test_comparison_of_unequal_runs(tmp_path):
    folders = [
        RUNS[kind][0](tmp_path / str(i))
        for i, kind in enumerate(("one evaluation", "one line", "small", "flagged"))
    ]
    _, words = parsed(report.write_report(*folders, output=tmp_path / "all.html"))
    assert "Latest, not final, evaluation: line." in words


def bad_folders(root):
    """(folder, a part of the message) for each kind of bad input."""
    empty, no_metrics, bad_info = root / "empty", root / "no_metrics", root / "bad_info"
    empty.mkdir()
    write_run(no_metrics, "x", [])
    small_run(bad_info)
    (bad_info / "run.json").write_text("{")
    unreadable = tiny_run(root / "unreadable")
    (unreadable / "metrics.jsonl").unlink()
    (unreadable / "metrics.jsonl").mkdir()
    return [
        (root / "none", "is not a folder"),
        (empty, "holds no run.json"),
        (no_metrics, "holds no logged step"),
        (bad_info, "not valid"),
        (unreadable, "Cannot read"),
    ]


def test_command_exit_codes(tmp_path, capsys):
    run = tiny_run(tmp_path / "run")
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert report.main([str(run), str(run), "--output", str(tmp_path / "both.html")]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!DOCTYPE html>")
    for folder, message in bad_folders(tmp_path):
        assert report.main([str(run), str(folder)]) == 2
        output = capsys.readouterr()
        assert message in output.err and str(folder) in output.err
        assert output.out == "" and output.err.count("\n") == 1
    assert report.main([str(run), "--output", str(tmp_path / "no" / "such" / "file.html")]) == 2
    assert "Cannot write" in capsys.readouterr().err


def test_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="Cannot write .*disk full"):
        report.write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_module_runs_as_a_command_and_imports_without_matplotlib(tmp_path):
    check = "import sys, peft_pretraining.report; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    root = Path(report.__file__).resolve().parents[1]
    assert (
        subprocess.run(
            [sys.executable, "-c", check], cwd=root, capture_output=True, text=True
        ).stdout
        == "False False\n"
    )
    command = [sys.executable, "-m", "peft_pretraining.report", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"{tmp_path / 'none'} is not a folder; give the folder of a run, the one that holds run.json.\n"
    )


def test_mfu_is_the_summarys_or_the_median_of_the_logged(tmp_path):
    lines = [
        line | {"mfu": mfu}
        for line, mfu in zip(metrics(60, 20, 100)[:3], (0.1, 0.25, 0.3), strict=True)
    ]
    running = report.read_run(write_run(tmp_path / "running", "running", lines, summary=False))
    assert ("MFU", "25.0 %") in report.result_rows(running) and report.comparison_row(running)[
        "MFU"
    ] == "25.0 %"
    running.info["summary"] = {"mfu": 0.4}
    assert ("MFU", "40.0 %") in report.result_rows(running)
    assert "MFU" not in dict(report.result_rows(report.read_run(tiny_run(tmp_path / "tiny"))))
