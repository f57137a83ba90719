# witness.py: a process of its own that outlives a side of a migration which was killed, and says what it had decided.
# It is run as a script, by decision.py; it imports nothing of pyvmm, so that it is small and there at once.
"""What is shared with the parent, by offsets and descriptors; and the script."""

import os
import select
import time

PAGE, PARENT, PEER = 3, 4, 5
"""Descriptors: the shared page, the parent's pidfd, the connection to the other side."""
SIZE = 4096
DECISION, RELEASED = 0, 1
"""Bytes of the page: a number of frames.DECISIONS; 1: nothing is to be said."""
SLOT = 64
"""From SLOT * decision on: how many bytes DIED has, and DIED."""
PATIENCE = 15.0
"""Seconds for which DIED is worth sending."""


def main() -> None:
    """Waits until the parent or the connection has ended."""
    os.closerange(PEER + 1, os.sysconf("SC_OPEN_MAX"))  # what the parent had got without close-on-exec
    os.chdir("/")
    poll = select.poll()
    poll.register(PARENT, select.POLLIN)
    poll.register(PEER, select.POLLIN | select.POLLRDHUP)  # nothing is to come there: whatever does ends it
    ended = {fd for fd, _ in poll.poll()}
    page = os.pread(PAGE, SIZE, 0)
    if PARENT in ended and not page[RELEASED]:
        at = SLOT * page[DECISION]
        tell(page[at + 1 : at + 1 + page[at]])


def tell(frame: bytes) -> None:
    """Sends all of it, if the other side takes it in time."""
    deadline = time.monotonic() + PATIENCE
    poll = select.poll()
    poll.register(PEER, select.POLLOUT)
    while frame and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        try:
            frame = frame[os.write(PEER, frame) :]
        except BlockingIOError:
            continue
        except OSError:  # the other side has gone too
            return


if __name__ == "__main__":
    main()
