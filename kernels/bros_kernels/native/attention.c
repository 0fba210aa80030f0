#include "attention.h"

#include <math.h>
#include <string.h>

#include "avx512.h"

/* Keys of a tile: two panels. Scores of 48 rows and both packed panels of heads of 64 numbers take 34 KB of L2. */
enum { TILE_KEYS = 64, GROUP_KEYS = 16 };

struct attend_job {
    const struct bros_step *step;
    const struct bros_attention *attention;
    uint16_t *qkv;
    int64_t qkv_stride;
    const uint16_t *cos, *sin;
    int64_t rotary_dim;
    uint16_t *k, *v;
    uint16_t *out;
    /* Scores are in units of log2(e), so that exp2 takes their exponential: query @ key * scale, or, where `cap` is not
     * 0, cap * tanh(query @ key * scale). */
    float scale, cap;
};

/* New tokens of a tile while they are prepared. */
enum { TILE_TOKENS = 8 };

/* Turn the pairs (i, i + rotary_dim / 2) of one head by a position's angles. */
AVX512_INLINE void rotate(uint16_t *x, int64_t rotary_dim, const uint16_t *cos, const uint16_t *sin)
{
    const int64_t half = rotary_dim / 2;
    for (int64_t d = 0; d < half; d += 16) {
        const __mmask16 lanes = lanes_below(half - d);
        __m512 low = load_bf16(x + d, lanes), high = load_bf16(x + half + d, lanes);
        __m512 new_low = _mm512_mul_ps(low, load_bf16(cos + d, lanes));
        __m512 new_high = _mm512_mul_ps(high, load_bf16(cos + half + d, lanes));
        store_bf16(x + d, _mm512_fmadd_ps(high, load_bf16(sin + d, lanes), new_low), lanes);
        store_bf16(x + half + d, _mm512_fmadd_ps(low, load_bf16(sin + half + d, lanes), new_high), lanes);
    }
}

/* Queries and keys as they are attended to; keys and values in their slots. */
AVX512BF16 static void prepare_tile(const void *argument, int64_t tile)
{
    const struct attend_job *job = argument;
    const struct bros_attention *attention = job->attention;
    const int64_t num_heads = attention->num_heads, head_dim = attention->head_dim, rotary_dim = job->rotary_dim;
    const int64_t num_rotated = num_heads + attention->num_kv_heads, row = attention->num_kv_heads * head_dim;
    int64_t stop = (tile + 1) * TILE_TOKENS < job->step->num_tokens ? (tile + 1) * TILE_TOKENS : job->step->num_tokens;
    for (int64_t token = tile * TILE_TOKENS; token < stop; token++) {
        uint16_t *x = job->qkv + token * job->qkv_stride;
        for (int64_t head = 0; head < num_rotated; head++) {
            const struct bros_norm *norm = head < num_heads ? &attention->q_norm : &attention->k_norm;
            if (norm->weight)
                normalise(x + head * head_dim, head_dim, norm, x + head * head_dim);
            if (job->cos)
                rotate(x + head * head_dim, rotary_dim, job->cos + token * rotary_dim, job->sin + token * rotary_dim);
        }
        size_t row_bytes = (size_t)row * sizeof *x;
        memcpy(job->k + job->step->slots[token] * row, x + num_heads * head_dim, row_bytes);
        memcpy(job->v + job->step->slots[token] * row, x + num_rotated * head_dim, row_bytes);
    }
}

/* What one thread needs for one `bros_queries` and key head. Rows are (token, head of the group). */
struct scratch {
    _Alignas(64) uint16_t keys[TILE_KEYS * BROS_MAX_HEAD_DIM];   /* panels of 32 keys: (2, head_dim / 2, 32, 2) */
    _Alignas(64) uint16_t values[TILE_KEYS * BROS_MAX_HEAD_DIM]; /* panels of 32 numbers: (head_dim / 32, 32, 32, 2) */
    _Alignas(64) uint16_t q[BROS_MAX_QUERY_ROWS * BROS_MAX_HEAD_DIM];
    _Alignas(64) float scores[BROS_MAX_QUERY_ROWS][TILE_KEYS];
    _Alignas(64) uint16_t weights[BROS_MAX_QUERY_ROWS][TILE_KEYS];
    _Alignas(64) float sums[BROS_MAX_QUERY_ROWS * BROS_MAX_HEAD_DIM];
    _Alignas(64) float totals[BROS_MAX_QUERY_ROWS][16]; /* of the weights, by lane */
    float maxima[BROS_MAX_QUERY_ROWS];
    float rescale[BROS_MAX_QUERY_ROWS];
};

/* out[i][j] = in[j][i], of 16 x 16 numbers of 32 bits; rows of `out` are out_stride bytes apart. */
AVX512_INLINE void transpose_16x16(const __m512i in[16], char *out, int64_t out_stride)
{
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_store_si512(out + i * out_stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
        _mm512_store_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
    }
}

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

/* Fetch what a tile that begins at `start` reads of `region`: at most TILE_KEYS keys, those before `stop`. */
AVX512_INLINE void prefetch(const struct attend_job *job, const int32_t *entries, int64_t start, int64_t stop,
                            int64_t kv_head, const uint16_t *region)
{
    for (int64_t position = start; position < stop && position < start + TILE_KEYS; position += GROUP_KEYS) {
        struct group group = locate(job, entries, position, kv_head);
        for (int i = 0; i < GROUP_KEYS; i++)
            for (int64_t d = 0; d < job->attention->head_dim; d += 32)
                _mm_prefetch(region + group.first + i * group.step + d, _MM_HINT_T1);
    }
}

/* Lay keys [start, start + count) out as panels of 32 keys. Those beyond `count` hold anything. */
AVX512_INLINE void pack_keys(const struct attend_job *job, const int32_t *entries, int64_t start, int64_t count,
                             int64_t kv_head, uint16_t *panels)
{
    for (int64_t done = 0; done < count; done += GROUP_KEYS) {
        struct group group = locate(job, entries, start + done, kv_head);
        const uint16_t *k = job->k + group.first;
        char *panel = (char *)(panels + done / PANEL * PANEL * job->attention->head_dim) + done % PANEL * 4;
        for (int64_t d = 0; d < job->attention->head_dim; d += 32) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = _mm512_loadu_si512(k + i * group.step + d);
            transpose_16x16(rows, panel + d / 2 * 4 * PANEL, 4 * PANEL);
        }
    }
}

/* Lay values [start, start + count) out as panels of 32 numbers, keys in pairs; an odd one is paired with zeros. */
AVX512_INLINE void pack_values(const struct attend_job *job, const int32_t *entries, int64_t start, int64_t count,
                               int64_t kv_head, uint16_t *panels)
{
    static const uint16_t lower[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i left = _mm512_loadu_si512(lower), right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (int64_t done = 0; done < count; done += GROUP_KEYS) {
        struct group group = locate(job, entries, start + done, kv_head);
        const uint16_t *v = job->v + group.first;
        int64_t stop = count - done < GROUP_KEYS ? count - done : GROUP_KEYS;
        for (int64_t i = 0; i < stop; i += 2)
            for (int64_t d = 0; d < job->attention->head_dim; d += PANEL) {
                __m512i even = _mm512_loadu_si512(v + i * group.step + d);
                __m512i odd = i + 1 < stop ? _mm512_loadu_si512(v + (i + 1) * group.step + d) : _mm512_setzero_si512();
                uint16_t *pair = panels + d * TILE_KEYS + (done + i) * PANEL;
                _mm512_store_si512(pair, _mm512_permutex2var_epi16(even, left, odd));
                _mm512_store_si512(pair + 32, _mm512_permutex2var_epi16(even, right, odd));
            }
    }
}

/* scores = q @ keys, of `rows` rows from `row` and one panel of keys. */
AVX512_INLINE void score(struct scratch *scratch, int64_t head_dim, int64_t row, int64_t first_key, const int rows)
{
    __m512 sums[MAX_ROWS][2];
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    multiply_panel(sums, rows, scratch->q + row * head_dim, head_dim, scratch->keys + first_key * head_dim,
                   head_dim / 2, NULL, 0);
    for (int r = 0; r < rows; r++) {
        _mm512_store_ps(&scratch->scores[row + r][first_key], sums[r][0]);
        _mm512_store_ps(&scratch->scores[row + r][first_key + 16], sums[r][1]);
    }
}

/* The weights of a row's keys, of which it sees [first, stop) of this tile: exp2(score - maximum so far), in bf16. */
AVX512_INLINE void weigh(const struct attend_job *job, struct scratch *scratch, int64_t row, int64_t first,
                         int64_t stop)
{
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512 scores[TILE_KEYS / 16], largest = nothing;
    for (int i = 0; i < TILE_KEYS / 16; i++) {
        __mmask16 is_seen = lanes_below(stop - 16 * i) & ~lanes_below(first - 16 * i);
        __m512 scaled = _mm512_mul_ps(_mm512_load_ps(&scratch->scores[row][16 * i]), _mm512_set1_ps(job->scale));
        if (job->cap != 0.0f)
            scaled = _mm512_mul_ps(tanh_ps(scaled), _mm512_set1_ps(job->cap));
        scores[i] = _mm512_mask_mov_ps(nothing, is_seen, scaled);
        largest = _mm512_max_ps(largest, scores[i]);
    }
    float old = scratch->maxima[row], maximum = fmaxf(old, _mm512_reduce_max_ps(largest));
    if (maximum == -INFINITY) { /* no key seen yet */
        scratch->rescale[row] = 0.0f;
        memset(scratch->weights[row], 0, sizeof scratch->weights[row]);
        return;
    }
    __m512 shift = _mm512_set1_ps(maximum), total = _mm512_setzero_ps();
    for (int i = 0; i < TILE_KEYS / 16; i++) {
        __m512 weight = exp2_ps(_mm512_sub_ps(scores[i], shift));
        total = _mm512_add_ps(total, weight);
        store_bf16(&scratch->weights[row][16 * i], weight, 0xffff);
    }
    float rescale = _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(old - maximum)));
    __m512 totals = _mm512_load_ps(scratch->totals[row]);
    _mm512_store_ps(scratch->totals[row], _mm512_fmadd_ps(totals, _mm512_set1_ps(rescale), total));
    scratch->rescale[row] = rescale;
    scratch->maxima[row] = maximum;
}

/* sums = sums * rescale + weights @ values, of `rows` rows from `row` and one panel of numbers from `d`. */
AVX512_INLINE void accumulate(struct scratch *scratch, int64_t head_dim, int64_t row, int64_t d, int64_t num_keys,
                              const int rows)
{
    __m512 sums[MAX_ROWS][2];
    float *at = scratch->sums + row * head_dim + d;
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            sums[r][half] = _mm512_mul_ps(_mm512_load_ps(at + r * head_dim + 16 * half),
                                          _mm512_set1_ps(scratch->rescale[row + r]));
    multiply_panel(sums, rows, scratch->weights[row], TILE_KEYS, scratch->values + d * TILE_KEYS, (num_keys + 1) / 2,
                   NULL, 0);
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            _mm512_store_ps(at + r * head_dim + 16 * half, sums[r][half]);
}

#define SCORE(ROWS) score(&scratch, head_dim, row, first_key, ROWS)
#define ACCUMULATE(ROWS) accumulate(&scratch, head_dim, row, d, num_keys, ROWS)

AVX512BF16 static void attend_tile(const void *argument, int64_t tile)
{
    const struct attend_job *job = argument;
    const struct bros_queries *queries = &job->step->queries[tile / job->attention->num_kv_heads];
    const int32_t *entries = job->step->block_table + queries->sequence * job->step->table_width;
    const int64_t head_dim = job->attention->head_dim, kv_head = tile % job->attention->num_kv_heads;
    const int64_t group = job->attention->num_heads / job->attention->num_kv_heads;
    const int64_t num_rows = queries->num_tokens * group;
    struct scratch scratch;

    for (int64_t row = 0; row < num_rows; row++) {
        int64_t token = queries->first_token + row / group, head = kv_head * group + row % group;
        memcpy(scratch.q + row * head_dim, job->qkv + token * job->qkv_stride + head * head_dim,
               (size_t)head_dim * sizeof *job->qkv);
        scratch.maxima[row] = -INFINITY;
    }
    memset(scratch.totals, 0, (size_t)num_rows * sizeof scratch.totals[0]);
    memset(scratch.sums, 0, (size_t)(num_rows * head_dim) * sizeof scratch.sums[0]);

    int64_t stop = queries->first_position + queries->num_tokens, start = 0;
    if (job->attention->window && queries->first_position + 1 > job->attention->window)
        start = (queries->first_position + 1 - job->attention->window) / TILE_KEYS * TILE_KEYS;
    for (; start < stop; start += TILE_KEYS) {
        int64_t num_keys = stop - start < TILE_KEYS ? stop - start : TILE_KEYS;
        prefetch(job, entries, start + TILE_KEYS, stop, kv_head, job->k);
        pack_keys(job, entries, start, num_keys, kv_head, scratch.keys);
        prefetch(job, entries, start + TILE_KEYS, stop, kv_head, job->v);
        pack_values(job, entries, start, num_keys, kv_head, scratch.values);
        for (int64_t first_key = 0; first_key < num_keys; first_key += PANEL)
            for (int64_t row = 0, rows; row < num_rows; row += rows) {
                rows = next_rows(num_rows - row);
                FOR_ROWS(rows, SCORE)
            }
        for (int64_t row = 0; row < num_rows; row++) {
            int64_t position = queries->first_position + row / group;
            int64_t first = job->attention->window ? position + 1 - job->attention->window - start : 0;
            weigh(job, &scratch, row, first, position + 1 - start);
        }
        for (int64_t d = 0; d < head_dim; d += PANEL)
            for (int64_t row = 0, rows; row < num_rows; row += rows) {
                rows = next_rows(num_rows - row);
                FOR_ROWS(rows, ACCUMULATE)
            }
    }

    for (int64_t row = 0; row < num_rows; row++) {
        int64_t token = queries->first_token + row / group, head = kv_head * group + row % group;
        uint16_t *out = job->out + (token * job->attention->num_heads + head) * head_dim;
        __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(scratch.totals[row])));
        for (int64_t d = 0; d < head_dim; d += 16)
            store_bf16(out + d, _mm512_mul_ps(_mm512_load_ps(scratch.sums + row * head_dim + d), inverse), 0xffff);
    }
}

void bros_attend(const struct bros_step *step, const struct bros_attention *attention, uint16_t *qkv,
                 const uint16_t *cos, const uint16_t *sin, int64_t rotary_dim, uint16_t *k, uint16_t *v, uint16_t *out)
{
    const int64_t num_heads = attention->num_heads, num_kv_heads = attention->num_kv_heads;
    struct attend_job job = {.step = step, .attention = attention, .qkv = qkv,
                             .qkv_stride = (num_heads + 2 * num_kv_heads) * attention->head_dim, .cos = cos,
                             .sin = sin, .rotary_dim = rotary_dim, .k = k, .v = v, .out = out};
    const float softcap = attention->softcap;
    job.cap = softcap * LOG2E;
    job.scale = softcap != 0.0f ? attention->scale / softcap : attention->scale * LOG2E;
    bros_run(prepare_tile, &job, (step->num_tokens + TILE_TOKENS - 1) / TILE_TOKENS);
    bros_run(attend_tile, &job, step->num_queries * num_kv_heads);
}
