"""Denying io_uring to this process, as container run-times do (F53)."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW = 0x7FFF0000
_RET_ERRNO = 0x00050000

# BPF instructions: load a word, jump if equal, jump if greater or equal, return.
_LOAD, _JEQ, _JGE, _RETURN = 0x20, 0x15, 0x35, 0x06

# io_uring_setup, io_uring_enter, io_uring_register: the same numbers on every architecture that
# Python wheels are built for.
_FIRST, _LAST = 425, 427

_MACHINES = ("x86_64", "aarch64", "ppc64le", "s390x", "riscv64")


def can_deny_io_uring() -> bool:
    """Whether this machine's system call numbers are known here."""
    return platform.machine() in _MACHINES


def deny_io_uring(number: int = errno.EPERM) -> None:
    """From now on the three io_uring calls fail with `number`, in this thread and all that it makes.

    There is no way back: call it in a child process, before it has threads. Raises OSError if the
    kernel has no seccomp filters. Source: seccomp(2).
    """
    program = b"".join(
        struct.pack("HBBI", code, yes, no, value)
        for code, yes, no, value in (
            (_LOAD, 0, 0, 0),  # the number of the system call
            (_JGE, 0, 2, _FIRST),
            (_JGE, 1, 0, _LAST + 1),
            (_RETURN, 0, 0, _RET_ERRNO | number),
            (_RETURN, 0, 0, _RET_ALLOW),
        )
    )
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    for what, mode, filters in (
        (_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero),
        (_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.c_char_p(head)),
    ):
        if libc.prctl(what, mode, filters, zero, zero) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
