"""Refuse tracked text that works, or makes sense, on one machine only.

Two kinds: absolute paths of somebody's machine, and addresses of package registries (which one to use is
the matter of each machine's own configuration). Prints each place and exits with 1 if there is any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MACHINE_PATH = re.compile(
    r"(?<![\w.~$})/-])/(?:work|farm|root|home|Users|opt|mnt|tmp/(?:bash_jobs|boot|spec)|private/var)(?=[/.]|\b(?![\w-]))"
)
REGISTRY = re.compile(
    r"\b(?:pypi\.(?:org|python)|pythonhosted\.org|registry\.npmjs|npmjs\.com|registry\.yarnpkg|deb\.debian|"
    r"security\.debian|archive\.ubuntu|download\.pytorch|conda\.anaconda|repo\.anaconda|crates\.io|"
    r"proxy\.golang|repo\d?\.maven|docker\.io|ghcr\.io|quay\.io)\b",
    re.IGNORECASE,
)


def tracked_files(root: Path) -> list[Path]:
    """List the files that git tracks, or would after ``git add``."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    return [root / name.decode() for name in sorted(set(listing.split(b"\0"))) if name]


def problems(path: Path, *, here: re.Pattern[str]) -> list[str]:
    """Return what is wrong in one file, a line each; nothing if it isn't text."""
    content = path.read_bytes()
    if b"\0" in content:
        return []
    kinds = {"absolute machine path": MACHINE_PATH, "this checkout's own path": here, "package registry": REGISTRY}
    return [
        f"{path}:{number}: {kind}: {line.strip()[:100]}"
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1)
        for kind, pattern in kinds.items()
        if pattern.search(line)
    ]


def main() -> int:
    """Check the checkout that this script lies in."""
    root = Path(__file__).resolve().parent.parent
    here = re.compile(re.escape(f"{root}/"))
    files = [path for path in tracked_files(root) if path.is_file()]
    found = [problem for path in files for problem in problems(path, here=here)]
    for problem in found:
        print(problem.replace(f"{root}/", "", 1))
    print(f"text: {len(files)} files, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
