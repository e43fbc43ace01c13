"""Settings for the whole suite: how hypothesis searches, and where temporary stores lie."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from hypothesis import settings

# Two cores shared with training: an example's duration says nothing. In CI the same examples every time,
# so that a red run can be run again; elsewhere new ones, so that the search goes on.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A store is many small files, each made durable. Where memory serves as a disk and has room, tests put theirs there:
# the same calls are made, and nobody waits for a disk.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Started in the background a shell has SIGINT ignored, and so has everything below it: Ctrl-C couldn't be tried there.
signal.signal(signal.SIGINT, signal.default_int_handler)
