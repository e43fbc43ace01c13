"""The library's face: train a store, delete people from it, ask it, check it."""
