"""A run in a process of its own, to be killed: `python -m tests.storage.runner CONFIG_JSON RUN_DIR`."""

from __future__ import annotations

import json
import sys

from llamax.train import mirror

mirror.SEND_SECONDS = 0.05
mirror.RUN_LEASE_SECONDS = 3.0


def main() -> None:
    from llamax.config.load import run_from_data
    from llamax.train.loop import train

    result = train(run_from_data(json.loads(sys.argv[1])), sys.argv[2])
    print(json.dumps(result["eval_loss"]))


if __name__ == "__main__":
    main()
