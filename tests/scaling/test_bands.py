"""Bootstrap bands agree with intervals taken at one compute, and hold the fit itself."""

import numpy as np
import pytest

from llamax.scaling import fit_frame
from llamax.scaling.bootstrap import interval
from tests.report.make_study import TARGET, law, optimum


@pytest.fixture(scope="module")
def fit():
    import pandas as pd

    rng = np.random.default_rng(1)
    rows = [
        (c, n, c / (6 * n), law(n, c / (6 * n)) * np.exp(0.003 * rng.standard_normal()))
        for c in (1e11, 3e11, 1e12, 3e12)
        for n in optimum(c) * np.geomspace(0.2, 5, 7)
    ]
    frame = pd.DataFrame(rows, columns=["budget", "n", "d", "loss"]).assign(flops=lambda f: f["budget"])
    return fit_frame(frame, bootstrap=60)


def test_bands_are_the_intervals_of_the_draws_at_each_compute(fit):
    found = fit.as_dict()
    bands = found["approach2"]["bands"]
    at = bands["flops"][20]
    low, high = interval(fit.approach2_draws.n.at(at), fit.level)
    assert (bands["n"]["low"][20], bands["n"]["high"][20]) == (low, high)
    assert low < fit.approach2.n.at(at) < high
    assert bands["flops"][0] == pytest.approx(0.5e11)
    assert bands["flops"][-1] == pytest.approx(3e14)


def test_the_band_of_the_loss_holds_the_law_and_widens_beyond_the_data(fit):
    bands = fit.as_dict()["approach3"]["bands"]
    low, high = np.array(bands["loss"]["low"]), np.array(bands["loss"]["high"])
    at = int(np.argmin(np.abs(np.log(np.array(bands["flops"]) / TARGET))))
    n = optimum(bands["flops"][at])
    assert low[at] < law(n, bands["flops"][at] / (6 * n)) < high[at]
    inside = int(np.argmin(np.abs(np.log(np.array(bands["flops"]) / 5e11))))
    assert high[-1] - low[-1] > 3 * (high[inside] - low[inside])


def test_no_bands_without_a_bootstrap(fit):
    bare = fit_frame(fit.runs, bootstrap=0).as_dict()
    assert bare["approach2"]["bands"] is bare["approach3"]["bands"] is None
