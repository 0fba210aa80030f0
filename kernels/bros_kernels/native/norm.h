#ifndef BROS_NORM_H
#define BROS_NORM_H

#include <stdint.h>

#include "pool.h"

/* out = x / rms(x) * weight. x: (num_rows, size), rows x_stride numbers apart; out: contiguous; weight: (size). */
BROS_EXPORT void bros_rms_norm(const uint16_t *x, int64_t x_stride, int64_t num_rows, int64_t size,
                               const uint16_t *weight, float eps, uint16_t *out);

#endif
