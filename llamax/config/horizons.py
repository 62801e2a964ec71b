"""How a run's length may be given: exactly one of these fields of `train`."""

HORIZONS = ("steps", "tokens", "tokens_per_param", "flops")
