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
class TaskResult:
    """One task at one number of shots. Metrics are as lm-eval gives them: shares between 0 and 1."""

    task: str  # lm-eval's name, or one of ours
    shots: int
    metrics: dict[str, float]  # "acc", "acc_stderr", "acc_norm", …
    examples: int
    version: str  # of the task's definition
    bos: bool  # whether a context begins with one
    truncated: int = 0  # requests longer than the model's context, cut on the left
    limit: int | None = None  # only the first examples, where that was asked for
    seed: int = 1234  # of the choice of few-shot examples
    chat: bool = False  # prompts as conversations, by the model's chat template
    elapsed_s: float = 0.0

    @property
    def key(self) -> str:
        """What distinguishes one measurement of a task from another."""
        first = f":{self.limit}" if self.limit is not None else ""
        return f"{self.task}@{self.shots}{first}{'' if self.bos else ' no-bos'}{' chat' if self.chat else ''}"


@dataclass(frozen=True)
class Evaluation:
    """All that was measured of one model."""

    model: dict[str, Any]  # origin, parameters, dtype, digest, revision, step, …
    environment: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)  # by TaskResult.key

    def with_task(self, result: TaskResult) -> Evaluation:
        """The same and one more task."""
        return replace(self, tasks={**self.tasks, result.key: result})

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

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
    current = [path for path in sorted((run / "evaluation").glob("*.json")) if "." not in path.stem]
    return [Evaluation.load(path) for path in current]


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of files' contents: two models with the same one need not be measured twice."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()
