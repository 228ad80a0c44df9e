"""One entry of a benchmark, in a process of its own: its memory is its own, and where it breaks, it breaks alone.

Started as ``python child.py RUNNER.py``, in the Python that the runner's library lives in: so this file, and the
runners of others, import nothing of openelm. A line of JSON comes in, a line goes out:

    {"do": "load", **specification}            -> seconds of import and load, what the runner says about itself
    {"do": "run", "prompts": …, "tokens": N, "room": M}  -> seconds to the first token and the rest, tokens, peak memory
    {"do": "ask", "method": …, **arguments}    -> what a method of the runner gives

A runner's module has ``load(specification)``. What it gives has ``about``, a dict; ``prepare(batch, room)``, called
before the clock starts; ``run(prompts, tokens, first)``, which makes so many tokens of each prompt, one after the other
and the likeliest each time, calls ``first()`` when the first is known, and gives them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer until the other side closes."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [place for place in sys.path if place != here]  # our neighbours' names are not the libraries'
    # Libraries print as they like: what they take for standard output is standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        child = Child(Path(sys.argv[1]))
        for line in sys.stdin:
            try:
                answer = child.answer(json.loads(line))
            except ImportError as error:
                answer = {"missing": error.name or "", "error": one_line(error)}
            except Exception as error:
                answer = {"error": one_line(error)}
            print(json.dumps(answer), file=out, flush=True)


class Child:
    """A runner, and the clock around it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._runner: Any = None

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """What is said to one message."""
        do = message.pop("do")
        if do == "load":
            return self.load(message)
        if do == "run":
            return self.run(**message)
        return {"result": getattr(self._runner, message.pop("method"))(**message)}

    def load(self, specification: dict[str, Any]) -> dict[str, Any]:
        """Open the runner. Importing its libraries is timed by itself, where the runner does it in ``imports``."""
        start_s = time.perf_counter()
        spec = importlib.util.spec_from_file_location("runner", self._file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        getattr(module, "imports", lambda: None)()
        imported_s = time.perf_counter()
        self._runner = module.load(specification)
        load_s = time.perf_counter() - imported_s
        return {"import_s": imported_s - start_s, "load_s": load_s, "about": self._runner.about}

    def run(self, prompts: list[list[int]], tokens: int, room: int) -> dict[str, Any]:
        """Make tokens by the clock, where there is room for texts of so many."""
        runner, marks = self._runner, []
        runner.prepare(len(prompts), room)
        start_s = time.perf_counter()
        made = runner.run(prompts, tokens, lambda: marks.append(time.perf_counter()))
        end_s = time.perf_counter()
        counts = [len(ids) for ids in made]
        if counts != [tokens] * len(prompts) or len(marks) != 1:
            raise RuntimeError(f"{tokens} tokens of {len(prompts)} prompts were asked for, and {counts} made")
        peak = getattr(runner, "peak_memory_bytes", peak_memory_bytes)()
        return {
            "prompt_s": marks[0] - start_s,
            "generation_s": end_s - marks[0],
            "made": made,
            "peak_memory_bytes": peak,
        }


def peak_memory_bytes() -> int:
    """The most memory that this process has had, pages of files that it reads included; 0 where nobody knows."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's figure is never below that of the process that started this one
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def one_line(error: Exception) -> str:
    """Kind and message of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]


if __name__ == "__main__":
    main()
