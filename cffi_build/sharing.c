/* sharing.c: blocks in which the kernel may merge equal pages (KSM, Documentation/admin-guide/mm/ksm.rst), and what the
 * rest of the engine has to know of that. What was seen of the kernel (6.18):
 *
 * - UFFDIO_MOVE and MADV_COLLAPSE refuse a page that was merged (EBUSY, EAGAIN). MADV_UNMERGEABLE gives each its own copy
 *   again, and keeps all in that range from being merged until MADV_MERGEABLE.
 * - Write protection by userfaultfd can be put on a merged page, and stays. But a page that is merged *afterwards* loses
 *   it, and the next write is told to nobody. So a block is taken out, saved live or made large while it is suspended;
 *   and a coarse trace takes each page that lacks its protection for written (coarse.c). */
#define _GNU_SOURCE
#include "engine_inside.h"

#include <errno.h>

static int advise(struct pv_engine *engine, uint64_t page, uint64_t count, int advice)
{
    int error;
    do /* a signal may end the kernel's work on many pages */
        error = madvise(ram_at(engine, page), count * PV_PAGE, advice) ? -errno : 0;
    while (error == -EINTR);
    return error;
}

bool block_mergeable(const struct pv_engine *engine, uint64_t block)
{
    return block_word(engine, block) & PV_BLOCK_MERGEABLE;
}

int share_suspend(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    return block_mergeable(engine, page / PV_BLOCK_PAGES) ? advise(engine, page, count, MADV_UNMERGEABLE) : 0;
}

void share_go_on(struct pv_engine *engine, uint64_t page, uint32_t count)
{
    /* If it fails, these pages are not merged: that costs memory and nothing else. */
    if (block_mergeable(engine, page / PV_BLOCK_PAGES) && !live_claimed(engine))
        (void)advise(engine, page, count, MADV_MERGEABLE);
}

int share_suspend_all(struct pv_engine *engine)
{
    int error = 0;
    for (uint64_t block = 0; !error && block < engine->blocks; block++) {
        if (!block_mergeable(engine, block))
            continue;
        block_lock_plain(engine, block); /* what it holds stays as it is */
        error = share_suspend(engine, block * PV_BLOCK_PAGES, PV_BLOCK_PAGES);
        block_unlock(engine, block);
    }
    return error;
}

void share_go_on_all(struct pv_engine *engine)
{
    for (uint64_t block = 0; block < engine->blocks; block++) {
        if (!block_mergeable(engine, block))
            continue;
        block_lock_plain(engine, block);
        share_go_on(engine, block * PV_BLOCK_PAGES, PV_BLOCK_PAGES);
        block_unlock(engine, block);
    }
}

int share_end(struct pv_engine *engine, uint64_t block)
{
    if (!block_mergeable(engine, block))
        return 0;
    int error = share_suspend(engine, block * PV_BLOCK_PAGES, PV_BLOCK_PAGES);
    trace_enter(engine);
    if (!error)
        block_flags(engine, block, 0, PV_BLOCK_MERGEABLE);
    trace_leave(engine, block * PV_BLOCK_PAGES, PV_BLOCK_PAGES); /* some may have lost their protection */
    return error;
}

int share_begin(struct pv_engine *engine, uint64_t block)
{
    if (!(block_word(engine, block) & PV_BLOCK_SMALL))
        return -EINVAL; /* the kernel would break the large page behind our back */
    trace_enter(engine); /* before the first page is merged, a trace must know of it */
    block_flags(engine, block, PV_BLOCK_MERGEABLE | PV_BLOCK_BROKEN, 0);
    trace_leave(engine, block * PV_BLOCK_PAGES, 0);
    if (live_claimed(engine))
        return 0; /* from its end on */
    int error = advise(engine, block * PV_BLOCK_PAGES, PV_BLOCK_PAGES, MADV_MERGEABLE);
    if (error)
        (void)!share_end(engine, block);
    return error;
}

int pv_engine_share(struct pv_engine *engine, uint64_t block, int on)
{
    if (block >= engine->pages / PV_BLOCK_PAGES)
        return -EINVAL;
    block_lock(engine, block);
    int error = on ? share_begin(engine, block) : share_end(engine, block);
    block_unlock(engine, block);
    return error;
}
