#include "gemm.h"

#include <math.h>
#include <string.h>

#include "simd.h"

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
SIMD static __attribute__((noinline)) void finish(const struct multiply_job *job, int64_t row, int64_t panel,
                                                  floats sums[MAX_ROWS][2], int rows)
{
    const struct bros_linear *linear = job->linear;
    const int64_t column = panel * PANEL;
    const int is_gated = linear->epilogue == BROS_SILU_MUL;
    for (int half = 0; half < 2; half++) {
        const int64_t at = column + 16 * half, count = linear->n - at;
        /* Where this half's columns are in what is added: there, those of gate come first, then those of up. */
        const int64_t added = is_gated ? half * (linear->n / 2) + column / 2 : at;
        for (int r = 0; linear->scales && r < rows; r++) {
            floats sum = f_mul(sums[r][half], f_all(job->scales[row + r].scale));
            sums[r][half] = f_mul(sum, load_numbers(linear->scales, at, count, BROS_FLOAT32));
        }
        for (int r = 0; linear->bias && r < rows; r++)
            sums[r][half] = f_add(sums[r][half], load_numbers(linear->bias, at, count, BROS_FLOAT32));
        for (int r = 0; job->residual && r < rows; r++)
            sums[r][half] = f_add(
                sums[r][half], load_numbers(job->residual, (row + r) * linear->n + added, count, linear->dtype));
        for (int r = 0; !is_gated && r < rows; r++)
            store_numbers(job->out, (row + r) * linear->n + at, sums[r][half], count, linear->dtype);
    }
    for (int r = 0; is_gated && r < rows; r++)
        store_numbers(job->out, (row + r) * (linear->n / 2) + column / 2, f_mul(silu(sums[r][0]), sums[r][1]), 16,
                      linear->dtype);
}

/* One register tile: `rows` rows from `row`, the panel's 32 columns. */
SIMD_INLINE void multiply(const struct multiply_job *job, int64_t row, int64_t panel, const char *next,
                            const int next_lines, const int rows, const int unit)
{
    const char *x = job->x + row * job->x_stride;
    const char *weights = job->linear->packed + panel * job->num_units * PANEL_UNIT_BYTES;
    floats sums[MAX_ROWS][2];
    if (unit == INT8_QUAD) {
        ints totals[MAX_ROWS][2];
        for (int r = 0; r < rows; r++)
            totals[r][0] = totals[r][1] = i_all(job->scales[row + r].start);
        multiply_int8_panel(totals, rows, x, job->x_stride, weights, job->num_units, next, next_lines, unit);
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < 2; half++)
                sums[r][half] = f_of_ints(totals[r][half]);
    } else {
        for (int r = 0; r < rows; r++)
            sums[r][0] = sums[r][1] = f_all(0.0f);
        multiply_panel(sums, rows, x, job->x_stride, weights, job->num_units, next, next_lines, unit);
    }
    finish(job, row, panel, sums, rows);
}

#define MULTIPLY_ALONE(ROWS) multiply(job, row, panel, next, 2, ROWS, unit)
#define MULTIPLY_IN_TURN(ROWS) multiply(job, row, panel, next, 1, ROWS, unit)

SIMD_INLINE void multiply_panels(const struct multiply_job *job, int64_t tile, const int unit)
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

SIMD static void multiply_tile(const void *argument, int64_t tile)
{
    const struct multiply_job *job = argument;
    switch (job->unit) {
        case BF16_PAIR: multiply_panels(job, tile, BF16_PAIR); break;
        case FLOAT32_ONE: multiply_panels(job, tile, FLOAT32_ONE); break;
        case INT8_QUAD: multiply_panels(job, tile, INT8_QUAD); break;
    }
}

/* Rows of a tile while they are brought into the form in which they are multiplied. */
enum { FORMED_ROWS_PER_TILE = 8 };

struct form_job {
    const void *x;
    int64_t x_stride, m, k;
    int dtype;
    char *rows;
    int64_t row_bytes;
    struct row_scale *scales; /* of rows that become int8; NULL: they become numbers of row_dtype(dtype) */
};

/* x: k numbers, to a row of int8. */
SIMD_INLINE struct row_scale round_row(const void *x, int64_t k, char *rounded, const int dtype)
{
    /* Among magnitudes, the bits of NaN are the largest: its scale makes every result of the row NaN. */
    ints largest = i_all(0);
    for (int64_t i = 0; i < k; i += 16)
        largest = i_max(largest, i_magnitude_bits(load_numbers(x, i, k - i, dtype)));
    const int32_t bits = i_largest(largest);
    float maximum;
    memcpy(&maximum, &bits, sizeof maximum);
    const floats inverse = f_all(127.0f / fmaxf(maximum, 1e-30f));
    ints total = i_all(0);
    for (int64_t i = 0; i < k; i += 16) {
        ints numbers = i_round(f_mul(load_numbers(x, i, k - i, dtype), inverse));
        total = i_add(total, numbers);
        i_store_inputs(rounded, i, numbers, k - i);
    }
    return (struct row_scale){maximum / 127.0f, -128 * i_sum(total)};
}

#define ROUND(DTYPE) job->scales[row] = round_row(x, job->k, formed, DTYPE)
#define FORM(DTYPE) form_row(x, job->k, formed, DTYPE)

SIMD static void form_tile(const void *argument, int64_t tile)
{
    const struct form_job *job = argument;
    int64_t stop = (tile + 1) * FORMED_ROWS_PER_TILE < job->m ? (tile + 1) * FORMED_ROWS_PER_TILE : job->m;
    for (int64_t row = tile * FORMED_ROWS_PER_TILE; row < stop; row++) {
        const void *x = number_at(job->x, row * job->x_stride, job->dtype);
        char *formed = job->rows + row * job->row_bytes;
        if (job->scales) {
            FOR_DTYPE(job->dtype, ROUND)
        } else {
            FOR_DTYPE(job->dtype, FORM)
        }
    }
}

void bros_multiply(const struct bros_linear *linear, const void *x, int64_t x_stride, int64_t m, const void *residual,
                   void *out)
{
    const int64_t k = linear->k;
    struct multiply_job job = {.linear = linear, .m = m, .residual = residual, .out = out,
                               .num_panels = (linear->n + PANEL - 1) / PANEL};
    job.unit = linear->scales ? INT8_QUAD : linear->dtype == BROS_BF16 ? BF16_PAIR : FLOAT32_ONE;
    job.num_units = linear->scales ? (k + 3) / 4 : k * number_bytes(linear->dtype) / UNIT_BYTES;
    const int is_formed = linear->scales || row_dtype(linear->dtype) != linear->dtype;
    const int64_t formed_row_bytes = (job.num_units * row_unit_bytes(job.unit) + 63) / 64 * 64;
    size_t normed_bytes = linear->norm.weight ? (size_t)((m * k * number_bytes(linear->dtype) + 63) / 64 * 64) : 0;
    size_t formed_bytes = is_formed ? (size_t)(m * formed_row_bytes) : 0;
    size_t scales_bytes = linear->scales ? (size_t)m * sizeof(struct row_scale) : 0;
    char *scratch = bros_scratch(BROS_CALL_SCRATCH, normed_bytes + formed_bytes + scales_bytes);
    if (linear->norm.weight) {
        bros_rms_norm(x, x_stride, m, k, &linear->norm, linear->dtype, scratch);
        x = scratch;
        x_stride = k;
    }
    job.x = x;
    job.x_stride = x_stride * number_bytes(linear->dtype);
    if (is_formed) {
        struct row_scale *scales = scales_bytes ? (struct row_scale *)(scratch + normed_bytes + formed_bytes) : NULL;
        struct form_job form = {x, x_stride, m, k, linear->dtype, scratch + normed_bytes, formed_row_bytes, scales};
        bros_run(form_tile, &form, (m + FORMED_ROWS_PER_TILE - 1) / FORMED_ROWS_PER_TILE);
        job.x = form.rows;
        job.x_stride = formed_row_bytes;
        job.scales = scales;
    }
    int64_t panels = job.num_panels / TILES_WANTED;
    job.panels_per_tile = panels < 1 ? 1 : panels < MAX_PANELS_PER_TILE ? panels : MAX_PANELS_PER_TILE;
    job.tiles_per_row = (job.num_panels + job.panels_per_tile - 1) / job.panels_per_tile;
    bros_run(multiply_tile, &job, (m + ROWS_PER_TILE - 1) / ROWS_PER_TILE * job.tiles_per_row);
}
