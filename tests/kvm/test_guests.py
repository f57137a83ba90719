# test_guests.py: every guest that pyvmm brings, as rows of a table; each guest checks itself and says so.
from __future__ import annotations

import pytest

from pyvmm.devices.serial import LSR, Serial
from pyvmm.errors import GuestCrash
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")

# guest, memory, vCPUs, command line, seconds, status, what it prints
GUESTS = [
    ("hello", "64M", 1, "", 10, 0, "hello from a guest\n"),
    ("hello", "2M", 1, "text=small", 10, 0, "small\n"),
    ("hello", "64G", 1, "text=large", 10, 0, "large\n"),
    ("hello", "3G", 1, "", 10, 0, "hello"),
    ("hello", "5G", 4, "status=77", 10, 77, "hello"),
    ("hello", "64M", 1, "status=255", 10, 255, "hello"),
    ("hello", "64M", 1, "colour=red", 10, 2, "hello: unknown option colour=red"),
    ("hello", "64M", 1, "status=many", 10, 2, "hello: "),
    ("smp", "64M", 1, "count=1M", 20, 0, "SUCCESS: 1 CPU, 1048576 adds\n"),
    ("smp", "64M", 2, "count=1M", 20, 0, "SUCCESS: 2 CPUs, 2097152 adds\n"),
    ("smp", "2M", 4, "count=300000", 30, 0, "SUCCESS: 4 CPUs, 1200000 adds\n"),
    ("smp", "64M", 64, "count=2000", 50, 0, "SUCCESS: 64 CPUs, 128000 adds\n"),
    ("timer", "64M", 1, "ticks=50", 20, 0, "SUCCESS: 50 ticks"),
    ("timer", "2M", 1, "ticks=20 mode=oneshot", 20, 0, "SUCCESS: 20 ticks"),
    ("timer", "64M", 2, "ticks=20 mode=deadline wait=spin", 20, 0, "SUCCESS: 20 ticks"),
    ("dice", "64M", 1, "", 10, 0, "SUCCESS: 1000 throws: "),
    ("dice", "2M", 2, "count=300000 check=1", 10, 0, "SUCCESS: 300000 throws: "),
    ("verify", "16M", 1, "passes=3", 20, 0, "SUCCESS: 10752 pages checked"),
    ("verify", "64M", 4, "passes=3 order=random write=50 zeros=100", 30, 0, "SUCCESS: 47616 pages checked"),
    ("verify", "64G", 2, "passes=2 size=32M seed=7", 20, 0, "SUCCESS: 16384 pages checked"),
    ("verify", "2M", 1, "passes=1", 10, 2, "verify: too little memory"),
    ("verify", "16M", 1, "write=101", 10, 2, "verify: too large: write"),
    ("hotcold", "6M", 1, "phases=2 touches=1000", 10, 0, "SUCCESS: 2000 touches, "),
    ("hotcold", "32M", 3, "phases=3 touches=5000 pages=7 shift=30 stray=20 seed=5", 20, 0, " in 3 phases\n"),
    ("hotcold", "16M", 2, "phases=2 ms=20 read=100", 20, 0, " touches, 0 writes in 2 phases\n"),
    ("hotcold", "64G", 1, "size=64M phases=2 touches=2000 hot=0", 20, 0, "hotcold: 31 blocks, 1 hot\n"),
    ("hotcold", "4M", 1, "", 10, 2, "hotcold: too little memory: 6 MiB are needed"),
    ("hotcold", "16M", 4, "pages=3", 10, 2, "hotcold: pages= is less than there are CPUs: 3"),
    ("dup", "16M", 1, "passes=3", 20, 0, "SUCCESS: 10752 pages checked, 3584 written\n"),
    ("dup", "64M", 4, "passes=3 order=random write=50 zeros=300", 30, 0, "SUCCESS: 47616 pages checked"),
    ("dup", "64G", 2, "passes=2 size=32M common=1000 dups=0 zeros=0", 20, 0, "SUCCESS: 16384 pages checked"),
    ("dup", "16M", 1, "dups=900 zeros=101 common=0", 10, 2, "dup: dups=, common= and zeros= are more than 1000"),
    ("touch", "4G", 1, "start=3070M size=4M passes=1", 20, 0, "SUCCESS: 1024 writes"),  # on either side of the hole
    ("touch", "5G", 2, "start=3G size=64M passes=1", 20, 0, "SUCCESS: 16384 writes"),  # all above 4 GiB
    ("touch", "64G", 1, "start=63G size=8M passes=2 stride=64K", 20, 0, "SUCCESS: 256 writes"),
    ("touch", "64M", 2, "pattern=zipf touches=10000", 20, 0, "SUCCESS: 10000 writes"),
    ("touch", "64M", 1, "pattern=hotset read=1 touches=10000", 20, 0, "SUCCESS: 10000 reads"),
]

# kind -> the exception's name; `br` and `ts` are raised by `int N`, see REFUSABLE
FAULTS = {
    "de": "#DE", "db": "#DB", "bp": "#BP", "of": "#OF", "br": "#BR", "ud": "#UD", "nm": "#NM", "df": "#DF", "ts": "#TS",
    "np": "#NP", "ss": "#SS", "gp": "#GP", "pf": "#PF", "mf": "#MF", "ac": "#AC", "xm": "#XM",
}  # fmt: skip
REFUSABLE = ("br", "ts")
"""Hosts may make #UD of `int 5` and `int 10` in ring 3."""


def run(vm, guest, append="", seconds=10, **options):
    machine = vm(**options)
    machine.load(guest, append)
    return machine, machine.run(timeout=seconds)


@pytest.mark.parametrize(("guest", "memory", "cpus", "append", "seconds", "status", "printed"), GUESTS)
def test_guest(vm, guest, memory, cpus, append, seconds, status, printed):
    machine, result = run(vm, guest, append, seconds, memory=memory, cpus=cpus)
    assert printed in machine.printed
    assert (result.reason, result.status) == ("exit", status)
    progress = machine.progress()
    assert (progress.guest, progress.status) == (guest, "failed" if status else "done")


@pytest.mark.parametrize("pages", ["auto", "4k", pytest.param("2m", marks=needs("thp"))])
@pytest.mark.parametrize(("guest", "append"), [("hello", ""), ("smp", "count=1000"), ("verify", "passes=2")])
def test_page_sizes(vm, guest, append, pages):
    _, result = run(vm, guest, append, 20, memory="16M", cpus=2, pages=pages)
    assert result.ok


@needs("hugetlb", optional=True)
def test_reserved_huge_pages(vm):
    _, result = run(vm, "hello", memory="4M", hugetlb=True)
    assert result.ok


@pytest.mark.parametrize("kind", FAULTS)
def test_exception_caught(vm, kind):
    machine, result = run(vm, "faults", f"kind={kind}")
    if kind in REFUSABLE and result.status:
        assert "FAIL: the vector is 0x6, not" in machine.printed
        assert "this host does not let ring 3 raise that one by `int`" in machine.printed
        assert result.status == 1
        return
    assert f"SUCCESS: caught {FAULTS[kind]}" in machine.printed
    assert result.ok


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *((kind, [name]) for kind, name in FAULTS.items() if kind != "df"),
        ("df", ["#DE", "fault_in_fault"]),  # without an IDT the first fault cannot be delivered either
        ("triple", ["#UD", "undefined_instruction"]),
    ],
)
def test_exception_not_caught(vm, kind, words):
    """Without an IDT each becomes a triple fault, which is explained by what is left of the first one."""
    with pytest.raises(GuestCrash, match=r"\ATriple fault at .* because the IDT is empty .*\.\Z") as caught:
        run(vm, "faults", f"kind={kind} catch=0")
    for word in words:
        assert word in str(caught.value)


def test_a_crash_is_reported_with_calls_and_registers(vm):
    with pytest.raises(GuestCrash) as caught:
        run(vm, "faults", "kind=pf catch=0")
    for word in ("0x600d00000000", "write_to_unmapped_page", "walk_list", "guest_main", "rip", "cr2"):
        assert word in caught.value.report


@pytest.mark.parametrize("kind", ["hang", "hlt-off"])
def test_a_guest_that_does_not_end_is_timed_out(vm, kind):
    machine, result = run(vm, "faults", f"kind={kind}", 0.2)
    assert (result.reason, result.status) == ("timeout", 124)
    assert machine.paused
    machine.stop(3)
    assert machine.wait().status == 3


def test_echo(vm):
    machine = vm()
    machine.load("echo", "until=enough")
    machine.type("early ")  # before it has started
    machine.start()
    assert machine.expect("early ")
    machine.type("line\rnext")
    assert machine.expect("line\r\nnext")
    machine.type("\renough\r")
    assert machine.wait(10).ok
    assert machine.printed == "early line\r\nnext\r\nenough\r\n"
    assert machine.progress().passes == 3


def test_echo_loses_no_byte_that_comes_while_it_begins(vm, monkeypatch):
    """Just after its first look at the receiver: nothing is there, and then there is."""
    read, looks = Serial._read, []

    def late(serial, offset):
        value = read(serial, offset)
        if offset == LSR and not looks:
            looks.append(value)
            serial._queue += b"x"
            serial._update()
        return value

    monkeypatch.setattr(Serial, "_read", late)
    machine = vm()
    machine.load("echo")
    machine.start()
    assert machine.expect("x")
    assert looks


def test_echo_of_many_bytes(vm):
    """More than a FIFO, fed while the guest reads: none lost, none doubled, in order."""
    text = "".join(f"{number:04}," for number in range(400))
    machine = vm()
    machine.load("echo")
    machine.start()
    for at in range(0, len(text), 97):
        machine.type(text[at : at + 97])
    assert machine.expect(text[-20:])
    machine.type("\x04")
    assert machine.wait(10).ok
    assert machine.printed == text
