/* The operations of a training step between its matrix products, each in one pass over memory; native.py compiles this.

   The lower half is included twice: STORE is the type of tensors, bf16 or float32. Arithmetic is float32 throughout.
   No -ffast-math, so that a NaN stays a NaN; sums are vectorised by `omp simd reduction` instead. */

#ifndef STORE
#include <math.h>
#include <stdint.h>

#define ROWS _Pragma("omp parallel for num_threads(threads) schedule(static)")
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(name) _Pragma(STRING(omp simd reduction(+ : name)))
#define STRING(text) #text

static inline float widen_bf16(uint16_t bits) {
    union { uint32_t bits; float value; } out = {(uint32_t)bits << 16};
    return out.value;
}

/* To the nearest, ties to even. */
static inline uint16_t narrow_bf16(float value) {
    union { float value; uint32_t bits; } in = {value};
    return (uint16_t)((in.bits + 0x7fffu + ((in.bits >> 16) & 1u)) >> 16);
}

static inline float widen_f32(float value) { return value; }
static inline float narrow_f32(float value) { return value; }

/* e^x to 3e-7 (relative) near 0: 2^n times a polynomial of 2^f, |f| <= 1/2. */
static inline float exp_of(float x) {
    float t = x * 1.44269504088896341f;
    t = t < -126.0f ? -126.0f : t;
    t = t > 127.0f ? 127.0f : t;
    float n = rintf(t), f = t - n;
    float p = 1.53707101e-4f;
    p = p * f + 1.33998531e-3f;
    p = p * f + 9.61837326e-3f;
    p = p * f + 5.55032902e-2f;
    p = p * f + 2.40226485e-1f;
    p = p * f + 6.93147206e-1f;
    p = p * f + 1.0f;
    n = n == n ? n : 0.0f;  /* NaN is no integer; p carries it on */
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

/* A permutation of 32-bit numbers (dropout.py). */
static inline uint32_t mix(uint32_t v) {
    v ^= v >> 16;
    v *= 0x7feb352du;
    v ^= v >> 15;
    v *= 0x846ca68bu;
    return v ^ v >> 16;
}

/* act(x) = x * sigmoid(x * (one + three * x * x)) and its slope: SiLU for (1, 0), GELU's tanh form for
   (2 sqrt(2/pi), 0.044715 of that). */
static inline float gate_of(float x, float one, float three, float *slope) {
    float s = 1.0f / (1.0f + exp_of(-x * (one + three * x * x)));
    *slope = s + x * s * (1.0f - s) * (one + 3.0f * three * x * x);
    return x * s;
}

#include "attention.c"
#include "linear.c"

#define STORE uint16_t
#define WIDEN widen_bf16
#define NARROW narrow_bf16
#define NAME(kernel) kernel##_bf16
#include "kernels.c"
#undef STORE
#undef WIDEN
#undef NARROW
#undef NAME
#define STORE float
#define WIDEN widen_f32
#define NARROW narrow_f32
#define NAME(kernel) kernel##_f32
#include "kernels.c"

#else

/* x [rows, d] -> y [rows, d] and 1 / rms [rows]. */
void NAME(norm)(const STORE *x, const float *scale, float eps, STORE *y, float *inverse, long rows, long d,
                int threads) {
    ROWS for (long i = 0; i < rows; i++) {
        const STORE *from = x + i * d;
        STORE *to = y + i * d;
        float sum = 0;
        SIMD_SUM(sum) for (long j = 0; j < d; j++) { float v = WIDEN(from[j]); sum += v * v; }
        float r = 1.0f / sqrtf(sum / d + eps);
        SIMD for (long j = 0; j < d; j++) to[j] = NARROW(WIDEN(from[j]) * r * scale[j]);
        inverse[i] = r;
    }
}

void NAME(norm_back)(const STORE *grad, const STORE *x, const float *scale, const float *inverse, STORE *out,
                     long rows, long d, int threads) {
    ROWS for (long i = 0; i < rows; i++) {
        const STORE *g = grad + i * d, *from = x + i * d;
        STORE *to = out + i * d;
        float r = inverse[i], along = 0;
        SIMD_SUM(along) for (long j = 0; j < d; j++) along += WIDEN(g[j]) * scale[j] * WIDEN(from[j]);
        along *= r * r / d;
        SIMD for (long j = 0; j < d; j++) to[j] = NARROW((WIDEN(g[j]) * scale[j] - WIDEN(from[j]) * along) * r);
    }
}

/* y = act(gate) * up, all [rows, d]; one and three as above. */
void NAME(glu)(const STORE *gate, const STORE *up, STORE *y, float one, float three, long rows, long d, int threads) {
    ROWS for (long i = 0; i < rows; i++) {
        const STORE *gates = gate + i * d, *ups = up + i * d;
        STORE *to = y + i * d;
        SIMD for (long j = 0; j < d; j++) {
            float slope;
            to[j] = NARROW(gate_of(WIDEN(gates[j]), one, three, &slope) * WIDEN(ups[j]));
        }
    }
}

/* y [rows, d]: the gradient of y on entry, y itself on return; gradients of gate and up go to their own tensors. */
void NAME(glu_back)(const STORE *gate, const STORE *up, STORE *y, STORE *grad_gate, STORE *grad_up, float one,
                    float three, long rows, long d, int threads) {
    ROWS for (long i = 0; i < rows; i++) {
        const STORE *gates = gate + i * d, *ups = up + i * d;
        STORE *both = y + i * d, *to_gate = grad_gate + i * d, *to_up = grad_up + i * d;
        SIMD for (long j = 0; j < d; j++) {
            float slope, u = WIDEN(ups[j]), g = WIDEN(both[j]);
            float a = gate_of(WIDEN(gates[j]), one, three, &slope);
            both[j] = NARROW(a * u);
            to_gate[j] = NARROW(g * u * slope);
            to_up[j] = NARROW(g * a);
        }
    }
}

/* Scores [rows, m] become softmax(scale * scores), 0 outside the columns that a row sees. sums [rows, 2]: the largest
   score and one over the denominator relative to it; its logarithm would lose the differences of large scores. Row i
   of a group of n is the query at column first + i / heads, which sees the `window` columns that end there; only the
   first `own` rows of a group count, the others become 0. */
void NAME(softmax)(STORE *scores, float *sums, float scale, long rows, long m, long n, long own, long heads, long first,
                   long window, int threads) {
    ROWS for (long i = 0; i < rows; i++) {
        STORE *row = scores + i * m;
        if (i % n >= own) {
            for (long j = 0; j < m; j++) row[j] = 0;
            sums[2 * i] = sums[2 * i + 1] = 0;
            continue;
        }
        long end = first + i % n / heads + 1, start = end > window ? end - window : 0;
        float most = -INFINITY, sum = 0;
        _Pragma("omp simd reduction(max : most)") for (long j = start; j < end; j++) {
            float v = WIDEN(row[j]);
            most = v > most ? v : most;
        }
        float row_weights[end - start];
        SIMD_SUM(sum) for (long j = start; j < end; j++)
            sum += row_weights[j - start] = exp_of((WIDEN(row[j]) - most) * scale);
        float part = 1.0f / sum;
        SIMD for (long j = start; j < end; j++) row[j] = NARROW(row_weights[j - start] * part);
        for (long j = 0; j < start; j++) row[j] = 0;
        for (long j = end; j < m; j++) row[j] = 0;
        sums[2 * i] = most;
        sums[2 * i + 1] = part;
    }
}

/* The same scores become the weights p again, and grads (of p) those of the scores:
   scale * p * (grads - sum(p * grads)). */
void NAME(softmax_back)(STORE *scores, STORE *grads, const float *sums, float scale, long rows, long m, long n,
                        long own, long heads, long first, long window, int threads) {
    ROWS for (long i = 0; i < rows; i++) {
        STORE *row = scores + i * m, *grad = grads + i * m;
        if (i % n >= own) {
            for (long j = 0; j < m; j++) row[j] = grad[j] = 0;
            continue;
        }
        long end = first + i % n / heads + 1, start = end > window ? end - window : 0;
        float most = sums[2 * i], part = sums[2 * i + 1], mean = 0;
        SIMD_SUM(mean) for (long j = start; j < end; j++) {
            float p = exp_of((WIDEN(row[j]) - most) * scale) * part;
            mean += p * WIDEN(grad[j]);
            row[j] = NARROW(p);
        }
        SIMD for (long j = start; j < end; j++) grad[j] = NARROW(WIDEN(row[j]) * (WIDEN(grad[j]) - mean) * scale);
        for (long j = 0; j < start; j++) row[j] = grad[j] = 0;
        for (long j = end; j < m; j++) row[j] = grad[j] = 0;
    }
}

/* Add a block of words, logits [rows, n] times scale, to the sums over earlier words, [rows] each: own (the logit of
   a row's target, if its column ids[row] is in the block), top (the largest) and total (the sum of exp(logit - top)).
   The logits become exp(logit - top); fade [rows] is the factor for sums relative to the old top. */
void NAME(online_softmax)(STORE *logits, const int64_t *ids, float *own, float *top, float *total, float *fade,
                          float scale, long rows, long n, int threads) {
    ROWS for (long i = 0; i < rows; i++) {
        STORE *row = logits + i * n;
        float most = -INFINITY, sum = 0;
        if (ids[i] >= 0 && ids[i] < n) own[i] = WIDEN(row[ids[i]]) * scale;
        _Pragma("omp simd reduction(max : most)") for (long j = 0; j < n; j++) {
            float v = WIDEN(row[j]) * scale;
            most = v > most ? v : most;
        }
        most = top[i] > most ? top[i] : most;
        SIMD_SUM(sum) for (long j = 0; j < n; j++) {
            float e = exp_of(WIDEN(row[j]) * scale - most);
            sum += e;
            row[j] = NARROW(e);
        }
        fade[i] = top[i] == -INFINITY ? 0.0f : exp_of(top[i] - most);
        total[i] = total[i] * fade[i] + sum;
        top[i] = most;
    }
}

/* The largest of each column of weights [rows, n], each over its row's total [rows] -> largest [n]. */
void NAME(largest)(const STORE *weights, const float *total, float *largest, long rows, long n, int threads) {
    const long width = 256;
    ROWS for (long start = 0; start < n; start += width) {
        long end = start + width < n ? start + width : n;
        for (long j = start; j < end; j++) largest[j] = 0;
        for (long i = 0; i < rows; i++) {
            const STORE *row = weights + i * n;
            float share = 1.0f / total[i];
            SIMD for (long j = start; j < end; j++) {
                float v = WIDEN(row[j]) * share;
                largest[j] = v > largest[j] ? v : largest[j];
            }
        }
    }
}

/* The columns [count] of weights [rows, n] -> picked [rows, count]; the sum of the others is added to left [rows]. */
void NAME(pick)(const STORE *weights, const int64_t *columns, STORE *picked, float *left, long rows, long n, long count,
                int threads) {
    ROWS for (long i = 0; i < rows; i++) {
        const STORE *row = weights + i * n;
        STORE *to = picked + i * count;
        float all = 0, taken = 0;
        for (long j = 0; j < count; j++) to[j] = row[columns[j]];
        SIMD_SUM(all) for (long j = 0; j < n; j++) all += WIDEN(row[j]);
        SIMD_SUM(taken) for (long j = 0; j < count; j++) taken += WIDEN(to[j]);
        left[i] += all - taken;
    }
}

/* x [rows, d] -> y: scale times the numbers that stay, 0 for the others; 16 random bits for each (dropout.py). */
void NAME(dropout)(const STORE *x, STORE *y, float scale, long seed, long least, long rows, long d, int threads) {
    long half = (d + 1) / 2;
    uint32_t threshold = (uint32_t)least;
    ROWS for (long i = 0; i < rows; i++) {
        const STORE *one = x + i * d, *two = one + half;
        STORE *to = y + i * d, *to_two = to + half;
        uint32_t start = (uint32_t)(i * half + seed), last = mix(start + (uint32_t)half - 1);
        SIMD for (long j = 0; j < d / 2; j++) {
            uint32_t drawn = mix(start + (uint32_t)j);
            to[j] = NARROW((drawn & 0xffff) >= threshold ? WIDEN(one[j]) * scale : 0.0f);
            to_two[j] = NARROW(drawn >> 16 >= threshold ? WIDEN(two[j]) * scale : 0.0f);
        }
        if (d % 2) to[half - 1] = NARROW((last & 0xffff) >= threshold ? WIDEN(one[half - 1]) * scale : 0.0f);
    }
}

/* x [tokens, heads, d] -> y: each row normed (unless scale is null) and rotated by its token's cos and sin [tokens, d]:
   y = n cos + half(n) sin, where half(n) = (-n2, n1) for n = (n1, n2). inverse [tokens, heads]: 1 / rms. */
void NAME(rope)(const STORE *x, const STORE *cosine, const STORE *sine, const float *scale, float eps, STORE *y,
                float *inverse, long tokens, long heads, long d, int threads) {
    long h = d / 2;
    ROWS for (long i = 0; i < tokens * heads; i++) {
        const STORE *from = x + i * d, *c = cosine + i / heads * d, *s = sine + i / heads * d;
        STORE *to = y + i * d;
        float sum = 0, r = 1;
        if (scale) {
            SIMD_SUM(sum) for (long j = 0; j < d; j++) { float v = WIDEN(from[j]); sum += v * v; }
            r = inverse[i] = 1.0f / sqrtf(sum / d + eps);
        }
        SIMD for (long j = 0; j < h; j++) {
            float a = WIDEN(from[j]) * r * (scale ? scale[j] : 1), b = WIDEN(from[j + h]) * r * (scale ? scale[j + h] : 1);
            to[j] = NARROW(a * WIDEN(c[j]) - b * WIDEN(s[j]));
            to[j + h] = NARROW(b * WIDEN(c[j + h]) + a * WIDEN(s[j + h]));
        }
    }
}

/* grad [tokens, heads, d] of y -> out, of x. */
void NAME(rope_back)(const STORE *grad, const STORE *x, const STORE *cosine, const STORE *sine, const float *scale,
                     const float *inverse, STORE *out, long tokens, long heads, long d, int threads) {
    long h = d / 2;
    ROWS for (long i = 0; i < tokens * heads; i++) {
        const STORE *from = x + i * d, *c = cosine + i / heads * d, *s = sine + i / heads * d, *g = grad + i * d;
        STORE *to = out + i * d;
        float rotated[d], r = 1, along = 0;
        SIMD for (long j = 0; j < h; j++) {
            float a = WIDEN(g[j]), b = WIDEN(g[j + h]);
            rotated[j] = (a * WIDEN(c[j]) + b * WIDEN(s[j + h])) * (scale ? scale[j] : 1);
            rotated[j + h] = (b * WIDEN(c[j + h]) - a * WIDEN(s[j])) * (scale ? scale[j + h] : 1);
        }
        if (scale) {
            r = inverse[i];
            SIMD_SUM(along) for (long j = 0; j < d; j++) along += rotated[j] * WIDEN(from[j]);
            along *= r * r / d;
            SIMD for (long j = 0; j < d; j++) to[j] = NARROW((rotated[j] - WIDEN(from[j]) * along) * r);
        } else
            SIMD for (long j = 0; j < d; j++) to[j] = NARROW(rotated[j]);
    }
}

#endif
