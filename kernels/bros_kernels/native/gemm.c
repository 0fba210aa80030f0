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

/* Rows of a job's tile: at most so many that their inputs stay in the L2 cache while the panels pass by. Panels: the next
 * one is fetched meanwhile, so several are taken at a time where there are enough for all threads. */
enum { ROWS_PER_TILE = 8 * MAX_ROWS, MAX_PANELS_PER_TILE = 8, TILES_WANTED = 24 };

struct linear_job {
    const uint16_t *x;
    int64_t x_stride, m;
    const uint16_t *packed;
    int64_t n, k, num_panels, panels_per_tile, tiles_per_row;
    const float *bias;
    uint16_t *out;
    int64_t out_stride;
    int32_t epilogue;
};

/* One register tile: `rows` rows from `row`, the panel's 32 columns. */
AVX512_INLINE void multiply(const struct linear_job *job, int64_t row, int64_t panel, const char *next,
                            const int next_lines, const int rows)
{
    const uint16_t *x = job->x + row * job->x_stride;
    const uint16_t *weights = job->packed + panel * PANEL * job->k;
    __m512 sums[MAX_ROWS][2];
    int64_t column = panel * PANEL;
    int64_t num_columns = job->n - column < PANEL ? job->n - column : PANEL;
    __mmask16 is_column[2] = {lanes_below(num_columns), lanes_below(num_columns - 16)};
    for (int half = 0; half < 2; half++) {
        __m512 start = job->bias ? _mm512_maskz_loadu_ps(is_column[half], job->bias + column + 16 * half)
                                 : _mm512_setzero_ps();
        for (int r = 0; r < rows; r++)
            sums[r][half] = start;
    }
    multiply_panel(sums, rows, x, job->x_stride, weights, job->k / 2, next, next_lines);
    for (int r = 0; r < rows; r++) {
        if (job->epilogue == BROS_SILU_MUL) {
            __m512 product = _mm512_mul_ps(silu(sums[r][0]), sums[r][1]);
            store_bf16(job->out + (row + r) * job->out_stride + column / 2, product, 0xffff);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            int64_t first = column + 16 * half;
            store_bf16(job->out + (row + r) * job->out_stride + first, sums[r][half], is_column[half]);
        }
    }
}

#define MULTIPLY_ALONE(ROWS) multiply(job, row, panel, next, 2, ROWS)
#define MULTIPLY_IN_TURN(ROWS) multiply(job, row, panel, next, 1, ROWS)

AVX512BF16 static void linear_tile(const void *argument, int64_t tile)
{
    const struct linear_job *job = argument;
    const int64_t panel_bytes = PANEL * job->k * (int64_t)sizeof *job->packed;
    int64_t first_row = tile / job->tiles_per_row * ROWS_PER_TILE;
    int64_t stop_row = first_row + ROWS_PER_TILE < job->m ? first_row + ROWS_PER_TILE : job->m;
    int64_t panel = tile % job->tiles_per_row * job->panels_per_tile;
    int64_t stop_panel = panel + job->panels_per_tile < job->num_panels ? panel + job->panels_per_tile : job->num_panels;
    for (; panel < stop_panel; panel++) {
        const char *next = (const char *)job->packed + (panel + 1) * panel_bytes;
        if (stop_row - first_row <= MAX_ROWS) {
            int64_t row = first_row;
            FOR_ROWS(stop_row - row, MULTIPLY_ALONE)
            continue;
        }
        /* The first two register tiles fetch half of the next panel each, the others what is there already. */
        for (int64_t row = first_row, rows; row < stop_row; row += rows) {
            rows = next_rows(stop_row - row);
            FOR_ROWS(rows, MULTIPLY_IN_TURN)
            next = (const char *)job->packed + (panel + 1) * panel_bytes + panel_bytes / 2;
        }
    }
}

void bros_linear(const uint16_t *x, int64_t x_stride, int64_t m, const uint16_t *packed, int64_t n, int64_t k,
                 const float *bias, uint16_t *out, int64_t out_stride, int32_t epilogue)
{
    struct linear_job job = {.x = x, .x_stride = x_stride, .m = m, .packed = packed, .n = n, .k = k,
                             .num_panels = (n + PANEL - 1) / PANEL, .bias = bias, .out = out,
                             .out_stride = out_stride, .epilogue = epilogue};
    int64_t panels = job.num_panels / TILES_WANTED;
    job.panels_per_tile = panels < 1 ? 1 : panels < MAX_PANELS_PER_TILE ? panels : MAX_PANELS_PER_TILE;
    job.tiles_per_row = (job.num_panels + job.panels_per_tile - 1) / job.panels_per_tile;
    bros_run(linear_tile, &job, (m + ROWS_PER_TILE - 1) / ROWS_PER_TILE * job.tiles_per_row);
}
