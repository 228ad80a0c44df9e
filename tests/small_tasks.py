"""Data for two of lm-eval's tasks, as they lie in a folder for --data."""

import json
from pathlib import Path


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
