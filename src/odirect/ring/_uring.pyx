# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The ring on io_uring: operations are written into memory shared with the kernel and handed over in batches.

Nothing but the raw system calls is used; `kernel_uring.h` has the records. What the running kernel
lacks is found out when a ring is made, and done without.

Who owns what: an operation has a slot from `queue` until `reap` returns its tag. The slot holds the
buffers (F24) and the submission as it was built. Slots wait in a list in the order they were queued and
are copied into the submission ring when there is room: no more than `depth` are ever with the kernel,
so the completion ring, which is larger, cannot overflow.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.ref cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.errno cimport EAGAIN, EBUSY, EEXIST, EINTR, EINVAL, ENOSYS
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove
from posix.unistd cimport close as close_fd

from odirect.base.errors import ClosedError, UnsupportedError, from_errno
from odirect.ring.contract import RingFeatures


cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident() nogil


cdef extern from "kernel_uring.h" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

    struct od_sqe:
        unsigned char opcode
        unsigned char flags
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint32_t op_flags
        uint64_t user_data
        unsigned short buf_index

    struct od_cqe:
        uint64_t user_data
        int32_t res

    struct od_ring:
        int fd
        uint32_t setup_flags, features
        uint32_t sq_mask, sq_entries, cq_mask, cq_entries, tail, head
        uint32_t *sq_head
        uint32_t *sq_tail
        uint32_t *sq_flags
        uint32_t *cq_head
        uint32_t *cq_tail
        od_sqe *sqes
        od_cqe *cqes

    enum:
        ECANCELED
        ETIME
        OD_OP_NOP
        OD_OP_READV
        OD_OP_WRITEV
        OD_OP_FSYNC
        OD_OP_READ_FIXED
        OD_OP_WRITE_FIXED
        OD_OP_FALLOCATE
        OD_OP_READ
        OD_OP_WRITE
        OD_SQE_FIXED_FILE
        OD_FSYNC_DATASYNC
        OD_FALLOCATE_KEEP_SIZE
        OD_FALLOCATE_PUNCH_HOLE
        OD_FALLOCATE_ZERO_RANGE
        OD_SETUP_IOPOLL
        OD_SETUP_CQSIZE
        OD_SETUP_CLAMP
        OD_SETUP_SUBMIT_ALL
        OD_SETUP_COOP_TASKRUN
        OD_SETUP_TASKRUN_FLAG
        OD_SETUP_SINGLE_ISSUER
        OD_SETUP_DEFER_TASKRUN
        OD_FEAT_NODROP
        OD_FEAT_RW_CUR_POS
        OD_SQ_CQ_OVERFLOW
        OD_SQ_TASKRUN
        OD_ENTER_GETEVENTS
        OD_REGISTER_EVENTFD
        EFD_CLOEXEC
        EFD_NONBLOCK

    unsigned od_fork_generation
    int od_watch_forks()
    uint32_t od_load(const uint32_t *place)
    void od_store(uint32_t *place, uint32_t value)
    int64_t od_now_ns()
    void od_nap()
    int od_ring_open(od_ring *ring, uint32_t entries, uint32_t cq_entries, uint32_t flags)
    void od_ring_free(od_ring *ring)
    int od_enter(const od_ring *ring, uint32_t to_submit, uint32_t min_complete, uint32_t flags)
    int od_enter_timeout(
        const od_ring *ring, uint32_t to_submit, uint32_t min_complete, uint32_t flags, int64_t timeout_ns
    )
    int od_register(const od_ring *ring, uint32_t what, void *argument, uint32_t count)
    int od_register_files(const od_ring *ring, uint32_t count)
    int od_update_file(const od_ring *ring, uint32_t slot, int32_t fd)
    int od_register_buffers(const od_ring *ring, uint32_t count)
    int od_update_buffer(const od_ring *ring, uint32_t slot, void *address, size_t bytes)
    void od_reset_eventfd(int fd)
    void od_signal_eventfd(int fd)
    int eventfd(unsigned count, int flags)


# The numbers of ring/contract.py, as C constants.
cdef enum:
    READ = 0
    WRITE = 1
    FSYNC = 2
    DISCARD = 3
    ZERO = 4
    RWF_HIPRI = 0x01
    DATA_ONLY = 0x1000

cdef enum:
    CHUNK_SLOTS = 64
    FILE_SLOTS = 64
    BUFFER_SLOTS = 256
    # A handle with this bit is a slot of the registered table; descriptors never get so high.
    FIXED_HANDLE = 0x40000000
    # What the kernel moves at most in one call (MAX_RW_COUNT); it cuts longer ones to this itself.
    LONGEST = 0x7FFFF000
    # A registered buffer is at most 1 GiB; larger ones are registered in pieces.
    PIECE = 0x40000000
    BATCH_DONE = 0
    BATCH_LOOK = 1
    # How long the native loop may run without looking for signals.
    LOOK_NS = 100000000
    # The native loop hands over so many operations at once: a device that gets a whole burst has nothing to do
    # while the next is made ready. It waits for a part of what is in flight, a larger one where that is much, and
    # at most for so many answers.
    HAND_OVER = 2
    MUCH_IN_FLIGHT = 64
    MOST_WANTED = 32


cdef struct Slot:
    od_sqe sqe
    Py_buffer view
    Slot *next
    Py_buffer *views
    iovec *vectors
    Py_ssize_t view_count
    Py_ssize_t view_room
    Py_ssize_t index


cdef struct Piece:
    uintptr_t start
    uintptr_t end
    unsigned short slot


cdef struct Batch:
    unsigned char opcode
    unsigned char flags
    unsigned short buf_index
    int32_t fd
    uint32_t op_flags
    uint32_t length
    uint32_t depth
    uint32_t in_flight
    char *base
    int64_t stride
    const int64_t *offsets
    int64_t *results
    int64_t count
    int64_t next
    int64_t not_whole
    bint stop
    int error


if od_watch_forks():
    raise MemoryError("pthread_atfork")


@cython.final
cdef class UringRing:
    """A `Ring` (see ring/contract.py) on io_uring.

    `depth` is how many operations the kernel is given at once. `shared` makes it usable from several
    threads; otherwise only the thread that makes it may enter it. `iopoll` makes the kernel poll the
    device for completions instead of waiting for interrupts (B06); on a file that cannot be polled
    every operation then answers -EOPNOTSUPP. `cq_entries` asks for a completion ring larger than
    the kernel's choice.

    Raises ValueError for a depth that is not positive, and UnsupportedError or another ODirectError
    with the kernel's errno where io_uring is missing, too old (before Linux 5.6) or forbidden (F53).
    Source: io_uring_setup(2).
    """

    cdef od_ring ring
    cdef unsigned long owner
    cdef unsigned generation
    cdef unsigned long reaping
    cdef bint is_open
    cdef bint in_batch
    cdef bint shared
    cdef bint iopoll
    cdef bint deferred
    cdef bint has_files
    cdef bint has_buffers
    cdef bint waking
    cdef bint woken
    cdef uint32_t room
    cdef uint32_t in_kernel
    cdef Py_ssize_t live
    cdef int event_fd
    cdef list tags
    cdef list answers
    cdef Slot *free_slots
    cdef Slot *first
    cdef Slot *last
    cdef Slot **chunks
    cdef Py_ssize_t chunk_count
    cdef Piece *pieces
    cdef uint32_t piece_count
    cdef uint32_t buffer_slots_used
    cdef Py_buffer **kept
    cdef Py_ssize_t kept_count
    cdef uint64_t files_used

    def __cinit__(self):
        self.ring.fd = -1
        self.event_fd = -1

    def __init__(self, depth=128, *, bint shared=False, bint iopoll=False, cq_entries=0):
        cdef uint32_t entries, cq, more, base
        cdef int error = -EINVAL
        if self.is_open:
            raise RuntimeError("the ring is open already")
        if not 1 <= depth:
            raise ValueError(f"depth must be at least 1, not {depth}")
        if not 0 <= cq_entries:
            raise ValueError(f"cq_entries must not be negative, it is {cq_entries}")
        entries = min(depth, 32768)
        cq = min(cq_entries, 65536)
        base = OD_SETUP_CLAMP | (OD_SETUP_IOPOLL if iopoll else 0)
        if cq > 0:
            base |= OD_SETUP_CQSIZE
            cq = max(cq, entries)
        choices = []
        if not shared:
            # Completions are worked up only when this thread asks for them: no interrupts, no locks.
            choices.append(OD_SETUP_SINGLE_ISSUER | OD_SETUP_DEFER_TASKRUN | OD_SETUP_TASKRUN_FLAG | OD_SETUP_SUBMIT_ALL)
        choices.append(OD_SETUP_COOP_TASKRUN | OD_SETUP_TASKRUN_FLAG | OD_SETUP_SUBMIT_ALL)
        choices.append(0)
        for choice in choices:
            more = choice
            error = od_ring_open(&self.ring, entries, cq, base | more)
            if error != -EINVAL:
                break
        if error == -EINVAL and cq == 0:
            # CLAMP came with Linux 5.6 and is the last thing that an older kernel can stumble over.
            raise UnsupportedError("this kernel's io_uring is older than Linux 5.6", errno=EINVAL)
        if error == -ENOSYS:
            raise UnsupportedError("this kernel has no io_uring", errno=ENOSYS)
        if error:
            raise from_errno(-error, "setting up io_uring")
        if not self.ring.features & OD_FEAT_RW_CUR_POS:
            od_ring_free(&self.ring)
            raise UnsupportedError("this kernel's io_uring is older than Linux 5.6", errno=ENOSYS)
        self.room = min(entries, self.ring.sq_entries)
        self.shared = shared
        self.iopoll = iopoll
        self.deferred = self.ring.setup_flags & OD_SETUP_DEFER_TASKRUN != 0
        self.owner = PyThread_get_thread_ident()
        self.generation = od_fork_generation
        self.tags = []
        self.is_open = True
        self.has_files = od_register_files(&self.ring, FILE_SLOTS) == 0
        self.has_buffers = od_register_buffers(&self.ring, BUFFER_SLOTS) == 0

    def __dealloc__(self):
        cdef bint leak = False
        if self.is_open and self.generation == od_fork_generation:
            if self.shared or self.owner == PyThread_get_thread_ident():
                # What was never handed over cannot be answered any more, so it is dropped.
                self._drop_queued()
                with nogil:
                    leak = self._drain() != 0
            else:
                # Only the owner can make the kernel finish. Memory that may still be written to
                # by the device is better lost than given to somebody else (F24).
                leak = self.in_kernel != 0
        self._free(leak)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def kind(self):
        """"io_uring"."""
        return "io_uring"

    @property
    def depth(self):
        """How many operations the kernel is given at once."""
        return self.room

    @property
    def features(self):
        """What this kernel gave: a `RingFeatures`."""
        return RingFeatures(
            single_issuer=self.ring.setup_flags & OD_SETUP_SINGLE_ISSUER != 0,
            defer_taskrun=bool(self.deferred),
            fixed_files=bool(self.has_files),
            fixed_buffers=bool(self.has_buffers),
            iopoll=bool(self.iopoll),
        )

    @property
    def in_flight(self):
        """Operations queued or submitted whose tag `reap` has not yet returned."""
        return self.live + (0 if self.answers is None else len(self.answers))

    @property
    def interruptible(self):
        """Whether this thread is inside `reap`, where an exception of a signal's handler loses nothing."""
        return self.reaping != 0 and self.reaping == PyThread_get_thread_ident()

    # -- registered files and buffers ------------------------------------------------------------

    def add_file(self, int fd):
        """A handle for `fd` to be passed to `queue`: a registered slot, or `fd` itself where there is none.

        Source: io_uring_register(2), IORING_REGISTER_FILES_UPDATE.
        """
        cdef int slot
        self._check()
        if self.has_files and fd >= 0:
            for slot in range(FILE_SLOTS):
                if not self.files_used >> slot & 1:
                    if od_update_file(&self.ring, slot, fd) != 0:
                        break
                    self.files_used |= <uint64_t>1 << slot
                    return slot | FIXED_HANDLE
        return fd

    def remove_file(self, int handle):
        """Give back a handle of `add_file`; nothing of it may be in flight. Raises ValueError if it is not one."""
        cdef int slot = handle & ~FIXED_HANDLE
        self._check()
        if handle < 0 or not handle & FIXED_HANDLE:
            return
        if slot >= FILE_SLOTS or not self.files_used >> slot & 1:
            raise ValueError(f"{handle} is not a handle of this ring")
        od_update_file(&self.ring, slot, -1)
        self.files_used &= ~(<uint64_t>1 << slot)

    def add_buffer(self, buffer):
        """Whether `buffer` (writable, contiguous) is now registered; the ring keeps it until it is closed.

        False where the kernel is too old or RLIMIT_MEMLOCK refuses it; everything works without.
        Source: io_uring_register(2), IORING_REGISTER_BUFFERS_UPDATE.
        """
        cdef Py_buffer **kept
        cdef Piece *more
        cdef Py_buffer *view
        cdef uint32_t pieces, done = 0, place
        cdef uintptr_t start
        cdef size_t bytes
        self._check()
        kept = <Py_buffer **>realloc(self.kept, (self.kept_count + 1) * sizeof(Py_buffer *))
        if kept == NULL:
            raise MemoryError
        self.kept = kept
        view = <Py_buffer *>calloc(1, sizeof(Py_buffer))
        if view == NULL:
            raise MemoryError
        try:
            get_buffer(buffer, view, True)
        except BaseException:
            free(view)
            raise
        # From here on the ring has it: `_free` lets it go.
        kept[self.kept_count] = view
        self.kept_count += 1
        pieces = (view.len + PIECE - 1) // PIECE
        if not self.has_buffers or view.len == 0 or pieces > BUFFER_SLOTS - self.buffer_slots_used:
            self._forget_last()
            return False
        more = <Piece *>realloc(self.pieces, (self.piece_count + pieces) * sizeof(Piece))
        if more == NULL:
            self._forget_last()
            raise MemoryError
        self.pieces = more
        start = <uintptr_t>view.buf
        while done < pieces:
            bytes = min(view.len - <Py_ssize_t>done * PIECE, PIECE)
            if od_update_buffer(&self.ring, self.buffer_slots_used, <void *>start, bytes) != 0:
                break
            # Kept in the order of addresses for `fixed_slot`.
            place = self.piece_count
            while place and self.pieces[place - 1].start > start:
                place -= 1
            memmove(&self.pieces[place + 1], &self.pieces[place], (self.piece_count - place) * sizeof(Piece))
            self.pieces[place] = Piece(start, start + bytes, <unsigned short>self.buffer_slots_used)
            self.piece_count += 1
            self.buffer_slots_used += 1
            start += bytes
            done += 1
        if done == 0:
            self._forget_last()
        return done == pieces

    cdef void _forget_last(self) noexcept:
        self.kept_count -= 1
        PyBuffer_Release(self.kept[self.kept_count])
        free(self.kept[self.kept_count])

    cdef inline int _fixed_slot(self, uintptr_t start, size_t bytes) noexcept nogil:
        """The slot of the registered piece that holds these bytes, or -1."""
        cdef uint32_t low = 0, high = self.piece_count, middle
        while low < high:
            middle = (low + high) // 2
            if self.pieces[middle].start <= start:
                low = middle + 1
            else:
                high = middle
        if low == 0 or start + bytes > self.pieces[low - 1].end:
            return -1
        return self.pieces[low - 1].slot

    # -- queueing --------------------------------------------------------------------------------

    def queue(self, int op, int handle, segments, int64_t offset, int64_t length, int flags, tag):
        """Queue one operation; never blocks. The buffers and the tag are kept until it is reaped.

        Raises ValueError for an unknown `op`, a buffer that is read-only or not contiguous, and for
        segments that do not add up to `length`; TypeError for a segment that is no buffer. Nothing
        is queued then.
        """
        cdef Slot *slot
        cdef od_sqe *sqe
        cdef Py_ssize_t count
        cdef int fixed
        cdef PyObject *only
        self._check()
        slot = self.free_slots
        if slot == NULL:
            self._grow()
            slot = self.free_slots
        sqe = &slot.sqe
        sqe.buf_index = 0
        # The kernel reads offset -1 as "the current position", which is never meant here.
        sqe.off = <uint64_t>(offset if offset != -1 else -2)
        if op == READ or op == WRITE:
            if type(segments) is tuple:
                count = PyTuple_GET_SIZE(segments)
                only = <PyObject *>PyTuple_GET_ITEM(segments, 0) if count == 1 else NULL
            elif type(segments) is list:
                count = PyList_GET_SIZE(segments)
                only = <PyObject *>PyList_GET_ITEM(segments, 0) if count == 1 else NULL
            else:
                segments = tuple(segments)
                count = PyTuple_GET_SIZE(segments)
                only = <PyObject *>PyTuple_GET_ITEM(segments, 0) if count == 1 else NULL
            sqe.op_flags = flags
            if flags & RWF_HIPRI and not self.iopoll:
                # Without a polling ring the kernel refuses the flag; it is only a wish (B06).
                sqe.op_flags = flags & ~RWF_HIPRI
            if count == 1:
                get_buffer(<object>only, &slot.view, op == READ)
                if slot.view.len != length:
                    bytes = slot.view.len
                    PyBuffer_Release(&slot.view)
                    raise ValueError(f"the segment has {bytes} bytes, the operation {length}")
                sqe.addr = <uint64_t><uintptr_t>slot.view.buf
                sqe.len = <uint32_t>min(length, LONGEST)
                sqe.opcode = OD_OP_READ if op == READ else OD_OP_WRITE
                if self.piece_count:
                    fixed = self._fixed_slot(<uintptr_t>slot.view.buf, length)
                    if fixed >= 0:
                        sqe.opcode = OD_OP_READ_FIXED if op == READ else OD_OP_WRITE_FIXED
                        sqe.buf_index = <unsigned short>fixed
                slot.view_count = 1
            else:
                self._take_segments(slot, segments, op == READ, length)
                sqe.addr = <uint64_t><uintptr_t>slot.vectors
                sqe.len = <uint32_t>count
                sqe.opcode = OD_OP_READV if op == READ else OD_OP_WRITEV
        elif op == FSYNC:
            sqe.opcode = OD_OP_FSYNC
            sqe.off = sqe.addr = sqe.len = 0
            sqe.op_flags = OD_FSYNC_DATASYNC if flags & DATA_ONLY else 0
        elif op == DISCARD or op == ZERO:
            # fallocate(2): a hole keeps the size; zeroes must not make a file longer either.
            sqe.opcode = OD_OP_FALLOCATE
            sqe.addr = <uint64_t>length
            sqe.len = OD_FALLOCATE_KEEP_SIZE | (OD_FALLOCATE_PUNCH_HOLE if op == DISCARD else OD_FALLOCATE_ZERO_RANGE)
            sqe.op_flags = 0
        else:
            raise ValueError(f"{op} is not an operation")
        if handle >= FIXED_HANDLE:
            sqe.fd = handle & ~FIXED_HANDLE
            sqe.flags = OD_SQE_FIXED_FILE
        else:
            sqe.fd = handle
            sqe.flags = 0
        self.tags[slot.index] = tag
        self.free_slots = slot.next
        slot.next = NULL
        if self.first == NULL:
            self.first = slot
        else:
            self.last.next = slot
        self.last = slot
        self.live += 1

    cdef int _take_segments(self, Slot *slot, segments, bint writable, int64_t length) except -1:
        """Give the slot the buffers of `segments` (a tuple or list), all or none of them."""
        cdef Py_ssize_t count = len(segments)
        cdef Py_ssize_t index
        cdef int64_t total = 0
        cdef void *grown
        if count > slot.view_room:
            grown = realloc(slot.views, count * sizeof(Py_buffer))
            if grown == NULL:
                raise MemoryError
            slot.views = <Py_buffer *>grown
            grown = realloc(slot.vectors, count * sizeof(iovec))
            if grown == NULL:
                raise MemoryError
            slot.vectors = <iovec *>grown
            slot.view_room = count
        slot.view_count = 0
        try:
            for index in range(count):
                get_buffer(segments[index], &slot.views[index], writable)
                slot.view_count = index + 1
                slot.vectors[index].iov_base = slot.views[index].buf
                slot.vectors[index].iov_len = slot.views[index].len
                total += slot.views[index].len
            if total != length:
                raise ValueError(f"the segments have {total} bytes, the operation {length}")
        except BaseException:
            for index in range(slot.view_count):
                PyBuffer_Release(&slot.views[index])
            slot.view_count = 0
            raise
        # One buffer is what `view` is for; anything else is in `views`, told apart by the opcode.
        return 0

    cdef int _grow(self) except -1:
        """More free slots. They never move: the kernel and exporters hold pointers into them."""
        cdef Slot **chunks
        cdef Slot *chunk
        cdef Py_ssize_t index
        chunks = <Slot **>realloc(self.chunks, (self.chunk_count + 1) * sizeof(Slot *))
        if chunks == NULL:
            raise MemoryError
        self.chunks = chunks
        chunk = <Slot *>calloc(CHUNK_SLOTS, sizeof(Slot))
        if chunk == NULL:
            raise MemoryError
        try:
            self.tags.extend([None] * CHUNK_SLOTS)
        except MemoryError:
            free(chunk)
            raise
        self.chunks[self.chunk_count] = chunk
        for index in range(CHUNK_SLOTS - 1, -1, -1):
            chunk[index].index = self.chunk_count * CHUNK_SLOTS + index
            chunk[index].sqe.user_data = <uint64_t><uintptr_t>&chunk[index]
            chunk[index].next = self.free_slots
            self.free_slots = &chunk[index]
        self.chunk_count += 1
        return 0

    cdef inline void _release(self, Slot *slot) noexcept:
        """Let go of the slot's buffers and put it back."""
        cdef Py_ssize_t index, count = slot.view_count
        slot.view_count = 0
        self.live -= 1
        if slot.sqe.opcode == OD_OP_READV or slot.sqe.opcode == OD_OP_WRITEV:
            for index in range(count):
                PyBuffer_Release(&slot.views[index])
        elif count:
            PyBuffer_Release(&slot.view)
        slot.next = self.free_slots
        self.free_slots = slot

    # -- handing over ----------------------------------------------------------------------------

    cdef inline void _fill(self) noexcept nogil:
        """Copy queued submissions into the submission ring while there is room."""
        cdef uint32_t tail = self.ring.tail
        cdef Slot *slot = self.first
        if slot == NULL or self.in_kernel >= self.room:
            return
        while slot != NULL and self.in_kernel < self.room:
            memcpy(&self.ring.sqes[tail & self.ring.sq_mask], &slot.sqe, sizeof(od_sqe))
            tail += 1
            self.in_kernel += 1
            slot = slot.next
        self.first = slot
        self.ring.tail = tail
        od_store(self.ring.sq_tail, tail)

    cdef inline uint32_t _unsubmitted(self) noexcept nogil:
        return self.ring.tail - od_load(self.ring.sq_head)

    def commit(self):
        """Hand everything queued to the kernel, as far as `depth` allows, in one system call."""
        cdef uint32_t to_submit
        cdef int result
        self._check()
        self._fill()
        while self.is_open:
            to_submit = self._unsubmitted()
            if to_submit == 0:
                return
            with nogil:
                result = od_enter(&self.ring, to_submit, 0, 0)
            if result >= 0:
                continue
            if result == -EAGAIN or result == -EBUSY:
                # The kernel is out of memory for requests. Where some are under way their end
                # brings another `reap`, which tries again.
                if self.in_kernel > to_submit:
                    return
                with nogil:
                    od_nap()
            elif result != -EINTR:
                raise self._enter_error(result)
            PyErr_CheckSignals()

    def holds(self, tag):
        """Whether an operation with this very tag was queued and not yet reaped. Slow: it looks at all of them."""
        if self.answers is not None:
            for each, _ in self.answers:
                if each is tag:
                    return True
        for each in self.tags:
            if each is tag:
                return True
        return False

    def wake(self):
        """Make the `reap` that is under way in another thread, or else the next one, return soon.

        It may return nothing then. An operation that does nothing is put on the ring for it.
        """
        cdef od_sqe *sqe
        cdef int result
        self._check()
        if self.waking or self.ring.tail - od_load(self.ring.sq_head) > self.ring.sq_mask:
            return  # One is on its way, or so much is that something will come back.
        sqe = &self.ring.sqes[self.ring.tail & self.ring.sq_mask]
        sqe.opcode = OD_OP_NOP
        sqe.flags = 0
        sqe.fd = -1
        sqe.off = sqe.addr = sqe.user_data = 0
        sqe.len = sqe.op_flags = sqe.buf_index = 0
        self.waking = True
        self.in_kernel += 1
        self.ring.tail += 1
        od_store(self.ring.sq_tail, self.ring.tail)
        while self.is_open and self._unsubmitted():
            with nogil:
                result = od_enter(&self.ring, self._unsubmitted(), 0, 0)
            if result == -EAGAIN or result == -EBUSY:
                if self.in_kernel > self._unsubmitted():
                    return  # What is under way comes back, and so does whoever reaps it.
                with nogil:
                    od_nap()
            elif result < 0 and result != -EINTR:
                raise self._enter_error(result)

    def reap(self, int64_t timeout_ns, list into=None):
        """(tag, result) of finished operations; result is a byte count or a negative errno.

        into: a list that they are added to, and that is returned: then a handler that raises right behind
        this call takes nothing with it. Commits first what is queued. `timeout_ns` 0 looks, -1 waits for
        one; at once if nothing is in flight. Raises what a signal's handler raises, with nothing lost, and
        RuntimeError if another call is inside `reap`.
        """
        cdef list out
        self._check()
        if into is None:
            into = []
        if self.reaping:
            raise RuntimeError("another reap of this ring is under way")
        if self.answers is not None:
            out, self.answers = self.answers, None
            if self.event_fd >= 0 and self.live == 0:
                od_reset_eventfd(self.event_fd)
            into.extend(out)
            return into
        if self.live == 0:
            if self.event_fd >= 0:
                od_reset_eventfd(self.event_fd)
            return into
        self.reaping = PyThread_get_thread_ident()
        try:
            into.extend(self._reap(timeout_ns))
        finally:
            self.reaping = 0
        return into

    cdef list _reap(self, int64_t timeout_ns):
        cdef int64_t deadline = 0, left = 0
        cdef uint32_t to_submit, ready, work, want
        cdef int result
        cdef bint starved = False
        if timeout_ns > 0:
            deadline = od_now_ns() + timeout_ns
            left = timeout_ns
        while True:
            self._fill()
            to_submit = self._unsubmitted()
            ready = od_load(self.ring.cq_tail) - self.ring.head
            work = od_load(self.ring.sq_flags) & (OD_SQ_TASKRUN | OD_SQ_CQ_OVERFLOW)
            want = 1 if ready == 0 and timeout_ns != 0 else 0
            if starved and self.in_kernel > to_submit:
                to_submit = 0
            if to_submit or want or work or (self.iopoll and ready == 0):
                with nogil:
                    if want and timeout_ns > 0 and self.iopoll:
                        # Polling for completions has no timeout: look, and come back below.
                        result = od_enter(&self.ring, to_submit, 0, OD_ENTER_GETEVENTS)
                    elif want and timeout_ns > 0:
                        result = od_enter_timeout(&self.ring, to_submit, 1, OD_ENTER_GETEVENTS, left)
                    else:
                        result = od_enter(&self.ring, to_submit, want, OD_ENTER_GETEVENTS)
                if result < 0 and result != -EINTR and result != -ETIME:
                    if result != -EAGAIN and result != -EBUSY:
                        raise self._enter_error(result)
                    # Out of memory for requests: wait for one of those under way, if any is.
                    starved = True
                    if self.in_kernel <= to_submit:
                        with nogil:
                            od_nap()
            if self.event_fd >= 0:
                # Reset first, then look once more: what is signalled before the reset is seen
                # here, what comes after it signals anew.
                od_reset_eventfd(self.event_fd)
                if od_load(self.ring.sq_flags) & OD_SQ_TASKRUN:
                    od_enter(&self.ring, 0, 0, OD_ENTER_GETEVENTS)
            if od_load(self.ring.cq_tail) != self.ring.head:
                out = self._harvest()
                if self.first != NULL:
                    self._refill()
                if out:
                    try:
                        # A signal that came while we waited: its handler would else run right after
                        # the return, and an exception of its would take the answers with it.
                        PyErr_CheckSignals()
                    except BaseException:
                        self._put_by(out)
                        raise
                    self.woken = False
                    return out
            # Nothing came: a signal, the time is up, or somebody else's wake-up.
            PyErr_CheckSignals()
            if not self.is_open:
                raise ClosedError("the ring was closed while it was waited on")
            if self.woken:
                self.woken = False
                return []
            if timeout_ns == 0 or self.live == 0:
                return []
            if timeout_ns > 0:
                left = deadline - od_now_ns()
                if left <= 0:
                    return []

    cdef list _harvest(self):
        """Take all completions there are; what cannot be returned now is returned by the next reap."""
        cdef list out = []
        cdef list tags = self.tags
        cdef uint32_t tail = od_load(self.ring.cq_tail)
        cdef uint32_t head = self.ring.head
        cdef od_cqe *cqe
        cdef Slot *slot
        cdef int32_t res, last_res = -1
        cdef object number = None
        cdef object tag
        try:
            while head != tail:
                cqe = &self.ring.cqes[head & self.ring.cq_mask]
                slot = <Slot *><uintptr_t>cqe.user_data
                res = cqe.res
                if slot == NULL:
                    self.waking = False
                    self.woken = True
                elif res == -ECANCELED or res == -EINTR:
                    # Nobody here cancels: the thread that submitted it has ended before the kernel
                    # began (or did any of) it. So it is done again.
                    self._queue_again(slot)
                else:
                    if number is None or res != last_res:
                        number = res
                        last_res = res
                    tag = tags[slot.index]
                    out.append((tag, number))
                    tags[slot.index] = None
                    self._release(slot)
                head += 1
                self.ring.head = head
                self.in_kernel -= 1
                od_store(self.ring.cq_head, head)
        except BaseException:
            self._put_by(out)
            raise
        return out

    cdef void _put_by(self, list out) noexcept:
        """Keep answers for the next reap, and wake whoever waits for something to reap."""
        if self.is_open:
            self.answers = out
            if self.event_fd >= 0:
                od_signal_eventfd(self.event_fd)

    cdef void _queue_again(self, Slot *slot) noexcept:
        slot.next = NULL
        if self.first == NULL:
            self.first = slot
        else:
            self.last.next = slot
        self.last = slot

    cdef void _refill(self) noexcept:
        """Hand over what was held back, now that there is room. Never raises: errors are met by the next call."""
        cdef uint32_t to_submit
        cdef int result
        self._fill()
        while True:
            to_submit = self._unsubmitted()
            if to_submit == 0:
                return
            with nogil:
                result = od_enter(&self.ring, to_submit, 0, 0)
            if result >= 0 or result == -EINTR:
                continue
            if (result != -EAGAIN and result != -EBUSY) or self.in_kernel > to_submit:
                return
            with nogil:
                od_nap()

    def wakeup_fd(self):
        """An eventfd that is readable when there may be something to reap; `reap` resets it. Closed with the ring."""
        cdef int result
        self._check()
        if self.event_fd < 0:
            self.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if self.event_fd < 0:
                raise MemoryError("eventfd")
            result = od_register(&self.ring, OD_REGISTER_EVENTFD, &self.event_fd, 1)
            if result < 0:
                close_fd(self.event_fd)
                self.event_fd = -1
                raise from_errno(-result, "registering an eventfd with io_uring")
            if self.live:
                # What has finished before this was there signals nothing any more.
                od_signal_eventfd(self.event_fd)
        return self.event_fd

    # -- many at once ----------------------------------------------------------------------------

    def transfer_batch(
        self, int op, int handle, buffer, int64_t stride, offsets, int64_t length, int flags, results, int depth
    ):
        """Do many transfers of one length at once, `depth` in flight; how many are not whole.

        Element i moves `length` bytes between buffer[i*stride:] and file offset offsets[i];
        results[i] becomes its byte count or a negative errno. The loop runs without the GIL. When
        a signal's handler raises, what was not begun is -ECANCELED, and the exception leaves after
        everything in flight has come back. Raises ValueError for arguments that do not fit
        together, RuntimeError if anything else is in flight.
        """
        cdef Py_buffer data, places, answers
        cdef Batch batch
        cdef int fixed, outcome
        cdef int64_t index
        self._check()
        if self.live or self.reaping or self.answers is not None:
            raise RuntimeError("a batch needs a ring with nothing else in flight")
        if self.waking:
            # Its answer would be taken for the first element's.
            with nogil:
                self._drain()
            self.waking = False
        if op != READ and op != WRITE:
            raise ValueError(f"a batch reads or writes; {op} is neither")
        if depth < 1 or length < 0 or length > LONGEST or stride < 0:
            raise ValueError(f"depth {depth}, length {length} or stride {stride} is out of range")
        get_int64s(offsets, &places, False)
        try:
            get_int64s(results, &answers, True)
            try:
                get_buffer(buffer, &data, op == READ)
                try:
                    batch.count = places.len // 8
                    if answers.len != places.len:
                        raise ValueError(f"{places.len // 8} offsets but {answers.len // 8} results")
                    if batch.count == 0:
                        return 0
                    # Written so that no product can overflow.
                    if length > data.len or (batch.count > 1 and stride > (data.len - length) // (batch.count - 1)):
                        raise ValueError(
                            f"the buffer's {data.len} bytes do not hold {batch.count} elements of {length} bytes,"
                            f" {stride} apart"
                        )
                    batch.base = <char *>data.buf
                    batch.stride = stride
                    batch.length = <uint32_t>length
                    batch.offsets = <const int64_t *>places.buf
                    batch.results = <int64_t *>answers.buf
                    batch.op_flags = flags if self.iopoll else flags & ~RWF_HIPRI
                    batch.opcode = OD_OP_READ if op == READ else OD_OP_WRITE
                    batch.buf_index = 0
                    if self.piece_count:
                        fixed = self._fixed_slot(<uintptr_t>data.buf, (batch.count - 1) * stride + length)
                        if fixed >= 0:
                            batch.opcode = OD_OP_READ_FIXED if op == READ else OD_OP_WRITE_FIXED
                            batch.buf_index = <unsigned short>fixed
                    batch.fd = handle
                    batch.flags = 0
                    if handle >= FIXED_HANDLE:
                        batch.fd = handle & ~FIXED_HANDLE
                        batch.flags = OD_SQE_FIXED_FILE
                    batch.depth = min(<uint32_t>depth, self.room)
                    batch.in_flight = 0
                    batch.next = 0
                    batch.not_whole = 0
                    batch.stop = False
                    batch.error = 0
                    self.reaping = PyThread_get_thread_ident()
                    self.in_batch = True
                    try:
                        while True:
                            with nogil:
                                outcome = self._run(&batch)
                            if outcome == BATCH_DONE:
                                break
                            PyErr_CheckSignals()
                    except BaseException:
                        batch.stop = True
                        with nogil:
                            while self._run(&batch) != BATCH_DONE:
                                pass
                        raise
                    finally:
                        self.reaping = 0
                        self.in_batch = False
                        for index in range(batch.next, batch.count):
                            batch.results[index] = -ECANCELED
                        if self.event_fd >= 0:
                            od_reset_eventfd(self.event_fd)
                    if batch.error:
                        raise self._enter_error(batch.error)
                    return batch.not_whole
                finally:
                    PyBuffer_Release(&data)
            finally:
                PyBuffer_Release(&answers)
        finally:
            PyBuffer_Release(&places)

    cdef int _run(self, Batch *batch) noexcept nogil:
        """Go on with the batch: BATCH_DONE when nothing is in flight any more, BATCH_LOOK to look for signals."""
        cdef od_ring *ring = &self.ring
        cdef od_sqe *sqe
        cdef od_cqe *cqe
        cdef uint32_t tail, head, to_submit, want, came, turns = 0
        cdef int result
        cdef int64_t began = od_now_ns(), offset
        while True:
            tail = ring.tail
            while batch.in_flight < batch.depth and batch.next < batch.count and not batch.stop:
                sqe = &ring.sqes[tail & ring.sq_mask]
                offset = batch.offsets[batch.next]
                sqe.opcode = batch.opcode
                sqe.flags = batch.flags
                sqe.fd = batch.fd
                sqe.off = <uint64_t>(offset if offset != -1 else -2)
                sqe.addr = <uint64_t><uintptr_t>(batch.base + batch.next * batch.stride)
                sqe.len = batch.length
                sqe.op_flags = batch.op_flags
                sqe.user_data = <uint64_t>batch.next
                sqe.buf_index = batch.buf_index
                tail += 1
                batch.next += 1
                batch.in_flight += 1
                if tail - ring.tail == HAND_OVER:
                    # The device begins while the rest is made ready; what it does not take now goes with the rest.
                    ring.tail = tail
                    od_store(ring.sq_tail, tail)
                    od_enter(ring, tail - od_load(ring.sq_head), 0, 0)
            if batch.in_flight == 0:
                return BATCH_DONE
            ring.tail = tail
            od_store(ring.sq_tail, tail)
            to_submit = tail - od_load(ring.sq_head)
            want = batch.in_flight // (4 if batch.in_flight > MUCH_IN_FLIGHT else 8)
            want = min(max(want, 1), MOST_WANTED)
            result = od_enter(ring, to_submit, want, OD_ENTER_GETEVENTS)
            if result < 0 and result != -EINTR:
                if result != -EAGAIN and result != -EBUSY:
                    # Not met in practice: what the kernel took is waited for, the rest is taken back.
                    batch.error = result
                    batch.stop = True
                    self._take_back(batch)
                elif batch.in_flight > to_submit:
                    od_enter(ring, 0, 1, OD_ENTER_GETEVENTS)
                else:
                    od_nap()
            head = ring.head
            tail = od_load(ring.cq_tail)
            came = tail - head
            while head != tail:
                cqe = &ring.cqes[head & ring.cq_mask]
                batch.results[cqe.user_data] = cqe.res
                batch.not_whole += cqe.res != <int32_t>batch.length
                head += 1
                batch.in_flight -= 1
            ring.head = head
            od_store(ring.cq_head, head)
            if came == 0 and not batch.stop:
                # A signal, most likely: an interrupted wait that had submitted something says so no other way.
                return BATCH_LOOK
            turns += 1
            if turns & 15 == 0 and not batch.stop and od_now_ns() - began > LOOK_NS:
                return BATCH_LOOK

    cdef void _take_back(self, Batch *batch) noexcept nogil:
        """Undo the submissions that the kernel has not taken."""
        cdef uint32_t head = od_load(self.ring.sq_head)
        batch.in_flight -= self.ring.tail - head
        batch.next -= self.ring.tail - head
        self.ring.tail = head
        od_store(self.ring.sq_tail, head)

    # -- the end ---------------------------------------------------------------------------------

    def close(self):
        """Wait for everything in flight (answers are dropped), then free the ring. Twice is harmless.

        Raises RuntimeError from a thread that may not enter the ring, while something is in flight.
        """
        cdef int error
        if not self.is_open:
            return
        if self.generation != od_fork_generation:
            # The parent's ring: ours is only the memory and the descriptor.
            self._free(False)
            return
        if not self.shared and self.owner != PyThread_get_thread_ident() and self.live:
            raise RuntimeError("a private ring with I/O in flight can be closed by the thread that made it alone")
        if self.in_batch:
            raise RuntimeError("a batch is under way on this ring")
        while self.reaping and self.reaping != PyThread_get_thread_ident():
            # Somebody waits in `reap`; what he waits for ends by itself.
            with nogil:
                od_nap()
        if not self.is_open:
            return
        self.is_open = False
        with nogil:
            error = self._drain()
        self._free(error != 0)

    cdef int _drain(self) noexcept nogil:
        """Submit what is queued and wait until nothing is left; 0, or a negative errno if the kernel won't."""
        cdef uint32_t to_submit, head
        cdef int result
        while True:
            self._fill()
            if self.in_kernel == 0:
                return 0
            to_submit = self._unsubmitted()
            result = od_enter(&self.ring, to_submit, 1, OD_ENTER_GETEVENTS)
            if result == -EAGAIN or result == -EBUSY:
                if self.in_kernel > to_submit:
                    od_enter(&self.ring, 0, 1, OD_ENTER_GETEVENTS)
                else:
                    od_nap()
            elif result < 0 and result != -EINTR:
                return result
            head = od_load(self.ring.cq_tail)
            self.in_kernel -= head - self.ring.head
            self.ring.head = head
            od_store(self.ring.cq_head, head)

    cdef void _drop_queued(self) noexcept:
        self.first = NULL

    cdef void _free(self, bint leak) noexcept:
        """Free everything; with `leak` the buffers of the slots are kept for ever."""
        cdef Py_ssize_t chunk, index, view
        cdef Slot *slot
        self.is_open = False
        if self.event_fd >= 0:
            close_fd(self.event_fd)
            self.event_fd = -1
        od_ring_free(&self.ring)
        if not leak:
            for chunk in range(self.chunk_count):
                for index in range(CHUNK_SLOTS):
                    slot = &self.chunks[chunk][index]
                    if slot.sqe.opcode == OD_OP_READV or slot.sqe.opcode == OD_OP_WRITEV:
                        for view in range(slot.view_count):
                            PyBuffer_Release(&slot.views[view])
                    elif slot.view_count:
                        PyBuffer_Release(&slot.view)
                    free(slot.views)
                    free(slot.vectors)
                free(self.chunks[chunk])
            for index in range(self.kept_count):
                PyBuffer_Release(self.kept[index])
                free(self.kept[index])
        free(self.chunks)
        free(self.kept)
        free(self.pieces)
        self.chunks = NULL
        self.kept = NULL
        self.pieces = NULL
        self.free_slots = self.first = self.last = NULL
        self.chunk_count = self.kept_count = self.live = 0
        self.piece_count = self.in_kernel = 0

    # -- who may ---------------------------------------------------------------------------------

    cdef inline int _check(self) except -1:
        if (
            self.is_open
            and not self.in_batch
            and self.generation == od_fork_generation
            and (self.shared or self.owner == PyThread_get_thread_ident())
        ):
            return 0
        self._refuse()
        return -1

    cdef int _refuse(self) except -1:
        if not self.is_open:
            raise ClosedError("the ring is closed")
        if self.generation != od_fork_generation:
            raise RuntimeError("this ring was made before a fork, in the parent; the child must make its own")
        if self.in_batch:
            raise RuntimeError("a batch is under way on this ring")
        raise RuntimeError("this ring was made with shared=False and may be entered by the thread that made it alone")

    cdef object _enter_error(self, int result):
        if result == -EEXIST:
            return RuntimeError("this ring was made with shared=False and may be entered by the thread that made it alone")
        return from_errno(-result, "entering io_uring")


cdef inline int get_buffer(object buffer, Py_buffer *view, bint writable) except -1:
    """The contiguous bytes of `buffer`; ValueError if it is read-only or not contiguous."""
    try:
        PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    except BufferError as error:
        raise ValueError(f"a segment must be contiguous{' and writable' if writable else ''}: {error}") from None
    return 0


cdef int get_int64s(object array, Py_buffer *view, bint writable) except -1:
    """The elements of a contiguous array of int64; ValueError if it is not one."""
    cdef bytes layout
    try:
        PyObject_GetBuffer(array, view, PyBUF_FORMAT | PyBUF_ND | (PyBUF_WRITABLE if writable else 0))
    except BufferError as error:
        raise ValueError(f"an array of int64 must be contiguous: {error}") from None
    layout = b"B" if view.format == NULL else <bytes>view.format
    if view.itemsize != 8 or layout.lstrip(b"@=<") not in (b"q", b"l"):
        PyBuffer_Release(view)
        raise ValueError(f"offsets and results must be arrays of int64, not of {layout.decode()!r}")
    return 0
