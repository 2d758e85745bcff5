"""Signals that wait for a safe moment.

Python runs a signal's handler between any two steps of the main thread, and what it raises (Ctrl-C:
KeyboardInterrupt) leaves from there: between a device's answer and whoever is to be told of it, or half-way
through the start of a thread. No code can be right at every such place, so long work that must clean up takes
note of a signal, and lets its handler speak where nothing is half done.
Source: the `signal` module's documentation, "Execution of Python signal handlers".
"""

from __future__ import annotations

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
        try:
            self.check()
            return call()
        finally:
            self._direct = False

    def wait_for(self, fd: int, event: int) -> None:
        """Wait until `select.poll` would report `event` (or an error) of `fd`; a signal ends it by its handler.

        No signal is missed, whereas one that comes just before a system call does not interrupt it.
        """
        poller = select.poll()
        poller.register(fd, event)
        if self._alarm is not None:
            poller.register(self._alarm[0], select.POLLIN)
        while True:
            self.check()
            ready = [number for number, _ in poller.poll()]
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
