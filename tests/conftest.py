"""Settings for the whole suite: how hypothesis searches."""

from __future__ import annotations

import os

from hypothesis import settings

# Two cores shared with training: an example's duration says nothing. In CI the same examples every time,
# so that a red run can be run again; elsewhere new ones, so that the search goes on.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
