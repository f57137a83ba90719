/* replay.c: runs a C target on the files that are named, without a fuzzer, so that any compiler does. */
#include "fuzz.h"

/* What libFuzzer has: here a mutator of a target changes nothing but what it repairs. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most)
{
    (void)data;
    return size < most ? size : most;
}

int main(int count, char **names)
{
    static uint8_t data[1 << 20];
    for (int i = 1; i < count; i++) {
        int from = open(names[i], O_RDONLY | O_CLOEXEC);
        ssize_t size = from < 0 ? -1 : read(from, data, sizeof(data));
        CHECK(size >= 0);
        close(from);
        LLVMFuzzerTestOneInput(data, (size_t)size);
        for (unsigned seed = 0; seed < 12; seed++) {
            size = (ssize_t)LLVMFuzzerCustomMutator(data, (size_t)size, sizeof(data) / 2, seed);
            LLVMFuzzerTestOneInput(data, (size_t)size);
        }
    }
    return 0;
}
