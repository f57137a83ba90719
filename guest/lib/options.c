/* options.c: the guest's parameters, from the command line that the boot protocol hands over: "name=value name=value". */
#include "lib.h"

struct start_info { /* Xen public/arch-x86/hvm/start_info.h */
    uint32_t magic, version, flags, modules;
    uint64_t module_list, command_line, rsdp, memory_map;
    uint32_t memory_map_entries, reserved;
};
extern uint64_t start_info_gpa;

#define LINE 4096
static char line[LINE + 1]; /* our copy, cut into words */
static const char *words[128];
static unsigned count;

/* Does `word` say "name=", and what behind it? */
static const char *value_of(const char *word, const char *name)
{
    while (*name && *word == *name)
        word++, name++;
    return *name == 0 && *word == '=' ? word + 1 : NULL;
}

/* Is `word` "name=..." with a line "name=..." in the guest's options? */
static bool known(const char *word)
{
    if (value_of(word, "cpus"))
        return true;
    for (const char *at = guest_options; *at;) {
        const char *w = word;
        while (*w && *w == *at && *w != '=')
            w++, at++;
        if (*w == '=' && *at == '=')
            return true;
        while (*at && *at++ != '\n')
            ;
    }
    return false;
}

void options_init(void)
{
    const struct start_info *info = (const struct start_info *)start_info_gpa;
    const char *from = (const char *)info->command_line;
    char *at = line;
    for (size_t i = 0; from && i < LINE && from[i]; i++)
        line[i] = from[i];
    while (*at) {
        while (*at == ' ')
            *at++ = 0;
        if (*at == 0)
            break;
        if (count == sizeof(words) / sizeof(words[0]))
            refuse("too many options", "");
        words[count++] = at;
        while (*at && *at != ' ')
            at++;
    }
    for (unsigned i = 0; i < count; i++)
        if (!known(words[i]) && (i > 0 || words[0][0] != '/')) /* some loaders put the file's path in front */
            refuse("unknown option ", words[i]);
}

const char *option(const char *name, const char *otherwise)
{
    const char *found = otherwise;
    for (unsigned i = 0; i < count; i++) { /* the last one counts */
        const char *value = value_of(words[i], name);
        found = value ? value : found;
    }
    return found;
}

bool option_is(const char *name, const char *otherwise, const char *value)
{
    return same_text(option(name, otherwise), value);
}

uint64_t option_number(const char *name, uint64_t otherwise)
{
    const char *text = option(name, NULL);
    if (!text)
        return otherwise;
    const char *at = text;
    unsigned base = 10;
    uint64_t number = 0, digits = 0;
    if (at[0] == '0' && at[1] == 'x')
        base = 16, at += 2;
    for (;; at++, digits++) {
        unsigned digit = *at >= '0' && *at <= '9' ? (unsigned)(*at - '0') : (unsigned)((*at | 0x20) - 'a' + 10);
        if (digit >= base)
            break;
        if (__builtin_mul_overflow(number, base, &number) || __builtin_add_overflow(number, digit, &number))
            refuse("too large a number: ", text);
    }
    unsigned shift = *at == 'K' ? 10 : *at == 'M' ? 20 : *at == 'G' ? 30 : 0;
    at += shift ? 1 : 0;
    if (digits == 0 || *at || (shift && number >> (64 - shift)))
        refuse("not a number: ", text);
    return number << shift;
}

uint64_t option_at_most(const char *name, uint64_t otherwise, uint64_t most)
{
    uint64_t value = option_number(name, otherwise);
    if (value > most)
        refuse("too large: ", name);
    return value;
}

/* ---- RAM, from the same hand-over (memory.c asks) ---- */
struct memory_map_entry {
    uint64_t gpa, size;
    uint32_t type, reserved;
};
#define TYPE_RAM 1

/* Length of the RAM that starts at or spans `gpa`, from `gpa` on. */
uint64_t ram_from(uint64_t gpa);
uint64_t ram_from(uint64_t gpa)
{
    const struct start_info *info = (const struct start_info *)start_info_gpa;
    const struct memory_map_entry *map = (const struct memory_map_entry *)info->memory_map;
    if (info->version < 1 || !map)
        refuse("the boot loader gives no memory map", "");
    uint64_t end = gpa;
    for (bool grown = true; grown;) { /* entries need not be in order */
        grown = false;
        for (uint32_t i = 0; i < info->memory_map_entries; i++)
            if (map[i].type == TYPE_RAM && map[i].gpa <= end && map[i].gpa + map[i].size > end)
                end = map[i].gpa + map[i].size, grown = true;
    }
    return end - gpa;
}
