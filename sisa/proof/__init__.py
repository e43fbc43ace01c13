"""Checks that somebody who doesn't trust the store can run."""
