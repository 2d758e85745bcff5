"""A device that fails as it is told to."""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from odirect.base.units import align_down, align_up
from odirect.block.bio import READ, WRITE, Bio, Op
from odirect.block.buffers import slice_segments
from odirect.block.filters.base import ActiveFilter, child_of, private_buffer, scatter

if TYPE_CHECKING:
    from odirect.block.device import BlockDevice


class Injected(NamedTuple):
    """One fault that happened: the bio's number and what it was, the errno (0: a short transfer), bytes moved."""

    number: int
    op: Op
    addr: int
    length: int
    errno: int
    moved: int


class Rule:
    """What to do to which bios. Made by `Faults.fail` and `Faults.shorten`; `remove` ends it."""

    def __init__(
        self,
        owner: Faults,
        errno: int,
        moved: int | None,
        op: int | None,
        nth: Collection[int] | None,
        within: tuple[int, int] | None,
        where: Callable[[Bio], bool] | None,
        times: int | None,
    ) -> None:
        self._owner = owner
        self.errno = errno
        self.moved = moved
        self.times = times
        self._op = op
        self._nth = nth
        self._within = within
        self._where = where

    def remove(self) -> None:
        """Inject nothing more by this rule."""
        self._owner._forget(self)

    def matches(self, bio: Bio, index: int) -> bool:
        """Whether `bio`, the `index`-th submitted, is to be failed."""
        if self.times is not None and self.times <= 0:
            return False
        if self._op is not None and bio.op != self._op:
            return False
        if self._nth is not None and index not in self._nth:
            return False
        if self._within is not None:
            start, end = self._within
            if bio.addr >= end or bio.addr + bio.length <= start:
                return False
        return self._where is None or self._where(bio)


class _Step:
    """What is under way for one bio that is being failed. `child` is on the lower device."""

    __slots__ = ("bio", "buffer", "cover", "errno", "index", "moved", "patched")

    def __init__(self, bio: Bio, index: int, errno: int, moved: int) -> None:
        self.bio = bio
        self.index = index
        self.errno = errno
        self.moved = moved
        self.buffer: memoryview | None = None
        self.cover = 0
        self.patched = False


class Faults(ActiveFilter):
    """Passes bios on, but for those that a rule matches. `injected` lists what was done.

    Bios are numbered from 0 in the order of submission (`submitted` says how many there were,
    `restart` counts anew). The first rule that matches is used. A failed bio has `done_bytes` 0,
    whatever moved: a kernel answers with an errno or a count, never both.
    """

    def __init__(self, lower: BlockDevice) -> None:
        super().__init__(lower)
        self.injected: list[Injected] = []
        self.submitted = 0
        self._rules: list[Rule] = []
        self._at_commit: list[Bio] = []
        self._failing: dict[Bio, _Step] = {}

    def fail(
        self,
        errno: int = _errno.EIO,
        *,
        op: int | None = None,
        nth: int | Collection[int] | None = None,
        within: tuple[int, int] | None = None,
        where: Callable[[Bio], bool] | None = None,
        moved: int | None = 0,
        times: int | None = None,
    ) -> Rule:
        """Fail with `errno` the bios that meet every condition given; `times` of them, or all.

        op      this operation alone
        nth     the bio of this number, or of one of these (a set: every subset can be tried, F06)
        within  bios that touch the bytes [start, end) of the device
        where   bios for which this is true
        moved   bytes moved before the failure: 0 (it comes before the data), None (all: it comes
                after), or a prefix, which may end anywhere (F07)
        """
        if errno <= 0:
            raise ValueError(f"{errno} is not an errno")
        return self._add(errno, moved, op, nth, within, where, times)

    def shorten(
        self,
        moved: int,
        *,
        op: int | None = None,
        nth: int | Collection[int] | None = None,
        within: tuple[int, int] | None = None,
        where: Callable[[Bio], bool] | None = None,
        times: int | None = None,
    ) -> Rule:
        """Move the first `moved` bytes of matching bios only, and say so without an error (F04).

        `moved` may be any number, aligned or not; bios that are no longer than it pass whole.
        The conditions are those of `fail`.
        """
        if moved < 0:
            raise ValueError(f"{moved} bytes cannot be moved")

        def long_enough(bio: Bio) -> bool:
            return bio.op in (READ, WRITE) and bio.length > moved and (where is None or where(bio))

        return self._add(0, moved, op, nth, within, long_enough, times)

    def clear(self) -> None:
        """Forget every rule; what was injected stays listed."""
        self._rules.clear()

    def restart(self) -> None:
        """Number bios from 0 again, and forget what was injected."""
        self.submitted = 0
        self.injected.clear()

    def submit(self, bio: Bio) -> None:
        """Queue `bio`, or what is to become of it."""
        self._check_open()
        with self._lock:
            index = self.submitted
            self.submitted += 1
            rule = next((rule for rule in self._rules if rule.matches(bio, index)), None)
            if rule is not None:
                if rule.times is not None:
                    rule.times -= 1
                self._begin(bio, index, rule)
                return
        self.lower.submit(bio)

    def commit(self) -> None:
        """Hand over everything queued."""
        with self._lock:
            ready, self._at_commit = self._at_commit, []
            for bio in ready:
                self._finish(bio)
        self.lower.commit()

    def _add(
        self,
        errno: int,
        moved: int | None,
        op: int | None,
        nth: int | Collection[int] | None,
        within: tuple[int, int] | None,
        where: Callable[[Bio], bool] | None,
        times: int | None,
    ) -> Rule:
        numbers = (nth,) if isinstance(nth, int) else nth
        rule = Rule(self, errno, moved, op, numbers, within, where, times)
        self._rules.append(rule)
        return rule

    def _forget(self, rule: Rule) -> None:
        if rule in self._rules:
            self._rules.remove(rule)

    def _begin(self, bio: Bio, index: int, rule: Rule) -> None:
        moved = bio.length if rule.moved is None else min(rule.moved, bio.length)
        step = _Step(bio, index, rule.errno, moved)
        bio.error = bio.done_bytes = 0
        if moved == 0 and rule.moved is not None:
            self._end(step, 0)
            self._at_commit.append(bio)
        elif moved == bio.length:
            self._failing[bio] = step
            self.lower.submit(bio)
        elif bio.op == READ:
            # All is read, aligned as it was asked for; the caller's memory gets the prefix alone.
            self._send_private(step, READ, bio.addr, bio.length)
        elif bio.op == WRITE and moved % self.limits.write_align == 0:
            child = child_of(WRITE, bio.addr, slice_segments(bio.segments, 0, moved), moved, bio.flags, step)
            self._failing[child] = step
            self.lower.submit(child)
        elif bio.op == WRITE:
            # A prefix that the device below cannot write: what is there is read, changed, written.
            unit = max(self.limits.read_align, self.limits.write_align)
            step.cover = align_down(bio.addr, unit)
            self._send_private(step, READ, step.cover, align_up(bio.addr + moved, unit) - step.cover)
        else:
            child = child_of(bio.op, bio.addr, (), align_down(moved, self.limits.logical_block), bio.flags, step)
            self._failing[child] = step
            self.lower.submit(child)

    def _send_private(self, step: _Step, op: int, addr: int, length: int) -> None:
        if step.buffer is None:
            step.buffer = private_buffer(length, self.limits.memory_align)
        child = child_of(op, addr, (step.buffer[:length],), length, 0, step)
        self._failing[child] = step
        self.lower.submit(child)

    def _returned(self, bio: Bio) -> None:
        step = self._failing.pop(bio, None)
        if step is None:
            self._finish(bio)
            return
        parent = step.bio
        if bio is parent:
            self._end(step, bio.done_bytes)
        elif bio.error:
            parent.error = bio.error  # The lower device's own failure comes first.
        elif parent.op == READ:
            data = step.buffer[: min(step.moved, bio.done_bytes)] if step.buffer is not None else b""
            self._end(step, scatter(data, parent.segments))
        elif step.buffer is not None and not step.patched:
            self._patch(step, bio)
            return
        else:
            self._end(step, step.moved)
        self._finish(parent)

    def _patch(self, step: _Step, read: Bio) -> None:
        buffer, parent = step.buffer, step.bio
        if buffer is None:
            raise RuntimeError("a write is patched without a buffer")
        start = parent.addr - step.cover
        prefix = b"".join(slice_segments(parent.segments, 0, step.moved))
        buffer[start : start + step.moved] = prefix
        step.patched = True
        self._send_private(step, WRITE, step.cover, read.length)
        self.lower.commit()

    def _end(self, step: _Step, moved: int) -> None:
        bio = step.bio
        if bio.error:
            return
        bio.error = step.errno
        bio.done_bytes = 0 if step.errno else moved
        self.injected.append(Injected(step.index, Op(bio.op), bio.addr, bio.length, step.errno, moved))

    def _kept(self) -> int:
        return len(self._at_commit)
