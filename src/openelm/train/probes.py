"""What is looked at while a run trains: held-out text, samples, the account of the data. None changes the training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from openelm.data.held_out import HeldOut
from openelm.data.loader import Step
from openelm.data.packing import IGNORE, Batch
from openelm.data.stream_state import merge_counts
from openelm.data.tokenizer import Tokenizer
from openelm.infer.engine import Engine
from openelm.infer.sampling import Sampling
from openelm.model.transformer import OpenELM
from openelm.train.loop import Probe
from openelm.train.parallel import World, gathered, reshard

SAMPLING = Sampling(temperature=0.7, top_p=0.95)


def validation(held_out: HeldOut, world: World, *, every: int, steps: int, rows: int) -> Probe:
    """Held-out loss every ``every`` steps and after the last."""

    def probe(step: int, model: nn.Module, data: Step) -> list[dict[str, Any]]:
        if not held_out.rows or (step % every and step != steps):
            return []
        return [{"kind": "validation", "step": step, **evaluate(model, held_out, world, rows)}]

    return probe


def evaluate(model: nn.Module, held_out: HeldOut, world: World, rows: int) -> dict[str, Any]:
    """Cross-entropy (nats a token) and bits per byte of the held-out text, ``rows`` rows at a time on each rank."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)
    batches = [padded(batch, rows) for batch in held_out.batches(rows)]
    with torch.no_grad():
        for turn in range(0, len(batches), world.size):
            mine = turn + world.rank
            # All ranks go through a sharded model together: who has nothing left computes a batch that does not count.
            batch = batches[mine] if mine < len(batches) else batches[turn]
            nats = float(model(*batch.tensors(device)))
            if mine < len(batches):
                sums += torch.tensor([nats, batch.weight()], dtype=torch.float64)
    reshard(model)
    nats, tokens = world.sum_words(sums)
    bytes_ = held_out.bytes
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / bytes_,
        "tokens": int(tokens),
        "bytes": bytes_,
    }


def padded(batch: Batch, rows: int) -> Batch:
    """The batch with rows that do not count, up to ``rows``: of one shape, a compiled model has one form."""
    more = ((0, rows - len(batch.tokens)), (0, 0))
    return Batch(np.pad(batch.tokens, more), np.pad(batch.targets, more, constant_values=IGNORE))


def samples(
    tokenizer: Tokenizer,
    prompts: dict[str, list[int]],
    world: World,
    *,
    every: int,
    steps: int,
    max_tokens: int,
    seed: int,
) -> Probe:
    """A continuation of each prompt (text: its ids) every ``every`` steps and after the last, always from one seed."""

    def probe(step: int, model: nn.Module, data: Step) -> list[dict[str, Any]]:
        if not prompts or (step % every and step != steps):
            return []
        texts = write(cast(OpenELM, model), tokenizer, list(prompts.values()), world, max_tokens, seed)
        return [
            {"kind": "sample", "step": step, "prompt": prompt, "text": text}
            for prompt, text in zip(prompts, texts, strict=bool(texts))
        ]

    return probe


def write(
    model: OpenELM, tokenizer: Tokenizer, prompts: list[list[int]], world: World, max_tokens: int, seed: int
) -> list[str]:
    """One continuation of each prompt, on rank 0; the others lend it their weights and get nothing."""
    if not prompts:
        return []
    with gathered(model, world) as whole, evaluating(whole):
        if world.rank:
            return []
        seeds = [seed + i for i in range(len(prompts))]
        found = Engine(whole, tokenizer).generate(prompts, max_tokens, SAMPLING, seeds=seeds)
    return [completion.text for completion in found]


def data_account(world: World, *, every: int, steps: int) -> Probe:
    """What became of the documents so far."""

    def probe(step: int, model: nn.Module, data: Step) -> list[dict[str, Any]]:
        if step % every and step != steps:
            return []
        parts = world.gather(data.counts())
        return [{"kind": "data", "step": step, **merge_counts(parts)}] if parts else []

    return probe


@contextmanager
def evaluating(model: OpenELM) -> Iterator[None]:
    """No gradients, and nothing that only training does."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
