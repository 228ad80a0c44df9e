"""How far a command that reads documents has come."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line on standard error, renewed twice a second; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._start_s = self._shown_s = time.monotonic()

    def show(self, source: str, documents: int, read_bytes: int) -> None:
        """Renew the line where it is time to."""
        now_s = time.monotonic()
        if self._live and now_s - self._shown_s >= 0.5:
            self._shown_s = now_s
            text = f"{source}: {documents:,} documents, {read_bytes / 1e6:,.1f} MB, {now_s - self._start_s:.0f} s"
            print(f"\r{text:<70}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        if self._live:
            print(f"\r{'':<70}\r", end="", file=sys.stderr, flush=True)
