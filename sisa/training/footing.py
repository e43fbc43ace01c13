"""The footing of a training: which code and which platform gave the bits."""

from __future__ import annotations

from dataclasses import dataclass

from sisa.learners.source import code_version
from sisa.recipe import Recipe
from sisa.state import JSON
from sisa.training.platform import fingerprint, platform_id


@dataclass(frozen=True)
class Footing:
    """Code version, platform id, and what the platform is."""

    code: str
    platform: str
    fingerprint: dict[str, JSON]


def footing_here(recipe: Recipe) -> Footing:
    """Return the footing of this process for a recipe."""
    found = fingerprint(recipe)
    return Footing(code_version(recipe), platform_id(found), found)
