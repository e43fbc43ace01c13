"""The epoch budget of the stages of a chain (Bourtoule et al. 2021, section IV).

With R slices and e' passes of an unsliced training, every stage r trains on slices 1..r. Equal work
needs e = 2e'/(R+1) epochs a stage; in integers, stage r gets floor(re) - floor((r-1)e). The stage of
generation g is r = R+g: the same formula goes on, so that its budget follows from declared sizes alone and
those of the stages before it stay what they were.
"""

from __future__ import annotations


def epoch_budget(*, epochs: int, slices: int, generations: int = 0) -> tuple[int, ...]:
    """Return the epochs of stages 1..R, and of those of the generations after them.

    >>> epoch_budget(epochs=20, slices=3)
    (10, 10, 10)
    >>> epoch_budget(epochs=10, slices=4)
    (4, 4, 4, 4)
    >>> epoch_budget(epochs=3, slices=4)
    (1, 1, 1, 1)
    >>> epoch_budget(epochs=5, slices=3, generations=3)
    (2, 3, 2, 3, 2, 3)

    Args:
        epochs: Passes of an unsliced training, e'.
        slices: The recipe's R.
        generations: How many were added.

    Raises:
        ValueError: Fewer than one epoch would be left for the first stages.
    """
    if slices > largest_slices(epochs):
        raise ValueError(f"{epochs} epochs allow at most {largest_slices(epochs)} slices, got {slices}")
    ends = [2 * epochs * stage // (slices + 1) for stage in range(slices + generations + 1)]
    return tuple(end - start for start, end in zip(ends, ends[1:], strict=False))


def largest_slices(epochs: int) -> int:
    """Return the largest R with at least one epoch a stage: 2e'/(R+1) >= 1."""
    return 2 * epochs - 1
