/* ring.c: KVM's dirty rings, one a vCPU: into which KVM puts each page that the vCPU writes (KVM api.rst, 8.29). */
#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>

#define MOST_RESETS 1000 /* for what was harvested at once: each but the last for a signal of its own */

int pv_rings_init(struct pv_rings *rings)
{
    /* A mutex and not a futex word of ours: it is held across an ioctl, by vCPU threads and by who collects. */
    return -pthread_mutex_init(&rings->lock, NULL);
}

void pv_rings_deinit(struct pv_rings *rings) { pthread_mutex_destroy(&rings->lock); }

int pv_ring_map(int vcpu_fd, uint32_t entries, struct kvm_dirty_gfn **out)
{
    size_t size = entries * sizeof(struct kvm_dirty_gfn);
    void *ring = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, KVM_DIRTY_LOG_PAGE_OFFSET * 4096l);
    if (ring == MAP_FAILED)
        return -errno;
    *out = ring;
    return 0;
}

void pv_ring_unmap(struct kvm_dirty_gfn *gfns, uint32_t entries) { munmap(gfns, entries * sizeof(*gfns)); }

/* Notes the page of one entry. What is read from the ring is checked, although only KVM writes there. */
static int note(struct pv_rings *rings, const struct kvm_dirty_gfn *gfn)
{
    uint32_t slot = gfn->slot; /* bits 16 and up: the address space; we have none but 0 */
    uint64_t offset = gfn->offset;
    if (slot >= rings->slots || offset >= rings->slot[slot].pages)
        return -EBADMSG;
    pv_bits_set(rings->bits, rings->slot[slot].first_page + offset, 1);
    return 0;
}

/* All entries of one ring: how many, or -errno with the entries before the bad one taken. */
static int harvest_ring(struct pv_rings *rings, struct pv_ring *ring)
{
    int taken = 0;
    for (uint32_t left = rings->entries; left; left--) {
        struct kvm_dirty_gfn *gfn = &ring->gfns[ring->next % rings->entries];
        /* acquire: pairs with KVM's barrier in front of setting DIRTY: slot and offset are there when it is seen */
        if (__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
            break;
        int error = note(rings, gfn);
        if (error)
            return error;
        /* release: pairs with KVM's acquire in KVM_RESET_DIRTY_RINGS: it reuses the entry after we have read it */
        __atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        ring->next++;
        rings->owed++;
        taken++;
    }
    return taken;
}

/* Until KVM has taken back all that is marked for it: then its pages are protected. A signal that is pending has KVM stop
 * halfway, and since Linux 6.16 it does so without a word, returns how many entries it took until then, and forgets to
 * protect the pages of the last ones: what is written to them would be lost. So none may come, not even the kick of a
 * vCPU's thread; that is heeded before KVM_RUN. One that cannot be held back (SIGSTOP) makes the rings blind. */
static int give_back(struct pv_rings *rings)
{
    sigset_t all, before;
    int error = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int calls = 0; !error && rings->owed; calls++) {
        int reset = ioctl(rings->vm_fd, KVM_RESET_DIRTY_RINGS, 0);
        if (reset < 0 && errno != EINTR)
            error = -errno;
        else if (calls == MOST_RESETS)
            error = -EIO;
        uint64_t back = reset > 0 ? (uint64_t)reset : 0;
        rings->owed -= back < rings->owed ? back : rings->owed;
        rings->blind |= rings->owed > 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

/* With the lock held. Pages noted are write-protected anew when this returns: a later write is a new entry. */
static int harvest(struct pv_rings *rings)
{
    int result = 0;
    uint64_t taken = 0;
    for (uint32_t i = 0; i < rings->count; i++) {
        int got = harvest_ring(rings, &rings->ring[i]);
        if (got < 0)
            result = got;
        else
            taken += (uint64_t)got;
    }
    rings->taken += taken;
    int error = give_back(rings);
    return error ? error : result;
}

int pv_rings_harvest(struct pv_rings *rings)
{
    pthread_mutex_lock(&rings->lock);
    int result = harvest(rings);
    pthread_mutex_unlock(&rings->lock);
    return result;
}

int pv_rings_collect(struct pv_rings *rings, uint64_t *bits, int64_t timeout_ns)
{
    /* A CPU with a page log of its own (PML) has written pages in it, which KVM empties into the ring when the vCPU
     * leaves the guest. KVM_GET_DIRTY_LOG sees to that by itself, a ring does not. */
    for (uint32_t i = 0; i < rings->count; i++)
        pv_kick(rings->ring[i].vcpu);
    for (uint32_t i = 0; i < rings->count; i++) {
        int error = pv_wait_kicked(rings->ring[i].vcpu, timeout_ns);
        if (error)
            return error;
    }
    pthread_mutex_lock(&rings->lock);
    int result = harvest(rings);
    for (uint32_t slot = 0; rings->blind && slot < rings->slots; slot++)
        pv_bits_set(bits, rings->slot[slot].first_page, rings->slot[slot].pages);
    (void)pv_bits_take(bits, rings->bits, rings->words); /* after an error too: what has been taken is taken */
    pthread_mutex_unlock(&rings->lock);
    return result;
}
