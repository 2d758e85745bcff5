/*
 * Plain system calls, each answering a count or a negative errno.
 *
 * Record layouts and numbers are those of statx(2), cachestat(2), preadv2(2) and process_vm_readv(2);
 * they are declared here so that the age of the installed headers does not matter.
 */
#ifndef ODIRECT_KERNEL_CALLS_H
#define ODIRECT_KERNEL_CALLS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

#ifndef __NR_cachestat
#define __NR_cachestat 451
#endif

struct od_statx_time {
    int64_t seconds;
    uint32_t nanoseconds;
    int32_t pad;
};

struct od_statx {
    uint32_t mask, blksize;
    uint64_t attributes;
    uint32_t nlink, uid, gid;
    uint16_t mode, pad1;
    uint64_t ino, size, blocks, attributes_mask;
    struct od_statx_time atime, btime, ctime, mtime;
    uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
    uint64_t mnt_id;
    uint32_t dio_mem_align, dio_offset_align;
    uint64_t subvol;
    uint32_t atomic_write_unit_min, atomic_write_unit_max, atomic_write_segments_max;
    uint32_t dio_read_offset_align, atomic_write_unit_max_opt;
    uint32_t pad2;
    uint64_t spare[8];
};

_Static_assert(sizeof(struct od_statx) == 256, "struct statx is 256 bytes");
_Static_assert(offsetof(struct od_statx, dio_mem_align) == 152, "stx_dio_mem_align is at byte 152");
_Static_assert(offsetof(struct od_statx, dio_read_offset_align) == 180, "stx_dio_read_offset_align is at byte 180");

/* STATX_BASIC_STATS | MNT_ID | DIOALIGN | WRITE_ATOMIC | DIO_READ_ALIGN */
#define OD_STATX_WANTED (0x7ffU | 0x1000U | 0x2000U | 0x10000U | 0x20000U)

struct od_cachestat {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

static unsigned od_fork_generation;
static void od_count_fork(void) { od_fork_generation++; }
static inline int od_watch_forks(void) { return pthread_atfork(NULL, NULL, od_count_fork); }

/* Whether fd is a regular file that ends before this byte. */
static inline int od_ends_before(int fd, int64_t end)
{
    struct stat64 status;
    return fstat64(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_size < end;
}

static inline ssize_t od_pread(int fd, void *memory, size_t bytes, int64_t offset, int flags)
{
    struct iovec vector = {memory, bytes};
    ssize_t done = flags == 0 ? pread64(fd, memory, bytes, offset) : preadv64v2(fd, &vector, 1, offset, flags);
    return done < 0 ? -errno : done;
}

static inline ssize_t od_pwrite(int fd, void *memory, size_t bytes, int64_t offset, int flags)
{
    struct iovec vector = {memory, bytes};
    ssize_t done = flags == 0 ? pwrite64(fd, memory, bytes, offset) : pwritev64v2(fd, &vector, 1, offset, flags);
    return done < 0 ? -errno : done;
}

static inline int od_statx_call(int fd, const char *path, int flags, struct od_statx *result)
{
    memset(result, 0, sizeof *result);
    long error = syscall(__NR_statx, fd, path, flags, OD_STATX_WANTED, result);
    return error < 0 ? -errno : 0;
}

static inline int od_cachestat_call(int fd, uint64_t offset, uint64_t bytes, struct od_cachestat *result)
{
    uint64_t range[2] = {offset, bytes};
    memset(result, 0, sizeof *result);
    return syscall(__NR_cachestat, fd, range, result, 0) < 0 ? -errno : 0;
}

static inline int od_sync_file_range(int fd, int64_t offset, int64_t bytes, unsigned flags)
{
    return sync_file_range(fd, offset, bytes, flags) < 0 ? -errno : 0;
}

static inline int od_fallocate(int fd, int mode, int64_t offset, int64_t bytes)
{
    return fallocate64(fd, mode, offset, bytes) < 0 ? -errno : 0;
}

/* All of `bytes`, or a negative errno. The kernel reads our own memory, and meets a hole in it with EFAULT. */
static inline ssize_t od_copy(void *target, void *source, size_t bytes)
{
    size_t done = 0;
    while (done < bytes) {
        size_t chunk = bytes - done < (1U << 30) ? bytes - done : 1U << 30;
        struct iovec to = {(char *)target + done, chunk}, from = {(char *)source + done, chunk};
        ssize_t moved = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
        if (moved < 0)
            return -errno;
        if (moved == 0)
            return -EFAULT;
        done += (size_t)moved;
    }
    return (ssize_t)done;
}

/* As od_copy, with zeroes for the source. */
static inline ssize_t od_zero(void *target, size_t bytes)
{
    static char zeroes[65536];
    size_t done = 0;
    while (done < bytes) {
        struct iovec from[16], to = {(char *)target + done, 0};
        size_t count = 0;
        ssize_t moved;
        while (count < 16 && done + to.iov_len < bytes) {
            size_t left = bytes - done - to.iov_len;
            from[count].iov_base = zeroes;
            from[count].iov_len = left < sizeof zeroes ? left : sizeof zeroes;
            to.iov_len += from[count].iov_len;
            count++;
        }
        moved = process_vm_readv(getpid(), &to, 1, from, count, 0);
        if (moved < 0)
            return -errno;
        if (moved == 0)
            return -EFAULT;
        done += (size_t)moved;
    }
    return (ssize_t)done;
}

/* What the host says of one name; times are seconds since 1970, and nanoseconds. */
struct od_status {
    int64_t mode, ino, dev, nlink, uid, gid, rdev, size, blocks, atime, atime_ns, mtime, mtime_ns;
};

static inline void od_take_status(struct od_status *into, const struct stat64 *from)
{
    into->mode = from->st_mode;
    into->ino = from->st_ino;
    into->dev = from->st_dev;
    into->nlink = from->st_nlink;
    into->uid = from->st_uid;
    into->gid = from->st_gid;
    into->rdev = from->st_rdev;
    into->size = from->st_size;
    into->blocks = from->st_blocks;
    into->atime = from->st_atim.tv_sec;
    into->atime_ns = from->st_atim.tv_nsec;
    into->mtime = from->st_mtim.tv_sec;
    into->mtime_ns = from->st_mtim.tv_nsec;
}

static inline int od_open_directory(const char *path)
{
    int fd;
    do
        fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (fd < 0 && errno == EINTR);
    return fd < 0 ? -errno : fd;
}

static inline int64_t od_getdents(int fd, void *memory, size_t bytes)
{
    int64_t count = syscall(SYS_getdents64, fd, memory, bytes);
    return count < 0 ? -errno : count;
}

/* The status of a name, itself even if it is a symbolic link. */
static inline int od_status_of(int directory, const char *name, struct od_status *result)
{
    struct stat64 status;
    if (fstatat64(directory, name, &status, AT_SYMLINK_NOFOLLOW))
        return -errno;
    od_take_status(result, &status);
    return 0;
}

/* What od_read_small answers besides 0 and a negative errno. */
#define OD_NOT_SMALL 1 /* larger than the room, with holes, attributes or content without a size, or no regular file any more */
#define OD_ANOTHER 2   /* another file has taken the name */
#define OD_SHORTER 3   /* it ended before its size */

/*
 * All bytes of the small file `name`, which `status` was planned for and which is brought up to date; the rest of
 * `room` is zeroed. Nothing is read if it is not small. `plain`: files with extended attributes are not small.
 */
static inline int od_read_small(int directory, const char *name, struct od_status *status, char *memory, size_t room,
                                int plain)
{
    struct stat64 now;
    ssize_t got;
    size_t done = 0;
    int fd, result;
    char first;

    do
        fd = openat(directory, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    while (fd < 0 && errno == EINTR);
    if (fd < 0)
        return -errno;
    if (fstat64(fd, &now)) {
        result = -errno;
        goto out;
    }
    if ((int64_t)now.st_ino != status->ino || (int64_t)now.st_dev != status->dev) {
        result = OD_ANOTHER;
        goto out;
    }
    od_take_status(status, &now);
    result = OD_NOT_SMALL;
    if (!S_ISREG(now.st_mode) || now.st_nlink != 1 || (uint64_t)now.st_size > room)
        goto out;
    /* Fewer blocks than bytes: holes, or data that lies in the inode, or compressed. */
    if (now.st_size > now.st_blocks * 512 && lseek64(fd, 0, SEEK_HOLE) != now.st_size)
        goto out;
    if (plain && (got = flistxattr(fd, NULL, 0)) && (got > 0 || (errno != EOPNOTSUPP && errno != ENOSYS)))
        goto out;
    /* Without a size, and yet with bytes: its content is made while it is read. */
    if (now.st_size == 0 && now.st_blocks == 0 && pread64(fd, &first, 1, 0) > 0)
        goto out;
    result = 0;
    while (done < (size_t)now.st_size) {
        got = pread64(fd, memory + done, now.st_size - done, done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            result = got < 0 ? -errno : OD_SHORTER;
            goto out;
        }
        done += got;
    }
    memset(memory + done, 0, room - done);
out:
    close(fd);
    return result;
}

#endif
