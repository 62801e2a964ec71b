"""On a worker's path: it rests a moment at each report, so that on any machine a signal finds it in the middle."""

import time
from typing import Any

from llamax.sweep.attempt import _Saver

_save = _Saver.__call__


def _rest(self: _Saver, progress: Any) -> None:
    time.sleep(0.1)
    _save(self, progress)


_Saver.__call__ = _rest  # type: ignore[method-assign]
