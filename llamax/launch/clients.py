"""Calling a scheduler's own command-line client, every failure of it one message."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from llamax.errors import UserError

TIMEOUT_SECONDS = 60.0


def need(program: str, fix: str) -> None:
    """Raises UserError, with `fix`, if a program is not on this machine."""
    if shutil.which(program) is None:
        raise UserError(f"{program} is not on this machine; {fix}")


def call(command: Sequence[str], *, text: str | None = None) -> str:
    """What a client prints, given `text` on its standard input. Raises UserError, with its last words, if it fails."""
    shown = " ".join(command[:3])
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on this machine; run this where it is") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"`{shown}` did not answer in {TIMEOUT_SECONDS:g} s; is the cluster reachable?") from None
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise UserError(f"`{shown}` failed: {said[-1].strip() if said else f'exit code {done.returncode}'}")
    return done.stdout
