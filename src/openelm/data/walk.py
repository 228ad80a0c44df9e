"""One shard's endless, deterministic way through one source.

A source is a list of units (files, row groups). Units are dealt to teams of shards; the members of a team share a
unit record by record, foreign records being skipped before they are decoded. With many units each shard is a team of
its own and reads its files alone; with one big file all shards are one team. Order: units of a team, and the records
of each block, are shuffled anew for each epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from heapq import heapify, heappop, heappush

from openelm.data.sources import CorruptFile, Source, Unit, decode_record, read_records

# Records that are read, and shuffled, together.
BLOCK_RECORDS = 1024
BLOCK_BYTES = 2**24
BLOCKS_KEPT = 8
# A shard reads alone where its source has at least this many units for each shard.
UNITS_PER_TEAM = 4


@dataclass(frozen=True)
class Place:
    """Where a walk stands: the next record to look at. Plain numbers, for the checkpoint."""

    epoch: int = 0
    unit: int = 0
    block: int = 0
    record: int = 0
    alone: bool = False
    useful: int = 0  # documents of this epoch that gave rows: counted by the stream, which knows


@dataclass(frozen=True)
class Found:
    """A document of this shard (text None: ``problem`` says why not) and the place behind it."""

    text: str | None
    problem: str | None
    after: Place


def shuffled(count: int, *key: object) -> list[int]:
    """0..count-1 in an order that depends on ``key`` alone, the same in every version of every library."""
    prefix = repr(key).encode()
    return sorted(range(count), key=lambda i: (blake2b(b"%s:%d" % (prefix, i), digest_size=8).digest(), i))


def deal(sizes: list[int], teams: int) -> list[list[int]]:
    """Units to teams, the largest first, each to the team that has least (ties: the first)."""
    hands: list[list[int]] = [[] for _ in range(teams)]
    loads = [(0, team) for team in range(teams)]
    heapify(loads)
    for unit in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, team = heappop(loads)
        hands[team].append(unit)
        heappush(loads, (load + max(1, sizes[unit]), team))
    return [sorted(hand) for hand in hands]


class NothingLeft(Exception):  # noqa: N818 (a fact, not an error, to those who catch it)
    """A whole source was read, and none of its documents gave a row."""


class Blocks:
    """Records of units, a block at a time, with the latest blocks kept: shards that go side by side read once."""

    def __init__(self, source: Source, units: list[Unit], on_corrupt: Callable[[str], None]) -> None:
        self.source, self.units, self.on_corrupt = source, units, on_corrupt
        self._kept: OrderedDict[tuple[int, int], list[bytes]] = OrderedDict()
        self._reader: tuple[int, int, Iterator[list[bytes]]] | None = None

    def get(self, unit: int, block: int) -> list[bytes]:
        """The records of a block; empty behind the end of the unit."""
        if (unit, block) in self._kept:
            self._kept.move_to_end((unit, block))
            return self._kept[unit, block]
        if self._reader is None or self._reader[0] != unit or self._reader[1] > block:
            self._reader = (unit, 0, self._read(unit))
        _, at, reader = self._reader
        records: list[bytes] = []
        while at <= block:
            records = next(reader, [])
            at += 1
        self._reader = (unit, at, reader)
        self._kept[unit, block] = records
        if len(self._kept) > BLOCKS_KEPT:
            self._kept.popitem(last=False)
        return records

    def _read(self, unit: int) -> Iterator[list[bytes]]:
        records: list[bytes] = []
        size = 0
        try:
            for record in read_records(self.units[unit], self.source):
                records.append(record)
                size += len(record)
                if len(records) == BLOCK_RECORDS or size >= BLOCK_BYTES:
                    yield records
                    records, size = [], 0
        except CorruptFile:
            if self.source.on_corrupt == "stop":
                raise
            self.on_corrupt(self.units[unit].path)
        if records:
            yield records


class Walk:
    """The documents of one shard of one source, endlessly, epoch after epoch."""

    def __init__(self, blocks: Blocks, *, shard: int, shards: int, key: tuple[object, ...]) -> None:
        self.blocks, self.shard, self.key = blocks, shard, key
        self.place = Place()
        units = blocks.units
        teams = max(
            (t for t in range(1, shards + 1) if shards % t == 0 and t * UNITS_PER_TEAM <= len(units)), default=1
        )
        self.team = shard % teams
        self.members, self.member = shards // teams, shard // teams
        self.hand = deal([unit.size_bytes for unit in units], teams)[self.team]
        self._order: tuple[object, list[int]] = (None, [])
        self._block_order: tuple[object, list[int]] = (None, [])

    def next(self) -> Found:
        """The next document of this shard; raises NothingLeft rather than go round in circles."""
        while True:
            place = self.place
            units = self._units(place)
            if place.unit >= len(units):
                self.place = self._next_epoch(place)
                continue
            unit = units[place.unit]
            records = self.blocks.get(unit, place.block)
            if not records:
                self.place = replace(place, unit=place.unit + 1, block=0, record=0)
                continue
            if place.record >= len(records):
                self.place = replace(place, block=place.block + 1, record=0)
                continue
            record = self._records(place, unit, len(records))[place.record]
            self.place = replace(place, record=place.record + 1)
            if not place.alone and record % self.members != self.member:
                continue
            decoded = decode_record(records[record], self.blocks.units[unit], self.blocks.source)
            return Found(decoded.text, decoded.problem, self.place)

    def _next_epoch(self, place: Place) -> Place:
        """Start again; a shard whose share was of no use takes the whole source, in an order of its own."""
        if place.alone and not place.useful:
            raise NothingLeft
        return Place(epoch=place.epoch + 1, alone=place.alone or not place.useful)

    def _units(self, place: Place) -> list[int]:
        key = (place.epoch, place.alone)
        if self._order[0] != key:
            hand = list(range(len(self.blocks.units))) if place.alone else self.hand
            owner = ("shard", self.shard) if place.alone else ("team", self.team)
            self._order = (key, [hand[i] for i in shuffled(len(hand), *self.key, "units", owner, place.epoch)])
        return self._order[1]

    def _records(self, place: Place, unit: int, count: int) -> list[int]:
        key = (place.epoch, unit, place.block)
        if self._block_order[0] != key:
            self._block_order = (key, shuffled(count, *self.key, "records", *key))
        return self._block_order[1]
