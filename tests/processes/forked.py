"""Processes that begin with everything imported: a fork of this one, for who starts hundreds of them.

Only from a process in which JAX has no backend yet: threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import jax
from jax._src import cache_key

PRELOAD = (  # what `llamax train` imports when it comes to it
    "llamax.cli",
    "llamax.console",
    "llamax.hub.load",
    "llamax.train.loop",
    "llamax.train.mirror",
    "llamax.training",
    "orbax.checkpoint",
    "tests.processes.driver",
    "tests.processes.moments",
)


class Forked:
    """`driver.main()` in a child: the part of `subprocess.Popen` that a Job needs.

    It leads a session of its own, by which what it starts can be found, and ends at the latest after `life` seconds.
    """

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str], out: IO[bytes], err: IO[bytes], life: int = 1200
    ) -> None:
        for name in PRELOAD:
            importlib.import_module(name)
        assert not jax._src.xla_bridge.backends_are_initialized(), "fork before JAX has a backend"
        # The topology of a CPU device is another in each process: programs are the same, and one compiles for all.
        cache_key._hash_accelerator_config = cache_key._hash_devices
        jax.config.update("jax_share_binary_between_hosts", True)
        gc.freeze()  # nothing imported so far is looked at again
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be(words, env, out, err, life)

    def poll(self) -> int | None:
        """The exit code (negative: the signal), None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int | None:
        """The exit code, when it has ended."""
        return self._reap(0)

    def _reap(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To it, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _be(words: Sequence[str], env: Mapping[str, str], out: IO[bytes], err: IO[bytes], life: int) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(life)
        for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno())):
            os.dup2(handle, number)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = list(words)
        from tests.processes.driver import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # what this process was to do at its own exit is not for the child to do


def left_over(sessions: Sequence[int]) -> list[int]:
    """The processes alive that belong to one of these sessions: a child that was started there, or its child."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) in sessions and state != "Z":
                    found.append(int(entry.name))
    return found
