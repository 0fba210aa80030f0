/* What the AVX-512 kernels share: loads and stores of bf16, and functions of 16 floats. */
#ifndef BROS_AVX512_H
#define BROS_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "norm.h"

/* The plain x86-64-v4 level lacks the bf16 products. */
#define AVX512BF16 __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")))
#define AVX512_INLINE AVX512BF16 static inline __attribute__((always_inline))

#define LOG2E 1.44269504f

/* Mask of the lanes 0 .. count - 1; none where count is negative. */
AVX512_INLINE __mmask16 lanes_below(int64_t count)
{
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* The pair of bf16 numbers at `at`, in all lanes. */
AVX512_INLINE __m512bh broadcast_pair(const uint16_t *at)
{
    int32_t pair;
    __builtin_memcpy(&pair, at, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

AVX512_INLINE __m512 load_bf16(const uint16_t *at, __mmask16 lanes)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, at)), 16));
}

/* Rounds to nearest even, as torch does. */
AVX512_INLINE void store_bf16(uint16_t *at, __m512 x, __mmask16 lanes)
{
    _mm256_mask_storeu_epi16(at, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

/* 2 ** x, to 2 units in the last place for -126 <= x <= 127; 0 below, NaN of NaN. The polynomial is the minimax one of
 * degree 6 on [-1/2, 1/2] of the Cephes library's exp2f. */
AVX512_INLINE __m512 exp2_ps(__m512 x)
{
    __mmask16 is_normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.931472028550421e-1f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(is_normal, p, whole);
}

/* x / (1 + exp(-x)). */
AVX512_INLINE __m512 silu(__m512 x)
{
    __m512 minus_x_log2e = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2E)), _mm512_set1_ps(126.0f));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_ps(minus_x_log2e)));
}

/* tanh(x) = 1 - 2 / (1 + exp(2 x)), to 2e-7; NaN of NaN. */
AVX512_INLINE __m512 tanh_ps(__m512 x)
{
    /* The minimum of anything and NaN is its second operand. */
    __m512 two_x_log2e = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(x, _mm512_set1_ps(2.0f * LOG2E)));
    __m512 denominator = _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_ps(two_x_log2e));
    return _mm512_sub_ps(_mm512_set1_ps(1.0f), _mm512_div_ps(_mm512_set1_ps(2.0f), denominator));
}

/* out = norm(x), of `size` numbers; out may be x. */
AVX512_INLINE void normalise(const uint16_t *x, int64_t size, const struct bros_norm *norm, uint16_t *out)
{
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        __m512 part = load_bf16(x + i, lanes_below(size - i));
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    float mean = _mm512_reduce_add_ps(squares) / (float)size;
    __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + norm->eps)), offset = _mm512_set1_ps(norm->offset);
    for (int64_t i = 0; i < size; i += 16) {
        __mmask16 lanes = lanes_below(size - i);
        __m512 scaled = _mm512_mul_ps(load_bf16(x + i, lanes), factor);
        __m512 weight = _mm512_add_ps(load_bf16(norm->weight + i, lanes), offset);
        store_bf16(out + i, _mm512_mul_ps(scaled, weight), lanes);
    }
}

/* The register tile of all products: up to 12 rows times a panel of 32 columns. 12 x 2 sums, 2 loads and a broadcast
 * pair fill the 32 registers. */
enum { PANEL = 32, MAX_ROWS = 12 };

/* sums += x @ panel. x: `rows` rows of 2 * num_pairs numbers, x_stride apart; panel: (num_pairs, 32, 2), aligned to 64
 * bytes. Each sum is taken in the order of the pairs. Meanwhile so many cache lines a pair are fetched from `next`. */
AVX512_INLINE void multiply_panel(__m512 sums[MAX_ROWS][2], const int rows, const uint16_t *x, int64_t x_stride,
                                  const uint16_t *panel, int64_t num_pairs, const char *next, const int next_lines)
{
    const char *columns = (const char *)panel;
    for (int64_t pair = 0; pair < num_pairs; pair++, columns += 4 * PANEL) {
        __m512bh left = (__m512bh)_mm512_load_si512(columns), right = (__m512bh)_mm512_load_si512(columns + 64);
        for (int line = 0; line < next_lines; line++, next += 64)
            _mm_prefetch(next, _MM_HINT_T1);
        for (int r = 0; r < rows; r++) {
            __m512bh inputs = broadcast_pair(x + r * x_stride + 2 * pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, inputs);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right, inputs);
        }
    }
}

/* Rows of the next register tile, where `left` are left: of about the same height, so 16 rows are 8 + 8, not 12 + 4. */
static inline int64_t next_rows(int64_t left)
{
    int64_t num_tiles = (left + MAX_ROWS - 1) / MAX_ROWS;
    return (left + num_tiles - 1) / num_tiles;
}

/* CASE(rows) for the number of rows, which the compiler then knows. */
#define FOR_ROWS(ROWS, CASE)                                                                                   \
    switch (ROWS) {                                                                                            \
        case 1: CASE(1); break; case 2: CASE(2); break; case 3: CASE(3); break; case 4: CASE(4); break;        \
        case 5: CASE(5); break; case 6: CASE(6); break; case 7: CASE(7); break; case 8: CASE(8); break;        \
        case 9: CASE(9); break; case 10: CASE(10); break; case 11: CASE(11); break; case 12: CASE(12); break;  \
    }

#endif
