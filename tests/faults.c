/* Preloaded: storage that stops answering for a while, and a clock that jumps.
   Does nothing until it is told to, by the process itself. */
#define _GNU_SOURCE
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static char prefix[PATH_MAX];
static long stall_at = -1, calls;
static double stall_s, stalled_until, jump_at = 1e300, jump_s;

static double now(void) {
    struct timespec t;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* From the `call`-th read, write or sync below `folder` on, for `seconds`, none is answered. */
void faults_stall(const char *folder, long call, double seconds) {
    strncpy(prefix, folder, sizeof prefix - 1);
    stall_s = seconds;
    calls = 0;
    stall_at = call;
}

/* `after` seconds from here the wall clock shows `by` seconds more. */
void faults_jump(double after, double by) {
    jump_s = by;
    jump_at = now() + after;
}

static void meet(int fd) {
    char link[64], path[PATH_MAX];
    ssize_t size;
    if (stall_at < 0) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    size = readlink(link, path, sizeof path - 1);
    if (size < 0) return;
    path[size] = 0;
    if (strncmp(path, prefix, strlen(prefix))) return;
    if (__sync_add_and_fetch(&calls, 1) == stall_at) {
        static const char text[] = "faults: stalled\n";
        stalled_until = now() + stall_s;
        syscall(SYS_write, 2, text, sizeof text - 1);
    }
    while (now() < stalled_until) {
        struct timespec pause = {0, 50000000};
        syscall(SYS_nanosleep, &pause, 0);
    }
}

ssize_t read(int fd, void *data, size_t size) {
    meet(fd);
    return syscall(SYS_read, fd, data, size);
}

ssize_t write(int fd, const void *data, size_t size) {
    meet(fd);
    return syscall(SYS_write, fd, data, size);
}

int fsync(int fd) {
    meet(fd);
    return syscall(SYS_fsync, fd);
}

int clock_gettime(clockid_t clock, struct timespec *t) {
    int status = syscall(SYS_clock_gettime, clock, t);
    if (status == 0 && clock == CLOCK_REALTIME && now() >= jump_at) t->tv_sec += (long)jump_s;
    return status;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec whole;
    clock_gettime(CLOCK_REALTIME, &whole);
    t->tv_sec = whole.tv_sec;
    t->tv_usec = whole.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *t) {
    struct timespec whole;
    clock_gettime(CLOCK_REALTIME, &whole);
    if (t) *t = whole.tv_sec;
    return whole.tv_sec;
}
