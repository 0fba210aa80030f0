/* What adapters add to a product: for some of its rows each, a low-rank product of the same inputs. */
#ifndef BROS_LOW_RANK_H
#define BROS_LOW_RANK_H

#include "gemm.h"

/* up(down(x)) of the rows `rows`, of which there are num_rows, at least one. */
struct bros_low_rank {
    const struct bros_linear *down, *up;
    const int64_t *rows;
    int64_t num_rows;
};

/* out = residual, or zeros where that is NULL, and what each part adds to its rows; no row is in two parts. x: (m, k), rows
 * x_stride numbers apart; residual and out: (m, n), contiguous. All parts have the same k, n and dtype. */
BROS_EXPORT void bros_add_low_ranks(const struct bros_low_rank *parts, int64_t num_parts, const void *x,
                                    int64_t x_stride, int64_t m, const void *residual, void *out);

#endif
