"""Plans of small studies whose cells differ in their seed."""

from __future__ import annotations

from llamax.config.load import validate
from llamax.config.sweep import SweepConfig
from llamax.sweep.plan import Plan, make_plan

BASE = {"model": {"base": "ladder/d16", "max_seq_len": 64}, "train": {"steps": 10, "seq_len": 8, "batch_size": 1}}


def seeds_plan(count: int, **more: object) -> Plan:
    """A plan of `count` cells s0, s1, ... of ten steps."""
    data = {"name": "study", "base": BASE, "axes": [{"kind": "seeds", "count": count}], **more}
    return make_plan(validate(SweepConfig, data, "test"))
