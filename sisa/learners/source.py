"""Which code a training runs: our semantics, and the source of a model that the user brings.

The digest of a factory covers its module, every package around it and every module they import, found by reading the
source: what lies outside the standard library and installed packages is hashed byte by byte, what is installed counts
with its name and version. A change of either changes all lineage keys.

Not covered, and so no part of the guarantee: modules that are imported by a computed name, and files that a factory
reads. torch and numpy are not in here but in the platform's fingerprint.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from sisa.errors import UserError
from sisa.lineage import SEMANTICS
from sisa.recipe import Recipe

ABSENT = "absent"
"""Stands for a package that isn't installed."""
ELSEWHERE = frozenset({"torch", "numpy", "sisa"})
"""Covered by the platform's fingerprint, or by the number of our training semantics."""


def code_version(recipe: Recipe) -> str:
    """Return the digest (64 hex digits) of the code that a training with ``recipe`` runs, on any platform.

    Raises:
        UserError: The source of the factory can't be found or read.
    """
    text = json.dumps(["sisa-code", SEMANTICS, model_source_digest(recipe)])
    return hashlib.sha256(text.encode()).hexdigest()


def model_source_digest(recipe: Recipe) -> str:
    """Return the digest of the factory's source (64 hex digits); "" for a built-in model.

    Raises:
        UserError: The source of the factory can't be found or read.
    """
    if recipe.model.factory is None:
        return ""
    name = recipe.model.factory.partition(":")[0]
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    sources: dict[str, str] = {}
    waiting = [name, *_parents(name)]
    while waiting:
        module = waiting.pop()
        if module in sources or module.partition(".")[0] in ELSEWHERE | sys.stdlib_module_names:
            continue
        sources[module], imported = _read(module)
        waiting += imported
    if sources.get(name, "") in {"", ABSENT}:
        raise UserError(
            f"model.factory: the source of {name!r} can't be found",
            hint="Run where the package can be imported: install it, or set PYTHONPATH to its folder.",
        )
    known = {module: digest for module, digest in sources.items() if digest}
    return hashlib.sha256(json.dumps(sorted(known.items())).encode()).hexdigest()


def _read(module: str) -> tuple[str, list[str]]:
    """Return what stands for a module ("" if it isn't one), and the names that it may import."""
    spec = _find(module)
    if spec is None:
        # A name inside a module rather than a module, or an optional package that isn't installed: the latter counts.
        return (ABSENT if "." not in module else ""), []
    if spec.origin is None or spec.origin in {"built-in", "frozen"}:
        return "", []
    path = Path(spec.origin)
    if _is_installed(path):
        return _distribution(module), []
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if path.suffix != ".py":
        return digest, []
    try:
        tree = ast.parse(content)
    except SyntaxError as error:
        raise UserError(f"model.factory: {path.name}, line {error.lineno}: {error.msg}") from error
    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
    imported = [name for found in _imports(tree, package) for name in [found, *_parents(found)]]
    return digest, imported


def _find(module: str) -> ModuleSpec | None:
    """Find a module; of its parents, what runs at their import runs here too."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return None
    except Exception as error:
        raise UserError(
            f"model.factory: {module.rpartition('.')[0]!r} can't be imported: {type(error).__name__}: {error}"
        ) from error


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield names of modules, or of things in them, that ``import`` statements anywhere in ``tree`` name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if alias.name != "*")


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _is_installed(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _installed_folders())


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(Path(os.path.realpath(folder)) for folder in folders) + tuple(Path(folder) for folder in folders)


def _distribution(module: str) -> str:
    """Return "name==version" of the installed packages that provide a module; "" for the standard library."""
    names = sorted(set(_provided().get(module.partition(".")[0], [])))
    return ",".join(f"{name}=={importlib.metadata.version(name)}" for name in names)


@functools.cache
def _provided() -> dict[str, list[str]]:
    return {top: list(names) for top, names in importlib.metadata.packages_distributions().items()}
