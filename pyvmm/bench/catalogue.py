# catalogue.py: the literal table of benchmarks. A new one is a row here, and a module beside it with measure(quick).
"""What each measures, of which numbers P1 to P19 and techniques T1 to T8, about how long that takes, which of its sides
are a limit of the host or what one would use instead, and results that it must have."""

from __future__ import annotations

from fnmatch import fnmatchcase

from pyvmm.record import Record

LIMIT, INSTEAD, OURS = "limit", "instead", "ours"
"""Kinds of sides: what no program can do better; what one would use or do without pyvmm's way of it; pyvmm's own."""


class Benchmark(Record):
    """text: what it measures; measures, techniques: their numbers; seconds: that it takes, about, in full and quick;
    limits, instead: patterns of sides' names; has: (group, side) that are there on a host that has everything, of a
    quick run too, as patterns."""

    __slots__ = ("has", "instead", "limits", "measures", "name", "seconds", "techniques", "text")

    def __init__(
        self,
        name: str,
        text: str,
        measures: tuple[str, ...],
        techniques: tuple[str, ...],
        seconds: tuple[float, float],
        has: tuple[tuple[str, str], ...],
        instead: tuple[str, ...] = (),
        limits: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.text = text
        self.measures = measures
        self.techniques = techniques
        self.seconds = seconds
        self.has = has
        self.instead = instead
        self.limits = limits

    @property
    def numbers(self) -> str:
        """Such as "P3, P4; T1, T7"."""
        return "; ".join(", ".join(numbers) for numbers in (self.measures, self.techniques) if numbers)

    def kind(self, side: str) -> str:
        """LIMIT, INSTEAD or OURS."""
        for kind, patterns in ((LIMIT, self.limits), (INSTEAD, self.instead)):
            if any(fnmatchcase(side, pattern) for pattern in patterns):
                return kind
        return OURS


BENCHMARKS = {
    row.name: row
    for row in (
        Benchmark(
            "start",
            "time to a guest's first byte: process, in-process, beside QEMU",
            ("P1",),
            (),
            (4, 2),
            (("", "pyvmm run hello"), ("", "in-process")),
            ("QEMU*",),
        ),
        Benchmark(
            "exits",
            "port writes a second: bare KVM_RUN loop, answered in C, by a Python device",
            ("P2",),
            (),
            (4, 1),
            (("", "bare"), ("", "C"), ("", "Python")),
            limits=("bare",),
        ),
        Benchmark(
            "traces",
            "write traces: the guest's speed, stalls at the installation, bytes reported",
            ("P16", "P6"),
            ("T7",),
            (200, 8),
            (
                ("sequential, as fast as it can: speed", "coarse, never refined"),
                ("zipf, 10 pages a ms: reported", "ring"),
                ("* of small pages: longest stall of a vCPU", "stop-all 4 KiB"),
                ("* of large pages: time to install", "helper-thread 4 KiB"),
            ),
            ("bitmap", "manual", "ring", "stop-all 4 KiB"),
            ("no trace",),
        ),
        Benchmark(
            "faults",
            "pages taken out of a guest and brought back, beside a bare userfaultfd loop",
            ("P7",),
            (),
            (10, 1),
            (
                ("large block: removed, touched by the guest", "move"),
                ("KVM's 2 MiB mappings afterwards / before", "copy"),
                ("small page, touched by the guest: the vCPU's stall", "bare loop"),
                ("small page, touched by a thread: its wait", "engine, move"),
            ),
            ("copy*", "engine, copy"),
            ("bare loop*",),
        ),
        Benchmark(
            "idle",
            "the memory engine while it does nothing; blocks split, merged and broken",
            (),
            (),
            (20, 1),
            (
                ("a guest writes to all its memory: writes a second", "idle engine"),
                ("memory of the page map, of the guest's", "process grown by"),
                ("a block, while the guest writes to all memory", "break"),
            ),
            limits=("no engine", "MADV_COLLAPSE alone*"),
        ),
        Benchmark(
            "restore",
            "a restored guest's first instruction, and how soon it touches its RAM",
            ("P8", "P9", "P7"),
            ("T3",),
            (500, 3),
            (
                ("VM.restore() to the guest's first work", "*M"),
                ("VM() alone", "*M"),
                ("dense writes, warm file", "pread() of as much"),
                ("1 page in 64, reads, warm file", "lazy, fill none"),
                ("* of random data, warm file: exec to the guest's first byte", "pyvmm restore --lazy"),
            ),
            ("mmap(MAP_PRIVATE)", "eager", "QEMU*"),
            ("pread() of as much",),
        ),
        Benchmark(
            "blocks",
            "lazy restore from storage blocks of each size and codec",
            (),
            ("T3",),
            (300, 3),
            (("dense, adaptive (*): warm file", "zstd 256K"), ("1 page in 64, by page (*): reads", "raw 16K")),
        ),
        Benchmark(
            "save",
            "a VM saved: speed with each codec, beside write(); the guest's stall",
            ("P10",),
            (),
            (85, 1),
            (
                ("random data", "write() and fsync()"),
                ("half zeros data: size of the file", "raw"),
                ("*: its longest stall in a save", "live"),
            ),
            ("QEMU*",),
            limits=("write() and fsync()",),
        ),
        Benchmark(
            "storage",
            "a snapshot file written and read with each codec, beside write() and read()",
            ("P8", "P10"),
            (),
            (10, 1),
            (("", "write plain"), ("", "write raw"), ("", "read zstd")),
            limits=("write plain", "read plain"),
        ),
        Benchmark(
            "streams",
            "pages from one process to another: page runs, beside send() and recv()",
            ("P3", "P4"),
            (),
            (40, 1),
            (("", "send() and recv(), TCP"), ("", "page runs read out of the source"), ("", "memcpy()")),
            limits=("send() and recv()*", "process_vm_readv()", "memcpy()"),
        ),
        Benchmark(
            "migrate",
            "a guest moves to another process: speed, downtime, its work, large pages",
            ("P3", "P4", "P5", "P6", "P7"),
            ("T1", "T7"),
            (400, 6),
            (
                ("* of random data: the round", "process_vm_readv()"),
                ("* of random data: the whole migration", "tcp, post-copy"),
                ("* of random data: downtime of the idle guest", "local"),
                ("* of random data: one over another", "tcp, the round / send() and recv()"),
                ("* written at 10 pages a ms, sequential: stood", "tcp"),
                ("* written at 10 pages a ms, sequential: gap", "tcp, post-copy"),
                ("* written as fast as it can: work while it migrates", "4 KiB log (bitmap)"),
                ("*, 1 % zeros: large pages afterwards / before", "tcp"),
            ),
            ("QEMU*", "4 KiB log (bitmap)*", "tcp, traced by 4 KiB"),
            ("send() and recv()*", "process_vm_readv()"),
        ),
        Benchmark(
            "populate",
            "a guest's first pass over memory that was populated before, or not",
            ("P17",),
            ("T4",),
            (10, 1),
            (
                ("* of large pages: the first pass", "populated"),
                ("* of small pages: time of populating", "MADV_POPULATE_WRITE"),
            ),
            ("not populated",),
        ),
        Benchmark(
            "swap",
            "pages to the swap file and back, beside pwrite() and preadv() of the same bytes",
            ("P11",),
            (),
            (30, 3),
            (
                ("out: random data", "swap, unchanged"),
                ("out to the disk: text", "swap"),
                ("in: text", "preadv"),
                ("touched, from the disk: random data", "swap"),
                ("bytes of pages / bytes stored: text", "swap"),
            ),
            ("Linux*",),
            ("pwrite*", "preadv*", "memcpy*"),
        ),
        Benchmark(
            "reclaim",
            "a guest in a half of its memory: speed and refaults, by policy",
            (),
            ("T8",),
            (160, 3),
            (("speed", "no limit"), ("back from swap", "random"), ("large at the end", "activity")),
            ("random", "clock"),
            ("no limit",),
        ),
        Benchmark(
            "activity",
            "active blocks found by sampling: precision, recall, what it costs the guest",
            ("P13", "P7"),
            ("T8",),
            (60, 7),
            (
                ("the guest's work, of that while nobody watches", "sampled"),
                ("large pages kept", "broken to small pages"),
            ),
            ("broken to small pages", "KVM's dirty log"),
        ),
        Benchmark(
            "sharing",
            "equal pages: estimated and freed, and how many large pages that costs",
            ("P12",),
            ("T5",),
            (80, 11),
            (
                ("MiB freed a large page broken", "by count"),
                ("estimated / actual", "all blocks of two VMs"),
                ("estimated / actual", "a guest that runs on"),
            ),
            ("at random", "KSM on everything"),
        ),
        Benchmark(
            "overcommit",
            "three unlike guests in half of their memory: refaults, slowdown, by policy",
            ("P14",),
            ("T2",),
            (75, 8),
            (
                ("refaults for 1,000 touches, all guests", "class-based"),
                ("slowdown, worst", "class-based"),
                ("in balloons", "balloon-only"),
            ),
            ("balloon-only", "swap-only", "proportional"),
        ),
        Benchmark(
            "doublepaging",
            "a guest swaps what the host has swapped: bytes and reads, by mode of its disk",
            ("P15",),
            ("T6",),
            (20, 3),
            (
                ("sequences: read per page written", "naive"),
                ("sequences: reads to bring 64 back", "references"),
                ("the guest swapper: reads for 64 blocks", "replace"),
            ),
            ("naive",),
        ),
        Benchmark(
            "scale",
            "100 tiny guests at once; what each GiB of a guest's RAM costs",
            ("P18",),
            (),
            (60, 5),
            (
                ("guests started a second", "VMM processes"),
                ("a VMM process, of many", "anonymous"),
                ("a VM of one process", "all"),
                ("by RAM: limit, the first", "*"),
                ("* of RAM", "VM()"),
                ("a GiB of RAM more", "snapshot, untouched: its file"),
            ),
        ),
        Benchmark(
            "soak",
            "random operations on memory that its guest checks: what is wrong, and how fast",
            ("P19",),
            (),
            (200, 5),
            (
                ("in all", "wrong"),
                ("operations a second", "all, with full checks"),
                ("operations a second, of the time of that kind", "remove block"),
            ),
        ),
    )
}
