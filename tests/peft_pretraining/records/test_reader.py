"""Reading run folders: broken and missing files, repeated updates, values in their place."""

import math
import re

import pytest

from peft_pretraining.errors import UserError
from peft_pretraining.records.reader import (
    column,
    final_evaluation,
    module_table,
    number,
    read_run,
)
from tests.support.run_folders import (
    history,
    llama_modules,
    metrics,
    tiny_run,
    write_run,
)

# Python writes and reads these, although JSON has no such numbers.
INFINITE = '{"update_step": Infinity, "step": NaN, "loss": 1.0}'


def test_module_table_keeps_each_value_in_its_place():
    modules = history(llama_modules(4), [0, 500, 1000], 1000)
    found = module_table(modules[::-1])  # the order of the lines does not matter
    for line in modules:
        u, m = found.steps.tolist().index(line["step"]), found.names.index(line["module"])
        assert found.alpha[u, m] == line["alpha"] and found.decay[u, m] == line["weight_decay"]
        expected = line["type"], line["block"], line["balanced"]
        assert (found.types[m], found.places[m], found.balanced[m]) == expected


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
        read_run(run)


def test_steps_repeated_after_a_resume_count_once(tmp_path):
    run = read_run(
        write_run(tmp_path / "run", "r", metrics(100, 10, 50) + metrics(100, 10, 50, floor=9)[6:])
    )
    assert [row["update_step"] for row in run.training] == list(range(10, 101, 10))
    assert [row["loss"] > 8 for row in run.training] == [False] * 5 + [True] * 5
    assert [row["update_step"] for row in run.evaluations] == [50, 100]


def test_undefined_numbers_are_nan():
    record = {"a": 1, "b": None, "c": True, "d": "2", "e": math.inf, "f": 2.5}
    values = [number(record, key) for key in "abcdefg"]
    assert [v for v in values if not math.isnan(v)] == [1.0, 2.5]
    assert math.isnan(column([{"x": 1}, {}], "x")[1])


def test_the_evaluation_marked_final_counts(tmp_path):
    lines = metrics(100, 10, 50)
    run = read_run(write_run(tmp_path / "run", "r", lines))
    run.evaluations = [{"eval_loss": 1.0, "final": True}, {"eval_loss": 2.0}]
    assert final_evaluation(run)["eval_loss"] == 1.0
    run.evaluations = [{"eval_loss": 1.0}, {"eval_loss": 2.0, "final": False}]
    assert final_evaluation(run)["eval_loss"] == 2.0
    run.evaluations = []
    assert final_evaluation(run) is None
