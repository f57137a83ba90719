/* echo.c: a console's input: sends back what it receives, byte by byte, until Ctrl-D or a line that says until=WORD. It
 * sleeps between bytes: UART -> IRQ 4 -> IOAPIC -> LAPIC. */
#include "lib/lib.h"

GUEST("echo", "sends back what it receives on the serial port, until Ctrl-D",
      "until=WORD ends after a line that is WORD, too\n");

#define VECTOR 0x24

#define UART(reg) (PV_PORT_SERIAL + (reg))
#define UART_RBR UART(0)
#define UART_IER UART(1)
#define UART_LCR UART(3)
#define UART_MCR UART(4)
#define UART_LSR UART(5)
#define IER_RDI 1
#define LCR_8_BITS 3
#define MCR_DTR_RTS_OUT2 0xb /* OUT2 connects the interrupt line */
#define LSR_DATA_READY 1

#define CTRL_D 4
#define BACKSPACE 8
#define DELETE 127

static char typed[256]; /* the line so far; what is longer is no WORD */
static size_t typed_size;
static bool after_cr;

static char reply[256]; /* sent at once: one exit for all that came in a burst */
static size_t reply_size;

static void flush(void)
{
    print_bytes(reply, reply_size);
    reply_size = 0;
}

static void answer(const char *text)
{
    if (reply_size + text_length(text) > sizeof(reply))
        flush();
    while (*text)
        reply[reply_size++] = *text++;
}

/* Was this the end of a line that is WORD? */
static bool ends_line(const char *until)
{
    bool said = typed_size < sizeof(typed) && until && typed_size == text_length(until) &&
                memcmp(typed, until, typed_size) == 0;
    typed_size = 0;
    progress->work[0].pass++;
    return said;
}

/* Takes one byte. Returns whether to go on. */
static bool take(char byte, const char *until)
{
    bool pair = after_cr && byte == '\n'; /* CR LF is one end of line */
    after_cr = byte == '\r';
    progress->work[0].count++;
    if (byte == CTRL_D)
        return false;
    if (pair)
        return true;
    if (byte == '\r' || byte == '\n') {
        answer(byte == '\r' ? "\r\n" : "\n");
        return !ends_line(until);
    }
    if (byte == BACKSPACE || byte == DELETE) {
        if (typed_size > 0) {
            typed_size--;
            answer("\b \b");
        }
        return true;
    }
    if (typed_size < sizeof(typed))
        typed[typed_size++] = byte;
    answer((const char[]){byte, 0});
    return true;
}

int guest_main(void)
{
    const char *until = option("until", NULL);
    bool go_on = true;
    irq_init();
    irq_route(PV_IRQ_SERIAL, VECTOR);
    progress->status = PV_STATUS_RUNNING;

    /* To enable its interrupt tells the host that somebody listens. A byte that came before is still in the receiver,
     * since the FIFO stays off: to switch it on is to reset the receiver. Nothing is read that LSR did not tell of: a
     * byte may come just before the read. */
    out8(UART_LCR, LCR_8_BITS);
    out8(UART_MCR, MCR_DTR_RTS_OUT2);
    out8(UART_IER, IER_RDI);

    while (go_on) {
        /* Counted before the receiver is emptied: a byte that comes behind the last look is a new edge and ends the
         * wait at once. */
        uint64_t seen = interrupts[VECTOR];
        while (go_on && (in8(UART_LSR) & LSR_DATA_READY))
            go_on = take((char)in8(UART_RBR), until);
        flush();
        if (go_on)
            wait_interrupt(VECTOR, seen);
    }
    out8(UART_IER, 0);
    return 0;
}
