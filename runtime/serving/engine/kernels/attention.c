/* Attention over ranges of an arena of keys and values, read once, with an online softmax (arXiv:2205.14135).
 *
 * A position's keys lie `position_stride` floats after those of the position before, a head's `head_stride` after
 * those of the head before.
 */
#include "vectors.h"

#define BLOCK 64 /* positions whose keys and values stay in the first cache between the two products */

/* ---- decode: attention of one token per sequence over its range ---------------------------------------------- */

struct attend_decode {
    const float *query, *keys, *values;
    float *out;
    const int32_t *starts, *lengths; /* of each token's range */
    int64_t tokens, kv_heads, group, dim, query_stride, position_stride, head_stride;
    float scaling;
    int64_t next;
};

#define HEADS_AT_ONCE 4 /* query heads whose sums stay in registers */

/* G query heads over `count` positions; `max`, `total` and `acc` (G, D) hold the softmax so far (arXiv:2205.14135). */
INLINE void attend_block(const int G, const int D, const float *query, const float *keys, const float *values,
                         const int64_t stride, int count, float *max, float *total, float *acc)
{
    float weight[HEADS_AT_ONCE][BLOCK];
    for (int j = 0; j < count; j++)
        UNROLL for (int g = 0; g < G; g++) {
            const float *key = keys + j * stride;
            floats product = load(key) * load(query + g * D);
            UNROLL for (int d = WIDTH; d < D; d += WIDTH) product += load(key + d) * load(query + g * D + d);
            weight[g][j] = sum(product);
        }
    const int padded = (count + WIDTH - 1) / WIDTH * WIDTH;
    for (int g = 0; g < G; g++) {
        for (int j = count; j < padded; j++) weight[g][j] = -INFINITY;
        float new_max = max[g];
        for (int j = 0; j < count; j++) new_max = weight[g][j] > new_max ? weight[g][j] : new_max;
        const float rescale = expf(max[g] - new_max);
        floats all = {};
        for (int j = 0; j < padded; j += WIDTH) {
            const floats e = exponential(load(weight[g] + j) - new_max);
            store(weight[g] + j, e);
            all += e;
        }
        max[g] = new_max;
        total[g] = total[g] * rescale + sum(all);
        for (int d = 0; d < D; d += WIDTH) store(acc + g * D + d, load(acc + g * D + d) * rescale);
    }
    floats sums[G][D / WIDTH];
    UNROLL for (int g = 0; g < G; g++)
        UNROLL for (int d = 0; d < D / WIDTH; d++) sums[g][d] = load(acc + g * D + d * WIDTH);
    for (int j = 0; j < count; j++)
        UNROLL for (int g = 0; g < G; g++)
            UNROLL for (int d = 0; d < D / WIDTH; d++) sums[g][d] += weight[g][j] * load(values + j * stride + d * WIDTH);
    UNROLL for (int g = 0; g < G; g++)
        UNROLL for (int d = 0; d < D / WIDTH; d++) store(acc + g * D + d * WIDTH, sums[g][d]);
}

#define ATTEND(G, D) attend_block(G, D, query, keys, values, stride, count, max, total, acc)
#define ATTEND_DIM(D) \
    switch (G) { \
    case 1: ATTEND(1, D); break; \
    case 2: ATTEND(2, D); break; \
    case 3: ATTEND(3, D); break; \
    default: ATTEND(4, D); \
    }

/* The same with sizes that the compiler knows, so that sums stay in registers. */
INLINE void attend_block_sized(int G, int D, const float *query, const float *keys, const float *values,
                               int64_t stride, int count, float *max, float *total, float *acc)
{
    switch (D) {
    case 64: ATTEND_DIM(64) break;
    case 96: ATTEND_DIM(96) break;
    case 128: ATTEND_DIM(128) break;
    default: ATTEND(G, D);
    }
}

KERNEL attend_decode(void *argument)
{
    struct attend_decode *job = argument;
    const int G = (int)job->group, D = (int)job->dim;
    float query[G * D], acc[G * D], max[G], total[G];
    for (int64_t task; (task = take(&job->next)) < job->tokens * job->kv_heads;) {
        const int64_t token = task / job->kv_heads, kv_head = task % job->kv_heads;
        const float *source = job->query + token * job->query_stride + kv_head * G * D;
        for (int i = 0; i < G * D; i++) {
            query[i] = source[i] * job->scaling;
            acc[i] = 0;
        }
        for (int g = 0; g < G; g++) {
            max[g] = -INFINITY;
            total[g] = 0;
        }
        const int64_t stride = job->position_stride, head = kv_head * job->head_stride;
        const int64_t start = job->starts[token], end = start + job->lengths[token];
        for (int64_t at = start; at < end; at += BLOCK) {
            const int count = (int)(end - at < BLOCK ? end - at : BLOCK);
            const float *keys = job->keys + head + at * stride, *values = job->values + head + at * stride;
            for (int g = 0; g < G; g += HEADS_AT_ONCE)
                attend_block_sized(G - g < HEADS_AT_ONCE ? G - g : HEADS_AT_ONCE, D, query + g * D, keys, values,
                                   stride, count, max + g, total + g, acc + g * D);
        }
        float *out = job->out + (token * job->kv_heads + kv_head) * G * D;
        for (int g = 0; g < G; g++)
            for (int d = 0; d < D; d++) out[g * D + d] = acc[g * D + d] / total[g];
    }
}

/* ---- prefill: attention of neighbouring tokens of one sequence ----------------------------------------------- */

struct attend_chunk {
    const float *query, *keys, *values; /* keys and values of one range */
    float *out;
    int64_t tokens, first, heads, kv_heads, dim, query_stride, position_stride, head_stride, window;
    float scaling;
    int64_t next;
};

#define SUMS 8 /* that stay in registers */

/* WIDTH tokens of one head, one per lane and each at one of `positions`, over `count` positions from `at` on.
 * `query_t` and `acc` are (D, WIDTH); `max`, `total` and `acc` hold the softmax so far. */
INLINE void attend_block_tokens(int D, const float *query_t, const float *keys, const float *values, int64_t stride,
                                int at, int count, ints positions, int window, floats *max, floats *total, float *acc)
{
    floats weight[BLOCK];
    for (int j = 0; j < count; j += SUMS) {
        const float *key[SUMS];
        floats sums[SUMS];
        UNROLL for (int i = 0; i < SUMS; i++) {
            key[i] = keys + (j + i < count ? j + i : count - 1) * stride; /* the same again beyond the end */
            sums[i] = (floats){};
        }
        for (int d = 0; d < D; d++) {
            const floats query = load(query_t + d * WIDTH);
            UNROLL for (int i = 0; i < SUMS; i++) sums[i] += key[i][d] * query;
        }
        UNROLL for (int i = 0; i < SUMS; i++) weight[j + i] = sums[i];
    }
    const floats hidden = (floats){} - INFINITY;
    floats new_max = *max;
    for (int j = 0; j < count; j++) {
        const ints distance = positions - (at + j); /* back from the lane's token */
        weight[j] = choose((distance >= 0) & (distance < window), weight[j], hidden);
        new_max = choose(weight[j] > new_max, weight[j], new_max);
    }
    const floats rescale = exponential(*max - new_max);
    floats all = *total * rescale;
    for (int j = 0; j < count; j++) {
        weight[j] = exponential(weight[j] - new_max);
        all += weight[j];
    }
    for (int d = 0; d < D; d += SUMS) {
        floats sums[SUMS];
        UNROLL for (int i = 0; i < SUMS; i++) sums[i] = load(acc + (d + i) * WIDTH) * rescale;
        for (int j = 0; j < count; j++)
            UNROLL for (int i = 0; i < SUMS; i++) sums[i] += values[j * stride + d + i] * weight[j];
        UNROLL for (int i = 0; i < SUMS; i++) store(acc + (d + i) * WIDTH, sums[i]);
    }
    *max = new_max;
    *total = all;
}

KERNEL attend_chunk(void *argument)
{
    struct attend_chunk *job = argument;
    const int D = (int)job->dim, window = job->window ? (int)job->window : INT32_MAX;
    const int64_t tiles = (job->tokens + WIDTH - 1) / WIDTH, group = job->heads / job->kv_heads;
    const int64_t stride = job->position_stride;
    float query_t[D * WIDTH], acc[D * WIDTH];
    for (int64_t task; (task = take(&job->next)) < tiles * job->heads;) {
        const int64_t head = task % job->heads, first = (tiles - 1 - task / job->heads) * WIDTH; /* longest first */
        const int lanes = (int)(job->tokens - first < WIDTH ? job->tokens - first : WIDTH);
        const float *query = job->query + first * job->query_stride + head * D;
        ints positions;
        for (int lane = 0; lane < WIDTH; lane++) {
            positions[lane] = (int)(job->first + first) + (lane < lanes ? lane : lanes - 1);
            for (int d = 0; d < D; d++) {
                query_t[d * WIDTH + lane] = lane < lanes ? query[lane * job->query_stride + d] * job->scaling : 0;
                acc[d * WIDTH + lane] = 0;
            }
        }
        const float *keys = job->keys + head / group * job->head_stride;
        const float *values = job->values + head / group * job->head_stride;
        const int end = positions[lanes - 1] + 1;
        floats max = (floats){} - INFINITY, total = {};
        for (int at = positions[0] < window ? 0 : positions[0] + 1 - window; at < end; at += BLOCK)
            attend_block_tokens(D, query_t, keys + at * stride, values + at * stride, stride, at,
                                end - at < BLOCK ? end - at : BLOCK, positions, window, &max, &total, acc);
        float *out = job->out + first * job->heads * D + head * D;
        for (int lane = 0; lane < lanes; lane++)
            for (int d = 0; d < D; d++) out[lane * job->heads * D + d] = acc[d * WIDTH + lane] / total[lane];
    }
}
