# decision.py: the word that says who owns the guest, where it outlives a kill -9 of its side: what
# docs/migration-protocol.md has under "Who owns the guest".
"""`Decision`, of this side; `Watch`, for that of the other one."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import signal
import sys
import time
from contextlib import suppress

from pyvmm.errors import HostError, LifecycleError, ProtocolError
from pyvmm.migration import witness
from pyvmm.migration.frames import DECISIONS, HEAD_SIZE, Decoder, Died, encode
from pyvmm.migration.proof import DECISIONS_OF, check_died, died_proof

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from pyvmm.migration.connection import Connection

_NEXT = {
    "held": ("held", "offered"),
    "offered": ("held", "given"),
    "given": ("held",),
    "none": ("none", "ready"),
    "ready": ("none", "taken"),
    "taken": (),
}
"""What may follow. A side that never left its first decision may go back to it: so does each CANCEL."""
_NEVER_TAKEN = ("none", "ready")


class Decision:
    """side: "source" or "destination". One thread decides. A side that ends for good with its decision open just ends:
    then its witness speaks, as after a kill. Raises HostError."""

    def __init__(self, side: str) -> None:
        self.side = side
        try:
            self._fd = os.memfd_create("pyvmm decision", os.MFD_CLOEXEC)
            try:
                os.ftruncate(self._fd, witness.SIZE)
                self._page = mmap.mmap(self._fd, witness.SIZE)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise HostError(f"no memory to share with a witness: {error.strerror}") from None
        self.value = DECISIONS_OF[side][0]
        """What was decided last. It stays after close(); any thread may look."""
        self._page[witness.DECISION] = DECISIONS[self.value]
        self._witness: tuple[int, int] | None = None
        """Its pid, and its pidfd."""

    def __enter__(self) -> Decision:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the witness and the memory; twice is once."""
        self.release()
        if self._fd >= 0:
            self._page.close()
            os.close(self._fd)
            self._fd = -1

    def set(self, name: str, other: str = "") -> None:
        """Decides. It holds as soon as this returns, whatever becomes of this process. other: what the other side is
        known to have ended with, by DIED or CANCEL, which alone lets a source back from GIVEN. Raises LifecycleError
        for what may not follow."""
        old = self.value
        if self._fd < 0:
            raise LifecycleError(f"the {self.side} of a migration that is over decides nothing")
        if name not in _NEXT[old]:
            raise LifecycleError(f"the {self.side} of a migration cannot go from {old} to {name}")
        if old == "given" and other not in _NEVER_TAKEN:
            raise LifecycleError("the guest was given away: it comes back only from a destination that never took it")
        self._page[witness.DECISION] = DECISIONS[name]
        self.value = name

    # ---- the witness ----

    def start_witness(self, connection: Connection, token: bytes) -> None:
        """A process that tells the other side, should this one be killed. connection: this side's end of that for its
        witness, after JOINED, which is taken over; token: the migration's. One that was there before is released.
        Raises HostError."""
        self.release()
        sequence, _ = connection.sequences
        for name in DECISIONS_OF[self.side]:
            frame = encode(Died(DECISIONS[name], died_proof(token, self.side, name)), sequence)
            at = witness.SLOT * DECISIONS[name]
            self._page[at : at + 1 + len(frame)] = bytes([len(frame)]) + frame
        self._page[witness.RELEASED] = 0
        peer = connection.detach()
        try:
            self._witness = _spawn(self._fd, peer)
        except OSError as error:
            raise HostError(f"the witness of the migration cannot be started: {error.strerror}") from None
        finally:
            os.close(peer)

    @property
    def witnessed(self) -> bool:
        """The witness is there."""
        if self._witness is None:
            return False
        poll = select.poll()
        poll.register(self._witness[1], select.POLLIN)
        return not poll.poll(0)

    def release(self) -> None:
        """The migration has ended in order, or this side lives on without it: the witness ends and says nothing. Twice
        is once."""
        if self._witness is None:
            return
        pid, descriptor = self._witness
        self._witness = None
        self._page[witness.RELEASED] = 1  # should this process be killed before the next line
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        os.close(descriptor)
        with suppress(ChildProcessError):  # somebody else has waited for it
            os.waitpid(pid, 0)


def _spawn(page: int, peer: int) -> tuple[int, int]:
    """The witness with its descriptors, in a session of its own, where no Ctrl-C and no kill of a group reaches it: its
    pid and pidfd. Raises OSError.

    It waits for our pidfd, since the end of a pipe would be held open by any child that was forked from us. A process
    is dead for its pidfd when all its threads are gone: no vCPU runs any more.
    """
    wanted = {witness.PAGE: page, witness.PARENT: os.pidfd_open(os.getpid()), witness.PEER: peer}
    copies: dict[int, int] = {}
    try:
        for place, fd in wanted.items():  # away from all places, so that none is overwritten before its turn
            copies[place] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, witness.PEER + 1)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", witness.__file__],
            os.environ,
            file_actions=[
                *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)),
                *((os.POSIX_SPAWN_DUP2, copy, place) for place, copy in copies.items()),
            ],
            setsid=True,
            setsigmask=signal.valid_signals(),  # it ends when its work is done, and by SIGKILL
        )
    finally:
        for fd in (*copies.values(), wanted[witness.PARENT]):
            os.close(fd)
    try:
        return pid, os.pidfd_open(pid)
    except OSError:  # one that could not be released later is none
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


class Watch:
    """This side's end of the connection of the other side's witness, after JOINED, which it takes over. side: the
    other one; token: the migration's. `gone`: it ended without DIED, or what came was not the DIED that only that
    witness can send; then `why` is one line, and nothing is known of the other side. Never raises for what comes."""

    def __init__(self, connection: Connection, side: str, token: bytes) -> None:
        if connection.secure:
            raise LifecycleError("the connection of a witness is one without TLS")
        self.side = side
        self.gone = False
        self.why = ""
        self._connection = connection
        self._socket = connection.plain()
        self._token = token
        self._decoder = Decoder((Died,), connection.sequences[1])
        self._raw = b""
        self._decision: str | None = None

    def close(self) -> None:
        """Ends the connection, and so the other side's witness; twice is once."""
        self._connection.close()
        if self._decision is None:
            self._miss("closed here")

    def fileno(self) -> int:
        """The descriptor, to poll: when it is readable, died(0) has news. -1 when closed."""
        return self._connection.fileno()

    def died(self, timeout: float = 0.0) -> str | None:
        """What the other side had decided when it was killed; None if that has not come within so many seconds, or
        never will (`gone`)."""
        deadline = time.monotonic() + timeout
        while self._decision is None and not self.gone:
            try:
                data = self._socket.recv(self._decoder.wants)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._socket, select.POLLIN)
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    break
                continue
            except OSError as error:
                self._miss(f"{error.strerror or error}")
                break
            self._take(data)
        return self._decision

    def _take(self, data: bytes) -> None:
        if not data:
            self._miss("closed")
            return
        self._raw += data
        try:
            for frame in self._decoder.feed(data):
                self._note()
                assert isinstance(frame, Died)
                self._decision = check_died(frame, self._token, self.side)
        except ProtocolError as error:
            self._note()
            self._miss(f"{error}")

    def _note(self) -> None:
        recorder = self._connection.recorder
        if recorder is not None and len(self._raw) >= HEAD_SIZE:
            recorder.note(False, self._connection.channel, self._raw)
        self._raw = b""

    def _miss(self, why: str) -> None:
        if not self.gone:
            self.gone, self.why = True, f"the witness of the {self.side}: {why}"
