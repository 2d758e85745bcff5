"""Signals wait for a safe moment, and none is lost."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest

from odirect.sched.interrupts import Interrupts, Noted, Quiet


class Told(Exception):
    pass


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The signals whose handlers were called; the handlers return."""
    seen: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_waits_until_it_is_asked_for(told: list[int]) -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert told == []
        interrupts.check()
        assert told == [signal.SIGTERM]
        interrupts.check()
    assert told == [signal.SIGTERM]


def test_what_waits_is_told_on_leaving(told: list[int]) -> None:
    with Interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)
        assert told == []
    assert told == [signal.SIGINT, signal.SIGHUP]


def test_what_waits_is_told_although_something_failed(told: list[int]) -> None:
    with pytest.raises(Told), Interrupts():
        signal.raise_signal(signal.SIGINT)
        raise Told
    assert told == [signal.SIGINT]


def test_the_third_is_not_held_back(told: list[int]) -> None:
    """Whoever goes on pressing Ctrl-C gets what he wants."""
    with Interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert told == []
        signal.raise_signal(signal.SIGINT)
        assert told == [signal.SIGINT]


def test_what_may_wait_for_ever_is_interrupted_at_once(told: list[int]) -> None:
    with Interrupts() as interrupts:
        interrupts.allowed(lambda: signal.raise_signal(signal.SIGINT))
        assert told == [signal.SIGINT]
        signal.raise_signal(signal.SIGTERM)
        assert told == [signal.SIGINT]
        assert interrupts.allowed(lambda: len(told)) == 2  # what waited comes before


def test_waiting_for_a_stream_ends_with_the_signal(told: list[int]) -> None:
    """A signal that came just before is not missed; one whose handler returns does not end the wait."""
    reader, writer = os.pipe()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
            os.write(writer, b"x")
            interrupts.wait_for(reader, select.POLLIN)
            assert told == [signal.SIGTERM]
            os.read(reader, 1)
            sender = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
            sender.start()
            with pytest.raises(KeyboardInterrupt):
                interrupts.wait_for(reader, select.POLLIN)
            sender.join()
    finally:
        os.close(reader)
        os.close(writer)
    assert signal.set_wakeup_fd(-1) == -1


def test_the_wakeup_descriptor_of_an_event_loop_is_left_alone(told: list[int]) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    assert signal.set_wakeup_fd(writer) == -1
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGTERM)
            interrupts.wait_for(writer, select.POLLOUT)
            assert told == [signal.SIGTERM]
        assert os.read(reader, 10) == bytes([signal.SIGTERM])
    finally:
        assert signal.set_wakeup_fd(-1) == writer
        os.close(reader)
        os.close(writer)


def test_ctrl_c_is_a_keyboard_interrupt_there_and_nowhere_else() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        interrupts.check()
        reached.append(2)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_put_back_unless_somebody_else_changed_them(told: list[int]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) is not before
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_what_has_no_handler_is_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_within_another(told: list[int]) -> None:
    with Interrupts() as outer:
        with Interrupts() as inner:
            signal.raise_signal(signal.SIGINT)
            inner.check()
            assert told == []  # the outer one's moment has not come
        outer.check()
        assert told == [signal.SIGINT]


def test_other_threads_have_nothing_to_hold_back() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with Interrupts() as interrupts:
                interrupts.check()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []


# --- Quiet ----------------------------------------------------------------------------------------


class Inside:
    interruptible = True


def test_quiet_keeps_handlers_out_until_it_is_left(told: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Quiet() as quiet:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert told == [] and len(quiet.came) == 2
        quiet.check()
        assert told == [signal.SIGINT, signal.SIGTERM]
        signal.raise_signal(signal.SIGHUP)
    assert told == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler


def test_quiet_is_ended_where_that_loses_nothing(told: list[int]) -> None:
    """A wait that says so is left by `Noted`; the handler itself is called later."""
    with Quiet() as quiet:
        for place, raises in ((Inside(), False), (None, True)):
            quiet.waits, quiet.raises = place, raises
            with pytest.raises(Noted):
                signal.raise_signal(signal.SIGINT)
            quiet.waits, quiet.raises = object(), False
            signal.raise_signal(signal.SIGTERM)
        assert told == []
    assert told == [signal.SIGINT, signal.SIGTERM] * 2


def test_quiet_tells_what_a_handler_raises_after_the_others(told: list[int]) -> None:
    """None is forgotten because another one raised."""

    def stop(number: int, frame: object) -> None:
        told.append(number)
        raise Told

    signal.signal(signal.SIGINT, stop)
    with pytest.raises(Told), Quiet() as quiet:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Told):
            quiet.check()
        signal.raise_signal(signal.SIGINT)
    assert told == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is stop


def test_quiet_within_quiet(told: list[int]) -> None:
    with Quiet() as outer:
        with Quiet() as inner:
            signal.raise_signal(signal.SIGINT)
            assert inner.came
        assert told == [] and outer.came
    assert told == [signal.SIGINT]


def test_a_long_wait_of_a_task_is_not_quiet(told: list[int]) -> None:
    """`Interrupts` says where a signal may end the wait of a task, also for signals that are not its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGALRM, lambda number, frame: told.append(number))
    reader, writer = os.pipe()
    try:
        with Interrupts() as interrupts, Quiet():
            signal.raise_signal(signal.SIGALRM)
            assert told == []
            interrupts.allowed(lambda: signal.raise_signal(signal.SIGALRM))
            assert told == [signal.SIGALRM]
            sender = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
            sender.start()
            with pytest.raises(KeyboardInterrupt):
                interrupts.wait_for(reader, select.POLLIN)
            sender.join()
        assert told == [signal.SIGALRM] * 2
    finally:
        signal.signal(signal.SIGALRM, before)
        os.close(reader)
        os.close(writer)


def test_other_threads_are_never_quiet() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with Quiet() as quiet:
            seen.extend([signal.getsignal(signal.SIGINT), quiet.came])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, []]
