"""The rendezvous of a job and its words, between threads of this process: no JAX, real sockets on loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llamax.errors import UserError
from llamax.mesh.channel import Line, Refused, gather, join
from llamax.mesh.job import ALONE, Follower, Leader, start_processes
from llamax.mesh.processes import Processes
from tests.processes.harness import free_port

FACTS = {"jax": "0.10.2", "train.lr": 0.01}


def plans(count: int, port: int | None = None, **fields: Any) -> list[Processes]:
    address = f"127.0.0.1:{free_port() if port is None else port}"
    return [Processes(address, count, i, **{"start_seconds": 20.0, **fields}) for i in range(count)]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each call gave or raised, all running at once."""
    found: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def meet(plans: list[Processes], *facts: dict[str, Any]) -> list[Any]:
    facts = facts or (FACTS,) * len(plans)
    calls = [(lambda p=p, f=f: gather(p, f) if p.index == 0 else join(p, f)) for p, f in zip(plans, facts, strict=True)]
    return together(*calls)


def close(found: list[Any]) -> None:
    for line, _ in [*found[0].values(), *found[1:]]:
        line.socket.close()


def test_all_meet_and_know_each_other():
    found = meet(plans(3))
    assert sorted(found[0]) == [1, 2]
    assert [found[0][i][1].number for i in (1, 2)] == [1, 2]
    assert all(leader.number == 0 and isinstance(line, Line) for line, leader in found[1:])
    close(found)


def test_versions_that_differ_are_said_once():
    leader, same, other = meet(plans(3), FACTS, FACTS, {**FACTS, "jax": "0.10.1"})
    assert isinstance(leader, UserError)
    assert "process 2 (pid" in str(leader)
    assert "jax is 0.10.1 there and 0.10.2 here; install the same" in str(leader)
    assert all(isinstance(end, Refused) and end.code == 2 and str(end) == str(leader) for end in (same, other))


def test_two_of_one_number():
    first, second, third = plans(3)
    leader, one, two = meet([first, second, Processes(third.coordinator, 3, 1, start_seconds=20.0)])
    assert "two processes call themselves 1" in str(leader)
    assert isinstance(one, Refused)
    assert isinstance(two, Refused)


def test_numbers_of_processes_that_differ():
    first, second = plans(2)
    leader, other = meet([first, Processes(second.coordinator, 4, 1, start_seconds=20.0)])
    assert "counts 4 processes and process 0" in str(leader)
    assert isinstance(other, Refused)


def test_one_that_does_not_come():
    first, second, _ = plans(3, start_seconds=1.0)
    leader, other = meet([first, second])
    assert "after 1 s only 2 of 3 processes have come to 127.0.0.1:" in str(leader)
    assert "missing 2" in str(leader)
    assert isinstance(other, Refused)


def test_nobody_at_the_address():
    _, plan = plans(2, start_seconds=0.5)
    with pytest.raises(UserError, match=r"process 1 of 2 found no process 0 at 127.0.0.1:\d+ in 0.5 s \(.*refused"):
        join(plan, FACTS)


def test_an_address_in_use_or_of_another_host():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        plan = Processes(f"127.0.0.1:{other.getsockname()[1]}", 2, 0)
        with pytest.raises(UserError, match=r"process 0 cannot listen at 127.0.0.1:\d+: address already in use"):
            gather(plan, FACTS)
    with pytest.raises(UserError, match=r"cannot listen at 192.0.2.77:\d+: cannot assign requested address"):
        gather(Processes(f"192.0.2.77:{free_port()}", 2, 0), FACTS)


def test_the_port_above_in_use():
    """Where jax.distributed would listen, and crash: said in words, and the others are told."""
    first, second = plans(2)
    with socket.socket() as other, ThreadPoolExecutor(1) as pool:
        other.bind(("127.0.0.1", first.port + 1))
        other.listen()
        follower = pool.submit(join, second, FACTS)
        with pytest.raises(UserError, match=rf"cannot listen at 127.0.0.1:{first.port + 1}, one above .*in use"):
            gather(first, FACTS)
        assert isinstance(follower.exception(), Refused)


def test_a_stranger_is_nobody():
    """Something else that connects to the port, and says nothing of ours, does not disturb."""
    first, second = plans(2)

    def stranger() -> None:
        for _ in range(100):
            try:
                with socket.create_connection((first.host, first.port), timeout=5) as line:
                    return line.sendall(b"GET / HTTP/1.1\r\n\r\n")
            except OSError:
                threading.Event().wait(0.05)

    def late() -> Any:
        threading.Event().wait(0.5)
        return join(second, FACTS)

    leader, follower, _ = together(lambda: gather(first, FACTS), late, stranger)
    assert sorted(leader) == [1]
    close([leader, follower])


def test_only_the_told_address_is_bound():
    """On loopback by default: nothing answers at another address of this host."""
    first, second = plans(2)
    seen = []

    def look() -> Any:
        found = join(second, FACTS)
        with socket.socket() as other:
            other.settimeout(2)
            seen.append(other.connect_ex(("127.0.0.2", first.port)))
        return found

    leader, follower = together(lambda: gather(first, FACTS), look)
    assert seen != [0]
    close([leader, follower])


# ---------------------------------------------------------------- the job itself
def test_the_leader_decides_and_hears_wishes():
    first, second = plans(2, peer_seconds=20.0)
    lines, (line, member) = meet([first, second])
    leader, follower = Leader(first, lines), Follower(second, line, member)
    values = [{"count": 3, "save": None}, 7, ["a", 1.5], None]
    for value in values:
        assert leader.agree(value) == value
    assert [follower.agree("ignored") for _ in values] == values
    assert (leader.wish(None), follower.wish(None)) == (None, None)
    assert follower.wish("SIGTERM") is None  # the leader has to hear it first
    for _ in range(200):
        if leader.wish(None):
            break
        threading.Event().wait(0.05)
    assert leader.wish(None) == "SIGTERM"
    met: list[str] = []

    def late() -> None:
        threading.Event().wait(0.3)
        met.append("late")
        follower.meet()

    together(lambda: (leader.meet(), met.append("leader")), late)
    assert met == ["late", "leader"]
    together(leader.leave, follower.leave)
    together(leader.close, follower.close)


def test_alone_a_process_decides_for_itself():
    with start_processes(None, {}) as job:
        assert job is ALONE
        assert job.leader
    assert (job.agree({"a": 1}), job.wish("SIGINT"), job.wish(None)) == ({"a": 1}, "SIGINT", None)
