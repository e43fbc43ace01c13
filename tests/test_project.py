"""The checks that guard the checkout itself can fail, and its files agree with each other."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Put together from parts, because this file is checked too.
@pytest.mark.parametrize(
    "line",
    [
        "see /" + "work/main",
        "'/" + "home/me/x'",
        "cd /" + "root",
        "path=/" + "root/.cache",
        "https://py" + "pi.org/simple",
        "pull gh" + "cr.io/x/y",
    ],
)
def test_text_of_one_machine_is_refused(tmp_path: Path, line: str) -> None:
    check = script("check_text")
    page = tmp_path / "page.md"
    page.write_text(f"fine\n{line}\n")
    (problem,) = check.problems(page, here=re.compile("never-there/"))
    assert f"{page}:2:" in problem


@pytest.mark.parametrize(
    "line",
    [
        "paper/" + "work/rest",
        "STORE/" + "root/x",
        "../work",
        "https://example.org/home/page",
        "/usr/bin/env",
        "/workers",
        "/homework",
    ],
)
def test_ordinary_text_is_left_alone(tmp_path: Path, line: str) -> None:
    check = script("check_text")
    page = tmp_path / "page.md"
    page.write_text(f"{line}\n")
    assert check.problems(page, here=re.compile("never-there/")) == []


@pytest.mark.parametrize(("shown", "status"), [("2", 0), ("3", 1)])
def test_a_wrong_example_on_a_page_is_found(tmp_path: Path, shown: str, status: int) -> None:
    (tmp_path / "scripts").mkdir()
    copy = tmp_path / "scripts" / "check_examples.py"
    copy.write_bytes((ROOT / "scripts" / "check_examples.py").read_bytes())
    package = tmp_path / "sisa"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "page.md").write_text(f"# Page\n\n```python\n>>> 1 + 1\n{shown}\n```\n\nText.\n")
    command = [
        sys.executable,
        "-P",
        "-c",
        f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({str(copy)!r}, run_name='__main__')",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == status, done.stdout + done.stderr
    assert "1 ran" in done.stdout


def test_constraints_name_one_version_of_each_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(row for extra in project["project"]["optional-dependencies"].values() for row in extra),
    ]
    wanted = {re.match(r"[\w.-]+", row).group().lower() for row in requirements}
    lines = [row for row in (ROOT / "constraints.txt").read_text().splitlines() if row and not row.startswith("#")]
    pinned = dict(row.lower().split("==") for row in lines)
    assert len(pinned) == len(lines)
    assert wanted <= pinned.keys()


def test_changelog_names_the_version() -> None:
    version = importlib.metadata.version("sisa")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
