"""The token stream: row k is a function of the sources' content, the recipe and the seed, and of nothing else.

V virtual shards walk the sources, each by itself; row k is the next row of shard k mod V. So whoever asks for rows,
in how many processes and after how many resumes, gets the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from openelm.data.filters import split_pieces, utf8_bytes
from openelm.data.packing import Batch, Ids, Packing
from openelm.data.pieces import TOO_FEW_CHARACTERS, TOO_FEW_TOKENS, Preparation, Tokenizer
from openelm.data.sources import Source, find_units
from openelm.data.walk import Blocks, Found, NothingLeft, Place, Walk
from openelm.errors import UserError

KEPT, UNDECODABLE, HELD_OUT = "kept", "undecodable", "held_out"
FATES = (KEPT, TOO_FEW_CHARACTERS, TOO_FEW_TOKENS, UNDECODABLE, HELD_OUT)


@dataclass(frozen=True)
class Account:
    """What became of the documents of one source so far, in one shard."""

    documents: int = 0
    kept: int = 0
    too_few_characters: int = 0
    too_few_tokens: int = 0
    undecodable: int = 0
    held_out: int = 0
    invalid_utf8: int = 0
    pieces: int = 0
    bytes: int = 0
    tokens: int = 0

    def plus(self, **more: int) -> Account:
        """The account with some counts raised."""
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


@dataclass(frozen=True)
class Opened:
    """The document of one source that a shard is in, before its piece number ``piece``."""

    before: Place  # where the document is found again
    piece: int = 0
    fate: str = ""  # so far


@dataclass(frozen=True)
class ShardState:
    """One shard between two rows, tuples by source; never changed, only replaced, so that keeping it costs nothing."""

    places: tuple[Place, ...]
    accounts: tuple[Account, ...]
    opened: tuple[Opened | None, ...]
    remainder: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    ready: tuple[Ids, ...] = ()


class Snapshot(NamedTuple):
    """The whole state of a stream; plain once ``TokenStream.as_json`` has had it."""

    position: int
    states: tuple[ShardState, ...]
    corrupt: frozenset[tuple[int, int]]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out set: a matter of its content alone."""
    return _fraction(text.encode("utf-8", "surrogatepass")) < fraction


class TokenStream:
    """Rows of token ids from several sources, mixed by shares of valid tokens, piece by piece.

    ``seed`` orders everything; ``shards`` is V; ``held_out`` the fraction of documents never served. Raises UserError
    for sources that are not there, and where the filters leave nothing.
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
    ) -> None:
        if tokenizer.bos_id == tokenizer.eos_id:
            raise UserError(
                f"the tokenizer has one id, {tokenizer.bos_id}, for the beginning and the end of text: pieces are told "
                "apart by their BOS, so it must be another; add a BOS token to the tokenizer"
            )
        self.sources, self.tokenizer = list(sources), tokenizer
        self.preparation, self.packing = preparation, packing
        self.shards, self.held_out = shards, held_out
        self._corrupt: frozenset[tuple[int, int]] = frozenset()  # source and first unit of each corrupt file
        self.blocks = [
            Blocks(source, find_units(source), partial(self._note_corrupt, index), shards)
            for index, source in enumerate(sources)
        ]
        self._walks = [
            [Walk(blocks, shard=shard, shards=shards, key=(seed, index)) for index, blocks in enumerate(self.blocks)]
            for shard in range(shards)
        ]
        indices = range(len(self.sources))
        # Where in its turn each shard enters each source: else all would be ahead with the same one at once.
        self._phases = [[_fraction(f"{seed} {shard} {index}".encode()) for index in indices] for shard in range(shards)]
        none = tuple(None for _ in indices)
        empty = ShardState(tuple(Place() for _ in indices), tuple(Account() for _ in indices), none)
        self._states = [empty] * shards
        self._totals = [Account() for _ in indices]  # over all shards
        self._epochs = [0 for _ in indices]  # the furthest of all shards
        self._parts: list[dict[int, list[str]]] = [{} for _ in range(shards)]  # of the documents each shard is in
        self.position = 0

    def next_row(self) -> Ids:
        """Row ``position``: at most row_length + 1 ids; the position moves on by one."""
        shard = self.position % self.shards
        while not self._states[shard].ready:
            self._read_piece(shard)
        state = self._states[shard]
        self._states[shard] = replace(state, ready=state.ready[1:])
        self.position += 1
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
        self._epochs[index] = max(self._epochs[index], found.after.epoch)
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
        self._totals[index] = self._totals[index].plus(**more)

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

    def counts(self) -> dict[str, Any]:
        """The account of all documents so far, in total and by source."""
        by_source = {
            source.name: {**asdict(total), "epoch": epoch}
            for source, total, epoch in zip(self.sources, self._totals, self._epochs, strict=True)
        }
        totals = {name: sum(entry[name] for entry in by_source.values()) for name in asdict(Account())}
        return {**totals, "corrupt_files": len(self._corrupt), "sources": by_source}

    def snapshot(self) -> Snapshot:
        """The state, at no cost; ``as_json`` makes it fit for a file."""
        return Snapshot(self.position, tuple(self._states), self._corrupt)

    def restore(self, data: dict[str, Any]) -> None:
        """Go to where ``as_json(snapshot())`` was taken."""
        if data["shards"] != self.shards or data["sources"] != [source.name for source in self.sources]:
            raise UserError(
                f"the checkpoint's stream has {data['shards']} shards of {data['sources']}, the recipe "
                f"{self.shards} of {[source.name for source in self.sources]}: they must be the same to continue"
            )
        self.position = data["position"]
        self._corrupt = frozenset((index, unit) for index, unit in data["corrupt"])
        self._states = [_shard_from_json(entry) for entry in data["states"]]
        self._parts = [{} for _ in range(self.shards)]
        for index in range(len(self.sources)):
            accounts = [asdict(state.accounts[index]) for state in self._states]
            self._totals[index] = Account(**{name: sum(a[name] for a in accounts) for name in asdict(Account())})
            self._epochs[index] = max(state.places[index].epoch for state in self._states)

    def as_json(self, snapshot: Snapshot) -> dict[str, Any]:
        """A snapshot as plain lists and numbers."""
        return {
            "position": snapshot.position,
            "shards": self.shards,
            "sources": [source.name for source in self.sources],
            "corrupt": sorted(snapshot.corrupt),
            "states": [_shard_to_json(state) for state in snapshot.states],
        }


def _shard_to_json(state: ShardState) -> dict[str, Any]:
    return {
        "places": [asdict(place) for place in state.places],
        "accounts": [asdict(account) for account in state.accounts],
        "opened": [None if opened is None else asdict(opened) for opened in state.opened],
        "remainder": state.remainder.tolist(),
        "ready": [row.tolist() for row in state.ready],
    }


def _shard_from_json(data: dict[str, Any]) -> ShardState:
    return ShardState(
        places=tuple(Place(**place) for place in data["places"]),
        accounts=tuple(Account(**account) for account in data["accounts"]),
        opened=tuple(
            None if opened is None else Opened(**{**opened, "before": Place(**opened["before"])})
            for opened in data["opened"]
        ),
        remainder=np.array(data["remainder"], dtype=np.int32),
        ready=tuple(np.array(row, dtype=np.int32) for row in data["ready"]),
    )


def _with(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return items[:index] + (item,) + items[index + 1 :]


def _fraction(data: bytes) -> float:
    """A number in [0, 1) that depends on the data alone."""
    return int.from_bytes(blake2b(data, digest_size=6).digest(), "big") / 2**48
