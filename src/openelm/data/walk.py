"""One shard's endless, deterministic way through one source.

A source is a list of units (files, row groups). Units are dealt to teams of shards; the members of a team share a
unit record by record, foreign records being skipped before they are decoded. With many units of like size each shard
is a team of its own and reads its files alone; with one big file all shards are one team. Order: units of a team, and
the records of each block, are shuffled anew for each epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import NamedTuple

from openelm.data.sources import CorruptFile, Source, Unit, decode_record, find_units, read_records

# Records that are read, and shuffled, together. Each team holds a block, so many teams have smaller ones.
BLOCK_RECORDS = 1024
BLOCK_BYTES = 2**24
BLOCK_BYTES_OF_ALL = 2**26
BLOCK_BYTES_LEAST = 2**18
# Of one source, in one process: blocks that another member of the team may want, and files left open.
KEPT_BYTES = 2**26
READERS_KEPT = 64
# A shard reads alone where its source has at least this many units for each shard.
UNITS_PER_TEAM = 4


@dataclass(frozen=True)
class Place:
    """Where a walk stands: the next record to look at. Plain numbers, for the checkpoint."""

    epoch: int = 0
    unit: int = 0
    block: int = 0
    record: int = 0  # of those in the block that are this shard's
    alone: bool = False
    useful: int = 0  # pieces of this epoch that gave rows: counted by the stream, which knows


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


class Block(NamedTuple):
    """Records that follow each other in a unit, and whether they are its last."""

    records: list[bytes]
    last: bool


class Blocks:
    """Units of a source, dealt to teams of ``shards`` shards and read a block at a time.

    The latest blocks are kept, so that shards that go side by side read once. Readers wait where they stopped, so that
    a shard that falls behind reads a file once more, not once for each block.
    """

    def __init__(self, source: Source, units: list[Unit], on_corrupt: Callable[[str], None], shards: int = 1) -> None:
        self.source, self.units, self.on_corrupt, self.shards = source, units, on_corrupt, shards
        sizes = [max(1, unit.size_bytes) for unit in units]
        # No unit is more than a team's share: documents of a large file would otherwise be served less often.
        self.teams = max(
            t
            for t in range(1, shards + 1)
            if t == 1 or (shards % t == 0 and t * UNITS_PER_TEAM <= len(units) and t * max(sizes) <= sum(sizes))
        )
        self.hands = deal(sizes, self.teams)
        self.block_bytes = min(BLOCK_BYTES, max(BLOCK_BYTES_LEAST, BLOCK_BYTES_OF_ALL // self.teams))
        self._kept: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._kept_bytes = 0
        self._readers: OrderedDict[tuple[int, int], Iterator[Block]] = OrderedDict()  # by the block that comes next

    def get(self, unit: int, block: int) -> Block:
        """A block of a unit; empty behind its end."""
        if (unit, block) in self._kept:
            self._kept.move_to_end((unit, block))
            return self._kept[unit, block]
        reader = self._readers.pop((unit, block), None)
        if reader is None:
            reader = islice(self._read(unit), block, None)
        found = next(reader, Block([], True))
        if not found.last:
            self._readers[unit, block + 1] = reader
            if len(self._readers) > READERS_KEPT:
                self._readers.popitem(last=False)  # which closes the file
        if self.teams < self.shards:
            self._keep(unit, block, found)
        return found

    def _keep(self, unit: int, block: int, found: Block) -> None:
        self._kept[unit, block] = found
        self._kept_bytes += sum(map(len, found.records))
        while self._kept_bytes > KEPT_BYTES:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= sum(map(len, old.records))

    def _read(self, unit: int) -> Iterator[Block]:
        records: list[bytes] = []
        size = 0
        try:
            for record in read_records(self.units[unit], self.source):
                records.append(record)
                size += len(record)
                if len(records) == BLOCK_RECORDS or size >= self.block_bytes:
                    yield Block(records, last=False)
                    records, size = [], 0
        except CorruptFile:
            if self.source.on_corrupt == "stop":
                raise
            self.on_corrupt(self.units[unit].path)
        yield Block(records, last=True)


class Walk:
    """The documents of one shard of one source, endlessly, epoch after epoch."""

    def __init__(self, blocks: Blocks, *, shard: int, shards: int, key: tuple[object, ...]) -> None:
        assert shards == blocks.shards, "blocks are dealt to as many shards as walk them"
        self.blocks, self.shard, self.key = blocks, shard, key
        self.place = Place()
        self.team = shard % blocks.teams
        self.members, self.member = shards // blocks.teams, shard // blocks.teams
        self._order: tuple[object, list[tuple[int, int]]] = (None, [])
        self._own: tuple[object, Block] = (None, Block([], True))

    def next(self) -> Found:
        """The next document of this shard; raises NothingLeft rather than go round in circles."""
        while True:
            place = self.place
            units = self._units(place)
            if place.unit >= len(units):
                self.place = self._next_epoch(place)
                continue
            rank, unit = units[place.unit]
            own = self._own_records(place, rank, unit)
            if place.record < len(own.records):
                self.place = replace(place, record=place.record + 1)
                decoded = decode_record(own.records[place.record], self.blocks.units[unit], self.blocks.source)
                return Found(decoded.text, decoded.problem, self.place)
            if own.last:
                self.place = replace(place, unit=place.unit + 1, block=0, record=0)
            else:
                self.place = replace(place, block=place.block + 1, record=0)

    def _next_epoch(self, place: Place) -> Place:
        """Start again; a shard whose share was of no use takes the whole source, in an order of its own."""
        if not place.useful and (place.alone or self.blocks.shards == 1):
            raise NothingLeft
        return Place(epoch=place.epoch + 1, alone=place.alone or not place.useful)

    def _units(self, place: Place) -> list[tuple[int, int]]:
        """Rank in the hand, and number, of the units of this epoch, in its order."""
        key = (place.epoch, place.alone)
        if self._order[0] != key:
            hand = list(range(len(self.blocks.units))) if place.alone else self.blocks.hands[self.team]
            owner = ("shard", self.shard) if place.alone else ("team", self.team)
            order = shuffled(len(hand), *self.key, "units", owner, place.epoch)
            self._order = (key, [(rank, hand[rank]) for rank in order])
        return self._order[1]

    def _own_records(self, place: Place, rank: int, unit: int) -> Block:
        """The records of a block that are this shard's, in the order of this epoch."""
        key = (place.epoch, place.alone, unit, place.block)
        if self._own[0] != key:
            # Who takes the first record changes from block to block: a file may be one record.
            members = 1 if place.alone else self.members
            first = (self.member - rank - place.block) % members
            if first and self.blocks.units[unit].format.startswith("text"):
                self._own = (key, Block([], True))  # not worth opening
            else:
                records, last = self.blocks.get(unit, place.block)
                own = records[first::members]
                order = shuffled(len(own), *self.key, "records", self.shard, place.epoch, unit, place.block)
                self._own = (key, Block([own[i] for i in order], last))
        return self._own[1]


def documents_once(source: Source, key: tuple[object, ...], units: list[Unit] | None = None) -> Iterator[str]:
    """Every document of a source that can be read, once, in a shuffled order; ``units`` where they are known."""
    found_units = find_units(source) if units is None else units
    walk = Walk(Blocks(source, found_units, lambda path: None), shard=0, shards=1, key=key)
    try:
        while not (found := walk.next()).after.epoch:
            if found.text is not None:
                yield found.text
    except NothingLeft:
        return
