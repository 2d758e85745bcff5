/*
 * The kernel's side of io_uring: record layouts, numbers, and the five calls that the ring makes.
 *
 * Layouts and numbers are the published user-space interface (io_uring_setup(2), io_uring_enter(2),
 * io_uring_register(2)). They are declared here and not included from linux/io_uring.h, so that
 * the same features are compiled in whatever the age of the installed headers; what the running
 * kernel has is found out at run time.
 */
#ifndef ODIRECT_KERNEL_URING_H
#define ODIRECT_KERNEL_URING_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup 425
#endif
#ifndef __NR_io_uring_enter
#define __NR_io_uring_enter 426
#endif
#ifndef __NR_io_uring_register
#define __NR_io_uring_register 427
#endif

struct od_sqe {
    uint8_t opcode;
    uint8_t flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t off;
    uint64_t addr;
    uint32_t len;
    uint32_t op_flags;
    uint64_t user_data;
    uint16_t buf_index;
    uint16_t personality;
    int32_t file_index;
    uint64_t addr3;
    uint64_t pad;
};

struct od_cqe {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
};

struct od_sq_offsets {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, resv1;
    uint64_t user_addr;
};

struct od_cq_offsets {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1;
    uint64_t user_addr;
};

struct od_params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3];
    struct od_sq_offsets sq_off;
    struct od_cq_offsets cq_off;
};

struct od_getevents_arg {
    uint64_t sigmask;
    uint32_t sigmask_bytes;
    uint32_t min_wait_usec;
    uint64_t timespec;
};

struct od_timespec {
    int64_t seconds;
    int64_t nanoseconds;
};

struct od_rsrc_register {
    uint32_t count;
    uint32_t flags;
    uint64_t resv2, data, tags;
};

struct od_rsrc_update2 {
    uint32_t offset;
    uint32_t resv;
    uint64_t data, tags;
    uint32_t count;
    uint32_t resv2;
};

struct od_files_update {
    uint32_t offset;
    uint32_t resv;
    uint64_t fds;
};

_Static_assert(sizeof(struct od_sqe) == 64, "a submission is 64 bytes");
_Static_assert(sizeof(struct od_cqe) == 16, "a completion is 16 bytes");
_Static_assert(sizeof(struct od_params) == 120, "struct io_uring_params is 120 bytes");

enum {
    OD_OP_NOP = 0,
    OD_OP_READV = 1,
    OD_OP_WRITEV = 2,
    OD_OP_FSYNC = 3,
    OD_OP_READ_FIXED = 4,
    OD_OP_WRITE_FIXED = 5,
    OD_OP_FALLOCATE = 17,
    OD_OP_READ = 22,
    OD_OP_WRITE = 23,
};

enum { OD_SQE_FIXED_FILE = 1 };
enum { OD_FSYNC_DATASYNC = 1 };
enum { OD_FALLOCATE_KEEP_SIZE = 1, OD_FALLOCATE_PUNCH_HOLE = 2, OD_FALLOCATE_ZERO_RANGE = 16 };

enum {
    OD_SETUP_IOPOLL = 1 << 0,
    OD_SETUP_CQSIZE = 1 << 3,
    OD_SETUP_CLAMP = 1 << 4,
    OD_SETUP_SUBMIT_ALL = 1 << 7,
    OD_SETUP_COOP_TASKRUN = 1 << 8,
    OD_SETUP_TASKRUN_FLAG = 1 << 9,
    OD_SETUP_SINGLE_ISSUER = 1 << 12,
    OD_SETUP_DEFER_TASKRUN = 1 << 13,
};

enum {
    OD_FEAT_SINGLE_MMAP = 1 << 0,
    OD_FEAT_NODROP = 1 << 1,
    OD_FEAT_RW_CUR_POS = 1 << 3, /* came with Linux 5.6, as OP_READ, OP_WRITE and OP_FALLOCATE did */
    OD_FEAT_EXT_ARG = 1 << 8,
};

enum { OD_SQ_CQ_OVERFLOW = 1 << 1, OD_SQ_TASKRUN = 1 << 2 };
enum { OD_ENTER_GETEVENTS = 1 << 0, OD_ENTER_EXT_ARG = 1 << 3 };

enum {
    OD_REGISTER_FILES = 2,
    OD_REGISTER_EVENTFD = 4,
    OD_REGISTER_FILES_UPDATE = 6,
    OD_REGISTER_FILES2 = 13,
    OD_REGISTER_BUFFERS2 = 15,
    OD_REGISTER_BUFFERS_UPDATE = 16,
};
enum { OD_RSRC_SPARSE = 1 };

#define OD_OFF_SQ_RING 0ULL
#define OD_OFF_CQ_RING 0x8000000ULL
#define OD_OFF_SQES 0x10000000ULL

struct od_ring {
    int fd;
    uint32_t setup_flags;
    uint32_t features;
    uint32_t sq_mask, sq_entries, cq_mask, cq_entries;
    uint32_t tail; /* our copy of the submission tail */
    uint32_t head; /* our copy of the completion head */
    uint32_t *sq_head, *sq_tail, *sq_flags, *cq_head, *cq_tail;
    struct od_sqe *sqes;
    struct od_cqe *cqes;
    void *sq_map, *cq_map;
    size_t sq_map_bytes, cq_map_bytes, sqes_bytes;
};

static inline uint32_t od_load(const uint32_t *place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
static inline void od_store(uint32_t *place, uint32_t value) { __atomic_store_n(place, value, __ATOMIC_RELEASE); }

static inline int64_t od_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void od_nap(void)
{
    struct timespec pause = {0, 1000000};
    nanosleep(&pause, NULL);
}

/* How often this process is a forked copy. Counted by the C library, so that it also sees forks made by C code. */
static unsigned od_fork_generation;
static void od_count_fork(void) { od_fork_generation++; }
static inline int od_watch_forks(void) { return pthread_atfork(NULL, NULL, od_count_fork); }

static inline void od_ring_free(struct od_ring *ring)
{
    if (ring->sqes)
        munmap(ring->sqes, ring->sqes_bytes);
    if (ring->cq_map && ring->cq_map != ring->sq_map)
        munmap(ring->cq_map, ring->cq_map_bytes);
    if (ring->sq_map)
        munmap(ring->sq_map, ring->sq_map_bytes);
    if (ring->fd >= 0)
        close(ring->fd);
    memset(ring, 0, sizeof *ring);
    ring->fd = -1;
}

static inline void *od_map(int fd, size_t bytes, uint64_t what)
{
    void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)what);
    return map == MAP_FAILED ? NULL : map;
}

/* 0, or a negative errno with nothing left open. */
static inline int od_ring_open(struct od_ring *ring, uint32_t entries, uint32_t cq_entries, uint32_t flags)
{
    struct od_params params;
    int error;
    uint32_t index, *array;

    memset(ring, 0, sizeof *ring);
    memset(&params, 0, sizeof params);
    params.flags = flags;
    params.cq_entries = cq_entries;
    ring->fd = (int)syscall(__NR_io_uring_setup, entries, &params);
    if (ring->fd < 0)
        return -errno;
    ring->setup_flags = flags;
    ring->features = params.features;
    ring->sq_entries = params.sq_entries;
    ring->cq_entries = params.cq_entries;
    ring->sq_map_bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    ring->cq_map_bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct od_cqe);
    ring->sqes_bytes = params.sq_entries * sizeof(struct od_sqe);
    if ((params.features & OD_FEAT_SINGLE_MMAP) && ring->sq_map_bytes < ring->cq_map_bytes)
        ring->sq_map_bytes = ring->cq_map_bytes;
    errno = ENOMEM;
    ring->sq_map = od_map(ring->fd, ring->sq_map_bytes, OD_OFF_SQ_RING);
    if (!ring->sq_map)
        goto fail;
    ring->cq_map = ring->sq_map;
    if (!(params.features & OD_FEAT_SINGLE_MMAP)) {
        ring->cq_map = od_map(ring->fd, ring->cq_map_bytes, OD_OFF_CQ_RING);
        if (!ring->cq_map)
            goto fail;
    }
    ring->sqes = (struct od_sqe *)od_map(ring->fd, ring->sqes_bytes, OD_OFF_SQES);
    if (!ring->sqes)
        goto fail;
    ring->sq_head = (uint32_t *)((char *)ring->sq_map + params.sq_off.head);
    ring->sq_tail = (uint32_t *)((char *)ring->sq_map + params.sq_off.tail);
    ring->sq_flags = (uint32_t *)((char *)ring->sq_map + params.sq_off.flags);
    ring->sq_mask = *(uint32_t *)((char *)ring->sq_map + params.sq_off.ring_mask);
    ring->cq_head = (uint32_t *)((char *)ring->cq_map + params.cq_off.head);
    ring->cq_tail = (uint32_t *)((char *)ring->cq_map + params.cq_off.tail);
    ring->cq_mask = *(uint32_t *)((char *)ring->cq_map + params.cq_off.ring_mask);
    ring->cqes = (struct od_cqe *)((char *)ring->cq_map + params.cq_off.cqes);
    ring->tail = *ring->sq_tail;
    ring->head = *ring->cq_head;
    /* Slot i of the submission ring always names submission i: entries are used strictly in order. */
    array = (uint32_t *)((char *)ring->sq_map + params.sq_off.array);
    for (index = 0; index < params.sq_entries; index++)
        array[index] = index;
    return 0;
fail:
    error = -errno;
    od_ring_free(ring);
    return error;
}

/* How many were submitted, or a negative errno. */
static inline int od_enter(const struct od_ring *ring, uint32_t to_submit, uint32_t min_complete, uint32_t flags)
{
    long result = syscall(__NR_io_uring_enter, ring->fd, to_submit, min_complete, flags, NULL, (size_t)0);
    return result < 0 ? -errno : (int)result;
}

/* As od_enter, waiting at most `timeout_ns`: -ETIME when that has passed. */
static inline int od_enter_timeout(const struct od_ring *ring, uint32_t to_submit, uint32_t min_complete,
                                   uint32_t flags, int64_t timeout_ns)
{
    struct od_timespec limit = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    struct od_getevents_arg arg = {0, 0, 0, (uint64_t)(uintptr_t)&limit};
    long result;

    if (!(ring->features & OD_FEAT_EXT_ARG)) {
        /* Before Linux 5.11: submit, then wait on the descriptor, which is readable when there are completions. */
        struct pollfd waiting = {ring->fd, POLLIN, 0};
        int submitted = od_enter(ring, to_submit, 0, flags);
        if (submitted < 0 || od_load(ring->cq_tail) != ring->head)
            return submitted;
        result = poll(&waiting, 1, timeout_ns > 2000000000000LL ? 2000000 : (int)((timeout_ns + 999999) / 1000000));
        if (result < 0)
            return submitted ? submitted : -errno;
        return submitted || result ? submitted : -ETIME;
    }
    result = syscall(__NR_io_uring_enter, ring->fd, to_submit, min_complete, flags | OD_ENTER_EXT_ARG, &arg,
                     sizeof arg);
    return result < 0 ? -errno : (int)result;
}

static inline int od_register(const struct od_ring *ring, uint32_t what, void *argument, uint32_t count)
{
    long result = syscall(__NR_io_uring_register, ring->fd, what, argument, count);
    return result < 0 ? -errno : (int)result;
}

/* A table of `count` empty file slots: 0 or a negative errno. */
static inline int od_register_files(const struct od_ring *ring, uint32_t count)
{
    struct od_rsrc_register sparse = {count, OD_RSRC_SPARSE, 0, 0, 0};
    int32_t empty[64];
    int result = od_register(ring, OD_REGISTER_FILES2, &sparse, sizeof sparse);
    if (result >= 0)
        return 0;
    memset(empty, 0xff, sizeof empty);
    if (count > 64)
        count = 64;
    result = od_register(ring, OD_REGISTER_FILES, empty, count);
    return result < 0 ? result : 0;
}

static inline int od_update_file(const struct od_ring *ring, uint32_t slot, int32_t fd)
{
    struct od_files_update update = {slot, 0, (uint64_t)(uintptr_t)&fd};
    int result = od_register(ring, OD_REGISTER_FILES_UPDATE, &update, 1);
    return result == 1 ? 0 : result < 0 ? result : -EBADF;
}

static inline int od_register_buffers(const struct od_ring *ring, uint32_t count)
{
    struct od_rsrc_register sparse = {count, OD_RSRC_SPARSE, 0, 0, 0};
    int result = od_register(ring, OD_REGISTER_BUFFERS2, &sparse, sizeof sparse);
    return result < 0 ? result : 0;
}

static inline int od_update_buffer(const struct od_ring *ring, uint32_t slot, void *address, size_t bytes)
{
    struct iovec vector = {address, bytes};
    uint64_t tag = 0;
    struct od_rsrc_update2 update = {slot, 0, (uint64_t)(uintptr_t)&vector, (uint64_t)(uintptr_t)&tag, 1, 0};
    int result = od_register(ring, OD_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
    return result == 1 ? 0 : result < 0 ? result : -EFAULT;
}

static inline void od_reset_eventfd(int fd)
{
    uint64_t count;
    ssize_t ignored = read(fd, &count, sizeof count);
    (void)ignored;
}

static inline void od_signal_eventfd(int fd)
{
    uint64_t one = 1;
    ssize_t ignored = write(fd, &one, sizeof one);
    (void)ignored;
}

#endif
