/* What lies between a layer's products, one pass over memory each. */
#include "vectors.h"

/* ---- rotation of queries and keys, and keys and values into their slots -------------------------------------- */

struct turn {
    float *mixed; /* (tokens, heads + 2 groups, dim): queries are turned in place */
    const float *cosines, *sines; /* (tokens, turned) */
    float *keys, *values;
    const int64_t *slots, *places;
    int64_t tokens, heads, groups, dim, turned, slot_stride, head_stride;
    int64_t next;
};

INLINE void rotate(const float *x, float *to, const float *cosine, const float *sine, int turned, int dim)
{
    const int middle = turned / 2;
    for (int d = 0; d < middle; d++) {
        const float low = x[d], high = x[d + middle];
        to[d] = low * cosine[d] - high * sine[d];
        to[d + middle] = high * cosine[d + middle] + low * sine[d + middle];
    }
    for (int d = turned; d < dim; d++) to[d] = x[d];
}

KERNEL turn(void *given)
{
    struct turn *job = given;
    const int D = (int)job->dim, turned = (int)job->turned;
    for (int64_t token; (token = take(&job->next)) < job->tokens;) {
        float *mixed = job->mixed + token * (job->heads + 2 * job->groups) * D;
        const float *cosine = job->cosines + token * turned, *sine = job->sines + token * turned;
        for (int64_t head = 0; head < job->heads; head++) rotate(mixed + head * D, mixed + head * D, cosine, sine, turned, D);
        const float *key = mixed + job->heads * D, *value = key + job->groups * D;
        const int64_t place = job->slots[token] * job->slot_stride + job->places[token] * D;
        for (int64_t group = 0; group < job->groups; group++) {
            rotate(key + group * D, job->keys + place + group * job->head_stride, cosine, sine, turned, D);
            float *kept = job->values + place + group * job->head_stride;
            for (int d = 0; d < D; d++) kept[d] = value[group * D + d];
        }
    }
}

/* ---- residual and RMS norm ----------------------------------------------------------------------------------- */

struct norm {
    float *hidden;       /* (tokens, size): the update is added in place */
    const float *update; /* or NULL */
    const float *weight;
    float *out;
    int64_t tokens, size;
    float epsilon;
    int64_t next;
};

KERNEL norm(void *given)
{
    struct norm *job = given;
    const int64_t size = job->size;
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
    const float *mixed; /* (tokens, 2 size): gates, then what they let through */
    float *out;         /* (tokens, size) */
    int64_t tokens, size;
    int64_t next;
};

KERNEL gate(void *given)
{
    struct gate *job = given;
    const int64_t size = job->size;
    for (int64_t token; (token = take(&job->next)) < job->tokens;) {
        const float *gates = job->mixed + token * 2 * size, *through = gates + size;
        float *out = job->out + token * size;
        for (int64_t i = 0; i < size; i += WIDTH) {
            const floats x = load(gates + i);
            store(out + i, x / (1.0f + exponential(-x)) * load(through + i));
        }
    }
}
