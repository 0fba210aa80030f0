#include "sampling.h"

#include <math.h>

#include "avx512.h"

struct most_likely_job {
    const void *logits;
    int64_t stride, vocab_size;
    int32_t dtype;
    int64_t *token_ids;
    float *logprobs;
};

AVX512_INLINE void most_likely(const struct most_likely_job *job, int64_t row, const int dtype)
{
    const void *logits = number_at(job->logits, row * job->stride, dtype);
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 best = lowest;
    __m512i best_at = _mm512_setzero_si512();
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 is_nan = 0;
    for (int64_t i = 0; i < job->vocab_size; i += 16) {
        __mmask16 lanes = lanes_below(job->vocab_size - i);
        __m512 x = load_numbers(logits, i, lanes, dtype);
        is_nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        __mmask16 is_better = _mm512_mask_cmp_ps_mask(lanes, x, best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, is_better, x);
        best_at = _mm512_mask_mov_epi32(best_at, is_better, at);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(16));
    }
    float maximum = _mm512_reduce_max_ps(best);
    __mmask16 is_best = _mm512_cmp_ps_mask(best, _mm512_set1_ps(maximum), _CMP_EQ_OQ);
    job->token_ids[row] = _mm512_mask_reduce_min_epu32(is_best, best_at);
    if (is_nan || !isfinite(maximum)) {
        job->logprobs[row] = NAN;
        return;
    }
    __m512 shift = _mm512_set1_ps(maximum), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < job->vocab_size; i += 16) {
        __mmask16 lanes = lanes_below(job->vocab_size - i);
        __m512 x = _mm512_mul_ps(_mm512_sub_ps(load_numbers(logits, i, lanes, dtype), shift), _mm512_set1_ps(LOG2E));
        total = _mm512_mask_add_ps(total, lanes, total, exp2_ps(x));
    }
    job->logprobs[row] = -logf(_mm512_reduce_add_ps(total));
}

#define MOST_LIKELY(DTYPE) most_likely(job, row, DTYPE)

AVX512 static void most_likely_tile(const void *argument, int64_t row)
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
