"""A real SLURM on this machine: munge, a controller and three nodes, bound to loopback, all files in one folder."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NODES = ("n0", "n1", "n2")
CONF = """\
ClusterName=llamax
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2
PartitionName=low Nodes=n[0-2] Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=n[0-2] PriorityTier=10 PreemptMode=OFF State=UP
"""


@contextmanager
def cluster() -> Iterator[None]:
    """Three idle nodes that this process's sbatch, squeue and llamax talk to; skips the tests where that cannot be."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install -y slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path has at most 107 letters
    conf = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    conf.write_text(CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=_free_ports(4)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = [f"--{name}={folder}/munge.{end}" for name, end in _MUNGE.items()]
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ |= {"SLURM_CONF": str(conf), "PATH": _path()}
    with ExitStack() as running:
        running.callback(_restore, before)
        running.callback(_kill_rest, conf)
        start = [["munged", "--foreground", "--force", *files], ["slurmctld", "-D", "-c"]]
        for command in [*start, *(["slurmd", "-D", "-N", node] for node in NODES)]:
            running.enter_context(_daemon(command, folder))
            if command[0] == "munged" and not _within(10, (folder / "munge.sock").exists):
                pytest.skip(f"munge does not start: {_tail(folder / 'munged.out')}")
        if not _within(30, lambda: run("sinfo", "-h", "-N", "-o", "%T", "-p", "low", check=False) == 3 * "idle\n"):
            pytest.skip(f"SLURM does not start: {_tail(folder / 'slurmctld.out')} {run('sinfo', check=False)}")
        try:
            yield
        finally:
            run("scancel", "--user", getpass.getuser(), check=False)
            _within(20, lambda: not run("squeue", "-h", check=False).strip())
    shutil.rmtree(folder, ignore_errors=True)


def run(*command: str, check: bool = True) -> str:
    """What a client prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def lose(node: str) -> None:
    """Ends every process of a node at once, as a power cut does, and tells the controller as its monitor would."""
    conf = Path(os.environ["SLURM_CONF"])
    tasks = [pid for pid, env in _environments(conf) if f"SLURMD_NODENAME={node}" in env]
    steps = {parent for pid in tasks if "slurmstepd" in _name(parent := _parent(pid))}
    daemon = int((conf.parent / f"slurmd-{node}.pid").read_text())
    for pid in [daemon, *steps, *tasks]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 300.0) -> Any:
    """The first true value of `condition`; fails after `seconds`."""
    found: list[Any] = []
    if not _within(seconds, lambda: bool(found.append(condition()) or found[-1])):
        pytest.fail(f"{what}: not within {seconds:g} s\n{run('squeue', '-r', '-t', 'all', check=False)}")
    return found[-1]


# ---------------------------------------------------------------- processes
_MUNGE = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


@contextmanager
def _daemon(command: list[str], folder: Path) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environments(conf: Path) -> Iterator[tuple[int, list[str]]]:
    """(pid, environment) of every process that this cluster started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                env = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                if f"SLURM_CONF={conf}" in env:
                    yield int(entry.name), env


def _kill_rest(conf: Path) -> None:
    """What SLURM's own end leaves: steps whose controller is gone."""
    for pid, env in _environments(conf):
        if any(item.startswith("SLURM_JOB_ID=") for item in env):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/local/sbin", "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    with ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.2)
    return False


def _tail(path: Path) -> str:
    return " ".join(path.read_text(errors="replace").splitlines()[-2:]) if path.exists() else ""
