"""What was said, and the part of it that the model's context still has room for."""

from __future__ import annotations

from collections.abc import Callable

from openelm.errors import UserError

Turn = dict[str, str]


class Conversation:
    """Questions and answers in turn, behind a system turn where there is one."""

    def __init__(self, encode: Callable[[list[Turn]], list[int]], limit: int, system: str = "") -> None:
        """``encode`` gives the prompt for some turns; ``limit``: tokens of the model's context."""
        self._encode, self._limit = encode, limit
        self.system = system
        self.turns: list[Turn] = []
        self.forgotten = 0  # turns that the model does not see any more

    @property
    def messages(self) -> list[Turn]:
        """All of it, forgotten turns too."""
        return self._with_system(self.turns)

    def ask(self, text: str, room: int) -> list[int]:
        """Add a question; the prompt for its answer, which is to have ``room`` tokens, or a quarter of the context.

        The oldest turns are forgotten where they leave none. UserError, and nothing changed, for a question that
        leaves none by itself.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            return self._fitted(self._limit - min(room, self._limit // 4))
        except UserError:
            self.turns.pop()
            raise

    def answer(self, text: str) -> None:
        """Add what the model said. Without a word the question is taken back: templates and tuning want an answer."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()
            self.forgotten = min(self.forgotten, len(self.turns))

    def clear(self) -> None:
        """Begin anew; the system turn stays."""
        self.turns, self.forgotten = [], 0

    def _fitted(self, most: int) -> list[int]:
        ids = self._prompt(self.forgotten)
        if len(ids) <= most:
            return ids
        # More leaves than must: each change of the beginning has the whole prompt computed again.
        for first in range(self.forgotten + 2, len(self.turns), 2):
            ids = self._prompt(first)
            if len(ids) <= most // 2 or (first == len(self.turns) - 1 and len(ids) <= most):
                self.forgotten = first
                return ids
        raise UserError(
            f"the message makes a prompt of {len(ids)} tokens, and of the context of {self._limit} an answer must have "
            f"{self._limit - most}: shorten the message or the system turn"
        )

    def _prompt(self, first: int) -> list[int]:
        return self._encode(self._with_system(self.turns[first:]))

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else list(turns)
