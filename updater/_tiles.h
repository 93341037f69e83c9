/* SPDX-License-Identifier: MIT
 * Steps of torch's unfused optimizers over a tile: few enough elements that all operations of a step find them in the
 * first cache. Each operation rounds as torch's own does (docs/decisions/0016); who calls proves that first (blocks.py).
 */
#ifndef FC_TILES_H
#define FC_TILES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Elements of a tile. Twice as many take an eighth longer, four times as many half as long again (decision 0016). */
#define FC_TILE 256
/* Tiles that a thread takes at once. */
#define FC_TILES_AT_ONCE 64

/* What vmsSqrt of MKL's vector mathematics takes: high accuracy, denormals as they are, no errors (mkl_vml_defines.h). */
#define FC_VML_MODE (0x2 | 0x140000 | 0x100)
typedef void (*fc_root)(int count, const float *from, float *to, int64_t mode);
/* MKL_Set_Num_Threads_Local: for calls by this thread; returns what was set, 0: nothing was. */
typedef int (*fc_threads)(int count);

/* One parameter's step. `root` is NULL where torch takes roots as IEEE does. */
typedef struct {
    float *parameter;
    const float *gradient;
    float *first;       /* exp_avg, momentum_buffer; NULL: SGD without momentum */
    float *second;      /* exp_avg_sq; NULL: SGD */
    size_t count;
    /* what becomes of the gradient first, in this order */
    int scaled, negated;
    float scale;        /* it is multiplied by this */
    float coupled;      /* so much of the parameter is added; 0: none */
    float size;         /* what the step is multiplied by: negative */
    /* Adam */
    float decay;        /* the parameter is multiplied by this */
    float weight;       /* lerp's, towards the gradient */
    float kept, added;  /* of the mean square, and of the gradient's */
    float correction, epsilon;
    /* SGD */
    int begins, nesterov;
    float momentum, damped;
    fc_root root;
} fc_step;

#define FC_INLINE static inline __attribute__((always_inline))

/* a * b + c, rounded once: so torch's kernels do for processors that can. */
FC_INLINE float fc_multiply_add(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}

FC_INLINE const float *fc_gradient(const fc_step *s, size_t at, size_t count, float *made)
{
    const float *g = s->gradient + at, *restrict p = s->parameter + at;
    if (!s->scaled && !s->negated && s->coupled == 0)
        return g;
    memcpy(made, g, count * sizeof *made);
    if (s->scaled)
        for (size_t i = 0; i < count; i++)
            made[i] *= s->scale;
    if (s->negated)
        for (size_t i = 0; i < count; i++)
            made[i] = -made[i];
    if (s->coupled != 0)
        for (size_t i = 0; i < count; i++)
            made[i] = fc_multiply_add(s->coupled, p[i], made[i]);
    return made;
}

FC_INLINE void fc_adam(const fc_step *s, size_t at, size_t count, const float *restrict g, float *restrict roots)
{
    float *restrict p = s->parameter + at, *restrict m = s->first + at, *restrict v = s->second + at;
    const float weight = s->weight, rest = -(1.0f - weight), kept = s->kept, added = s->added;
    const float decay = s->decay, correction = s->correction, epsilon = s->epsilon, size = s->size;
    if (fabsf(weight) < 0.5f)
        for (size_t i = 0; i < count; i++)
            m[i] = fc_multiply_add(weight, g[i] - m[i], m[i]);
    else
        for (size_t i = 0; i < count; i++)
            m[i] = fc_multiply_add(rest, g[i] - m[i], g[i]);
    for (size_t i = 0; i < count; i++)
        v[i] = fc_multiply_add(added * g[i], g[i], v[i] * kept);
    if (s->root)
        s->root((int)count, v, roots, FC_VML_MODE);
    else
        for (size_t i = 0; i < count; i++)
            roots[i] = sqrtf(v[i]);
    for (size_t i = 0; i < count; i++)
        p[i] = p[i] * decay + size * m[i] / (roots[i] / correction + epsilon);
}

FC_INLINE void fc_sgd(const fc_step *s, size_t at, size_t count, const float *g)
{
    float *restrict p = s->parameter + at;
    const float momentum = s->momentum, damped = s->damped, size = s->size;
    if (s->first) {
        float *restrict buffer = s->first + at;
        if (s->begins)
            memcpy(buffer, g, count * sizeof *buffer);
        else
            for (size_t i = 0; i < count; i++)
                buffer[i] = fc_multiply_add(damped, g[i], buffer[i] * momentum);
        if (s->nesterov) {
            for (size_t i = 0; i < count; i++)
                p[i] = fc_multiply_add(size, fc_multiply_add(momentum, buffer[i], g[i]), p[i]);
            return;
        }
        g = buffer;
    }
    for (size_t i = 0; i < count; i++)
        p[i] = fc_multiply_add(size, g[i], p[i]);
}

FC_INLINE void fc_tiles(const fc_step *s, size_t begin, size_t end)
{
    _Alignas(64) float made[FC_TILE], roots[FC_TILE];
    for (size_t at = begin; at < end; at += FC_TILE) {
        const size_t count = end - at < FC_TILE ? end - at : FC_TILE;
        const float *g = fc_gradient(s, at, count, made);
        if (s->second)
            fc_adam(s, at, count, g, roots);
        else
            fc_sgd(s, at, count, g);
    }
}

typedef void (*fc_stepper)(const fc_step *, size_t, size_t);

static void fc_tiles_plain(const fc_step *s, size_t begin, size_t end)
{
    fc_tiles(s, begin, end);
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) static void fc_tiles_avx2(const fc_step *s, size_t begin, size_t end)
{
    fc_tiles(s, begin, end);
}

__attribute__((target("avx512f,avx512dq,avx512vl,prefer-vector-width=512"))) static void
fc_tiles_avx512(const fc_step *s, size_t begin, size_t end)
{
    fc_tiles(s, begin, end);
}
#endif

/* Return what steps with vectors of so many bits, 0: as the compiler would have it; NULL: not on this processor. */
static fc_stepper fc_stepper_of(int vectors)
{
#ifdef __x86_64__
    if (vectors == 512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl"))
        return fc_tiles_avx512;
    if (vectors == 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return fc_tiles_avx2;
#endif
    return vectors == 0 ? fc_tiles_plain : NULL;
}

/* Step all; the bits depend on no number of threads, since each element is stepped alone. `mkl_threads` may be NULL. */
static void fc_steps(const fc_step *steps, size_t count, fc_stepper tiles, int threads, fc_threads mkl_threads)
{
    const size_t most = (size_t)FC_TILE * FC_TILES_AT_ONCE;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        /* Else MKL begins a parallel region of its own for every tile's roots, which takes longer than they do. */
        const int before = mkl_threads ? mkl_threads(1) : 0;
        for (size_t n = 0; n < count; n++) {
            const fc_step *s = &steps[n];
#pragma omp for schedule(dynamic) nowait
            for (size_t begin = 0; begin < s->count; begin += most)
                tiles(s, begin, s->count - begin < most ? s->count : begin + most);
        }
        if (mkl_threads)
            mkl_threads(before);
    }
}

#endif
