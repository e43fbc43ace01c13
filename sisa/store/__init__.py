"""The library's face: train a store, delete people from it, ask it, check it."""

from sisa.store.results import Deletion, Repaired, Training
from sisa.store.store import Store, open_store
from sisa.store.launch import train

__all__ = ["Deletion", "Repaired", "Store", "Training", "open_store", "train"]
