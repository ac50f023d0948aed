/* A process that runs out of memory when a test says so: no block above a number of bytes can be had from
   posix_memalign, which is what torch's CPU allocator calls (Python and the C library take theirs elsewhere).
   Preloaded (LD_PRELOAD) into a server and its workers; the number is the content of the file
   $CAPPED_BY/PID, once there is one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define LEAST_BYTES (512 << 10) /* smaller blocks are never refused: oneDNN writes to its code buffers unchecked */

static size_t most_bytes(void) {
    const char *folder = getenv("CAPPED_BY");
    char path[4096], text[32] = "";
    if (folder == NULL)
        return (size_t)-1;
    snprintf(path, sizeof path, "%s/%d", folder, (int)getpid());
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return (size_t)-1;
    ssize_t count = read(file, text, sizeof text - 1);
    close(file);
    return count > 0 ? strtoull(text, NULL, 10) : (size_t)-1;
}

int posix_memalign(void **block, size_t alignment, size_t bytes) {
    static int (*real)(void **, size_t, size_t);
    if (real == NULL)
        real = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    if (bytes > LEAST_BYTES && bytes > most_bytes())
        return ENOMEM;
    return real(block, alignment, bytes);
}
