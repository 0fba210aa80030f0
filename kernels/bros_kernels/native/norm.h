#ifndef BROS_NORM_H
#define BROS_NORM_H

#include <stdint.h>

#include "dtype.h"
#include "pool.h"

/* The function x / rms(x) * (offset + weight). The offset is added in float32. */
struct bros_norm {
    const void *weight; /* (size), of the dtype that is normalised; NULL: the function is not applied */
    float eps, offset;
};

/* out = norm(x). x: (num_rows, size), rows x_stride numbers apart; out: contiguous. */
BROS_EXPORT void bros_rms_norm(const void *x, int64_t x_stride, int64_t num_rows, int64_t size,
                               const struct bros_norm *norm, int32_t dtype, void *out);

#endif
