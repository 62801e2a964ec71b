"""This machine: worker processes, watched until the study is settled. `llamax sweep run` is this launcher."""

from __future__ import annotations

from collections.abc import Sequence

from llamax.launch.protocol import Job, Shape
from llamax.launch.protocol import Settings as Common
from llamax.mesh.cpu import cores


class Settings(Common):
    """`pack`: which cells of one shape train together: auto, never, or at most so many (llamax/sweep/packing.py)."""

    startup_seconds: float = 5.0
    pack: str = "auto"


def shape(settings: Settings) -> Shape:
    """A process on its share of the cores."""
    share = max(1, len(cores()) // settings.workers)
    return Shape(1, share, share, "cpu")


def script(study: str, settings: Settings, launch: int) -> str:
    """The same thing as a command."""
    return f"llamax sweep run {study} --workers {settings.workers} --pack {settings.pack}\n"


def check(settings: Settings) -> None:
    """Nothing is needed."""


def submit(study: str, settings: Settings, launch: int) -> list[str]:
    """Trains the study here, and returns when nothing is left. There is no job to ask about afterwards."""
    from llamax.storage.copies import at_hand
    from llamax.sweep.live import live
    from llamax.sweep.local import run_local
    from llamax.sweep.packing import parse_pack

    with live() as watch:
        run_local(at_hand(study), workers=settings.workers, report=watch, pack=parse_pack(settings.pack))
    return []


def jobs(settings: Settings, ids: Sequence[str]) -> list[Job]:
    """None: the workers end with the command that started them."""
    return []


def cancel(settings: Settings, ids: Sequence[str]) -> None:
    """Nothing to end."""
