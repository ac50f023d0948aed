/* A product with a few rows is one reading of the weights: each thread streams its part of them. */
#include "vectors.h"

/* A library that is older than the sources beside it has other structures, and is left alone. */
#ifdef BUILT_FROM
const uint32_t built_from = BUILT_FROM;
#endif

struct multiply {
    const float *x, *weight, *bias; /* (tokens, in), (outs, in), (outs,) or NULL */
    float *out;                     /* (tokens, outs) */
    int64_t tokens, in, outs, part; /* `part` outputs are a task */
    int64_t next;
};

/* The outputs from `first` to `end` of T tokens; two sums each, so that none waits for the one before. */
INLINE void outputs(const int T, const struct multiply *job, int64_t first, int64_t end)
{
    const int64_t in = job->in, even = in / (2 * WIDTH) * (2 * WIDTH);
    for (int64_t o = first; o < end; o++) {
        const float *weight = job->weight + o * in;
        floats one[T], two[T];
        UNROLL for (int t = 0; t < T; t++) one[t] = two[t] = (floats){};
        for (int64_t i = 0; i < even; i += 2 * WIDTH)
            UNROLL for (int t = 0; t < T; t++) {
                one[t] += load(weight + i) * load(job->x + t * in + i);
                two[t] += load(weight + i + WIDTH) * load(job->x + t * in + i + WIDTH);
            }
        if (even < in)
            UNROLL for (int t = 0; t < T; t++) one[t] += load(weight + even) * load(job->x + t * in + even);
        UNROLL for (int t = 0; t < T; t++)
            job->out[t * job->outs + o] = sum(one[t] + two[t]) + (job->bias ? job->bias[o] : 0);
    }
}

KERNEL multiply(void *given)
{
    struct multiply *job = given;
    for (int64_t first; (first = take(&job->next) * job->part) < job->outs;) {
        const int64_t end = first + job->part < job->outs ? first + job->part : job->outs;
        switch (job->tokens) {
        case 1: outputs(1, job, first, end); break;
        case 2: outputs(2, job, first, end); break;
        case 3: outputs(3, job, first, end); break;
        default: outputs(4, job, first, end); /* the most there may be */
        }
    }
}
