/* A stand-in for memory that runs out: no block above CAPPED_BYTES can be had from posix_memalign, which is
   what torch's CPU allocator calls. Preloaded into a whole server (LD_PRELOAD); Python's own memory is malloc's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>

int posix_memalign(void **block, size_t alignment, size_t bytes) {
    static int (*real)(void **, size_t, size_t);
    static size_t most;
    if (real == NULL) {
        const char *stated = getenv("CAPPED_BYTES");
        most = stated != NULL ? strtoull(stated, NULL, 10) : (size_t)-1;
        real = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    }
    return bytes > most ? ENOMEM : real(block, alignment, bytes);
}
