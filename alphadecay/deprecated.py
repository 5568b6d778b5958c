"""Old names and module paths. They work for one more release, with a DeprecationWarning.

An old module path such as `alphadecay.flags` has no file any more. `MovedModuleFinder`, which
Python asks after all other finders, gives an import of it a small module that forwards every name
to the module that defines it now.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PACKAGE = "alphadecay"

# Old module -> modules that hold its names today.
MOVED_MODULES = {
    "decoupled": ("decay_hooks", "param_groups"),
    "engine": ("spectral.engine", "norms"),
    "flags": ("cli.flags", "cli.types"),
    "methods": ("cli.presets",),
    "power_law": ("spectral.power_law",),
    "sharding": ("distributed",),
    "spectra": ("spectral.eigenvalues",),
    "statistics": ("spectral.statistics",),
    "workers": ("spectral.thread_pool",),
}

# Old name -> new name, for names that changed. The key starts with the old module's path.
RENAMED = {
    "METHODS": "FIT_METHODS",
    "reshape_decay": "install_decay_hooks",
    "cli.presets.METHODS": "METHOD_PRESETS",
    "decoupled.reshape_decay": "install_decay_hooks",
    "engine.PIECE": "DOT_CHUNK_SIZE",
    "flags.reshape_from_flags": "register_decay_hooks",
    "flags.true_or_false": "str_to_bool",
    "methods.METHODS": "METHOD_PRESETS",
    "power_law.METHODS": "FIT_METHODS",
    "spectra.finish": "pool_eigenvalues",
    "spectra.prepare": "to_matrices",
    "spectra.sufficient": "is_precise_enough",
    "spectra.UNSCALED": "NO_RESCALE_RANGE",
    "statistics.unneeded_share": "ignored_fraction_of",
}


def warn_deprecated(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` will be removed, and say what to type instead.

    Args:
        old: what the user typed.
        new: what to type instead.
        stacklevel: as in `warnings.warn`; 3 is the caller of the function that calls this one.
    """
    warnings.warn(
        f"{old} will be removed in the next release: use {new}", DeprecationWarning, stacklevel
    )


def renamed_attribute(module: str, name: str) -> str | None:
    """Return today's name of an attribute that was renamed, with a warning; None if it was not.

    Args:
        module: the module's path below `alphadecay`; empty for the package itself.
        name: the attribute that was asked for.
    """
    prefix = f"{module}." if module else ""
    new = RENAMED.get(prefix + name)
    if new is not None:
        warn_deprecated(f"{PACKAGE}.{prefix}{name}", f"{PACKAGE}.{prefix}{new}", stacklevel=4)
    return new


def renamed_keyword(function: str, keywords: tuple[str, str], old: Any, new: Any) -> Any:
    """Return the value of a keyword argument that may have been given under its old name.

    Args:
        function: the function's name, for messages.
        keywords: the old and the new name of the keyword.
        old: the value given under the old name, None if none was.
        new: the value given under the new name, or its default.

    Raises:
        TypeError: the keyword was given under its old and its new name. A value equal to None
            counts as not given.
    """
    if old is None:
        return new
    warn_deprecated(f"{function}({keywords[0]}=...)", f"{keywords[1]}=...", stacklevel=4)
    if new is not None:
        raise TypeError(f"{function} got {keywords[0]} and {keywords[1]}: give {keywords[1]} only")
    return old


class MovedModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import an old module path as a module that forwards to today's modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for an old module path of this package, None for any other."""
        package, _, name = fullname.partition(".")
        if package != PACKAGE or name not in MOVED_MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module a `__getattr__` that looks names up where they are defined today."""
        old = module.__name__.partition(".")[2]
        paths = [f"{PACKAGE}.{path}" for path in MOVED_MODULES[old]]
        warn_deprecated(module.__name__, " or ".join(paths))

        def forward(name: str) -> Any:
            today = RENAMED.get(f"{old}.{name}", name)
            for path in paths:
                target = importlib.import_module(path)
                if hasattr(target, today):
                    return getattr(target, today)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = forward  # type: ignore[method-assign]


def install_finder() -> None:
    """Let old module paths be imported. Calling it again does nothing."""
    if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedModuleFinder())
