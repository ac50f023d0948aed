/* Attention over the slots of a cache, read once and softmaxed block by block (arXiv:2205.14135). */
#include "vectors.h"

#define BLOCK 64 /* positions whose keys and values stay in the first cache between the two products */

/* ---- attention of one token per row over its slot ------------------------------------------------------------ */

struct attend {
    const float *query, *keys, *values;
    float *out;
    const int64_t *slots, *places;
    int64_t tokens, groups, queries, dim, query_stride, slot_stride, head_stride, window;
    float scaling;
    int64_t next;
};

#define TOGETHER 4 /* query heads whose sums stay in registers */

/* G query heads over `count` positions; `most`, `total` and `seen` (G, D) hold the softmax so far (arXiv:2205.14135). */
INLINE void see(const int G, const int D, const float *query, const float *keys, const float *values, int count,
                float *most, float *total, float *seen)
{
    float weight[TOGETHER][BLOCK];
    for (int j = 0; j < count; j++)
        UNROLL for (int g = 0; g < G; g++) {
            floats product = load(keys + j * D) * load(query + g * D);
            UNROLL for (int d = WIDTH; d < D; d += WIDTH) product += load(keys + j * D + d) * load(query + g * D + d);
            weight[g][j] = sum(product);
        }
    const int padded = (count + WIDTH - 1) / WIDTH * WIDTH;
    for (int g = 0; g < G; g++) {
        for (int j = count; j < padded; j++) weight[g][j] = -INFINITY;
        float high = most[g];
        for (int j = 0; j < count; j++) high = weight[g][j] > high ? weight[g][j] : high;
        const float shrink = expf(most[g] - high);
        floats all = {};
        for (int j = 0; j < padded; j += WIDTH) {
            const floats e = exponential(load(weight[g] + j) - high);
            store(weight[g] + j, e);
            all += e;
        }
        most[g] = high;
        total[g] = total[g] * shrink + sum(all);
        for (int d = 0; d < D; d += WIDTH) store(seen + g * D + d, load(seen + g * D + d) * shrink);
    }
    floats sums[G][D / WIDTH];
    UNROLL for (int g = 0; g < G; g++)
        UNROLL for (int d = 0; d < D / WIDTH; d++) sums[g][d] = load(seen + g * D + d * WIDTH);
    for (int j = 0; j < count; j++)
        UNROLL for (int g = 0; g < G; g++)
            UNROLL for (int d = 0; d < D / WIDTH; d++) sums[g][d] += weight[g][j] * load(values + j * D + d * WIDTH);
    UNROLL for (int g = 0; g < G; g++)
        UNROLL for (int d = 0; d < D / WIDTH; d++) store(seen + g * D + d * WIDTH, sums[g][d]);
}

#define SEE(G, D) see(G, D, query, keys, values, count, most, total, seen)
#define SEE_DIM(D) \
    switch (G) { \
    case 1: SEE(1, D); break; \
    case 2: SEE(2, D); break; \
    case 3: SEE(3, D); break; \
    default: SEE(4, D); \
    }

/* The same with sizes that the compiler knows, so that sums stay in registers. */
INLINE void see_sized(int G, int D, const float *query, const float *keys, const float *values, int count,
                      float *most, float *total, float *seen)
{
    switch (D) {
    case 64: SEE_DIM(64) break;
    case 96: SEE_DIM(96) break;
    case 128: SEE_DIM(128) break;
    default: SEE(G, D);
    }
}

KERNEL attend(void *given)
{
    struct attend *job = given;
    const int G = (int)job->queries, D = (int)job->dim;
    float query[G * D], seen[G * D], most[G], total[G];
    for (int64_t task; (task = take(&job->next)) < job->tokens * job->groups;) {
        const int64_t token = task / job->groups, group = task % job->groups;
        const float *source = job->query + token * job->query_stride + group * G * D;
        for (int i = 0; i < G * D; i++) {
            query[i] = source[i] * job->scaling;
            seen[i] = 0;
        }
        for (int g = 0; g < G; g++) {
            most[g] = -INFINITY;
            total[g] = 0;
        }
        const int64_t head = job->slots[token] * job->slot_stride + group * job->head_stride;
        const int64_t end = job->places[token] + 1;
        const int64_t start = job->window && end > job->window ? end - job->window : 0;
        for (int64_t at = start; at < end; at += BLOCK) {
            const int count = (int)(end - at < BLOCK ? end - at : BLOCK);
            const float *keys = job->keys + head + at * D, *values = job->values + head + at * D;
            for (int g = 0; g < G; g += TOGETHER)
                see_sized(G - g < TOGETHER ? G - g : TOGETHER, D, query + g * D, keys, values, count,
                          most + g, total + g, seen + g * D);
        }
        float *out = job->out + (token * job->groups + group) * G * D;
        for (int g = 0; g < G; g++)
            for (int d = 0; d < D; d++) out[g * D + d] = seen[g * D + d] / total[g];
    }
}

/* ---- attention of neighbouring tokens of one row ------------------------------------------------------------- */

struct attend_chunk {
    const float *query, *keys, *values; /* keys and values of one slot */
    float *out;
    int64_t tokens, start, heads, groups, dim, query_stride, head_stride, window;
    float scaling;
    int64_t next;
};

#define ACROSS 8 /* sums that stay in registers */

/* WIDTH tokens of one head, one per lane and each at its place in `own`, over `count` positions from `at` on.
 * `turned` and `seen` are (D, WIDTH); `most`, `total` and `seen` hold the softmax so far. */
INLINE void see_across(int D, const float *turned, const float *keys, const float *values, int at, int count,
                       ints own, int window, floats *most, floats *total, float *seen)
{
    floats weight[BLOCK];
    for (int j = 0; j < count; j += ACROSS) {
        const float *key[ACROSS];
        floats sums[ACROSS];
        UNROLL for (int i = 0; i < ACROSS; i++) {
            key[i] = keys + (j + i < count ? j + i : count - 1) * D; /* the same again beyond the end */
            sums[i] = (floats){};
        }
        for (int d = 0; d < D; d++) {
            const floats query = load(turned + d * WIDTH);
            UNROLL for (int i = 0; i < ACROSS; i++) sums[i] += key[i][d] * query;
        }
        UNROLL for (int i = 0; i < ACROSS; i++) weight[j + i] = sums[i];
    }
    const floats hidden = (floats){} - INFINITY;
    floats high = *most;
    for (int j = 0; j < count; j++) {
        const ints back = own - (at + j); /* how far the lane looks back */
        weight[j] = choose((back >= 0) & (back < window), weight[j], hidden);
        high = choose(weight[j] > high, weight[j], high);
    }
    const floats shrink = exponential(*most - high);
    floats all = *total * shrink;
    for (int j = 0; j < count; j++) {
        weight[j] = exponential(weight[j] - high);
        all += weight[j];
    }
    for (int d = 0; d < D; d += ACROSS) {
        floats sums[ACROSS];
        UNROLL for (int i = 0; i < ACROSS; i++) sums[i] = load(seen + (d + i) * WIDTH) * shrink;
        for (int j = 0; j < count; j++)
            UNROLL for (int i = 0; i < ACROSS; i++) sums[i] += values[j * D + d + i] * weight[j];
        UNROLL for (int i = 0; i < ACROSS; i++) store(seen + (d + i) * WIDTH, sums[i]);
    }
    *most = high;
    *total = all;
}

KERNEL attend_chunk(void *given)
{
    struct attend_chunk *job = given;
    const int D = (int)job->dim, start = (int)job->start, window = job->window ? (int)job->window : INT32_MAX;
    const int64_t tiles = (job->tokens + WIDTH - 1) / WIDTH, shared = job->heads / job->groups;
    float turned[D * WIDTH], seen[D * WIDTH];
    for (int64_t task; (task = take(&job->next)) < tiles * job->heads;) {
        const int64_t head = task % job->heads, first = (tiles - 1 - task / job->heads) * WIDTH; /* longest first */
        const int lanes = (int)(job->tokens - first < WIDTH ? job->tokens - first : WIDTH);
        const float *query = job->query + first * job->query_stride + head * D;
        ints own;
        for (int lane = 0; lane < WIDTH; lane++) {
            own[lane] = start + (int)first + (lane < lanes ? lane : lanes - 1);
            for (int d = 0; d < D; d++) {
                turned[d * WIDTH + lane] = lane < lanes ? query[lane * job->query_stride + d] * job->scaling : 0;
                seen[d * WIDTH + lane] = 0;
            }
        }
        const float *keys = job->keys + head / shared * job->head_stride;
        const float *values = job->values + head / shared * job->head_stride;
        const int end = own[lanes - 1] + 1;
        floats most = (floats){} - INFINITY, total = {};
        for (int at = own[0] < window ? 0 : own[0] + 1 - window; at < end; at += BLOCK)
            see_across(D, turned, keys + at * D, values + at * D, at, end - at < BLOCK ? end - at : BLOCK, own, window,
                       &most, &total, seen);
        float *out = job->out + first * job->heads * D + head * D;
        for (int lane = 0; lane < lanes; lane++)
            for (int d = 0; d < D; d++) out[lane * job->heads * D + d] = seen[d * WIDTH + lane] / total[lane];
    }
}
