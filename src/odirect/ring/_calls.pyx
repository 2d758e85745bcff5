# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""System calls that Python lacks or does slowly.

Nothing here keeps anything: buffers are held for the length of one call, and every call into the
kernel is made without the GIL. Calls that are made per I/O answer with a negative errno; the others
raise.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals, PyErr_Clear
from libc.errno cimport EINTR, ENOSYS, EPERM
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

import collections
import os

from odirect.base.errors import from_errno


cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object number, int *overflow) except? -1


cdef extern from "kernel_calls.h" nogil:
    struct od_statx:
        uint32_t mask
        uint32_t blksize
        uint16_t mode
        uint64_t ino
        uint64_t size
        uint32_t rdev_major
        uint32_t rdev_minor
        uint32_t dev_major
        uint32_t dev_minor
        uint64_t mnt_id
        uint32_t dio_mem_align
        uint32_t dio_offset_align
        uint32_t atomic_write_unit_min
        uint32_t atomic_write_unit_max
        uint32_t atomic_write_segments_max
        uint32_t dio_read_offset_align
        uint32_t atomic_write_unit_max_opt

    struct od_cachestat:
        uint64_t cached
        uint64_t dirty
        uint64_t writeback
        uint64_t evicted
        uint64_t recently_evicted

    int EOPNOTSUPP, AT_EMPTY_PATH, AT_FDCWD
    unsigned od_fork_generation
    int od_watch_forks()
    Py_ssize_t od_pread(int fd, void *memory, size_t bytes, int64_t offset, int flags)
    Py_ssize_t od_pwrite(int fd, void *memory, size_t bytes, int64_t offset, int flags)
    bint od_ends_before(int fd, int64_t end)
    int od_statx_call(int fd, const char *path, int flags, od_statx *result)
    int od_cachestat_call(int fd, uint64_t offset, uint64_t bytes, od_cachestat *result)
    int od_sync_file_range(int fd, int64_t offset, int64_t bytes, unsigned flags)
    int od_fallocate(int fd, int mode, int64_t offset, int64_t bytes)
    Py_ssize_t od_copy(void *target, void *source, size_t bytes)
    Py_ssize_t od_zero(void *target, size_t bytes)

    struct od_status:
        int64_t mode, ino, dev, nlink, uid, gid, rdev, size, blocks, atime, atime_ns, mtime, mtime_ns

    int od_open_directory(const char *path)
    int64_t od_getdents(int fd, void *memory, size_t bytes)
    int od_status_of(int directory, const char *name, od_status *result)
    int od_read_small(int directory, const char *name, od_status *status, char *memory, size_t room, bint plain)
    int OD_NOT_SMALL, OD_ANOTHER, OD_SHORTER
    int close(int fd)


#: The columns of what `list_directory` says of each name, in 64 bits each; times are seconds since 1970, and
#: nanoseconds.
STATUS_FIELDS = (
    *("mode", "ino", "dev", "nlink", "uid", "gid", "rdev", "size", "blocks"),
    *("atime", "atime_ns", "mtime", "mtime_ns"),
)
#: What `read_small` answers for a file besides 0 and a negative errno: it is not small, another file has taken its
#: name, it was cut short.
NOT_SMALL, ANOTHER, SHORTER = OD_NOT_SMALL, OD_ANOTHER, OD_SHORTER

#: What `DirectHandle` answers when a request needs the long way round; nothing has been done then.
NOT_SIMPLE = -1 << 40

cdef enum:
    # What the kernel moves at most in one call (MAX_RW_COUNT).
    LONGEST = 0x7FFFF000

cdef object _not_simple = NOT_SIMPLE
cdef int64_t LONG_WAY = NOT_SIMPLE

if od_watch_forks():
    raise MemoryError("pthread_atfork")


def fork_generation():
    """How many forks lie between the process that loaded this and the one that asks; cheap to call."""
    return od_fork_generation


def address_of(buffer):
    """The memory address of the first byte of a contiguous buffer.

    Raises ValueError if it is not contiguous, TypeError if it is no buffer.
    """
    return span(buffer, False)[0]


def span(buffer, bint writable):
    """(address, bytes) of a contiguous buffer.

    Raises ValueError if it is not contiguous, or read-only where `writable` is asked for; TypeError
    if it is no buffer.
    """
    cdef Py_buffer view
    get_buffer(buffer, &view, writable)
    try:
        return <uintptr_t>view.buf, view.len
    finally:
        PyBuffer_Release(&view)


cdef int get_buffer(object buffer, Py_buffer *view, bint writable) except -1:
    try:
        PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    except BufferError as error:
        raise ValueError(f"the buffer must be contiguous{' and writable' if writable else ''}: {error}") from None
    return 0


@cython.final
cdef class DirectHandle:
    """The short way to one aligned transfer: one system call, made only if nothing can need more than that.

    fd           the descriptor, opened with O_DIRECT; negative: every answer is NOT_SIMPLE
    size_hint    bytes of the file as last known; a read is simple only if it ends before this.
                 -1: not known
    read_align, write_align    powers of two that offset and length must be multiples of
    memory_align               power of two that the buffer's address must be a multiple of

    Raises ValueError for an alignment that is no power of two.
    """

    cdef public int fd
    cdef public int64_t size_hint
    cdef uint64_t read_mask, write_mask, memory_mask

    def __init__(self, int fd, read_align, write_align, memory_align):
        self.fd = fd
        self.size_hint = -1
        self.read_align = read_align
        self.write_align = write_align
        self.memory_align = memory_align

    @property
    def read_align(self):
        """What offset and length of a read must be multiples of, in bytes."""
        return self.read_mask + 1

    @read_align.setter
    def read_align(self, value):
        self.read_mask = mask_of(value)

    @property
    def write_align(self):
        """What offset and length of a write must be multiples of, in bytes."""
        return self.write_mask + 1

    @write_align.setter
    def write_align(self, value):
        self.write_mask = mask_of(value)

    @property
    def memory_align(self):
        """What a buffer's address must be a multiple of, in bytes."""
        return self.memory_mask + 1

    @memory_align.setter
    def memory_align(self, value):
        self.memory_mask = mask_of(value)

    def fits(self, bint writing, buffer, offset):
        """The length in bytes of a transfer that is simple and ends before `size_hint`, else NOT_SIMPLE.

        For those who hand it to a ring: nothing is transferred here. `writing` chooses the alignment
        and whether the buffer may be read-only.
        """
        cdef Py_buffer view
        cdef int overflow = 0
        cdef int64_t place
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if writing else PyBUF_WRITABLE)
        except Exception:
            return _not_simple
        cdef Py_ssize_t length = view.len
        cdef uintptr_t address = <uintptr_t>view.buf
        PyBuffer_Release(&view)
        try:
            place = PyLong_AsLongLongAndOverflow(offset, &overflow)
        except Exception:
            return _not_simple
        if (
            overflow
            or place < 0
            or length <= 0
            or length > LONGEST
            or (<uint64_t>place | <uint64_t>length) & (self.write_mask if writing else self.read_mask)
            or address & self.memory_mask
            or length > self.size_hint
            or place > self.size_hint - length
            or self.fd < 0
        ):
            return _not_simple
        return length

    def pread(self, buffer, offset, int flags=0):
        """Bytes read into all of `buffer` from `offset`, or a negative errno, or NOT_SIMPLE with nothing done.

        `flags` are RWF_*. Simple is: a writable contiguous buffer of at least one byte, aligned, that
        ends before `size_hint`, and before the end of the file as it is now. The count may be short. Raises what a signal's handler raises.
        Source: preadv2(2).
        """
        cdef Py_buffer view
        cdef int overflow = 0
        cdef int64_t place, done
        if self.size_hint < 0:
            return _not_simple
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        except Exception:
            return _not_simple
        try:
            place = PyLong_AsLongLongAndOverflow(offset, &overflow)
        except Exception:
            PyBuffer_Release(&view)
            return _not_simple
        if (
            overflow
            or place < 0
            or view.len <= 0
            or view.len > LONGEST
            or (<uint64_t>place | <uint64_t>view.len) & self.read_mask
            or <uintptr_t>view.buf & self.memory_mask
            or view.len > self.size_hint
            or place > self.size_hint - view.len
            or self.fd < 0
        ):
            PyBuffer_Release(&view)
            return _not_simple
        while True:
            with nogil:
                # Somebody else may have cut the file since `size_hint` was found; the kernel would then set the
                # rest of the last block in memory to zero (F02).
                if od_ends_before(self.fd, place + view.len):
                    done = LONG_WAY
                else:
                    done = od_pread(self.fd, view.buf, view.len, place, flags)
            if done != -EINTR:
                break
            try:
                PyErr_CheckSignals()
            except BaseException:
                PyBuffer_Release(&view)
                raise
        PyBuffer_Release(&view)
        return done

    def pwrite(self, buffer, offset, int flags=0):
        """Bytes written of `buffer` at `offset`, or a negative errno, or NOT_SIMPLE with nothing done.

        `flags` are RWF_*. Simple is: a contiguous buffer of at least one byte, aligned. The count may
        be short. Raises what a signal's handler raises. Source: pwritev2(2).
        """
        cdef Py_buffer view
        cdef int overflow = 0
        cdef int64_t place, done
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        except Exception:
            return _not_simple
        try:
            place = PyLong_AsLongLongAndOverflow(offset, &overflow)
        except Exception:
            PyBuffer_Release(&view)
            return _not_simple
        if (
            overflow
            or place < 0
            or view.len <= 0
            or view.len > LONGEST
            or (<uint64_t>place | <uint64_t>view.len) & self.write_mask
            or <uintptr_t>view.buf & self.memory_mask
            or self.fd < 0
        ):
            PyBuffer_Release(&view)
            return _not_simple
        while True:
            with nogil:
                done = od_pwrite(self.fd, view.buf, view.len, place, flags)
            if done != -EINTR:
                break
            try:
                PyErr_CheckSignals()
            except BaseException:
                PyBuffer_Release(&view)
                raise
        PyBuffer_Release(&view)
        return done


cdef uint64_t mask_of(object alignment) except? 0xFFFFFFFFFFFFFFFF:
    cdef uint64_t value = 0
    if 0 < alignment < 1 << 62:
        value = alignment
    if value == 0 or value & (value - 1):
        raise ValueError(f"an alignment must be a power of two, not {alignment}")
    return value - 1


class Statx(
    collections.namedtuple(
        "Statx",
        "mask blksize mode ino size dev_major dev_minor rdev_major rdev_minor mnt_id dio_mem_align dio_offset_align"
        " dio_read_offset_align atomic_write_unit_min atomic_write_unit_max atomic_write_segments_max"
        " atomic_write_unit_max_opt",
    )
):
    """What `statx` answers. Sizes and alignments in bytes; `mask` says which fields the kernel filled (STATX_*)."""

    __slots__ = ()


def statx(target):
    """The `Statx` of a descriptor or path (symbolic links are followed).

    Raises an ODirectError with the kernel's errno. Source: statx(2).
    """
    cdef od_statx result
    cdef int fd, error, flags = 0
    cdef bytes path = b""
    cdef const char *name
    if isinstance(target, int):
        fd = target
        flags = AT_EMPTY_PATH
    else:
        fd = AT_FDCWD
        path = os.fsencode(target)
        whole_word(path)
    name = path
    with nogil:
        error = od_statx_call(fd, name, flags, &result)
    if error:
        raise from_errno(-error, "statx", None if isinstance(target, int) else target)
    return Statx(
        result.mask,
        result.blksize,
        result.mode,
        result.ino,
        result.size,
        result.dev_major,
        result.dev_minor,
        result.rdev_major,
        result.rdev_minor,
        result.mnt_id,
        result.dio_mem_align,
        result.dio_offset_align,
        result.dio_read_offset_align,
        result.atomic_write_unit_min,
        result.atomic_write_unit_max,
        result.atomic_write_segments_max,
        result.atomic_write_unit_max_opt,
    )


def cachestat(int fd, uint64_t offset, uint64_t length):
    """(cached, dirty, writeback, evicted, recently evicted) pages of the range; `length` 0 is to the end.

    None where the kernel has no such call (before Linux 6.5), forbids it, or the file has no page cache of its own.
    Raises an ODirectError for any other errno. Source: cachestat(2).
    """
    cdef od_cachestat result
    cdef int error
    with nogil:
        error = od_cachestat_call(fd, offset, length, &result)
    if error == 0:
        return result.cached, result.dirty, result.writeback, result.evicted, result.recently_evicted
    if error == -ENOSYS or error == -EPERM or error == -EOPNOTSUPP:
        return None
    raise from_errno(-error, "cachestat")


def sync_file_range(int fd, int64_t offset, int64_t length, unsigned flags):
    """0 or a negative errno. Source: sync_file_range(2), where the flags are."""
    cdef int error
    while True:
        with nogil:
            error = od_sync_file_range(fd, offset, length, flags)
        if error != -EINTR:
            return error
        PyErr_CheckSignals()


def fallocate(int fd, int mode, int64_t offset, int64_t length):
    """0 or a negative errno. Source: fallocate(2), where the modes are."""
    cdef int error
    while True:
        with nogil:
            error = od_fallocate(fd, mode, offset, length)
        if error != -EINTR:
            return error
        PyErr_CheckSignals()


def copy_guarded(target, source):
    """How many bytes were copied (all of them), or -EFAULT if either memory turns out not to be there.

    Where a plain copy would kill the process (a mapping of a file that has been cut short, or that
    was unmapped or protected), the kernel copies and answers (F23). Where the kernel forbids
    process_vm_readv(2) it is a plain copy. The buffers must not overlap.

    Raises ValueError if the lengths differ or `target` is read-only.
    """
    cdef Py_buffer to, origin
    cdef Py_ssize_t done
    get_buffer(target, &to, True)
    try:
        get_buffer(source, &origin, False)
        try:
            if to.len != origin.len:
                raise ValueError(f"the target has {to.len} bytes, the source {origin.len}")
            with nogil:
                done = od_copy(to.buf, origin.buf, to.len)
                if done == -EPERM or done == -ENOSYS:
                    memcpy(to.buf, origin.buf, to.len)
                    done = to.len
        finally:
            PyBuffer_Release(&origin)
    finally:
        PyBuffer_Release(&to)
    return done


def zero_fill(buffer):
    """How many bytes of `buffer` were set to zero (all of them), or -EFAULT as `copy_guarded` has it.

    Raises ValueError if it is read-only.
    """
    cdef Py_buffer view
    cdef Py_ssize_t done
    get_buffer(buffer, &view, True)
    with nogil:
        done = od_zero(view.buf, view.len)
        if done == -EPERM or done == -ENOSYS:
            memset(view.buf, 0, view.len)
            done = view.len
    PyBuffer_Release(&view)
    return done


cdef enum:
    # What one getdents64 is asked for; and the least that a name takes of it.
    DENTS_BYTES = 1 << 16
    LEAST_DENT_BYTES = 24
    MOST_DENTS = DENTS_BYTES // LEAST_DENT_BYTES
    DENT_LENGTH_AT = 16
    DENT_NAME_AT = 19


def list_directory(path):
    """(names, statuses) of all that is in a directory of the host but "." and "..", as they come.

    names: list of bytes. statuses: bytearray of `STATUS_FIELDS` in int64 for each name, symbolic links not followed.
    Raises an ODirectError with the kernel's errno, which names the path. Source: getdents64(2).
    """
    cdef bytes encoded = os.fsencode(path)
    cdef const char *where = whole_word(encoded)
    cdef int fd, error = 0
    cdef int64_t count, at
    cdef Py_ssize_t found, index
    cdef char *entry
    cdef od_status *statuses
    cdef const char *names[MOST_DENTS]
    cdef bytearray all_statuses = bytearray()
    cdef bytearray dents = bytearray(DENTS_BYTES)
    cdef bytearray some = bytearray(MOST_DENTS * sizeof(od_status))
    cdef char *memory = dents
    cdef list all_names = []
    statuses = <od_status *><char *>some
    with nogil:
        fd = od_open_directory(where)
    if fd < 0:
        raise from_errno(-fd, "listing", path)
    try:
        while True:
            found = 0
            with nogil:
                count = od_getdents(fd, memory, DENTS_BYTES)
                at = 0
                while at < count:
                    entry = memory + at
                    at += (<uint16_t *>(entry + DENT_LENGTH_AT))[0]
                    entry += DENT_NAME_AT
                    if entry[0] == c"." and (entry[1] == 0 or (entry[1] == c"." and entry[2] == 0)):
                        continue
                    names[found] = entry
                    error = od_status_of(fd, entry, statuses + found)
                    found += 1
                    if error:
                        break
            if error:
                raise from_errno(-error, "looking at it", os.path.join(encoded, names[found - 1]))
            if count < 0:
                raise from_errno(-count, "listing", path)
            if count == 0:
                return all_names, all_statuses
            for index in range(found):
                all_names.append(<bytes>names[index])
            all_statuses += (<char *>statuses)[:found * sizeof(od_status)]
            PyErr_CheckSignals()
    finally:
        close(fd)


def read_small(
    list directories,
    const int64_t[::1] counts,
    list names,
    int64_t[:, ::1] statuses,
    unsigned char[::1] memory,
    const int64_t[::1] rooms,
    bint plain,
):
    """For each of many small files of the host, 0 if all of it was read, else why not.

    directories: their paths. counts: how many of `names`, in order, are in each. statuses: what `list_directory`
    said, a row of `STATUS_FIELDS` for each name; brought up to date. memory: where the bytes go, one file after
    the other. rooms: the bytes that each has there; what it does not need is zeroed. plain: files with
    extended attributes are NOT_SMALL. Answers a list: 0, NOT_SMALL, ANOTHER, SHORTER, or a negative errno.

    Raises ValueError if the lengths do not match, or a path or name has a zero byte.
    """
    cdef Py_ssize_t total = len(names), index = 0, last, each, groups = len(directories)
    cdef int64_t at = 0
    cdef int fd
    cdef bytearray path_memory = bytearray(groups * sizeof(void *))
    cdef bytearray name_memory = bytearray(total * sizeof(void *))
    cdef bytearray answers = bytearray(total * sizeof(int))
    cdef const char **paths = <const char **><char *>path_memory
    cdef const char **starts = <const char **><char *>name_memory
    cdef int *results = <int *><char *>answers
    cdef od_status *rows = NULL
    cdef char *bytes_at = NULL
    if (
        counts.shape[0] != groups
        or sum(counts) != total
        or rooms.shape[0] != total
        or statuses.shape[0] != total
        or statuses.shape[1] * sizeof(int64_t) != sizeof(od_status)
        or min(rooms, default=0) < 0
        or min(counts, default=0) < 0
        or sum(rooms) > memory.shape[0]
    ):
        raise ValueError(f"{total} names do not match the counts, statuses and rooms")
    for each in range(groups):
        paths[each] = whole_word(directories[each])
    for each in range(total):
        starts[each] = whole_word(names[each])
    if total:
        rows = <od_status *>&statuses[0, 0]
    if memory.shape[0]:
        bytes_at = <char *>&memory[0]
    with nogil:
        for each in range(groups):
            fd = od_open_directory(paths[each])
            last = index + counts[each]
            while index < last:
                if fd < 0:
                    results[index] = fd
                else:
                    results[index] = od_read_small(fd, starts[index], rows + index, bytes_at + at, rooms[index], plain)
                at += rooms[index]
                index += 1
            if fd >= 0:
                close(fd)
    return [results[each] for each in range(total)]


cdef const char *whole_word(bytes word) except NULL:
    """The characters of a path or name; they live as long as it does."""
    if b"\0" in word:
        raise ValueError("embedded null byte")
    return word
