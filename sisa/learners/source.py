"""Which code a training runs: our semantics, and the source of a model that the user brings.

The digest of a factory covers its module, every package around it and every module they import, found by reading the
source: what lies outside the standard library and installed packages is hashed byte by byte, what is installed counts
with its name and version. A change of either changes all lineage keys.

A process trains with the modules that it has imported, so the digest is given only if those are what the files say;
what is imported later has to be that too.

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
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from sisa.errors import SisaError, UserError
from sisa.learners.loaded import Source, digest_of, expect, is_elsewhere, is_installed, load, require, watch
from sisa.lineage import SEMANTICS
from sisa.recipe import Recipe

ABSENT = "absent"
"""Stands for a package that isn't installed."""


def code_version(recipe: Recipe) -> str:
    """Return the digest (64 hex digits) of the code that a training with ``recipe`` runs, on any platform.

    Raises:
        UserError: The source of the factory can't be found, read or imported.
        FootingError: This process has imported other source than the files hold now.
    """
    text = json.dumps(["sisa-code", SEMANTICS, model_source_digest(recipe)])
    return hashlib.sha256(text.encode()).hexdigest()


def model_source_digest(recipe: Recipe) -> str:
    """Return the digest of the factory's source (64 hex digits); "" for a built-in model.

    Raises:
        UserError: The source of the factory can't be found, read or imported.
        FootingError: This process has imported other source than the files hold now.
    """
    if recipe.model.factory is None:
        return ""
    name = recipe.model.factory.partition(":")[0]
    watch()
    expect({})
    if _read(name).text in {"", ABSENT}:
        raise UserError(
            f"model.factory: the source of {name!r} can't be found",
            hint="Run where the package can be imported: install it, or set PYTHONPATH to its folder.",
        )
    load(name)  # before the others, some of which are imported by being looked for
    sources = _sources(name)
    require(sources)
    expect(sources)
    known = {module: source.text for module, source in sources.items() if source.text}
    return hashlib.sha256(json.dumps(sorted(known.items())).encode()).hexdigest()


def _sources(name: str) -> dict[str, Source]:
    """Follow the imports from a module, and from the packages around it."""
    sources: dict[str, Source] = {}
    waiting = [name, *_parents(name)]
    while waiting:
        module = waiting.pop()
        if module not in sources and not is_elsewhere(module):
            sources[module] = _read(module)
            waiting += sources[module].imported
    return sources


def _read(module: str) -> Source:
    spec = _find(module)
    if spec is None:
        # A name inside a module rather than a module, or an optional package that isn't installed: the latter counts.
        return Source(ABSENT if "." not in module else "")
    if spec.origin is None or spec.origin in {"built-in", "frozen"}:
        return Source()
    path = Path(spec.origin)
    if is_installed(path):
        return Source(_distribution(module))
    try:
        content = path.read_bytes()
        tree = ast.parse(content) if path.suffix == ".py" else None
    except OSError as error:
        raise UserError(f"model.factory: the source of {module!r} can't be read: {error.strerror or error}") from error
    except SyntaxError as error:
        raise UserError(f"model.factory: {path.name}, line {error.lineno}: {error.msg}") from error
    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
    found = [] if tree is None else _imports(tree, package)
    return Source(digest_of(content), path, tuple(name for one in found for name in [one, *_parents(one)]))


def _find(module: str) -> ModuleSpec | None:
    """Find a module; of its parents, what runs at their import runs here too."""
    try:
        return importlib.util.find_spec(module)
    except SisaError:
        raise
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


def _distribution(module: str) -> str:
    """Return "name==version" of the installed packages that provide a module; "" for the standard library."""
    names = sorted(set(_provided().get(module.partition(".")[0], [])))
    return ",".join(f"{name}=={importlib.metadata.version(name)}" for name in names)


@functools.cache
def _provided() -> dict[str, list[str]]:
    return {top: list(names) for top, names in importlib.metadata.packages_distributions().items()}
