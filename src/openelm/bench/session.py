"""Our end of a child process (child.py): it is asked, and where it breaks that is an error with a name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

CHILD = Path(__file__).with_name("child.py")
RUNNERS = Path(__file__).with_name("runners")
LIMIT_S = 3600.0  # for one answer; a child that takes longer is taken for one that hangs


class BrokenError(Exception):
    """A child that failed; ``missing`` is the package that it looked for in vain, where that was the reason."""

    def __init__(self, message: str, missing: str | None = None) -> None:
        super().__init__(message)
        self.missing = missing


class Session:
    """A child process from its start to its end: use it as a context."""

    def __init__(
        self,
        runner: Path,
        *,
        python: str = sys.executable,
        threads: int | None = None,
        environment: Mapping[str, str] | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
        self._limit_s = limit_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        try:
            self._process = subprocess.Popen(
                [python, str(CHILD), str(runner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **own, **(environment or {})},
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            self._errors.close()
            raise BrokenError(f"{python} cannot be started ({error.strerror}): name the Python to use") from error

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The child's answer; BrokenError where it has none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._limit_s, stop)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # it is gone already
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            raise BrokenError(f"no answer in {self._limit_s:,.0f} s: it was stopped")
        if not line:
            raise BrokenError(self._end())
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise BrokenError(f"it answered {line[:80]!r}") from error
        if "error" in answer:
            raise BrokenError(answer["error"], answer.get("missing"))
        return answer

    def close(self) -> None:
        """End the child, which goes when nothing more can be asked; or is made to."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()  # Ctrl-C, or an error of ours: nobody waits for its answer
        self.close()

    def _end(self) -> str:
        """How the process ended, and its last words."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        how = f"ended with code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            how += " (the system may have run out of memory)" if -code == signal.SIGKILL else ""
        return f"the process {how}" + (f": {lines[-1].strip()[:300]}" if lines else "")
