"""Writes the table of docs/parallelism.md: what each mesh axis sends, computed by llamax/accounting/communication.py.

    python tools/make_parallelism_table.py      after a change of a rule there

A test compares the guide with what this script makes of the rules now.
"""

from __future__ import annotations

import re
from pathlib import Path

from llamax.accounting.communication import RULES, communication
from llamax.config.load import model_data
from llamax.config.run import RunConfig

DOCS = Path(__file__).resolve().parents[1] / "docs" / "parallelism.md"
DEVICES, BATCH, SEQ = 8, 64, 4096
DENSE, MIXTURE = "llama3/8b", "mixtral/8x7b"
WHEN = {
    "data": "weights, gradients and moments fit a device: the least communication there is",
    "fsdp": "they do not: the same arithmetic, weights pass by. The first to try on one fast network",
    "expert": "experts: cut them before anything else cuts their matrices into thin ones",
    "tensor": "a batch has too few sequences for more fsdp, or one layer is too large; within a node alone",
    "context": "one sequence's activations do not fit a device",
    "stage": "the network between groups of devices is too slow for all of the above",
}
START, END = "<!-- table: tools/make_parallelism_table.py -->", "<!-- end of table -->"


def sent(model: str, axis: str, microbatches: int = 1) -> str:
    """Gigabytes that one of DEVICES devices sends in a step with all of them on `axis`."""
    config = RunConfig.model_validate(
        {
            "model": model_data(model),
            "train": {
                "batch_size": BATCH, "seq_len": SEQ, "steps": 1, "activation_dtype": "bfloat16",
                "grad_accumulation": microbatches,
            },
        }
    )  # fmt: skip
    total = sum(one.sent for one in communication(config, {axis: DEVICES}))
    return f"{total / 1e9:.1f}"


def table() -> str:
    """The table in Markdown."""
    lines = [
        f"One of {DEVICES} devices, all on one axis, sends in a step of {BATCH} sequences of {SEQ:,} tokens",
        f"(gigabytes; float32 weights, bfloat16 stream; `stage` with {4 * DEVICES} microbatches):",
        "",
        f"| axis | use it when | what is sent | {DENSE} | {MIXTURE} |",
        "|---|---|---|---:|---:|",
    ]
    for axis, when in WHEN.items():
        parts = 4 * DEVICES if axis == "stage" else 1
        dense = "" if axis == "expert" else sent(DENSE, axis, parts)
        lines.append(f"| `{axis}` | {when} | {RULES[axis]} | {dense} | {sent(MIXTURE, axis, parts)} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The guide with the table in its place."""
    return re.sub(f"{START}.*?{END}", lambda _: f"{START}\n{table()}\n{END}", page, flags=re.DOTALL)


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
