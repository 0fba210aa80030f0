#include "gemm.h"

#include <math.h>
#include <string.h>

#include "avx512.h"

void bros_pack_weight(const char *w, int64_t n, int64_t row_bytes, char *packed)
{
    int64_t num_panels = (n + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < num_panels; panel++)
        for (int64_t at = 0; at < row_bytes; at += UNIT_BYTES)
            for (int64_t column = panel * PANEL; column < (panel + 1) * PANEL; column++, packed += UNIT_BYTES) {
                const int64_t num_bytes = at + UNIT_BYTES < row_bytes ? UNIT_BYTES : row_bytes - at;
                memset(packed, 0, UNIT_BYTES);
                if (column < n)
                    memcpy(packed, w + column * row_bytes + at, (size_t)num_bytes);
            }
}

/* Rows of a job's tile: at most so many that their inputs stay in the L2 cache while the panels pass by. Panels: the
 * next one is fetched meanwhile, so several are taken at a time where there are enough for all threads. */
enum { ROWS_PER_TILE = 8 * MAX_ROWS, MAX_PANELS_PER_TILE = 8, TILES_WANTED = 24 };

/* What a row of int8 inputs needs beside its numbers. */
struct row_scale {
    float scale;
    int32_t start; /* what its sums begin with: -128 * the sum of its numbers, since all weights are 128 too large */
};

struct multiply_job {
    const struct bros_linear *linear;
    int unit;
    int64_t num_units;
    const char *x; /* rows of units */
    int64_t x_stride, m;
    const struct row_scale *scales; /* (m) of int8 */
    const void *residual;
    void *out;
    int64_t num_panels, panels_per_tile, tiles_per_row;
};

/* The results of a register tile's sums: `rows` rows from `row`, the panel's 32 columns. */
AVX512 static __attribute__((noinline)) void finish(const struct multiply_job *job, int64_t row, int64_t panel,
                                                    __m512 sums[MAX_ROWS][2], int rows)
{
    const struct bros_linear *linear = job->linear;
    const int64_t column = panel * PANEL;
    for (int half = 0; half < 2; half++) {
        const int64_t at = column + 16 * half;
        const __mmask16 is_column = lanes_below(linear->n - at);
        for (int r = 0; linear->scales && r < rows; r++) {
            __m512 sum = _mm512_mul_ps(sums[r][half], _mm512_set1_ps(job->scales[row + r].scale));
            sums[r][half] = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(is_column, linear->scales + at));
        }
        for (int r = 0; linear->bias && r < rows; r++)
            sums[r][half] = _mm512_add_ps(sums[r][half], _mm512_maskz_loadu_ps(is_column, linear->bias + at));
        for (int r = 0; linear->epilogue == BROS_STORE && r < rows; r++) {
            const int64_t to = (row + r) * linear->n + at;
            if (job->residual)
                sums[r][half] = _mm512_add_ps(sums[r][half], load_numbers(job->residual, to, is_column, linear->dtype));
            store_numbers(job->out, to, sums[r][half], is_column, linear->dtype);
        }
    }
    for (int r = 0; linear->epilogue == BROS_SILU_MUL && r < rows; r++)
        store_numbers(job->out, (row + r) * (linear->n / 2) + column / 2, _mm512_mul_ps(silu(sums[r][0]), sums[r][1]),
                      0xffff, linear->dtype);
}

/* One register tile: `rows` rows from `row`, the panel's 32 columns. */
AVX512_INLINE void multiply(const struct multiply_job *job, int64_t row, int64_t panel, const char *next,
                            const int next_lines, const int rows, const int unit)
{
    const char *x = job->x + row * job->x_stride;
    const char *weights = job->linear->packed + panel * job->num_units * PANEL_UNIT_BYTES;
    __m512 sums[MAX_ROWS][2];
    if (unit == INT8_QUAD) {
        int32x16 totals[MAX_ROWS][2];
        for (int r = 0; r < rows; r++)
            totals[r][0] = totals[r][1] = (int32x16)_mm512_set1_epi32(job->scales[row + r].start);
        multiply_int8_panel(totals, rows, x, job->x_stride, weights, job->num_units, next, next_lines, unit);
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < 2; half++)
                sums[r][half] = _mm512_cvtepi32_ps((__m512i)totals[r][half]);
    } else {
        for (int r = 0; r < rows; r++)
            sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        multiply_panel(sums, rows, x, job->x_stride, weights, job->num_units, next, next_lines, unit);
    }
    finish(job, row, panel, sums, rows);
}

#define MULTIPLY_ALONE(ROWS) multiply(job, row, panel, next, 2, ROWS, unit)
#define MULTIPLY_IN_TURN(ROWS) multiply(job, row, panel, next, 1, ROWS, unit)

AVX512_INLINE void multiply_panels(const struct multiply_job *job, int64_t tile, const int unit)
{
    const int64_t panel_bytes = job->num_units * PANEL_UNIT_BYTES;
    int64_t first_row = tile / job->tiles_per_row * ROWS_PER_TILE;
    int64_t stop_row = first_row + ROWS_PER_TILE < job->m ? first_row + ROWS_PER_TILE : job->m;
    int64_t panel = tile % job->tiles_per_row * job->panels_per_tile;
    int64_t stop_panel = panel + job->panels_per_tile;
    if (stop_panel > job->num_panels)
        stop_panel = job->num_panels;
    for (; panel < stop_panel; panel++) {
        const char *next = job->linear->packed + (panel + 1) * panel_bytes;
        if (stop_row - first_row <= MAX_ROWS) {
            int64_t row = first_row;
            FOR_ROWS(stop_row - row, MULTIPLY_ALONE)
            continue;
        }
        /* The first two register tiles fetch half of the next panel each, the others what is there already. */
        for (int64_t row = first_row, rows; row < stop_row; row += rows) {
            rows = next_rows(stop_row - row);
            FOR_ROWS(rows, MULTIPLY_IN_TURN)
            next = job->linear->packed + (panel + 1) * panel_bytes + panel_bytes / 2;
        }
    }
}

AVX512 static void multiply_tile(const void *argument, int64_t tile)
{
    const struct multiply_job *job = argument;
    switch (job->unit) {
        case BF16_PAIR: multiply_panels(job, tile, BF16_PAIR); break;
        case FLOAT32_ONE: multiply_panels(job, tile, FLOAT32_ONE); break;
        case INT8_QUAD: multiply_panels(job, tile, INT8_QUAD); break;
    }
}

/* Rows of a tile while inputs are rounded to int8. */
enum { ROUNDED_ROWS_PER_TILE = 8 };

struct round_job {
    const void *x;
    int64_t x_stride, m, k;
    int dtype;
    char *rounded;
    int64_t rounded_stride;
    struct row_scale *scales;
};

/* x: k numbers, to int8, filled up with zeros to whole units. */
AVX512_INLINE struct row_scale round_row(const void *x, int64_t k, char *rounded, const int dtype)
{
    /* Among magnitudes, the bits of NaN are the largest: its scale makes every result of the row NaN. */
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 16) {
        __m512 magnitudes = _mm512_abs_ps(load_numbers(x, i, lanes_below(k - i), dtype));
        largest = _mm512_max_epu32(largest, _mm512_castps_si512(magnitudes));
    }
    float maximum = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epu32(largest))));
    __m512 inverse = _mm512_set1_ps(127.0f / fmaxf(maximum, 1e-30f));
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 16) {
        __m512 scaled = _mm512_mul_ps(load_numbers(x, i, lanes_below(k - i), dtype), inverse);
        __m512i numbers = _mm512_cvtps_epi32(scaled);
        total = _mm512_add_epi32(total, numbers);
        _mm512_mask_cvtsepi32_storeu_epi8(rounded + i, lanes_below((k - i + 3) / 4 * 4), numbers);
    }
    return (struct row_scale){maximum / 127.0f, -128 * _mm512_reduce_add_epi32(total)};
}

#define ROUND(DTYPE) job->scales[row] = round_row(x, job->k, rounded, DTYPE)

AVX512 static void round_tile(const void *argument, int64_t tile)
{
    const struct round_job *job = argument;
    int64_t stop = (tile + 1) * ROUNDED_ROWS_PER_TILE < job->m ? (tile + 1) * ROUNDED_ROWS_PER_TILE : job->m;
    for (int64_t row = tile * ROUNDED_ROWS_PER_TILE; row < stop; row++) {
        const void *x = number_at(job->x, row * job->x_stride, job->dtype);
        char *rounded = job->rounded + row * job->rounded_stride;
        FOR_DTYPE(job->dtype, ROUND)
    }
}

void bros_multiply(const struct bros_linear *linear, const void *x, int64_t x_stride, int64_t m, const void *residual,
                   void *out)
{
    const int64_t k = linear->k, rounded_stride = (k + 63) / 64 * 64;
    size_t normed_bytes = linear->norm.weight ? (size_t)((m * k * number_bytes(linear->dtype) + 63) / 64 * 64) : 0;
    size_t rounded_bytes = linear->scales ? (size_t)(m * rounded_stride) : 0;
    size_t scales_bytes = (size_t)m * sizeof(struct row_scale);
    char *scratch = bros_scratch(BROS_CALL_SCRATCH, normed_bytes + rounded_bytes + scales_bytes);
    if (linear->norm.weight) {
        bros_rms_norm(x, x_stride, m, k, &linear->norm, linear->dtype, scratch);
        x = scratch;
        x_stride = k;
    }
    struct multiply_job job = {.linear = linear, .m = m, .residual = residual, .out = out,
                               .num_panels = (linear->n + PANEL - 1) / PANEL};
    if (linear->scales) {
        struct row_scale *scales = (struct row_scale *)(scratch + normed_bytes + rounded_bytes);
        struct round_job rounding = {x, x_stride, m, k, linear->dtype, scratch + normed_bytes, rounded_stride, scales};
        bros_run(round_tile, &rounding, (m + ROUNDED_ROWS_PER_TILE - 1) / ROUNDED_ROWS_PER_TILE);
        job.unit = INT8_QUAD;
        job.num_units = (k + 3) / 4;
        job.x = rounding.rounded;
        job.x_stride = rounded_stride;
        job.scales = scales;
    } else {
        job.unit = linear->dtype == BROS_BF16 ? BF16_PAIR : FLOAT32_ONE;
        job.num_units = k * number_bytes(linear->dtype) / UNIT_BYTES;
        job.x = x;
        job.x_stride = x_stride * number_bytes(linear->dtype);
    }
    int64_t panels = job.num_panels / TILES_WANTED;
    job.panels_per_tile = panels < 1 ? 1 : panels < MAX_PANELS_PER_TILE ? panels : MAX_PANELS_PER_TILE;
    job.tiles_per_row = (job.num_panels + job.panels_per_tile - 1) / job.panels_per_tile;
    bros_run(multiply_tile, &job, (m + ROWS_PER_TILE - 1) / ROWS_PER_TILE * job.tiles_per_row);
}
