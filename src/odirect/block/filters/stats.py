"""A device that counts what goes through it."""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING

from odirect.block.bio import Bio, Op
from odirect.block.filters.base import Filter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from odirect.block.device import BlockDevice
    from odirect.sched.clock import Clock


class Stats(Filter):
    """Counts operations, bytes, errors and latencies of what is submitted here; strangers' bios are not counted.

    operations     finished bios by operation
    bytes          their `done_bytes`, by operation
    errors         failed bios by errno
    latency        by operation: how many bios took from 2**(i-1) up to but not 2**i nanoseconds
                   (bucket 0: no time at all), from submission until `poll` returned them
    max_in_flight  the most that were submitted here and not yet back
    commits        calls of `commit`
    """

    def __init__(self, lower: BlockDevice, clock: Clock) -> None:
        super().__init__(lower)
        self._clock = clock
        self._since: dict[Bio, int] = {}
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Count from zero; what is in flight is still counted when it comes back."""
        self.operations: collections.Counter[Op] = collections.Counter()
        self.bytes: collections.Counter[Op] = collections.Counter()
        self.errors: collections.Counter[int] = collections.Counter()
        self.latency: dict[Op, collections.Counter[int]] = {op: collections.Counter() for op in Op}
        self.max_in_flight = len(self._since)
        self.commits = 0

    def submit(self, bio: Bio) -> None:
        """Queue `bio`; its time starts now."""
        self.lower.submit(bio)
        with self._lock:
            self._since[bio] = self._clock.now_ns()
            self.max_in_flight = max(self.max_in_flight, len(self._since))

    def commit(self) -> None:
        """Hand over everything queued."""
        self.commits += 1
        self.lower.commit()

    def poll(self, timeout_ns: int) -> Sequence[Bio]:
        """Finished bios, counted."""
        finished = self.lower.poll(timeout_ns)
        if finished:
            now_ns = self._clock.now_ns()
            with self._lock:
                for bio in finished:
                    since_ns = self._since.pop(bio, None)
                    if since_ns is not None:
                        self._count(bio, now_ns - since_ns)
        return finished

    def percentile_ns(self, op: Op, share: float) -> int:
        """The upper bound of the latency bucket that `share` (0..1) of all bios of `op` reach, 0 if there was none."""
        buckets = self.latency[op]
        wanted = share * buckets.total()
        seen = 0
        for bucket in sorted(buckets):
            seen += buckets[bucket]
            if seen >= wanted:
                return (1 << bucket) - 1
        return 0

    def _count(self, bio: Bio, took_ns: int) -> None:
        op = Op(bio.op)
        self.operations[op] += 1
        self.bytes[op] += bio.done_bytes
        if bio.error:
            self.errors[bio.error] += 1
        self.latency[op][took_ns.bit_length()] += 1
