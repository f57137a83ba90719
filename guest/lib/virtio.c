/* virtio.c: virtio-mmio and split rings, for guests that drive a device. */
#include "virtio.h"

#define MAGIC 0x74726976
#define DEVICE 0x008
#define DEVICE_FEATURES 0x010
#define DEVICE_FEATURES_SEL 0x014
#define DRIVER_FEATURES 0x020
#define DRIVER_FEATURES_SEL 0x024
#define QUEUE_SEL 0x030
#define QUEUE_MAX 0x034
#define QUEUE_SIZE 0x038
#define QUEUE_READY 0x044
#define INTERRUPT_STATUS 0x060
#define INTERRUPT_ACK 0x064
#define QUEUE_DESC 0x080
#define QUEUE_DRIVER 0x090
#define QUEUE_DEVICE 0x0a0

#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8
#define FOUR 4
#define PATIENCE_MS 10000

struct virtio_places virtio_places = {PV_VIRTIO_GPA, PV_VIRTIO_STEP, PV_VIRTIO_SLOTS};

bool virtio_find(struct virtio *device, unsigned id, unsigned n)
{
    for (unsigned slot = 0; slot < virtio_places.count; slot++) {
        uint64_t base = virtio_places.first + (uint64_t)slot * virtio_places.step;
        *device = (struct virtio){.base = base, .irq = PV_VIRTIO_IRQ(slot)};
        if (virtio_get(device, 0) == MAGIC && virtio_get(device, 4) == 2 && virtio_get(device, DEVICE) == id && n-- == 0)
            return true;
    }
    return false;
}

uint64_t virtio_offered(const struct virtio *device)
{
    virtio_set(device, DEVICE_FEATURES_SEL, 1);
    uint64_t high = virtio_get(device, DEVICE_FEATURES);
    virtio_set(device, DEVICE_FEATURES_SEL, 0);
    return high << 32 | virtio_get(device, DEVICE_FEATURES);
}

bool virtio_begin(struct virtio *device, uint64_t features, unsigned vector)
{
    virtio_set(device, VIRTIO_STATUS, 0);
    if (virtio_get(device, VIRTIO_STATUS) != 0)
        return false;
    virtio_set(device, VIRTIO_STATUS, ACKNOWLEDGE);
    virtio_set(device, VIRTIO_STATUS, ACKNOWLEDGE | DRIVER);
    device->features = features | VIRTIO_F_VERSION_1;
    for (unsigned half = 0; half < 2; half++) {
        virtio_set(device, DRIVER_FEATURES_SEL, half);
        virtio_set(device, DRIVER_FEATURES, (uint32_t)(device->features >> (32 * half)));
    }
    virtio_set(device, VIRTIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    device->polls = vector == 0;
    device->vector = vector;
    if (vector)
        irq_route(device->irq, vector);
    return virtio_get(device, VIRTIO_STATUS) & FEATURES_OK;
}

static void set_address(const struct virtio *device, unsigned reg, const void *at)
{
    virtio_set(device, reg, (uint32_t)(uint64_t)at);
    virtio_set(device, reg + 4, (uint32_t)((uint64_t)at >> 32));
}

bool virtq_begin(const struct virtio *device, struct virtq *queue, unsigned index)
{
    memset(queue, 0, sizeof(*queue));
    queue->index = index;
    queue->avail.flags = device->polls && !(device->features & VIRTIO_F_EVENT); /* no interrupts */
    queue->spare = device->features & VIRTIO_F_INDIRECT ? VIRTQ_MAX : VIRTQ_MAX / FOUR;
    for (unsigned i = 0; i < queue->spare; i++)
        queue->free[i] = (uint16_t)(device->features & VIRTIO_F_INDIRECT ? i : i * FOUR);
    virtio_set(device, QUEUE_SEL, index);
    if (virtio_get(device, QUEUE_MAX) < VIRTQ_MAX)
        return false;
    virtio_set(device, QUEUE_SIZE, VIRTQ_MAX);
    set_address(device, QUEUE_DESC, queue->desc);
    set_address(device, QUEUE_DRIVER, &queue->avail);
    set_address(device, QUEUE_DEVICE, &queue->used);
    virtio_set(device, QUEUE_READY, 1);
    return virtio_get(device, QUEUE_READY) == 1;
}

void virtio_acknowledge(const struct virtio *device)
{
    virtio_set(device, INTERRUPT_ACK, virtio_get(device, INTERRUPT_STATUS));
}

void virtio_drive(const struct virtio *device)
{
    virtio_set(device, VIRTIO_STATUS, virtio_get(device, VIRTIO_STATUS) | DRIVER_OK);
}

int virtq_post(const struct virtio *device, struct virtq *queue, const struct virtio_buffer *buffers, unsigned count)
{
    if (!queue->spare || !count || count > FOUR)
        return -1;
    uint16_t head = queue->free[--queue->spare];
    bool indirect = device->features & VIRTIO_F_INDIRECT;
    struct virtq_desc *desc = indirect ? queue->table[head] : queue->desc + head;
    for (unsigned i = 0; i < count; i++) {
        unsigned flags = (i + 1 < count ? VIRTQ_NEXT : 0) | (buffers[i].writable ? VIRTQ_WRITE : 0);
        desc[i] = (struct virtq_desc){(uint64_t)buffers[i].at, buffers[i].size, (uint16_t)flags,
                                      (uint16_t)((indirect ? 0 : head) + i + 1)};
    }
    if (indirect)
        queue->desc[head] = (struct virtq_desc){(uint64_t)desc, count * (uint32_t)sizeof(*desc), VIRTQ_INDIRECT, 0};
    queue->avail.ring[queue->posted % VIRTQ_MAX] = head;
    queue->posted++;
    /* release: whoever sees the index sees what it stands for */
    __atomic_store_n(&queue->avail.index, queue->posted, __ATOMIC_RELEASE);
    return head;
}

void virtq_notify(const struct virtio *device, struct virtq *queue)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the index is there before we look whether the device waits for it */
    if (device->features & VIRTIO_F_EVENT) {
        /* "one more than the last I was told of": any of those posted since may be the one */
        uint16_t event = *(volatile uint16_t *)&queue->used.avail_event;
        if ((uint16_t)(queue->posted - event - 1) >= VIRTQ_MAX)
            return;
    } else if (*(volatile uint16_t *)&queue->used.flags & 1) {
        return;
    }
    virtio_set(device, VIRTIO_NOTIFY, queue->index);
}

int virtq_answer(const struct virtio *device, struct virtq *queue, uint32_t *written)
{
    (void)device;
    /* acquire: pairs with the device's write of the index, behind all that it answers */
    if (__atomic_load_n(&queue->used.index, __ATOMIC_ACQUIRE) == queue->seen)
        return -1;
    uint32_t head = queue->used.ring[queue->seen % VIRTQ_MAX].head;
    *written = queue->used.ring[queue->seen % VIRTQ_MAX].written;
    queue->seen++;
    __atomic_store_n(&queue->avail.used_event, queue->seen, __ATOMIC_SEQ_CST); /* interrupt us for the next one */
    queue->free[queue->spare++] = (uint16_t)head;
    return (int)head;
}

int virtq_wait(const struct virtio *device, struct virtq *queue, uint32_t *written)
{
    struct patience patience = patience_ms(PATIENCE_MS);
    for (;;) {
        uint64_t interrupted = device->vector ? interrupts[device->vector] : 0;
        if (device->vector) /* before the ring is looked at: what is answered after that raises the line anew */
            virtio_acknowledge(device);
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* used_event is there before we look whether there is an answer */
        int head = virtq_answer(device, queue, written);
        if (head >= 0)
            return head;
        if (virtio_get(device, VIRTIO_STATUS) & VIRTIO_NEEDS_RESET || !patience_left(&patience))
            return -1;
        if (device->polls) {
            __builtin_ia32_pause();
            continue;
        }
        wait_interrupt(device->vector, interrupted);
    }
}
