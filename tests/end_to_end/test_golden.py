"""100 updates whose losses are on record: a change must not alter them by accident.

After a change that should: REWRITE_GOLDEN=1 bash scripts/test.sh -k golden, and say why in the
commit.
"""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

from tests.end_to_end.common import read_lines, run, write_config, write_text

GOLDEN = Path(__file__).with_name("golden_losses.json")


def vendor():
    """Who made the processor, as Linux names it; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split()[-1] for line in lines if line.startswith("vendor_id")), "")


def machine():
    """Where float additions happen in the same order."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor(),  # MKL has kernels of its own for each
        "machine": platform.machine(),
    }


def test_golden_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPHADECAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = [
        "--model_config",
        write_config(tmp_path),
        "--dataset",
        write_text(tmp_path),
        "--tokenizer",
        "bpe",
        "--max_length",
        64,
    ]
    arguments += [
        "--batch_size",
        8,
        "--total_batch_size",
        16,
        "--num_training_steps",
        100,
        "--dtype",
        "float32",
        "--log_every",
        1,
    ]
    arguments += [
        "--use_modulewise_wd",
        "--alpha_positively_with_WD",
        "--unbalancedWD_every",
        10,
        "--weight_decay",
        1e-3,
    ]
    run([*arguments, "--save_dir", tmp_path / "run"], processes=1)
    losses = [r["loss"] for r in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in r]
    if os.environ.get("REWRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(losses) == 100 and losses[-1] < losses[0] - 1
    if golden["machine"] == machine():
        assert losses == golden["losses"]
    else:
        assert losses == pytest.approx(golden["losses"], rel=1e-4)
