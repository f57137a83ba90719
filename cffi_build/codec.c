/* codec.c: lz4 and zstd from the libraries of the system, which are opened when they are first asked for: the build
 * needs no headers of theirs, and a host without them can still use RAW. Their functions are declared here as
 * lz4.h (1.0) and zstd.h (1.0) promise to keep them. */
#define _GNU_SOURCE
#include "native.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ZSTD_MAGIC 0xFD2FB528u
#define ZSTD_NO_MEMORY 64 /* ZSTD_error_memory_allocation */
#define ZSTD_NO_ROOM 70   /* ZSTD_error_dstSize_tooSmall */

static struct {
    int (*compress)(const char *from, char *to, int size, int room);
    int (*decompress)(const char *from, char *to, int stored, int room);
} lz4;

static struct {
    void *(*new_compressor)(void);
    void *(*new_decompressor)(void);
    size_t (*free_compressor)(void *context);
    size_t (*free_decompressor)(void *context);
    size_t (*compress)(void *context, void *to, size_t room, const void *from, size_t size, int level);
    size_t (*decompress)(void *context, void *to, size_t room, const void *from, size_t stored);
    unsigned (*is_error)(size_t result);
    int (*error_of)(size_t result);
} zstd;

static bool available[PV_CODECS] = {[PV_CODEC_RAW] = true};
static pthread_once_t opened = PTHREAD_ONCE_INIT;

/* What a thread keeps from one call to the next: to make a context anew costs more than to decompress a small block. */
struct kept {
    void *compressor, *decompressor;
    uint8_t stored[PV_STORE_MAX + 8], pages[PV_KEPT][PV_STORE_MAX];
};
static pthread_key_t kept_key;
static bool kept_works;

static void kept_free(void *data)
{
    struct kept *kept = data;
    if (kept->compressor)
        zstd.free_compressor(kept->compressor);
    if (kept->decompressor)
        zstd.free_decompressor(kept->decompressor);
    free(kept);
}

#define FIND(library, field, name) ((field) = (__typeof__(field))dlsym(library, name))

static void open_libraries(void)
{
    kept_works = pthread_key_create(&kept_key, kept_free) == 0;
    void *library = dlopen("liblz4.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library)
        available[PV_CODEC_LZ4] =
            FIND(library, lz4.compress, "LZ4_compress_default") && FIND(library, lz4.decompress, "LZ4_decompress_safe");
    library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library)
        available[PV_CODEC_ZSTD] = FIND(library, zstd.new_compressor, "ZSTD_createCCtx") &&
                                   FIND(library, zstd.new_decompressor, "ZSTD_createDCtx") &&
                                   FIND(library, zstd.free_compressor, "ZSTD_freeCCtx") &&
                                   FIND(library, zstd.free_decompressor, "ZSTD_freeDCtx") &&
                                   FIND(library, zstd.compress, "ZSTD_compressCCtx") &&
                                   FIND(library, zstd.decompress, "ZSTD_decompressDCtx") &&
                                   FIND(library, zstd.is_error, "ZSTD_isError") &&
                                   FIND(library, zstd.error_of, "ZSTD_getErrorCode");
}

int pv_codec_available(int codec)
{
    if (codec < 0 || codec >= PV_CODECS)
        return -EINVAL;
    pthread_once(&opened, open_libraries);
    return available[codec] ? 0 : -ELIBACC;
}

static struct kept *kept_get(void)
{
    pthread_once(&opened, open_libraries);
    struct kept *kept = kept_works ? pthread_getspecific(kept_key) : NULL;
    if (!kept && kept_works && (kept = malloc(sizeof(*kept)))) {
        kept->compressor = kept->decompressor = NULL;
        if (pthread_setspecific(kept_key, kept)) {
            free(kept);
            return NULL;
        }
    }
    return kept;
}

uint8_t *pv_kept_pages(uint32_t use)
{
    struct kept *kept = kept_get();
    return kept && use < PV_KEPT ? kept->pages[use] : NULL;
}

static bool size_ok(uint32_t size) { return size && size <= PV_STORE_MAX; }

int pv_codec_compress(int codec, int level, const uint8_t *from, uint32_t size, uint8_t *to, uint32_t room)
{
    int error = codec == PV_CODEC_RAW || !size_ok(size) || !size_ok(room) ? -EINVAL : pv_codec_available(codec);
    if (error)
        return error;
    if (codec == PV_CODEC_LZ4) {
        int written = lz4.compress((const char *)from, (char *)to, (int)size, (int)room);
        return written > 0 ? written : -ENOSPC;
    }
    struct kept *kept = kept_get();
    if (!kept || (!kept->compressor && !(kept->compressor = zstd.new_compressor())))
        return -ENOMEM;
    size_t written = zstd.compress(kept->compressor, to, room, from, size, level);
    if (!zstd.is_error(written))
        return (int)written;
    int code = zstd.error_of(written);
    return code == ZSTD_NO_ROOM ? -ENOSPC : code == ZSTD_NO_MEMORY ? -ENOMEM : -EINVAL;
}

int pv_codec_decompress(int codec, const uint8_t *from, uint32_t stored, uint8_t *to, uint32_t size)
{
    int error = codec == PV_CODEC_RAW || !size_ok(stored) || !size_ok(size) ? -EINVAL : pv_codec_available(codec);
    if (error)
        return error;
    if (codec == PV_CODEC_LZ4)
        return lz4.decompress((const char *)from, (char *)to, (int)stored, (int)size) == (int)size ? 0 : -EILSEQ;
    uint32_t magic = 0;
    memcpy(&magic, from, stored < 4 ? stored : 4);
    if (magic != ZSTD_MAGIC) /* no formats of old versions, which the library may still read */
        return -EILSEQ;
    struct kept *kept = kept_get();
    if (!kept || (!kept->decompressor && !(kept->decompressor = zstd.new_decompressor())))
        return -ENOMEM;
    size_t got = zstd.decompress(kept->decompressor, to, size, from, stored);
    if (zstd.is_error(got) && zstd.error_of(got) == ZSTD_NO_MEMORY)
        return -ENOMEM;
    return got == size ? 0 : -EILSEQ; /* an error is a size far beyond */
}

int pv_read_whole(int fd, uint8_t *to, uint64_t size, uint64_t offset)
{
    while (size) {
        ssize_t got = pread(fd, to, size, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got ? -errno : -ENODATA;
        to += got;
        offset += (uint64_t)got;
        size -= (uint64_t)got;
    }
    return 0;
}

int pv_block_read(int fd, uint64_t offset, uint32_t stored_length, uint64_t checksum, int codec, uint32_t raw_length,
                  uint8_t *out)
{
    bool raw = codec == PV_CODEC_RAW;
    if (!size_ok(stored_length) || !size_ok(raw_length) || offset > INT64_MAX - PV_STORE_MAX - 8 ||
        (raw && (stored_length != raw_length || raw_length % 8)))
        return -EINVAL;
    uint8_t *stored = out;
    if (!raw) {
        struct kept *kept = kept_get();
        if (!kept)
            return -ENOMEM;
        stored = kept->stored;
    }
    uint32_t whole = (stored_length + 7) & ~7u;
    int error = pv_read_whole(fd, stored, whole, offset);
    if (error)
        return error;
    if (pv_hash(stored, whole, 0) != checksum)
        return -EBADMSG;
    return raw ? 0 : pv_codec_decompress(codec, stored, stored_length, out, raw_length);
}
