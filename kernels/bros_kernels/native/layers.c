#include "layers.h"

#include "avx512.h"

/* Rows of a tile. */
enum { TILE_ROWS = 8 };

struct norm_job {
    const uint16_t *x;
    int64_t x_stride, num_rows, size;
    const uint16_t *weight;
    float eps;
    uint16_t *out;
};

AVX512BF16 static void rms_norm_tile(const void *argument, int64_t tile)
{
    const struct norm_job *job = argument;
    for (int64_t row = tile * TILE_ROWS; row < job->num_rows && row < (tile + 1) * TILE_ROWS; row++) {
        const uint16_t *x = job->x + row * job->x_stride;
        uint16_t *out = job->out + row * job->size;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < job->size; i += 16) {
            __m512 part = load_bf16(x + i, lanes_below(job->size - i));
            squares = _mm512_fmadd_ps(part, part, squares);
        }
        float mean = _mm512_reduce_add_ps(squares) / (float)job->size;
        __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + job->eps));
        for (int64_t i = 0; i < job->size; i += 16) {
            __mmask16 lanes = lanes_below(job->size - i);
            __m512 scaled = _mm512_mul_ps(load_bf16(x + i, lanes), factor);
            store_bf16(out + i, _mm512_mul_ps(scaled, load_bf16(job->weight + i, lanes)), lanes);
        }
    }
}

void bros_rms_norm(const uint16_t *x, int64_t x_stride, int64_t num_rows, int64_t size, const uint16_t *weight,
                   float eps, uint16_t *out)
{
    struct norm_job job = {x, x_stride, num_rows, size, weight, eps, out};
    bros_run(rms_norm_tile, &job, (num_rows + TILE_ROWS - 1) / TILE_ROWS);
}

struct rotate_job {
    uint16_t *x;
    int64_t x_stride, num_tokens, num_heads, head_dim;
    const uint16_t *cos, *sin;
};

AVX512BF16 static void rotate_tile(const void *argument, int64_t tile)
{
    const struct rotate_job *job = argument;
    const int64_t half = job->head_dim / 2;
    for (int64_t token = tile * TILE_ROWS; token < job->num_tokens && token < (tile + 1) * TILE_ROWS; token++) {
        const uint16_t *cos = job->cos + token * job->head_dim, *sin = job->sin + token * job->head_dim;
        for (int64_t head = 0; head < job->num_heads; head++) {
            uint16_t *x = job->x + token * job->x_stride + head * job->head_dim;
            for (int64_t d = 0; d < half; d += 16) {
                __m512 low = load_bf16(x + d, 0xffff), high = load_bf16(x + half + d, 0xffff);
                __m512 new_low = _mm512_mul_ps(low, load_bf16(cos + d, 0xffff));
                __m512 new_high = _mm512_mul_ps(high, load_bf16(cos + half + d, 0xffff));
                store_bf16(x + d, _mm512_fmadd_ps(high, load_bf16(sin + d, 0xffff), new_low), 0xffff);
                store_bf16(x + half + d, _mm512_fmadd_ps(low, load_bf16(sin + half + d, 0xffff), new_high), 0xffff);
            }
        }
    }
}

void bros_rotate(uint16_t *x, int64_t x_stride, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
                 const uint16_t *cos, const uint16_t *sin)
{
    struct rotate_job job = {x, x_stride, num_tokens, num_heads, head_dim, cos, sin};
    bros_run(rotate_tile, &job, (num_tokens + TILE_ROWS - 1) / TILE_ROWS);
}
