/* virtio.h: small drivers' common part: virtio-mmio version 2 and split rings (virtio 1.2). One CPU uses a device at a
 * time. Physical addresses are pointers. */
#pragma once

#include "lib.h"

#define VIRTIO_CONSOLE 3
#define VIRTIO_RNG 4
#define VIRTIO_BLOCK 2

#define VIRTIO_F_INDIRECT (1ul << 28)
#define VIRTIO_F_EVENT (1ul << 29)
#define VIRTIO_F_VERSION_1 (1ul << 32)

#define VIRTIO_STATUS 0x070
#define VIRTIO_NEEDS_RESET 0x40
#define VIRTIO_CONFIG 0x100
#define VIRTIO_NOTIFY 0x050

#define VIRTQ_NEXT 1
#define VIRTQ_WRITE 2
#define VIRTQ_INDIRECT 4
#define VIRTQ_MAX 64

struct virtq_desc {
    uint64_t address;
    uint32_t size;
    uint16_t flags, next;
};
struct virtq {
    struct virtq_desc desc[VIRTQ_MAX] __attribute__((aligned(16)));
    struct {
        uint16_t flags, index, ring[VIRTQ_MAX], used_event;
    } avail __attribute__((aligned(2)));
    struct {
        uint16_t flags, index;
        struct {
            uint32_t head, written;
        } ring[VIRTQ_MAX];
        uint16_t avail_event;
    } used __attribute__((aligned(4)));
    struct virtq_desc table[VIRTQ_MAX][4] __attribute__((aligned(16))); /* indirect ones, by head */
    uint16_t free[VIRTQ_MAX];   /* heads: descriptors come in fixed fours, or one where they are indirect */
    unsigned index, spare;      /* queue number; of `free` so many are */
    uint16_t posted, seen;
};
struct virtio_buffer {
    void *at;
    uint32_t size;
    bool writable; /* by the device; such ones come last */
};
struct virtio {
    uint64_t base, features;
    unsigned irq, vector;
    bool polls; /* looks at the used ring instead of waiting for interrupts */
};

static inline uint32_t virtio_get(const struct virtio *device, unsigned reg)
{
    return *(volatile uint32_t *)(device->base + reg);
}
static inline void virtio_set(const struct virtio *device, unsigned reg, uint32_t value)
{
    *(volatile uint32_t *)(device->base + reg) = value;
}

/* Where devices are; as guest/abi.h says, unless it is another machine's. Interrupts are pyvmm's. */
struct virtio_places {
    uint64_t first;
    unsigned step, count;
};
extern struct virtio_places virtio_places;
/* Finds the n-th device of that id, counted from 0. */
bool virtio_find(struct virtio *device, unsigned id, unsigned n);
uint64_t virtio_offered(const struct virtio *device);
/* Resets the device and agrees on these features, and VERSION_1. vector: for its interrupt (irq_init() was called); 0:
 * none, it is polled. */
bool virtio_begin(struct virtio *device, uint64_t features, unsigned vector);
/* Makes queue `index`, after virtio_begin(). False where the device refuses it. */
bool virtq_begin(const struct virtio *device, struct virtq *queue, unsigned index);
/* Takes the interrupt: its line falls. */
void virtio_acknowledge(const struct virtio *device);
void virtio_drive(const struct virtio *device); /* DRIVER_OK */
/* Posts a request of up to 4 buffers; returns its head, or -1 where the queue is full. */
int virtq_post(const struct virtio *device, struct virtq *queue, const struct virtio_buffer *buffers, unsigned count);
void virtq_notify(const struct virtio *device, struct virtq *queue);
/* The next answer, where there is one: its head, and the bytes written. -1: none. */
int virtq_answer(const struct virtio *device, struct virtq *queue, uint32_t *written);
/* Waits for it; -1: the device needs a reset, or said nothing for 10 s. */
int virtq_wait(const struct virtio *device, struct virtq *queue, uint32_t *written);
