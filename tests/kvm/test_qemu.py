# test_qemu.py: the guests are ordinary PVH images: the same files boot in QEMU, with the same parameters.
from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from pyvmm.machine.loader import guest_path
from pyvmm.pytest_plugin import needs

QEMU = shutil.which("qemu-system-x86_64")
COMMON = "-accel kvm -m 64 -display none -serial stdio -no-reboot -device isa-debug-exit,iobase=0xf4,iosize=4"
MACHINES = {"microvm": "-M microvm,rtc=off -nodefaults", "q35": "-M q35"}

# guest, its command line, machine, vCPUs, its status, a line that it prints
GUESTS = [
    ("hello", "text=hi status=3", "microvm", 1, 3, "hi"),
    ("hello", "", "q35", 1, 0, "hello from a guest"),
    ("hello", "no=such", "microvm", 1, 2, "unknown option no=such"),
    ("smp", "", "microvm", 2, 0, "SUCCESS: 2 CPUs"),
    ("timer", "", "microvm", 1, 0, "SUCCESS: 100 ticks"),
    ("faults", "kind=pf", "microvm", 1, 0, "#PF"),
    ("touch", "touches=10000", "microvm", 2, 0, "SUCCESS"),
    ("verify", "passes=2", "microvm", 2, 0, "SUCCESS"),
    ("hotcold", "phases=2 touches=10000", "microvm", 2, 0, "SUCCESS"),
    ("dup", "passes=2", "microvm", 2, 0, "SUCCESS"),
]


# Where microvm has its virtio devices, and what the guest `virtio` is to do with which of QEMU's.
PLACES = "at=0xfeb00000 step=512 places=24 wait=poll"
DRIVEN = [
    (f"device={device} {features}", options)
    for device, options in (
        ("rng", "-device virtio-rng-device"),
        ("block", "-device virtio-blk-device,drive=disk -drive id=disk,if=none,format=raw,discard=unmap,file="),
    )
    for features in ("", "indirect=1 event=1")
]


def boot(guest, append, options):
    """Runs a guest in QEMU: status of the process, what the guest printed."""
    if QEMU is None:
        assert "PYVMM_REQUIRE_QEMU" not in os.environ, "run: sudo apt-get install -y qemu-system-x86"
        pytest.skip("no QEMU: run 'sudo apt-get install -y qemu-system-x86'")
    command = [QEMU, *options.split(), *COMMON.split(), "-kernel", guest_path(guest), "-append", append]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=40, check=False)
    return done.returncode, done.stdout.decode("utf-8", "replace") + done.stderr.decode()


@needs("kvm")
@pytest.mark.parametrize(("guest", "append", "machine", "cpus", "status", "line"), GUESTS)
def test_the_same_file_boots_in_qemu(guest, append, machine, cpus, status, line):
    returned, output = boot(guest, append, f"{MACHINES[machine]} -smp {cpus}")
    assert line in output
    assert returned == 2 * status + 1, output


@needs("kvm")
@pytest.mark.parametrize(("append", "options"), DRIVEN, ids=[append for append, _ in DRIVEN])
def test_the_virtio_guest_drives_another_ones_devices(append, options, tmp_path):
    """What the guest takes for the specification is not just what our devices do."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    options = options + str(disk) if options.endswith("file=") else options
    modern = "-global virtio-mmio.force-legacy=false"
    returned, output = boot("virtio", f"{PLACES} {append}", f"{MACHINES['microvm']} {modern} {options}")
    assert returned == 1, output
    assert "SUCCESS" in output
