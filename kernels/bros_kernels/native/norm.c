#include "norm.h"

#include "simd.h"

/* Rows of a tile. */
enum { TILE_ROWS = 8 };

struct norm_job {
    const void *x;
    int64_t x_stride, num_rows, size;
    const struct bros_norm *norm;
    int32_t dtype;
    void *out;
};

#define NORMALISE(DTYPE) normalise(x, job->size, job->norm, out, DTYPE)

SIMD static void rms_norm_tile(const void *argument, int64_t tile)
{
    const struct norm_job *job = argument;
    for (int64_t row = tile * TILE_ROWS; row < job->num_rows && row < (tile + 1) * TILE_ROWS; row++) {
        const void *x = number_at(job->x, row * job->x_stride, job->dtype);
        void *out = number_at(job->out, row * job->size, job->dtype);
        FOR_DTYPE(job->dtype, NORMALISE)
    }
}

void bros_rms_norm(const void *x, int64_t x_stride, int64_t num_rows, int64_t size, const struct bros_norm *norm,
                   int32_t dtype, void *out)
{
    struct norm_job job = {x, x_stride, num_rows, size, norm, dtype, out};
    bros_run(rms_norm_tile, &job, (num_rows + TILE_ROWS - 1) / TILE_ROWS);
}
