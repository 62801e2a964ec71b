"""What a pipeline of stages costs: how many turns a batch takes, and the share of them in which a stage waits."""

from __future__ import annotations


def turns(stages: int, microbatches: int) -> int:
    """M + S - 1: the last of M microbatches enters the first of S stages in turn M and leaves the last S - 1 later."""
    return microbatches + stages - 1


def bubble(stages: int, microbatches: int) -> float:
    """(S - 1) / (M + S - 1): the share of the turns that a stage spends without a microbatch (GPipe, arXiv:1811.06965,
    section 2.3)."""
    return (stages - 1) / turns(stages, microbatches)
