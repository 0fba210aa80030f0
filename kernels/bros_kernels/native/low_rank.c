#include "low_rank.h"

#include <string.h>

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

void bros_add_low_ranks(const struct bros_low_rank *parts, int64_t num_parts, const void *x, int64_t x_stride,
                        int64_t m, const void *residual, void *out)
{
    const int64_t k = parts->down->k, n = parts->up->n;
    const int dtype = parts->down->dtype;
    const size_t row_bytes = (size_t)(k * number_bytes(dtype)), sum_bytes = (size_t)(n * number_bytes(dtype));
    int64_t most_rows = 0, most_between = 0;
    for (int64_t i = 0; i < num_parts; i++) {
        most_rows = largest(most_rows, parts[i].num_rows);
        most_between = largest(most_between, parts[i].num_rows * parts[i].down->n);
    }
    /* A part's inputs, what is between its two products, and its rows of the result. */
    char *inputs = bros_scratch(BROS_OUTER_SCRATCH, (size_t)most_rows * (row_bytes + sum_bytes) +
                                                        (size_t)(most_between * number_bytes(dtype)));
    char *sums = inputs + (size_t)most_rows * row_bytes, *between = sums + (size_t)most_rows * sum_bytes;
    if (residual)
        memcpy(out, residual, (size_t)m * sum_bytes);
    else
        memset(out, 0, (size_t)m * sum_bytes);
    for (const struct bros_low_rank *part = parts; part < parts + num_parts; part++) {
        for (int64_t i = 0; i < part->num_rows; i++) {
            const int64_t row = part->rows[i];
            memcpy(inputs + (size_t)i * row_bytes, number_at(x, row * x_stride, dtype), row_bytes);
            memcpy(sums + (size_t)i * sum_bytes, number_at(out, row * n, dtype), sum_bytes);
        }
        bros_multiply(part->down, inputs, k, part->num_rows, NULL, between);
        bros_multiply(part->up, between, part->down->n, part->num_rows, sums, sums);
        for (int64_t i = 0; i < part->num_rows; i++)
            memcpy(number_at(out, part->rows[i] * n, dtype), sums + (size_t)i * sum_bytes, sum_bytes);
    }
}
