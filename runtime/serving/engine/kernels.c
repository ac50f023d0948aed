/* What a decode step on a CPU does between its matrix products, one pass over memory each, in float32.
 *
 * Every kernel is `void kernel(void *job)`, called by each thread of a team: a thread takes the next task of the
 * job until none is left. kernels.py has the same structures and says what the sizes mean. Sixteen floats at a
 * time in GCC's vector types, for AVX-512, AVX2 and what every x86-64 has; the loader picks (target_clones).
 * NaN and infinity have to come out where they went in: nothing here may be compiled with -ffast-math.
 */
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(KERNEL) /* -DKERNEL=void: for the one kind of processor that the compiler is told */
#elif defined(__x86_64__)
#define KERNEL __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
#else
#define KERNEL void
#endif
#define WIDTH 16

typedef float floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float half __attribute__((vector_size(32)));
typedef float quarter __attribute__((vector_size(16)));

/* Before loops whose bounds a caller knows: what they run over stays in registers. */
#define UNROLL _Pragma("GCC unroll 16")

INLINE floats load(const float *from) { return *(const floats *)from; }
INLINE void store(float *to, floats x) { *(floats *)to = x; }
INLINE floats choose(ints mask, floats yes, floats no)
{
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

INLINE float sum(floats x)
{
    union { floats whole; half part[2]; } halves = {x};
    union { half whole; quarter part[2]; } quarters = {halves.part[0] + halves.part[1]};
    quarter four = quarters.part[0] + quarters.part[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* e to the x, 2 ulp; NaN stays NaN. x = n ln 2 + r, a polynomial in r (Cephes' coefficients), n into the exponent. */
INLINE floats exponential(floats x)
{
    const floats least = (floats){} - 87.3f, most = (floats){} + 88.0f;
    x = choose(x < least, least, x);
    x = choose(x > most, most, x);
    const floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: n is in the low bits */
    const floats n = shifted - 12582912.0f;
    const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (floats)((ints)p + (((ints)shifted - 0x4B400000) << 23));
}

INLINE int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* ---- attention of one token per row over its slot ------------------------------------------------------------ */

struct attend {
    const float *query, *keys, *values;
    float *out;
    const int64_t *slots, *places;
    int64_t tokens, groups, queries, dim, query_stride, slot_stride, head_stride, window;
    float scaling;
    int64_t next;
};

#define BLOCK 64   /* positions whose keys and values stay in the first cache between the two products */
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

/* ---- LoRA: each token's own adapter -------------------------------------------------------------------------- */

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
