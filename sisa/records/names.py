"""Names of the canonical columns that every partition has beside its features."""

from __future__ import annotations

from typing import Final

RECORD: Final = "_sisa_record"
"""Canonical text of the record's id."""
SUBJECT: Final = "_sisa_subject"
"""Canonical text of the id of the person who owns it."""
LABEL: Final = "_sisa_label"
"""Class index, int32."""
CONTENT: Final = "_sisa_content"
"""Keyed digest of what the record says, 16 bytes: a guard against damage, on disk only."""
