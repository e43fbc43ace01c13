"""What messages about a recipe say of names and numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import yaml

NAMED = 20
"""How many columns a message names; a table may have thousands."""


def some_of(names: Sequence[str]) -> str:
    """List the first of some names, and say how many more there are.

    >>> some_of(["age", "sex"])
    'age, sex'
    """
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def number_hint(text: str) -> str:
    """Say how YAML writes the number that a text spells; empty if it spells none.

    >>> number_hint("1.0e30")
    ' (YAML reads 1.0e30 as text: write 1.0e+30)'
    """
    try:
        number = float(text)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    written = yaml.safe_dump(number).splitlines()[0]
    quoted = not isinstance(yaml.safe_load(text), str)
    reason = "in quotes it is a text" if quoted else f"YAML reads {text} as text"
    return f" ({reason}: write {written})"
