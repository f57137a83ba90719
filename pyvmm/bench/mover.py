# mover.py: one side of a migration that is measured, in a process of its own, which does what it is told in lines of
# JSON. Units: bytes, seconds by the host's monotonic clock, which all processes share.
"""`Side`: such a process, for who measures; `Mover`: what it can do."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from pyvmm._native import ffi, lib
from pyvmm.bench.checkpoints import fill
from pyvmm.bench.running import Watch, longest_gap, reset_gaps, run_on, settle
from pyvmm.bench.streams import Ends
from pyvmm.bench.warm import warm_host
from pyvmm.errors import HostError, MigrationError, PyvmmError
from pyvmm.layout import Gpa
from pyvmm.machine import VM
from pyvmm.machine.migrating import incoming, outgoing
from pyvmm.migration.events import RoundEnded
from pyvmm.migration.tls import Tls

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from pyvmm.machine.migrating.incoming import Incoming, ReceiveOptions

IMPORTED = (incoming, outgoing)
"""What VM.receive() and VM.migrate() import: that is no part of a migration."""
PATIENCE = 120
"""Seconds in which a side has done what it was told."""
_MOVED = 60
_TICK = 0.001
_DOZE_NS = 20_000_000
"""For which a thread looks for the guest's first work before it looks whether anybody wants to know."""


class Side:
    """A child process, told what to do by ask(), or by tell() and then answer(). A context manager."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "from pyvmm.bench.mover import main; main()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def ask(self, do: str, **arguments: object) -> Any:  # noqa: ANN401 - what JSON has
        """What Mover or Ends has by that name. Raises HostError for what went wrong there."""
        self.tell(do, **arguments)
        return self.answer()

    def tell(self, do: str, **arguments: object) -> None:
        """Has it begin; answer() waits."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | arguments).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:  # noqa: ANN401
        """Of what it was told last."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise HostError(f"a process that is measured has not done its work in {PATIENCE} s")
        line = self._process.stdout.readline()
        if not line:
            raise HostError("a process that is measured has ended by itself")
        told = json.loads(line)
        if "error" in told:
            raise HostError(f"in a process that is measured: {told['error']}")
        return told["result"]

    def close(self) -> None:
        """Ends it; twice is once."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Mover:
    """What a side can do, each by its name: with one VM, that it made or that moved here."""

    def __init__(self) -> None:
        self.vm: VM | None = None
        self._incoming: Incoming | None = None
        self._worked: list[float] = []
        self._looking: threading.Thread | None = None
        self._closing = threading.Event()

    def close(self) -> None:
        """Ends it all."""
        self._closing.set()
        if self._looking is not None:  # it reads the guest's memory
            self._looking.join()
        if self._incoming is not None:
            self._incoming.close()
        if self.vm is not None:
            self.vm.close()

    def make(self, memory: int, guest: str, append: str, content: str, pages: str = "auto") -> None:
        """A guest that runs; content: of bench/checkpoints.py, or nothing."""
        vm = self.vm = VM(memory, pages=pages)  # type: ignore[arg-type]
        vm.load(guest, append)
        if content:
            fill(vm.memory, content)
        vm.start()
        while vm.progress().status != "running":
            run_on(vm, _TICK, guest)
        if guest == "echo":  # it sleeps from the time on at which it listens
            while not vm.serial.listening:
                run_on(vm, _TICK, guest)

    def listen(self, at: str, warm: int, tls: list[str] | None = None, works: bool = False) -> str:
        """Where a guest may come. warm: bytes of the host's memory that are given out and taken back before; works:
        it does, and arrived() is to say when it began to, here."""
        if warm:
            warm_host(warm)
        options: ReceiveOptions = {"tls": Tls(*tls)} if tls else {}
        if works:
            options["prepare"] = self._look_out
        self._incoming = VM.receive(at, **options)
        return self._incoming.address

    def arrived(self) -> dict[str, object]:
        """The guest that came. Returns the destination's report, and when the guest first worked here, if it did."""
        coming = self._incoming
        assert coming is not None
        self.vm = coming.vm(_MOVED)
        report = coming.result(_MOVED)
        coming.close()
        self._incoming = None
        return {"report": report.as_json(), "worked": self._worked}

    def nobody(self) -> None:
        """No guest came, as it should be."""
        coming, self._incoming = self._incoming, None
        assert coming is not None
        coming.close()

    def _look_out(self, vm: VM) -> None:
        """Notes when vCPU 0 does its first work: its memory is here, and it does not run yet."""
        offset = ffi.offsetof("struct pv_progress", "work") + ffi.offsetof("struct pv_work", "count")
        at = ffi.cast("uint64_t *", vm.memory.hva(Gpa(lib.PV_PROGRESS_GPA)).value + offset)

        def wait() -> None:
            while not self._closing.is_set():
                if not lib.pv_wait_change(at, _DOZE_NS):
                    self._worked.append(time.monotonic())
                    return

        self._looking = threading.Thread(target=wait, name="first work")
        self._looking.start()

    def migrate(self, to: str, tls: list[str] | None = None, **options: Any) -> dict[str, object]:  # noqa: ANN401
        """Moves the guest. Returns the source's report, and when the guest was asked to stand."""
        assert self.vm is not None
        if tls:
            options["tls"] = Tls(*tls)
        began = time.monotonic()
        leaving = self.vm.migrate(to, **options)
        report = leaving.result(_MOVED)
        switched = next(event for event in leaving if event.KIND == "switched")
        self.vm.close()
        self.vm = None
        return {"report": report.as_json(), "stood": began + switched.at - report.total_downtime}

    def try_rounds(self, to: str, **options: Any) -> dict[str, float]:  # noqa: ANN401
        """Rounds of a migration that comes to nothing. Returns what the guest got done meanwhile: a second, and a
        second of CPU time; and bytes a second that would have gone twice."""
        assert self.vm is not None
        watch = Watch(self.vm)
        leaving = self.vm.migrate(to, **options)
        rounds = [event for event in leaving if isinstance(event, RoundEnded)]
        rates = {"rate": watch.rate(), "rate_of_threads": watch.rate_of_threads()}
        try:
            leaving.result()
        except MigrationError as error:
            if not rounds or "not done after" not in str(error):
                raise
        else:
            raise HostError("a guest moved that was to stay")
        return rates | {"resent": sum(each.pages for each in rounds[1:]) / sum(each.seconds for each in rounds[1:])}

    def work(self, seconds: float) -> dict[str, float]:
        """What the guest gets done."""
        assert self.vm is not None
        watch = Watch(self.vm)
        run_on(self.vm, seconds)
        return {"rate": watch.rate(), "rate_of_threads": watch.rate_of_threads()}

    def pause(self) -> None:
        """Another guest has its turn."""
        assert self.vm is not None
        self.vm.pause()

    def resume(self) -> None:
        """This one goes on, and has done work again when this returns."""
        assert self.vm is not None
        self.vm.resume()
        settle(self.vm)

    def forget_gaps(self) -> None:
        """The longest gap begins anew."""
        assert self.vm is not None
        reset_gaps(self.vm)

    def gap(self) -> float:
        """The longest since then, by the guest's own clock."""
        assert self.vm is not None
        return longest_gap(self.vm) or 0.0

    def large(self, passes: int) -> int:
        """KVM's 2 MiB mappings, when the guest has gone over its memory so often more."""
        assert self.vm is not None
        end = self.vm.progress().passes + passes
        while self.vm.progress().passes < end:
            run_on(self.vm, _TICK)
        return self.vm.mappings()["pages_2m"]


def main() -> None:
    """The child's: until nothing more is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who measures ends us
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    mover, ends = Mover(), Ends()
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            do = asked.pop("do")
            try:
                answer = {"result": getattr(mover if hasattr(Mover, do) else ends, do)(**asked)}
            except (PyvmmError, OSError, TimeoutError) as error:
                answer = {"error": f"{do}: {error}"}
            print(json.dumps(answer), file=out, flush=True)
    except BrokenPipeError:  # nobody wants to know any more
        pass
    finally:
        mover.close()
        ends.close()
