/* sys.c: system calls with errno returned, not left in a thread's variable. */
#define _GNU_SOURCE
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int pv_ioctl(int fd, unsigned long request, void *argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

int pv_ioctl_value(int fd, unsigned long request, unsigned long argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

int pv_userfaultfd(int flags)
{
    long result = syscall(SYS_userfaultfd, flags);
    return result < 0 ? -errno : (int)result;
}

int pv_uffd_read(int fd, uint64_t *flags, uint64_t *address)
{
    struct uffd_msg message;
    ssize_t got = read(fd, &message, sizeof(message));
    if (got != (ssize_t)sizeof(message))
        return got < 0 ? -errno : -EIO;
    *flags = message.arg.pagefault.flags;
    *address = message.arg.pagefault.address;
    return message.event;
}

#ifndef USERFAULTFD_IOC_NEW /* kernel headers before 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

int pv_userfaultfd_device(int device, int flags)
{
    int result = ioctl(device, USERFAULTFD_IOC_NEW, flags);
    return result < 0 ? -errno : result;
}

int pv_map_file(void *address, size_t size, int fd)
{
    void *mapped = mmap(address, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    return mapped == MAP_FAILED ? -errno : 0;
}

int pv_clear_file(int fd, int how, uint64_t offset, uint64_t size)
{
    int mode = FALLOC_FL_KEEP_SIZE | (how == PV_FILE_HOLE ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
    return fallocate(fd, mode, (off_t)offset, (off_t)size) ? -errno : 0;
}

int pv_allow_reader(int pid)
{
    /* EINVAL: the kernel has no Yama, and nothing is to be allowed */
    return prctl(PR_SET_PTRACER, (unsigned long)pid, 0, 0, 0) && errno != EINVAL ? -errno : 0;
}
