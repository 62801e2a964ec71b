"""Which process of which job this is: told by options, by LLAMAX_* variables, or by the cluster that started it.

    options or variables   --coordinator, --processes, --process, --bind or LLAMAX_COORDINATOR, LLAMAX_PROCESSES,
                           LLAMAX_PROCESS, LLAMAX_BIND; options go first
    SLURM                  a step of several tasks (srun), which says all but the port, and that is the job's own
    Kubernetes             the index of an indexed job; coordinator and number come in LLAMAX_* from its manifest
    Cloud TPU              several hosts of a slice, or several slices, as JAX detects them

A plain process is none of these and starts nothing. LLAMAX_PROCESSES=1 makes it plain under any cluster.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llamax.errors import UserError

OPTIONS = {
    "coordinator": "LLAMAX_COORDINATOR",
    "processes": "LLAMAX_PROCESSES",
    "process": "LLAMAX_PROCESS",
    "bind": "LLAMAX_BIND",
    "peer_seconds": "LLAMAX_PEER_SECONDS",
    "start_seconds": "LLAMAX_START_SECONDS",
}
Option = str | int | float | None
PEER_SECONDS = 30.0  # without a sign of life from a process before the others end
START_SECONDS = 300.0  # for all processes to come together
PORT, PORTS = 61440, 2000  # of SLURM jobs: above the range from which Linux takes ports for outgoing connections
TPU_PORT = 8482  # JAX's own choice on Cloud TPU


@dataclass(frozen=True)
class Processes:
    """A job of several processes, as one of them sees it.

    Process 0 listens at `coordinator`, HOST:PORT as the others reach it, for this package, and at PORT + 1 for
    `jax.distributed`. It binds the address that HOST is on its own machine, and so loopback where HOST is loopback,
    or `bind`.
    """

    coordinator: str
    count: int
    index: int
    source: str = "as told"  # what said so
    bind: str | None = None
    local_device: int | None = None  # of a process that has one device of several on its host
    peer_seconds: float = PEER_SECONDS
    start_seconds: float = START_SECONDS

    def __post_init__(self) -> None:
        if not self.host or not 0 < self.port < 65535:
            raise UserError(
                f"coordinator {self.coordinator!r}: give HOST:PORT, with PORT + 1 free too, such as 10.0.0.1:8476"
            )
        if not 0 <= self.index < self.count:
            raise UserError(f"process {self.index} of {self.count}: processes are numbered from 0 to {self.count - 1}")
        for name in ("peer_seconds", "start_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{OPTIONS[name]}={getattr(self, name):g}: give a positive number of seconds")

    @property
    def host(self) -> str:
        """HOST of the coordinator, without the brackets of an IPv6 address."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """PORT of the coordinator, 0 where it has none."""
        port = self.coordinator.rpartition(":")[2]
        return int(port) if port.isdigit() else 0


def find_processes(
    environment: Mapping[str, str] = os.environ, **options: str | float | int | None
) -> Processes | None:
    """This process's place in its job, or None for a plain one. `options` are those of OPTIONS.

    Raises:
        UserError: part of what is needed is missing, or no number, or out of range.
    """
    told = {name: given for name in OPTIONS if (given := _told(name, options, environment)) is not None}
    if "processes" in told and told["processes"].number() == 1:
        return None
    needed = {"coordinator", "processes", "process"}
    found: dict[str, Any] = _slurm(environment)
    if not found and "coordinator" not in told:
        found = _cloud_tpu(environment)
    if "coordinator" in told and (index := environment.get("JOB_COMPLETION_INDEX")):
        found.setdefault("process", Told("JOB_COMPLETION_INDEX", index).number())
    if not needed & (set(found) | set(told)):
        return None
    for name, given in told.items():
        found[name] = given.text if name in ("coordinator", "bind") else given.number()
    if missing := [f"--{name} ({OPTIONS[name]})" for name in sorted(needed - set(found))]:
        given_words = ", ".join(f"{given.label}={given.text}" for given in told.values())
        raise UserError(
            f"{given_words}: one of several processes needs {' and '.join(missing)} too; "
            "give all three, or none to train in one process"
        )
    return Processes(**{NAMES.get(name, name): value for name, value in found.items()})


NAMES = {"processes": "count", "process": "index"}


class Told(NamedTuple):
    """A setting as text, and what it was called."""

    label: str
    text: str

    def number(self) -> float | int:
        """Raises UserError if it is none, or should be whole."""
        seconds = self.label.casefold().endswith("seconds")
        try:
            return float(self.text) if seconds else int(self.text)
        except ValueError:
            raise UserError(f"{self.label}={self.text!r} is not a {'number' if seconds else 'whole number'}") from None


def _told(name: str, options: Mapping[str, Option], environment: Mapping[str, str]) -> Told | None:
    """An option, or else its variable."""
    if (option := options.get(name)) is not None:
        return Told(f"--{name.replace('_', '-')}", str(option))
    return Told(OPTIONS[name], environment[OPTIONS[name]]) if environment.get(OPTIONS[name]) else None


def _slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    """A step of several tasks. A batch script is one task, whatever it has reserved: `srun` starts the others."""
    count, step = environment.get("SLURM_STEP_NUM_TASKS", "1"), environment.get("SLURM_STEP_ID", "")
    if not (count.isdigit() and int(count) > 1 and step.isdigit() and "SLURM_PROCID" in environment):
        return {}
    job = environment.get("SLURM_JOB_ID", "0")
    port = PORT + 2 * ((int(job) + 101 * int(step)) % PORTS)  # steps of a job at a time do not meet
    alone = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
    host = "127.0.0.1" if alone else first_host(environment.get("SLURM_STEP_NODELIST", ""))
    found = {"coordinator": f"{host}:{port}", "processes": int(count), "process": int(environment["SLURM_PROCID"])}
    several = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0] != "1"
    if several and "," in environment.get("CUDA_VISIBLE_DEVICES", ","):  # else it has been given its own already
        found["local_device"] = int(environment.get("SLURM_LOCALID", "0"))
    return {**found, "source": f"SLURM step {job}.{step}"}


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: `gpu007` of `gpu[007-010,12],cpu1`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part for part in found.groups() if part) if found else "127.0.0.1"


def _cloud_tpu(environment: Mapping[str, str]) -> dict[str, Any]:
    """Hosts of TPU slices as JAX detects them; one host is a plain process. Asks the metadata server on a TPU host."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return {}
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if not running_in_cloud_tpu_vm:
        return {}
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster

    for cluster in (GkeTpuCluster, GceTpuCluster):
        if cluster.is_env_present():
            if (count := cluster.get_process_count()) == 1:
                return {}
            address = cluster.get_coordinator_address(timeout_secs=int(START_SECONDS), override_coordinator_port=None)
            return {
                "source": f"Cloud TPU ({cluster.name})",
                "coordinator": f"{address.rpartition(':')[0]}:{TPU_PORT}",
                "processes": count,
                "process": cluster.get_process_id(),
            }
    return {}
