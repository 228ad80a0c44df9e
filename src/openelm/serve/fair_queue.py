"""Who is next: clients take turns, and each one's texts keep their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar


class Waits(Protocol):
    """What can wait: it belongs to someone."""

    @property
    def client(self) -> str:
        """Whose it is."""


T = TypeVar("T", bound=Waits)


class FairQueue(Generic[T]):
    """A bounded queue, of which one client may fill half. For one thread at a time."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._turns: dict[str, deque[T]] = {}  # in the order in which clients have their turn

    def __len__(self) -> int:
        return sum(map(len, self._turns.values()))

    def put(self, items: Sequence[T]) -> bool:
        """Let some of one client's wait, all of them or, where there is no room, none."""
        if not items:
            return True
        mine = self._turns.get(items[0].client, ())
        if len(self) + len(items) > self._bound or len(mine) + len(items) > self._bound // 2:
            return False
        self._turns.setdefault(items[0].client, deque()).extend(items)
        return True

    def take(self) -> T | None:
        """The next one; its client has the next turn after all others."""
        if not self._turns:
            return None
        client, own = next(iter(self._turns.items()))
        item = own.popleft()
        del self._turns[client]
        if own:
            self._turns[client] = own
        return item

    def remove(self, item: T) -> bool:
        """Whether ``item`` was waiting; it is not any more."""
        own = self._turns.get(item.client)
        if own is None or item not in own:
            return False
        own.remove(item)
        if not own:
            del self._turns[item.client]
        return True
