"""W&B is imported only when it is used, never asks for a key, and may be missing or unreachable."""

import subprocess
import sys
import types

import pytest

from peft_pretraining.records.wandb import has_wandb_key, start_wandb


class FakeRun:
    def define_metric(self, name, step_metric):
        self.metric = name, step_metric


def fake_package(monkeypatch, reachable):
    """Replace the package `wandb`; returns the modes in which a run was started."""
    package, modes = types.ModuleType("wandb"), []
    package.Settings = lambda **options: options
    package.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def init(mode, **options):
        modes.append(mode)
        if mode == "online" and not reachable:
            raise package.errors.Error("no network")
        return FakeRun()

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    return modes


@pytest.mark.parametrize(
    "mode, key, reachable, expected",
    [
        (None, None, True, ["offline"]),
        (None, "abc", True, ["online"]),
        (None, "abc", False, ["online", "offline"]),
        ("disabled", "abc", True, ["disabled"]),
    ],
)
def test_the_mode(tmp_path, monkeypatch, mode, key, reachable, expected):
    monkeypatch.setenv("HOME", str(tmp_path))  # without a ~/.netrc
    for name, value in (("WANDB_MODE", mode), ("WANDB_API_KEY", key)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    modes = fake_package(monkeypatch, reachable)
    run = start_wandb(tmp_path, "project", "name", [], {}, "id")
    assert modes == expected and run.metric == ("*", "update_step")


def test_a_key_in_netrc(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_wandb_key()
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert has_wandb_key()
    netrc.write_text("broken")
    assert not has_wandb_key()


def test_without_the_package_there_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    assert start_wandb(tmp_path, "project", "name", [], {}, "id") is None


@pytest.mark.slow
def test_records_import_nothing_heavy():
    """Neither W&B nor packages whose version is recorded are imported with the records."""
    check = (
        "import sys, peft_pretraining.records.run_log, peft_pretraining.records.run_dir; "
        "print([m for m in ('wandb', 'transformers', 'timm', 'datasets', 'matplotlib', "
        "'torch.distributed.fsdp', 'torch.distributed.tensor') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
