"""Where a simulation's decisions come from: a seed, or a list that is gone through exhaustively."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol


class Chooser(Protocol):
    """Makes every decision of a run; the same chooser state gives the same run."""

    def choose(self, count: int) -> int:
        """A number from 0 up to but not `count`."""
        ...

    def chance(self, probability: float) -> bool:
        """True with about this probability; 0 is never, 1 is always."""
        ...


class RandomChooser:
    """Decisions out of one random generator."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, count: int) -> int:
        """See `Chooser`."""
        return self._rng.randrange(count) if count > 1 else 0

    def chance(self, probability: float) -> bool:
        """See `Chooser`."""
        return probability > 0 and (probability >= 1 or self._rng.random() < probability)


class ScriptedChooser:
    """Decisions from a list, then always 0; `taken` is what was decided out of how many.

    Raises RuntimeError if a scripted decision does not fit, which means that the scenario does
    something else when run again.
    """

    def __init__(self, script: Sequence[int]) -> None:
        self._script = script
        self.taken: list[tuple[int, int]] = []

    def choose(self, count: int) -> int:
        """See `Chooser`. What has one possibility only is no decision."""
        if count <= 1:
            return 0
        place = len(self.taken)
        choice = self._script[place] if place < len(self._script) else 0
        if choice >= count:
            raise RuntimeError(
                f"decision {place} was {choice} and has only {count} ways now: the scenario depends on more than them"
            )
        self.taken.append((choice, count))
        return choice

    def chance(self, probability: float) -> bool:
        """See `Chooser`. Anything between never and always is tried both ways."""
        if probability <= 0 or probability >= 1:
            return probability >= 1
        return self.choose(2) == 1

    def check_used_up(self) -> None:
        """Raise RuntimeError if there were fewer decisions than the script has."""
        if len(self.taken) < len(self._script):
            raise RuntimeError(
                f"only {len(self.taken)} of {len(self._script)} decisions came up: "
                "the scenario depends on more than them"
            )

    def next_script(self) -> list[int] | None:
        """The script of the run after this one, depth first; None when all have been gone through."""
        for place in range(len(self.taken) - 1, -1, -1):
            choice, count = self.taken[place]
            if choice + 1 < count:
                return [taken for taken, _ in self.taken[:place]] + [choice + 1]
        return None
