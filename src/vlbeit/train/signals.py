"""SIGTERM and SIGINT ask a run to save and stop; the loop decides when, on all ranks together."""

from __future__ import annotations

import atexit
import os
import signal
import time
from types import FrameType

REPEAT_AFTER = 3.0
"""Seconds. Ctrl-C reaches a rank twice within moments, from the terminal and from the launcher;
only a signal later than this is a person who will not wait."""


class StopSignal:
    """Remembers that a stop was asked for.

    The handler does nothing else: the loop adds the flag over all ranks once a step, so that all
    of them save and leave in the same step, whichever was told.
    """

    def __init__(self) -> None:
        self.name = ""
        """The first signal, "SIGTERM" or "SIGINT"; empty while none came."""
        self._since = 0.0

    @property
    def requested(self) -> bool:
        return bool(self.name)

    def install(self) -> StopSignal:
        """Takes over SIGTERM and SIGINT for the rest of the process; main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        # The interpreter gives SIGTERM its deadly default back while it shuts down, and a launcher
        # sends one to every rank as soon as the first has left: the exit code would be lost.
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.name:
            self.name, self._since = signal.Signals(number).name, now
        elif now - self._since > REPEAT_AFTER:
            # No clean-up: the newest checkpoint is whole at any moment.
            os._exit(128 + number)
