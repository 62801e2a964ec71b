"""What a pipeline of stages costs: the share of a step in which a stage waits."""

from __future__ import annotations


def bubble(stages: int, microbatches: int) -> float:
    """(S - 1) / (M + S - 1): of the M + S - 1 turns that M microbatches take through S stages, every stage spends S - 1
    without one (GPipe, arXiv:1811.06965, section 2.3)."""
    return (stages - 1) / (microbatches + stages - 1)
