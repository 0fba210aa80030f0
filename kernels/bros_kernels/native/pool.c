#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "simd.h"

/* How long an idle thread looks for work before it sleeps: two calls of one layer are some 20 us apart. First without
 * giving its core away, then letting others have it between two looks. */
enum { SPINS_BEFORE_YIELD = 100, YIELDS_BEFORE_SLEEP = 200 };

/* All that decides a claim, in one word: the number of tiles, and below it the next one. Adding one claims a tile;
 * whether there was one follows from the same word, so a thread that comes late cannot mistake a job for the next.
 * While a claimed tile is not done, its job is not over and `job` does not change. */
static _Atomic uint64_t claims;
static struct {
    bros_tile_fn fn;
    const void *argument;
} job;
static _Atomic int64_t num_done;

static _Atomic int num_sleeping;
static _Atomic uint32_t wake_count; /* the futex */
static _Atomic int is_stopping;

static int num_threads = 1;
static pthread_t *threads;

static int is_tile(uint64_t word) { return (uint32_t)word < word >> 32; }

/* Work until no tile is left. */
static void work(void)
{
    for (;;) {
        uint64_t word = atomic_load_explicit(&claims, memory_order_relaxed);
        if (!is_tile(word))
            return; /* looking first keeps the counter from running over */
        word = atomic_fetch_add_explicit(&claims, 1, memory_order_acquire);
        if (!is_tile(word))
            return;
        job.fn(job.argument, (int64_t)(uint32_t)word);
        atomic_fetch_add_explicit(&num_done, 1, memory_order_release);
    }
}

static int has_work(void)
{
    return is_tile(atomic_load(&claims)) || atomic_load(&is_stopping);
}

static void wait_for_work(void)
{
    for (int spins = 0; spins < SPINS_BEFORE_YIELD; spins++) {
        if (has_work())
            return;
        _mm_pause();
    }
    for (int yields = 0; yields < YIELDS_BEFORE_SLEEP; yields++) {
        if (has_work())
            return;
        sched_yield();
    }
    uint32_t seen = atomic_load(&wake_count);
    atomic_fetch_add(&num_sleeping, 1);
    if (!has_work()) /* after the count: whoever brings work now sees a sleeper */
        syscall(SYS_futex, &wake_count, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&num_sleeping, 1);
}

static void wake_sleepers(void)
{
    if (atomic_load(&num_sleeping) > 0) {
        atomic_fetch_add(&wake_count, 1);
        syscall(SYS_futex, &wake_count, FUTEX_WAKE_PRIVATE, num_threads, NULL, NULL, 0);
    }
}

static void *thread_main(void *unused)
{
    (void)unused;
    while (!atomic_load(&is_stopping)) {
        work();
        wait_for_work();
    }
    return NULL;
}

static void stop_threads(void)
{
    atomic_store(&is_stopping, 1);
    wake_sleepers();
    for (int index = 0; index < num_threads - 1; index++)
        pthread_join(threads[index], NULL);
    atomic_store(&is_stopping, 0);
    free(threads);
    threads = NULL;
    num_threads = 1;
}

int bros_is_supported(void) { return simd_is_supported(); }

int bros_set_num_threads(int wanted)
{
    if (wanted == num_threads)
        return 0;
    stop_threads();
    threads = calloc((size_t)wanted, sizeof *threads);
    if (!threads)
        return ENOMEM;
    while (num_threads < wanted) {
        int error = pthread_create(&threads[num_threads - 1], NULL, thread_main, NULL);
        if (error)
            return error;
        num_threads++;
    }
    return 0;
}

void *bros_scratch(enum bros_scratch_user user, size_t num_bytes)
{
    static struct {
        void *memory;
        size_t size;
    } scratches[2];
    if (num_bytes > scratches[user].size) {
        free(scratches[user].memory);
        scratches[user].size = (num_bytes + 63) / 64 * 64;
        scratches[user].memory = aligned_alloc(64, scratches[user].size);
        if (!scratches[user].memory)
            abort();
    }
    return scratches[user].memory;
}

void bros_run(bros_tile_fn fn, const void *argument, int64_t num_tiles)
{
    if (num_threads == 1 || num_tiles == 1) {
        for (int64_t tile = 0; tile < num_tiles; tile++)
            fn(argument, tile);
        return;
    }
    job.fn = fn;
    job.argument = argument;
    atomic_store_explicit(&num_done, 0, memory_order_relaxed);
    /* Sequentially consistent, as the sleepers' count is: a thread that sees no work is seen asleep. */
    atomic_store(&claims, (uint64_t)num_tiles << 32);
    wake_sleepers();
    work();
    for (int looks = 0; atomic_load_explicit(&num_done, memory_order_acquire) < num_tiles; looks++) {
        if (looks < SPINS_BEFORE_YIELD)
            _mm_pause();
        else
            sched_yield();
    }
}
