/* Products with bf16 weights that were packed once. Every row of a result is computed in the same order whatever rows
 * are beside it, so a sequence gets the same tokens alone and in any batch. */
#ifndef BROS_GEMM_H
#define BROS_GEMM_H

#include <stdint.h>

#include "norm.h"
#include "pool.h"

/* Pack w: (n, k) as [n / 32][k / 2][32][2]: a panel's weights in the order in which they are multiplied, two of a
 * column side by side. k is even; columns beyond n are zero. `packed` holds ceil(n / 32) * 32 * k numbers. */
BROS_EXPORT void bros_pack_weight(const uint16_t *w, int64_t n, int64_t k, uint16_t *packed);

/* What becomes of a sum before it is rounded and stored. */
enum bros_epilogue {
    BROS_STORE = 0,
    BROS_SILU_MUL = 1, /* of each 32 columns: silu(first 16) * last 16; the result has n / 2 columns */
};

/* A packed weight, and what is done beside the product. */
struct bros_linear {
    const uint16_t *packed; /* aligned to 64 bytes */
    int64_t n, k;
    const float *bias;          /* (n), or NULL */
    struct bros_norm norm;      /* of the inputs */
    int32_t epilogue;
};

/* out = norm(x) @ w.T + bias + residual, in bf16 with float32 sums. x: (m, k), rows x_stride numbers apart; out and
 * residual, which may be NULL: contiguous, (m, n), or (m, n / 2) for BROS_SILU_MUL, which adds no residual. */
BROS_EXPORT void bros_multiply(const struct bros_linear *linear, const uint16_t *x, int64_t x_stride, int64_t m,
                               const uint16_t *residual, uint16_t *out);

#endif
