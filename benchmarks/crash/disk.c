/* A slow disk: loaded into a process with LD_PRELOAD, it delays what is written to files under one folder.

   SLOW_DISK_FOLDER        the folder; files elsewhere are not touched
   SLOW_DISK_BYTES         bytes a second, shared by all threads as a disk is
   SLOW_DISK_SYNC_MICROS   what an fsync, a rename or a removal costs beside its bytes

   Bytes are paid for when they are written, as on a disk whose cache is full. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t folder_length;
static double bytes_per_second = 1e18;
static double sync_seconds;
static double free_at; /* when the disk has done all it was given */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("SLOW_DISK_FOLDER"), *rate = getenv("SLOW_DISK_BYTES"),
               *sync = getenv("SLOW_DISK_SYNC_MICROS");
    if (name != NULL && strlen(name) < sizeof folder) {
        strcpy(folder, name);
        folder_length = strlen(folder);
    }
    if (rate != NULL && atof(rate) > 0) bytes_per_second = atof(rate);
    if (sync != NULL) sync_seconds = atof(sync) * 1e-6;
}

static int inside(const char *path) {
    return folder_length && strncmp(path, folder, folder_length) == 0 &&
           (path[folder_length] == '/' || path[folder_length] == 0);
}

static int slow(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!folder_length) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

static void work(double seconds) {
    struct timespec now, until;
    int before = errno;
    pthread_mutex_lock(&lock);
    clock_gettime(CLOCK_MONOTONIC, &now);
    double start = now.tv_sec + now.tv_nsec * 1e-9;
    free_at = (free_at > start ? free_at : start) + seconds;
    double end = free_at;
    pthread_mutex_unlock(&lock);
    until.tv_sec = (time_t)end;
    until.tv_nsec = (long)((end - (double)until.tv_sec) * 1e9);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {
    }
    errno = before;
}

static ssize_t paid(int descriptor, ssize_t written) {
    if (written > 0 && slow(descriptor)) work((double)written / bytes_per_second);
    return written;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    return paid(fd, real(fd, data, size));
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    return paid(fd, real(fd, parts, count));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    REAL(pwrite);
    return paid(fd, real(fd, data, size, offset));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    return paid(fd, real(fd, data, size, offset));
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    REAL(pwritev);
    return paid(fd, real(fd, parts, count, offset));
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    REAL(sendfile);
    return paid(out, real(out, in, offset, size));
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    REAL(sendfile64);
    return paid(out, real(out, in, offset, size));
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    return paid(out, real(in, from, out, to, size, flags));
}

int fsync(int fd) {
    REAL(fsync);
    if (slow(fd)) work(sync_seconds);
    return real(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    if (slow(fd)) work(sync_seconds);
    return real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    if (inside(to)) work(sync_seconds);
    return real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    if (inside(to) || slow(to_folder)) work(sync_seconds);
    return real(from_folder, from, to_folder, to);
}

int unlink(const char *path) {
    REAL(unlink);
    if (inside(path)) work(sync_seconds);
    return real(path);
}

int unlinkat(int parent, const char *path, int flags) {
    REAL(unlinkat);
    if (inside(path) || slow(parent)) work(sync_seconds);
    return real(parent, path, flags);
}
