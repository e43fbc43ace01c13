"""Run every example: the ``>>>`` lines in the package's docstrings and in the fenced blocks of the pages.

The examples of one page share their names, from top to bottom. Each module and each page runs in an empty
folder of its own, so that what an example writes is gone afterwards. Exits with 1 if an example is wrong.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import os
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(?P<ticks>```+)(?:python|pycon)\b[^\n]*\n(?P<body>.*?)^(?P=ticks)\s*$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_examples() -> Iterator[doctest.DocTest]:
    """Collect the examples of the package, module by module."""
    package = importlib.import_module("sisa")
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = [module.name for module in pkgutil.walk_packages(package.__path__, prefix="sisa.")]
    for name in ["sisa", *sorted(names)]:
        if not name.endswith("__main__"):
            yield from finder.find(importlib.import_module(name), name)


def page_examples() -> Iterator[doctest.DocTest]:
    """Collect the examples of the pages: one test a page, line numbers kept."""
    parser = doctest.DocTestParser()
    for page in [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))]:
        text = page.read_text(encoding="utf-8")
        kept = [""] * (text.count("\n") + 1)
        for match in FENCE.finditer(text):
            start = text.count("\n", 0, match.start("body"))
            # The closing fence's place stays an empty line, which ends the expected output.
            kept[start : start + match["body"].count("\n")] = match["body"].splitlines()
        yield parser.get_doctest("\n".join(kept), {}, page.relative_to(ROOT).as_posix(), str(page), 0)


def main() -> int:
    """Run what was found, and count."""
    warnings.simplefilter("error")
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for example in [*module_examples(), *page_examples()]:
        if example.examples:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                runner.run(example)
    attempted, failed = runner.tries, runner.failures
    print(f"examples: {attempted} ran, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("NO_COLOR", "1")
    sys.exit(main())
