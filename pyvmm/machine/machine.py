# machine.py: the VM: owns all parts of one guest and their lifetime; what the parts do is in their own modules.
"""`VM`: build, load, run, pause, look at, save and restore one guest."""

from __future__ import annotations

from contextlib import ExitStack

from pyvmm._native import ffi, lib
from pyvmm.errors import BadInput, FetchError, LifecycleError
from pyvmm.kvm import Kvm
from pyvmm.layout import PAGE_SIZE, Gpa, Hva, format_size, parse_size
from pyvmm.machine import loader
from pyvmm.machine.board import Board, Wires
from pyvmm.machine.capture import Capture
from pyvmm.machine.exits import Exits
from pyvmm.machine.lifecycle import Crash, Lifecycle
from pyvmm.machine.outcome import PROGRESS_SIZE, TIMED_OUT, Progress, RunResult
from pyvmm.memory import GuestMemory
from pyvmm.vcpu import Registers, Vcpu
from pyvmm.vcpu.cpuid import address_bits, cpuid_for
from pyvmm.vcpu.registers import read_registers, set_entry, write_registers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from pyvmm.devices.serial import Serial
    from pyvmm.devices.virtio.balloon import Balloon
    from pyvmm.devices.virtio.mmio import Mmio
    from pyvmm.errors import PyvmmError
    from pyvmm.machine.incremental import Base
    from pyvmm.machine.migrating.incoming import Incoming, ReceiveOptions
    from pyvmm.machine.migrating.outgoing import MigrateOptions, Outgoing
    from pyvmm.machine.restoring import RestoreOptions
    from pyvmm.machine.saving import Saved, SaveOptions
    from pyvmm.memory.engine import Engine
    from pyvmm.memory.mapping import Pages
    from pyvmm.memory.trace import Rings, Target, Trace
    from pyvmm.migration.shape import Shape
    from pyvmm.snapshot.lazy import FileHome
    from pyvmm.state import State

# In the hole below 4 GiB, for VT-x without "unrestricted guest" (KVM api.rst, 4.36 and 4.42).
_IDENTITY_MAP, _TSS = 0xFFFB_C000, 0xFFFB_D000


class VM:
    """One virtual machine. A context manager: at its end the guest is stopped and everything is given back.

    memory: size of RAM, bytes or "256M"; cpus: vCPUs, 1 to 64; pages, hugetlb: see GuestMemory;
    output: called with what the guest prints (bytes), on a vCPU's thread; without one it is kept in `printed`;
    dirty_ring: entries of each vCPU's dirty ring, a power of two, for trace("ring"), which then is the only tracker;
    devices: virtio devices in the order of their addresses, such as "rng", "console", "balloon", "block:FILE" or
    "block:FILE,ro".
    Raises BadInput for values that cannot be, HostError where the host cannot.
    """

    def __init__(
        self,
        memory: int | str = "64M",
        cpus: int = 1,
        pages: Pages = "auto",
        hugetlb: bool = False,
        output: Callable[[bytes], None] | None = None,
        dirty_ring: int = 0,
        devices: Sequence[str] = (),
    ) -> None:
        size = parse_size(memory)
        if not 1 <= cpus <= lib.PV_MAX_CPUS:
            raise BadInput(f"{cpus} vCPUs: pyvmm takes 1 to {lib.PV_MAX_CPUS}")
        self._capture = Capture()
        self._image_path = ""
        self.restored: FileHome | None = None
        """Where memory comes from, of a VM that was restored lazily."""
        self.leaving: Outgoing | None = None
        """The migration by which the guest leaves, or has tried to, last."""
        with ExitStack() as stack:
            kvm = stack.enter_context(Kvm())
            self._msrs = kvm.msr_indices
            limit = kvm.check_extension("KVM_CAP_MAX_VCPUS") or kvm.check_extension("KVM_CAP_NR_VCPUS") or 4
            if cpus > limit:
                raise BadInput(f"{cpus} vCPUs: this host's KVM takes at most {limit}")
            cpuid = kvm.supported_cpuid()
            self.memory = GuestMemory(size, pages, hugetlb, address_bits(cpuid))
            stack.callback(self.memory.close)
            self._fd = stack.enter_context(kvm.create_vm())
            self._rings = self._make_rings(stack, dirty_ring) if dirty_ring else None
            self._target: Target | None = None  # of write traces
            self.base: Base | None = None
            """The snapshot since which writes are traced (pyvmm.machine.incremental)."""
            stack.callback(self._abandon_trace)  # when no vCPU runs any more, and before the VM's descriptor goes
            for slot, region in enumerate(self.memory.regions):
                hva = Hva(self.memory.hva(region.gpa).value)
                self._fd.set_user_memory_region(slot, region.gpa, region.size, hva)
            self._fd.set_identity_map_addr(_IDENTITY_MAP)
            self._fd.set_tss_addr(_TSS)
            self._fd.create_irqchip()
            self._fd.create_pit2()
            self._ports = ffi.new("struct pv_ports *")
            wires = Wires(
                output or self._capture, self._irq_line, self._on_exit_port, self.memory, self._on_device_trouble
            )
            self._board = Board(wires, self._ports, devices)
            stack.callback(self._board.close, self.memory.close_engine)  # should there never be a Lifecycle
            self._exits = Exits(self._board.ports, self._board.mmio, self._on_crash)
            self.vcpus: list[Vcpu] = []
            mmap_size = kvm.vcpu_mmap_size()
            for index in range(cpus):
                fd = stack.enter_context(self._fd.create_vcpu(index, mmap_size))
                self.vcpus.append(Vcpu(fd, self._ports))
                fd.set_cpuid2(cpuid_for(cpuid, index, cpus, self.vcpus[-1].tsc_khz))
                if self._rings is not None:
                    self._rings.attach(self.vcpus[-1].native)
            if cpus > 1:
                # KVM's map of APIC ids is drawn while a vCPU is created and lacks that vCPU; a LAPIC set anew redraws
                # it. Else an IPI would get lost if the guest sent one before it wrote a LAPIC's registers.
                first = self.vcpus[0].fd
                lapic = first.get_struct("KVM_GET_LAPIC", "struct kvm_lapic_state")
                first.set_struct("KVM_SET_LAPIC", "struct kvm_lapic_state", lapic)
            self._life = Lifecycle(self.vcpus, self._board)
            stack.callback(self.memory.close_engine)
            stack.callback(self._life.close, self.memory.close_engine)
            self.memory.on_engine = self._on_engine
            self.memory.paused = lambda: self._life.paused
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stops the guest and gives back memory, threads and descriptors. A second call does nothing.

        Must not be called on a vCPU's own thread; stop the guest there, by request_stop().
        """
        self._life.require_foreign("close it: request_stop() it there")
        if self.leaving is not None:
            self.leaving.end("the VM is closed")
        self._stack.close()

    # ---- a guest's life ----

    def load(
        self, guest: str, append: str = "", initrd: str | None = None, format: str | None = None, at: int | None = None
    ) -> None:
        """Loads a guest of pyvmm's own by name, or an image file; `append` is its command line.

        format, at: for images that do not say what they are (pyvmm.image.FORMATS); at: load address, bytes.
        Raises ImageError or BadInput, with the VM as it was.
        """
        self._life.require_open()
        if self._image_path:
            raise LifecycleError("the VM has its guest already: make another VM for another one")
        image = loader.read_guest(guest, format, at)
        entry = loader.load(self.memory, image, append, initrd)
        set_entry(self.vcpus[0].fd, entry, loader.PAGE_TABLE.value)
        self._image_path = loader.guest_path(guest)

    def start(self) -> None:
        """Starts all vCPUs, each in its thread, and returns at once.

        Raises FetchError where a page was found before that it cannot be brought; another start() tries.
        """
        self._life.require_open()
        if not self._image_path:
            raise LifecycleError("the VM has no guest yet: load() one, or restore_state() a saved one")
        self._life.start(self._exits)
        if self.restored is not None:
            self.restored.begin()

    def run(self, timeout: float | None = None) -> RunResult:
        """Runs the guest until it ends, at most `timeout` seconds; after a timeout it is paused.

        Goes on with a VM that is paused. Raises GuestCrash where the guest crashed.
        """
        if not self.started:
            self.start()
        elif self.paused:
            self.resume()
        result = self.wait(timeout)
        if result.reason == "timeout":
            self.pause()
        return result

    def wait(self, timeout: float | None = None) -> RunResult:
        """Waits until the guest has ended, at most `timeout` seconds; the guest goes on after a timeout.

        Raises GuestCrash where the guest crashed, FetchError where a page of it cannot be brought back (the VM is
        paused then, and resume() tries again), or the exception that ended a vCPU's thread.
        """
        if not self.started:
            raise LifecycleError("the VM is not started: nothing would end")
        if not self._life.wait(timeout):
            return TIMED_OUT
        outcome = self._life.outcome
        if outcome is None and self._life.trouble is not None:
            raise self._life.trouble
        if isinstance(outcome, RunResult):
            return outcome
        if isinstance(outcome, Crash):
            from pyvmm.machine import autopsy

            self._life.require_open()
            raise autopsy.explained(outcome, self.memory, self._image_path)
        assert outcome is not None
        raise outcome

    def pause(self) -> float:
        """Parks all vCPUs and returns the seconds that took. No I/O is half done then, and state can be saved.

        Raises FetchError where a vCPU does not park because it waits for a page that cannot be brought back.
        Must not be called on a vCPU's own thread, such as by a device.
        """
        return self._life.pause()

    def resume(self) -> None:
        """Lets paused vCPUs go on."""
        if self._life.resume() is not None:
            self.memory.engine.retry()

    def stop(self, status: int = 0) -> None:
        """Ends the guest now, as pulling the plug would, and waits until it has.

        Where a vCPU waits in KVM for a page that cannot be brought back, and no signal reaches it, the memory engine is
        closed to free it: nothing of the guest's memory can be read then.
        """
        self.request_stop(status)
        self._life.join(self.memory.close_engine)

    def request_stop(self, status: int = 0) -> None:
        """Ends the guest soon and returns at once. Any thread, also a vCPU's."""
        self._life.end(RunResult("stopped", status))

    @property
    def started(self) -> bool:
        """Has it been started? Also true after its end."""
        return self._life.started

    @property
    def ended(self) -> bool:
        """Have all vCPUs come to their end?"""
        return self._life.ended

    @property
    def paused(self) -> bool:
        """Are the vCPUs parked, or about to be?"""
        return self._life.paused

    # ---- looking at it ----

    def progress(self) -> Progress:
        """What the guest says of its work; read from its progress page, without an exit."""
        return Progress(self.memory.read(Gpa(lib.PV_PROGRESS_GPA), PROGRESS_SIZE))

    def regs(self, cpu: int = 0) -> Registers:
        """A vCPU's registers. The VM must be paused, ended or not started."""
        self._life.require_still("its registers can be read")
        return read_registers(self._vcpu(cpu).fd)

    def set_regs(self, cpu: int = 0, /, **values: int) -> None:
        """Sets general and control registers by name: vm.set_regs(0, rax=1). As regs() otherwise."""
        self._life.require_still("its registers can be set")
        write_registers(self._vcpu(cpu).fd, values)

    def stats(self) -> dict[str, dict[str, int]]:
        """Counts: "exits" by KVM_EXIT_* in lower case (those handled in C too), "ports" and "mmio" that nobody claims
        (reads, writes), "kvm" and "vcpus": KVM's binary statistics, the vCPUs' summed up."""
        from pyvmm.machine import figures

        self._life.require_open()
        return figures.stats(self._fd, self.vcpus, self._ports, self._board.mmio)

    def mappings(self) -> dict[str, int]:
        """How KVM maps the guest's memory now: "pages_4k", "pages_2m", "pages_1g", by its own statistics."""
        self._life.require_open()
        stats = self._fd.stats()
        return {name: stats[name] for name in ("pages_4k", "pages_2m", "pages_1g")}

    def unknown_ports(self) -> dict[int, tuple[int, int]]:
        """Ports that the guest used and nobody claims: port -> (reads, writes), strings counted as their length."""
        from pyvmm.machine import figures

        return figures.unknown_ports(self._ports)

    # ---- its console ----

    @property
    def serial(self) -> Serial:
        """The serial port on 0x3f8."""
        return self._board.devices["serial"]  # type: ignore[return-value]

    @property
    def virtio(self) -> list[Mmio]:
        """The virtio devices, in the order of their addresses; the `model` of each is what kind it is."""
        return self._board.virtio

    @property
    def balloon(self) -> Balloon | None:
        """The balloon by which the guest gives up memory, where the VM has one."""
        return self._board.balloon

    @property
    def printed(self) -> str:
        """What the guest printed, where no `output` was given: at most the last MiB."""
        return self._capture.text().decode("utf-8", "replace")

    def expect(self, text: str, timeout: float = 10.0) -> bool:
        """Waits until the guest has printed `text`; False where it did not within `timeout` seconds."""
        return self._capture.wait_for(text.encode(), timeout)

    def type(self, text: str) -> None:
        """Types `text` at the guest's console."""
        data = text.encode()
        if self.serial.room() < len(data):
            raise BadInput(f"the guest has {self.serial.waiting} unread bytes: {len(data)} more do not fit")
        self.serial.feed(data)

    # ---- its state ----

    def save_state(self) -> State:
        """All state but RAM, as plain data: vCPUs, interrupt controllers, timer, clock, devices. Pause first."""
        from pyvmm.machine import saved

        self._life.require_still("its state can be saved")
        return saved.save(self._fd, self.vcpus, self._board, self.memory.size, self._msrs())

    def restore_state(self, state: State) -> None:
        """Puts a saved state into this VM, of the same shape and not started; RAM is the caller's to copy.

        Raises StateError where it does not fit; the VM must not be started then.
        """
        from pyvmm.machine import saved

        self._life.require_open()
        if self.started:
            raise LifecycleError("a state goes into a VM that has not started")
        saved.restore(self._fd, self.vcpus, self._board, self.memory.size, state)
        self._image_path = self._image_path or "restored state"

    def snapshot(self, path: str, **options: Unpack[SaveOptions]) -> Saved:
        """Writes all of the VM into a file, from which `VM.restore(path)` makes another that goes on just there.

        options: such as mode="live", with which the guest runs on meanwhile: see pyvmm.machine.saving.save, which also
        says what is raised. Returns what it took.
        """
        from pyvmm.machine.saving import save

        self._life.require_open()
        return save(self, path, **options)

    @classmethod
    def restore(cls, path: str, **options: Unpack[RestoreOptions]) -> VM:
        """A new VM from a snapshot file, not started: start() or run() goes on where it was saved.

        options: see pyvmm.machine.restoring.restore, which also says what is raised.
        """
        from pyvmm.machine.restoring import restore

        return restore(cls, path, **options)

    def require_lasting(self) -> None:
        """Raises BadInput where the VM can be neither saved nor moved: a device of it goes with this process."""
        self._board.require_lasting()

    def hold(self, trouble: PyvmmError) -> None:
        """Pauses the VM because of something that wait() is to raise; resume() lets it try."""
        self._life.hold(trouble)

    # ---- to another process ----

    def migrate(self, to: str, **options: Unpack[MigrateOptions]) -> Outgoing:
        """Moves the running guest to the VMM that listens at `to` ("tcp:HOST:PORT", "unix:PATH", "local:PATH").

        Returns at once: iterate for events, result() waits. options: see pyvmm.machine.migrating.outgoing. After that
        wait() returns RunResult("migrated", 0); if it comes to nothing the guest runs on here. Raises BadInput.
        """
        from pyvmm.machine.migrating.outgoing import Outgoing

        self._life.require_open()
        return Outgoing(self, to, **options)

    @classmethod
    def receive(cls, listen: str, **options: Unpack[ReceiveOptions]) -> Incoming:
        """Listens for a guest that moves here; vm() of what is returned waits until it runs.

        options: see pyvmm.machine.migrating.incoming. Raises BadInput, HostError.
        """
        from pyvmm.machine.migrating.incoming import Incoming

        return Incoming(cls, listen, **options)

    def shape(self) -> Shape:
        """What another process must build to take this VM over."""
        from pyvmm.machine.shape import shape_of

        self._life.require_open()
        return shape_of(self._fd, self.vcpus, self._board, self.memory)

    @property
    def has_rings(self) -> bool:
        """Was it made with dirty_ring?"""
        return self._rings is not None

    @property
    def life(self) -> Lifecycle:
        """Its vCPUs as one, for what moves them."""
        return self._life

    # ---- what it writes ----

    def trace(self, tracker: str = "bitmap", **options: object) -> Trace:
        """A write trace, not started: which pages were written since last asked (pyvmm.memory.trace).

        tracker: "bitmap", "manual", "ring" or "coarse"; options: the tracker's own, such as unit="2M" of coarse.
        Raises BadInput for a tracker or option that is none, HostError where this host or VM does not have it.
        """
        from pyvmm.machine.tracing import make_target, make_trace

        self._life.require_open()
        if self._target is None:
            self._target = make_target(self._fd, self.memory, self.vcpus, self._rings, self._life.require_open)
        return make_trace(tracker, self._target, options)

    # ---- stepping ----

    def single_step(self, steps: int, show: Callable[[str], None]) -> None:
        """Single-steps the first `steps` instructions of vCPU 0 after the start, each shown as a line."""
        from pyvmm.machine import autopsy
        from pyvmm.machine.stepper import Stepper

        self._life.require_open()
        if self.started:
            raise LifecycleError("stepping begins with the guest: ask for it before start()")
        self._exits.on_debug = Stepper(self.vcpus[0], self.memory, autopsy.symbols(self._image_path), steps, show)

    # ---- inside ----

    def _vcpu(self, cpu: int) -> Vcpu:
        if not 0 <= cpu < len(self.vcpus):
            raise BadInput(f"no vCPU {cpu}: the VM has {len(self.vcpus)}, counted from 0")
        return self.vcpus[cpu]

    def _on_engine(self, engine: Engine) -> None:
        from pyvmm.host import has

        engine.has = has
        engine.on_failure = self.hold
        for vcpu in self.vcpus:
            engine.attach_vcpu(vcpu.native)

    def _make_rings(self, stack: ExitStack, entries: int) -> Rings:
        from pyvmm.memory.trace import Rings

        rings = Rings(self._fd, self.memory, entries)
        stack.callback(rings.close)
        return rings

    def _abandon_trace(self) -> None:
        if self._target is not None:
            self._target.close()

    def _irq_line(self, irq: int) -> Callable[[bool], None]:
        return lambda level: self._fd.irq_line(irq, level)

    def _on_exit_port(self, status: int) -> None:
        self._life.end(RunResult("exit", status))

    def _on_device_trouble(self, trouble: BaseException) -> None:
        if isinstance(trouble, FetchError):
            self.hold(trouble)
        else:
            self._life.end(trouble)

    def _on_crash(self, vcpu: Vcpu, kind: str) -> None:
        from pyvmm.explain import ExitFacts

        self._life.end(Crash(vcpu, ExitFacts.from_run(kind, vcpu.fd.run)))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<VM {format_size(self.memory.size)}, {len(self.vcpus)} vCPUs, {self.memory.size // PAGE_SIZE} pages>"
