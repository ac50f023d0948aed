/* LoRA (arXiv:2106.09685): each token's own adapter. */
#include "vectors.h"

#define ROWS 4 /* of a matrix, read side by side */
struct adapt {
    const float *x;       /* (tokens, in) */
    float *out;           /* (tokens, sum of outs) */
    const int64_t *lanes; /* (tokens,) adapter of each, below 0 for none */
    const float *down;    /* (parts, resident, rank, in) */
    const float *const *ups; /* of each part (resident, rank, out) */
    const int64_t *outs;
    int64_t tokens, parts, resident, rank, in;
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

KERNEL adapt(void *given)
{
    struct adapt *job = given;
    const int64_t rank = job->rank, in = job->in;
    int64_t outs = 0;
    for (int64_t part = 0; part < job->parts; part++) outs += job->outs[part];
    float inner[rank];
    for (int64_t token; (token = take(&job->next)) < job->tokens;) {
        const int64_t lane = job->lanes[token];
        if (lane < 0) continue;
        float *out = job->out + token * outs;
        for (int64_t part = 0; part < job->parts; out += job->outs[part++]) {
            const float *down = job->down + (part * job->resident + lane) * rank * in;
            int64_t r = 0;
            for (; r + ROWS <= rank; r += ROWS) dots(ROWS, inner + r, down + r * in, job->x + token * in, in);
            for (; r < rank; r++) dots(1, inner + r, down + r * in, job->x + token * in, in);
            const int64_t size = job->outs[part];
            const float *up = job->ups[part] + lane * rank * size;
            int64_t o = 0;
            for (; o + 4 * WIDTH <= size; o += 4 * WIDTH) add(4, out + o, inner, up + o, rank, size);
            for (; o < size; o += WIDTH) add(1, out + o, inner, up + o, rank, size);
        }
    }
}
