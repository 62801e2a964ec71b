"""Numbers in words, label placement, the palette, and the running mean."""

import itertools

import numpy as np
import pandas as pd
import pytest

from llamax.report.plots import distinct_sizes, smooth
from llamax.report.style import DARK, DARK_SEQUENCE, LIGHT, LIGHT_SEQUENCE, sequence, spread
from llamax.report.words import count, decimals, duration, interval, power


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (power(3.2e12), "3.2×10¹²"), (power(1e11), "10¹¹"), (power(9.96e11), "10¹²"), (power(2.5e-7), "2.5×10⁻⁷"),
        (power(None), "–"), (count(980), "980"), (count(45123), "45.1\u00a0k"), (count(999_999), "1\u00a0M"),
        (count(1.5e9), "1.5\u00a0B"), (count(float("nan")), "–"), (decimals(1.23456, 3), "1.235"), (decimals(0.004,
        significant=2), "0.004"), (decimals("x"), "–"), (decimals(True), "–"), (duration(0.84), "0.8 s"),
        (duration(59.7), "1 min 0 s"), (duration(151), "2 min 31 s"), (duration(11100), "3 h 5 min"), (interval([1, 2],
        1), "[1.0,\u00a02.0]"), (interval(None), "–"), ],
)  # fmt: skip
def test_words(made, words):
    assert made == words


def test_labels_are_apart_in_order_and_move_no_more_than_needed():
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = list(rng.uniform(0, 60, 6))
        placed = spread(wanted, 10)
        order = np.argsort(wanted)
        gaps = np.diff(np.array(placed)[order])
        assert (gaps >= 10 - 1e-9).all()
    assert spread([0.0, 30.0, 60.0], 10) == [0.0, 30.0, 60.0]
    assert spread([5.0, 5.0], 10) == [0.0, 10.0]
    assert sum(spread([1.0, 2.0, 3.0], 10)) == pytest.approx(6.0), "a stack stays centred on what it labels"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("roles", "steps"), [(LIGHT, LIGHT_SEQUENCE), (DARK, DARK_SEQUENCE)])
def test_text_is_readable_and_the_sequence_ordered_in_grey(roles, steps):
    assert contrast(roles["ink"], roles["surface"]) > 7
    assert contrast(roles["muted"], roles["surface"]) > 4.5
    assert min(contrast(step, roles["surface"]) for step in steps) > 2
    against = [contrast(step, roles["surface"]) for step in steps]
    assert all(a < b for a, b in itertools.pairwise(against)), "larger is more prominent, also without hue"
    assert [len(set(sequence(n))) for n in (1, 2, 7, 12)] == [1, 2, 7, 12]


def test_the_running_mean_keeps_level_and_ends():
    rows = pd.DataFrame({"tokens": np.arange(1, 1001.0), "loss": 2.0 + np.zeros(1000)})
    rows.loc[5, "loss"] = np.nan
    x, y = smooth(rows, "tokens")
    assert (x[0], x[-1]) == (1, 1000)
    assert len(x) <= 242
    assert y == pytest.approx(np.full(len(y), 2.0))
    line = smooth(rows.assign(loss=rows["tokens"] / 100), "tokens")
    assert line[1][100] == pytest.approx(line[0][100] / 100), "a centred mean does not shift a line"


def test_sizes_a_rounding_apart_are_one():
    assert distinct_sizes([100, 250, 101, 99]) == [99, 250]
