/* virtio.c: drives a virtio device and checks what it does: random bytes, an echo, or a disk that is written and read in
 * several requests at a time. Progress: work[0].count = requests answered, work[0].pass = of these, flushes. */
#include "lib/virtio.h"

GUEST("virtio", "drives a virtio device and checks what it does",
      "device=KIND rng (default), console, block\n"
      "n=N the N-th of its kind, counted from 0 (default)\n"
      "wait=HOW irq (default): halts until the interrupt comes; poll: looks at the ring\n"
      "count=N requests (default 200); 0 = for ever; of rng and block\n"
      "indirect=1 descriptors in tables of their own\n"
      "event=1 by the event index\n"
      "hostile=1 breaks the rules in one way after the other (with rng), and starts anew\n"
      "log=1 (with block) writes records in order, flushes each, and prints its number\n"
      "at=ADDRESS step=BYTES places=N where to look for devices on another machine; wait=poll then\n"
      "step=BYTES see at=\n"
      "places=N see at=\n"
      "seed=N of what is written and where (default 1)\n");

#define VECTOR 0x41
#define SECTOR 512u
#define LANES 4u         /* requests at a time, each on sectors of its own */
#define LANE_SECTORS 64u /* so many for each */
#define LANE_BYTES (8 * SECTOR)
#define IN 0
#define OUT 1
#define FLUSH 4
#define GET_ID 8
#define DISCARD 11
#define WRITE_ZEROES 13
#define F_RO (1ul << 5)
#define F_FLUSH (1ul << 9)
#define F_RANGES (3ul << 13)
#define UNKNOWN UINT32_MAX

static struct virtio device;
static struct virtq queues[2];
static uint64_t wanted, state;

static _Noreturn void fail(const char *text, uint64_t number)
{
    print("FAIL: ");
    print(text);
    print(" ");
    print_number(number);
    print(" after request ");
    print_number(progress->work[0].count);
    print("\n");
    leave(1);
}

static void done(void)
{
    print("SUCCESS: ");
    print_number(progress->work[0].count);
    print(" requests\n");
}

static void begin(unsigned id, uint64_t features, unsigned count)
{
    unsigned vector = option_is("wait", "irq", "poll") ? 0 : VECTOR;
    if (!virtio_begin(&device, features, vector))
        fail("features were refused of device", id);
    for (unsigned i = 0; i < count; i++)
        if (!virtq_begin(&device, &queues[i], i))
            fail("no queue", i);
    virtio_drive(&device);
}

static uint32_t wait_for(struct virtq *queue, int head)
{
    uint32_t written;
    int found = virtq_wait(&device, queue, &written);
    if (found < 0)
        fail("no answer; status", virtio_get(&device, VIRTIO_STATUS));
    if (found != head)
        fail("another answer than was waited for:", (uint64_t)found);
    progress->work[0].count++;
    return written;
}

/* ---- rng ---- */
static uint8_t bytes[2][PAGE_SIZE];

static void rng(void)
{
    uint64_t all = 0;
    for (uint64_t i = 0; wanted == 0 || i < wanted; i++) {
        uint32_t size = 16 + (uint32_t)random_below(&state, 1000), other = 1 + (uint32_t)random_below(&state, 1000);
        memset(bytes, 0, sizeof(bytes));
        struct virtio_buffer buffers[] = {{bytes[0], size, true}, {bytes[1], other, true}};
        int head = virtq_post(&device, queues, buffers, 2);
        virtq_notify(&device, queues);
        if (wait_for(queues, head) != size + other)
            fail("not as many bytes as there was room for:", size + other);
        uint64_t words[2] = {0};
        memcpy(words, bytes[0], 16);
        if (words[0] == 0 || words[0] == words[1] || words[0] == all)
            fail("not random:", words[0]);
        all = words[0];
        for (uint32_t at = 0; at < 16; at++)
            if (bytes[0][size + at] || bytes[1][other + at])
                fail("more was written than there was room for:", at);
    }
    if (wanted) {
        print_hex(all);
        print("\n");
    }
}

/* ---- hostile ---- */
static void raw(unsigned index, uint64_t address, uint32_t size, unsigned flags, unsigned next)
{
    queues->desc[index] = (struct virtq_desc){address, size, (uint16_t)flags, (uint16_t)next};
}

static void hostile(uint64_t features)
{
    static const char *const names[] = {"a head", "a loop", "an address", "a size", "an index", "a table in a table",
                                        "an order", "a next one"};
    for (unsigned way = 0; way < sizeof(names) / sizeof(*names); way++) {
        begin(VIRTIO_RNG, features | VIRTIO_F_INDIRECT, 1);
        struct virtio_buffer buffer = {bytes[0], 64, true};
        int head = virtq_post(&device, queues, &buffer, 1); /* what is good before is answered */
        virtq_notify(&device, queues);
        wait_for(queues, head);
        uint16_t first = 0, more = 1;
        uint64_t at = (uint64_t)bytes[0];
        switch (way) {
        case 0: first = 999; break;
        case 1: raw(0, at, 16, VIRTQ_NEXT | VIRTQ_WRITE, 1), raw(1, at, 16, VIRTQ_NEXT | VIRTQ_WRITE, 0); break;
        case 2: raw(0, PV_VIRTIO_GPA, 16, VIRTQ_WRITE, 0); break;
        case 3: raw(0, at, UINT32_MAX, VIRTQ_WRITE, 0); break;
        case 4: more = VIRTQ_MAX + 1; break;
        case 5:
            raw(0, (uint64_t)queues->table[0], 16, VIRTQ_INDIRECT, 0);
            queues->table[0][0] = queues->desc[0];
            break;
        case 6: raw(0, at, 16, VIRTQ_NEXT | VIRTQ_WRITE, 1), raw(1, at, 16, 0, 0); break;
        default: raw(0, at, 16, VIRTQ_NEXT | VIRTQ_WRITE, 65535); break;
        }
        queues->avail.ring[queues->posted % VIRTQ_MAX] = first;
        queues->posted = (uint16_t)(queues->posted + more);
        __atomic_store_n(&queues->avail.index, queues->posted, __ATOMIC_RELEASE);
        virtio_set(&device, VIRTIO_NOTIFY, 0);
        struct patience patience = patience_ms(10000);
        while (!(virtio_get(&device, VIRTIO_STATUS) & VIRTIO_NEEDS_RESET))
            if (!patience_left(&patience))
                fail(names[way], way);
    }
    begin(VIRTIO_RNG, features, 1);
}

/* ---- console: what comes goes back, up to Ctrl-D ---- */
static void console(void)
{
    static uint8_t in[16][100];
    int heads[16];
    for (unsigned i = 0; i < 16; i++)
        heads[i] = virtq_post(&device, queues, &(struct virtio_buffer){in[i], sizeof(in[i]), true}, 1);
    virtq_notify(&device, queues);
    for (bool on = true; on;) {
        uint32_t size;
        int head;
        while ((head = virtq_wait(&device, queues, &size)) < 0) /* nothing was typed for a while */
            if (virtio_get(&device, VIRTIO_STATUS) & VIRTIO_NEEDS_RESET)
                fail("the console needs a reset", 0);
        unsigned i = 0;
        while (heads[i] != head)
            i++;
        on = in[i][size - 1] != 4;
        int sent = virtq_post(&device, queues + 1, &(struct virtio_buffer){in[i], size, false}, 1);
        virtq_notify(&device, queues + 1);
        wait_for(queues + 1, sent);
        heads[i] = virtq_post(&device, queues, &(struct virtio_buffer){in[i], sizeof(in[i]), true}, 1);
        virtq_notify(&device, queues);
    }
}

/* ---- block ---- */
static struct lane {
    struct {
        uint32_t kind, reserved;
        uint64_t sector;
    } header;
    struct {
        uint64_t sector;
        uint32_t count, flags;
    } range;
    uint32_t first, count; /* sectors, of the lane's own */
    int head;
    uint8_t status;
    uint64_t data[LANE_BYTES / 8] __attribute__((aligned(16)));
} lanes[LANES];
static uint32_t versions[LANES][LANE_SECTORS]; /* 0: zeros */
static uint32_t version;
static uint64_t seed;

static uint64_t word_of(uint64_t sector, uint32_t of, unsigned word)
{
    return of == 0 ? 0 : mix(seed + (sector << 40) + ((uint64_t)of << 8) + word);
}

static void post(struct lane *lane, uint32_t kind, uint64_t sector, void *data, uint32_t size)
{
    lane->header.kind = kind;
    lane->header.sector = sector;
    lane->status = 0xee;
    struct virtio_buffer buffers[] = {
        {&lane->header, 16, false}, {data, size, kind == IN || kind == GET_ID}, {&lane->status, 1, true}};
    if (!size)
        buffers[1] = buffers[2];
    lane->head = virtq_post(&device, queues, buffers, size ? 3 : 2);
    virtq_notify(&device, queues);
}

static uint8_t ask(uint32_t kind, uint64_t sector, void *data, uint32_t size)
{
    post(lanes, kind, sector, data, size);
    wait_for(queues, lanes->head);
    return lanes->status;
}

static void expect(uint8_t status, uint32_t kind, uint64_t sector, void *data, uint32_t size)
{
    uint8_t found = ask(kind, sector, data, size);
    if (found != status)
        fail("another status than is due:", found);
}

static uint64_t capacity(void)
{
    return virtio_get(&device, VIRTIO_CONFIG) | (uint64_t)virtio_get(&device, VIRTIO_CONFIG + 4) << 32;
}

static void block_basics(bool read_only)
{
    uint64_t sectors = capacity();
    char id[20];
    expect(0, GET_ID, 0, id, sizeof(id));
    print("disk ");
    print_bytes(id, sizeof(id));
    print(", ");
    print_number(sectors);
    print(" sectors\n");
    expect(0, IN, sectors - 1, lanes->data, SECTOR);
    expect(1, IN, sectors, lanes->data, SECTOR);
    expect(1, IN, UINT64_MAX, lanes->data, SECTOR);
    expect(1, IN, 0, lanes->data, SECTOR - 1);
    expect(1, OUT, sectors - 1, lanes->data, 2 * SECTOR);
    expect(2, 77, 0, lanes->data, SECTOR);
    expect(read_only ? 1 : 0, OUT, sectors - 1, lanes->data, SECTOR);
    expect(0, FLUSH, 0, NULL, 0);
}

static void next(unsigned index)
{
    struct lane *lane = lanes + index;
    uint64_t base = (uint64_t)index * LANE_SECTORS;
    lane->first = (uint32_t)random_below(&state, LANE_SECTORS);
    lane->count = 1 + (uint32_t)random_below(&state, LANE_BYTES / SECTOR);
    if (lane->count > LANE_SECTORS - lane->first)
        lane->count = LANE_SECTORS - lane->first;
    uint64_t choice = random_below(&state, 16), sector = base + lane->first;
    lane->range.sector = sector;
    lane->range.count = lane->count;
    lane->range.flags = 0;
    if (choice < 7) {
        version++;
        for (uint32_t i = 0; i < lane->count; i++) {
            versions[index][lane->first + i] = version;
            for (unsigned word = 0; word < SECTOR / 8; word++)
                lane->data[i * (SECTOR / 8) + word] = word_of(sector + i, version, word);
        }
        post(lane, OUT, sector, lane->data, lane->count * SECTOR);
    } else if (choice < 13) {
        memset(lane->data, 0x5a, sizeof(lane->data));
        post(lane, IN, sector, lane->data, lane->count * SECTOR);
    } else if (choice < 14) {
        post(lane, FLUSH, 0, NULL, 0);
        progress->work[0].pass++;
    } else {
        lane->range.flags = choice & 1;
        for (uint32_t i = 0; i < lane->count; i++)
            versions[index][lane->first + i] = choice == 14 && version % 2 ? UNKNOWN : 0;
        bool discards = versions[index][lane->first] == UNKNOWN;
        lane->range.flags = discards ? 0 : lane->range.flags;
        post(lane, discards ? DISCARD : WRITE_ZEROES, 0, &lane->range, 16);
    }
}

static void check(unsigned index)
{
    struct lane *lane = lanes + index;
    if (lane->status != 0)
        fail("a request failed, of kind", lane->header.kind);
    if (lane->header.kind != IN)
        return;
    for (uint32_t i = 0; i < lane->count; i++) {
        uint32_t of = versions[index][lane->first + i];
        for (unsigned word = 0; of != UNKNOWN && word < SECTOR / 8; word++)
            if (lane->data[i * (SECTOR / 8) + word] != word_of(lane->header.sector + i, of, word))
                fail("a wrong byte in sector", lane->header.sector + i);
    }
}

static void block(void)
{
    if (capacity() < LANES * LANE_SECTORS)
        refuse("the disk is too small", "");
    for (unsigned i = 0; i < LANES; i++)
        for (unsigned s = 0; s < LANE_SECTORS; s++)
            versions[i][s] = UNKNOWN;
    for (unsigned i = 0; i < LANES; i++)
        next(i);
    for (uint64_t left = wanted; wanted == 0 || left > 0; left--) {
        uint32_t written;
        int head = virtq_wait(&device, queues, &written);
        if (head < 0)
            fail("no answer; status", virtio_get(&device, VIRTIO_STATUS));
        progress->work[0].count++;
        unsigned i = 0;
        while (i < LANES && lanes[i].head != head)
            i++;
        if (i == LANES)
            fail("an answer to nothing:", (uint64_t)head);
        check(i);
        next(i);
    }
}

/* Record n is sector n % LANE_SECTORS, full of its number and words that follow from it. */
static void log_records(void)
{
    for (uint64_t n = 1; wanted == 0 || n <= wanted; n++) {
        for (unsigned word = 0; word < SECTOR / 8; word++)
            lanes->data[word] = word ? mix(n * GOLDEN + word) : n;
        expect(0, OUT, n % LANE_SECTORS, lanes->data, SECTOR);
        expect(0, FLUSH, 0, NULL, 0);
        progress->work[0].pass = n;
        print_number(n);
        print("\n");
    }
}

int guest_main(void)
{
    unsigned id = option_is("device", "rng", "block") ? VIRTIO_BLOCK : option_is("device", "rng", "console") ? VIRTIO_CONSOLE
                                                                                                              : VIRTIO_RNG;
    wanted = option_number("count", 200);
    seed = option_number("seed", 1);
    state = seed;
    irq_init();
    virtio_places.first = option_number("at", virtio_places.first);
    virtio_places.step = (unsigned)option_at_most("step", virtio_places.step, PAGE_SIZE);
    virtio_places.count = (unsigned)option_at_most("places", virtio_places.count, 64);
    if (!virtio_find(&device, id, (unsigned)option_number("n", 0)))
        refuse("no such virtio device: ", option("device", "rng"));
    uint64_t offered = virtio_offered(&device), features = 0;
    features |= option_number("indirect", 0) ? VIRTIO_F_INDIRECT : 0;
    features |= option_number("event", 0) ? VIRTIO_F_EVENT : 0;
    if (id == VIRTIO_BLOCK)
        features |= offered & (F_RO | F_FLUSH | F_RANGES);
    begin(id, features, id == VIRTIO_CONSOLE ? 2 : 1);
    progress->status = PV_STATUS_RUNNING;
    if (id == VIRTIO_RNG && option_number("hostile", 0))
        hostile(features);
    if (id == VIRTIO_RNG) {
        rng();
    } else if (id == VIRTIO_CONSOLE) {
        console();
    } else if (option_number("log", 0)) {
        log_records();
    } else {
        block_basics(offered & F_RO);
        if (!(offered & F_RO))
            block();
    }
    done();
    return 0;
}
