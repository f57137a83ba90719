/* balloon.c: a small driver of the virtio balloon. */
#include "balloon.h"

#define QUEUES 6
#define INFLATE 0
#define DEFLATE 1
#define STATS 2
#define REPORTING 4
#define ASK 5
#define CONFIG_TARGET VIRTIO_CONFIG
#define CONFIG_ACTUAL (VIRTIO_CONFIG + 4)

static struct virtio device;
static struct virtq queues[QUEUES];
static uint32_t list[BALLOON_MOST];
static struct balloon_stat statistics[BALLOON_STATS];
static struct {
    uint32_t number, count;
    uint32_t frames[BALLOON_ASKED];
} question;
static struct {
    uint32_t number, count;
    uint8_t classes[BALLOON_ASKED];
} reply;
static bool posted;
static unsigned changes; /* vector */
static uint64_t seen;

static _Noreturn void fail(const char *text)
{
    print("FAIL: the balloon ");
    print(text);
    print("\n");
    leave(1);
}

bool balloon_begin(uint64_t features, unsigned vector)
{
    if (!virtio_find(&device, VIRTIO_BALLOON, 0))
        return false;
    if (!virtio_begin(&device, features & virtio_offered(&device), 0)) /* rings are looked at: no interrupts for them */
        fail("refuses its features");
    changes = vector;
    irq_route(device.irq, vector);
    for (unsigned i = 0; i < QUEUES; i++)
        if (!virtq_begin(&device, &queues[i], i))
            fail("has no queue");
    virtio_drive(&device);
    return true;
}

bool balloon_has(uint64_t feature) { return device.features & feature; }

bool balloon_changed(void)
{
    if (interrupts[changes] == seen)
        return false;
    seen = interrupts[changes];
    virtio_acknowledge(&device); /* before the target is looked at: a change after that raises the line anew */
    return true;
}

uint32_t balloon_target(void) { return virtio_get(&device, CONFIG_TARGET); }

void balloon_actual(uint32_t pages) { virtio_set(&device, CONFIG_ACTUAL, pages); }

static void tell(unsigned index, const struct virtio_buffer *buffer)
{
    uint32_t written;
    int head = virtq_post(&device, &queues[index], buffer, 1);
    virtq_notify(&device, &queues[index]);
    if (head < 0 || virtq_wait(&device, &queues[index], &written) != head)
        fail("does not answer");
}

static void tell_frames(unsigned index, const uint32_t *frames, unsigned count)
{
    memcpy(list, frames, count * sizeof(*frames));
    tell(index, &(struct virtio_buffer){list, count * (uint32_t)sizeof(*frames), false});
}

void balloon_give(const uint32_t *frames, unsigned count) { tell_frames(INFLATE, frames, count); }

void balloon_take(const uint32_t *frames, unsigned count) { tell_frames(DEFLATE, frames, count); }

void balloon_report(void *start, uint32_t size) { tell(REPORTING, &(struct virtio_buffer){start, size, true}); }

static void post_stats(unsigned (*stats)(struct balloon_stat *))
{
    uint32_t size = stats(statistics) * (uint32_t)sizeof(*statistics);
    (void)virtq_post(&device, &queues[STATS], &(struct virtio_buffer){statistics, size, false}, 1);
    virtq_notify(&device, &queues[STATS]);
}

static void post_room(uint32_t answered)
{
    struct virtio_buffer buffers[] = {{&reply, answered, false}, {&question, sizeof(question), true}};
    (void)virtq_post(&device, &queues[ASK], answered ? buffers : buffers + 1, answered ? 2 : 1);
    virtq_notify(&device, &queues[ASK]);
}

static uint32_t answer_question(uint8_t (*class_of)(uint32_t frame))
{
    reply.number = question.number;
    reply.count = question.count <= BALLOON_ASKED ? question.count : BALLOON_ASKED;
    for (uint32_t i = 0; i < reply.count; i++)
        reply.classes[i] = class_of(question.frames[i]);
    return 8 + reply.count;
}

void balloon_serve(unsigned (*stats)(struct balloon_stat *), uint8_t (*class_of)(uint32_t frame))
{
    uint32_t written;
    if (balloon_has(BALLOON_F_STATS) && (!posted || virtq_answer(&device, &queues[STATS], &written) >= 0))
        post_stats(stats);
    if (balloon_has(BALLOON_F_CLASSES) && (!posted || virtq_answer(&device, &queues[ASK], &written) >= 0))
        post_room(posted && written >= 8 ? answer_question(class_of) : 0);
    posted = true;
}
