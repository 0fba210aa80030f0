/* The small operations between products and attention, in bf16 with float32 arithmetic. */
#ifndef BROS_LAYERS_H
#define BROS_LAYERS_H

#include <stdint.h>

#include "pool.h"

/* out = x / rms(x) * weight. x: (num_rows, size), rows x_stride numbers apart; out: contiguous; weight: (size). */
BROS_EXPORT void bros_rms_norm(const uint16_t *x, int64_t x_stride, int64_t num_rows, int64_t size,
                               const uint16_t *weight, float eps, uint16_t *out);

/* Rotate the pairs (i, i + head_dim / 2) of x: (num_tokens, num_heads, head_dim), tokens x_stride numbers apart, in
 * place. cos and signed sin: (num_tokens, head_dim); head_dim is a multiple of 32. */
BROS_EXPORT void bros_rotate(uint16_t *x, int64_t x_stride, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
                             const uint16_t *cos, const uint16_t *sin);

#endif
