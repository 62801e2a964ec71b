"""Which process this is, in words that another process can check: what a lease says of its holder."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
from pathlib import Path
from typing import Any


@functools.cache
def machine() -> str:
    """An opaque name of this boot of this machine as this process sees it: host, boot id and process-id namespace.

    Two containers on one host differ, because a process id of one says nothing about the other.
    """
    boot = _read("/proc/sys/kernel/random/boot_id")
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    text = "\0".join((socket.gethostname(), platform.system(), boot, namespace))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; "" if it has ended or is a zombie; None without /proc."""
    if not os.path.isdir("/proc/self"):
        return None
    stat = _read(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def me() -> dict[str, Any]:
    """The identity of this process, as a lease records it."""
    return {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid())}


def alive(record: dict[str, Any]) -> bool | None:
    """Whether the process of a record runs: known only on its own machine, None elsewhere."""
    if record.get("machine") != machine() or not isinstance(record.get("pid"), int):
        return None
    now = started(record["pid"])
    if now is not None and record.get("started") is not None:
        return now == record["started"]
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return None  # a process of that number runs, which may be another one


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
