"""Data for two of lm-eval's tasks, as they lie in a folder for --data; and a task of our own."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["night", "water", "paper", "river", "garden", "mountain", "letter", "window", "summer", "table", "country"]


def write_tasks(folder: Path) -> Path:
    """Data for arc_easy and winogrande, in their columns: a few questions, and examples to show before them."""
    questions = [
        {
            "id": str(number),
            "question": f"Which word is number {number}?",
            "choices": {"text": ["one", "another house", "water"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[number % 3],
        }
        for number in range(9)
    ]
    sentences = [
        {"sentence": f"The {number}. house was larger than the tree, so _ was small.", "option1": "the house",
         "option2": "the tree", "answer": str(number % 2 + 1)}
        for number in range(7)
    ]  # fmt: skip
    for place, rows in (
        ("ai2_arc/ARC-Easy/test.jsonl", questions),
        ("ai2_arc/ARC-Easy/train.jsonl", questions[::-1]),
        ("winogrande/winogrande_xl/validation.jsonl", sentences),
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_words(folder: Path) -> Path:
    """A file of twelve questions with four answers each."""
    draw = random.Random(6)
    rows = [
        {"question": f"What {a} is the {b}?", "choices": draw.sample(WORDS, 4), "answer": draw.randrange(4)}
        for a, b in (draw.sample(WORDS, 2) for _ in range(12))
    ]
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def words_task(file: Path, **changes: Any) -> dict[str, Any]:
    """The task "words" of such a file, as lm-eval's evaluate takes it; ``changes`` are to its configuration."""
    from lm_eval.api.task import ConfigurableTask

    config = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metadata": {"version": 2.0},
        **changes,
    }
    return {"tasks": {"words": ConfigurableTask(config=config)}, "groups": {}, "group_map": {}}


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Requests of one kind, as lm-eval hands them to a model."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]
