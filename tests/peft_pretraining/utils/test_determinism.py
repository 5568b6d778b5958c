"""--deterministic, in processes of their own: it sets global switches."""

import sys

import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.model import compilation
from peft_pretraining.parallel.process_group import DistributedContext
from tests.support import fork_server

SCRIPT = """
import os
import torch
from peft_pretraining.utils.determinism import (
    use_deterministic_algorithms, use_deterministic_compilation,
)
use_deterministic_algorithms()
assert torch.are_deterministic_algorithms_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert not torch.backends.cuda.cudnn_sdp_enabled()
assert torch.backends.cuda.flash_sdp_enabled()
import torch._inductor.config as inductor
if hasattr(inductor, "deterministic"):
    assert use_deterministic_compilation() and inductor.deterministic
    del inductor._config["deterministic"]
assert not use_deterministic_compilation()
"""


def test_the_switches(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    fork_server.run([sys.executable, tmp_path / "script.py"], check=True)


def test_compilation_of_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(compilation, "use_deterministic_compilation", lambda: False)
    ranks = DistributedContext(0, 0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="has no deterministic mode: .* or give --compile off"):
        compilation.resolve_compile("on", ranks, deterministic=True)
