/* What the kernels compute with: 16 numbers at a time, and the register tile of all products.
 *
 * The sources are compiled once for each set of instructions, which has these in a header of its own, in functions
 * marked SIMD or SIMD_INLINE. `floats` and `ints` are 16 numbers of 32 bits, `lanes` says which of 16 are meant, one bit
 * each. Of 16 numbers from some place, `count` are there: 16 or more is all of them, none or less is none.
 *
 *     lanes_below(count)                              the first `count` lanes
 *     load_numbers(x, at, count, dtype)               x[at], x[at + 1], ...; 0 where there is none
 *     store_numbers(x, at, numbers, count, dtype)     rounded to nearest even, as torch does
 *     f_load(x), f_store(x, a)                        16 floats, aligned to 64 bytes
 *     f_all(a), f_first(a)                            a in all lanes; lane 0
 *     f_add, f_sub, f_mul, f_div                      of each lane
 *     f_fma(a, b, c)                                  a * b + c, rounded once
 *     f_max(a, b), f_min(a, b)                        b where either is NaN
 *     f_round(a)                                      to the nearest whole number
 *     f_sum(a), f_largest(a)                          over the lanes
 *     f_is_greater(a, b), f_is_equal(a, b), f_is_nan(a)
 *     f_where(lanes, a, b)                            a in those lanes, b in the others
 *     f_ldexp_normal(a, whole, x)                     a * 2 ** whole where x >= -126 or x is NaN, else 0
 *     i_all, i_add, i_max, i_where, i_sum, i_largest, i_smallest; i_count(): 0, 1, 2, ...
 *     f_of_ints(a), i_round(a)                        to float and, to nearest even, back
 *     i_magnitude_bits(a)                             the bits of |a|: larger numbers have larger ones, NaN the largest
 *     i_store_inputs(row, at, a, count)               numbers `at`, ... of a row of int8, the nearest that there are,
 *                                                     filled up with zeros to whole units; `at` is a multiple of 16
 *     transpose_units(rows, row_bytes, count, out, out_stride)
 *                                                     out[j][i] = rows[i][j], of 16 rows of `count` units
 *     interleave_bf16(even, odd, count, out)          even[0], odd[0], even[1], ...: of 32 numbers of which `count` are
 *                                                     there, 0 for the others; odd may be NULL: zeros
 *     multiply_panel, multiply_int8_panel             see below
 */
#ifndef BROS_SIMD_H
#define BROS_SIMD_H

#include <stddef.h>
#include <stdint.h>

#include "dtype.h"
#include "norm.h"

#define LOG2E 1.44269504f

/* The register tile of all products: up to 12 rows times a panel of 32 columns. */
enum { PANEL = 32, MAX_ROWS = 12 };

/* Rows and columns are multiplied in units of 4 bytes. */
enum { UNIT_BYTES = 4, PANEL_UNIT_BYTES = PANEL * UNIT_BYTES };
enum bros_unit {
    BF16_PAIR,   /* two numbers */
    FLOAT32_ONE, /* one */
    INT8_QUAD,   /* four: int8 in rows, uint8 in columns; sums are int32 */
};

/* Rows may be in a form of the instruction set's own: row_unit_bytes(unit) bytes a unit; those of numbers of `dtype` are
 * numbers of row_dtype(dtype). */

/* multiply_panel(floats sums[MAX_ROWS][2], rows, x, x_stride, panel, num_units, next, next_lines, unit), and
 * multiply_int8_panel with `ints`: sums += x @ panel. x: `rows` rows of num_units units, x_stride bytes apart; panel:
 * (num_units, 32) units, aligned to 64 bytes. Each sum is taken in the order of the units whatever `rows` is. Meanwhile
 * so many cache lines a unit are fetched from `next`. */
#ifdef BROS_AVX2
#include "avx2.h"
#else
#include "avx512.h"
#endif

/* 2 ** x, to 2 units in the last place for -126 <= x <= 127; 0 below, NaN of NaN. The polynomial is the minimax one of
 * degree 6 on [-1/2, 1/2] of the Cephes library's exp2f. */
SIMD_INLINE floats exp2_of(floats x)
{
    floats whole = f_round(x), part = f_sub(x, whole);
    floats p = f_all(1.535336188319500e-4f);
    p = f_fma(p, part, f_all(1.339887440266574e-3f));
    p = f_fma(p, part, f_all(9.618437357674640e-3f));
    p = f_fma(p, part, f_all(5.550332471162809e-2f));
    p = f_fma(p, part, f_all(2.402264791363012e-1f));
    p = f_fma(p, part, f_all(6.931472028550421e-1f));
    p = f_fma(p, part, f_all(1.0f));
    return f_ldexp_normal(p, whole, x);
}

/* x / (1 + exp(-x)). */
SIMD_INLINE floats silu(floats x)
{
    floats minus_x_log2e = f_min(f_mul(x, f_all(-LOG2E)), f_all(126.0f));
    return f_div(x, f_add(f_all(1.0f), exp2_of(minus_x_log2e)));
}

/* tanh(x) = 1 - 2 / (1 + exp(2 x)), to 2e-7; NaN of NaN. */
SIMD_INLINE floats tanh_of(floats x)
{
    floats two_x_log2e = f_min(f_all(126.0f), f_mul(x, f_all(2.0f * LOG2E)));
    return f_sub(f_all(1.0f), f_div(f_all(2.0f), f_add(f_all(1.0f), exp2_of(two_x_log2e))));
}

/* out = norm(x), of `size` numbers; out may be x. */
SIMD_INLINE void normalise(const void *x, int64_t size, const struct bros_norm *norm, void *out, const int dtype)
{
    floats squares = f_all(0.0f);
    for (int64_t i = 0; i < size; i += 16) {
        floats part = load_numbers(x, i, size - i, dtype);
        squares = f_fma(part, part, squares);
    }
    float mean = f_sum(squares) / (float)size;
    floats factor = f_all(1.0f / __builtin_sqrtf(mean + norm->eps)), offset = f_all(norm->offset);
    for (int64_t i = 0; i < size; i += 16) {
        floats scaled = f_mul(load_numbers(x, i, size - i, dtype), factor);
        floats weight = f_add(load_numbers(norm->weight, i, size - i, dtype), offset);
        store_numbers(out, i, f_mul(scaled, weight), size - i, dtype);
    }
}

/* x: `count` numbers, to a row as it is multiplied. */
SIMD_INLINE void form_row(const void *x, int64_t count, void *row, const int dtype)
{
    if (row_dtype(dtype) == dtype)
        __builtin_memcpy(row, x, (size_t)(count * number_bytes(dtype)));
    else
        for (int64_t i = 0; i < count; i += 16)
            store_numbers(row, i, load_numbers(x, i, count - i, dtype), count - i, row_dtype(dtype));
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
