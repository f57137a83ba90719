/* balloon.h: a small driver of the virtio balloon (virtio 1.2, 5.5), with pyvmm's classes of pages. One CPU uses it. */
#pragma once

#include "virtio.h"

#define VIRTIO_BALLOON 5
#define BALLOON_F_MUST_TELL_HOST (1ul << 0)
#define BALLOON_F_STATS (1ul << 1)
#define BALLOON_F_DEFLATE_ON_OOM (1ul << 2)
#define BALLOON_F_REPORTING (1ul << 5)
#define BALLOON_F_CLASSES (1ul << 63)

#define BALLOON_MOST 512u  /* pages that are given or taken at once: a block */
#define BALLOON_STATS 16u  /* statistics in one buffer */
#define BALLOON_ASKED 256u /* pages that are asked about at once */

/* Classes of pages, and the tags that say how many bytes of each there are. */
#define CLASS_UNRECLAIMABLE 0
#define CLASS_ACTIVE_ANONYMOUS 1
#define CLASS_ACTIVE_BUFFER 2
#define CLASS_INACTIVE_ANONYMOUS 3
#define CLASS_INACTIVE_BUFFER 4
#define CLASS_FREE 5
#define CLASSES 6
#define CLASS_UNKNOWN 0xff
#define TAG_MAJOR_FAULTS 2
#define TAG_FREE 4
#define TAG_TOTAL 5
#define TAG_AVAILABLE 6
#define TAG_CACHES 7
#define TAG_CLASS 0xf000 /* + class */
#define TAG_REFAULTS 0xf010

struct balloon_stat {
    uint16_t tag;
    uint64_t value;
} __attribute__((packed));

/* Finds the balloon and begins; false where there is none. features: of those above; only those that it has are used.
 * vector: of its interrupt, which comes when the target changes, and for nothing else; irq_init() was called. */
bool balloon_begin(uint64_t features, unsigned vector);
bool balloon_has(uint64_t feature);
bool balloon_changed(void);    /* may the target be another one? */
uint32_t balloon_target(void); /* pages */
/* Gives up, or takes back, pages by their addresses / 4096, and waits until the host knows. */
void balloon_give(const uint32_t *frames, unsigned count);
void balloon_take(const uint32_t *frames, unsigned count);
void balloon_actual(uint32_t pages); /* as many are given up in all */
/* Reports free memory, which stays ours. */
void balloon_report(void *start, uint32_t size);
/* Answers what the host has asked. stats: fills in statistics, returns how many; class: of a page. */
void balloon_serve(unsigned (*stats)(struct balloon_stat *), uint8_t (*class_of)(uint32_t frame));
