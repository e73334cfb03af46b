"""SIGTERM and Ctrl-C, heard at once and obeyed where a run can be gone on from."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException

TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
"""Exit codes of a command that was stopped: as a shell names a process that the signal has ended."""


class StopSignals:
    """Remembers that a stop was asked for.

    A second Ctrl-C stops at once. Lightning puts all handlers back at the end of a run.
    """

    def __init__(self) -> None:
        self._heard: signal.Signals | None = None
        self._for_requeue: signal.Signals | None = None
        self.wants_requeue = False
        """Whether the job is to be put back into the queue."""

    @property
    def heard(self) -> bool:
        """Whether a stop was asked for."""
        return self._heard is not None

    def listen(self, for_requeue: signal.Signals | None = None) -> None:
        """Begin to listen, in the place of the handlers that are there; only the main thread can.

        Args:
            for_requeue: A further signal to stop at, which also wants the job back in the queue.
        """
        self._for_requeue = for_requeue
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)
            # A shell lets background jobs ignore Ctrl-C, and a program may have a handler of its own.
            if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
                signal.signal(signal.SIGINT, self._hear)
            if for_requeue is not None:
                signal.signal(for_requeue, self._hear)

    def stop(self) -> None:
        """Stop as the signal wants it.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SIGTERMException: After another signal, or where only another process of the run has heard one.
        """
        if self._heard == signal.SIGINT:
            raise KeyboardInterrupt
        raise SIGTERMException(TERMINATED)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._heard == signal.SIGINT:
            raise KeyboardInterrupt
        self._heard = self._heard or signal.Signals(number)
        self.wants_requeue = self.wants_requeue or number == self._for_requeue
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        line = f"\n{signal.Signals(number).name}: stopping at the next checkpoint{again}\n"
        with contextlib.suppress(OSError):
            # Not through sys.stderr, which the signal may have found in the middle of a line.
            os.write(2, line.encode())
