/* fuzz_blocks.c: the maps and storage blocks of a snapshot, hostile, for cffi_build/unpack.c, load.c and codec.c. An input
 * is options, the three maps and LARGE, and what lies behind the header of the file: their sections are written with
 * right checksums, so that what they say is looked at. What is loaded must be what is read block by block, and no page
 * may change that was not wanted. */
#include "fuzz.h"

#include <stddef.h>

#define HEADER 4096u
#define PAGES_MOST 10000u /* an index of two chunks */
#define ROWS_MOST 300u
#define AREA_MOST (1u << 20)
#define WORDS (PAGES_MOST / 64 + 1)

/* The first bytes of an input. */
struct options {
    uint8_t codec, slots, has_parent, flags;
    uint16_t pages, blocks, backs;
    uint16_t unwanted; /* a pattern of pages that are there already */
    uint16_t broken;   /* HOW_BROKEN: which section's checksum is wrong */
    uint16_t cut;      /* HOW_CUT: bytes that the file has lost at its end */
};

#define HOW_UNWANTED 1
#define HOW_BROKEN 2
#define HOW_CUT 4

static struct area ram;
static uint8_t *out; /* ends where nothing can be accessed */
static uint8_t *file;
static int fd;

/* ---- a snapshot of the input ---- */

struct made {
    struct pv_snapshot snapshot;
    uint64_t sums[4][4];
    uint8_t ready[4][4];
    uint64_t size; /* of the file */
};

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* So much of the input, and zeros where there is no more. */
static void take(const uint8_t **data, size_t *size, uint8_t *to, uint64_t wanted)
{
    size_t part = (size_t)least(wanted, *size);
    memcpy(to, *data, part);
    memset(to + part, 0, wanted - part);
    *data += part;
    *size -= part;
}

static void seal(struct made *made, struct pv_section *section, uint32_t number, const uint8_t *bytes, uint64_t size)
{
    section->offset = made->size;
    section->length = (size + 7) & ~7ull;
    CHECK(section->length <= 4 * PV_CHUNK);
    memset(file + made->size, 0, section->length);
    memcpy(file + made->size, bytes, size);
    for (uint64_t at = 0; at < section->length; at += PV_CHUNK)
        made->sums[number][at / PV_CHUNK] =
            pv_hash(file + made->size + at, least(PV_CHUNK, section->length - at), 0);
    CHECK((section->data = malloc(section->length + !section->length))); /* no more: one byte behind is seen */
    section->sums = made->sums[number];
    section->ready = made->ready[number];
    made->size += section->length;
}

/* As format.decode and reader.py have it: what they refuse does not come here. */
static void make(struct made *made, const struct options *options, const uint8_t *data, size_t size)
{
    struct pv_snapshot *snapshot = &made->snapshot;
    memset(made, 0, sizeof(*made));
    snapshot->fd = fd;
    snapshot->codec = options->codec % PV_CODECS;
    snapshot->slots = 4u << options->slots % 8;
    snapshot->has_parent = options->has_parent & 1;
    snapshot->pages = 1 + options->pages % PAGES_MOST;
    snapshot->blocks = least(options->blocks % ROWS_MOST, snapshot->pages);
    uint64_t most = least(snapshot->pages, snapshot->blocks * snapshot->slots);
    snapshot->backs = most < options->backs ? most : options->backs;
    snapshot->backs = snapshot->backs < snapshot->blocks ? snapshot->blocks : snapshot->backs;

    static uint8_t maps[4][PAGES_MOST * 8];
    uint64_t sizes[4] = {snapshot->pages * 8, snapshot->blocks * sizeof(struct pv_stored), snapshot->backs * 8,
                         (snapshot->pages + 512 * 64 - 1) / (512 * 64) * 8};
    for (int i = 0; i < 4; i++)
        take(&data, &size, maps[i], sizes[i]);
    uint64_t area = least(size, AREA_MOST) & ~7ull;
    memcpy(file + HEADER, data, area);
    snapshot->begin = HEADER;
    snapshot->end = made->size = HEADER + area;
    struct pv_section *sections[4] = {&snapshot->index, &snapshot->table, &snapshot->back, &snapshot->large};
    for (uint32_t i = 0; i < 4; i++)
        seal(made, sections[i], i, maps[i], sizes[i]);
    if (options->flags & HOW_BROKEN)
        made->sums[options->broken % 4][0] ^= 1;
    if (options->flags & HOW_CUT)
        made->size -= options->cut % made->size;
    CHECK(!ftruncate(fd, 0) && pwrite(fd, file, made->size, 0) == (ssize_t)made->size);
}

static void unmake(struct made *made)
{
    free(made->snapshot.index.data);
    free(made->snapshot.table.data);
    free(made->snapshot.back.data);
    free(made->snapshot.large.data);
}

/* ---- what must hold ---- */

static bool is_set(const uint64_t *bits, uint64_t at) { return bits[at / 64] >> at % 64 & 1; }

/* Nothing but what is said of damaged files. */
static void expected(int error)
{
    CHECK(error == 0 || error == -EBADMSG || error == -EUCLEAN || error == -ENODATA || error == -EILSEQ);
}

/* A block by itself, its bytes flush against the guard behind `out`. *known: the maps agree about it. */
static int read_block(const struct pv_snapshot *snapshot, uint64_t block, struct pv_stored *row, uint64_t *pages,
                      uint8_t **bytes, bool *known)
{
    int error = pv_snapshot_block(snapshot, block, row, pages);
    expected(error);
    *known = !error;
    if (error)
        return error;
    CHECK(row->slots >= 1 && row->slots <= snapshot->slots);
    for (uint32_t slot = 0; slot < row->slots; slot++)
        CHECK(pages[slot] < snapshot->pages);
    *bytes = out + PV_STORE_MAX - row->slots * PAGE;
    error = pv_snapshot_read(snapshot, block, row, pages, *bytes);
    expected(error);
    return error;
}

static void look_at_pages(const struct pv_snapshot *snapshot)
{
    for (uint64_t page = 0; page < snapshot->pages; page += 1 + snapshot->pages / 64) {
        uint64_t word;
        int error = pv_snapshot_page(snapshot, page, &word);
        expected(error);
        if (!error && (word & PV_INDEX_KIND) == PV_INDEX_BLOCK)
            CHECK(word >> PV_INDEX_BLOCK_SHIFT < snapshot->blocks);
        CHECK(pv_snapshot_large(snapshot, page / 512) <= 1);
    }
    uint64_t word;
    CHECK(pv_snapshot_page(snapshot, snapshot->pages, &word) == -EINVAL);
}

/* After all was loaded, or up to the block `failed` with `error`. before: the pages that were wanted. */
static void compare(const struct pv_snapshot *snapshot, const uint64_t *before, const uint64_t *left, int error,
                    uint64_t failed)
{
    static uint64_t pages[PV_STORE_SLOTS];
    static bool loaded[PAGES_MOST];
    memset(loaded, 0, sizeof(loaded));
    for (uint64_t block = 0; block < snapshot->blocks && block <= failed; block++) {
        struct pv_stored row;
        uint8_t *bytes = NULL;
        bool known, wanted = false;
        int result = read_block(snapshot, block, &row, pages, &bytes, &known);
        for (uint32_t slot = 0; known && slot < row.slots; slot++)
            wanted = wanted || is_set(before, pages[slot]);
        if (block == failed && error != -ENODATA) /* that is of a batch: it is told of the first block in it */
            CHECK(result == error);
        if (block == failed)
            break;
        CHECK(!result || (known && !wanted)); /* of which nothing is wanted, that is not read */
        for (uint32_t slot = 0; !result && slot < row.slots; slot++) {
            if (!is_set(before, pages[slot]))
                continue;
            CHECK(!is_set(left, pages[slot]) && !loaded[pages[slot]]);
            CHECK(!memcmp(ram.at + pages[slot] * PAGE, bytes + slot * PAGE, PAGE));
            loaded[pages[slot]] = true;
        }
    }
    area_look(&ram);
    for (uint64_t page = 0; page < PAGES_MOST; page++) {
        bool was = page < snapshot->pages && is_set(before, page);
        if (page < snapshot->pages)
            CHECK(!is_set(left, page) || was);
        if (!was && area_written(&ram, page)) /* populated with its neighbours, maybe, but as it was */
            CHECK(is_pristine(ram.at + page * PAGE, page));
        if (was && !error && !is_set(left, page))
            CHECK(loaded[page]);
    }
}

static void start(void)
{
    area_make(&ram, PAGES_MOST);
    uint8_t *at = mmap(NULL, PV_STORE_MAX + GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED && !mprotect(at, PV_STORE_MAX, PROT_READ | PROT_WRITE));
    out = at;
    CHECK((file = calloc(1, HEADER + AREA_MOST + 16 * PV_CHUNK)));
    CHECK((fd = memfd_create("snapshot", MFD_CLOEXEC)) >= 0);
    for (int codec = 0; codec < PV_CODECS; codec++)
        CHECK(!pv_codec_available(codec));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct options options;
    if (!out)
        start();
    if (size < sizeof(options))
        return 0;
    memcpy(&options, data, sizeof(options));
    struct made made;
    make(&made, &options, data + sizeof(options), size - sizeof(options));
    const struct pv_snapshot *snapshot = &made.snapshot;
    look_at_pages(snapshot);

    uint64_t missing[WORDS] = {0}, wanted[WORDS] = {0}, before[WORDS];
    pv_bits_set(missing, 0, snapshot->pages);
    for (uint64_t page = 0; options.flags & HOW_UNWANTED && page < snapshot->pages; page++)
        if (options.unwanted >> page % 13 & 1)
            pv_bits_clear(missing, page, 1);
    int error = pv_snapshot_choose(snapshot, missing, wanted);
    expected(error);
    memcpy(before, wanted, sizeof(before));
    uint64_t block = 0;
    CHECK(pv_snapshot_load(snapshot, snapshot->blocks, 1, wanted, ram.at, &block) == -EINVAL);
    error = pv_snapshot_load(snapshot, 0, snapshot->blocks, wanted, ram.at, &block);
    expected(error);
    CHECK(error ? block < snapshot->blocks : block == snapshot->blocks);
    compare(snapshot, before, wanted, error, block);
    area_clear(&ram);
    unmake(&made);
    return 0;
}

/* ---- mutations ---- */

/* Has the maps agree with the rows of BLOCKS, and the checksums of storage blocks be right, where they can be. */
static void repair(uint8_t *data, size_t size, bool maps)
{
    struct options options;
    struct made made;
    memcpy(&options, data, sizeof(options));
    if (!out)
        start();
    make(&made, &options, data + sizeof(options), size - sizeof(options));
    const struct pv_snapshot *snapshot = &made.snapshot;
    uint64_t index = sizeof(options), table = index + snapshot->index.length, back = table + snapshot->table.length;
    uint64_t area = back + snapshot->back.length + snapshot->large.length;
    for (uint64_t block = 0; block < snapshot->blocks; block++) {
        struct pv_stored row;
        uint64_t at = table + block * sizeof(row);
        if (at + sizeof(row) > size)
            break;
        memcpy(&row, data + at, sizeof(row));
        for (uint64_t slot = 0; maps && slot < row.slots && slot < PV_STORE_SLOTS; slot++) {
            uint64_t entry = back + (row.first + slot) * 8, page;
            if (row.first >= snapshot->backs || entry + 8 > size || entry + 8 > area)
                break;
            memcpy(&page, data + entry, 8);
            page %= snapshot->pages;
            memcpy(data + entry, &page, 8);
            uint64_t word = block << PV_INDEX_BLOCK_SHIFT | slot << PV_INDEX_SLOT_SHIFT | PV_INDEX_BLOCK;
            memcpy(data + index + page * 8, &word, index + page * 8 + 8 <= size ? 8 : 0);
        }
        uint64_t whole = ((uint64_t)row.length + 7) & ~7ull;
        if (row.offset < HEADER || row.offset > snapshot->end || whole > snapshot->end - row.offset)
            continue;
        row.checksum = pv_hash(file + row.offset, whole, 0);
        memcpy(data + at + offsetof(struct pv_stored, checksum), &row.checksum, sizeof(row.checksum));
    }
    unmake(&made);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    const size_t head = sizeof(struct options);
    if (seed % 3 == 0 && size > head + 8) { /* a part of it, so that the rest stays where it is */
        size_t at = (seed >> 8) % (size - 8), part = 1 + (seed >> 4) % 32;
        part = part < size - at ? part : size - at;
        uint8_t piece[32] = {0};
        memcpy(piece, data + at, part);
        LLVMFuzzerMutate(piece, part, part);
        memcpy(data + at, piece, part);
    } else {
        size = LLVMFuzzerMutate(data, size, most);
    }
    if (seed % 8 && size > head)
        repair(data, size, seed % 8 > 3);
    return size;
}
