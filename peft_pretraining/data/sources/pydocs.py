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
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.files import FileDocuments, without_lone_surrogates
from peft_pretraining.errors import UserError

PYDOCS_PACKAGES = ("stdlib", "numpy", "pandas", "matplotlib", "torch", "transformers")
PYDOCS_FORMAT = (
    1  # raise it when the gathering changes, so that an older cache is not taken for the new one
)
SHORTEST_DOCSTRING = 100  # characters; below it a docstring is mostly a name in other words


# --------------------------------------------------------------------------------------------------------------------- pydocs


def open_pydocs(cache: Path, packages: tuple[str, ...] | None = None) -> Source:
    """The docstrings of the installed `packages` (default `PYDOCS_PACKAGES`), gathered at the first call and cached in `cache`.

    Packages that are not installed are left out. Raises UserError where none of them has a docstring.
    """
    versions = package_versions(PYDOCS_PACKAGES if packages is None else packages)
    key = hashlib.blake2b(json.dumps([PYDOCS_FORMAT, versions]).encode(), digest_size=6).hexdigest()
    path = cache / f"pydocs-{key}.jsonl.gz"
    if not path.exists():
        _gather(versions, path)
    documents = FileDocuments((path,))
    if next(iter(documents), None) is None:
        raise UserError(
            f"None of {', '.join(versions) or 'the packages of pydocs'} has docstrings to read; give `--dataset FILE` instead."
        )
    # The packed size depends on the zlib in use, the versions in the name do not.
    return Source(
        "pydocs",
        documents,
        None,
        streamed=False,
        signature=((path.name, 0),),
        stamp=((str(path), path.stat().st_size),),
    )


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed ones among `packages` with their versions; `stdlib`, and single modules of it, have Python's."""
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
    """The Python files of a package (or of `stdlib`), found without importing it, sorted by name; test folders are left out."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(package)
        if not spec.submodule_search_locations:
            return [Path(spec.origin)] if spec.has_location else []
        root = Path(next(iter(spec.submodule_search_locations)))
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    return [
        root / file
        for file in sorted(files, key=lambda file: file.as_posix())
        if left_out.isdisjoint(file.parts)
    ]


def docstrings(path: Path) -> list[str]:
    """The docstrings of one Python file, in the order of `ast.walk`; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (
        ast.get_docstring(node, clean=False)
        for node in ast.walk(tree)
        if isinstance(node, documented)
    )
    cleaned = (without_lone_surrogates(inspect.cleandoc(text).strip()) for text in found if text)
    return [text for text in cleaned if len(text) >= SHORTEST_DOCSTRING]


def _gather(packages: Iterable[str], path: Path) -> None:
    from loguru import logger

    files = [file for package in packages for file in package_files(package)]
    logger.info(
        f"Gathering the docstrings of {len(files):,} files of {', '.join(packages)} (once, about half a minute)"
    )
    seen: set[str] = set()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        # A fixed time in the header makes equal contents equal files.
        with (
            os.fdopen(handle, "wb") as raw,
            gzip.GzipFile(fileobj=raw, filename="", mode="wb", mtime=0) as packed,
        ):
            # Spawned, because this process may hold threads that do not survive a fork.
            with ProcessPoolExecutor(
                min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")
            ) as pool:
                for text in itertools.chain.from_iterable(
                    pool.map(docstrings, files, chunksize=64)
                ):
                    if text not in seen:
                        seen.add(text)
                        packed.write((json.dumps({"text": text}) + "\n").encode())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
