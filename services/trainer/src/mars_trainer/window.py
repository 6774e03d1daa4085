"""Which groups may be asked for, and which step trains on which: order and admission, without any I/O.

A run has steps * batch places. A dispatched group holds a place; step t trains on the first `batch`
groups, in dispatch order, that are kept. A group that is dropped (no signal) or dead gives its place
back to a refill with the next dispatch index. Places of the current step and of max_staleness steps
after it may be held at a time, so that a group that step t trains on was asked for when the policy
had at least t - max_staleness steps: nothing slow is ever thrown away to keep that bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

DEAD_PER_PLACE, DEAD_AT_LEAST = 2, 8
"""A step replaces so many dead groups; more point to something that is broken for all."""


@dataclass
class _Refills:
    """Places that were given back and wait for another group; `limit` of them may be handed out a step."""

    limit: int
    owed: int = 0
    used: int = 0

    @property
    def open(self) -> bool:
        return self.owed > 0 and self.used < self.limit

    def use(self) -> None:
        self.owed -= 1
        self.used += 1


class Window(Generic[T]):
    """The groups between dispatch and training.

    Args:
        batch: groups a step trains on.
        steps: of the whole run.
        max_staleness: steps by which a group may be older than the policy that it trains.
        rounds: a step looks at up to rounds * batch groups before it trains on what was kept.
        keep: whether an arrived group is trained on.
        step: steps done.
        next_index: the next dispatch index.
        dispatched: indices that were dispatched before and not trained on, in order.
    """

    def __init__(
        self,
        *,
        batch: int,
        steps: int,
        max_staleness: int,
        rounds: int,
        keep: Callable[[T], bool],
        step: int = 0,
        next_index: int = 0,
        dispatched: Iterable[int] = (),
    ) -> None:
        self.batch = batch
        self.step = step
        self.next_index = next_index
        self.kept: list[T] = []
        self.dropped: list[T] = []
        self._steps = steps
        self._max_staleness = max_staleness
        self._keep = keep
        self._order = list(dispatched)
        self._arrived: dict[int, T] = {}
        self._dropped_refills = _Refills((rounds - 1) * batch)
        self._dead_refills = _Refills(DEAD_PER_PLACE * batch + DEAD_AT_LEAST)

    @property
    def outstanding(self) -> tuple[int, ...]:
        """Dispatch indices of groups that no step has looked at, in order."""
        return tuple(self._order)

    @property
    def died(self) -> int:
        """Groups that were replaced in this step because they died."""
        return self._dead_refills.used

    @property
    def may_dispatch(self) -> bool:
        """Whether another group may be asked for."""
        return self._fresh_place or self._dropped_refills.open or self._dead_refills.open

    def settle(self) -> bool:
        """Look at arrived groups in dispatch order; whether the step can train: it is full, or nothing is left for it."""
        while self._order and self._order[0] in self._arrived and len(self.kept) < self.batch:
            group = self._arrived.pop(self._order.pop(0))
            if self._keep(group):
                self.kept.append(group)
            else:
                self.dropped.append(group)
                self._dropped_refills.owed += 1
        return len(self.kept) == self.batch or not (self._order or self.may_dispatch)

    def skip(self) -> None:
        """Pass a dispatch index over: its sample cannot be asked."""
        self.next_index += 1

    def dispatch(self) -> int:
        """Hand a place to the next dispatch index and return that.

        Raises:
            ValueError: there is no place.
        """
        if not self.may_dispatch:
            raise ValueError(f"step {self.step}: no place for dispatch index {self.next_index}; ask may_dispatch first")
        if not self._fresh_place:
            (self._dropped_refills if self._dropped_refills.open else self._dead_refills).use()
        self._order.append(self.next_index)
        self.next_index += 1
        return self._order[-1]

    def arrive(self, index: int, group: T) -> None:
        """A dispatched group is there; `settle` looks at it in its turn."""
        self._arrived[index] = group

    def bury(self, index: int) -> None:
        """A dispatched group will never come."""
        self._order.remove(index)
        self._dead_refills.owed += 1

    def advance(self) -> None:
        """The step has trained on what was kept; places that it left empty are closed."""
        missing = self.batch - len(self.kept)
        for refills in (self._dropped_refills, self._dead_refills):
            closed = min(missing, refills.owed)
            refills.owed -= closed
            missing -= closed
            refills.used = 0
        self.kept, self.dropped = [], []
        self.step += 1

    @property
    def _fresh_place(self) -> bool:
        owed = self._dropped_refills.owed + self._dead_refills.owed
        handed_out = self.step * self.batch + len(self.kept) + len(self._order) + owed
        return handed_out < min(self.step + self._max_staleness + 1, self._steps) * self.batch
