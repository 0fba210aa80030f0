#include "sampling.h"

#include <math.h>

#include "simd.h"

struct most_likely_job {
    const void *logits;
    int64_t stride, vocab_size;
    int32_t dtype;
    int64_t *token_ids;
    float *logprobs;
};

SIMD_INLINE void most_likely(const struct most_likely_job *job, int64_t row, const int dtype)
{
    const void *logits = number_at(job->logits, row * job->stride, dtype);
    floats best = f_all(-INFINITY);
    ints best_at = i_all(0), at = i_count();
    lanes is_nan = 0;
    for (int64_t i = 0; i < job->vocab_size; i += 16, at = i_add(at, i_all(16))) {
        floats x = load_numbers(logits, i, job->vocab_size - i, dtype);
        is_nan |= f_is_nan(x);
        lanes is_better = f_is_greater(x, best) & lanes_below(job->vocab_size - i);
        best = f_where(is_better, x, best);
        best_at = i_where(is_better, at, best_at);
    }
    float maximum = f_largest(best);
    lanes is_best = f_is_equal(best, f_all(maximum));
    job->token_ids[row] = i_smallest(i_where(is_best, best_at, i_all(INT32_MAX)));
    if (is_nan || !isfinite(maximum)) {
        job->logprobs[row] = NAN;
        return;
    }
    const floats shift = f_all(maximum), nothing = f_all(0.0f);
    floats total = nothing;
    for (int64_t i = 0; i < job->vocab_size; i += 16) {
        floats x = f_sub(load_numbers(logits, i, job->vocab_size - i, dtype), shift);
        floats share = exp2_of(f_mul(x, f_all(LOG2E)));
        total = f_add(total, f_where(lanes_below(job->vocab_size - i), share, nothing));
    }
    job->logprobs[row] = -logf(f_sum(total));
}

#define MOST_LIKELY(DTYPE) most_likely(job, row, DTYPE)

SIMD static void most_likely_tile(const void *argument, int64_t row)
{
    const struct most_likely_job *job = argument;
    FOR_DTYPE(job->dtype, MOST_LIKELY)
}

void bros_most_likely(const void *logits, int64_t stride, int64_t num_rows, int64_t vocab_size, int32_t dtype,
                      int64_t *token_ids, float *logprobs)
{
    struct most_likely_job job = {logits, stride, vocab_size, dtype, token_ids, logprobs};
    bros_run(most_likely_tile, &job, num_rows);
}
