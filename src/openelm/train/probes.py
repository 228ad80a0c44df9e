"""What is looked at while a run trains: held-out text, samples, the account of the data. None changes the training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from openelm.data.held_out import HeldOut
from openelm.data.tokenizer import Tokenizer
from openelm.infer.engine import Engine
from openelm.infer.sampling import Sampling
from openelm.model.transformer import OpenELM
from openelm.train.loop import Probe

SAMPLING = Sampling(temperature=0.7, top_p=0.95)


def validation(held_out: HeldOut, *, every: int, steps: int, rows: int) -> Probe:
    """Held-out loss every ``every`` steps and after the last."""

    def probe(step: int, model: nn.Module, account: dict[str, Any]) -> list[dict[str, Any]]:
        if not held_out.rows or (step % every and step != steps):
            return []
        return [{"kind": "validation", "step": step, **evaluate(model, held_out, rows)}]

    return probe


def evaluate(model: nn.Module, held_out: HeldOut, rows: int) -> dict[str, Any]:
    """Cross-entropy (nats a token) and bits per byte of the held-out text, ``rows`` rows at a time."""
    device = next(model.parameters()).device
    nats = 0.0
    tokens = 0
    with torch.no_grad():
        for batch in held_out.batches(rows):
            nats += float(model(*batch.tensors(device)))
            tokens += batch.valid_tokens()
    bytes_ = held_out.bytes
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / bytes_,
        "tokens": tokens,
        "bytes": bytes_,
    }


def samples(
    tokenizer: Tokenizer, prompts: tuple[str, ...], *, every: int, steps: int, max_tokens: int, seed: int
) -> Probe:
    """A continuation of each prompt every ``every`` steps and after the last, always from the same seed."""

    def probe(step: int, model: nn.Module, account: dict[str, Any]) -> list[dict[str, Any]]:
        if not prompts or (step % every and step != steps):
            return []
        # A compiled model would be compiled again for each length.
        inner = cast(OpenELM, getattr(model, "_orig_mod", model))
        return [
            {"kind": "sample", "step": step, "prompt": prompt, "text": text}
            for prompt, text in zip(prompts, write(inner, tokenizer, prompts, max_tokens, seed), strict=True)
        ]

    return probe


def write(model: OpenELM, tokenizer: Tokenizer, prompts: tuple[str, ...], max_tokens: int, seed: int) -> list[str]:
    """One continuation of each prompt."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    with _evaluating(model):
        found = Engine(model, tokenizer).generate(ids, max_tokens, SAMPLING, seeds=[seed + i for i in range(len(ids))])
    return [completion.text for completion in found]


def data_account(*, every: int, steps: int) -> Probe:
    """What became of the documents so far."""

    def probe(step: int, model: nn.Module, account: dict[str, Any]) -> list[dict[str, Any]]:
        return [] if step % every and step != steps else [{"kind": "data", "step": step, **account}]

    return probe


@contextmanager
def _evaluating(model: OpenELM) -> Iterator[None]:
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
