"""The report page: every kind of run gives a page with the right numbers."""

import json
import os
import re

import pytest

from peft_pretraining.errors import UserError
from peft_pretraining.records.reader import read_run
from peft_pretraining.report.html import (
    comparison_row,
    result_rows,
    write_report,
)
from tests.support.run_folders import (
    ETA,
    LLAMA_TYPES,
    RUNS,
    history,
    llama_modules,
    metrics,
    parsed,
    small_run,
    tiny_run,
    vit_run,
    write_run,
)


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """Return a function that gives the report of a kind of run, which is written only once."""
    pages = {}

    def write(kind):
        if kind not in pages:
            folder = RUNS[kind][0](tmp_path_factory.mktemp("report") / "run")
            pages[kind] = write_report(folder)
            assert pages[kind] == folder / "report.html"
        return pages[kind]

    return write


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_run_gives_a_page(kind, page_of):
    path, figures = page_of(kind), RUNS[kind][1]
    text, _ = parsed(path)
    assert text.count("<figure>") == text.count("<svg ") == figures
    assert [int(n) for n in re.findall(r"Figure (\d+)\.", text)] == list(range(1, figures + 1))
    assert len(text) < 3_000_000
    assert [p.name for p in path.parent.iterdir() if "tmp" in p.name] == []


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
    lead = (
        "llama_9m · 9.61M parameters · decay by module (alpha, tb_linear_map, 0.6666 η to 3 η) · "
        "adam · η = 1e-05 · 1,000 updates · 131M tokens · cpu"
    )
    assert lead in words
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


def test_uniform_run_says_why_there_are_no_module_figures(tmp_path):
    run = write_run(tmp_path / "run", "u", metrics(100, 10, 50))
    _, words = parsed(write_report(run))
    assert "No figures of single modules: this run set no decay by module" in words
    assert "uniform weight decay" in words
    (run / "modules.jsonl").write_text("")
    assert parsed(write_report(run))[1] == words


def test_changing_decay_without_modules_is_not_called_uniform(tmp_path):
    lines = metrics(100, 10, 50)
    lines[0]["weight_decay"] = 3 * ETA
    _, words = parsed(write_report(write_run(tmp_path / "run", "awd", lines)))
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
    text, words = parsed(write_report(run))
    assert "<b onload" not in text
    assert f"{evil} 0.5000" in words
    text, _ = parsed(write_report(run, tiny_run(tmp_path / "other", name="_hidden")))
    assert "<b onload" not in text


@pytest.mark.parametrize(
    "torn", ['{"update_step": 999, "lo', '{"update_step": 999, "lo\n', '"\x00\x00\x00', "{\ufffd"]
)
def test_an_incomplete_last_line_is_ignored(torn, tmp_path):
    run = tiny_run(tmp_path / "run")
    whole = write_report(run).read_text()
    for name in ("metrics.jsonl", "modules.jsonl"):
        with (run / name).open("a") as file:
            file.write(torn)
    assert write_report(run).read_text() == whole


def test_comparison_sets_runs_side_by_side(tmp_path):
    first = small_run(tmp_path / "a", "AlphaDecay")
    second = write_run(
        tmp_path / "b", "uniform", metrics(1000, 10, 100, floor=3.4, seed=1), arguments={"seed": 6}
    )
    path = write_report(first, second)
    text, words = parsed(path)
    # A uniform run has no analyses, so their time is missing.
    assert "share" in words and "5,123 0.6 1.2 %" in words and "5,123 – –" in words
    assert path == first / "comparison.html" and not (first / "report.html").exists()
    assert text.count("<svg ") == 1
    for label, floor, seed in (("AlphaDecay", 3.3, 0), ("uniform", 3.4, 1)):
        final = metrics(1000, 10, 100, floor=floor, seed=seed)[-1]
        row = re.search(rf"<tr><th>{label}</th>.*?</tr>", text).group()
        numbers = (
            f"{final['eval_loss']:.4f}",
            f"{final['perplexity']:.2f}",
            f"{final['reference_perplexity']:.2f}",
        )
        assert "".join(f"<td>{number}</td>" for number in numbers) in row
    assert "Arguments that differ" in words and "seed – 6" in words


def test_comparison_of_runs_with_one_name_tells_them_apart(tmp_path):
    one, two = small_run(tmp_path / "a", "same"), small_run(tmp_path / "b", "same")
    words = parsed(write_report(one, two))[1]
    assert "a vs. b" in words


def test_a_run_without_metrics_is_left_out_of_a_comparison(tmp_path):
    one, two = small_run(tmp_path / "a", "one"), small_run(tmp_path / "b", "two")
    empty = write_run(tmp_path / "empty", "empty", [])
    for folders in ((one, empty, two), (empty, one, two)):
        words = parsed(write_report(*folders, output=tmp_path / "page.html"))[1]
        assert "one vs. two" in words
        assert f"Left out: {empty / 'metrics.jsonl'} holds no logged update" in words
    words = parsed(write_report(one, empty))[1]
    assert "Left out:" in words and (one / "comparison.html").exists()
    with pytest.raises(UserError, match="holds no logged update"):
        write_report(empty, empty)


def test_the_method_is_described_as_the_run_recorded_it(tmp_path):
    run = small_run(tmp_path / "a")
    info = json.loads((run / "run.json").read_text())
    info |= {"method": "inverted", "method_details": "28 of 28 matrices balanced"}
    (run / "run.json").write_text(json.dumps(info))
    assert "inverted: 28 of 28 matrices balanced" in parsed(write_report(run))[1]


def test_accuracies_are_shown_for_image_classifiers_only(tmp_path):
    one, two = vit_run(tmp_path / "a", "one"), vit_run(tmp_path / "b", "two")
    language = small_run(tmp_path / "c", "three")
    assert "Figure 2. Validation accuracy." in parsed(write_report(one))[1]
    assert "Figure 2. Top-1 validation accuracy" in parsed(write_report(one, two))[1]
    assert "accuracy" not in parsed(write_report(language, small_run(tmp_path / "d")))[1]


def test_the_records_are_searched_for_their_unit_once(tmp_path, monkeypatch):
    """Once, not once for each line: with that, a report took 57 s for 20,000 lines."""
    run = read_run(write_run(tmp_path / "run", "long", metrics(5000, 1, 1000)))
    looked_at = []

    class Counted(dict):
        def __contains__(self, key):
            looked_at.append(key)
            return super().__contains__(key)

    run.training = [Counted(line) for line in run.training]
    result_rows(run)
    assert len(looked_at) < 10 * 5000


def test_comparison_of_unequal_runs(tmp_path):
    folders = [
        RUNS[kind][0](tmp_path / str(i))
        for i, kind in enumerate(("one evaluation", "one line", "small", "flagged"))
    ]
    _, words = parsed(write_report(*folders, output=tmp_path / "all.html"))
    assert "Latest, not final, evaluation: line." in words


def test_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "run")
    (run / "report.html").write_text("old")

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="Cannot write .*disk full"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert sorted(p.name for p in run.iterdir()) == [
        "metrics.jsonl",
        "modules.jsonl",
        "report.html",
        "run.json",
    ]


def test_mfu_is_that_of_the_summary_or_the_median_of_logged_updates(tmp_path):
    lines = [
        line | {"mfu": mfu}
        for line, mfu in zip(metrics(60, 20, 100)[:3], (0.1, 0.25, 0.3), strict=True)
    ]
    running = read_run(write_run(tmp_path / "running", "running", lines, summary=False))
    assert ("MFU", "25.0 %") in result_rows(running) and comparison_row(running)["MFU"] == "25.0 %"
    running.info["summary"] = {"mfu": 0.4}
    assert ("MFU", "40.0 %") in result_rows(running)
    assert "MFU" not in dict(result_rows(read_run(tiny_run(tmp_path / "tiny"))))
