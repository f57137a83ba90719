# trials_kvm.py: what a VM can do here, tried with guests of a few instructions. For the table in probe.py.
"""Trials of KVM: speed of each ring, cost of an exit, size of mappings, pre-fault, single-step, TSC."""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError
from pyvmm.host.code import CLOCK, PORTS, SPIN, STEPS, TOUCH
from pyvmm.host.feature import Outcome
from pyvmm.host.guest import DATA, SIZE, TrialGuest
from pyvmm.host.scratch import large_bytes
from pyvmm.kvm import Kvm
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE

NATIVE = 100e6
"""Instructions a second that no interpreter reaches and every CPU does."""
FAST_EXIT = 10.0
"""Microseconds that an exit takes at most where the CPU itself leaves the guest."""
_LONG_ENOUGH = 0.003  # seconds: 100 times what the two exits that mark begin and end may cost
_MOST_TURNS = 1 << 26
_BLOCKS = SIZE // BLOCK_SIZE - 1  # in the slot behind the first 2 MiB


def opens() -> Outcome:
    """/dev/kvm can be opened, and runs a guest."""
    try:
        Kvm().close()
    except HostError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, PermissionError)):
            raise
        problem, _, remedy = str(error).partition(": ")
        return Outcome(False, problem, remedy)
    with TrialGuest() as guest:
        guest.run(TOUCH, ring=0, rcx=1, rdi=DATA.value)
    return Outcome(True, "a guest runs")


def speed(ring: int) -> Outcome:
    """Instructions a second in `ring`, measured with a loop that is made longer until it takes a few milliseconds."""
    turns, elapsed = 2048, 0.0
    with TrialGuest() as guest:
        while elapsed < _LONG_ENOUGH and turns < _MOST_TURNS:
            turns *= 4
            guest.run(SPIN, ring, rcx=turns)
            elapsed = guest.marks[1] - guest.marks[0]
    rate = 2 * turns / elapsed
    kind = "native" if rate > NATIVE else "interpreted"
    return Outcome(rate > NATIVE, f"{kind}, {_si(rate)} instructions/s", numbers={"instructions_per_second": rate})


def _si(rate: float) -> str:
    return f"{rate / 1e9:.1f} G" if rate >= 1e9 else f"{rate / 1e6:.3g} M"


def exit_cost() -> Outcome:
    """Microseconds that a write to a port takes which C answers at once, from ring 3; the best of three runs."""
    count, runs = 100, []
    with TrialGuest() as guest:
        for _ in range(3):
            guest.run(PORTS, ring=3, rcx=count)
            runs.append(guest.marks[1] - guest.marks[0])
    each = min(runs) / count * 1e6
    return Outcome(each <= FAST_EXIT, f"{each:.1f} us a port exit", numbers={"microseconds": each})


def stats_fd() -> Outcome:
    """The VM's statistics see the pages that a guest touched, and the vCPU's the exit."""
    with TrialGuest() as guest:
        guest.run(TOUCH, ring=3, rcx=4, rdi=DATA.value, rsi=PAGE_SIZE)
        pages, exits = guest.vm.stats()["pages_4k"], guest.fd.stats()["exits"]
    return Outcome(pages >= 4 and exits >= 1, f"pages_4k={pages}, exits={exits} after 4 touched pages")


def large_mappings() -> Outcome:
    """KVM maps touched 2 MiB blocks of 2 MiB host pages as such: its statistics say so."""
    with TrialGuest(pages="2m") as guest:
        guest.run(TOUCH, ring=3, rcx=_BLOCKS, rdi=DATA.value, rsi=BLOCK_SIZE)
        mapped = guest.vm.stats()["pages_2m"]
        backed = large_bytes(guest.page_hva(0)) // BLOCK_SIZE
    if backed < _BLOCKS:
        return Outcome(False, f"the host gave {backed} large pages for {_BLOCKS} blocks", "free some memory, try again")
    return Outcome(mapped >= _BLOCKS, f"{mapped} of {_BLOCKS} blocks mapped by 2 MiB pages")


def pre_fault() -> Outcome:
    """KVM_PRE_FAULT_MEMORY maps pages that the guest has not touched."""
    with TrialGuest() as guest:
        guest.fd.pre_fault_memory(DATA, 8 * PAGE_SIZE)
        pages = guest.vm.stats()["pages_4k"]
    return Outcome(pages >= 8, f"{pages} pages mapped before the first touch")


def single_step(ring: int) -> Outcome:
    """Each of three instructions in `ring` ends in KVM_EXIT_DEBUG, at the next one."""
    with TrialGuest() as guest:
        guest.run(STEPS, ring, debug=lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
        steps = guest.steps[:3]
    return Outcome(steps == [1, 2, 3], "stops after each instruction" if steps == [1, 2, 3] else f"stops at {steps}")


def tsc_stable() -> Outcome:
    """KVM says that the guest's clock runs by a TSC that all cores agree on (KVM_GET_CLOCK)."""
    with TrialGuest() as guest:
        guest.run(TOUCH, ring=3, rcx=1, rdi=DATA.value)
        khz = guest.fd.tsc_khz()
        clock = ffi.new("struct kvm_clock_data *")
        guest.vm.ioctl("KVM_GET_CLOCK", clock)
        stable = bool(clock.flags & lib.KVM_CLOCK_TSC_STABLE)
    word = "stable" if stable else "not stable"
    return Outcome(stable, f"{word}, {khz / 1e6:.3f} GHz", numbers={"khz": khz})


def tsc_scaling() -> Outcome:
    """A vCPU set to half the host's rate counts at half the rate, by the guest's own RDTSC."""
    with TrialGuest() as guest:
        khz = guest.fd.tsc_khz() // 2
        guest.fd.ioctl_value("KVM_SET_TSC_KHZ", khz, khz=khz)
        guest.run(CLOCK, ring=3, rcx=1 << 22)
        regs = guest.fd.get_regs()
        ratio = (regs.rax - regs.rsi) / (guest.marks[1] - guest.marks[0]) / 1e3 / khz
    return Outcome(0.8 < ratio < 1.2, f"asked for 0.5 of the host's rate, the guest counts at {ratio / 2:.2f}")
