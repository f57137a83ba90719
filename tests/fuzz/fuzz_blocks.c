/* fuzz_blocks.c: the maps and storage blocks of a snapshot, hostile, for cffi_build/unpack.c, load.c and codec.c. An input
 * is options, the three maps and LARGE, and what lies behind the header of the file: their sections are written with
 * right checksums, so that what they say is looked at. What is loaded must be what is read block by block, and no page
 * may change that was not wanted. */
#include "fuzz.h"

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
    uint64_t sums[4][4]; /* of each map, one a chunk */
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

#define MAPS 4

/* As format.decode and reader.py have it: what they refuse does not come here. sizes: bytes of each map. */
static void dimension(struct pv_snapshot *snapshot, const struct options *options, uint64_t sizes[MAPS])
{
    *snapshot = (struct pv_snapshot){
        .fd = fd,
        .codec = options->codec % PV_CODECS,
        .slots = 4u << options->slots % 8,
        .has_parent = options->has_parent & 1,
        .pages = 1 + options->pages % PAGES_MOST,
        .begin = HEADER,
    };
    snapshot->blocks = least(options->blocks % ROWS_MOST, snapshot->pages);
    uint64_t most = least(snapshot->pages, snapshot->blocks * snapshot->slots), backs = least(options->backs, most);
    snapshot->backs = backs < snapshot->blocks ? snapshot->blocks : backs;
    sizes[0] = snapshot->pages * 8;
    sizes[1] = snapshot->blocks * sizeof(struct pv_stored);
    sizes[2] = snapshot->backs * 8;
    sizes[3] = (snapshot->pages + 512 * 64 - 1) / (512 * 64) * 8;
}

static void make(struct made *made, const struct options *options, const uint8_t *data, size_t size)
{
    struct pv_snapshot *snapshot = &made->snapshot;
    static uint8_t maps[MAPS][PAGES_MOST * 8];
    uint64_t sizes[MAPS];
    memset(made, 0, sizeof(*made));
    dimension(snapshot, options, sizes);
    for (int i = 0; i < MAPS; i++)
        take(&data, &size, maps[i], sizes[i]);
    uint64_t area = least(size, AREA_MOST) & ~7ull;
    memcpy(file + HEADER, data, area);
    snapshot->end = made->size = HEADER + area;
    struct pv_section *sections[MAPS] = {&snapshot->index, &snapshot->table, &snapshot->back, &snapshot->large};
    for (uint32_t i = 0; i < MAPS; i++)
        seal(made, sections[i], i, maps[i], sizes[i]);
    if (options->flags & HOW_BROKEN)
        made->sums[options->broken % MAPS][0] ^= 1;
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
    uint64_t raw = row->slots * PAGE, whole = ((uint64_t)row->length + 7) / 8 * 8;
    CHECK(row->slots >= 1 && row->slots <= snapshot->slots);
    CHECK(row->codec == snapshot->codec || row->codec == PV_CODEC_RAW);
    CHECK(row->codec == PV_CODEC_RAW ? row->length == raw : row->length >= 1 && row->length <= raw);
    CHECK(row->offset % 8 == 0 && row->offset >= HEADER && row->offset <= UINT64_MAX - whole);
    CHECK(row->offset + whole <= snapshot->end);
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

static uint32_t next(uint32_t *random)
{
    *random = *random * 1664525u + 1013904223u;
    return *random >> 8;
}

/* One field of a row, or a word of INDEX or BACK, becomes one that a right one could be taken for. */
static void change(uint8_t *data, const struct pv_snapshot *snapshot, const uint64_t sizes[MAPS], uint32_t random)
{
    uint64_t *index = (uint64_t *)data, *back = (uint64_t *)(data + sizes[0] + sizes[1]);
    struct pv_stored *row = (struct pv_stored *)(data + sizes[0]) + next(&random) % snapshot->blocks;
    struct pv_stored *other = (struct pv_stored *)(data + sizes[0]) + next(&random) % snapshot->blocks;
    uint64_t page = next(&random) % snapshot->pages, slot = next(&random) % snapshot->backs;
    uint32_t some = next(&random) % 17;
    switch (next(&random) % 10) {
    case 0:
        row->slots = (uint16_t)(some < 9 ? some : row->slots * 2);
        break;
    case 1:
        row->first = some < 9 ? snapshot->backs - some : other->first;
        break;
    case 2:
        row->offset = some < 5 ? snapshot->end - 8 * some : some < 9 ? row->offset + some : other->offset;
        break;
    case 3:
        row->length = some < 9 ? some : some < 12 ? row->length + 8 : UINT32_MAX - some;
        break;
    case 4:
        row->codec = (uint16_t)(some % 4);
        break;
    case 5:
        back[slot] = some < 9 ? snapshot->pages - 1 + some / 4 : page | (uint64_t)some << 58;
        break;
    case 6:
        back[slot] = back[next(&random) % snapshot->backs];
        break;
    case 7:
        index[page] = some < 4 ? some : index[next(&random) % snapshot->pages];
        break;
    case 8:
        index[page] ^= 1ull << next(&random) % 64;
        break;
    default:
        *row = *other;
    }
    if (row->codec == PV_CODEC_RAW && some % 4)
        row->length = row->slots * PAGE;
}

/* Has INDEX agree with a row and what it has in BACK. */
static void agree(uint8_t *data, const struct pv_snapshot *snapshot, const uint64_t sizes[MAPS], uint64_t block)
{
    uint64_t *index = (uint64_t *)data, *back = (uint64_t *)(data + sizes[0] + sizes[1]);
    const struct pv_stored *row = (struct pv_stored *)(data + sizes[0]) + block;
    for (uint64_t slot = 0; slot < row->slots && row->first < snapshot->backs; slot++)
        if (row->first + slot < snapshot->backs && back[row->first + slot] < snapshot->pages)
            index[back[row->first + slot]] =
                block << PV_INDEX_BLOCK_SHIFT | slot << PV_INDEX_SLOT_SHIFT | PV_INDEX_BLOCK;
}

static void seal_block(struct pv_stored *row, const uint8_t *area, uint64_t size)
{
    uint64_t at = row->offset - HEADER, whole = ((uint64_t)row->length + 7) & ~7ull;
    if (row->offset >= HEADER && at <= size && whole <= size - at)
        row->checksum = pv_hash(area + at, whole, 0);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed)
{
    static uint64_t copy[(PAGES_MOST * 16 + ROWS_MOST * sizeof(struct pv_stored)) / 8 + 64]; /* aligned */
    struct options options;
    uint32_t random = seed, how = next(&random);
    if (how % 4 == 0 || size < sizeof(options))
        size = LLVMFuzzerMutate(data, size, most);
    if (how % 16 == 0 || size < sizeof(options))
        return size;
    memcpy(&options, data, sizeof(options));
    struct pv_snapshot snapshot;
    uint64_t sizes[MAPS];
    dimension(&snapshot, &options, sizes);
    uint64_t maps = sizes[0] + sizes[1] + sizes[2] + sizes[3];
    CHECK(maps <= sizeof(copy));
    if (!snapshot.blocks || size < sizeof(options) + maps)
        return size;
    uint8_t *at = (uint8_t *)copy;
    memcpy(at, data + sizeof(options), maps);
    size_t area = (size - sizeof(options) - maps) & ~7ull;
    snapshot.end = HEADER + area;
    for (uint32_t i = 0; how % 4 && i <= how / 16 % 3; i++)
        change(at, &snapshot, sizes, next(&random));
    for (uint64_t block = 0; block < snapshot.blocks; block++) {
        if (how / 64 % 2)
            agree(at, &snapshot, sizes, block);
        seal_block((struct pv_stored *)(at + sizes[0]) + block, data + sizeof(options) + maps, area);
    }
    memcpy(data + sizeof(options), at, maps);
    if (how / 128 % 8 == 0) {
        options.flags ^= HOW_UNWANTED;
        options.unwanted = (uint16_t)next(&random);
        memcpy(data, &options, sizeof(options));
    }
    return size;
}
