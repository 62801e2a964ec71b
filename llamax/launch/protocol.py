"""What a launcher is, and how one is found with its settings.

A launcher starts workers and knows nothing of cells: workers claim those by lease (llamax/sweep/claim.py), so one that
loses, repeats or adds workers loses no work and does none twice. Another launcher is another file in `on/`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, cast

from pydantic import Field, NonNegativeFloat, PositiveInt

import llamax.launch.on as on
from llamax.config.base import Frozen
from llamax.config.files import find, read_yaml, shipped, unknown
from llamax.config.load import validate
from llamax.config.merge import apply_override, parse_override
from llamax.errors import UserError

Env = dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str]


class Settings(Frozen):
    """What every launcher can be told.

    `workers` share the cells. The others are for the estimate alone: what one device costs an hour, in dollars; the
    fraction of its peak that training is taken to reach; seconds until a worker takes its first step.
    """

    workers: PositiveInt = 1
    price_per_device_hour: NonNegativeFloat | None = None
    utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    startup_seconds: NonNegativeFloat = 60.0


@dataclass(frozen=True)
class Shape:
    """One worker: so many processes, together on so many JAX devices, which are so many `chips` (what is paid for).

    `kind` is a name in llamax.accounting.topology or JAX's own name of a device; None: not known. "cpu" counts cores.
    """

    processes: int
    devices: int
    chips: int
    kind: str | None


@dataclass(frozen=True)
class Job:
    """What a scheduler says of one job. `live`: it runs or will; None: not known."""

    id: str
    state: str
    live: bool | None
    note: str = ""


class Launcher(Protocol):
    """The names a module in `on/` has. `launch` counts the launches of a study before this one."""

    Settings: type[Any]

    def shape(self, settings: Any) -> Shape:
        """What one worker runs on, for the estimate."""

    def script(self, study: str, settings: Any, launch: int) -> str:
        """What is submitted, as `--dry-run` prints it. Reads and writes nothing. Raises UserError for bad settings."""

    def check(self, settings: Any) -> None:
        """Raises UserError where a submission cannot work: no client program, no credentials."""

    def submit(self, study: str, settings: Any, launch: int) -> list[str]:
        """Starts the workers of a study that exists; returns the ids of its jobs. Raises UserError if refused."""

    def jobs(self, settings: Any, ids: Sequence[str]) -> list[Job]:
        """What the scheduler says of jobs. Raises UserError where it cannot be asked."""

    def cancel(self, settings: Any, ids: Sequence[str]) -> None:
        """Ends jobs. Raises UserError where the scheduler cannot be asked."""


def launcher_names() -> list[str]:
    """The files of `on/`."""
    return sorted(module.name for module in pkgutil.iter_modules(on.__path__))


def find_launcher(name: str) -> Launcher:
    """A launcher by the name of its file. Raises UserError if there is none."""
    if name not in launcher_names():
        raise UserError(unknown("launcher", name, launcher_names()))
    return cast(Launcher, importlib.import_module(f"{on.__name__}.{name}"))


def load_settings(name: str, overrides: Sequence[str] = ()) -> tuple[str, Settings]:
    """(launcher, settings) of `--on NAME`: a shipped block (configs/launch), a YAML path, or a launcher's defaults.

    A block names its `launcher`; the rest are that launcher's fields, and `overrides` (a.b=value) change them.

    Raises:
        UserError: no such block or launcher, or an unknown, missing or impossible field.
    """
    if name in launcher_names() and name not in shipped("launch"):
        data: dict[str, Any] = {"launcher": name}
    else:
        data = read_yaml(find("launch", name, "launcher"))
    for text in overrides:
        data = apply_override(data, *parse_override(text))
    launcher = data.pop("launcher", None)
    if not isinstance(launcher, str):
        raise UserError(f"{name}: launcher = {launcher!r}; write `launcher:` and one of {', '.join(launcher_names())}")
    return launcher, validate(find_launcher(launcher).Settings, data, name)
