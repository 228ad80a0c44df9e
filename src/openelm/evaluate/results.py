"""What was measured of a model, on disk: one JSON file a model, written after every task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from openelm.errors import UserError
from openelm.files import write_json


@dataclass(frozen=True)
class How:
    """In what way tasks are measured. Two measurements are the same where this, task and shots are."""

    limit: int | None = None  # only the first examples
    bos: bool = True  # whether a context begins with one
    chat: bool = False  # prompts as conversations, by the model's chat template
    data: str = ""  # the folder that the data came from; "" is the Hub


@dataclass(frozen=True)
class TaskResult:
    """One task at one number of shots. Metrics are as lm-eval gives them: shares between 0 and 1."""

    task: str  # lm-eval's name, or one of ours
    shots: int
    metrics: dict[str, float]  # "acc", "acc_stderr", "acc_norm", …
    examples: int
    version: str  # of the task's definition
    bos: bool  # whether a context begins with one
    truncated: int | None = None  # requests longer than the model's context, cut on the left; None where not counted
    limit: int | None = None  # only the first examples, where that was asked for
    seed: int = 1234  # of the choice of few-shot examples
    chat: bool = False
    data: str = ""
    elapsed_s: float = 0.0

    @property
    def how(self) -> How:
        """In what way it was measured."""
        return How(self.limit, self.bos, self.chat, self.data)

    @property
    def key(self) -> str:
        """What distinguishes one measurement of a task from another."""
        first = f":{self.limit}" if self.limit is not None else ""
        ways = ("" if self.bos else " no-bos") + (" chat" if self.chat else "")
        return f"{self.task}@{self.shots}{first}{ways}{f' {self.data}' if self.data else ''}"


@dataclass(frozen=True)
class Evaluation:
    """All that was measured of one model."""

    model: dict[str, Any]  # origin, parameters, dtype, digest, revision, step, …
    environment: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)  # by TaskResult.key

    def with_task(self, result: TaskResult) -> Evaluation:
        """The same and one more task."""
        return replace(self, tasks={**self.tasks, result.key: result})

    def find(self, task: str, shots: int, how: How) -> TaskResult | None:
        """This very measurement, where it was made."""
        return next((r for r in self.tasks.values() if (r.task, r.shots, r.how) == (task, shots, how)), None)

    def save(self, path: Path) -> Evaluation:
        """Write it, whole or not at all, with what another process has measured meanwhile; that is given back."""
        others = Evaluation.load(path).tasks if path.is_file() else {}
        merged = replace(self, tasks={**others, **self.tasks})
        write_json(path, asdict(merged))
        return merged

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what ``save`` wrote; UserError for anything else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            tasks = {key: TaskResult(**entry) for key, entry in data["tasks"].items()}
            return cls(data["model"], data["environment"], tasks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the result of an evaluation ({error!r}): move it away") from error


def of_run(run: Path) -> list[Evaluation]:
    """What was measured of a run's models, as they are now."""
    newest: dict[str, Path] = {}
    for path in sorted((run / "evaluation").glob("*.json"), key=lambda file: file.stat().st_mtime):
        newest[path.name.partition(".")[0]] = path  # of weights that were measured before, older files stay
    return [Evaluation.load(path) for _, path in sorted(newest.items())]


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of files' contents: two models with the same one need not be measured twice."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()
