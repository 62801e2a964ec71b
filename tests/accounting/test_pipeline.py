"""The bubble of a pipeline, against a count of who works when."""

from __future__ import annotations

import pytest

from llamax.accounting.pipeline import bubble, turns


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 1), (4, 8), (8, 3)])
def test_bubble_is_the_share_of_idle_turns(stages: int, microbatches: int) -> None:
    """Stage s works on microbatch m in the turn after stage s - 1 did, and on one at a time."""
    done = [[-1] * microbatches for _ in range(stages)]
    for s in range(stages):
        for m in range(microbatches):
            done[s][m] = max(done[s - 1][m] if s else -1, done[s][m - 1] if m else -1) + 1
    last = done[-1][-1] + 1
    assert turns(stages, microbatches) == last
    for row in done:
        assert len(set(row)) == microbatches
        assert bubble(stages, microbatches) == pytest.approx(1 - len(row) / last)
