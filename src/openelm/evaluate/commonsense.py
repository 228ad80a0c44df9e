"""The eight commonsense sets of LLM-Adapters (Table 6) as lm-eval tasks.

A set is a JSON list of {instruction, input, output, answer}. The answers to choose from stand at the end of the
instruction ("Answer format: true/false"). As in CoreNet, the likeliest of them wins: nothing is generated. All
continuations of a question are equally long but for BoolQ's, so acc and acc_norm differ there alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from openelm.data import records
from openelm.data.instructions import prompt
from openelm.errors import UserError
from openelm.evaluate import task_data
from openelm.evaluate.suites import Spec

SETS = {  # task: the set's name in LLM-Adapters
    "commonsense_arc_challenge": "ARC-Challenge",
    "commonsense_arc_easy": "ARC-Easy",
    "commonsense_boolq": "boolq",
    "commonsense_hellaswag": "hellaswag",
    "commonsense_piqa": "piqa",
    "commonsense_social_i_qa": "social_i_qa",
    "commonsense_winogrande": "winogrande",
    "commonsense_openbookqa": "openbookqa",
}
# The revision that CoreNet names.
SOURCE = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/816657208af4db747803f87ba40a4c71383fed7a"
VERSION = 1.0


def continuations(instruction: str) -> list[str]:
    """The responses to choose from; none where the instruction does not end with its answer format."""
    found = re.search(r"Answer format: (\S+)\s*$", instruction)
    return [f"the correct answer is {answer}" for answer in found[1].split("/")] if found else []


def load(spec: Spec, data: Path | None) -> Any:
    """One set as an lm-eval Task, from ``data`` or from the cache; UserError: not there, or not of this form."""
    from lm_eval.api.task import ConfigurableTask

    if spec.shots:
        raise UserError(
            f"{spec.task}@{spec.shots}: the commonsense sets are measured without examples: write {spec.task}"
        )
    path = find(spec.task, data)
    documents = task_data.dataset(read(path), path)
    config = {
        "task": spec.task,
        "custom_dataset": lambda **_: {"test": documents},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "continuations",
        "doc_to_target": "gold",
        "target_delimiter": "",  # the context ends in white space
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        "num_fewshot": 0,
        "metadata": {"version": VERSION},
    }
    return ConfigurableTask(config=config)


def find(task: str, data: Path | None) -> Path:
    """The file of a set: commonsense/SET/test.json or SET/test.json in ``data``; without ``data``, the cache's."""
    name = SETS[task]
    if data is None:
        if (cached := cache_file(name)).is_file():
            return cached
        raise UserError(
            f"{task}: its data are not in the cache ({cached}): {task_data.prefetch_help(task)} with "
            f"commonsense/{name}/test.json in it"
        )
    places = [data / "commonsense" / name / "test.json", data / name / "test.json"]
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise UserError(f"{task}: {data} has no commonsense/{name}/test.json: put the set of LLM-Adapters there")


def read(path: Path) -> list[dict[str, Any]]:
    """Contexts, continuations and right answers of a set; UserError naming file and column, or record."""
    documents = []
    for number, record in enumerate(records.read(str(path)), start=1):
        for column in ("instruction", "answer"):
            if not isinstance(record.get(column), str):
                raise UserError(f"{path}: record {number} has no text in the column {column!r}, which the task needs")
        choices = continuations(record["instruction"])
        right = f"the correct answer is {record['answer']}"
        if right not in choices:
            raise UserError(
                f"{path}: record {number}: the answer {record['answer']!r} is not in the instruction's last words, "
                "which must be its answer format (Answer format: a/b): mend the record"
            )
        documents.append({"context": prompt(record), "continuations": choices, "gold": choices.index(right)})
    return documents


def cache_file(name: str) -> Path:
    """Where a downloaded set is kept."""
    from openelm.train.parts import cache_folder

    return cache_folder() / "commonsense" / name / "test.json"


def prefetch(task: str) -> tuple[int, int]:
    """Download a set into the cache, unless it is there; its bytes and questions."""
    from openelm.data.files import open_binary
    from openelm.files import write_bytes

    name = SETS[task]
    path = cache_file(name)
    if not path.is_file():
        with open_binary(f"{SOURCE}/dataset/{name}/test.json") as source:
            content = source.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    try:
        return path.stat().st_size, len(read(path))
    except UserError:
        path.unlink()  # a server's apology, or half a file: the next try fetches it again
        raise
