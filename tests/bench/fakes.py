"""Runners that need no library: they sleep for a known time, and write down what is asked of them."""

from pathlib import Path
from typing import Any

from openelm.bench.needs import Need
from openelm.bench.rounds import Case, Entry, Plan

SLEEPER = """
import json, os, signal, sys, time

def load(s):
    print("a library that prints")
    trouble(s, "load")
    return Sleeper(s)

def trouble(s, when):
    if s.get("when") != when:
        return
    if s["trouble"] == "raise":
        raise ValueError("it will not\\nopen")
    if s["trouble"] == "missing":
        import a_library_that_nobody_has
    if s["trouble"] == "exit":
        print("its last words", file=sys.stderr, flush=True)
        os._exit(3)
    if s["trouble"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if s["trouble"] == "hang":
        time.sleep(60)

class Sleeper:
    def __init__(self, s):
        self.s, self.runs = s, 0
        self.about = {"engine": "sleeper", "pid": os.getpid()}

    def prepare(self, batch, room):
        time.sleep(0.05)  # not in the clock

    def run(self, prompts, tokens, first):
        self.runs += 1
        if self.runs > 3:
            trouble(self.s, "third round")
        start = time.perf_counter()
        time.sleep(self.s.get("prompt_s", 0.01) * (5 if self.runs <= 2 else 1))  # the dry run is slow
        middle = time.perf_counter()
        first()
        time.sleep(self.s.get("token_s", 0.001) * (tokens - 1))
        end = time.perf_counter()
        with open(self.s["log"], "a") as log:
            said = {"name": self.s["name"], "tokens": tokens, "prompt_s": middle - start, "rest_s": end - middle}
            print(json.dumps({**said, "prompts": [len(p) for p in prompts], "pid": os.getpid()}), file=log)
        short = self.s.get("when") == "short"
        return [[7] * (tokens - short) for _ in prompts]
"""


def sleeper(folder: Path, name: str, **specification: Any) -> Entry:
    """An entry that sleeps, logging to ``folder/log``."""
    file = folder / "sleeper.py"
    file.write_text(SLEEPER)
    about = {"ours": False, "model": "m", "bits": 16}
    told = {"log": str(folder / "log"), "name": name, **specification}
    return Entry(name, file, told, 100, Need(10, 1, 1, 1), about, install="pip install the-library")


def plan(*cases: Case, **changes: Any) -> Plan:
    """Three short rounds."""
    return Plan(**{"cases": cases or (Case(5, 4),), "repeats": 3, "threads": 1, "quick": True, **changes})
