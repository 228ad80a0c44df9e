"""What is remembered of a token stream between two rows: a record a shard, its JSON, and the account it gives.

A part is what one rank knows: the shards that it answers for. ``merge_states`` and ``merge_counts`` make one of the
parts of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from openelm.data.packing import Ids
from openelm.data.walk import Place


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


COUNTS = tuple(entry.name for entry in fields(Account))


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


@dataclass(frozen=True)
class Snapshot:
    """Some shards of a stream, or all, right before row ``position``."""

    position: int
    shards: int  # of the whole stream
    sources: tuple[str, ...]
    states: Mapping[int, ShardState] = field(default_factory=dict)  # by shard
    corrupt: frozenset[tuple[int, int]] = frozenset()  # source and first unit of each corrupt file

    def part(self) -> dict[str, Any]:
        """The state as plain lists and numbers, for ``merge_states``."""
        return {
            "position": self.position,
            "shards": self.shards,
            "sources": list(self.sources),
            "corrupt": _plain(self.corrupt),
            "states": {str(shard): _shard_to_json(self.states[shard]) for shard in sorted(self.states)},
        }

    def counts_part(self) -> dict[str, Any]:
        """The account of all documents so far, in total and by source, for ``merge_counts``."""
        by_source = {}
        for index, name in enumerate(self.sources):
            accounts = [state.accounts[index] for state in self.states.values()]
            counts = {count: sum(getattr(account, count) for account in accounts) for count in COUNTS}
            by_source[name] = {**counts, "epoch": max((s.places[index].epoch for s in self.states.values()), default=0)}
        return {"corrupt": _plain(self.corrupt), **_account(by_source, len(self.corrupt))}


def joined(parts: Sequence[Snapshot]) -> Snapshot:
    """Snapshots of one stream at one position, each of other shards, as one."""
    return replace(
        parts[0],
        states={shard: state for part in parts for shard, state in part.states.items()},
        corrupt=frozenset().union(*(part.corrupt for part in parts)),
    )


def merge_states(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of all ranks as the one state that ``TokenStream.restore`` takes."""
    first = parts[0]
    states: dict[str, Any] = {}
    for part in parts:
        for key in ("position", "shards", "sources"):
            assert part[key] == first[key], f"parts of one state have one {key}: {part[key]} is not {first[key]}"
        assert not states.keys() & part["states"].keys(), "two ranks answer for one shard"
        states |= part["states"]
    missing = [shard for shard in range(first["shards"]) if str(shard) not in states]
    assert not missing, f"no rank answers for shards {missing}"
    return {
        **{key: first[key] for key in ("position", "shards", "sources")},
        "corrupt": _union(parts),
        "states": [states[str(shard)] for shard in range(first["shards"])],
    }


def merge_counts(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The accounts of all ranks as one: sums, but the furthest epoch, and each corrupt file once."""
    by_source = {}
    for name in parts[0]["sources"]:
        entries = [part["sources"][name] for part in parts]
        counts = {count: sum(entry[count] for entry in entries) for count in COUNTS}
        by_source[name] = {**counts, "epoch": max(entry["epoch"] for entry in entries)}
    return _account(by_source, len(_union(parts)))


def shard_from_json(data: dict[str, Any]) -> ShardState:
    """A shard's record out of its JSON."""
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


def _shard_to_json(state: ShardState) -> dict[str, Any]:
    return {
        "places": [asdict(place) for place in state.places],
        "accounts": [asdict(account) for account in state.accounts],
        "opened": [None if opened is None else asdict(opened) for opened in state.opened],
        "remainder": state.remainder.tolist(),
        "ready": [row.tolist() for row in state.ready],
    }


def _account(by_source: dict[str, dict[str, int]], corrupt_files: int) -> dict[str, Any]:
    totals = {count: sum(entry[count] for entry in by_source.values()) for count in COUNTS}
    return {**totals, "corrupt_files": corrupt_files, "sources": by_source}


def _union(parts: Iterable[dict[str, Any]]) -> list[list[int]]:
    return _plain({(index, unit) for part in parts for index, unit in part["corrupt"]})


def _plain(corrupt: Iterable[tuple[int, int]]) -> list[list[int]]:
    return [list(pair) for pair in sorted(corrupt)]
