"""Training that can forget: SISA ensembles with exact, provable deletion.

    store = sisa.train("configs/digits.yaml")
    store.delete(subjects=["17"])
    store.verify(replay="all").ok

Names are imported when they are first used, so that ``import sisa`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sisa.recipe import Recipe, load_recipe
    from sisa.store.launch import train
    from sisa.store.store import Store, open_store

__version__ = "0.1.0"
__all__ = ["Recipe", "Store", "__version__", "load_recipe", "open_store", "train"]

_HOMES = {
    "Recipe": "sisa.recipe",
    "load_recipe": "sisa.recipe",
    "Store": "sisa.store.store",
    "open_store": "sisa.store.store",
    "train": "sisa.store.launch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sisa' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
