"""Which slot a text gets: the one that already holds most of its beginning."""

from __future__ import annotations

from collections.abc import Sequence

from openelm.data.chat import common_length
from openelm.infer.slots import Slots

WORTH_KEEPING = 16  # tokens of another text: fewer, a BOS mostly, are computed about as fast as they are copied


class Places:
    """The slots of an engine. A slot that is given back keeps its text until it is needed for another."""

    def __init__(self, slots: Slots, count: int) -> None:
        self._slots = slots
        self._free = list(range(count))  # the one given back longest ago first
        self._texts: list[Sequence[int]] = [()] * count

    @property
    def free(self) -> int:
        """Slots that can be taken."""
        return len(self._free)

    def take(self, text: Sequence[int], *, reuse: bool = True) -> int:
        """A slot for ``text``, a sequence that may grow, and never changes what it has.

        What the slot holds then (``slots.length``) is the text's beginning, all but the last token of ``text`` at most.
        """
        shared = [common_length(text[:-1], self._held(slot)) for slot in range(len(self._texts))] if reuse else [0]
        best = max(range(len(shared)), key=lambda slot: (shared[slot], slot in self._free))
        length = shared[best]
        if length and best in self._free and 2 * length >= self._slots.length(best):
            slot = best
        else:
            # What another text still needs, or most of which this one has no use for, is copied.
            slot = self._free[0]
            if length < WORTH_KEEPING:
                length = 0
            elif best != slot:
                self._slots.copy(best, slot)
        self._slots.truncate(slot, length)
        self._free.remove(slot)
        self._texts[slot] = text
        return slot

    def give_back(self, slot: int, *, broken: bool = False) -> None:
        """Let others have a slot; of a ``broken`` one nothing is kept."""
        if broken:
            self._slots.truncate(slot, 0)
        self._free.append(slot)

    def _held(self, slot: int) -> Sequence[int]:
        return self._texts[slot][: self._slots.length(slot)]
