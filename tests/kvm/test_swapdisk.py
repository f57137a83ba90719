# test_swapdisk.py: a guest that pages by itself to a disk whose blocks refer to the host's swap file, in all modes. It
# checks what comes back, its model the rest.
from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
from engine_help import until

from pyvmm import VM
from pyvmm.errors import BadInput, HostError
from pyvmm.layout import MIB, PAGE_SIZE
from pyvmm.memory.swap import Swap
from pyvmm.pytest_plugin import needs
from pyvmm.testing.swapper_model import Swapper

pytestmark = needs("kvm", "uffd_guest")

MODES = ("naive", "references", "replace")
FRAMES, PAGES, OUT = 512, 1024, 16
GUEST = f"frames={FRAMES} pages={PAGES} out={OUT}"
DISK = 8 * MIB
KILLS = int(os.environ.get("PYVMM_KILLS", "4"))
"""Moments at which a VMM is killed. More: PYVMM_KILLS=50 pytest ..."""


def swapper(vm, mode, what=DISK, append="", more="", **options):
    """The guest, at work."""
    machine = vm(memory="8M", devices=[f"swapdisk:{what},mode={mode}{more}"], **options)
    machine.load("swapper", f"{GUEST} {append}")
    machine.start()
    gets_on(machine)
    return machine


def gets_on(machine, more=400):
    goal = machine.progress().count + more
    until(lambda: machine.progress().count >= goal or machine.ended)
    assert not machine.ended, machine.printed


def all_out(machine, swap):
    """All that is not in use goes to the swap file, in no order."""
    pages = list(range(machine.memory.size // PAGE_SIZE))
    random.Random(1).shuffle(pages)
    swap.out((page, 1) for page in pages)
    swap.drain()


def refers(machine, least=20):
    """Has blocks of its disk refer to a new swap, which is returned with the guest paused. Its memory has small pages:
    of a block that has all gone, a touch would bring all, and little of what the guest writes out would be away."""
    assert machine.memory.backing == "4k"
    until(lambda: machine.progress().count >= FRAMES, "a guest that writes out what it touches")
    machine.pause()
    swap = Swap(machine.memory, None, 32 * MIB)
    end = time.monotonic() + 20
    while swap.stats().references < least:
        assert time.monotonic() < end, swap.stats().as_dict()
        all_out(machine, swap)
        machine.resume()
        gets_on(machine, 100)
        machine.pause()
    return swap


def model(**options):
    return Swapper(DISK // PAGE_SIZE, FRAMES, PAGES, OUT, **options)


def judge(machine, **options):
    machine.pause()
    assert model(**options).check(machine.memory, machine.progress()) == []
    machine.resume()


@pytest.mark.parametrize("compress", [None, "lz4"])
@pytest.mark.parametrize("mode", MODES)
def test_a_guest_pages_what_the_host_has_paged(vm, mode, compress):
    machine = swapper(vm, mode, append="order=seq")
    disk = machine.virtio[0].model.backend
    swap = Swap(machine.memory, None, 32 * MIB, compress)
    for _ in range(3):
        machine.pause()
        all_out(machine, swap)
        machine.resume()
        gets_on(machine, 300)
    judge(machine, order="seq")
    counts = disk.figures()
    if mode == "naive":
        assert counts["brought"] > 0
        assert (counts["referred"], swap.stats().references) == (0, 0)
    else:
        assert counts["referred"] > 0
        assert (counts["brought"], counts["refused"]) == (0, 0)
    if mode == "replace":
        until(lambda: disk.figures()["replaced"] > 0)
    machine.pause()
    swap.close()  # whatever blocks refer to is theirs now
    assert (swap.stats().references, swap.stats().held) == (0, 0)
    assert disk.figures()["replace_failed"] == 0
    machine.resume()
    gets_on(machine)
    judge(machine, order="seq")


def test_a_limit_and_all_of_it_by_the_command(tmp_path):
    """With a policy of the host's that knows nothing of the guest's."""
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "run", "swapper", "--mem", "16M", "--limit", "8M", "--swap", "64M", "--policy",
         "random", "--swap-disk", "32M,mode=replace", "--append", "frames=3000 pages=3500 out=32 touches=2000",
         "--stats"],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SUCCESS: 5500 touches" in done.stdout
    assert "referred" in done.stderr


# ---- elsewhere ----


def test_a_saved_vm_has_no_reference_left(vm, tmp_path):
    image = tmp_path / "swap.img"
    image.write_bytes(bytes(DISK))
    machine = swapper(vm, "references", image, "order=seq", pages="4k")
    swap = refers(machine)
    machine.snapshot(str(tmp_path / "s"))
    assert swap.stats().references == 0
    raw, progress = image.read_bytes(), machine.progress()
    guest = model(order="seq")
    while guest.touches < progress.count - 1:
        guest.touch()
    before = {number: page for number, page in enumerate(guest._blocks) if page is not None}
    guest.touch()
    guest.touch()
    changed = [number for number, page in enumerate(guest._blocks) if page is not before.get(number)]
    assert guest.check_disk(lambda block: raw[block * PAGE_SIZE : (block + 1) * PAGE_SIZE], changed) == []
    machine.close()
    with VM.restore(str(tmp_path / "s"), devices=[f"swapdisk:{image}"]) as other:
        other.start()
        gets_on(other)
        judge(other, order="seq")


def test_a_disk_without_a_file_stays_here(vm, tmp_path):
    machine = swapper(vm, "replace")
    why = r"\Aa swap disk without a file is gone with this process: give --swap-disk a FILE, not a SIZE\Z"
    with pytest.raises(BadInput, match=why):
        machine.snapshot(str(tmp_path / "s"))
    with pytest.raises(BadInput, match=why):
        machine.migrate("tcp:127.0.0.1:9")
    gets_on(machine)
    assert list(tmp_path.iterdir()) == []


def test_a_guest_moves_with_its_disk(vm, tmp_path):
    image = tmp_path / "swap.img"
    image.write_bytes(bytes(DISK))
    machine = swapper(vm, "references", image, "order=seq", pages="4k")
    swap = refers(machine)
    machine.resume()
    incoming = VM.receive(f"unix:{tmp_path}/s", devices=[f"swapdisk:{image}"])
    machine.migrate(f"unix:{tmp_path}/s").result(20)
    assert swap.stats().references == 0
    with incoming.vm(20) as other:
        gets_on(other)
        judge(other, order="seq")


def test_a_full_disk_keeps_its_references(vm, monkeypatch):
    """The swap is to be closed, and what refers to it cannot be copied: it stays, and the guest is right."""
    machine = swapper(vm, "references", append="order=seq", pages="4k")
    disk = machine.virtio[0].model.backend
    swap = refers(machine)

    def full(data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk._local, "put", full)
        with pytest.raises(HostError, match="cannot be copied: No space left on device"):
            swap.close()
    assert swap.stats().references >= 20
    swap.close()
    assert swap.stats().references == 0
    machine.resume()
    gets_on(machine)
    judge(machine, order="seq")


# ---- killed ----

_VMM = """
import sys, random, threading
from pyvmm import VM
from pyvmm.memory.swap import Swap
vm = VM(memory="8M", pages="4k", devices=[f"swapdisk:{sys.argv[1]},mode=references,durable"],
        output=lambda data: (sys.stdout.buffer.write(data), sys.stdout.buffer.flush()))
vm.load("swapper", sys.argv[2])
swap = Swap(vm.memory, None, 32 << 20)
pages = list(range(512, 2048))
random.Random(1).shuffle(pages)
vm.start()
while not vm.ended:
    swap.out((page, 1) for page in pages)
    swap.drain()
    if swap.stats().ref_reads:
        sys.stderr.write("referred\\n")
        sys.stderr.flush()
"""


def test_what_was_flushed_is_there_after_a_kill(tmp_path):
    """The guest says the number of each write-out when its flush was answered; the VMM is killed at random moments."""
    image, rng = tmp_path / "swap.img", random.Random(1)
    append, referred = f"{GUEST} flush=1 order=seq read=0", 0
    outs = list(islice(model(order="seq", read=0).write_outs(), 4000))
    right = model()
    for moment in range(KILLS):
        image.write_bytes(bytes(DISK))
        process = subprocess.Popen(
            [sys.executable, "-c", _VMM, str(image), append], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        with process, process.stdout, process.stderr:
            process.stdout.readline()
            if moment == 0:  # else a busy host might have all of them killed before that
                referred += process.stderr.readline() == b"referred\n"
            time.sleep(rng.random() / 10)
            process.send_signal(signal.SIGKILL)
            last = int((b"1\n" + process.stdout.read()).rpartition(b"\n")[0].split()[-1])
            referred += b"referred" in process.stderr.read()
        assert process.returncode == -signal.SIGKILL
        raw = image.read_bytes()
        must, may = {}, {}
        for n, written in enumerate(outs[: last + 64]):  # what was not said yet may be there
            for block, *content in written:
                if n < last:
                    must[block] = content
                else:
                    may.setdefault(block, []).append(content)
        for block, content in must.items():
            found = raw[block * PAGE_SIZE : (block + 1) * PAGE_SIZE]
            allowed = [content, *may.get(block, ())]
            assert any(found == right.content(*each) for each in allowed), (moment, block, content, last)
    assert referred  # blocks that were references before their flush
