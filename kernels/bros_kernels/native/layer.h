/* A whole decoder layer of the Llama kind, so that between its parts nothing goes back to Python. */
#ifndef BROS_LAYER_H
#define BROS_LAYER_H

#include "attention.h"
#include "gemm.h"

struct bros_layer {
    const struct bros_attention *attention;
    const struct bros_linear *qkv, *output; /* before and after attention */
    const struct bros_linear *gated, *down; /* the MLP, of BROS_SILU_MUL and BROS_STORE */
};

/* hidden += output(attention(qkv(hidden))), then hidden += down(gated(hidden)), as `bros_multiply` and `bros_attend`
 * compute them. hidden: (step->num_tokens, size), contiguous, of the dtype of all parts. */
BROS_EXPORT void bros_run_layer(const struct bros_layer *layer, const struct bros_step *step, void *hidden,
                                const void *cos, const void *sin, int64_t rotary_dim, void *k, void *v);

#endif
