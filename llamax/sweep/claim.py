"""The leases of a study: at most one live worker a cell (see llamax/storage/leases.py)."""

from __future__ import annotations

from pathlib import Path

from llamax.storage import leases
from llamax.storage.leases import LEASE_SECONDS, Holder, Lease, LeaseLost

__all__ = ["LEASE_SECONDS", "Holder", "Lease", "LeaseLost", "claim", "holder", "shared_now"]


def claim(study: Path, cell: str, *, lease_seconds: float = LEASE_SECONDS) -> Lease | None:
    """The cell's lease if it is free or its holder is dead, else None. Exactly one of many racers gets it."""
    return leases.claim(study / "leases", cell, lease_seconds=lease_seconds)


def holder(study: Path, cell: str, now: float | None = None) -> Holder | None:
    """The newest lease of a cell, or None if it was never claimed. `now`: see `shared_now`."""
    return leases.holder(study / "leases", cell, now)


def shared_now(study: Path) -> float:
    """The clock that stamps the leases of a study."""
    return leases.shared_now(study / "leases")
