"""The text of LLM-Adapters' commonsense sets, as published adapters were tuned on it and are asked with it."""

from __future__ import annotations

from collections.abc import Mapping

# White space is part of the format: published adapters have seen exactly this.
_GAP = "\n                "
_PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. \n"
)


def prompt(example: Mapping[str, str]) -> str:
    """What precedes the response, in training and in evaluation."""
    given = example.get("input") or ""
    head = (_WITH_INPUT if given else _PLAIN) + f"{_GAP}### Instruction:{_GAP}{example['instruction']}{_GAP}"
    return head + (f"{_GAP}### Input:{_GAP}{given}{_GAP}" if given else "") + f"{_GAP}### Response:{_GAP}"


def training_text(example: Mapping[str, str]) -> str:
    """Prompt and response together, as a model is tuned on them."""
    return prompt(example) + example["output"]
