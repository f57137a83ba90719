/* engine.c: the memory engine's beginning and end, and what is known about it. */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Zeros that cost nothing until they are written to: the map of a large VM may never be touched as a whole. */
static void *map_zeros(uint64_t size)
{
    void *zeros = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return zeros == MAP_FAILED ? NULL : zeros;
}

static bool has_pagemap_scan(struct pv_engine *engine)
{
    struct page_region found;
    struct pm_scan_arg scan = {.size = sizeof(scan), .start = (uintptr_t)engine->ram,
                               .end = (uintptr_t)engine->ram + PV_PAGE, .vec = (uintptr_t)&found, .vec_len = 1,
                               .category_anyof_mask = PAGE_IS_PRESENT, .return_mask = PAGE_IS_PRESENT};
    return ioctl(engine->pagemap, PAGEMAP_SCAN, &scan) >= 0;
}

int pv_engine_open(uint8_t *ram, uint64_t size, uint64_t small_blocks, struct pv_engine **out)
{
    struct pv_engine *engine = calloc(1, sizeof(*engine));
    if (!engine)
        return -ENOMEM;
    engine->uffd = engine->aside_uffd = engine->wake = -1;
    engine->ram = ram;
    engine->size = size;
    engine->workers = 1;
    engine->pages = size / PV_PAGE;
    engine->blocks = (size + PV_BLOCK - 1) / PV_BLOCK;
    pthread_mutex_init(&engine->span_mutex, NULL);
    pthread_mutex_init(&engine->slot_mutex, NULL);
    pthread_cond_init(&engine->slot_free, NULL);
    pthread_mutex_init(&engine->trace.mutex, NULL);
    live_init(&engine->live);
    limit_init(&engine->limit);
    pthread_mutex_init(&engine->fail_mutex, NULL);
    pthread_cond_init(&engine->fail_news, NULL);
    engine->page_words = map_zeros(engine->pages * sizeof(uint64_t));
    engine->block_words = map_zeros(engine->blocks * sizeof(uint64_t));
    engine->samples = map_zeros(engine->blocks * sizeof(struct sample));
    engine->spans = calloc((size >> SPAN_SHIFT) + 1, sizeof(struct span));
    engine->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    int error = engine->pagemap < 0 ? -errno : 0;
    if (error || !engine->page_words || !engine->block_words || !engine->samples || !engine->spans) {
        pv_engine_close(engine);
        return error ? error : -ENOMEM;
    }
    engine->scans = has_pagemap_scan(engine);
    for (uint64_t block = 0; block < engine->blocks && block < small_blocks; block++)
        engine->block_words[block] = PV_BLOCK_SMALL | PV_BLOCK_BROKEN;
    *out = engine;
    return 0;
}

/* Also after an attempt to equip that failed: another may follow. */
static void unequip(struct pv_engine *engine)
{
    int *fds[] = {&engine->uffd, &engine->aside_uffd, &engine->wake};
    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (*fds[i] >= 0)
            close(*fds[i]); /* of a userfaultfd: unregisters all, and lets every waiting thread go */
        *fds[i] = -1;
    }
    if (engine->aside)
        munmap(engine->aside, engine->size);
    if (engine->staging)
        munmap(engine->staging, (size_t)SLOTS * PV_BLOCK);
    if (engine->zero)
        munmap(engine->zero, PV_PAGE);
    engine->aside = engine->staging = engine->zero = NULL;
}

void pv_engine_close(struct pv_engine *engine)
{
    pv_limit_end(engine);
    fault_thread_end(engine);
    unequip(engine);
    if (engine->pagemap >= 0)
        close(engine->pagemap);
    if (engine->page_words)
        munmap(engine->page_words, engine->pages * sizeof(uint64_t));
    if (engine->block_words)
        munmap(engine->block_words, engine->blocks * sizeof(uint64_t));
    if (engine->samples)
        munmap(engine->samples, engine->blocks * sizeof(struct sample));
    free(engine->spans);
    free(engine->trace.marks);
    free(engine->trace.streaks);
    free(engine->trace.hits);
    pthread_mutex_destroy(&engine->span_mutex);
    pthread_mutex_destroy(&engine->slot_mutex);
    pthread_cond_destroy(&engine->slot_free);
    pthread_mutex_destroy(&engine->trace.mutex);
    live_deinit(&engine->live);
    limit_deinit(&engine->limit);
    pthread_mutex_destroy(&engine->fail_mutex);
    pthread_cond_destroy(&engine->fail_news);
    free(engine);
}

static int handshake(int fd, uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    return ioctl(fd, UFFDIO_API, &api) < 0 ? -errno : 0;
}

static int map_areas(struct pv_engine *engine)
{
    void *aside, *staging;
    int error = pv_map(engine->size, PV_BACKING_THP, &aside);
    if (error)
        return error;
    engine->aside = aside;
    error = pv_map((size_t)SLOTS * PV_BLOCK, PV_BACKING_THP, &staging);
    if (error)
        return error;
    engine->staging = staging;
    engine->zero = map_zeros(PV_PAGE);
    return engine->zero ? 0 : -ENOMEM;
}

int pv_engine_equip(struct pv_engine *engine, int uffd, int aside_uffd, uint32_t how)
{
    uint64_t features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_THREAD_ID;
    engine->move = how & PV_ENGINE_MOVE;
    engine->poison = how & PV_ENGINE_POISON;
    engine->aside_uffd = aside_uffd;
    engine->wake = eventfd(0, EFD_CLOEXEC);
    int error = engine->wake < 0 ? -errno : map_areas(engine);
    error = error ? error : handshake(uffd, features | (engine->move ? UFFD_FEATURE_MOVE : 0));
    if (!error && engine->move) {
        /* Only a registered range can be moved to. No fault comes from it: we touch only what we put there. */
        struct uffdio_register request = {.range = {(uintptr_t)engine->aside, engine->size},
                                          .mode = UFFDIO_REGISTER_MODE_MISSING};
        error = handshake(aside_uffd, UFFD_FEATURE_MOVE);
        if (!error && ioctl(aside_uffd, UFFDIO_REGISTER, &request) < 0)
            error = -errno;
    }
    if (error) {
        close(uffd);
        unequip(engine);
    } else {
        engine->uffd = uffd;
    }
    return error;
}

int pv_engine_equipped(const struct pv_engine *engine) { return engine->uffd >= 0; }

void pv_engine_vcpu(struct pv_engine *engine, uint32_t index, const struct pv_vcpu *vcpu)
{
    if (index < PV_MAX_CPUS)
        engine->vcpus[index] = vcpu;
}

void pv_engine_home(struct pv_engine *engine, uint32_t number, const struct pv_home *home)
{
    if (number < PV_HOMES)
        engine->homes[number] = *home;
}

void pv_engine_workers(struct pv_engine *engine, uint32_t workers)
{
    engine->workers = workers < 1 ? 1 : workers > PV_MAX_WORKERS ? PV_MAX_WORKERS : workers;
}

uint64_t *pv_engine_pages(struct pv_engine *engine) { return engine->page_words; }

uint64_t *pv_engine_blocks(struct pv_engine *engine) { return engine->block_words; }

void pv_engine_read_stats(struct pv_engine *engine, struct pv_engine_stats *out)
{
    /* Each counter is whole; together they are of about the same time. */
    const uint64_t *from = (const uint64_t *)&engine->stats;
    uint64_t *to = (uint64_t *)out;
    for (size_t i = 0; i < sizeof(*out) / sizeof(uint64_t); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}
