/* What choosing a token needs of a whole vocabulary. */
#ifndef BROS_SAMPLING_H
#define BROS_SAMPLING_H

#include <stdint.h>

#include "dtype.h"
#include "pool.h"

/* Of each row of logits: the first of the largest, and its log-softmax, which is NaN where the row holds NaN or
 * infinity, or nothing but minus infinity. logits: (num_rows, vocab_size), rows stride numbers apart; the results:
 * (num_rows). */
BROS_EXPORT void bros_most_likely(const void *logits, int64_t stride, int64_t num_rows, int64_t vocab_size,
                                  int32_t dtype, int64_t *token_ids, float *logprobs);

#endif
