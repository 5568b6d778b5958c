"""What the README prints works."""

import re
import subprocess
import sys
from pathlib import Path

import torch

README = Path("README.md").read_text()


def test_the_three_lines():
    """The Python block, run as it stands on a small model."""
    code = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "AlphaDecay(" in b)
    layers = [torch.nn.Linear(64, 64) for _ in range(4)]

    class Model(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x).square().mean()

    names = {
        "torch": torch,
        "model": Model(*layers),
        "loader": [torch.randn(4, 64) for _ in range(3)],
    }
    exec(code, names)
    assert names["decay"].updates == 3


def test_every_named_file_exists():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.S).group(1)
    folder = Path()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = Path(name) if name.endswith("/") else Path()
            assert Path(name).exists(), name
        else:
            assert (folder / name).exists(), name
    for name in re.findall(r"\b(?:configs|scripts|benchmarks)/[\w./]+\w", README):
        assert Path(name).exists(), name


def test_the_package_needs_torch_alone(tmp_path):
    """`pip install .` gives `import alphadecay`, without any other package of requirements.txt."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path),
        ".",
    ]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import alphadecay, torch; assert alphadecay.__file__.startswith(sys.argv[1])\n"
        "m = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3))); alphadecay.AlphaDecay(m, 0.1)\n"
        "assert not {'transformers', 'numpy.testing', 'datasets', 'matplotlib', 'loguru', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
