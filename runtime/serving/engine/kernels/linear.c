/* A product with a few tokens reads the weights once: each thread streams its part of them. */
#include "vectors.h"

/* A library older than the sources beside it has other structures; `built_from` keeps it from being used. */
#ifdef BUILT_FROM
const uint32_t built_from = BUILT_FROM;
#endif

struct multiply {
    const float *x, *weight, *bias; /* (tokens, in_features), (out_features, in_features), (out_features,) or 0 */
    float *out;                     /* (tokens, out_features) */
    int64_t tokens, in_features, out_features, task_outputs;
    int64_t next;
};

/* The outputs from `first` to `end` of T tokens; two sums each, so that no addition waits for the one before. */
INLINE void outputs(const int T, const struct multiply *job, int64_t first, int64_t end)
{
    const int64_t in = job->in_features, even = in / (2 * WIDTH) * (2 * WIDTH);
    for (int64_t o = first; o < end; o++) {
        const float *weight = job->weight + o * in;
        floats even_sums[T], odd_sums[T];
        UNROLL for (int t = 0; t < T; t++) even_sums[t] = odd_sums[t] = (floats){};
        for (int64_t i = 0; i < even; i += 2 * WIDTH)
            UNROLL for (int t = 0; t < T; t++) {
                even_sums[t] += load(weight + i) * load(job->x + t * in + i);
                odd_sums[t] += load(weight + i + WIDTH) * load(job->x + t * in + i + WIDTH);
            }
        if (even < in)
            UNROLL for (int t = 0; t < T; t++) even_sums[t] += load(weight + even) * load(job->x + t * in + even);
        UNROLL for (int t = 0; t < T; t++)
            job->out[t * job->out_features + o] = sum(even_sums[t] + odd_sums[t]) + (job->bias ? job->bias[o] : 0);
    }
}

KERNEL multiply(void *argument)
{
    struct multiply *job = argument;
    for (int64_t first; (first = take(&job->next) * job->task_outputs) < job->out_features;) {
        const int64_t next = first + job->task_outputs, end = next < job->out_features ? next : job->out_features;
        switch (job->tokens) {
        case 1: outputs(1, job, first, end); break;
        case 2: outputs(2, job, first, end); break;
        case 3: outputs(3, job, first, end); break;
        default: outputs(4, job, first, end); /* MAX_TOKENS */
        }
    }
}
