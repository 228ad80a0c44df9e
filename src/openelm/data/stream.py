"""The token stream: row k is a function of the sources' content, the recipe and the seed, and of nothing else.

V virtual shards walk the sources, each by itself; row k is the next row of shard k mod V. So whoever asks for rows,
in how many processes and after how many resumes, gets the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from math import gcd
from typing import Any

from openelm.data.filters import split_pieces, utf8_bytes
from openelm.data.packing import Batch, Ids, Packing
from openelm.data.pieces import TOO_FEW_CHARACTERS, TOO_FEW_TOKENS, Preparation, Tokenizer
from openelm.data.sources import Source, Unit, find_units
from openelm.data.stream_state import (
    Account,
    Opened,
    ShardState,
    Snapshot,
    merge_counts,
    merge_states,
    shard_from_json,
)
from openelm.data.walk import Blocks, Found, NothingLeft, Place, Walk
from openelm.errors import UserError

KEPT, UNDECODABLE, HELD_OUT = "kept", "undecodable", "held_out"
FATES = (KEPT, TOO_FEW_CHARACTERS, TOO_FEW_TOKENS, UNDECODABLE, HELD_OUT)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out set: a matter of its content alone."""
    return _fraction(text.encode("utf-8", "surrogatepass")) < fraction


def owned_shards(shards: int, *, rank: int, ranks: int, worker: int = 0, workers: int = 1) -> range:
    """The shards that a worker of a rank reads, where row k goes to rank k mod ``ranks``.

    Ranks that are equal modulo gcd(ranks, shards) read the same shards, and each keeps its own rows of them.
    """
    common = gcd(ranks, shards)
    return range(rank % common + common * worker, shards, common * workers)


class TokenStream:
    """Rows of token ids from several sources, mixed by shares of valid tokens, piece by piece.

    ``seed`` orders everything; ``shards`` is V; ``held_out`` the fraction of documents never served; ``units`` those of
    each source, where they are known already. A copy (``copy.copy``), and what a worker process gets, stands at the
    same row and reads for itself. Raises UserError for sources that are not there, and where the filters leave nothing.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        preparation: Preparation,
        packing: Packing,
        *,
        seed: int,
        shards: int,
        held_out: float = 0.0,
        units: Sequence[list[Unit]] | None = None,
    ) -> None:
        if tokenizer.bos_id == tokenizer.eos_id:
            raise UserError(
                f"the tokenizer has one id, {tokenizer.bos_id}, for the beginning and the end of text: pieces are told "
                "apart by their BOS, so it must be another; add a BOS token to the tokenizer"
            )
        self.sources, self.tokenizer = list(sources), tokenizer
        self.preparation, self.packing = preparation, packing
        self.seed, self.shards, self.held_out = seed, shards, held_out
        self.units = [find_units(source) for source in sources] if units is None else list(units)
        none = tuple(None for _ in sources)
        empty = ShardState(tuple(Place() for _ in sources), tuple(Account() for _ in sources), none)
        self._states = [empty] * shards
        self._corrupt: frozenset[tuple[int, int]] = frozenset()  # source and first unit of each corrupt file
        self.position = 0
        self._set_out()

    def _set_out(self) -> None:
        """Make what reads: it follows from the rest, and has nothing open yet."""
        indices, seed, shards = range(len(self.sources)), self.seed, self.shards
        self.blocks = [
            Blocks(source, units, partial(self._note_corrupt, index), shards)
            for index, (source, units) in enumerate(zip(self.sources, self.units, strict=True))
        ]
        self._walks = [
            [Walk(blocks, shard=shard, shards=shards, key=(seed, index)) for index, blocks in enumerate(self.blocks)]
            for shard in range(shards)
        ]
        # Where in its turn each shard enters each source: else all would be ahead with the same one at once.
        self._phases = [[_fraction(f"{seed} {shard} {index}".encode()) for index in indices] for shard in range(shards)]
        self._parts: list[dict[int, list[str]]] = [{} for _ in range(shards)]  # of the documents each shard is in
        self._names = tuple(source.name for source in self.sources)

    def __getstate__(self) -> dict[str, Any]:
        derived = ("blocks", "_walks", "_phases", "_parts", "_names")
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._states = list(self._states)
        self._set_out()

    def next_row(self) -> Ids:
        """Row ``position``: at most row_length + 1 ids; the position moves on by one."""
        row = self.next_of(self.position % self.shards)
        self.position += 1
        return row

    def next_of(self, shard: int) -> Ids:
        """The next row of one shard, wherever ``position`` is: for those who read some of the shards only."""
        while not self._states[shard].ready:
            self._read_piece(shard)
        state = self._states[shard]
        self._states[shard] = replace(state, ready=state.ready[1:])
        return state.ready[0]

    def next_batch(self, rows: int) -> Batch:
        """The next ``rows`` rows as arrays."""
        return self.packing.batch([self.next_row() for _ in range(rows)], self.tokenizer.bos_id)

    def _read_piece(self, shard: int) -> None:
        """Move a shard on by one piece: a dropped one leaves only its trace in the account."""
        index = self._furthest_behind(shard)
        state, opened = self._states[shard], self._states[shard].opened[index]
        if opened is None:
            self._open_document(shard, index)
            return
        parts = self._parts[shard].get(index) or self._find_parts_again(shard, index, opened)
        piece = self.preparation.piece(parts[opened.piece], self.tokenizer)
        fate = KEPT if piece.ids else opened.fate or piece.reason
        more: dict[str, int] = {}
        if piece.ids:
            rows, remainder = self.packing.take_rows(state.remainder, piece.ids)
            more = dict(pieces=1, tokens=self.packing.targets(piece.ids), bytes=utf8_bytes(piece.text))
            place = replace(state.places[index], useful=state.places[index].useful + 1)
            state = replace(
                state,
                places=_with(state.places, index, place),
                remainder=remainder,
                ready=(*state.ready, *rows),
            )
        left: Opened | None = replace(opened, piece=opened.piece + 1, fate=fate)
        if opened.piece + 1 == len(parts):
            more |= {"documents": 1, fate: 1}
            left = None
            del self._parts[shard][index]
        self._states[shard] = replace(state, opened=_with(state.opened, index, left))
        self._count(shard, index, **more)

    def _furthest_behind(self, shard: int) -> int:
        """The source to read from: on average over the shards none is ahead, however long its pieces are."""
        state, phases = self._states[shard], self._phases[shard]

        def lead(index: int) -> float:
            account = state.accounts[index]
            piece_tokens = (account.tokens + self.packing.row_length) / (account.pieces + 1)
            return (account.tokens + phases[index] * piece_tokens) / self.sources[index].share

        return min((i for i, source in enumerate(self.sources) if source.share > 0), key=lead)

    def _open_document(self, shard: int, index: int) -> None:
        """Enter the next document of a source, unless it is not for training."""
        state = self._states[shard]
        before = state.places[index]
        found = self._find(shard, index, before)
        state = replace(state, places=_with(state.places, index, found.after))
        more = {"invalid_utf8": 1} if found.problem == "invalid_utf8" else {}
        if found.text is None:
            more |= {"documents": 1, UNDECODABLE: 1}
        elif self.held_out and is_held_out(found.text, self.held_out):
            more |= {"documents": 1, HELD_OUT: 1}
        else:
            state = replace(state, opened=_with(state.opened, index, Opened(before)))
            self._parts[shard][index] = split_pieces(found.text, self.preparation.split_words)
        self._states[shard] = state
        self._count(shard, index, **more)

    def _count(self, shard: int, index: int, **more: int) -> None:
        state = self._states[shard]
        accounts = _with(state.accounts, index, state.accounts[index].plus(**more))
        self._states[shard] = replace(state, accounts=accounts)

    def _note_corrupt(self, index: int, path: str) -> None:
        # By number, not by path: the data may be elsewhere when the run is resumed.
        unit = next(i for i, unit in enumerate(self.blocks[index].units) if unit.path == path)
        self._corrupt |= {(index, unit)}

    def _find_parts_again(self, shard: int, index: int, opened: Opened) -> list[str]:
        """The parts of a document that a restored shard stands in."""
        text = self._find(shard, index, opened.before).text
        assert text is not None, "a document is entered only where it can be read"
        self._parts[shard][index] = split_pieces(text, self.preparation.split_words)
        return self._parts[shard][index]

    def _find(self, shard: int, index: int, place: Place) -> Found:
        walk = self._walks[shard][index]
        walk.place = place
        try:
            return walk.next()
        except NothingLeft:
            counts = self.counts()["sources"][self.sources[index].name]
            raise UserError(
                f"no document of source {self.sources[index].name!r} is left after filtering ("
                + ", ".join(f"{name} {counts[name]}" for name in ("documents", *FATES))
                + f"): lower data.min_characters={self.preparation.min_characters} or "
                f"data.min_tokens={self.preparation.min_tokens}, or add text"
            ) from None

    def snapshot(self, shards: Iterable[int] | None = None) -> Snapshot:
        """Some shards, or all, as they are now, at no cost: what it holds is never changed."""
        states = {shard: self._states[shard] for shard in (range(self.shards) if shards is None else shards)}
        return Snapshot(self.position, self.shards, self._names, states, self._corrupt)

    def counts(self) -> dict[str, Any]:
        """The account of all documents so far, in total and by source."""
        return merge_counts([self.snapshot().counts_part()])

    def state(self) -> dict[str, Any]:
        """The state as plain lists and numbers, for ``restore``."""
        return merge_states([self.snapshot().part()])

    def restore(self, data: dict[str, Any]) -> None:
        """Go to where ``state`` was taken, by however many ranks and workers (``merge_states``)."""
        if data["shards"] != self.shards or data["sources"] != list(self._names):
            raise UserError(
                f"the checkpoint's stream has {data['shards']} shards of {data['sources']}, the recipe "
                f"{self.shards} of {list(self._names)}: they must be the same to continue"
            )
        assert len(data["states"]) == self.shards, "a state is whole: merge_states makes it of its parts"
        self.position = data["position"]
        self._corrupt = frozenset((index, unit) for index, unit in data["corrupt"])
        self._states = [shard_from_json(entry) for entry in data["states"]]
        self._parts = [{} for _ in range(self.shards)]


def _with(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return items[:index] + (item,) + items[index + 1 :]


def _fraction(data: bytes) -> float:
    """A number in [0, 1) that depends on the data alone."""
    return int.from_bytes(blake2b(data, digest_size=6).digest(), "big") / 2**48
