#include "attention.h"

#include <math.h>
#include <string.h>

#include "simd.h"

/* Keys of a tile: two panels. In bf16, scores of 48 rows and the packed panels of heads of 64 numbers take 34 KB of
 * L2. */
enum { TILE_KEYS = 64, GROUP_KEYS = 16 };

struct attend_job {
    const struct bros_step *step;
    const struct bros_attention *attention;
    void *qkv;
    int64_t qkv_stride;
    const void *cos, *sin;
    int64_t rotary_dim;
    void *k, *v;
    void *out;
    float *parts; /* rows of each part of the sequences that are split, see `row_floats` */
    /* Scores are in units of log2(e), so that exp2 takes their exponential: query @ key * scale, or, where `cap` is not
     * 0, cap * tanh(query @ key * scale). */
    float scale, cap;
};

/* New tokens of a tile while they are prepared. */
enum { TILE_TOKENS = 8 };

/* Turn the pairs (i, i + rotary_dim / 2) of one head by a position's angles. */
SIMD_INLINE void rotate(void *x, int64_t rotary_dim, const void *cos, const void *sin, const int dtype)
{
    const int64_t half = rotary_dim / 2;
    for (int64_t d = 0; d < half; d += 16) {
        const int64_t count = half - d;
        floats low = load_numbers(x, d, count, dtype), high = load_numbers(x, half + d, count, dtype);
        floats new_low = f_mul(low, load_numbers(cos, d, count, dtype));
        floats new_high = f_mul(high, load_numbers(cos, half + d, count, dtype));
        new_low = f_fma(high, load_numbers(sin, d, count, dtype), new_low);
        new_high = f_fma(low, load_numbers(sin, half + d, count, dtype), new_high);
        store_numbers(x, d, new_low, count, dtype);
        store_numbers(x, half + d, new_high, count, dtype);
    }
}

/* One token's queries and keys as they are attended to; its keys and values in their slots. */
SIMD_INLINE void prepare(const struct attend_job *job, int64_t token, const int dtype)
{
    const struct bros_attention *attention = job->attention;
    const int64_t num_heads = attention->num_heads, head_dim = attention->head_dim;
    const int64_t num_rotated = num_heads + attention->num_kv_heads, row = attention->num_kv_heads * head_dim;
    const int64_t angles = token * job->rotary_dim, slot = job->step->slots[token] * row;
    void *x = number_at(job->qkv, token * job->qkv_stride, dtype);
    for (int64_t index = 0; index < num_rotated; index++) {
        const struct bros_norm *norm = index < num_heads ? &attention->q_norm : &attention->k_norm;
        void *head = number_at(x, index * head_dim, dtype);
        if (norm->weight)
            normalise(head, head_dim, norm, head, dtype);
        if (job->cos)
            rotate(head, job->rotary_dim, number_at(job->cos, angles, dtype), number_at(job->sin, angles, dtype),
                   dtype);
    }
    size_t row_bytes = (size_t)(row * number_bytes(dtype));
    memcpy(number_at(job->k, slot, dtype), number_at(x, num_heads * head_dim, dtype), row_bytes);
    memcpy(number_at(job->v, slot, dtype), number_at(x, num_rotated * head_dim, dtype), row_bytes);
}

#define PREPARE(DTYPE) prepare(job, token, DTYPE)

SIMD static void prepare_tile(const void *argument, int64_t tile)
{
    const struct attend_job *job = argument;
    int64_t stop = (tile + 1) * TILE_TOKENS < job->step->num_tokens ? (tile + 1) * TILE_TOKENS : job->step->num_tokens;
    for (int64_t token = tile * TILE_TOKENS; token < stop; token++)
        FOR_DTYPE(job->attention->dtype, PREPARE)
}

/* The softmax of a row so far, and the values that it weighs: row_floats(head_dim) floats, aligned to 64 bytes.
 *
 *     | 0 .. 15: sums of the weights, by lane | 16: maximum of the scores | 17: what the tile before is scaled by |
 *     | 32 ..: sums of weight * value, filled up to whole panels | */
enum { MAXIMUM = 16, RESCALE = 17, SUMS = 32, MAX_ROW_FLOATS = SUMS + BROS_MAX_HEAD_DIM };

static int64_t padded_dim(int64_t head_dim) { return (head_dim + PANEL - 1) / PANEL * PANEL; }
static int64_t row_floats(int64_t head_dim) { return SUMS + padded_dim(head_dim); }

/* What one thread needs for one `bros_queries` and key head. Rows are (token, head of the group). */
struct scratch {
    _Alignas(64) char keys[TILE_KEYS * BROS_MAX_HEAD_DIM * sizeof(float)];   /* panels of 32 keys: (2, units, 32) */
    _Alignas(64) char values[TILE_KEYS * BROS_MAX_HEAD_DIM * sizeof(float)]; /* panels of 32 numbers, units of keys */
    _Alignas(64) char q[BROS_MAX_QUERY_ROWS * BROS_MAX_HEAD_DIM * sizeof(float)];
    _Alignas(64) float scores[BROS_MAX_QUERY_ROWS][TILE_KEYS];
    _Alignas(64) char weights[BROS_MAX_QUERY_ROWS * TILE_KEYS * sizeof(float)];
    _Alignas(64) float spans[2][BROS_MAX_QUERY_ROWS * MAX_ROW_FLOATS]; /* rows of the spans so far, and of one */
};

/* Where 16 keys lie that begin at a multiple of 16: in one block, so at a constant distance. */
struct group {
    int64_t first; /* number, from the start of the layer's keys, of the first one's head */
    int64_t step;
};

static struct group locate(const struct attend_job *job, const int32_t *entries, int64_t position, int64_t kv_head)
{
    int64_t block_size = job->step->block_size, row = job->attention->num_kv_heads * job->attention->head_dim;
    int64_t entry = entries[position / block_size], offset = position & (block_size - 1);
    int64_t slot = entry >= 0 ? entry * block_size + offset : ~entry * block_size + block_size - 1 - offset;
    return (struct group){slot * row + kv_head * job->attention->head_dim, entry >= 0 ? row : -row};
}

/* Fetch the 16 keys of `region` from `position`, where that is before `stop`. */
SIMD_INLINE void prefetch(const struct attend_job *job, const int32_t *entries, int64_t position, int64_t stop,
                            int64_t kv_head, const void *region, const int dtype)
{
    if (position >= stop)
        return;
    const int64_t head_bytes = job->attention->head_dim * number_bytes(dtype);
    const struct group group = locate(job, entries, position, kv_head);
    const char *key = number_at(region, group.first, dtype);
    for (int i = 0; i < GROUP_KEYS; i++, key += group.step * number_bytes(dtype))
        for (int64_t byte = 0; byte < head_bytes; byte += 64)
            _mm_prefetch(key + byte, _MM_HINT_T1);
}

/* Units of a key that lie in the panels: a multiple of 16. */
static int64_t padded_units(int64_t head_dim, int dtype)
{
    return (head_dim * number_bytes(dtype) / UNIT_BYTES + 15) / 16 * 16;
}

/* Lay keys [start, start + count) out as panels of 32 keys; those beyond `count` hold anything. Meanwhile fetch the
 * tile after it, up to `stop`: a few lines at a time, since more than the core can wait for at once would stop it. */
SIMD_INLINE void pack_keys(const struct attend_job *job, const int32_t *entries, int64_t start, int64_t count,
                             int64_t stop, int64_t kv_head, char *panels, const int dtype)
{
    const int64_t num_units = job->attention->head_dim * number_bytes(dtype) / UNIT_BYTES;
    const int64_t panel_bytes = padded_units(job->attention->head_dim, dtype) * PANEL_UNIT_BYTES;
    for (int64_t done = 0; done < count; done += GROUP_KEYS) {
        prefetch(job, entries, start + done + TILE_KEYS, stop, kv_head, job->k, dtype);
        const struct group group = locate(job, entries, start + done, kv_head);
        const char *keys = number_at(job->k, group.first, dtype);
        const int64_t key_bytes = group.step * number_bytes(dtype);
        char *panel = panels + done / PANEL * panel_bytes + done % PANEL * UNIT_BYTES;
        for (int64_t at = 0; at < num_units; at += 16)
            transpose_units(keys + at * UNIT_BYTES, key_bytes, num_units - at, panel + at * PANEL_UNIT_BYTES,
                            PANEL_UNIT_BYTES);
    }
}

/* Lay values [start, start + count) out as panels of 32 numbers, in bf16 keys in pairs, of which an odd one is paired
 * with zeros. Meanwhile fetch the tile after it, up to `stop`. */
SIMD_INLINE void pack_values(const struct attend_job *job, const int32_t *entries, int64_t start, int64_t count,
                               int64_t stop, int64_t kv_head, char *panels, const int dtype)
{
    const int64_t head_dim = job->attention->head_dim, unit_keys = UNIT_BYTES / number_bytes(dtype);
    const int64_t panel_bytes = TILE_KEYS / unit_keys * PANEL_UNIT_BYTES;
    for (int64_t done = 0; done < count; done += GROUP_KEYS) {
        prefetch(job, entries, start + done + TILE_KEYS, stop, kv_head, job->v, dtype);
        const struct group group = locate(job, entries, start + done, kv_head);
        const char *values = number_at(job->v, group.first, dtype);
        const int64_t key_bytes = group.step * number_bytes(dtype);
        const int64_t num_keys = count - done < GROUP_KEYS ? count - done : GROUP_KEYS;
        for (int64_t d = 0; d < head_dim; d += PANEL) {
            char *unit = panels + d / PANEL * panel_bytes + done / unit_keys * PANEL_UNIT_BYTES;
            for (int64_t i = 0; i < num_keys; i += unit_keys, unit += PANEL_UNIT_BYTES) {
                const char *value = values + i * key_bytes + d * number_bytes(dtype);
                if (dtype == BROS_FLOAT32) {
                    f_store((float *)unit, load_numbers(value, 0, head_dim - d, dtype));
                    f_store((float *)unit + 16, load_numbers(value, 16, head_dim - d - 16, dtype));
                } else {
                    interleave_bf16(value, i + 1 < num_keys ? value + key_bytes : NULL, head_dim - d, unit);
                }
            }
        }
    }
}

static int unit_of(int dtype) { return dtype == BROS_BF16 ? BF16_PAIR : FLOAT32_ONE; }

/* scores = q @ keys, of `rows` rows from `row` and one panel of keys. */
SIMD_INLINE void score(struct scratch *scratch, int64_t head_dim, int64_t row, int64_t first_key, const int rows,
                         const int dtype)
{
    const int64_t q_stride = head_dim * number_bytes(row_dtype(dtype));
    floats sums[MAX_ROWS][2];
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = f_all(0.0f);
    multiply_panel(sums, rows, scratch->q + row * q_stride, q_stride,
                   scratch->keys + first_key * padded_units(head_dim, dtype) * UNIT_BYTES,
                   head_dim * number_bytes(dtype) / UNIT_BYTES, NULL, 0, unit_of(dtype));
    for (int r = 0; r < rows; r++) {
        f_store(&scratch->scores[row + r][first_key], sums[r][0]);
        f_store(&scratch->scores[row + r][first_key + 16], sums[r][1]);
    }
}

/* What exp2 takes the place of a score by: the maximum, or 0 where there is no score, or none but NaN. */
static inline float shift_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

/* What brings numbers relative to the maximum `old` to `maximum`. */
SIMD_INLINE float rescale_of(float old, float maximum)
{
    return f_first(exp2_of(f_all(old - shift_of(maximum))));
}

/* The weights of a row's keys, of which it sees [first, stop) of this tile: exp2(score - maximum so far). */
SIMD_INLINE void weigh(const struct attend_job *job, const float scores[TILE_KEYS], char *weights, float *row,
                         int64_t first, int64_t stop, const int dtype)
{
    const floats nothing = f_all(-INFINITY);
    floats seen[TILE_KEYS / 16], largest = nothing;
    for (int i = 0; i < TILE_KEYS / 16; i++) {
        lanes is_seen = lanes_below(stop - 16 * i) & ~lanes_below(first - 16 * i);
        floats scaled = f_mul(f_load(scores + 16 * i), f_all(job->scale));
        if (job->cap != 0.0f)
            scaled = f_mul(tanh_of(scaled), f_all(job->cap));
        seen[i] = f_where(is_seen, scaled, nothing);
        largest = f_max(largest, seen[i]);
    }
    float maximum = fmaxf(row[MAXIMUM], f_largest(largest));
    floats shift = f_all(shift_of(maximum)), total = f_all(0.0f);
    for (int i = 0; i < TILE_KEYS / 16; i++) {
        floats weight = exp2_of(f_sub(seen[i], shift));
        total = f_add(total, weight);
        store_numbers(weights, 16 * i, weight, 16, row_dtype(dtype));
    }
    row[RESCALE] = rescale_of(row[MAXIMUM], maximum);
    f_store(row, f_fma(f_load(row), f_all(row[RESCALE]), total));
    row[MAXIMUM] = maximum;
}

/* sums = sums * rescale + weights @ values, of `rows` rows and one panel of numbers from `d`. `at`: the first row. */
SIMD_INLINE void accumulate(struct scratch *scratch, float *at, int64_t stride, int64_t row, int64_t d,
                              int64_t num_keys, const int rows, const int dtype)
{
    const int64_t unit_keys = UNIT_BYTES / number_bytes(dtype);
    const int64_t weights_stride = TILE_KEYS * number_bytes(row_dtype(dtype));
    floats sums[MAX_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            sums[r][half] = f_mul(f_load(at + r * stride + SUMS + d + 16 * half), f_all(at[r * stride + RESCALE]));
    multiply_panel(sums, rows, scratch->weights + row * weights_stride, weights_stride,
                   scratch->values + d / PANEL * (TILE_KEYS / unit_keys) * PANEL_UNIT_BYTES,
                   (num_keys + unit_keys - 1) / unit_keys, NULL, 0, unit_of(dtype));
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            f_store(at + r * stride + SUMS + d + 16 * half, sums[r][half]);
}

#define SCORE(ROWS) score(scratch, head_dim, row, first_key, ROWS, dtype)
#define ACCUMULATE(ROWS) accumulate(scratch, rows + row * stride, stride, row, d, num_keys, ROWS, dtype)

/* `rows` = the softmax of the queries in `scratch`, over keys [start, stop). */
SIMD_INLINE void attend_span(const struct attend_job *job, const struct bros_queries *queries, int64_t kv_head,
                               int64_t start, int64_t stop, struct scratch *scratch, float *rows, const int dtype)
{
    const struct bros_attention *attention = job->attention;
    const int32_t *entries = job->step->block_table + queries->sequence * job->step->table_width;
    const int64_t head_dim = attention->head_dim, group = attention->num_heads / attention->num_kv_heads;
    const int64_t num_rows = queries->num_tokens * group, stride = row_floats(head_dim);
    memset(rows, 0, (size_t)(num_rows * stride) * sizeof *rows);
    for (int64_t row = 0; row < num_rows; row++)
        rows[row * stride + MAXIMUM] = -INFINITY;
    for (; start < stop; start += TILE_KEYS) {
        int64_t num_keys = stop - start < TILE_KEYS ? stop - start : TILE_KEYS;
        pack_keys(job, entries, start, num_keys, queries->stop_key, kv_head, scratch->keys, dtype);
        pack_values(job, entries, start, num_keys, queries->stop_key, kv_head, scratch->values, dtype);
        for (int64_t first_key = 0; first_key < num_keys; first_key += PANEL)
            for (int64_t row = 0, height; row < num_rows; row += height) {
                height = next_rows(num_rows - row);
                FOR_ROWS(height, SCORE)
            }
        for (int64_t row = 0; row < num_rows; row++) {
            int64_t position = queries->first_position + row / group;
            int64_t first = attention->window ? position + 1 - attention->window - start : 0;
            char *weights = scratch->weights + row * TILE_KEYS * number_bytes(row_dtype(dtype));
            weigh(job, scratch->scores[row], weights, rows + row * stride, first, position + 1 - start, dtype);
        }
        for (int64_t d = 0; d < head_dim; d += PANEL)
            for (int64_t row = 0, height; row < num_rows; row += height) {
                height = next_rows(num_rows - row);
                FOR_ROWS(height, ACCUMULATE)
            }
    }
}

/* row = row and the span after it. Where either saw nothing, the other stays to the last bit. */
SIMD_INLINE void merge_row(float *row, const float *span, int64_t stride)
{
    float maximum = fmaxf(row[MAXIMUM], span[MAXIMUM]);
    const floats rescale = f_all(rescale_of(row[MAXIMUM], maximum));
    const floats span_rescale = f_all(rescale_of(span[MAXIMUM], maximum));
    for (int64_t i = 0; i < stride; i += i == 0 ? SUMS : 16) {
        floats scaled = f_mul(f_load(row + i), rescale);
        f_store(row + i, f_fma(f_load(span + i), span_rescale, scaled));
    }
    row[MAXIMUM] = maximum;
}

/* What was attended to by `num_tokens` tokens, whose rows are complete. */
SIMD_INLINE void store_rows(const struct attend_job *job, int64_t first_token, int64_t num_tokens, int64_t kv_head,
                              const float *rows, const int dtype)
{
    const int64_t num_heads = job->attention->num_heads, head_dim = job->attention->head_dim;
    const int64_t group = num_heads / job->attention->num_kv_heads, stride = row_floats(head_dim);
    for (int64_t row = 0; row < num_tokens * group; row++, rows += stride) {
        int64_t token = first_token + row / group, head = kv_head * group + row % group;
        const floats inverse = f_all(1.0f / f_sum(f_load(rows)));
        for (int64_t d = 0; d < head_dim; d += 16)
            store_numbers(job->out, (token * num_heads + head) * head_dim + d,
                          f_mul(f_load(rows + SUMS + d), inverse), head_dim - d, dtype);
    }
}

/* Where the rows of a part of a split sequence's keys are kept until all are there. */
static float *part_rows(const struct attend_job *job, int64_t part, int64_t kv_head)
{
    return job->parts + (kv_head * job->step->num_part_rows + part) * row_floats(job->attention->head_dim);
}

SIMD_INLINE void attend(const struct attend_job *job, const struct bros_queries *queries, int64_t kv_head,
                          const int dtype)
{
    const struct bros_attention *attention = job->attention;
    const int64_t head_dim = attention->head_dim, group = attention->num_heads / attention->num_kv_heads;
    const int64_t num_rows = queries->num_tokens * group, stride = row_floats(head_dim);
    struct scratch scratch_of_this_call, *scratch = &scratch_of_this_call;
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t token = queries->first_token + row / group, head = kv_head * group + row % group;
        form_row(number_at(job->qkv, token * job->qkv_stride + head * head_dim, dtype), head_dim,
                 number_at(scratch->q, row * head_dim, row_dtype(dtype)), dtype);
    }
    /* No row sees what lies before this one. */
    int64_t seen = attention->window ? (queries->first_position + 1 - attention->window) / TILE_KEYS * TILE_KEYS : 0;
    float *rows = queries->part < 0 ? scratch->spans[0] : part_rows(job, queries->part, kv_head);
    int64_t span = queries->first_key, stop = queries->stop_key;
    if (queries->part < 0 && seen > span)
        span = seen / BROS_SPAN_KEYS * BROS_SPAN_KEYS;
    for (int is_first = 1; span < stop; span += BROS_SPAN_KEYS, is_first = 0) {
        int64_t span_stop = span + BROS_SPAN_KEYS < stop ? span + BROS_SPAN_KEYS : stop;
        attend_span(job, queries, kv_head, span > seen ? span : seen, span_stop, scratch,
                    is_first ? rows : scratch->spans[1], dtype);
        for (int64_t row = 0; !is_first && row < num_rows; row++)
            merge_row(rows + row * stride, scratch->spans[1] + row * stride, stride);
    }
    if (queries->part < 0)
        store_rows(job, queries->first_token, queries->num_tokens, kv_head, rows, dtype);
}

#define ATTEND(DTYPE) attend(job, queries, kv_head, DTYPE)

SIMD static void attend_tile(const void *argument, int64_t tile)
{
    const struct attend_job *job = argument;
    const int64_t num_kv_heads = job->attention->num_kv_heads, kv_head = tile % num_kv_heads;
    const struct bros_queries *queries = &job->step->queries[tile / num_kv_heads];
    FOR_DTYPE(job->attention->dtype, ATTEND)
}

#define STORE_ROWS(DTYPE) store_rows(job, split->first_token, split->num_tokens, kv_head, rows, DTYPE)

/* Merge the parts of a split sequence. */
SIMD static void merge_tile(const void *argument, int64_t tile)
{
    const struct attend_job *job = argument;
    const struct bros_attention *attention = job->attention;
    const int64_t kv_head = tile % attention->num_kv_heads, stride = row_floats(attention->head_dim);
    const struct bros_split *split = &job->step->splits[tile / attention->num_kv_heads];
    const int64_t num_rows = split->num_tokens * (attention->num_heads / attention->num_kv_heads);
    float *rows = part_rows(job, split->first_part, kv_head);
    const float *span = rows;
    for (int64_t part = 1; part < split->num_parts; part++) {
        span += num_rows * stride;
        for (int64_t row = 0; row < num_rows; row++)
            merge_row(rows + row * stride, span + row * stride, stride);
    }
    FOR_DTYPE(attention->dtype, STORE_ROWS)
}

void bros_attend(const struct bros_step *step, const struct bros_attention *attention, void *qkv, const void *cos,
                 const void *sin, int64_t rotary_dim, void *k, void *v, void *out)
{
    const int64_t num_kv_heads = attention->num_kv_heads, head_dim = attention->head_dim;
    const int64_t part_floats = step->num_part_rows * num_kv_heads * row_floats(head_dim);
    struct attend_job job = {.step = step, .attention = attention, .qkv = qkv,
                             .qkv_stride = (attention->num_heads + 2 * num_kv_heads) * head_dim, .cos = cos,
                             .sin = sin, .rotary_dim = rotary_dim, .k = k, .v = v, .out = out};
    const float softcap = attention->softcap;
    job.cap = softcap * LOG2E;
    job.scale = softcap != 0.0f ? attention->scale / softcap : attention->scale * LOG2E;
    bros_run(prepare_tile, &job, (step->num_tokens + TILE_TOKENS - 1) / TILE_TOKENS);
    if (part_floats)
        job.parts = bros_scratch(BROS_CALL_SCRATCH, (size_t)part_floats * sizeof(float));
    bros_run(attend_tile, &job, step->num_queries * num_kv_heads);
    bros_run(merge_tile, &job, step->num_splits * num_kv_heads);
}
