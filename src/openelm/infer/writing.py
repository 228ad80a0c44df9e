"""From token ids to text that may be given out: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from openelm.data.tokenizer import StreamDecoder, Tokenizer
from openelm.errors import UserError


class Writer:
    """Turns the ids of one sequence into text that may be given out, and knows when it is finished."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], room: int, stops: tuple[str, ...]) -> None:
        self.room = room
        self.ids: list[int] = []
        self.finish_reason = "" if room > 0 else "length"
        self._eos_id = tokenizer.eos_id
        self._held = StopFilter(stops)
        self._decoder = StreamDecoder(tokenizer)
        for id in prompt:  # so that the space before the first new word stays
            self._decoder.push(id)

    def push(self, id: int) -> str:
        """The text that is certain once ``id`` has followed."""
        self.ids.append(id)
        if id == self._eos_id:
            self.finish_reason = "stop"
            text = self._held.push(self._decoder.flush())
            return text + self._held.flush()
        text = self._held.push(self._decoder.push(id))
        if self._held.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self.room:
            text += self._held.push(self._decoder.flush())
            self.finish_reason = "stop" if self._held.stopped else "length"
            text += self._held.flush()
        return text


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    First is the one that is complete first: so it does not matter how the text was cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What may be given out after ``piece``; nothing any more once ``stopped``."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def checked_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple; a single string and an empty stop are refused."""
    if isinstance(stops, str) or not all(stops):
        raise UserError(f"stop={stops!r} must be a list of strings that are not empty")
    return tuple(stops)
