"""What every section of a recipe is: frozen, and strict about what it is given."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def whole_or_broken(value: object) -> object:
    """Take a whole number where a number is wanted (a validator that runs before): YAML reads ``1`` as an integer."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
