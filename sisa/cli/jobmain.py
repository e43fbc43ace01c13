"""What a job runs on the cluster: ``python -m sisa.cli.jobmain [--need NAME]... -- VERB ...``."""

from __future__ import annotations

import os
import sys

from sisa.cli.main import run

MISUSED = 2


def main(words: list[str]) -> int:
    """Make sure that the named variables are there, then run the command."""
    needs: list[str] = []
    while words[:1] == ["--need"] and len(words) > 1:
        needs.append(words[1])
        words = words[2:]
    missing = [name for name in needs if not os.environ.get(name)]
    if missing:
        sys.stderr.write(f"error: not set on the node that runs the job: {', '.join(missing)}\n")
        sys.stderr.write("hint: Hand it to the cluster's containers from a secret; values never travel with a job.\n")
        return MISUSED
    words = words[1:] if words[:1] == ["--"] else words
    return run([*words, "--no-ids"] if words[:1] == ["delete"] else words, name_ids=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
