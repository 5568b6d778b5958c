"""What README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ show works, and what they name exists."""

import ast
import glob
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser as torchrun_parser

import alphadecay
from alphadecay.cli.flags import add_flags
from alphadecay.cli.presets import METHOD_PRESETS
from peft_pretraining.cli.llama import llama_parser
from peft_pretraining.cli.vit import vit_parser
from tests.docs.command_checks import check, documented_folder
from tests.docs.pages import PAGES, ROOT, anchors, blocks, commands, inline_code, links

README = ROOT / "README.md"
# Blocks whose commands depend on one another, and need neither a network nor a GPU.
EXECUTED = "mkdir -p my_text"
FOLDERS = sorted(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("."))
IGNORED_FOLDERS = {"runs", "build", "dist", "wandb"}  # as in .gitignore: a clone has none of them

page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# ----------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The repository with the data that the pages name."""
    return documented_folder(tmp_path_factory.mktemp("repository"))


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands_work(block, tmp_path, repository):
    if block.text.startswith(EXECUTED):
        environment = {"ALPHADECAY_CACHE": str(tmp_path / "cache")}
        execute(block.text, tmp_path, environment)
        return
    for command in commands(block):
        check(command, repository)


def execute(script: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a bash script in a folder with this Python first on the path, and return its output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, timeout=120,
        env=os.environ | environment | {"PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_a_block_that_is_executed():
    assert sum(block.text.startswith(EXECUTED) for block in blocks("bash")) == 1


def test_a_command_of_the_documentation_that_is_wrong_is_noticed():
    """The checks above can fail: each of these differs from a documented command by one mistake."""
    torchrun = "torchrun --nproc_per_node=2 torchrun_main.py --model_config configs/llama_9m.json"
    for command in (
        f"{torchrun} --learning_rate 1",
        f"{torchrun} --batch_size 100 --total_batch_size 512",
        f"{torchrun} --method alphadecay --wd_min_ratio 4",
        torchrun.replace("nproc_per_node", "processes"),
        "python main_vit.py --data_set digits --mixup yes please",
        "python scripts/paper/table.py --table adams runs",
        "python -m peft_pretraining.report",
        "bash scripts/run.sh --model 130m --method alphadecay",
        "bash scripts/tables/adam.sh --dry",
        "bash scripts/cluster/multinode.sh --nodes two --rdzv_host a -- --model_config x",
        "bash scripts/cluster/slurm.sbatch --dry_run --dataset c4",
        "bash scripts/quickstarts.sh",
        "pip install -r requirement.txt",
        "source ~/.cache/alphadecay/bin/activate",
        "conda activate alphadecay",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            check(command)


# ------------------------------------------------------------------------------------ Python blocks


class Model(torch.nn.Sequential):
    """Four layers; called with a batch it returns a loss."""

    def __init__(self):
        super().__init__(*(torch.nn.Linear(64, 64) for _ in range(4)))

    def forward(self, x):
        return super().forward(x).square().mean()


def prepare_timm_folder() -> None:
    """Write OUT/best as main_vit.py does."""
    from peft_pretraining.cli.vit import complete
    from peft_pretraining.vision.export import export, timm_config
    from peft_pretraining.vision.models import build_model

    parser = vit_parser()
    add_flags(parser)
    small = "patch_size=8 depth=1 embed_dim=32 num_heads=2".split()
    words = ["--data_set", "digits", "--input_size", "32", "--model_kwargs", *small]
    args = complete(parser.parse_args(words), 1, "uniform")
    model = build_model(args)
    export(model, timm_config(args, model), {"top1": 0.0}, Path("OUT/best"))


def prepare_run_folder() -> None:
    """Write runs/my-run/modules.jsonl as a run does."""
    folder = Path("runs/my-run")
    folder.mkdir(parents=True)
    history = alphadecay.AlphaDecay(Model(), 0.1).history
    (folder / "modules.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))


PREPARATIONS = {"docs/pretrain_vit.md": prepare_timm_folder, "docs/records.md": prepare_run_folder}
PYTHON_PAGES = list(dict.fromkeys(block.page for block in blocks("python")))


@pytest.mark.parametrize("name", PYTHON_PAGES)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, with a model and a loader that stand in."""
    monkeypatch.chdir(tmp_path)
    PREPARATIONS.get(name, lambda: None)()
    names = {"model": Model(), "loader": [torch.randn(4, 64) for _ in range(3)]}
    if name == "README.md":  # it shows the method alone
        names["torch"] = torch
    for block in [block for block in blocks("python") if block.page == name]:
        exec(compile(block.text, str(block), "exec"), names)
    if "decay" in names:
        assert names["optimizer"].param_groups[0]["params"]


def test_the_three_lines_set_the_decays():
    """In the README's loop with an analysis at each call, the groups get decays of their own."""
    (block,) = [block for block in blocks("python") if block.page == "README.md"]
    names = {"torch": torch, "model": Model(), "loader": [torch.randn(4, 64) for _ in range(3)]}
    exec(block.text.replace("every=500", "every=1"), names)
    decays = {g["module"]: g["weight_decay"] for g in names["optimizer"].param_groups}
    assert names["decay"].updates == 3 and len(set(decays.values())) == 3
    assert {name: decays[name] for name in ("1", "2")} == names["decay"].weight_decays


# ----------------------------------------------------------------------- links, paths, flags, names


@page
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@page
def test_paths_exist(page):
    for code in inline_code(page):
        for path in re.findall(r"(?<![\w./-])([\w.*-]+(?:/[\w.*-]*)+)", code):
            folder = path.split("/")[0]
            if folder in FOLDERS and folder not in IGNORED_FOLDERS:
                assert glob.glob(str(ROOT / path)), f"{page.name}: {path}"


def known_flags() -> set[str]:
    """Return the flags of all parsers, and those that shell scripts and benchmarks read."""
    known = {"--help", "--fast", "--signals-to-handle", "--append"}
    for parser in (llama_parser(), vit_parser()):
        add_flags(parser)
        known |= set(parser._option_string_actions)
    known |= set(torchrun_parser()._option_string_actions)
    for path in [*ROOT.glob("scripts/**/*"), *ROOT.glob("peft_pretraining/*.py")]:
        if path.suffix in (".sh", ".sbatch", ".py"):
            known |= set(re.findall(r"--\w[\w-]*", path.read_text(encoding="utf8")))
    return known


@page
def test_flags_exist(page):
    mentioned = {f for code in inline_code(page) for f in re.findall(r"(?<!\S)--\w[\w-]*", code)}
    assert mentioned <= known_flags(), f"{page.name}: {sorted(mentioned - known_flags())}"


@page
def test_names_are_in_the_files_that_they_are_said_to_be_in(page):
    """`NAME` in `path/file.py`, or in the same file as the one before."""
    text, previous = page.read_text(), None
    for name, path in re.findall(r"`(\w+)` in (?:`([\w/.]+\.py)`|the same file)", text):
        previous = path or previous
        assert re.search(rf"\b{name}\b", (ROOT / previous).read_text()), f"{name} in {previous}"


def test_public_names_are_in_the_reference():
    table = (ROOT / "docs/api.md").read_text().split("##")[1]
    shown = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M))))
    assert shown == set(alphadecay.__all__)


def test_the_layout_lists_every_file_of_the_packages():
    text = (ROOT / "docs/layout.md").read_text()
    listed = set(re.findall(r"^\| `((?:alphadecay|peft_pretraining)/[\w/]+\.py)` \|", text, re.M))
    files = {
        str(path.relative_to(ROOT))
        for package in ("alphadecay", "peft_pretraining")
        for path in (ROOT / package).rglob("*.py")
        if not path.name.startswith("__")
    }
    assert listed == files


def test_every_method_is_in_the_table_of_methods():
    rows = re.findall(r"^\| `(\w[\w-]*)` \|", (ROOT / "docs/methods.md").read_text(), re.M)
    assert sorted(rows) == sorted(METHOD_PRESETS)


def test_every_page_is_in_the_index_and_says_what_it_is_for():
    index = (ROOT / "docs/index.md").read_text()
    listed = re.findall(r"^\* \[.*?\]\((\w+\.md)\)", index, re.M)
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md"]
    assert sorted(listed) == sorted(pages)
    for name in listed:
        title, blank, first = (ROOT / "docs" / name).read_text().splitlines()[:3]
        assert title.startswith("# ") and not blank and first.startswith("After this page you ")


def test_readme_is_short():
    assert len(README.read_bytes()) <= 8192


def test_pictures_are_small():
    for path in (ROOT / "docs/images").iterdir():
        assert path.stat().st_size < 150_000, path.name


def test_citation_and_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert citation["version"] == alphadecay.__version__
    assert re.search(rf"^## .*{re.escape(alphadecay.__version__)}", changelog, re.M)
    paper = citation["preferred-citation"]
    readme = README.read_text()
    assert all(
        f"{author['family-names']}, {author['given-names']}" in readme
        for author in paper["authors"]
    )
    assert paper["url"] in readme and str(paper["year"]) in readme


# ---------------------------------------------------------------------------- requirements, package


def test_the_environment_has_what_the_documentation_needs():
    needed = (ROOT / "requirements-dev.txt").read_text().split()
    assert {"sphinx", "myst-parser", "furo", "pytest", "ruff", "mypy", "import-linter"} <= set(
        needed
    )
    text = (ROOT / "scripts/environment.sh").read_text()
    assert "requirements=(requirements.txt requirements-dev.txt " in text


@pytest.mark.slow
def test_the_package_needs_torch_alone(tmp_path):
    """`pip install .` gives `import alphadecay`, without any other package of requirements.txt."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path), "."], check=True, capture_output=True, cwd=ROOT)
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import alphadecay, torch
assert alphadecay.__file__.startswith(sys.argv[1])
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
alphadecay.AlphaDecay(model, 0.1)
others = {'transformers', 'numpy.testing', 'datasets', 'matplotlib', 'loguru', 'wandb'}
assert not others & set(sys.modules)
"""
    ast.parse(code)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
