/* Preloaded into a test's process: the n-th operation that changes files below one folder is a crash point.
 *
 * Counts what reaches the C library: created files, writes, renames, removals, links, folders, modes, syncs. At
 * the chosen one the process is killed (within a write: after half of it), gets SIGTERM, or, from there on, every
 * operation that takes space or a name fails with one errno, as on a disk that is full or read-only.
 * Start at `meet`.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TERM, FAIL };

static char root[PATH_MAX];
static size_t root_length;
static int action, failure, trace = -1;
static long chosen;
static atomic_long met;

/* Within this process and the ones that it forks: operations below `folder` count from now on. */
void file_faults_arm(const char *folder, int what, long at, int error, int trace_descriptor) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    action = what, chosen = at, failure = error, trace = trace_descriptor;
    atomic_store(&met, 0);
}

long file_faults_met(void) { return atomic_load(&met); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void absolute(int folder, const char *name, char *path) {
    char base[PATH_MAX] = "";
    if (name[0] == '/') {
        snprintf(path, 2 * PATH_MAX, "%s", name);
        return;
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        path_of(folder, base);
    }
    snprintf(path, 2 * PATH_MAX, "%s/%s", base, name);
}

enum { GOES_ON, FAILS, TORN };

/* What becomes of one operation on `path`; `grows`: it takes space, `is_write`: it may end half done. */
static int meet(const char *what, const char *path, int grows, int is_write) {
    if (!root_length || !below(path)) return GOES_ON;
    long number = atomic_fetch_add(&met, 1) + 1;
    if (trace >= 0) dprintf(trace, "%ld %s %s\n", number, what, path + root_length);
    if (action == FAIL && number >= chosen && (grows || failure == EROFS)) {
        errno = failure;
        return is_write && number == chosen && failure != EROFS ? TORN : FAILS;
    }
    if (action == TERM && number == chosen) kill(getpid(), SIGTERM);
    if (action == KILL && number == chosen) {
        if (is_write) return TORN;
        kill(getpid(), SIGKILL);
    }
    return GOES_ON;
}

static int meet_at(const char *what, int folder, const char *name, int grows) {
    char path[2 * PATH_MAX];
    if (!root_length) return GOES_ON;
    absolute(folder, name, path);
    return meet(what, path, grows, 0);
}

static int meet_file(const char *what, int descriptor, int grows, int is_write) {
    char path[PATH_MAX];
    if (!root_length) return GOES_ON;
    path_of(descriptor, path);
    return meet(what, path, grows, is_write);
}

static int open_any(int folder, const char *name, int flags, mode_t mode) {
    int changes = flags & (O_CREAT | O_TRUNC) || (flags & O_ACCMODE) != O_RDONLY;
    if (changes && meet_at("open", folder, name, !!(flags & O_CREAT))) return -1;
    return REAL(openat)(folder, name, flags, mode);
}

#define MODE(flags) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); }

int open(const char *name, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, name, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE(flags) return open_any(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE(flags) return open_any(folder, name, flags | O_LARGEFILE, mode); }

static ssize_t torn(int descriptor, const void *data, size_t size) {
    int error = errno;
    ssize_t written = REAL(write)(descriptor, data, size / 2);
    if (action == KILL) kill(getpid(), SIGKILL);
    errno = error;
    return written > 0 ? written : -1;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    switch (descriptor == trace ? GOES_ON : meet_file("write", descriptor, 1, 1)) {
        case FAILS: return -1;
        case TORN: return torn(descriptor, data, size);
        default: return REAL(write)(descriptor, data, size);
    }
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    switch (meet_file("pwrite", descriptor, 1, 1)) {
        case FAILS: return -1;
        case TORN: if (action == KILL) kill(getpid(), SIGKILL); return -1;
        default: return REAL(pwrite64)(descriptor, data, size, at);
    }
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) { return pwrite64(descriptor, data, size, at); }

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    switch (meet_file("writev", descriptor, 1, 1)) {
        case FAILS: return -1;
        case TORN: return torn(descriptor, parts[0].iov_base, parts[0].iov_len);
        default: return REAL(writev)(descriptor, parts, count);
    }
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    if (meet_file("sendfile", out, 1, 0)) return -1;
    return ((ssize_t (*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64"))(out, in, at, size);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) { return sendfile64(out, in, (off64_t *)at, size); }

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    if (meet_file("copy", out, 1, 0)) return -1;
    return REAL(copy_file_range)(in, from, out, to, size, flags);
}

int ftruncate64(int descriptor, off64_t size) {
    if (meet_file("truncate", descriptor, 1, 0)) return -1;
    return REAL(ftruncate64)(descriptor, size);
}
int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }

int fsync(int descriptor) {
    if (meet_file("sync", descriptor, 1, 0)) return -1;
    return REAL(fsync)(descriptor);
}

int fchmod(int descriptor, mode_t mode) {
    if (meet_file("chmod", descriptor, 0, 0)) return -1;
    return REAL(fchmod)(descriptor, mode);
}

/* Of two names the new one decides: a move out of the folder changes it too. */
static int meet_two(const char *what, int from, const char *old, int to, const char *new) {
    char path[2 * PATH_MAX];
    if (!root_length) return GOES_ON;
    absolute(to, new, path);
    return below(path) ? meet(what, path, 1, 0) : meet_at(what, from, old, 0);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    return meet_two("rename", from, old, to, new) ? -1 : REAL(renameat2)(from, old, to, new, flags);
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    return meet_at("link", to, new, 1) ? -1 : REAL(linkat)(from, old, to, new, flags);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int symlinkat(const char *target, int folder, const char *name) {
    return meet_at("symlink", folder, name, 1) ? -1 : REAL(symlinkat)(target, folder, name);
}
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }

int mkdirat(int folder, const char *name, mode_t mode) {
    return meet_at("mkdir", folder, name, 1) ? -1 : REAL(mkdirat)(folder, name, mode);
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int folder, const char *name, int flags) {
    return meet_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, name, 0) ? -1 : REAL(unlinkat)(folder, name, flags);
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int fchmodat(int folder, const char *name, mode_t mode, int flags) {
    return meet_at("chmod", folder, name, 0) ? -1 : REAL(fchmodat)(folder, name, mode, flags);
}
int chmod(const char *name, mode_t mode) { return fchmodat(AT_FDCWD, name, mode, 0); }
