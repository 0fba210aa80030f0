/* Products with weights that were packed once. Every row of a result is computed in the same order whatever rows are
 * beside it, so a sequence gets the same tokens alone and in any batch. */
#ifndef BROS_GEMM_H
#define BROS_GEMM_H

#include <stdint.h>

#include "norm.h"
#include "pool.h"

/* Pack the n rows of a weight, of row_bytes each, as [n / 32][units][32]: a panel's weights in the order in which they
 * are multiplied. A unit is 4 bytes, filled up with zeros; columns beyond n are zero. `packed` holds
 * ceil(n / 32) * 32 * ceil(row_bytes / 4) * 4 bytes. */
BROS_EXPORT void bros_pack_weight(const char *w, int64_t n, int64_t row_bytes, char *packed);

/* What becomes of a sum before it is rounded and stored. */
enum bros_epilogue {
    BROS_STORE = 0,
    BROS_SILU_MUL = 1, /* of each 32 columns: silu(first 16) * last 16; the result has n / 2 columns */
};

/* A packed weight, and what is done beside the product.
 *
 * Weights are numbers of `dtype`, an even number of them a row in bf16, or int8, to which 128 was added before they
 * were packed, with a scale for each column. The inputs of those are rounded to int8 too, with a scale for each row,
 * largest magnitude / 127: the products are exact integers. */
struct bros_linear {
    const char *packed; /* aligned to 64 bytes */
    int64_t n, k;
    const float *scales;   /* (n): of int8 weights; NULL: the weights are of `dtype` */
    const float *bias;     /* (n), or NULL */
    struct bros_norm norm; /* of the inputs */
    int32_t dtype;         /* enum bros_dtype: of inputs and results */
    int32_t epilogue;
};

/* out = norm(x) @ w.T + bias + residual, with float32 or int32 sums. x: (m, k), rows x_stride numbers apart; residual,
 * which may be NULL: (m, n), contiguous; out: the same. For BROS_SILU_MUL out is (m, n / 2), and the residual has the
 * columns of gate in its first half and those of up in its second. */
BROS_EXPORT void bros_multiply(const struct bros_linear *linear, const void *x, int64_t x_stride, int64_t m,
                               const void *residual, void *out);

#endif
