"""Log-likelihoods of continuations: whatever requests share is computed once.

Shapes: B rows, T columns, S keys (those of a trunk, then T), D model_dim, N scored columns, V vocabulary.

Sorted, requests that begin alike stand together, and become trees of tokens. A tree is laid into a row depth first:
those who see a token are then the columns from it up to its ``end``, so one comparison is the whole attention mask, and
trees that stand in the same row do not see each other. What many trees begin with is a trunk: run once, its keys and
values kept while all that grows on it is computed. The last token of a continuation is only predicted, never read: so
answers of one token (A, B, C, D) cost nothing beyond their question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.errors import UserError
from openelm.model.cache import Cache
from openelm.model.transformer import OpenELM

# Columns of a row that several small trees fill. Wider rows have less padding, narrower ones less masked attention.
ROW = 256
# Tokens that are run at once: as many as keep a CPU's cache warm (more were slower), and an accelerator busy.
CPU_TOKENS, DEVICE_TOKENS = 512, 8192
# Scored columns whose logits exist at once: 64 MiB with a vocabulary of 32,000.
LOGITS_AT_ONCE = 512

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """How likely is ``continuation`` behind ``context``? Both are token ids; a BOS is there only if written."""

    context: Ids
    continuation: Ids


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Log-probability of a whole continuation in nats, and whether each of its tokens was the likeliest."""

    logprob: float
    greedy: bool


def likelihoods(
    model: OpenELM,
    requests: Sequence[Request],
    *,
    batch_tokens: int | None = None,
    done: Callable[[int, Likelihood], None] = lambda index, found: None,
) -> list[Likelihood]:
    """The likelihood of every request, the same in any company but for rounding.

    A request longer than the model's context loses tokens of its beginning. ``done`` is told each result, by the index
    of its request, as it is known; an empty continuation is certain. ``batch_tokens`` bounds memory (a single tree may
    be larger), and follows the device unless given. UserError: no context, a continuation that alone exceeds the
    model's context, an id outside the vocabulary, a result that is not finite.
    """
    if batch_tokens is None:
        batch_tokens = CPU_TOKENS if model.output_weight.device.type == "cpu" else DEVICE_TOKENS
    if batch_tokens < 1:
        raise UserError(f"batch_tokens={batch_tokens} must be at least 1")
    found: list[Likelihood | None] = [None] * len(requests)

    def finish(index: int, result: Likelihood) -> None:
        found[index] = result
        done(index, result)

    asked: dict[Ids, list[int]] = {}  # what the model reads -> the requests that it answers
    for index, request in enumerate(requests):
        if request.continuation:
            asked.setdefault(_readable(model, request), []).append(index)
        else:
            finish(index, Likelihood(0.0, True))
    forest = Forest(sorted(asked), asked, requests)
    for trunk, cache in _each_trunk(model, forest.root, None):
        for rows in forest.batches(trunk, batch_tokens):
            _answer(model, forest, trunk, rows, cache, finish)
    return [result for result in found if result is not None]


def _readable(model: OpenELM, request: Request) -> Ids:
    """What the model reads of a request: all but the last token, cut on the left to the context's length."""
    context, continuation, limit = request.context, request.continuation, model.config.max_context_length
    if not context:
        raise UserError("a continuation without context: its first token needs one before it, for instance a BOS")
    if len(continuation) > limit:
        raise UserError(
            f"a continuation of {len(continuation)} tokens exceeds the model's context of {limit}: shorten it"
        )
    ids, vocabulary = context + continuation, model.config.vocab_size
    if min(ids) < 0 or max(ids) >= vocabulary:
        outside = next(id for id in ids if not 0 <= id < vocabulary)
        raise UserError(f"token id {outside} is outside the model's vocabulary of {vocabulary}")
    return ids[-(limit + 1) : -1]


# The plan: which requests make a tree, and which trees grow on a trunk


@dataclass
class Trunk:
    """What trees begin with: its tokens from the very first, the trees on it (spans of inputs), and longer trunks."""

    ids: Ids = ()
    trees: list[tuple[int, int]] = field(default_factory=list)
    inner: list[Trunk] = field(default_factory=list)


class Forest:
    """Sorted inputs cut into trees that fit into rows."""

    def __init__(self, inputs: list[Ids], asked: dict[Ids, list[int]], requests: Sequence[Request]) -> None:
        self.inputs, self.requests = inputs, requests
        self.answers = [asked[ids] for ids in inputs]
        # Tokens that an input has in common with the one before it.
        self.shared = [_common(one, other) for one, other in pairwise(((), *inputs))]
        new = (len(ids) - same for ids, same in zip(inputs, self.shared, strict=True))
        self._new = list(accumulate(new, initial=0))
        # The column that predicts a first token must stand in a tree: nothing is predicted from a trunk.
        self._free = [
            len(ids) - max(len(requests[index].continuation) for index in indices)
            for ids, indices in zip(inputs, self.answers, strict=True)
        ]
        self.root = Trunk()
        self._grow()

    def size(self, start: int, stop: int, depth: int) -> int:
        """Columns of the tree of some inputs on a trunk of ``depth`` tokens."""
        return len(self.inputs[start]) - depth + self._new[stop] - self._new[start + 1]

    def _fits(self, start: int, stop: int, depth: int) -> bool:
        """A tree fills a row, or is little more than its longest path: attention is paid for the whole row."""
        size = self.size(start, stop, depth)
        if size <= ROW:
            return True
        return size <= 1.25 * (max(map(len, self.inputs[start:stop])) - depth)

    def _grow(self) -> None:
        todo = [(self.root, 0, len(self.inputs))] if self.inputs else []
        while todo:
            trunk, start, stop = todo.pop()
            depth = len(trunk.ids)
            if self._fits(start, stop, depth):
                trunk.trees.append((start, stop))
                continue
            common = min(self.shared[start + 1 : stop])
            cuts = [start, *(i for i in range(start + 1, stop) if self.shared[i] == common), stop]
            reach = min(common, *self._free[start:stop])
            repeats = min(len(cuts) - 2, self.size(start, stop, common) // ROW)
            if (reach - depth) * repeats >= ROW:  # what is saved is worth batches of its own
                trunk.inner.append(Trunk(self.inputs[start][:reach]))
                todo.append((trunk.inner[-1], start, stop))
            else:
                todo += self._split(trunk, cuts)

    def _split(self, trunk: Trunk, cuts: list[int]) -> list[tuple[Trunk, int, int]]:
        """Neighbouring branches together as far as they fit; those too large by themselves are given back."""
        depth, first, large = len(trunk.ids), cuts[0], []
        for start, stop in pairwise(cuts):
            fits = self._fits(start, stop, depth)
            if fits and self._fits(first, stop, depth):
                continue
            if first < start:
                trunk.trees.append((first, start))
            first = start
            if not fits:
                large.append((trunk, start, stop))
                first = stop
        if first < cuts[-1]:
            trunk.trees.append((first, cuts[-1]))
        return large

    def batches(self, trunk: Trunk, batch_tokens: int) -> Iterator[list[list[tuple[int, int]]]]:
        """Rows of trees, largest first, as many at a time as ``batch_tokens`` allow; one row at least."""
        depth = len(trunk.ids)
        rows: list[list[tuple[int, int]]] = []
        room: list[int] = []
        width = 0
        sizes = [(self.size(start, stop, depth), (start, stop)) for start, stop in trunk.trees]
        for size, tree in sorted(sizes, reverse=True):
            place = next((row for row, left in enumerate(room) if left >= size), None)
            if place is None:
                if rows and (len(rows) + 1) * width > batch_tokens:
                    yield rows
                    rows, room = [], []
                width = width if rows else max(size, ROW)
                place = len(rows)
                rows.append([])
                room.append(width)
            rows[place].append(tree)
            room[place] -= size
        if rows:
            yield rows


def _common(one: Ids, other: Ids) -> int:
    """Tokens that both begin with: halving, because slices are compared much faster than tokens one by one."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# The computation


class _Prefix(Cache):
    """Keys and values of a trunk, seen by every row; a row's own are put behind them and not kept."""

    def __init__(self, trunk: Cache) -> None:
        self.keys, self.values, self.length, self.capacity = trunk.keys, trunk.values, trunk.length, trunk.capacity

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        pairs = ((self.keys[layer], k_BGTK), (self.values[layer], v_BGTK))
        keys, values = (torch.cat((kept.expand(len(new), -1, -1, -1), new), dim=2) for kept, new in pairs)
        return keys, values


def _each_trunk(model: OpenELM, trunk: Trunk, cache: Cache | None) -> Iterator[tuple[Trunk, Cache | None]]:
    """Every trunk with its keys and values, an inner one right behind the one that it continues."""
    yield trunk, cache
    for inner in trunk.inner:
        yield from _each_trunk(model, inner, _extended(model, inner.ids, cache))


@torch.inference_mode()
def _extended(model: OpenELM, ids: Ids, past: Cache | None) -> Cache:
    weight = model.output_weight
    cache = Cache(model.config, 1, len(ids), dtype=weight.dtype, device=weight.device)
    if past is not None:
        for new, old in zip((*cache.keys, *cache.values), (*past.keys, *past.values), strict=True):
            new[:, :, : past.length] = old
        cache.length = past.length
    model.hidden(torch.tensor([ids[cache.length :]], device=weight.device), cache=cache)
    cache.length = len(ids)
    return _Prefix(cache)


class _Batch:
    """Rows of trees as tensors, and where each request's predictions stand in them."""

    def __init__(self, forest: Forest, depth: int, rows: list[list[tuple[int, int]]]) -> None:
        self._forest, self._depth = forest, depth
        T = max(sum(forest.size(start, stop, depth) for start, stop in row) for row in rows)
        B = len(rows)
        self.tokens, self.positions = [[0] * T for _ in range(B)], [[0] * T for _ in range(B)]
        self.ends = [list(range(1, T + 1)) for _ in range(B)]  # of padding: it sees itself, and nothing sees it
        self.scored: dict[int, list[int]] = {}  # request -> columns of the flattened rows, one a token to predict
        for row, trees in enumerate(rows):
            column = 0
            for tree in trees:
                column = self._lay(row, column, tree)

    def _lay(self, row: int, column: int, tree: tuple[int, int]) -> int:
        """Put a tree into a row from ``column`` on; the column behind it."""
        forest, depth = self._forest, self._depth
        tokens, positions, ends = self.tokens[row], self.positions[row], self.ends[row]
        path: list[int] = []
        for index in range(*tree):
            ids = forest.inputs[index]
            known = forest.shared[index] if path else depth
            behind = column + len(ids) - known
            tokens[column:behind], positions[column:behind] = ids[known:], range(known, len(ids))
            path[known - depth :] = range(column, behind)
            for seen in path:
                ends[seen] = behind
            column = behind
            for request in forest.answers[index]:
                count = len(forest.requests[request].continuation)
                self.scored[request] = [row * len(tokens) + place for place in path[-count:]]
        return column


@torch.inference_mode()
def _answer(
    model: OpenELM,
    forest: Forest,
    trunk: Trunk,
    rows: list[list[tuple[int, int]]],
    cache: Cache | None,
    finish: Callable[[int, Likelihood], None],
) -> None:
    """Run one batch, and finish the requests in it."""
    batch, device = _Batch(forest, len(trunk.ids), rows), model.output_weight.device
    tokens_BT = torch.tensor(batch.tokens, device=device)
    positions_BT = torch.tensor(batch.positions, device=device)
    ends_BT = torch.tensor(batch.ends, device=device)
    columns_T = torch.arange(tokens_BT.shape[1], device=device)
    mask_BTS = (columns_T <= columns_T[:, None]) & (columns_T[:, None] < ends_BT[:, None])
    mask_BTS = F.pad(mask_BTS, (len(trunk.ids), 0), value=True)
    hidden_BTD = model.hidden(tokens_BT, positions=positions_BT, mask=mask_BTS[:, None], cache=cache)

    counts = [len(columns) for columns in batch.scored.values()]
    places = torch.tensor([place for columns in batch.scored.values() for place in columns], device=device)
    targets = [id for request in batch.scored for id in forest.requests[request].continuation]
    logprobs, likeliest = _predicted(
        hidden_BTD.flatten(0, 1), model.output_weight, places, torch.tensor(targets, device=device)
    )
    for request, values, hits in zip(batch.scored, logprobs.split(counts), likeliest.split(counts), strict=True):
        total = math.fsum(values.tolist())
        if not math.isfinite(total):
            raise UserError(
                "a likelihood is not finite: damaged weights, or float16 has overflowed; try float32 or bfloat16"
            )
        finish(request, Likelihood(total, bool(hits.all())))


def _predicted(hidden_ND: Tensor, weight_VD: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (fp32) of each target at its place, and whether it is the likeliest; both on the CPU.

    Several targets may have one place, whose logits are computed once.
    """
    logprobs = torch.empty(len(targets), device=targets.device)
    likeliest = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    used_N, which = places.unique(return_inverse=True)
    for start in range(0, len(used_N), LOGITS_AT_ONCE):
        logits_NV = F.linear(hidden_ND[used_N[start : start + LOGITS_AT_ONCE]], weight_VD).float()
        here = ((which >= start) & (which < start + len(logits_NV))).nonzero()[:, 0]
        row, target = which[here] - start, targets[here]
        logprobs[here] = logits_NV[row, target] - logits_NV.logsumexp(-1)[row]
        likeliest[here] = logits_NV.argmax(-1)[row] == target
    return logprobs.cpu(), likeliest.cpu()
