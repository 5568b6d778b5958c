"""Names of checkpoint folders, and verification against the manifest."""

import json
import shutil
from pathlib import Path

from peft_pretraining.checkpoint.format import REQUIRED, checkpoints_of, find_corruption, step_of


def test_only_complete_checkpoint_folders_count(run):
    folder, _ = run
    checkpoints = folder / "checkpoints"
    for name in ("model_30.tmp", "model_²", "model_", "model_-1", "xmodel_3", "model_40.abandoned"):
        (checkpoints / name).mkdir()
        assert step_of(checkpoints / name) == -1
    (checkpoints / "model_60").write_text("a file, not a folder")
    assert sorted(checkpoints_of(folder)) == [checkpoints / "model_10", checkpoints / "model_20"]
    assert checkpoints_of(folder / "nothing") == []
    assert [step_of(Path(name)) for name in ("model_0", "a/model_60", "model_007")] == [0, 60, 7]


def test_a_manifest_that_lists_too_little_is_damage(run):
    folder = run[0] / "checkpoints/model_20"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in REQUIRED:
        (folder / "manifest.json").write_text(
            json.dumps({k: v for k, v in manifest.items() if k != name})
        )
        assert f"it does not list {name}" in find_corruption(folder)
    for text in ("[]", "{}", "null", '{"a": 1}', '{"a": {}}', "[" * 100_000):
        (folder / "manifest.json").write_text(text)
        assert str(folder / "manifest.json") in find_corruption(folder)
    for name in ("\0", "a" * 5000, "config.json/x", "\ud800", "."):
        (folder / "manifest.json").write_text(
            json.dumps({**manifest, name: {"size": 1, "sha256": ""}})
        )
        assert str(folder) in find_corruption(folder)


def test_without_hashes_only_names_and_sizes_are_compared(run, tmp_path):
    folder = tmp_path / "model_20"
    shutil.copytree(run[0] / "checkpoints/model_20", folder)
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config[::-1])
    assert find_corruption(folder, compare_hashes=False) is None
    assert "config.json is damaged (its SHA-256" in find_corruption(folder)
    (folder / "config.json").write_bytes(config + b" ")
    assert "config.json is damaged (its size" in find_corruption(folder, compare_hashes=False)
    (folder / "config.json").unlink()
    assert "config.json is missing" in find_corruption(folder, compare_hashes=False)
