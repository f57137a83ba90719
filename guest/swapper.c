/* swapper.c: pages by itself: an array that is larger than its memory, on a virtio disk that it swaps to, with a page table
 * and a clock of its own; each page is checked when it is touched. What happens follows from the options alone;
 * pyvmm/testing/swapper_model.py does the same, and knows what must be where.
 *
 * A touch of page v, of pages= of them: v is random, or with order=seq the next one. If it is in no frame it is brought from
 * its block, together with pages in the blocks behind that one, up to out= (read ahead, as far as frames are free), each
 * run of neighbours by one request. Before that, while fewer than out= frames are free, the clock's hand takes frames that
 * were not used since it last came by, up to out= of them; those whose page has no block, or another version there, are
 * written to the next free blocks, in one go. A touch checks the page and, but for read= percent of them, stamps the next
 * version: then its block is free. Pages that were never stamped are in no block; they begin as version 0.
 *
 * Progress: work[0].count = touches, .writes = pages written out, .pass = write-outs, .index = pages brought. */
#include "lib/stamp.h"
#include "lib/virtio.h"

GUEST("swapper", "pages by itself, with an array larger than its memory and a virtio disk to swap to",
      "pages=N of the array (default twice the frames)\n"
      "frames=N of memory for them (default half of what there is)\n"
      "out=N pages that go out, or come, in one go (default 16, at most 256)\n"
      "touches=N then all is checked, and the end (default 0 = for ever)\n"
      "read=PERCENT of the touches only read (default 50)\n"
      "order=ORDER random (default) or seq\n"
      "flush=1 flushes the disk after each write-out, and prints how many there were\n"
      "n=N the N-th disk, counted from 0 (default)\n"
      "wait=HOW irq (default) or poll\n"
      "seed=N of all that is random (default 1)\n");

#define VECTOR 0x41
#define IN 0
#define OUT 1
#define FLUSH 4
#define F_FLUSH (1ul << 9)
#define LANES 16u
#define MOST 256u
#define NONE UINT32_MAX

struct entry {
    uint32_t version, frame, block;
    bool dirty, used; /* another version than the block has; touched since the clock's hand came by */
};

static struct virtio device;
static struct virtq queue;
static struct region region;
static struct entry *entries;
static uint32_t *page_in, *page_at; /* of each frame, of each block: its page, or NONE */
static uint64_t first_frame, frames, blocks, pages, out, reads, touches, mixed_seed, state;
static uint64_t free_frames, next_frame, next_block, hand;
static bool flushes;

static struct {
    struct {
        uint32_t kind, reserved;
        uint64_t sector;
    } header;
    int head;
    uint8_t status;
} lanes[LANES];
static unsigned under_way;

static uint64_t *frame_at(uint64_t frame) { return region_page(&region, first_frame + frame); }

static struct content content_of(uint64_t page, uint64_t version)
{
    return content_from(mix(mix(mixed_seed + page * GOLDEN) + version));
}

static _Noreturn void fail(const char *text, uint64_t number)
{
    print("FAIL: ");
    print(text);
    print(" ");
    print_number(number);
    print(" after touch ");
    print_number(progress->work[0].count);
    print("\n");
    leave(1);
}

/* ---- the disk ---- */
static void answers(void) /* of all that was asked for */
{
    virtq_notify(&device, &queue);
    while (under_way) {
        uint32_t written;
        int head = virtq_wait(&device, &queue, &written);
        if (head < 0)
            fail("no answer; status", virtio_get(&device, VIRTIO_STATUS));
        unsigned i = 0;
        while (i < LANES && lanes[i].head != head)
            i++;
        if (i == LANES)
            fail("an answer to nothing:", (uint64_t)head);
        lanes[i].head = -1;
        under_way--;
        if (lanes[i].status)
            fail("a request failed, at sector", lanes[i].header.sector);
    }
}

static void ask(uint32_t kind, uint64_t block, void *data, uint64_t count)
{
    if (under_way == LANES)
        answers();
    unsigned i = 0;
    while (lanes[i].head >= 0)
        i++;
    lanes[i].header.kind = kind;
    lanes[i].header.sector = block * (PAGE_SIZE / 512);
    lanes[i].status = 0xee;
    struct virtio_buffer buffers[] = {{&lanes[i].header, 16, false},
                                      {data, (uint32_t)(count * PAGE_SIZE), kind == IN},
                                      {&lanes[i].status, 1, true}};
    if (!count)
        buffers[1] = buffers[2];
    lanes[i].head = virtq_post(&device, &queue, buffers, count ? 3 : 2);
    if (lanes[i].head < 0)
        fail("no room for a request", under_way);
    under_way++;
}

/* Frames and blocks of pages, in order: a request for each run of both. */
static void transfer(uint32_t kind, const uint32_t *which, uint64_t count)
{
    for (uint64_t i = 0, run; i < count; i += run) {
        struct entry *first = &entries[which[i]];
        for (run = 1; i + run < count; run++) {
            struct entry *next = &entries[which[i + run]];
            if (next->block != first->block + run || next->frame != first->frame + run ||
                frame_at(next->frame) != frame_at(first->frame) + run * WORDS)
                break;
        }
        ask(kind, first->block, frame_at(first->frame), run);
    }
    answers();
}

/* ---- frames and blocks ---- */
static void give_block(uint32_t page)
{
    for (uint64_t looked = 0; page_at[next_block] != NONE; looked++) {
        if (looked == blocks)
            fail("no block is free for page", page);
        next_block = (next_block + 1) % blocks;
    }
    entries[page].block = (uint32_t)next_block;
    page_at[next_block] = page;
    next_block = (next_block + 1) % blocks;
}

static void free_block(uint32_t page)
{
    if (entries[page].block != NONE)
        page_at[entries[page].block] = NONE;
    entries[page].block = NONE;
}

static void give_frame(uint32_t page)
{
    while (page_in[next_frame] != NONE)
        next_frame = (next_frame + 1) % frames;
    entries[page].frame = (uint32_t)next_frame;
    page_in[next_frame] = page;
    free_frames--;
    next_frame = (next_frame + 1) % frames;
}

static void write_out(void)
{
    static uint32_t victims[MOST], dirty[MOST];
    uint64_t taken = 0, changed = 0;
    for (uint64_t looked = 0; taken < out && looked < 2 * frames; looked++, hand = (hand + 1) % frames) {
        uint32_t page = page_in[hand];
        if (page == NONE)
            continue;
        if (entries[page].used) {
            entries[page].used = false;
            continue;
        }
        victims[taken++] = page;
        entries[page].used = true; /* the hand may come by again */
        if (entries[page].dirty) {
            give_block(page);
            dirty[changed++] = page;
        }
    }
    transfer(OUT, dirty, changed);
    if (changed && flushes) {
        ask(FLUSH, 0, NULL, 0);
        answers();
    }
    for (uint64_t i = 0; i < taken; i++) {
        struct entry *entry = &entries[victims[i]];
        page_in[entry->frame] = NONE;
        entry->frame = NONE;
        entry->dirty = entry->used = false;
        free_frames++;
    }
    if (!changed)
        return;
    progress->work[0].writes += changed;
    progress->work[0].pass++;
    if (flushes) {
        print_number(progress->work[0].pass);
        print("\n");
    }
}

static void bring(uint32_t page)
{
    static uint32_t coming[MOST];
    uint64_t count = 0, block = entries[page].block;
    while (free_frames < out)
        write_out();
    if (block == NONE) {
        give_frame(page);
        entries[page].dirty = true;
        fill(frame_at(entries[page].frame), content_of(page, 0));
        return;
    }
    for (; count < out && block < blocks; block++) {
        uint32_t next = page_at[block];
        if (next == NONE || entries[next].frame != NONE)
            break;
        give_frame(next);
        coming[count++] = next;
    }
    transfer(IN, coming, count);
    progress->work[0].index += count;
}

/* ---- touches ---- */
static void check(uint32_t page)
{
    struct content right = content_of(page, entries[page].version);
    const uint64_t *bytes = frame_at(entries[page].frame);
    if (same(bytes, right))
        return;
    tell_wrong(page, bytes, right);
    print(", version ");
    print_number(entries[page].version);
    print(" expected\n");
    leave(1);
}

static void touch(uint32_t page, bool writes)
{
    struct entry *entry = &entries[page];
    if (entry->frame == NONE)
        bring(page);
    check(page);
    entry->used = true;
    if (writes) {
        free_block(page);
        entry->dirty = true;
        fill(frame_at(entry->frame), content_of(page, entry->version + 1));
        entry->version++;
    }
    progress->work[0].count++;
}

/* ---- options ---- */
static void *take_table(uint64_t *page, uint64_t bytes)
{
    void *found = region_page(&region, *page);
    *page += (bytes + PAGE_SIZE - 1) / PAGE_SIZE;
    return found;
}

static void parse_memory(void)
{
    uint64_t most = region.low_pages / 2; /* the rest is enough for the tables of 64 times as many pages */
    blocks = (virtio_get(&device, VIRTIO_CONFIG) | (uint64_t)virtio_get(&device, VIRTIO_CONFIG + 4) << 32) / 8;
    blocks = blocks < NONE ? blocks : NONE - 1;
    frames = option_at_most("frames", most, region.low_pages);
    pages = option_at_most("pages", 2 * frames, 64 * most);
    out = option_at_most("out", 16, MOST);
    if (pages == 0 || out == 0 || frames < 2 * out)
        refuse("too little: frames= must be twice out=, pages= and out= at least 1", "");
    if (blocks < pages + out)
        refuse("the disk is too small for pages=", option("pages", ""));
    if (blocks > 64 * most)
        blocks = 64 * most;
    entries = take_table(&first_frame, pages * sizeof(*entries));
    page_in = take_table(&first_frame, frames * sizeof(*page_in));
    page_at = take_table(&first_frame, blocks * sizeof(*page_at));
    if (first_frame + frames > region.low_pages)
        refuse("too little memory for tables and frames", "");
    for (uint64_t page = 0; page < pages; page++)
        entries[page] = (struct entry){0, NONE, NONE, false, false};
    memset(page_in, 0xff, frames * sizeof(*page_in));
    memset(page_at, 0xff, blocks * sizeof(*page_at));
    free_frames = frames;
    progress->region_gpa = (uint64_t)frame_at(0);
    progress->region_size = frames * PAGE_SIZE;
}

static void find_disk(void)
{
    irq_init();
    if (!virtio_find(&device, VIRTIO_BLOCK, (unsigned)option_number("n", 0)))
        refuse("no virtio disk: give the VM --swap-disk or --disk", "");
    if (!virtio_begin(&device, virtio_offered(&device) & F_FLUSH,
                      option_is("wait", "irq", "poll") ? 0 : VECTOR) ||
        !virtq_begin(&device, &queue, 0))
        fail("the disk refuses its driver", 0);
    virtio_drive(&device);
    for (unsigned i = 0; i < LANES; i++)
        lanes[i].head = -1;
}

int guest_main(void)
{
    region = memory_region(BLOCK_SIZE);
    find_disk();
    parse_memory();
    progress->seed = option_number("seed", 1);
    mixed_seed = mix(progress->seed);
    state = mix(mixed_seed);
    reads = option_at_most("read", 50, 100);
    touches = option_number("touches", 0);
    flushes = option_number("flush", 0);
    bool in_order = option_is("order", "random", "seq");
    progress->cpus = 1;
    progress->status = PV_STATUS_RUNNING;
    for (uint64_t i = 0; touches == 0 || i < touches; i++) {
        uint64_t page = in_order ? i % pages : random_below(&state, pages);
        touch((uint32_t)page, random_below(&state, 100) >= reads);
    }
    for (uint64_t page = 0; page < pages; page++)
        touch((uint32_t)page, false);
    print("SUCCESS: ");
    print_number(progress->work[0].count);
    print(" touches, ");
    print_number(progress->work[0].writes);
    print(" pages out, ");
    print_number(progress->work[0].index);
    print(" back\n");
    return 0;
}
