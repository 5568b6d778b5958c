"""The command `python -m peft_pretraining.report`."""

import subprocess
import sys
from pathlib import Path

import pytest
from loguru import logger

from peft_pretraining.report.__main__ import main
from tests.support.run_folders import small_run, tiny_run, write_run


@pytest.fixture
def warnings():
    """Return the warnings of the log."""
    found = []
    sink = logger.add(lambda message: found.append(message.record["message"]), level="WARNING")
    yield found
    logger.remove(sink)


def bad_folders(root):
    """Return (folder, part of the message, whether it is a run) for each kind of bad input."""
    empty, no_metrics, bad_info = root / "empty", root / "no_metrics", root / "bad_info"
    empty.mkdir()
    write_run(no_metrics, "x", [])
    small_run(bad_info)
    (bad_info / "run.json").write_text("{")
    unreadable = tiny_run(root / "unreadable")
    (unreadable / "metrics.jsonl").unlink()
    (unreadable / "metrics.jsonl").mkdir()
    return [
        (root / "none", "is not a folder", False),
        (empty, "holds no run.json", False),
        (no_metrics, "holds no logged update", True),
        (bad_info, "not valid", True),
        (unreadable, "Cannot read", True),
    ]


def test_command_exit_codes(tmp_path, capsys, warnings):
    run = tiny_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main([str(run), str(run), "--output", str(tmp_path / "both.html")]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!DOCTYPE html>")
    for folder, message, is_run in bad_folders(tmp_path):
        for command in ([folder], [run, folder]):
            left_out = is_run and len(command) == 2
            assert main([str(word) for word in command]) == (0 if left_out else 2)
            output = capsys.readouterr()
            said = warnings.pop() if left_out else output.err.removesuffix("\n")
            assert message in said and str(folder) in said and "\n" not in said
            assert bool(output.out) == left_out and warnings == []
    assert main([str(run), "--output", str(tmp_path / "no" / "such" / "file.html")]) == 2
    assert "Cannot write" in capsys.readouterr().err


def test_the_command_loads_neither_torch_nor_matplotlib(tmp_path):
    """To print its help it does not load NumPy either."""
    check = (
        "import sys\n"
        "from peft_pretraining.report.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "loaded = [m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules]\n"
        "print('loaded', loaded)"
    )
    for argument, expected in (("--help", []), (str(tmp_path / "none"), ["numpy"])):
        done = subprocess.run(
            [sys.executable, "-c", check, argument], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == f"loaded {expected}", done.stderr


def test_the_package_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "peft_pretraining.report", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"{tmp_path / 'none'} is not a folder; give the folder of a run, the one that holds "
        "run.json.\n"
    )
