#include "gemm.h"

#include <string.h>

#include "avx512.h"

void bros_pack_weight(const uint16_t *w, int64_t n, int64_t k, uint16_t *packed)
{
    int64_t num_panels = (n + PANEL - 1) / PANEL;
    for (int64_t panel = 0; panel < num_panels; panel++)
        for (int64_t pair = 0; pair < k / 2; pair++)
            for (int64_t column = panel * PANEL; column < (panel + 1) * PANEL; column++, packed += 2) {
                if (column < n)
                    memcpy(packed, w + column * k + 2 * pair, 2 * sizeof *w);
                else
                    memset(packed, 0, 2 * sizeof *w);
            }
}

/* Rows of a job's tile: at most so many that their inputs stay in the L2 cache while the panels pass by. Panels: the
 * next one is fetched meanwhile, so several are taken at a time where there are enough for all threads. */
enum { ROWS_PER_TILE = 8 * MAX_ROWS, MAX_PANELS_PER_TILE = 8, TILES_WANTED = 24 };

struct multiply_job {
    const struct bros_linear *linear;
    const uint16_t *x;
    int64_t x_stride, m;
    const uint16_t *residual;
    uint16_t *out;
    int64_t num_panels, panels_per_tile, tiles_per_row;
};

/* One register tile: `rows` rows from `row`, the panel's 32 columns. */
AVX512_INLINE void multiply(const struct multiply_job *job, int64_t row, int64_t panel, const char *next,
                            const int next_lines, const int rows)
{
    const struct bros_linear *linear = job->linear;
    const uint16_t *x = job->x + row * job->x_stride;
    const uint16_t *weights = linear->packed + panel * PANEL * linear->k;
    __m512 sums[MAX_ROWS][2];
    int64_t column = panel * PANEL;
    __mmask16 is_column[2] = {lanes_below(linear->n - column), lanes_below(linear->n - column - 16)};
    for (int half = 0; half < 2; half++) {
        __m512 start = linear->bias ? _mm512_maskz_loadu_ps(is_column[half], linear->bias + column + 16 * half)
                                    : _mm512_setzero_ps();
        for (int r = 0; r < rows; r++)
            sums[r][half] = start;
    }
    multiply_panel(sums, rows, x, job->x_stride, weights, linear->k / 2, next, next_lines);
    for (int r = 0; r < rows; r++) {
        if (linear->epilogue == BROS_SILU_MUL) {
            __m512 product = _mm512_mul_ps(silu(sums[r][0]), sums[r][1]);
            store_bf16(job->out + (row + r) * (linear->n / 2) + column / 2, product, 0xffff);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            int64_t at = (row + r) * linear->n + column + 16 * half;
            __m512 sum = sums[r][half];
            if (job->residual)
                sum = _mm512_add_ps(sum, load_bf16(job->residual + at, is_column[half]));
            store_bf16(job->out + at, sum, is_column[half]);
        }
    }
}

#define MULTIPLY_ALONE(ROWS) multiply(job, row, panel, next, 2, ROWS)
#define MULTIPLY_IN_TURN(ROWS) multiply(job, row, panel, next, 1, ROWS)

AVX512BF16 static void multiply_tile(const void *argument, int64_t tile)
{
    const struct multiply_job *job = argument;
    const char *packed = (const char *)job->linear->packed;
    const int64_t panel_bytes = PANEL * job->linear->k * (int64_t)sizeof *job->linear->packed;
    int64_t first_row = tile / job->tiles_per_row * ROWS_PER_TILE;
    int64_t stop_row = first_row + ROWS_PER_TILE < job->m ? first_row + ROWS_PER_TILE : job->m;
    int64_t panel = tile % job->tiles_per_row * job->panels_per_tile;
    int64_t stop_panel = panel + job->panels_per_tile;
    if (stop_panel > job->num_panels)
        stop_panel = job->num_panels;
    for (; panel < stop_panel; panel++) {
        const char *next = packed + (panel + 1) * panel_bytes;
        if (stop_row - first_row <= MAX_ROWS) {
            int64_t row = first_row;
            FOR_ROWS(stop_row - row, MULTIPLY_ALONE)
            continue;
        }
        /* The first two register tiles fetch half of the next panel each, the others what is there already. */
        for (int64_t row = first_row, rows; row < stop_row; row += rows) {
            rows = next_rows(stop_row - row);
            FOR_ROWS(rows, MULTIPLY_IN_TURN)
            next = packed + (panel + 1) * panel_bytes + panel_bytes / 2;
        }
    }
}

void bros_multiply(const struct bros_linear *linear, const uint16_t *x, int64_t x_stride, int64_t m,
                   const uint16_t *residual, uint16_t *out)
{
    if (linear->norm.weight) {
        uint16_t *normed = bros_scratch((size_t)(m * linear->k) * sizeof *x);
        bros_rms_norm(x, x_stride, m, linear->k, &linear->norm, normed);
        x = normed;
        x_stride = linear->k;
    }
    struct multiply_job job = {.linear = linear, .x = x, .x_stride = x_stride, .m = m, .residual = residual, .out = out,
                               .num_panels = (linear->n + PANEL - 1) / PANEL};
    int64_t panels = job.num_panels / TILES_WANTED;
    job.panels_per_tile = panels < 1 ? 1 : panels < MAX_PANELS_PER_TILE ? panels : MAX_PANELS_PER_TILE;
    job.tiles_per_row = (job.num_panels + job.panels_per_tile - 1) / job.panels_per_tile;
    bros_run(multiply_tile, &job, (m + ROWS_PER_TILE - 1) / ROWS_PER_TILE * job.tiles_per_row);
}
