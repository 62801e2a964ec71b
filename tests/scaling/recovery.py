"""Parameters back from data: scipy's least squares on a law's own formula, from the law's own starts."""

from collections.abc import Mapping

import jax
import numpy as np
from scipy.optimize import least_squares

from llamax.scaling.lawspec import LawSpec


def recover(spec: LawSpec, data: Mapping[str, np.ndarray], target: np.ndarray, starts: int = 4) -> dict[str, float]:
    """The best of a few unweighted least-squares fits of log target."""
    log = np.array([p.log for p in spec.parameters])
    lower, upper = (np.where(log, np.log(np.where(log, b, 1.0)), b) for b in (spec.lower, spec.upper))

    def residual(u):
        values = {name: jax.numpy.exp(u[i]) if log[i] else u[i] for i, name in enumerate(spec.names)}
        return jax.numpy.log(spec.loss(values, data)) - np.log(target)

    with jax.enable_x64(True):
        value, slope = jax.jit(residual), jax.jit(jax.jacfwd(residual))
        found = []
        for start in spec.starts(data, target, starts):
            u = np.clip(np.where(log, np.log(np.where(log, start, 1.0)), start), lower + 1e-9, upper - 1e-9)
            if np.abs(value(u)).max() < 1e-12:  # all parameters linear: the start is the answer
                found.append((0.0, u))
                break
            fit = least_squares(
                lambda u: np.nan_to_num(np.asarray(value(u)), nan=1e3, posinf=1e3, neginf=-1e3),
                u,
                lambda u: np.nan_to_num(np.asarray(slope(u))),
                bounds=(lower, upper),
                x_scale="jac",
                xtol=1e-14,
                ftol=1e-14,
                gtol=1e-14,
                max_nfev=400,
            )
            found.append((fit.cost, fit.x))
            if fit.cost < 1e-18:
                break
    best = min(found, key=lambda pair: pair[0])[1]
    return {name: float(np.exp(b) if g else b) for name, b, g in zip(spec.names, best, log, strict=True)}
