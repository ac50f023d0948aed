/* LoRA (arXiv:2106.09685): to each token the update of its own adapter. */
#include "vectors.h"

#define ROWS 4 /* of a matrix, read side by side */
struct add_lora {
    const float *x;          /* (tokens, in_features) */
    float *out;              /* (tokens, sum of out_features) */
    const int64_t *adapters; /* (tokens,) adapter slot of each, 0 for none */
    const float *down;       /* (adapter slots, modules, rank, in_features) */
    const float *const *ups; /* of each module (adapter slots, rank, out_features) */
    const int64_t *out_features;
    int64_t tokens, modules, adapter_stride, rank, in_features; /* the stride is that of all adapter slots */
    int64_t next;
};

/* to (count) = rows (count, size) x (size). */
INLINE void dots(const int count, float *to, const float *rows, const float *x, int64_t size)
{
    floats sums[count];
    UNROLL for (int r = 0; r < count; r++) sums[r] = (floats){};
    for (int64_t i = 0; i < size; i += WIDTH)
        UNROLL for (int r = 0; r < count; r++) sums[r] += load(rows + r * size + i) * load(x + i);
    UNROLL for (int r = 0; r < count; r++) to[r] = sum(sums[r]);
}

/* out (16 count) += inner (rank) x up (rank, 16 count), whose rows lie `stride` apart. */
INLINE void add(const int count, float *out, const float *inner, const float *up, int64_t rank, int64_t stride)
{
    floats sums[count];
    UNROLL for (int i = 0; i < count; i++) sums[i] = load(out + i * WIDTH);
    for (int64_t r = 0; r < rank; r++)
        UNROLL for (int i = 0; i < count; i++) sums[i] += inner[r] * load(up + r * stride + i * WIDTH);
    UNROLL for (int i = 0; i < count; i++) store(out + i * WIDTH, sums[i]);
}

KERNEL add_lora(void *argument)
{
    struct add_lora *job = argument;
    const int64_t rank = job->rank, in = job->in_features;
    int64_t width = 0;
    for (int64_t module = 0; module < job->modules; module++) width += job->out_features[module];
    float inner[rank];
    for (int64_t token; (token = take(&job->next)) < job->tokens;) {
        const int64_t adapter = job->adapters[token];
        if (!adapter) continue;
        float *out = job->out + token * width;
        for (int64_t module = 0; module < job->modules; out += job->out_features[module++]) {
            const float *down = job->down + adapter * job->adapter_stride + module * rank * in;
            int64_t r = 0;
            for (; r + ROWS <= rank; r += ROWS) dots(ROWS, inner + r, down + r * in, job->x + token * in, in);
            for (; r < rank; r++) dots(1, inner + r, down + r * in, job->x + token * in, in);
            const int64_t size = job->out_features[module];
            const float *up = job->ups[module] + adapter * job->adapter_stride;
            int64_t o = 0;
            for (; o + 4 * WIDTH <= size; o += 4 * WIDTH) add(4, out + o, inner, up + o, rank, size);
            for (; o < size; o += WIDTH) add(1, out + o, inner, up + o, rank, size);
        }
    }
}
