"""Checks that somebody who doesn't trust the store can run."""

from sisa.proof.verify import Verification, verify

__all__ = ["Verification", "verify"]
