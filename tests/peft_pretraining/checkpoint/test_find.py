"""Finding the checkpoint to continue from: damaged ones are passed over, never taken."""

import random
import shutil

import pytest

from peft_pretraining.checkpoint.find import archive_newer_checkpoints, find_checkpoint
from peft_pretraining.errors import UserError
from tests.peft_pretraining.checkpoint.common import (
    FILES,
    SINGLE_PROCESS,
    checkpoint_names,
    equal_states,
    load,
    save,
)


def find(source, run_folder):
    return find_checkpoint(str(source), run_folder, SINGLE_PROCESS)


def test_the_newest_complete_checkpoint_is_found(run):
    folder, _ = run
    checkpoints = folder / "checkpoints"
    (checkpoints / "model_30.tmp").mkdir()
    (checkpoints / "model_²").mkdir()
    # Killed just before the finished folder was renamed:
    shutil.copytree(checkpoints / "model_20", checkpoints / "model_40.tmp")
    shutil.copytree(checkpoints / "model_20", checkpoints / "model_50.abandoned")
    (checkpoints / "model_60").write_text("no folder")
    assert find("auto", folder) == checkpoints / "model_20"
    assert find(folder, folder) == checkpoints / "model_20"
    assert find(checkpoints / "model_10", folder) == checkpoints / "model_10"
    assert find("auto", folder / "nothing") is None
    for nothing in (folder / "nothing", checkpoints / "model_70"):
        with pytest.raises(UserError, match="no checkpoint there"):
            find(nothing, folder)


def test_newer_checkpoints_are_archived(run, trained):
    """Damaged ones too."""
    folder, _ = run
    (save(folder, 30, *trained) / "manifest.json").unlink()
    newer = [folder / "checkpoints" / name for name in ("model_20", "model_30")]
    assert sorted(archive_newer_checkpoints(folder, 10)) == newer
    assert checkpoint_names(folder) == ["model_10", "model_20.abandoned", "model_30.abandoned"]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(run, logged_warnings, damage):
    """Damage each file in turn: one warning names it, and the checkpoint before it is loaded."""
    folder, states = run
    newest = folder / "checkpoints/model_20"
    for name in FILES:
        path = newest / name
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "cut": content[:middle], "flipped": flipped}[damage])
        logged_warnings.clear()
        found = find("auto", folder)
        state, step = load(found)
        assert found.name == "model_10" and step == 10 and equal_states(state, states[10])
        # A flipped bit in the manifest can make the hash of another file look wrong.
        if not (name == "manifest.json" and damage == "flipped"):
            assert len(logged_warnings) == 1 and str(path) in logged_warnings[0]
        with pytest.raises(UserError, match="continue from an older checkpoint"):
            find(newest, folder)
        path.write_bytes(content)
    assert find("auto", folder) == newest


def test_no_silent_start_from_scratch(run, logged_warnings):
    folder, _ = run
    for step in (10, 20):
        (folder / f"checkpoints/model_{step}/config.json").write_text("{}")
    message = r"no checkpoint in .* is complete \(.*model_20/config.json is damaged"
    for source in ("auto", folder):
        with pytest.raises(UserError, match=message):
            find(source, folder)
    assert len(logged_warnings) == 4


@pytest.mark.slow
def test_random_damage(run):
    """Random bytes anywhere in any file: what is loaded is exactly one of the two states."""
    folder, states = run
    newest = folder / "checkpoints/model_20"
    generator = random.Random(0)
    fell_back = 0
    for _ in range(400):
        path = newest / generator.choice(FILES)
        content = path.read_bytes()
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 30])):
            damaged[generator.randrange(len(damaged))] = generator.choice(
                [generator.randrange(256), *b'"{}[],:0 e']
            )
        cut = generator.random() < 0.2
        path.write_bytes(damaged[: generator.randrange(len(damaged))] if cut else damaged)
        found = find("auto", folder)
        state, step = load(found)
        assert equal_states(state, states[step])
        fell_back += step == 10
        path.write_bytes(content)
    assert fell_back > 350
