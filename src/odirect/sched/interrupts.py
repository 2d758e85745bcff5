"""Signals that wait for a safe moment.

Python runs a signal's handler between any two steps of the main thread, and what it raises (Ctrl-C:
KeyboardInterrupt) leaves from there: between a device's answer and whoever is to be told of it, or half-way
through the start of a thread. No code can be right at every such place, so long work that must clean up takes
note of a signal, and lets its handler speak where nothing is half done.
Source: the `signal` module's documentation, "Execution of Python signal handlers".
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

#: What people and service managers end a program with.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Whoever goes on pressing Ctrl-C wants it now, at any price.
_PATIENCE = 2

_Handler = Callable[[int, FrameType | None], Any]

# What programs have handlers for that raise: to end, and to give up waiting.
_QUIET = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCHLD,
)
# The functions under `signal`'s, which spend microseconds on making enumerations of the numbers.
_get_handler: Callable[[int], object] = _signal.getsignal
_set_handler: Callable[[int, object], object] = _signal.signal


class Interrupts:
    """Holds back the signals that end a program, while it is entered; what waits then is told on leaving.

    Only signals that have a handler in Python, in the main thread, are held back: the others end the
    program, or are ignored, as before. The third one is not held back.
    """

    def __init__(self) -> None:
        self._before: dict[int, _Handler] = {}
        self._waiting: list[int] = []
        self._seen = 0
        self._direct = False
        self._alarm: tuple[int, int] | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._set_alarm()
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._take_alarm_away()
        self.check()

    def check(self) -> None:
        """A safe moment: call the handlers of what has come. Raises what they raise."""
        while self._waiting:
            number = self._waiting.pop(0)
            self._before[number](number, None)

    def allowed(self, call: Callable[[], T]) -> T:
        """What `call` returns; a signal during it is not held back. For what may wait for ever."""
        self._direct = True  # before the look at what waits: nothing may come in between, and wait for ever
        quiet = _of_this_thread()
        if quiet is not None:
            quiet.direct = True
        try:
            self.check()
            return call()
        finally:
            self._direct = False
            if quiet is not None:
                quiet.direct = False

    def wait_for(self, fd: int, event: int) -> None:
        """Wait until `select.poll` would report `event` (or an error) of `fd`; a signal ends it by its handler.

        No signal is missed, whereas one that comes just before a system call does not interrupt it.
        """
        poller = select.poll()
        poller.register(fd, event)
        if self._alarm is not None:
            poller.register(self._alarm[0], select.POLLIN)
        quiet = _of_this_thread()
        while True:
            self.check()
            try:
                if quiet is not None:
                    quiet.direct = True
                ready = [number for number, _ in poller.poll()]
            finally:
                if quiet is not None:
                    quiet.direct = False
            if self._alarm is not None and self._alarm[0] in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._alarm[0], 4096)
            if fd in ready:
                return

    def _set_alarm(self) -> None:
        """Have the kernel's own handler write to a pipe, unless somebody (an event loop) has that already."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if before == -1:
            self._alarm = reader, writer
        else:
            signal.set_wakeup_fd(before)
            os.close(reader)
            os.close(writer)

    def _take_alarm_away(self) -> None:
        if self._alarm is not None:
            signal.set_wakeup_fd(-1)
            for fd in self._alarm:
                os.close(fd)
            self._alarm = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen += 1
        if self._direct or self._seen > _PATIENCE:
            self._before[number](number, frame)
        else:
            self._waiting.append(number)


#: The main thread's: what a task's own long wait must ask to be let through.
_innermost: Quiet | None = None


def _set_innermost(quiet: Quiet | None) -> None:
    global _innermost
    _innermost = quiet


def _of_this_thread() -> Quiet | None:
    return _innermost if threading.current_thread() is threading.main_thread() else None


class Noted(BaseException):
    """Raised by `Quiet` where that loses nothing: a signal has come, and its handler is still to be called."""


class Quiet:
    """Keeps signals' handlers out of a piece of code that must not be left anywhere; cheap enough for every request.

    Only in the main thread: handlers run nowhere else. Whoever enters it calls `check` where nothing is half
    done. What comes while `waits` is inside its wait, or while `raises` is set, ends the wait by `Noted`; its
    handler is called by the next `check`, or on leaving. Signals without a handler in Python are left alone,
    and those that an `Interrupts` holds back already.
    """

    __slots__ = ("_before", "_outer", "came", "direct", "raises", "waits")

    def __init__(self) -> None:
        #: Signals whose handlers have not been called yet.
        self.came: list[tuple[int, FrameType | None]] = []
        #: Set where nothing would be lost, if `Noted` were raised there.
        self.raises = False
        #: Who may be waiting.
        self.waits: object = None
        #: Set where a task itself waits for what may never come: the handler is called at once.
        self.direct = False
        self._outer: Quiet | None = None
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> Quiet:
        if threading.current_thread() is threading.main_thread():
            note = self._note
            before = self._before
            try:
                for number in _QUIET:
                    handler = _get_handler(number)
                    # Without one in Python it is SIG_DFL or SIG_IGN, which are numbers, or None.
                    if handler.__class__ is int or not callable(handler):
                        continue
                    if getattr(handler, "__self__", None).__class__ is not Interrupts:
                        before[number] = handler
                        _set_handler(number, note)
            except BaseException as error:
                self._put_back()
                # A sub-interpreter has no handlers, and says so by itself: no handler's frame is below ours.
                place = error.__traceback__
                if type(error) is not ValueError or place is None or place.tb_next is not None:
                    raise
            self._outer = _innermost
            _set_innermost(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _innermost is self:
            _set_innermost(self._outer)
        if self._before:
            handlers = dict(self._before)
            try:
                self._put_back()
            finally:
                if self.came:
                    self._before = handlers
                    self.check()

    def check(self) -> None:
        """Nothing is half done here: call the handlers of what has come. Raises what they raise."""
        while self.came:
            number, frame = self.came.pop(0)
            self._before[number](number, frame)

    def _put_back(self) -> None:
        """Give the handlers back, unless somebody else has changed them meanwhile."""
        before = self._before
        note = self._note
        try:
            while before:
                number = next(reversed(before))
                if _get_handler(number) == note:
                    _set_handler(number, before[number])
                del before[number]
        except BaseException:
            self._put_back()  # One of those that are back already has spoken.
            raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.direct:
            self._before[number](number, frame)
            return
        self.came.append((number, frame))
        if self.raises or getattr(self.waits, "interruptible", False):
            raise Noted
