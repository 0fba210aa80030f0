/* Softmax attention over a paged region, read in place, in bf16 with float32 sums.
 *
 * A region of one layer is keys and values of shape (num_blocks, block_size, num_kv_heads, head_dim) each. Where a
 * sequence's tokens lie in it say signed entries of a block table: entry >= 0 is block `entry`, offset o in slot o;
 * entry < 0 is block `~entry`, offset o in slot block_size - 1 - o.
 *
 * Keys are walked in logical order, in tiles that begin at multiples of their size, and every query row is computed in
 * the same order whatever rows are beside it. So a token's result is the same to the last bit in any batch, any
 * chunking and any mix of directions. */
#ifndef BROS_ATTENTION_H
#define BROS_ATTENTION_H

#include <stdint.h>

#include "pool.h"

/* Query tokens that are computed together: some of one sequence. */
struct bros_queries {
    int32_t sequence;
    int32_t first_token; /* row of q */
    int32_t num_tokens;
    int32_t first_position; /* logical position of the first one */
};

/* What all layers of one step share. */
struct bros_step {
    const struct bros_queries *queries;
    int64_t num_queries;
    const int32_t *block_table; /* (sequences, table_width) */
    int64_t table_width;
    int64_t block_size; /* a power of two, at least 16 */
};

/* Most query rows (tokens x heads that share a key head) in one `bros_queries`, and most numbers of a head. */
enum { BROS_MAX_QUERY_ROWS = 48, BROS_MAX_HEAD_DIM = 256 };

/* out[t, h] = softmax(scale * q[t, h] . k) v, over the keys up to the token's own position, the last `window` of them
 * where window > 0. q: (tokens, num_heads, head_dim), tokens q_stride numbers apart; out likewise, contiguous. head_dim is a
 * multiple of 32; query head h reads key head h / (num_heads / num_kv_heads). */
BROS_EXPORT void bros_attend(const struct bros_step *step, const uint16_t *q, int64_t q_stride, const uint16_t *k,
                             const uint16_t *v, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, float scale,
                             int64_t window, uint16_t *out);

/* Store keys and values of new tokens, (num_tokens, row_size) each, tokens k_stride and v_stride numbers apart, in their
 * slots. */
BROS_EXPORT void bros_write_kv(const uint16_t *k_new, int64_t k_stride, const uint16_t *v_new, int64_t v_stride,
                               int64_t num_tokens, int64_t row_size, const int64_t *slots, uint16_t *k, uint16_t *v);

#endif
