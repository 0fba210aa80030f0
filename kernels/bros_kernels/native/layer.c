#include "layer.h"

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

void bros_run_layer(const struct bros_layer *layer, const struct bros_step *step, void *hidden, const void *cos,
                    const void *sin, int64_t rotary_dim, void *k, void *v)
{
    const int64_t num_tokens = step->num_tokens, size = layer->qkv->k;
    const int64_t attended_size = layer->output->k, inner_size = layer->down->k;
    const int dtype = layer->attention->dtype;
    /* What the first product of either half gives, and what attention gives. */
    const int64_t product_size = num_tokens * largest(layer->qkv->n, inner_size);
    void *product = bros_scratch(
        BROS_OUTER_SCRATCH, (size_t)((product_size + num_tokens * attended_size) * number_bytes(dtype)));
    void *attended = number_at(product, product_size, dtype);
    bros_multiply(layer->qkv, hidden, size, num_tokens, NULL, product);
    bros_attend(step, layer->attention, product, cos, sin, rotary_dim, k, v, attended);
    bros_multiply(layer->output, attended, attended_size, num_tokens, hidden, hidden);
    bros_multiply(layer->gated, hidden, size, num_tokens, NULL, product);
    bros_multiply(layer->down, product, inner_size, num_tokens, hidden, hidden);
}
