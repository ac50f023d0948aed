/* Elementwise work between a layer's matrix products, one pass over memory each. */
#include "vectors.h"

/* ---- rotation of queries and keys, and keys and values into their slots -------------------------------------- */

struct rotate {
    float *qkv; /* (tokens, heads + 2 kv_heads, dim): queries are rotated in place */
    const float *cos, *sin; /* (tokens, rotary_dim) */
    float *keys, *values;
    const int64_t *stores; /* the position of the arena of each token */
    int64_t tokens, heads, kv_heads, dim, rotary_dim, position_stride, head_stride;
    int64_t next;
};

INLINE void rotate_head(const float *x, float *to, const float *cos, const float *sin, int rotary_dim, int dim)
{
    const int middle = rotary_dim / 2;
    for (int d = 0; d < middle; d++) {
        const float low = x[d], high = x[d + middle];
        to[d] = low * cos[d] - high * sin[d];
        to[d + middle] = high * cos[d + middle] + low * sin[d + middle];
    }
    for (int d = rotary_dim; d < dim; d++) to[d] = x[d];
}

KERNEL rotate(void *argument)
{
    struct rotate *job = argument;
    const int D = (int)job->dim, rotary_dim = (int)job->rotary_dim;
    for (int64_t token; (token = take(&job->next)) < job->tokens;) {
        float *query = job->qkv + token * (job->heads + 2 * job->kv_heads) * D;
        const float *cos = job->cos + token * rotary_dim, *sin = job->sin + token * rotary_dim;
        for (int64_t head = 0; head < job->heads; head++)
            rotate_head(query + head * D, query + head * D, cos, sin, rotary_dim, D);
        const float *key = query + job->heads * D, *value = key + job->kv_heads * D;
        const int64_t at = job->stores[token] * job->position_stride;
        for (int64_t head = 0; head < job->kv_heads; head++) {
            rotate_head(key + head * D, job->keys + at + head * job->head_stride, cos, sin, rotary_dim, D);
            float *stored = job->values + at + head * job->head_stride;
            for (int d = 0; d < D; d++) stored[d] = value[head * D + d];
        }
    }
}

/* ---- residual and RMS norm ----------------------------------------------------------------------------------- */

struct norm {
    float *hidden;       /* (tokens, features): the update is added in place */
    const float *update; /* or NULL */
    const float *weight;
    float *out;
    int64_t tokens, features;
    float epsilon;
    int64_t next;
};

KERNEL norm(void *argument)
{
    struct norm *job = argument;
    const int64_t size = job->features;
    for (int64_t token; (token = take(&job->next)) < job->tokens;) {
        float *hidden = job->hidden + token * size, *out = job->out + token * size;
        const float *update = job->update ? job->update + token * size : 0;
        floats squares = {};
        for (int64_t i = 0; i < size; i += WIDTH) {
            floats x = load(hidden + i);
            if (update) {
                x += load(update + i);
                store(hidden + i, x);
            }
            squares += x * x;
        }
        const float factor = 1.0f / sqrtf(sum(squares) / (float)size + job->epsilon);
        for (int64_t i = 0; i < size; i += WIDTH) store(out + i, load(hidden + i) * factor * load(job->weight + i));
    }
}

/* ---- gate of the MLP: silu(gate) * up ------------------------------------------------------------------------ */

struct gate {
    const float *gate_up; /* (tokens, 2 features): gates, then what they multiply */
    float *out;           /* (tokens, features) */
    int64_t tokens, features;
    int64_t next;
};

KERNEL gate(void *argument)
{
    struct gate *job = argument;
    const int64_t size = job->features;
    for (int64_t token; (token = take(&job->next)) < job->tokens;) {
        const float *gates = job->gate_up + token * 2 * size, *ups = gates + size;
        float *out = job->out + token * size;
        for (int64_t i = 0; i < size; i += WIDTH) {
            const floats x = load(gates + i);
            store(out + i, x / (1.0f + exponential(-x)) * load(ups + i));
        }
    }
}
