/* `simd.h` for AVX2 with fused multiply-add: two registers hold 16 numbers. */
#ifndef BROS_AVX2_H
#define BROS_AVX2_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"

#define SIMD __attribute__((target("arch=x86-64-v3")))
#define SIMD_INLINE SIMD static inline __attribute__((always_inline))

static inline int simd_is_supported(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

typedef struct { __m256 low, high; } floats;
typedef struct { __m256i low, high; } ints;
typedef uint32_t lanes;

SIMD_INLINE lanes lanes_below(int64_t count)
{
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

/* The lanes as two registers: all bits of a number, or none. */
SIMD_INLINE ints spread(lanes chosen)
{
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i low = _mm256_set1_epi32((int32_t)chosen), high = _mm256_set1_epi32((int32_t)(chosen >> 8));
    return (ints){_mm256_cmpeq_epi32(_mm256_and_si256(low, bits), bits),
                  _mm256_cmpeq_epi32(_mm256_and_si256(high, bits), bits)};
}

/* Rows of bf16 are multiplied as floats, those of int8 as 16 bits: widened once, not in every product. */
static inline int row_dtype(int dtype)
{
    (void)dtype;
    return BROS_FLOAT32;
}
static inline int64_t row_unit_bytes(const int unit) { return unit == FLOAT32_ONE ? 4 : 8; }

/* 8 numbers of 16 bits as the upper halves of 8 floats. */
SIMD_INLINE __m256 widened(__m128i halves)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

SIMD_INLINE floats load_numbers(const void *x, int64_t at, int64_t count, const int dtype)
{
    if (dtype == BROS_FLOAT32) {
        const float *from = (const float *)x + at;
        if (count >= 16)
            return (floats){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
        const ints is_there = spread(lanes_below(count));
        return (floats){_mm256_maskload_ps(from, is_there.low), _mm256_maskload_ps(from + 8, is_there.high)};
    }
    const uint16_t *from = (const uint16_t *)x + at;
    uint16_t some[16] = {0};
    if (count < 16) {
        memcpy(some, from, count > 0 ? (size_t)count * sizeof *some : 0);
        from = some;
    }
    return (floats){widened(_mm_loadu_si128((const __m128i *)from)),
                    widened(_mm_loadu_si128((const __m128i *)from + 1))};
}

/* The upper halves of 8 floats, rounded to nearest even; NaN stays NaN. */
SIMD_INLINE __m256i narrowed(__m256 numbers)
{
    __m256i bits = _mm256_castps_si256(numbers);
    __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), is_odd));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}

SIMD_INLINE void store_numbers(void *x, int64_t at, floats numbers, int64_t count, const int dtype)
{
    if (dtype == BROS_FLOAT32) {
        float *to = (float *)x + at;
        if (count >= 16) {
            _mm256_storeu_ps(to, numbers.low);
            _mm256_storeu_ps(to + 8, numbers.high);
            return;
        }
        const ints is_there = spread(lanes_below(count));
        _mm256_maskstore_ps(to, is_there.low, numbers.low);
        _mm256_maskstore_ps(to + 8, is_there.high, numbers.high);
        return;
    }
    /* Packing works within halves of a register: the middle quarters change places. */
    __m256i halves = _mm256_packus_epi32(narrowed(numbers.low), narrowed(numbers.high));
    halves = _mm256_permute4x64_epi64(halves, 0xd8);
    uint16_t *to = (uint16_t *)x + at;
    if (count >= 16) {
        _mm256_storeu_si256((__m256i *)to, halves);
        return;
    }
    uint16_t some[16];
    _mm256_storeu_si256((__m256i *)some, halves);
    memcpy(to, some, count > 0 ? (size_t)count * sizeof *some : 0);
}

/* An operation on both registers. */
#define BOTH(TYPE, A, B, OPERATION) ((TYPE){OPERATION((A).low, (B).low), OPERATION((A).high, (B).high)})

SIMD_INLINE floats f_load(const float *x) { return (floats){_mm256_load_ps(x), _mm256_load_ps(x + 8)}; }
SIMD_INLINE void f_store(float *x, floats a)
{
    _mm256_store_ps(x, a.low);
    _mm256_store_ps(x + 8, a.high);
}
SIMD_INLINE floats f_all(float a) { return (floats){_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
SIMD_INLINE float f_first(floats a) { return _mm256_cvtss_f32(a.low); }
SIMD_INLINE floats f_add(floats a, floats b) { return BOTH(floats, a, b, _mm256_add_ps); }
SIMD_INLINE floats f_sub(floats a, floats b) { return BOTH(floats, a, b, _mm256_sub_ps); }
SIMD_INLINE floats f_mul(floats a, floats b) { return BOTH(floats, a, b, _mm256_mul_ps); }
SIMD_INLINE floats f_div(floats a, floats b) { return BOTH(floats, a, b, _mm256_div_ps); }
SIMD_INLINE floats f_max(floats a, floats b) { return BOTH(floats, a, b, _mm256_max_ps); }
SIMD_INLINE floats f_min(floats a, floats b) { return BOTH(floats, a, b, _mm256_min_ps); }
SIMD_INLINE floats f_fma(floats a, floats b, floats c)
{
    return (floats){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

SIMD_INLINE floats f_round(floats a)
{
    return (floats){_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                    _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

SIMD_INLINE float f_sum(floats a)
{
    __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

SIMD_INLINE float f_largest(floats a)
{
    __m256 eight = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/* The lanes of which two registers hold all bits. */
SIMD_INLINE lanes gathered(__m256 low, __m256 high)
{
    return (lanes)_mm256_movemask_ps(low) | (lanes)_mm256_movemask_ps(high) << 8;
}
SIMD_INLINE lanes f_is_greater(floats a, floats b)
{
    return gathered(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ));
}
SIMD_INLINE lanes f_is_equal(floats a, floats b)
{
    return gathered(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ));
}
SIMD_INLINE lanes f_is_nan(floats a)
{
    return gathered(_mm256_cmp_ps(a.low, a.low, _CMP_UNORD_Q), _mm256_cmp_ps(a.high, a.high, _CMP_UNORD_Q));
}
SIMD_INLINE floats f_where(lanes chosen, floats a, floats b)
{
    const ints is_chosen = spread(chosen);
    return (floats){_mm256_blendv_ps(b.low, a.low, _mm256_castsi256_ps(is_chosen.low)),
                    _mm256_blendv_ps(b.high, a.high, _mm256_castsi256_ps(is_chosen.high))};
}

/* a * 2 ** whole, by the float that has this exponent: whole is -126 to 127 where x is in range. */
SIMD_INLINE __m256 ldexp_normal(__m256 a, __m256 whole, __m256 x)
{
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    __m256 scaled = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}
SIMD_INLINE floats f_ldexp_normal(floats a, floats whole, floats x)
{
    return (floats){ldexp_normal(a.low, whole.low, x.low), ldexp_normal(a.high, whole.high, x.high)};
}

SIMD_INLINE ints i_all(int32_t a) { return (ints){_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
SIMD_INLINE ints i_count(void)
{
    return (ints){_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
SIMD_INLINE ints i_add(ints a, ints b) { return BOTH(ints, a, b, _mm256_add_epi32); }
SIMD_INLINE ints i_max(ints a, ints b) { return BOTH(ints, a, b, _mm256_max_epi32); }
SIMD_INLINE ints i_where(lanes chosen, ints a, ints b)
{
    const ints is_chosen = spread(chosen);
    return (ints){_mm256_blendv_epi8(b.low, a.low, is_chosen.low), _mm256_blendv_epi8(b.high, a.high, is_chosen.high)};
}

/* Of 8 numbers, after `OPERATION` of pairs at distances 4, 2 and 1. */
#define REDUCED(EIGHT, OPERATION)                                                                              \
    __m128i four = OPERATION(_mm256_castsi256_si128(EIGHT), _mm256_extracti128_si256(EIGHT, 1));               \
    four = OPERATION(four, _mm_shuffle_epi32(four, 0x4e));                                                     \
    return _mm_cvtsi128_si32(OPERATION(four, _mm_shuffle_epi32(four, 0xb1)))

SIMD_INLINE int32_t i_sum(ints a)
{
    __m256i eight = _mm256_add_epi32(a.low, a.high);
    REDUCED(eight, _mm_add_epi32);
}
SIMD_INLINE int32_t i_largest(ints a)
{
    __m256i eight = _mm256_max_epi32(a.low, a.high);
    REDUCED(eight, _mm_max_epi32);
}
SIMD_INLINE int32_t i_smallest(ints a)
{
    __m256i eight = _mm256_min_epi32(a.low, a.high);
    REDUCED(eight, _mm_min_epi32);
}
SIMD_INLINE floats f_of_ints(ints a) { return (floats){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
SIMD_INLINE ints i_round(floats a) { return (ints){_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
SIMD_INLINE ints i_magnitude_bits(floats a)
{
    const __m256i no_sign = _mm256_set1_epi32(0x7fffffff);
    return (ints){_mm256_and_si256(_mm256_castps_si256(a.low), no_sign),
                  _mm256_and_si256(_mm256_castps_si256(a.high), no_sign)};
}

/* Of each quad numbers 0 and 2, then 1 and 3: see `weights_of`. */
SIMD_INLINE void i_store_inputs(char *row, int64_t at, ints a, int64_t count)
{
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
    halves = _mm256_min_epi16(_mm256_max_epi16(halves, _mm256_set1_epi16(-128)), _mm256_set1_epi16(127));
    halves = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(halves, 0xd8), 0xd8);
    char *to = row + at * (int64_t)sizeof(int16_t), some[32];
    if (count >= 16) {
        _mm256_storeu_si256((__m256i *)to, halves);
        return;
    }
    _mm256_storeu_si256((__m256i *)some, halves);
    memcpy(to, some, (size_t)(count + 3) / 4 * 8);
}

/* out[i][j] = in[j][i], of 8 x 8 numbers of 32 bits. */
SIMD_INLINE void transpose_8x8(const __m256i in[8], char *out, int64_t out_stride)
{
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_store_si256((__m256i *)(out + i * out_stride), _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
        _mm256_store_si256((__m256i *)(out + (i + 4) * out_stride), _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
    }
}

SIMD_INLINE void transpose_units(const char *rows, int64_t row_bytes, int64_t count, char *out, int64_t out_stride)
{
    const ints is_there = spread(lanes_below(count));
    for (int unit = 0; unit < 16; unit += 8)
        for (int row = 0; row < 16; row += 8) {
            __m256i in[8];
            for (int i = 0; i < 8; i++) {
                const int *from = (const int *)(rows + (row + i) * row_bytes) + unit;
                in[i] = count >= 16 ? _mm256_loadu_si256((const __m256i *)from)
                                    : _mm256_maskload_epi32(from, unit ? is_there.high : is_there.low);
            }
            transpose_8x8(in, out + unit * out_stride + row * (int64_t)sizeof(int32_t), out_stride);
        }
}

SIMD_INLINE void interleave_bf16(const char *even, const char *odd, int64_t count, char *out)
{
    uint16_t some[2][32] = {{0}};
    if (count < 32) {
        const size_t num_bytes = count > 0 ? (size_t)count * sizeof(uint16_t) : 0;
        memcpy(some[0], even, num_bytes);
        even = (const char *)some[0];
        if (odd)
            memcpy(some[1], odd, num_bytes);
        odd = (const char *)some[1];
    } else if (!odd) {
        odd = (const char *)some[1];
    }
    for (int i = 0; i < 2; i++) {
        __m256i evens = _mm256_loadu_si256((const __m256i *)even + i);
        __m256i odds = _mm256_loadu_si256((const __m256i *)odd + i);
        __m256i low = _mm256_unpacklo_epi16(evens, odds), high = _mm256_unpackhi_epi16(evens, odds);
        _mm256_store_si256((__m256i *)(out + 64 * i), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_store_si256((__m256i *)(out + 64 * i + 32), _mm256_permute2x128_si256(low, high, 0x31));
    }
}

/* A register tile is computed in parts that fill the 16 registers: up to 3 rows times 4 registers of columns, or up to
 * 6 rows times 2, each with as many sums, and what is multiplied. */
enum { WIDE_ROWS = 3, NARROW_ROWS = 6 };

/* Of a loop over rows, columns or numbers of a unit: sums are in registers only where no index is left. */
#define UNROLL _Pragma("GCC unroll 6")

/* Columns as floats: `part` 0 and 1 of a pair of bf16. */
SIMD_INLINE __m256 column_of(__m256i units, const int part, const int unit)
{
    if (unit == FLOAT32_ONE)
        return _mm256_castsi256_ps(units);
    return _mm256_castsi256_ps(part ? _mm256_and_si256(units, _mm256_set1_epi32((int32_t)0xffff0000))
                                    : _mm256_slli_epi32(units, 16));
}

SIMD_INLINE __m256 broadcast_float(const char *x) { return _mm256_broadcast_ss((const float *)x); }
SIMD_INLINE __m256 add_floats(__m256 sum, __m256 row, __m256 columns) { return _mm256_fmadd_ps(row, columns, sum); }

/* Of int8, numbers 0 and 2 of a quad in 16 bits each, or 1 and 3. */
SIMD_INLINE __m256i weights_of(__m256i quads, const int part, const int unit)
{
    (void)unit;
    return part ? _mm256_srli_epi16(quads, 8) : _mm256_and_si256(quads, _mm256_set1_epi16(0xff));
}

SIMD_INLINE __m256i broadcast_pair(const char *x)
{
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm256_set1_epi32(pair);
}
SIMD_INLINE __m256i add_pairs(__m256i sum, __m256i row, __m256i columns)
{
    return _mm256_add_epi32(sum, _mm256_madd_epi16(row, columns));
}

/* sums += x @ panel, of `rows` rows and `width` registers of columns. A unit of columns is multiplied in parts, each
 * with 4 bytes of a row. */
#define MULTIPLY_PART(NAME, REGISTER, COLUMNS, BROADCAST, ADD)                                                 \
    SIMD_INLINE void NAME(REGISTER(*all_sums)[4], const int rows, const int width, const char *x,              \
                          int64_t x_stride, const char *panel, int64_t num_units, const char *next,            \
                          int num_lines, const int unit)                                                       \
    {                                                                                                          \
        const int num_parts = (int)row_unit_bytes(unit) / 4;                                                   \
        REGISTER sums[NARROW_ROWS][4];                                                                         \
        UNROLL for (int r = 0; r < rows; r++)                                                                  \
            UNROLL for (int c = 0; c < width; c++)                                                             \
                sums[r][c] = all_sums[r][c];                                                                   \
        for (int64_t at = 0; at < num_units; at++, panel += PANEL_UNIT_BYTES) {                                \
            for (int line = 0; line < num_lines; line++, next += 64)                                           \
                _mm_prefetch(next, _MM_HINT_T1);                                                               \
            UNROLL for (int part = 0; part < num_parts; part++, x += 4) {                                      \
                REGISTER columns[4];                                                                           \
                UNROLL for (int c = 0; c < width; c++)                                                         \
                    columns[c] = COLUMNS(_mm256_load_si256((const __m256i *)panel + c), part, unit);           \
                UNROLL for (int r = 0; r < rows; r++) {                                                        \
                    const REGISTER row = BROADCAST(x + r * x_stride);                                          \
                    UNROLL for (int c = 0; c < width; c++)                                                     \
                        sums[r][c] = ADD(sums[r][c], row, columns[c]);                                         \
                }                                                                                              \
            }                                                                                                  \
        }                                                                                                      \
        UNROLL for (int r = 0; r < rows; r++)                                                                  \
            UNROLL for (int c = 0; c < width; c++)                                                             \
                all_sums[r][c] = sums[r][c];                                                                   \
    }

MULTIPLY_PART(multiply_part, __m256, column_of, broadcast_float, add_floats)
MULTIPLY_PART(multiply_int8_part, __m256i, weights_of, broadcast_pair, add_pairs)

/* Parts of any height are functions of their own: inlined into every register tile they would take minutes to compile.
 * Of the parts of a tile the first ones fetch what is to be fetched, a line a unit each. */
#define PART_CASE(PART, ROWS, WIDTH, UNIT)                                                                     \
    case ROWS: PART(sums, ROWS, WIDTH, x, x_stride, panel, num_units, next, num_lines, UNIT); break;

#define MULTIPLY_PANEL(NAME, SUM, REGISTER, PART, UNIT)                                                        \
    SIMD __attribute__((noinline, unused)) static void NAME##_wide(                                            \
        REGISTER(*sums)[4], int rows, const char *x, int64_t x_stride, const char *panel, int64_t num_units,   \
        const char *next, int num_lines)                                                                       \
    {                                                                                                          \
        switch (rows) { PART_CASE(PART, 1, 4, UNIT) PART_CASE(PART, 2, 4, UNIT) PART_CASE(PART, 3, 4, UNIT) }  \
    }                                                                                                          \
    SIMD __attribute__((noinline, unused)) static void NAME##_narrow(                                          \
        REGISTER(*sums)[4], int rows, const char *x, int64_t x_stride, const char *panel, int64_t num_units,   \
        const char *next, int num_lines)                                                                       \
    {                                                                                                          \
        switch (rows) {                                                                                        \
            PART_CASE(PART, 3, 2, UNIT) PART_CASE(PART, 4, 2, UNIT)                                            \
            PART_CASE(PART, 5, 2, UNIT) PART_CASE(PART, 6, 2, UNIT)                                            \
        }                                                                                                      \
    }                                                                                                          \
    SIMD_INLINE void NAME(SUM all_sums[MAX_ROWS][2], int rows, const char *x, int64_t x_stride,                \
                          const char *panel, int64_t num_units, const char *next, int next_lines)              \
    {                                                                                                          \
        REGISTER(*sums)[4] = (REGISTER(*)[4])all_sums;                                                         \
        if (rows <= WIDE_ROWS) {                                                                               \
            NAME##_wide(sums, rows, x, x_stride, panel, num_units, next, next_lines);                          \
            return;                                                                                            \
        }                                                                                                      \
        const int upper = rows <= NARROW_ROWS ? rows : (rows + 1) / 2, rest = next_lines > 1;                  \
        for (int row = 0, height = upper; row < rows; row += height, height = rows - upper)                    \
            for (int half = 0; half < 2; half++) {                                                             \
                const int num_lines = row ? 0 : half ? rest : next_lines - rest;                               \
                NAME##_narrow((REGISTER(*)[4])(sums[row] + 2 * half), height, x + row * x_stride, x_stride,    \
                              panel + 64 * half, num_units, next, num_lines);                                  \
                next += num_lines * num_units * 64;                                                            \
            }                                                                                                  \
    }

MULTIPLY_PANEL(multiply_bf16, floats, __m256, multiply_part, BF16_PAIR)
MULTIPLY_PANEL(multiply_float32, floats, __m256, multiply_part, FLOAT32_ONE)
MULTIPLY_PANEL(multiply_int8, ints, __m256i, multiply_int8_part, INT8_QUAD)

SIMD_INLINE void multiply_panel(floats sums[MAX_ROWS][2], const int rows, const char *x, int64_t x_stride,
                                const char *panel, int64_t num_units, const char *next, const int next_lines,
                                const int unit)
{
    if (unit == BF16_PAIR)
        multiply_bf16(sums, rows, x, x_stride, panel, num_units, next, next_lines);
    else
        multiply_float32(sums, rows, x, x_stride, panel, num_units, next, next_lines);
}

SIMD_INLINE void multiply_int8_panel(ints sums[MAX_ROWS][2], const int rows, const char *x, int64_t x_stride,
                                     const char *panel, int64_t num_units, const char *next, const int next_lines,
                                     const int unit)
{
    (void)unit;
    multiply_int8(sums, rows, x, x_stride, panel, num_units, next, next_lines);
}

#endif
