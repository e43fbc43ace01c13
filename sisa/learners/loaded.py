"""What this process has really imported, which may be older than what its files say now.

Python imports a module once and looks at its file no more, so the digest of a file says what a new process would
import. Here a finder stands in front of Python's own. It reads the source of every module that isn't installed itself,
compiles just those bytes (no bytecode from a cache, which is told from stale bytecode by whole seconds), and keeps
their digest. In order:

1. ``load`` the factory, under watch;
2. ``require`` that what is loaded is what the files were found to say;
3. ``expect`` the same of what is imported later, by a function: other source is refused there and then.

A module that was imported before the first ``watch`` left no digest. It counts as unchanged if its file is older than
this process, which the kernel says; a folder that was exchanged as a whole isn't noticed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import os
import site
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from sisa.errors import FootingError, SisaError, UserError

ELSEWHERE = frozenset({"torch", "numpy", "sisa"})
"""Covered by the platform's fingerprint, or by the number of our training semantics."""
RESTART = "Restart Python: a process goes on with the source that it imported."


@dataclass(frozen=True)
class Source:
    """What stands for a module."""

    text: str = ""
    """Digest of its file, or name and version of what is installed; "" if it isn't a module."""
    file: Path | None = None
    """Where it lies, if that counts byte by byte."""
    imported: tuple[str, ...] = ()
    """Names that it may import."""


@dataclass(frozen=True)
class _Load:
    """A module as it is loaded. Times are counts of what was loaded; 0 is before the first watch."""

    digest: str
    began: int = 0
    changed: int = 0
    """From when on nobody could get the module with other source; 0 if there never was any."""
    gone: int = 0
    """When it was first missing from the loaded modules; 0 if it is there."""


_loads: dict[str, _Load] = {}
_expected: dict[str, str] = {}
_clock = itertools.count(1)


def is_elsewhere(module: str) -> bool:
    """Say whether a module is covered by something else than its own digest."""
    return module.partition(".")[0] in ELSEWHERE | sys.stdlib_module_names


def is_installed(path: Path) -> bool:
    """Say whether a file belongs to Python or to an installed package."""
    return any(path.is_relative_to(folder) for folder in _installed_folders())


def digest_of(content: bytes) -> str:
    """Return what stands for a source (64 hex digits)."""
    return hashlib.sha256(content).hexdigest()


def watch() -> None:
    """See every import from now on; packages in the current folder are found as well."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def expect(sources: Mapping[str, Source]) -> None:
    """Refuse other source than this where one of these modules is imported later; forget what was expected before."""
    _expected.clear()
    for module, source in sources.items():
        if source.file is not None and module not in sys.modules:  # whoever imports one again means to
            _expected[module] = source.text


def load(module: str) -> ModuleType:
    """Import a model factory's module, or return it as it is loaded.

    Raises:
        UserError: It can't be imported.
        FootingError: The source of something that it imports isn't the one that is expected.
    """
    watch()
    if module not in sys.modules:
        expect({})  # nobody relies on what was read before: it was never run
    try:
        return importlib.import_module(module)
    except SisaError:
        raise
    except Exception as error:
        raise UserError(
            f"model.factory: {module!r} can't be imported: {type(error).__name__}: {error}",
            hint="Run where the package can be imported: install it, or set PYTHONPATH to its folder.",
        ) from error


def require(sources: Mapping[str, Source]) -> None:
    """Make sure that those of the modules that are loaded were loaded from this source, all of them.

    Raises:
        FootingError: One was not, or holds on to another one as it was.
    """
    found = {
        module: _load_of(module, source.file)
        for module, source in sources.items()
        if source.file is not None and module in sys.modules
    }
    for module, loaded in found.items():
        if loaded.digest != sources[module].text:
            raise _changed(module)
    for module, loaded in found.items():
        for other in _reached(module, sources) & found.keys():
            if loaded.began < found[other].changed:
                raise FootingError(
                    f"model.factory: {other!r} was imported again with other source, and {module!r} may hold on to "
                    "the old one",
                    hint=RESTART,
                )


def _reached(module: str, sources: Mapping[str, Source]) -> set[str]:
    """Follow the imports from a module; it is reached itself if they lead back."""
    found: set[str] = set()
    waiting = [*sources[module].imported]
    while waiting:
        name = waiting.pop()
        if name in sources and name not in found:
            found.add(name)
            waiting += sources[name].imported
    return found


class _Watcher(MetaPathFinder):
    """Asks the other finders, and puts our loader in the place of Python's."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module."""
        spec = self._found(fullname, path, target)
        if spec is None or not spec.has_location or spec.origin is None or is_elsewhere(fullname):
            return spec
        file = Path(spec.origin)
        if is_installed(file) or not file.is_file():
            return spec
        if target is not None:  # it is imported again
            _loads.setdefault(fullname, _Load("unknown"))
        if type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(fullname, spec.origin)
        elif fullname not in sys.modules or target is not None:
            _begin(fullname, digest_of(file.read_bytes()))
        return spec

    def _found(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if not isinstance(finder, _Watcher) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _Loader(SourceFileLoader):
    """Runs the very bytes whose digest it keeps."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile a module's source."""
        content = self.get_data(self.path)
        code: CodeType = self.source_to_code(content, self.path)
        _begin(fullname, digest_of(content))
        return code


def _begin(module: str, digest: str) -> None:
    """Note that a source is about to run.

    Raises:
        FootingError: Another one is expected.
    """
    if _expected.get(module, digest) != digest:
        raise _changed(module)
    now = next(_clock)
    for other, known in list(_loads.items()):
        if other not in sys.modules and not known.gone:
            _loads[other] = replace(known, gone=now)
    before = _loads.get(module, _Load(digest))
    changed = before.changed if before.digest == digest else before.gone or now
    _loads[module] = _Load(digest, now, changed)


def _load_of(module: str, file: Path) -> _Load:
    """Return how a module was loaded; of one that nobody watched, say whether its file is as old as that."""
    if module not in _loads:
        digest = digest_of(file.read_bytes())
        if file.stat().st_ctime > _process_began():  # looked at last: nothing changed between
            return _Load("unknown")
        _loads[module] = _Load(digest)
    return _loads[module]


def _process_began() -> float:
    """Return when this process was started (seconds since 1970, a tick late); 0 if the kernel doesn't say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError):
        return 0.0
    # The kernel rounds down; nobody has imported anything within the first tick.
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + (ticks + 1) / os.sysconf("SC_CLK_TCK")


def _changed(module: str) -> FootingError:
    return FootingError(f"model.factory: the source of {module!r} changed since this process imported it", hint=RESTART)


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(Path(os.path.realpath(folder)) for folder in folders) + tuple(Path(folder) for folder in folders)
