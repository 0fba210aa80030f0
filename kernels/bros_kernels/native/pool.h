/* Threads that share the tiles of one job at a time.
 *
 * Tiles are claimed one by one, so a thread whose core is busy elsewhere costs its share and no more: the caller works
 * too, and waits only for tiles that another thread has begun.
 */
#ifndef BROS_POOL_H
#define BROS_POOL_H

#include <stddef.h>
#include <stdint.h>

#define BROS_EXPORT __attribute__((visibility("default")))

typedef void (*bros_tile_fn)(const void *job, int64_t tile);

/* Whether this processor has what the kernels are written for. */
BROS_EXPORT int bros_is_supported(void);

/* Have `num_threads` threads from now on, the caller included. Only between jobs. Returns 0, or an errno. */
BROS_EXPORT int bros_set_num_threads(int num_threads);

/* Memory for the time of one product or attention, or of what calls those. Whoever uses it asks once. Ends the process
 * where there is none. */
enum bros_scratch_user { BROS_CALL_SCRATCH, BROS_OUTER_SCRATCH };
void *bros_scratch(enum bros_scratch_user user, size_t num_bytes);

/* Run fn(job, tile) for all tiles, 0 <= tile < num_tiles < 2^31. One caller at a time; returns when all are done. */
void bros_run(bros_tile_fn fn, const void *job, int64_t num_tiles);

#endif
