"""The control channel of a job: one TCP connection from every process to process 0, one JSON object a line.

JAX moves arrays between devices; this moves what the host programs say to each other: who is there and runs what, what
process 0 decided, who is alive, and why one ended. It does not touch a device, so it works before there is a backend,
costs training nothing, and answers while a collective hangs.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from llamax.errors import UserError
from llamax.mesh.processes import Processes

Message = dict[str, Any]
LATE = 2.0  # seconds that processes still have to come once it is known that they cannot go on together
RETRY = 0.2


class Line:
    """A socket that carries JSON objects, one a line; `send` is safe from any thread."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self.socket, self._rest, self._lock = connection, b"", threading.Lock()
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises OSError when the other end is gone."""
        with self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[Message] | None:
        """What has come, waiting for something; None at the end. Raises OSError (time out), ValueError (no JSON)."""
        data = self.socket.recv(1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a line of this protocol")
        return messages

    def first(self) -> Message | None:
        """The first message, alone; None if the other end closed instead."""
        while True:
            messages = self.read()
            if messages is None or messages:
                return messages[0] if messages else None


class Member(NamedTuple):
    """One process of a job, as it introduced itself."""

    number: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.number} (pid {self.pid} on {self.host})"


def gather(plan: Processes, facts: Mapping[str, Any]) -> dict[int, tuple[Line, Member]]:
    """In process 0: wait for all others, see that they run the same, and let them go on. A line to each.

    `facts` is what must be equal everywhere: versions, the command. None is not known, and equal to anything.

    Raises:
        UserError: the address cannot be bound; processes that did not come, that contradict each other, or that run
            something else. All that came are told, so that they end too.
    """
    here = Member(0, socket.gethostname(), os.getpid())
    came: dict[int, tuple[Line, Member]] = {}
    others: list[Line] = []
    problem: str | None = None
    until = time.monotonic() + plan.start_seconds
    with _listen(plan, plan.port) as server:
        try:
            _listen(plan, plan.port + 1).close()  # jax.distributed would crash where that one is taken
        except UserError as error:
            problem, until = str(error), time.monotonic() + LATE
        while len(came) < plan.count - 1 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                line = Line(connection, min(left, 5.0))
                hello = line.first()
                member = Member(*hello["member"])  # type: ignore[index]
            except (OSError, ValueError, TypeError, KeyError):  # nobody in time, or nobody of ours
                continue
            found = _against(plan, here, member, hello or {}, came, facts)
            if found is not None and problem is None:
                problem, until = found, min(until, time.monotonic() + LATE)
            if member.number in came or not 0 < member.number < plan.count:
                others.append(line)
            else:
                came[member.number] = line, member
    if problem is None and len(came) < plan.count - 1:
        missing = [str(i) for i in range(1, plan.count) if i not in came]
        problem = (
            f"after {plan.start_seconds:g} s only {len(came) + 1} of {plan.count} processes have come to "
            f"{plan.coordinator} ({plan.source}): missing {', '.join(missing)}; start them with the same coordinator "
            "and number of processes"
        )
    answer = {"end": 2, "why": problem} if problem else {"welcome": here}
    for line in [*others, *(line for line, _ in came.values())]:
        try:
            line.send(answer)
        except OSError:  # it will be missed when the job begins
            continue
    if problem:
        raise UserError(problem)
    return came


def _against(
    plan: Processes,
    here: Member,
    member: Member,
    hello: Message,
    came: Mapping[int, tuple[Line, Member]],
    facts: Mapping[str, Any],
) -> str | None:
    """Why this process cannot be part of the job, in words."""
    if hello["count"] != plan.count:
        return (
            f"{member} counts {hello['count']} processes and {here} counts {plan.count}; "
            "give all processes of a job the same number"
        )
    other = here if member.number == 0 else came[member.number][1] if member.number in came else None
    if other is not None:
        return (
            f"two processes call themselves {member.number}: pid {other.pid} on {other.host} and pid {member.pid} on "
            f"{member.host}; number them from 0 to {plan.count - 1}"
        )
    theirs = hello["facts"]
    known = [name for name in facts if facts[name] is not None and theirs.get(name) is not None]
    differ = [name for name in known if facts[name] != theirs[name]]
    if not differ:
        return None
    shown = "; ".join(f"{name} is {theirs[name]} there and {facts[name]} here" for name in differ[:3])
    more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
    return (
        f"{member} does not run what {here} runs: {shown}{more}; install the same and give the same command on every "
        "host (LLAMAX_PROCESSES=1 trains alone)"
    )


def join(plan: Processes, facts: Mapping[str, Any]) -> tuple[Line, Member]:
    """In all others: come to process 0 and wait until all are there. The line to it, and who it is.

    Raises:
        UserError: it does not answer.
        Refused: it cannot go on, and has said why itself.
    """
    hello = {"member": Member(plan.index, socket.gethostname(), os.getpid()), "count": plan.count, "facts": facts}
    until, why = time.monotonic() + plan.start_seconds, "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((plan.host, plan.port), timeout=min(left, 5.0))
            line = Line(connection, left + LATE + 5.0)  # process 0 may wait for others as long, and then says so
            line.send(hello)
            answer = line.first()
        except (OSError, ValueError) as error:
            why, answer = str(error), None
        if answer is not None and "welcome" in answer:
            return line, Member(*answer["welcome"])
        if answer is not None and "end" in answer:
            raise Refused(answer["end"], answer["why"])
        time.sleep(RETRY)
    raise UserError(
        f"process {plan.index} of {plan.count} found no process 0 at {plan.coordinator} in {plan.start_seconds:g} s "
        f"({why}; {plan.source}); start it, or give this one the address at which it listens"
    )


class Refused(Exception):
    """Process 0 ended the job, and has said why: `code` is everybody's exit code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def _listen(plan: Processes, port: int) -> socket.socket:
    """A listening socket at a port of the coordinator's. Raises UserError where it cannot be bound."""
    address = plan.bind or plan.host
    until = time.monotonic() + min(plan.start_seconds, 30.0)
    while True:
        try:
            family, kind, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            server = socket.socket(family, kind)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(where)
            server.listen(1024)
            return server
        except socket.gaierror as error:  # the name of a pod appears a little after the pod
            if time.monotonic() > until:
                raise UserError(f"process 0 cannot listen: {address!r} has no address ({error.strerror})") from None
            time.sleep(RETRY)
        except OSError as error:
            above = "" if port == plan.port else ", one above the coordinator's port, where jax.distributed goes"
            raise UserError(
                f"process 0 cannot listen at {address}:{port}{above}: {(error.strerror or str(error)).lower()}; "
                "choose another port (--coordinator, LLAMAX_COORDINATOR), or an address of this host (--bind, "
                "LLAMAX_BIND)"
            ) from None


def bound_address(plan: Processes) -> str:
    """The numeric address that process 0 listens at, as JAX takes it (an IPv6 one in brackets)."""
    address = socket.getaddrinfo(plan.bind or plan.host, plan.port, type=socket.SOCK_STREAM)[0][4][0]
    return f"[{address}]" if ":" in str(address) else str(address)
