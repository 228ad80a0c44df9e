"""The token stream: row k is a function of the sources' content, the recipe and the seed, and of nothing else.

V virtual shards walk the sources, each by itself; row k is the next row of shard k mod V. So whoever asks for rows,
in how many processes and after how many resumes, gets the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any

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
class ShardState:
    """One shard between two rows; never changed, only replaced, so that keeping it costs nothing."""

    places: tuple[Place, ...]
    accounts: tuple[Account, ...]
    source: int = -1  # of the document being read; -1 between documents
    piece: int = 0
    fate: str = ""  # of that document so far
    before: Place = field(default_factory=Place)  # where that document is found again
    remainder: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    ready: tuple[Ids, ...] = ()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out set: a matter of its content alone."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class TokenStream:
    """Rows of token ids from several sources, mixed by shares of valid tokens.

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
        self.sources, self.tokenizer = list(sources), tokenizer
        self.preparation, self.packing = preparation, packing
        self.shards, self.held_out = shards, held_out
        self.corrupt_files: set[str] = set()
        self.blocks = [Blocks(source, find_units(source), self.corrupt_files.add) for source in sources]
        self._walks = [
            [Walk(blocks, shard=shard, shards=shards, key=(seed, index)) for index, blocks in enumerate(self.blocks)]
            for shard in range(shards)
        ]
        empty = ShardState((Place(),) * len(self.sources), (Account(),) * len(self.sources))
        self._states = [empty] * shards
        self._parts: list[list[str]] = [[] for _ in range(shards)]  # of the document that each shard is in
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
        if self._states[shard].source < 0:
            self._open_document(shard)
            return
        state, index = self._states[shard], self._states[shard].source
        parts = self._parts[shard] or self._find_parts_again(shard)
        piece = self.preparation.piece(parts[state.piece], self.tokenizer)
        fate = KEPT if piece.ids else state.fate or piece.reason
        places, account, ready, remainder = state.places, state.accounts[index], state.ready, state.remainder
        if piece.ids:
            rows, remainder = self.packing.take_rows(remainder, piece.ids)
            ready += tuple(rows)
            account = account.plus(pieces=1, tokens=self.packing.targets(piece.ids), bytes=utf8_bytes(piece.text))
            places = _with(places, index, replace(places[index], useful=places[index].useful + 1))
        last = state.piece + 1 == len(parts)
        if last:
            account = account.plus(documents=1, **{fate: 1})
            self._parts[shard] = []
        self._states[shard] = replace(
            state,
            places=places,
            accounts=_with(state.accounts, index, account),
            source=-1 if last else index,
            piece=0 if last else state.piece + 1,
            fate="" if last else fate,
            remainder=remainder,
            ready=ready,
        )

    def _open_document(self, shard: int) -> None:
        """Choose the source that is furthest behind its share, and enter its next document."""
        state = self._states[shard]
        index = min(
            (i for i, source in enumerate(self.sources) if source.share > 0),
            key=lambda i: (state.accounts[i].tokens / self.sources[i].share, i),
        )
        found = self._find(shard, index, state.places[index])
        account = state.accounts[index].plus(invalid_utf8=int(found.problem == "invalid_utf8"))
        entered = replace(state, places=_with(state.places, index, found.after), before=state.places[index])
        if found.text is None:
            account = account.plus(documents=1, undecodable=1)
        elif self.held_out and is_held_out(found.text, self.held_out):
            account = account.plus(documents=1, held_out=1)
        else:
            entered = replace(entered, source=index)
            self._parts[shard] = split_pieces(found.text, self.preparation.split_words)
        self._states[shard] = replace(entered, accounts=_with(state.accounts, index, account))

    def _find_parts_again(self, shard: int) -> list[str]:
        """The parts of the document that a restored shard stands in."""
        state = self._states[shard]
        text = self._find(shard, state.source, state.before).text
        assert text is not None, "a document is entered only where it can be read"
        self._parts[shard] = split_pieces(text, self.preparation.split_words)
        return self._parts[shard]

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
        by_source = {}
        for index, source in enumerate(self.sources):
            total = Account()
            for state in self._states:
                total = total.plus(**asdict(state.accounts[index]))
            by_source[source.name] = {**asdict(total), "epoch": max(s.places[index].epoch for s in self._states)}
        totals = {name: sum(entry[name] for entry in by_source.values()) for name in asdict(Account())}
        return {**totals, "corrupt_files": len(self.corrupt_files), "sources": by_source}

    def snapshot(self) -> tuple[int, tuple[ShardState, ...]]:
        """The state, at no cost; ``as_json`` makes it fit for a file."""
        return self.position, tuple(self._states)

    def restore(self, data: dict[str, Any]) -> None:
        """Go to where ``as_json(snapshot())`` was taken."""
        if data["shards"] != self.shards or data["sources"] != [source.name for source in self.sources]:
            raise UserError(
                f"the checkpoint's stream has {data['shards']} shards of {data['sources']}, the recipe "
                f"{self.shards} of {[source.name for source in self.sources]}: they must be the same to continue"
            )
        self.position = data["position"]
        self._states = [_shard_from_json(entry) for entry in data["states"]]
        self._parts = [[] for _ in range(self.shards)]

    def as_json(self, snapshot: tuple[int, tuple[ShardState, ...]]) -> dict[str, Any]:
        """A snapshot as plain lists and numbers."""
        position, states = snapshot
        return {
            "position": position,
            "shards": self.shards,
            "sources": [source.name for source in self.sources],
            "states": [_shard_to_json(state) for state in states],
        }


def _shard_to_json(state: ShardState) -> dict[str, Any]:
    return {
        "places": [asdict(place) for place in state.places],
        "accounts": [asdict(account) for account in state.accounts],
        "source": state.source,
        "piece": state.piece,
        "fate": state.fate,
        "before": asdict(state.before),
        "remainder": state.remainder.tolist(),
        "ready": [row.tolist() for row in state.ready],
    }


def _shard_from_json(data: dict[str, Any]) -> ShardState:
    return ShardState(
        places=tuple(Place(**place) for place in data["places"]),
        accounts=tuple(Account(**account) for account in data["accounts"]),
        source=data["source"],
        piece=data["piece"],
        fate=data["fate"],
        before=Place(**data["before"]),
        remainder=np.array(data["remainder"], dtype=np.int32),
        ready=tuple(np.array(row, dtype=np.int32) for row in data["ready"]),
    )


def _with(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return items[:index] + (item,) + items[index + 1 :]
