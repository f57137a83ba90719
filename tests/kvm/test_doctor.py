# test_doctor.py: the probes against what else is known of this host, and that they leave nothing behind.
from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from pyvmm import host
from pyvmm._native import lib
from pyvmm.cli import main
from pyvmm.errors import HostError
from pyvmm.host import Feature, code, settings, trials_dirty, trials_kvm, trials_memory, trials_uffd
from pyvmm.host.guest import DATA, TrialGuest
from pyvmm.host.probe import PROBES
from pyvmm.host.prober import Prober
from pyvmm.host.scratch import PAGEMAP_PRESENT, advise, large_bytes, page_flags, pointer, scratch
from pyvmm.host.uffd import Uffd
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE

pytestmark = pytest.mark.skipif(not host.has(Feature.KVM), reason="needs kvm")

READ_CR0 = bytes.fromhex("0f 20 c0")  # mov rax, cr0: forbidden in ring 3
FOREVER = bytes.fromhex("eb fe")  # jmp $


def needs(*features):
    missing = [feature for feature in features if not host.has(feature)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def leftovers():
    """Descriptors, threads of Python's and of the kernel's, and mappings (bytes) of this process."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task")), pages


def left_after(before):
    """leftovers(), once they are as before but for mappings, or have not become so in a while.

    A thread that was joined stays in /proc a little longer: the kernel wakes who waits for it before it has gone.
    """
    end = time.monotonic() + 2
    while (after := leftovers())[:3] != before[:3] and time.monotonic() < end:
        time.sleep(0.001)
    return after


def test_all_probes_leave_nothing_behind_and_are_quick():
    Prober(PROBES).findings()  # Python's own first-time allocations
    before = leftovers()
    start = time.perf_counter()
    findings = Prober(PROBES).findings()
    assert time.perf_counter() - start < 1.5
    after = left_after(before)
    assert after[:3] == before[:3]
    assert (after[3] - before[3]) * PAGE_SIZE < BLOCK_SIZE  # less than any mapping of a probe's
    assert len(findings) == len(Feature)


def test_probes_agree_with_themselves():
    first, second = ([finding.ok for finding in Prober(PROBES).findings()] for _ in range(2))
    assert first == second


def test_no_setting_of_the_system_is_changed():
    changing = {"memory_available_bytes", "hugetlb_2m_free"}
    before = settings.facts()
    Prober(PROBES).findings()
    after = settings.facts()
    assert {name: after[name] for name in after.keys() - changing} == {
        name: before[name] for name in before.keys() - changing
    }


def test_a_stuck_guest_is_stopped():
    before = leftovers()
    start = time.perf_counter()
    for ring in (0, 3):
        with TrialGuest() as guest:
            guest.start(FOREVER, ring)
            with pytest.raises(HostError, match="did not end within"):
                guest.wait(0.05)
    assert time.perf_counter() - start < 2
    assert left_after(before)[:3] == before[:3]


def test_the_trial_guest_is_in_the_ring_that_was_asked_for():
    with TrialGuest() as guest:
        guest.run(READ_CR0 + code.STEPS, ring=0)
        assert guest.fd.get_sregs().cs.dpl == 0
        with pytest.raises(HostError, match="SHUTDOWN"):
            guest.run(READ_CR0 + code.STEPS, ring=3)


def test_the_port_loop_makes_as_many_exits_as_it_says():
    with TrialGuest() as guest:
        guest.run(code.PORTS, ring=3, rcx=37)
        assert guest.ports.writes[0x80] == 37


@needs("large_mappings")
def test_large_mappings_against_smaps_and_statistics():
    with TrialGuest(pages="2m") as large, TrialGuest(pages="4k") as small:
        for guest in (large, small):
            guest.run(code.TOUCH, ring=3, rcx=3, rdi=DATA.value, rsi=BLOCK_SIZE)
        assert large.vm.stats()["pages_2m"] == 3
        assert large_bytes(large.page_hva(0)) >= 3 * BLOCK_SIZE
        assert small.vm.stats()["pages_2m"] == 0


def test_no_large_pages_are_no_large_mappings(monkeypatch):
    class Small(TrialGuest):
        def __init__(self, pages):
            super().__init__(pages="4k")

    monkeypatch.setattr(trials_kvm, "TrialGuest", Small)
    assert not trials_kvm.large_mappings().ok


@needs("dirty_bitmap")
def test_dirty_bitmap_against_the_memory_itself():
    with TrialGuest(flags=lib.KVM_MEM_LOG_DIRTY_PAGES) as guest:
        guest.run(code.TOUCH, ring=3, rax=0x5A, rcx=5, rdi=(DATA + 10 * PAGE_SIZE).value, rsi=3 * PAGE_SIZE)
        written = {page for page in range(trials_dirty._PAGES) if lib.pv_peek(pointer(guest.page_hva(page))) == 0x5A}
        assert written == {10, 13, 16, 19, 22}
        assert trials_dirty._logged(guest) == written


@pytest.mark.parametrize("trial", [trials_dirty.bitmap, trials_dirty.manual_protect])
def test_a_log_that_shows_nothing_is_not_ok(monkeypatch, trial):
    monkeypatch.setattr(trials_dirty, "_logged", lambda guest: set())
    outcome = trial()
    assert not outcome.ok
    assert "{5}" in outcome.value


@needs("thp")
def test_thp_against_the_setting():
    with open(f"{settings.THP}/enabled") as file:
        assert "[never]" not in file.read()
    with scratch(backing="PV_BACKING_SMALL") as address:
        advise(address, "MADV_POPULATE_WRITE")
        assert large_bytes(address) == 0


def test_collapse_of_forbidden_pages_is_seen(monkeypatch):
    monkeypatch.setattr(trials_memory, "advise", lambda address, advice: advise(address, "MADV_POPULATE_WRITE"))
    assert not trials_memory.collapse().ok


@needs("uffd_move")
def test_move_against_the_pagemap():
    with scratch() as source, scratch() as address, Uffd("UFFD_FEATURE_MOVE") as fd:
        lib.pv_poke(pointer(source), 7)
        fd.register(address, "MISSING")
        fd.move(address, source)
        assert page_flags(address) & PAGEMAP_PRESENT
        assert not page_flags(source) & PAGEMAP_PRESENT
        assert lib.pv_peek(pointer(address)) == 7


@needs("uffd_missing")
def test_a_fault_that_nobody_answers_ends():
    before = leftovers()
    with scratch() as address, Uffd() as fd:
        fd.register(address, "MISSING")
        with pytest.raises(HostError, match="did not go on"), fd.touching(lambda: lib.pv_peek(pointer(address))):
            pass
    assert left_after(before)[:3] == before[:3]


@needs("uffd_guest")
def test_a_guest_whose_fault_nobody_answers_ends(monkeypatch):
    before = leftovers()
    monkeypatch.setattr(Uffd, "copy", lambda *args: None)
    with pytest.raises(HostError, match="did not end within"):
        trials_uffd.guest()
    assert left_after(before)[:3] == before[:3]


def test_a_userfaultfd_for_user_mode_only_is_not_enough(monkeypatch):
    monkeypatch.setattr(trials_uffd.uffd, "ways", lambda: ["user mode only"])
    outcome = trials_uffd.opens()
    assert not outcome.ok
    assert "unprivileged_userfaultfd" in outcome.remedy


@needs("tsc_stable")
def test_the_tsc_runs_at_the_rate_that_kvm_says():
    with TrialGuest() as guest:
        guest.run(code.CLOCK, ring=3, rcx=1 << 22)
        regs = guest.fd.get_regs()
        ticks = (regs.rax - regs.rsi) / (guest.marks[1] - guest.marks[0])
        assert ticks / 1e3 == pytest.approx(guest.fd.tsc_khz(), rel=0.2)


def test_the_command_as_a_user_runs_it():
    call = "import sys; from pyvmm.cli import main; sys.exit(main(['doctor', *{}]))"
    text = subprocess.run([sys.executable, "-c", call.format([])], capture_output=True, text=True, check=True)
    assert "Guests can run." in text.stdout
    assert max(map(len, text.stdout.splitlines())) <= 80
    environment = os.environ | {"PYVMM_WITHOUT": "uffd"}
    data = subprocess.run(
        [sys.executable, "-c", call.format(["--json"])], capture_output=True, text=True, check=True, env=environment
    )
    report = json.loads(data.stdout)
    assert report["ok"]
    assert report["findings"]["uffd"]["value"] == "switched off"
    assert report["findings"]["uffd_move"]["needs"] == "uffd"
    assert text.stderr == data.stderr == ""


def test_without_kvm_the_exit_status_is_1(capsys):
    with host.without("kvm"):
        assert main(["doctor", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]
