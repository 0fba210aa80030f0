/* What the AVX-512 kernels share: loads and stores, functions of 16 floats, and the register tile of all products. */
#ifndef BROS_AVX512_H
#define BROS_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "dtype.h"
#include "norm.h"

/* The plain x86-64-v4 level lacks the products of bf16 and of int8. */
#define AVX512 __attribute__((target("arch=x86-64-v4,avx512bf16,avx512vnni,prefer-vector-width=512")))
#define AVX512_INLINE AVX512 static inline __attribute__((always_inline))

#define LOG2E 1.44269504f

/* Mask of the lanes 0 .. count - 1; none where count is negative. */
AVX512_INLINE __mmask16 lanes_below(int64_t count)
{
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* Numbers x[at], x[at + 1], ...; 0 in the lanes that are not asked for. */
AVX512_INLINE __m512 load_numbers(const void *x, int64_t at, __mmask16 lanes, const int dtype)
{
    if (dtype == BROS_FLOAT32)
        return _mm512_maskz_loadu_ps(lanes, (const float *)x + at);
    __m256i halves = _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)x + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Rounds to nearest even, as torch does. */
AVX512_INLINE void store_numbers(void *x, int64_t at, __m512 numbers, __mmask16 lanes, const int dtype)
{
    if (dtype == BROS_FLOAT32)
        _mm512_mask_storeu_ps((float *)x + at, lanes, numbers);
    else
        _mm256_mask_storeu_epi16((uint16_t *)x + at, lanes, (__m256i)_mm512_cvtneps_pbh(numbers));
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
AVX512_INLINE void normalise(const void *x, int64_t size, const struct bros_norm *norm, void *out, const int dtype)
{
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        __m512 part = load_numbers(x, i, lanes_below(size - i), dtype);
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    float mean = _mm512_reduce_add_ps(squares) / (float)size;
    __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + norm->eps)), offset = _mm512_set1_ps(norm->offset);
    for (int64_t i = 0; i < size; i += 16) {
        __mmask16 lanes = lanes_below(size - i);
        __m512 scaled = _mm512_mul_ps(load_numbers(x, i, lanes, dtype), factor);
        __m512 weight = _mm512_add_ps(load_numbers(norm->weight, i, lanes, dtype), offset);
        store_numbers(out, i, _mm512_mul_ps(scaled, weight), lanes, dtype);
    }
}

/* The register tile of all products: up to 12 rows times a panel of 32 columns. 12 x 2 sums, 2 loads and a broadcast
 * unit fill the 32 registers. */
enum { PANEL = 32, MAX_ROWS = 12 };

/* Rows and columns are multiplied in units of 4 bytes, which one instruction multiplies and adds to 16 sums. */
enum { UNIT_BYTES = 4, PANEL_UNIT_BYTES = PANEL * UNIT_BYTES };
enum bros_unit {
    BF16_PAIR,   /* two numbers */
    FLOAT32_ONE, /* one */
    INT8_QUAD,   /* four: int8 in rows, uint8 in columns; sums are int32 */
};

AVX512_INLINE __m512 add_floats(__m512 sum, __m512i row, __m512i columns, const int unit)
{
    if (unit == FLOAT32_ONE)
        return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(columns), sum);
    return _mm512_dpbf16_ps(sum, (__m512bh)columns, (__m512bh)row);
}

typedef int32_t int32x16 __attribute__((vector_size(64)));

AVX512_INLINE int32x16 add_quads(int32x16 sum, __m512i row, __m512i columns, const int unit)
{
    (void)unit;
    return (int32x16)_mm512_dpbusd_epi32((__m512i)sum, columns, row);
}

/* sums += x @ panel. x: `rows` rows of num_units units, x_stride bytes apart; panel: (num_units, 32) units, aligned to
 * 64 bytes. Each sum is taken in the order of the units. Meanwhile so many cache lines a unit are fetched from `next`.
 *
 * Two functions, since gcc copies sums from register to register where their type is not the instruction's. */
#define MULTIPLY_PANEL(NAME, SUM, ADD)                                                                         \
    AVX512_INLINE void NAME(SUM sums[MAX_ROWS][2], const int rows, const char *x, int64_t x_stride,            \
                            const char *panel, int64_t num_units, const char *next, const int next_lines,      \
                            const int unit)                                                                    \
    {                                                                                                          \
        for (int64_t at = 0; at < num_units; at++, panel += PANEL_UNIT_BYTES, x += UNIT_BYTES) {               \
            __m512i left = _mm512_load_si512(panel), right = _mm512_load_si512(panel + 64);                    \
            for (int line = 0; line < next_lines; line++, next += 64)                                          \
                _mm_prefetch(next, _MM_HINT_T1);                                                               \
            for (int r = 0; r < rows; r++) {                                                                   \
                int32_t numbers;                                                                               \
                __builtin_memcpy(&numbers, x + r * x_stride, sizeof numbers);                                  \
                __m512i row = _mm512_set1_epi32(numbers);                                                      \
                sums[r][0] = ADD(sums[r][0], row, left, unit);                                                 \
                sums[r][1] = ADD(sums[r][1], row, right, unit);                                                \
            }                                                                                                  \
        }                                                                                                      \
    }

MULTIPLY_PANEL(multiply_panel, __m512, add_floats)
MULTIPLY_PANEL(multiply_int8_panel, int32x16, add_quads)

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
