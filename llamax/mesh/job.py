"""A job of one or several processes: who leads, what was decided, who is alive, and how all end together.

Process 0 leads. What the host programs must not decide differently (how many steps the next dispatch takes, whether to
save, to stop) it decides and the others follow, so that a signal that reaches any one of them ends all at the same
step. A process that fails, or dies, ends the others within `peer_seconds`, with one message by one process.
"""

from __future__ import annotations

import os
import queue
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

from llamax.errors import Interrupted, UserError
from llamax.mesh.channel import Line, Member, Message, Refused, bound_address, gather, join
from llamax.mesh.processes import Processes

T = TypeVar("T")
PEER_LOST = 75  # exit code of a process whose peer died: EX_TEMPFAIL, the same command may go on
LINGER = 5.0  # seconds that process 0 gives the others to end before it takes the job's services with it
SAME = 1.0  # seconds in which the leader may find by itself what another process reports


class Job:
    """This process alone: it leads, and decides for itself."""

    index, count = 0, 1

    @property
    def leader(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def agree(self, value: T) -> T:
        """The leader's `value` (JSON data), in every process. All call it in the same order; nobody waits for a device,
        and the leader waits for nobody."""
        return value

    def wish(self, signal: str | None) -> str | None:
        """What `agree` is asked about stopping: the signal that reached this process; in the leader, any process."""
        return signal

    def meet(self) -> None:
        """Return when all processes have come here. Before a first collective: gloo gives up on a peer after 30 s."""


ALONE = Job()


@contextmanager
def start_processes(plan: Processes | None, facts: Mapping[str, Any]) -> Iterator[Job]:
    """Start this process's part of a job, before JAX has a backend: `with start_processes(find_processes(), {}) as j:`

    `facts` (names to JSON values) must be equal in all processes. The block is left together: by its end or by
    `Interrupted` when all are there; by any other exception in one of them when all have ended, which then happens
    inside here. What the libraries print on stdout while several run goes to stderr.

    Raises:
        UserError: the processes do not find each other, or do not fit. One of them raises it; the others exit.
    """
    if plan is None:
        yield ALONE
        return
    import jax  # before there is a thread to beat: loading libraries from a slow disk holds all threads

    job: Several | None = None
    with _stdout_aside():
        try:
            job = Leader(plan, gather(plan, facts)) if plan.index == 0 else Follower(plan, *join(plan, facts))
            _initialize(plan)
            yield job
            stopped: Interrupted | None = None
        except Interrupted as stop:
            stopped = stop
        except Refused as refused:
            sys.exit(refused.code)
        except BaseException as error:
            if job is None:
                raise
            job.fail(error)
        job.leave()  # type: ignore[union-attr]
        jax.distributed.shutdown()
        job.close()  # type: ignore[union-attr]
    if stopped is not None:
        raise stopped


def _initialize(plan: Processes) -> None:
    """jax.distributed, behind our own rendezvous: everybody is there, and the leader's address is known to be good."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the training loop
    at = plan.port + 1
    host = f"[{plan.host}]" if ":" in plan.host else plan.host
    try:
        jax.distributed.initialize(
            f"{host}:{at}",
            plan.count,
            plan.index,
            None if plan.local_device is None else [plan.local_device],
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"{bound_address(plan)}:{at}" if plan.index == 0 else None,
            initialization_timeout=round(plan.start_seconds) + 1,
            # Ours speaks first; JAX's ends a process by an abort.
            heartbeat_timeout_seconds=round(max(100.0, 2 * plan.peer_seconds)),
            shutdown_timeout_seconds=round(plan.peer_seconds) + 1,
        )
    except RuntimeError as error:
        raise UserError(
            f"process 0 cannot start jax.distributed at port {at}, one above the coordinator's: {error}; choose "
            "another port (--coordinator, LLAMAX_COORDINATOR)"
        ) from None


class Several(Job):
    """What leader and followers share: a thread that reads, beats, and notices silence."""

    def __init__(self, plan: Processes, lines: Mapping[int, tuple[Line, Member]]) -> None:
        self.index, self.count = plan.index, plan.count
        self._seconds, self._lines = plan.peer_seconds, {index: line for index, (line, _) in lines.items()}
        self._members = {index: member for index, (_, member) in lines.items()}
        self._quiet = dict.fromkeys(lines, 0.0)  # seconds since a process was heard, of those this one was awake
        self._ended: set[int] = set()  # processes that have said that they are done
        self._all_ended, self._closing, self._failing = threading.Event(), threading.Event(), threading.Event()
        self._speak = threading.Lock()  # held for good by whoever ends this process
        for line in self._lines.values():
            line.socket.settimeout(plan.peer_seconds)
        self._thread = threading.Thread(target=self._watch, name="job", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ the thread
    def _watch(self) -> None:
        period = min(max(self._seconds / 10, 0.05), 5.0)
        due, last = 0.0, time.monotonic()
        with selectors.DefaultSelector() as selector:
            for index, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, index)
            while not self._closing.is_set():
                if time.monotonic() >= due:
                    due = time.monotonic() + period
                    self._tell({})
                for key, _ in selector.select(max(0.0, due - time.monotonic())):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                passed, last = min(now - last, 2 * period), now  # more: this process, perhaps the machine, was stopped
                for index in self._quiet:
                    self._quiet[index] += passed
                    if self._quiet[index] > self._seconds:
                        self._lost(index, f"has given no sign of life for {self._quiet[index]:.0f} s")

    def _read(self, index: int) -> bool:
        try:
            messages = self._lines[index].read()
        except (OSError, ValueError) as error:
            messages = [] if isinstance(error, TimeoutError) else None
        if messages is None:
            del self._quiet[index]
            if not (index in self._ended or self._closing.is_set()):
                self._lost(index, "died: its connection closed without a word")
            return False
        self._quiet[index] = 0.0
        for message in messages:
            self._take(index, message)
        return True

    def _take(self, index: int, message: Message) -> None:
        raise NotImplementedError

    def _lost(self, index: int, what: str) -> None:
        raise NotImplementedError

    def _tell(self, message: Message) -> None:
        for line in self._lines.values():
            with suppress(OSError):  # its end is noticed by reading
                line.send(message)

    # ------------------------------------------------------------ the end
    def fail(self, error: BaseException) -> NoReturn:
        """End all processes, because this one failed."""
        raise NotImplementedError

    def leave(self) -> None:
        """Return when all processes are done."""
        raise NotImplementedError

    def close(self) -> None:
        """After `leave`: the connections are not needed any more."""
        self._closing.set()
        for line in self._lines.values():
            with suppress(OSError):
                line.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(self._seconds)
        for line in self._lines.values():
            line.socket.close()

    def _exit(self, code: int) -> NoReturn:
        """At once: the main thread may hang in a collective, and the exit handlers of JAX wait for the dead."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


class Leader(Several):
    """Process 0: it decides, hears the others, and is the voice of the job."""

    def __init__(self, plan: Processes, lines: Mapping[int, tuple[Line, Member]]) -> None:
        self._wished: str | None = None
        self._met, self._here, self._came = 0, dict.fromkeys(lines, 0), threading.Condition()
        super().__init__(plan, lines)

    def agree(self, value: T) -> T:
        """Tell the others."""
        self._tell({"value": value})
        return value

    def wish(self, signal: str | None) -> str | None:
        """A signal that reached any process."""
        return signal or self._wished

    def meet(self) -> None:
        """Wait for the others, and let them go on."""
        self._met += 1
        with self._came:
            self._came.wait_for(lambda: min(self._here.values()) >= self._met)
        self.agree(None)

    def _take(self, index: int, message: Message) -> None:
        if "wish" in message:
            self._wished = self._wished or message["wish"]
        elif "here" in message:
            with self._came:
                self._here[index] = message["here"]
                self._came.notify_all()
        elif message.get("end") == 0:
            self._ended.add(index)
            if len(self._ended) == self.count - 1:
                self._all_ended.set()
        elif "end" in message:
            self._ended.add(index)
            if not self._failing.wait(SAME):  # what all find wrong, the leader says about itself
                self._end(message["end"], f"{self._members[index]} ended: {message['why']}")

    def _lost(self, index: int, what: str) -> None:
        self._end(PEER_LOST, f"{self._members[index]} {what}; all {self.count} end; the same command resumes the run")

    def fail(self, error: BaseException) -> NoReturn:
        """Say why and end all."""
        code, why = _told(error)
        if why is not None:
            self._failing.set()
            self._end(code, why)
        time.sleep(3 * SAME)  # a collective fails when a peer does: then the thread knows better, and ends this process
        with self._speak:
            _show(error)
            self._end_all(code, f"{type(error).__name__}: {error}")

    def _end(self, code: int, why: str) -> NoReturn:
        with self._speak:
            if why:
                print(f"error: {why}", file=sys.stderr)
            self._end_all(code, why)

    def _end_all(self, code: int, why: str) -> NoReturn:
        self._tell({"end": code, "why": why})
        until = time.monotonic() + LINGER
        for line in self._lines.values():
            with suppress(OSError, ValueError):
                line.socket.settimeout(max(0.01, until - time.monotonic()))
                while time.monotonic() < until and line.read() is not None:
                    pass
        self._exit(code)

    def leave(self) -> None:
        """Wait for the others; the thread ends this process if one of them is lost."""
        self._all_ended.wait()
        self._tell({"end": 0})


class Follower(Several):
    """Any other process: it follows, and speaks only when there is no leader to speak."""

    def __init__(self, plan: Processes, line: Line, leader: Member) -> None:
        self._values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wish: str | None = None
        self._met = 0
        super().__init__(plan, {0: (line, leader)})

    def agree(self, value: T) -> T:
        """What the leader said; if there is no leader any more, the thread ends this process."""
        return self._values.get()

    def wish(self, signal: str | None) -> str | None:
        """Tell the leader, once."""
        if signal is not None and self._wish is None:
            self._wish = signal
            self._tell({"wish": signal})
        return None

    def meet(self) -> None:
        """Say so, and wait for the leader's word."""
        self._met += 1
        self._tell({"here": self._met})
        self.agree(None)

    def _take(self, index: int, message: Message) -> None:
        if "value" in message:
            self._values.put(message["value"])
        elif message.get("end") == 0:
            self._ended.add(0)
            self._all_ended.set()
        elif "end" in message:
            with self._speak:
                self._exit(message["end"])

    def _lost(self, index: int, what: str) -> None:
        with self._speak:
            print(
                f"error: {self._members[0]} {what}; process {self.index} ends; the same command resumes the run",
                file=sys.stderr,
            )
            self._exit(PEER_LOST)

    def fail(self, error: BaseException) -> NoReturn:
        """Let the leader say why; a traceback is shown here."""
        code, why = _told(error)
        if why is None:
            time.sleep(3 * SAME)  # as the leader does
            with self._speak:
                _show(error)
            why = f"{type(error).__name__}: {error}"
        self._tell({"end": code, "why": why})
        time.sleep(self._seconds)  # the thread exits with the leader's answer
        self._exit(code)

    def leave(self) -> None:
        """Tell the leader and wait for its word."""
        self._tell({"end": 0})
        self._all_ended.wait()


def _told(error: BaseException) -> tuple[int, str | None]:
    """(exit code, what to say) of what ended the block; None: it deserves a traceback."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command continues"
    if isinstance(error, SystemExit):
        return int(error.code or 0) if isinstance(error.code, int | None) else 1, ""
    return 1, None


def _show(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)


@contextmanager
def _stdout_aside() -> Iterator[None]:
    """What C++ libraries print on stdout (gloo greets) goes to stderr: stdout is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
