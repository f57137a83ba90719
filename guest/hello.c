/* hello.c: prints a line and ends. The smallest guest: copy it to start your own. */
#include "lib/lib.h"

GUEST("hello", "prints a line and ends",
      "text=WORD what to print\n"
      "status=N exit status\n");

int guest_main(void)
{
    print(option("text", "hello from a guest"));
    print("\n");
    return (int)option_number("status", 0);
}
