"""Being asked to stop: SIGTERM, SIGINT and SIGUSR1 end a run behind the step that they meet, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


class Stopping:
    """Listens while it is entered; calling it says whether a signal has come. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.name = ""  # of the signal that came first
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # no other may listen
            numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.name:
            self.name = signal.Signals(number).name
            # Not by print: a signal may come in the middle of one. Ctrl-C may have ended its reader too (`| tee log`).
            with suppress(OSError):
                os.write(2, f"\n{self.name}: stopping behind this step, with a checkpoint\n".encode())
