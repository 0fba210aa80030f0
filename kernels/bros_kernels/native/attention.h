/* Softmax attention over a paged region, read in place, with float32 sums.
 *
 * A region of one layer is keys and values of shape (num_blocks, block_size, num_kv_heads, head_dim) each. Where a
 * sequence's tokens lie in it say signed entries of a block table: entry >= 0 is block `entry`, offset o in slot o;
 * entry < 0 is block `~entry`, offset o in slot block_size - 1 - o.
 *
 * Keys are walked in logical order, in tiles and spans that begin at multiples of their size, and every query row is
 * computed in the same order whatever rows are beside it. So a token's result is the same to the last bit in any batch,
 * any chunking and any mix of directions. */
#ifndef BROS_ATTENTION_H
#define BROS_ATTENTION_H

#include <stdint.h>

#include "norm.h"
#include "pool.h"

/* Keys of a span: each has a softmax of its own, and theirs are merged in order. So whether one thread takes all spans
 * of a sequence or each another makes no difference. */
enum { BROS_SPAN_KEYS = 512 };

/* Query tokens that are computed together: some of one sequence. */
struct bros_queries {
    int32_t sequence;
    int32_t first_token; /* row of qkv */
    int32_t num_tokens;
    int32_t first_position; /* logical position of the first one */
    int32_t first_key, stop_key; /* the first one is a multiple of BROS_SPAN_KEYS */
    int32_t part; /* -1: the keys are all that the tokens see; else they are one span, and this is the number of the
                     first row among the rows of all such parts */
};

/* Query tokens whose keys are split into parts, which follow each other. */
struct bros_split {
    int32_t first_token, num_tokens;
    int32_t first_part, num_parts;
};

/* What all layers of one step share. */
struct bros_step {
    int64_t num_tokens;
    const int64_t *slots; /* of each token */
    const struct bros_queries *queries;
    int64_t num_queries;
    const struct bros_split *splits;
    int64_t num_splits, num_part_rows;
    const int32_t *block_table; /* (sequences, table_width) */
    int64_t table_width;
    int64_t block_size; /* a power of two, at least 16 */
};

/* Most query rows (tokens x heads that share a key head) in one `bros_queries`, and most numbers of a head. */
enum { BROS_MAX_QUERY_ROWS = 48, BROS_MAX_HEAD_DIM = 256 };

/* What one layer's attention is like. */
struct bros_attention {
    int64_t num_heads, num_kv_heads; /* query head h reads key head h / (num_heads / num_kv_heads) */
    int64_t head_dim;                /* even in bf16 */
    int64_t window;                  /* a token sees so many tokens up to itself; 0: all of them */
    struct bros_norm q_norm, k_norm; /* of each head */
    float scale;
    float softcap;  /* a score s becomes softcap * tanh(s / softcap); 0: it stays */
    int32_t dtype;  /* enum bros_dtype: of queries, keys, values and results */
};

/* Attention of a step's new tokens: normalise and rotate their queries and keys, store keys and values, attend.
 *
 * qkv: (num_tokens, num_heads + 2 * num_kv_heads, head_dim), overwritten; cos and sin: (num_tokens, rotary_dim), sin
 * negative in the first half, or both NULL; rotary_dim: even, how many numbers of a head are rotated, the first ones;
 * k, v: the layer's region; out: (num_tokens, num_heads, head_dim). */
BROS_EXPORT void bros_attend(const struct bros_step *step, const struct bros_attention *attention, void *qkv,
                             const void *cos, const void *sin, int64_t rotary_dim, void *k, void *v, void *out);

#endif
