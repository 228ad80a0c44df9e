"""What the reference model thinks of every pair: computed once, kept on disk, read by later runs that ask the same.

Shapes: n pairs, B rows of a batch, T their length.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openelm.data.example_stream import WIDTH_MULTIPLE, arrays
from openelm.data.packing import Batch
from openelm.errors import UserError
from openelm.files import whole_file
from openelm.model.transformer import OpenELM
from openelm.train.parallel import World, reshard
from openelm.train.probes import evaluating

if TYPE_CHECKING:
    from openelm.data.pairs import Example, Pair

# Who computes differently gives other figures: to be raised with each change that is more than rounding.
VERSION = 1
SAY_EVERY_S = 10.0


def key_of(model_digest: str, data_fingerprint: str, dtype: str) -> str:
    """The name under which figures are kept: another for another model, other pairs, another dtype."""
    facts = json.dumps([VERSION, model_digest, data_fingerprint, dtype])
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def reference_log_probs(
    model: OpenELM,
    pairs: Sequence[Pair],
    world: World,
    *,
    rows: int,
    bos_id: int,
    cache: Path,
    key: str,
    base: Callable[[], AbstractContextManager[object]] = nullcontext,
    length: int | None = None,
) -> Tensor:
    """(n, 2) fp32 on the CPU: summed log-probabilities of the chosen and the rejected answer of every pair.

    Read from ``cache``/``key``.safetensors where they stand, whole; else computed by ``model`` as it is within
    ``base()`` (its adapter switched off, say), and written there. ``rows`` answers are computed at a time on each rank;
    ``length`` makes all batches of one shape, for a compiled model. UserError: a log-probability that is not finite, a
    cache that cannot be written.
    """
    path = cache / f"{key}.safetensors"
    found = world.first(lambda: _kept(path, key, len(pairs)))
    if found is None:
        with base():
            found = _computed(model, pairs, world, rows, bos_id, length)
        computed = found
        world.first(lambda: _keep(path, key, computed))
    return found


def _computed(
    model: OpenELM, pairs: Sequence[Pair], world: World, rows: int, bos_id: int, length: int | None
) -> Tensor:
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    # The longest first: what does not fit into memory is known at once, and batches hold next to no padding.
    order = sorted(range(len(answers)), key=lambda index: (-len(answers[index].ids), index))
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    found = torch.zeros(len(answers))
    progress = _Progress(sum(len(answer.ids) for answer in answers), quiet=world.rank > 0)
    device = next(model.parameters()).device
    with evaluating(model):
        for turn in range(0, len(batches), world.size):
            mine = turn + world.rank
            # All ranks go through a sharded model together: who has nothing left computes what is thrown away.
            indices = batches[mine if mine < len(batches) else turn]
            tensors = _batch([answers[index] for index in indices], rows, bos_id, length).tensors(device)
            sums = model(*tensors, log_probs=True).sum(dim=1)[: len(indices)]
            if mine < len(batches):
                found[indices] = sums.cpu()
            done = [len(answers[index].ids) for batch in batches[turn : turn + world.size] for index in batch]
            progress.add(sum(done))
    reshard(model)
    progress.end()
    return world.sum_(found).view(len(pairs), 2)  # each is zero on all ranks but one


def _batch(examples: Sequence[Example], rows: int, bos_id: int, length: int | None) -> Batch:
    """Rows padded with BOS at the end, which no earlier token sees; with ``length``, as many as usual and so long."""
    longest = max(len(example.ids) for example in examples) - 1
    T = length or -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    empty = rows - len(examples) if length else 0
    tokens, targets, _ = arrays([[example] for example in examples] + [[]] * empty, T, bos_id)
    return Batch(tokens, targets)


def _check(found: Tensor) -> None:
    wrong = (~found.isfinite()).any(dim=1).nonzero()
    if len(wrong):
        pair = int(wrong[0])
        raise UserError(
            f"the reference model gives the answers of pair {pair + 1} log-probabilities of {found[pair, 0]:g} and "
            f"{found[pair, 1]:g}: {len(wrong)} of {len(found)} pairs are not finite. Its weights are damaged, or too "
            "large for the dtype: try train.dtype=float32"
        )


# On disk: one tensor, and a digest that holds the key too, so that no file is taken for another


def _kept(path: Path, key: str, pairs: int) -> Tensor | None:
    """What stands in the file; nothing where there is none, or it is damaged or of other pairs."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found, digest = file.get_tensor("log_probs").clone(), (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        problem = str(error)
    else:
        if found.shape == (pairs, 2) and found.dtype == torch.float32 and digest == _digest(key, found):
            return found
        problem = "it is not what was written"
    print(f"{path} is damaged ({problem}): the reference's log-probabilities are computed again", file=sys.stderr)
    return None


def _keep(path: Path, key: str, log_probs: Tensor) -> None:
    _check(log_probs)
    with whole_file(path) as draft:
        save_file({"log_probs": log_probs}, draft, metadata={"sha256": _digest(key, log_probs)})


def _digest(key: str, log_probs: Tensor) -> str:
    return hashlib.sha256(key.encode() + log_probs.contiguous().numpy().tobytes()).hexdigest()


class _Progress:
    """A line on standard error now and then; nothing about what is done before the first is due."""

    def __init__(self, tokens: int, *, quiet: bool) -> None:
        self._tokens, self._quiet, self._done = tokens, quiet, 0
        self._start_s = self._said_s = time.monotonic()
        self._spoke = False

    def add(self, tokens: int) -> None:
        self._done += tokens
        now_s = time.monotonic()
        if not self._quiet and now_s - self._said_s >= SAY_EVERY_S:
            self._said_s, self._spoke, elapsed_s = now_s, True, now_s - self._start_s
            left_s = elapsed_s * (self._tokens / self._done - 1)
            self._say(f"{self._done / self._tokens:.0%} of {self._tokens:,} tokens, about {left_s:.0f} s to go")

    def end(self) -> None:
        if self._spoke:
            self._say(f"done in {time.monotonic() - self._start_s:.0f} s")

    @staticmethod
    def _say(text: str) -> None:
        print(f"log-probabilities of the reference model: {text}", file=sys.stderr, flush=True)
