// Freezes a directory at its n-th change: preloaded into a process, it counts the system calls that change anything under a
// directory, lets the first n - 1 of them through, may let half of the n-th through if it is a write, and fails that and all later
// ones. To the disk that is as if the process had been killed there; but the process lives on, to be asked what it makes of it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static atomic_long count, limit;  // limit 0: nothing is counted
static atomic_int half;
static char calls[1 << 16][12];

enum { PASS, HALF, FAIL };

void freeze_arm(const char *path, long at, int torn) {
    limit = 0;
    root_length = strlen(strncpy(root, path, PATH_MAX - 1));
    count = 0;
    half = torn;
    limit = at;
}
long freeze_count(void) { return count; }
void freeze_thaw(void) { limit = 0; }
const char *freeze_call(long number) { return calls[number & 0xffff]; }

static int under(int dir, const char *path) {
    char whole[2 * PATH_MAX], link[64];
    if (path && path[0] == '/') return !strncmp(path, root, root_length);
    ssize_t n;
    if (dir == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        if ((n = readlink(link, whole, PATH_MAX)) < 0) return 0;
        whole[n] = 0;
    }
    return !strncmp(whole, root, root_length);
}

static int judge(const char *name, int dir, const char *path) {
    if (!limit || !under(dir, path)) return PASS;
    long at = ++count;
    if (at <= 0xffff) strncpy(calls[at], name, 11);
    if (at < limit) return PASS;
    if (at == limit && half) return HALF;
    errno = EIO;
    return FAIL;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES(name, dir, path, ...) \
    static __typeof__(&name) next; \
    if (!next) next = NEXT(name); \
    int verdict = judge(#name, dir, path); \
    if (verdict != PASS) { errno = EIO; return -1; } \
    return next(__VA_ARGS__);

int rename(const char *a, const char *b) { CHANGES(rename, AT_FDCWD, b, a, b) }
int renameat(int d, const char *a, int e, const char *b) { CHANGES(renameat, e, b, d, a, e, b) }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) { CHANGES(renameat2, e, b, d, a, e, b, f) }
int mkdir(const char *p, mode_t m) { CHANGES(mkdir, AT_FDCWD, p, p, m) }
int mkdirat(int d, const char *p, mode_t m) { CHANGES(mkdirat, d, p, d, p, m) }
int rmdir(const char *p) { CHANGES(rmdir, AT_FDCWD, p, p) }
int unlink(const char *p) { CHANGES(unlink, AT_FDCWD, p, p) }
int unlinkat(int d, const char *p, int f) { CHANGES(unlinkat, d, p, d, p, f) }
int link(const char *a, const char *b) { CHANGES(link, AT_FDCWD, b, a, b) }
int linkat(int d, const char *a, int e, const char *b, int f) { CHANGES(linkat, e, b, d, a, e, b, f) }
int symlink(const char *a, const char *b) { CHANGES(symlink, AT_FDCWD, b, a, b) }
int truncate(const char *p, off_t n) { CHANGES(truncate, AT_FDCWD, p, p, n) }
int truncate64(const char *p, off64_t n) { CHANGES(truncate64, AT_FDCWD, p, p, n) }
int ftruncate(int fd, off_t n) { CHANGES(ftruncate, fd, NULL, fd, n) }
int ftruncate64(int fd, off64_t n) { CHANGES(ftruncate64, fd, NULL, fd, n) }
int fsync(int fd) { CHANGES(fsync, fd, NULL, fd) }
int fdatasync(int fd) { CHANGES(fdatasync, fd, NULL, fd) }
ssize_t sendfile(int o, int i, off_t *p, size_t n) { CHANGES(sendfile, o, NULL, o, i, p, n) }
ssize_t sendfile64(int o, int i, off64_t *p, size_t n) { CHANGES(sendfile64, o, NULL, o, i, p, n) }
ssize_t copy_file_range(int i, off64_t *a, int o, off64_t *b, size_t n, unsigned f) { CHANGES(copy_file_range, o, NULL, i, a, o, b, n, f) }
ssize_t writev(int fd, const struct iovec *v, int n) { CHANGES(writev, fd, NULL, fd, v, n) }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at) { CHANGES(pwritev, fd, NULL, fd, v, n, at) }
ssize_t pwritev64(int fd, const struct iovec *v, int n, off64_t at) { CHANGES(pwritev64, fd, NULL, fd, v, n, at) }

#define WRITES(name, ...) \
    static __typeof__(&name) next; \
    if (!next) next = NEXT(name); \
    int verdict = judge(#name, fd, NULL); \
    if (verdict == HALF) { n /= 2; next(__VA_ARGS__); } \
    if (verdict != PASS) { errno = EIO; return -1; } \
    return next(__VA_ARGS__);

ssize_t write(int fd, const void *data, size_t n) { WRITES(write, fd, data, n) }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { WRITES(pwrite, fd, data, n, at) }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { WRITES(pwrite64, fd, data, n, at) }

#define OPENS(name, dir, path, ...) \
    static __typeof__(&name) next; \
    if (!next) next = NEXT(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
    if (flags & (O_CREAT | O_TRUNC) && judge(#name, dir, path) != PASS) { errno = EIO; return -1; } \
    return next(__VA_ARGS__, flags, mode);

int open(const char *p, int flags, ...) { OPENS(open, AT_FDCWD, p, p) }
int open64(const char *p, int flags, ...) { OPENS(open64, AT_FDCWD, p, p) }
int openat(int d, const char *p, int flags, ...) { OPENS(openat, d, p, d, p) }
int openat64(int d, const char *p, int flags, ...) { OPENS(openat64, d, p, d, p) }
int creat(const char *p, mode_t mode) { CHANGES(creat, AT_FDCWD, p, p, mode) }
FILE *fopen(const char *p, const char *m) {
    static __typeof__(&fopen) next;
    if (!next) next = NEXT(fopen);
    if (strpbrk(m, "wa") && judge("fopen", AT_FDCWD, p) != PASS) { errno = EIO; return NULL; }
    return next(p, m);
}
