/* `simd.h` for AVX-512 with products of bf16 and int8: a register holds all 16 numbers. */
#ifndef BROS_AVX512_H
#define BROS_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "dtype.h"

/* The plain x86-64-v4 level lacks the products of bf16 and of int8. */
#define SIMD __attribute__((target("arch=x86-64-v4,avx512bf16,avx512vnni,prefer-vector-width=512")))
#define SIMD_INLINE SIMD static inline __attribute__((always_inline))

static inline int simd_is_supported(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

typedef __m512 floats;
/* Not __m512i: gcc copies sums from register to register where their type is not that of the instruction. */
typedef int32_t ints __attribute__((vector_size(64)));
typedef __mmask16 lanes;

static inline int row_dtype(int dtype) { return dtype; }
static inline int64_t row_unit_bytes(const int unit)
{
    (void)unit;
    return UNIT_BYTES;
}

SIMD_INLINE lanes lanes_below(int64_t count)
{
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (lanes)((1u << count) - 1);
}

SIMD_INLINE floats load_numbers(const void *x, int64_t at, int64_t count, const int dtype)
{
    if (dtype == BROS_FLOAT32)
        return _mm512_maskz_loadu_ps(lanes_below(count), (const float *)x + at);
    __m256i halves = _mm256_maskz_loadu_epi16(lanes_below(count), (const uint16_t *)x + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

SIMD_INLINE void store_numbers(void *x, int64_t at, floats numbers, int64_t count, const int dtype)
{
    if (dtype == BROS_FLOAT32)
        _mm512_mask_storeu_ps((float *)x + at, lanes_below(count), numbers);
    else
        _mm256_mask_storeu_epi16((uint16_t *)x + at, lanes_below(count), (__m256i)_mm512_cvtneps_pbh(numbers));
}

SIMD_INLINE floats f_load(const float *x) { return _mm512_load_ps(x); }
SIMD_INLINE void f_store(float *x, floats a) { _mm512_store_ps(x, a); }
SIMD_INLINE floats f_all(float a) { return _mm512_set1_ps(a); }
SIMD_INLINE float f_first(floats a) { return _mm512_cvtss_f32(a); }
SIMD_INLINE floats f_add(floats a, floats b) { return _mm512_add_ps(a, b); }
SIMD_INLINE floats f_sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
SIMD_INLINE floats f_mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
SIMD_INLINE floats f_div(floats a, floats b) { return _mm512_div_ps(a, b); }
SIMD_INLINE floats f_fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
SIMD_INLINE floats f_max(floats a, floats b) { return _mm512_max_ps(a, b); }
SIMD_INLINE floats f_min(floats a, floats b) { return _mm512_min_ps(a, b); }
SIMD_INLINE float f_sum(floats a) { return _mm512_reduce_add_ps(a); }
SIMD_INLINE float f_largest(floats a) { return _mm512_reduce_max_ps(a); }
SIMD_INLINE lanes f_is_greater(floats a, floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
SIMD_INLINE lanes f_is_equal(floats a, floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
SIMD_INLINE lanes f_is_nan(floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
SIMD_INLINE floats f_where(lanes chosen, floats a, floats b) { return _mm512_mask_mov_ps(b, chosen, a); }

SIMD_INLINE floats f_round(floats a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

SIMD_INLINE floats f_ldexp_normal(floats a, floats whole, floats x)
{
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), a, whole);
}

SIMD_INLINE ints i_all(int32_t a) { return (ints)_mm512_set1_epi32(a); }
SIMD_INLINE ints i_count(void)
{
    return (ints)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
SIMD_INLINE ints i_add(ints a, ints b) { return (ints)_mm512_add_epi32((__m512i)a, (__m512i)b); }
SIMD_INLINE ints i_max(ints a, ints b) { return (ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
SIMD_INLINE ints i_where(lanes chosen, ints a, ints b)
{
    return (ints)_mm512_mask_mov_epi32((__m512i)b, chosen, (__m512i)a);
}
SIMD_INLINE int32_t i_sum(ints a) { return _mm512_reduce_add_epi32((__m512i)a); }
SIMD_INLINE int32_t i_largest(ints a) { return _mm512_reduce_max_epi32((__m512i)a); }
SIMD_INLINE int32_t i_smallest(ints a) { return _mm512_reduce_min_epi32((__m512i)a); }
SIMD_INLINE floats f_of_ints(ints a) { return _mm512_cvtepi32_ps((__m512i)a); }
SIMD_INLINE ints i_round(floats a) { return (ints)_mm512_cvtps_epi32(a); }
SIMD_INLINE ints i_magnitude_bits(floats a) { return (ints)_mm512_castps_si512(_mm512_abs_ps(a)); }

SIMD_INLINE void i_store_inputs(char *row, int64_t at, ints a, int64_t count)
{
    _mm512_mask_cvtsepi32_storeu_epi8(row + at, lanes_below((count + 3) / 4 * 4), (__m512i)a);
}

SIMD_INLINE void transpose_units(const char *rows, int64_t row_bytes, int64_t count, char *out, int64_t out_stride)
{
    __m512i in[16], a[16], b[16];
    for (int i = 0; i < 16; i++)
        in[i] = _mm512_maskz_loadu_epi32(lanes_below(count), rows + i * row_bytes);
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_store_si512(out + i * out_stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
        _mm512_store_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
    }
}

SIMD_INLINE void interleave_bf16(const char *even, const char *odd, int64_t count, char *out)
{
    const __mmask32 is_there = (__mmask32)lanes_below(count - 16) << 16 | lanes_below(count);
    const __m512i places = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                            37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    __m512i evens = _mm512_maskz_loadu_epi16(is_there, even);
    __m512i odds = _mm512_maskz_loadu_epi16(odd ? is_there : 0, odd);
    _mm512_store_si512(out, _mm512_permutex2var_epi16(evens, places, odds));
    _mm512_store_si512(
        out + 64, _mm512_permutex2var_epi16(evens, _mm512_add_epi16(places, _mm512_set1_epi16(16)), odds));
}

SIMD_INLINE floats add_floats(floats sum, __m512i row, __m512i columns, const int unit)
{
    if (unit == FLOAT32_ONE)
        return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(columns), sum);
    return _mm512_dpbf16_ps(sum, (__m512bh)columns, (__m512bh)row);
}

SIMD_INLINE ints add_quads(ints sum, __m512i row, __m512i columns, const int unit)
{
    (void)unit;
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, columns, row);
}

/* 12 x 2 sums, 2 loads and a broadcast unit fill the 32 registers. Two functions, for the same reason as `ints`. */
#define MULTIPLY_PANEL(NAME, SUM, ADD)                                                                         \
    SIMD_INLINE void NAME(SUM sums[MAX_ROWS][2], const int rows, const char *x, int64_t x_stride,              \
                          const char *panel, int64_t num_units, const char *next, const int next_lines,        \
                          const int unit)                                                                      \
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

MULTIPLY_PANEL(multiply_panel, floats, add_floats)
MULTIPLY_PANEL(multiply_int8_panel, ints, add_quads)

#endif
