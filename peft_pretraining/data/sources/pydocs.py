"""`pydocs`: docstrings of the installed packages, a corpus that needs no network."""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.files import FileDocuments, replace_lone_surrogates
from peft_pretraining.errors import UserError
from peft_pretraining.utils.child import EndWithParent
from peft_pretraining.utils.files import atomic_open

PYDOCS_PACKAGES = ("stdlib", "numpy", "pandas", "matplotlib", "torch", "transformers")
# To be increased when docstrings are collected differently, so that an older cache is not used.
PYDOCS_FORMAT = 1
MIN_DOCSTRING_CHARACTERS = 100  # Shorter docstrings mostly repeat the function's name.


def open_pydocs(cache: Path, packages: tuple[str, ...] | None = None) -> Source:
    """Return the docstrings of installed packages as a source.

    They are collected at the first call and stored in `cache`.

    Args:
        cache: The cache folder.
        packages: Names of packages; those that are not installed are left out.
            None: `PYDOCS_PACKAGES`.

    Raises:
        UserError: None of the packages has a docstring.
    """
    versions = package_versions(PYDOCS_PACKAGES if packages is None else packages)
    key = hashlib.blake2b(json.dumps([PYDOCS_FORMAT, versions]).encode(), digest_size=6).hexdigest()
    path = cache / f"pydocs-{key}.jsonl.gz"
    if not path.exists():
        _collect(versions, path)
    documents = FileDocuments((path,))
    if next(iter(documents), None) is None:
        raise UserError(
            f"None of {', '.join(versions) or 'the packages of pydocs'} has docstrings to read; "
            "give `--dataset FILE` instead."
        )
    return Source(
        "pydocs",
        documents,
        None,
        streamed=False,
        # Without the compressed size, which depends on the version of zlib.
        signature=((path.name, 0),),
        file_identity=((str(path), path.stat().st_size),),
    )


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed.

    `stdlib`, and single modules of it, have Python's version.
    """
    versions = {}
    for package in packages:
        if package != "stdlib" and importlib.util.find_spec(package) is None:
            continue
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = platform.python_version()
    return versions


def package_files(package: str) -> list[Path]:
    """Return the Python files of an installed package, or of `stdlib`, sorted by name.

    The package is not imported. Folders of tests are left out.
    """
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package} is not installed"
        if not spec.submodule_search_locations:
            return [Path(spec.origin)] if spec.origin and spec.has_location else []
        root = Path(next(iter(spec.submodule_search_locations)))
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    excluded = {"site-packages", "dist-packages", "test", "tests"}
    return [
        root / file
        for file in sorted(files, key=lambda file: file.as_posix())
        if excluded.isdisjoint(file.parts)
    ]


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of one Python file, in the order of `ast.walk`.

    Docstrings of fewer than `MIN_DOCSTRING_CHARACTERS` characters are left out. A file that cannot
    be parsed has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Invalid escapes in other people's files.
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    texts = (
        ast.get_docstring(node, clean=False)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    cleaned = (replace_lone_surrogates(inspect.cleandoc(text).strip()) for text in texts if text)
    return [text for text in cleaned if len(text) >= MIN_DOCSTRING_CHARACTERS]


def _do_nothing(_: EndWithParent) -> None:
    """The argument has tied the process to its parent when it was unpickled."""


def _collect(packages: Iterable[str], path: Path) -> None:
    """Write the docstrings of some packages to a file of compressed JSON lines, each text once."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from loguru import logger

    files = [file for package in packages for file in package_files(package)]
    logger.info(
        f"Collecting the docstrings of {len(files):,} files of {', '.join(packages)} (once, about "
        "half a minute)"
    )
    processes = min(os.cpu_count() or 1, 8)
    seen: set[str] = set()
    with (
        # Another process may collect them at the same time.
        atomic_open(path, shared=True) as raw,
        # Without a file name and with a fixed time in the header, equal content is equal bytes.
        gzip.GzipFile(fileobj=raw, filename="", mode="wb", mtime=0) as compressed,
        # Spawned, because this process may have threads that do not survive a fork.
        ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=_do_nothing, initargs=(EndWithParent(),)
        ) as pool,
    ):
        texts = itertools.chain.from_iterable(pool.map(docstrings, files, chunksize=64))
        for text in texts:
            if text not in seen:
                seen.add(text)
                compressed.write((json.dumps({"text": text}) + "\n").encode())
