/* dice.c: throws a die. The host gives the seed (progress->random_seed) and a new one when it restores a snapshot, by which
 * the clones of one snapshot throw differently: before each throw the guest looks whether its generation is another.
 * It may be restored between that look and the throw, which then is still the old stream's.
 * Progress: seed = that in use, work[0].count = throws, work[0].pass = seeds taken after the first one,
 * work[0].index = throws since the last one. */
#include "lib/lib.h"

GUEST("dice", "throws a die by a seed of the host's, and takes a new one when it finds itself restored",
      "count=N throws (default 1000); 0 = for ever\n"
      "check=1 throws each 65536 again from their seed and compares, and checks what the host says\n");

#define FACES 6
#define SHOWN 16
#define CHUNK 65536

/* What the host says of this VM. */
struct identity {
    uint64_t generation[2], restores, seed;
};

static struct identity self;
static uint64_t seed, thrown; /* the stream: throw n of a seed is known from these two */
static uint64_t faces[FACES], chunk[FACES];
static bool checks;

static _Noreturn void fail(const char *text)
{
    print("FAIL: ");
    print(text);
    print(" after throw ");
    print_number(progress->work[0].count);
    print("\n");
    leave(1);
}

static const volatile uint64_t *generation(void) { return (const volatile uint64_t *)progress->generation; }

static bool is_present(const struct identity *found)
{
    return found->generation[0] == generation()[0] && found->generation[1] == generation()[1];
}

/* All of it of one generation: the host changes it only while no vCPU runs, but that may be in the midst of this. */
static struct identity identity(void)
{
    struct identity found;
    do {
        found.generation[0] = generation()[0];
        found.generation[1] = generation()[1];
        found.restores = progress->restores;
        found.seed = progress->random_seed;
    } while (!is_present(&found));
    return found;
}

static unsigned face(uint64_t n) { return (unsigned)((mix(seed + n * GOLDEN) >> 32) * FACES >> 32); }

static void take_seed(void)
{
    self = identity();
    seed = self.seed ? self.seed : mix(ticks()); /* a loader that gives none leaves zeros */
    thrown = 0;
    memset(chunk, 0, sizeof(chunk));
    progress->seed = seed;
    progress->work[0].index = 0;
    for (uint64_t n = 0; n < SHOWN; n++) {
        print(" ");
        print_number(face(n) + 1);
    }
    print(" ...\n");
}

static void take_new_seed(void)
{
    uint64_t before = self.restores;
    print("restored, after ");
    print_number(progress->work[0].count);
    print(" throws; from now on");
    take_seed();
    progress->work[0].pass++;
    if (checks && self.restores <= before)
        fail("another generation, and not one restore more");
}

static void check(void)
{
    uint64_t again[FACES] = {0}, all = 0;
    for (uint64_t n = thrown - CHUNK; n < thrown; n++)
        again[face(n)]++;
    if (memcmp(again, chunk, sizeof(chunk)) != 0)
        fail("the same throws have other faces");
    memset(chunk, 0, sizeof(chunk));
    for (unsigned i = 0; i < FACES; i++)
        all += faces[i];
    if (all != progress->work[0].count)
        fail("the faces are not as many as the throws");
    struct identity found = identity();
    if (found.generation[0] != self.generation[0] || found.generation[1] != self.generation[1])
        return; /* restored just now */
    if (found.seed != self.seed || found.restores != self.restores)
        fail("the host's seed or count has changed, and not the generation");
    if ((found.restores == 0) != ((found.generation[0] | found.generation[1]) == 0))
        fail("the generation is zero in a restored VM, or not in one that booted");
}

int guest_main(void)
{
    uint64_t wanted = option_number("count", 1000);
    checks = option_number("check", 0) != 0;
    progress->status = PV_STATUS_RUNNING;
    print("dice:");
    take_seed();
    for (uint64_t count = 0; wanted == 0 || count < wanted;) {
        if (!is_present(&self))
            take_new_seed();
        unsigned up = face(thrown++);
        faces[up]++;
        chunk[up]++;
        progress->work[0].index = thrown;
        progress->work[0].count = ++count;
        if (checks && thrown % CHUNK == 0)
            check();
    }
    print("SUCCESS: ");
    print_number(progress->work[0].count);
    print(" throws:");
    for (unsigned i = 0; i < FACES; i++) {
        print(" ");
        print_number(faces[i]);
    }
    print("\n");
    return 0;
}
