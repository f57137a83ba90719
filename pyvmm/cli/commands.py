# commands.py: the literal table of commands and their options. A new command is a row here and a module beside it.
"""What can be typed. `pyvmm.cli.parse` makes arguments of it."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.cli.parse import Arguments


class Option:
    """One option or, without dashes in its name, one positional argument.

    kind: str, int, float, or bool for a flag; default: where it is not given (a flag: False); choices: allowed values;
    repeated: it can be given again and again, a positional one on end, and all that is given is a list.
    """

    def __init__(
        self,
        name: str,
        help: str,
        kind: type = str,
        default: object = None,
        metavar: str | None = None,
        choices: tuple[str, ...] | None = None,
        optional: bool = False,
        repeated: bool = False,
    ) -> None:
        self.name = name
        self.help = help
        self.kind = kind
        self.default = False if kind is bool else [] if repeated else default
        self.metavar = metavar
        self.choices = choices
        self.optional = optional
        self.repeated = repeated
        self.positional = not name.startswith("-")
        self.field = name.lstrip("-").replace("-", "_")
        if self.field == "with":  # a word of Python's
            self.field = "with_"


class Command:
    """`module`: the module in pyvmm.cli whose run(arguments) returns the exit status; imported when it is called."""

    def __init__(self, name: str, help: str, module: str, *options: Option) -> None:
        self.name = name
        self.help = help
        self.module = module
        self.options = options

    def __call__(self, arguments: Arguments) -> int:
        function: Callable[[Arguments], int] = import_module(f"pyvmm.cli.{self.module}").run
        return function(arguments)


_IMAGE = Option("guest", "one of `pyvmm guests`, or an image file", metavar="GUEST|FILE")
_CPUS = Option("--cpus", "vCPUs, 1 to 64 (default 1)", int, 1, "N")
_PAGES = Option("--pages", "large or small pages behind the RAM", default="auto", choices=("auto", "2m", "4k"))

_CODECS = ("raw", "lz4", "zstd")
_TIMEOUT = Option("--timeout", "end the guest then, with status 124", float, metavar="SECONDS")

_STATS = Option("--stats", "print exits, mappings and rates at the end", bool)
_LIVE = Option("--live", "show the guest's progress while it runs", bool)
_CONTROL = Option("--control", "listen there, for `pyvmm status`, `pyvmm migrate` and others", metavar="PATH")
_SOCKET = Option("path", "where a guest was started with --control", metavar="PATH")

# A VM that lives in less memory than it has (pyvmm.cli.reclaim).
_LESS = (
    Option(
        "--limit",
        "let the guest's RAM take so much memory of the host, such as 128M; the rest is swapped",
        metavar="SIZE",
    ),
    Option(
        "--swap",
        "where to: a folder, a file that is made, or a size (default: as much as RAM, in /var/tmp)",
        metavar="FILE|SIZE",
    ),
    Option(
        "--swap-compress",
        "what goes there: lz4, zstd, or none (default)",
        default="none",
        choices=("none", "lz4", "zstd"),
    ),
    Option(
        "--policy",
        "who chooses what goes: activity (default), clock, random, sharing-first, or file.py:Class",
        metavar="NAME",
    ),
)

# What both sides of a migration take (pyvmm.cli.moving).
_MOVING = (
    Option("--tls-cert", "with tcp: TLS 1.3; our certificate, PEM", metavar="FILE"),
    Option("--tls-key", "the certificate's key, PEM", metavar="FILE"),
    Option("--tls-ca", "the authority that signed the other side's certificate, PEM", metavar="FILE"),
    Option("--capture", "record what is said, for `pyvmm migration dissect`", metavar="FILE"),
)

# How a VM is saved while a guest runs in the foreground (pyvmm.cli.checkpoint).
SNAPSHOT = (
    Option("--snapshot", "write the VM into this file, and go on", metavar="FILE"),
    Option("--snapshot-at", "when: progress>=N, or seconds>=S (default: at the end)", metavar="CONDITION"),
    Option(
        "--snapshot-mode",
        "stop: pause the guest meanwhile (default); live: save while it runs",
        default="stop",
        choices=("stop", "live"),
    ),
    Option("--snapshot-block", "stored together, 16K to 2M (default 64K)", default="64K", metavar="SIZE"),
    Option("--snapshot-codec", "raw, lz4 or zstd (default raw)", default="raw", choices=_CODECS),
    Option(
        "--snapshot-order",
        "pages by address (default), or those first that the guest's page tables say were accessed",
        default="address",
        choices=("address", "accessed"),
    ),
)

# Virtio devices, in this order (pyvmm.cli.run.devices_of).
DEVICES = (
    Option("--rng", "a virtio device that gives random bytes", bool),
    Option("--virtio-console", "a virtio console: what is typed goes there, what it says comes here", bool),
    Option("--balloon", "a virtio balloon, by which the guest gives up memory: `pyvmm balloon`", bool),
    Option("--disk", "a virtio disk: a file or block device, with ,ro to be read alone", metavar="FILE", repeated=True),
    Option(
        "--swap-disk",
        "a virtio disk to swap to, with ,mode=naive|references|replace and ,durable",
        metavar="SIZE|FILE",
        repeated=True,
    ),
)

# What every command takes that runs a guest in the foreground (pyvmm.cli.run.Session).
GUEST = (
    _IMAGE,
    Option("--mem", "RAM, such as 256M or 4G (default 64M)", default="64M", metavar="SIZE"),
    _CPUS,
    _PAGES,
    Option("--hugetlb", "take reserved 2 MiB pages (vm.nr_hugepages)", bool),
    Option("--append", "the guest's command line", default="", metavar='"K=V ..."'),
    Option("--initrd", "a file handed to the guest beside its image", metavar="FILE"),
    Option("--format", "pvh, multiboot, flat16 or flat64, where the file does not say", metavar="NAME"),
    Option("--at", "load address of a flat image, such as 0x7c00", metavar="ADDRESS"),
    *DEVICES,
    Option("--virtio-append", "tell a Linux guest, by its command line, where its virtio devices are", bool),
    _TIMEOUT,
)

COMMANDS = (
    Command(
        "run",
        "run a guest",
        "run",
        *GUEST,
        _STATS,
        _LIVE,
        _CONTROL,
        *_LESS,
        Option("--trace", "single-step the first N instructions, and show them", int, metavar="N"),
        *SNAPSHOT,
    ),
    Command(
        "restore",
        "run a guest on from a snapshot file",
        "restore",
        Option("file", "a snapshot", metavar="FILE"),
        Option("--lazy", "run at once, and read RAM when it is touched", bool),
        Option("--eager", "read all RAM before it runs (default)", bool),
        Option("--fill", "with --lazy: bring all the rest meanwhile, or none", default="all", choices=("all", "none")),
        Option("--fill-rate", "with --lazy: at most so many bytes of it a second, such as 500M", metavar="SIZE"),
        Option(
            "--unit",
            "with --lazy: a touch brings a page, a storage block, 2 MiB, or a block and then 2 MiB (adaptive, default)",
            default="adaptive",
            choices=("adaptive", "page", "block", "large"),
        ),
        Option("--record", "with --lazy: keep in FILE which pages are touched, in order: its working set", bool),
        Option("--prefetch", "with --lazy: bring the working set ahead of the guest", bool),
        Option("--populate", "with --lazy: bring the working set before the first instruction", bool),
        Option("--map", "with --lazy: show where RAM is while it comes", bool),
        Option("--count", "as many VMs at once, each a clone that knows that it is one (default 1)", int, 1, "N"),
        *DEVICES,
        _PAGES,
        _TIMEOUT,
        _STATS,
        _LIVE,
        _CONTROL,
        *_LESS,
        *SNAPSHOT,
        Option("--snapshot-incremental", "write only what has changed since FILE, on which it builds then", bool),
    ),
    Command(
        "pages",
        "run a guest, and show and change where its pages are",
        "pages",
        *GUEST,
        Option("--seconds", "look then, do what is asked, and look again as long after (default 1)", float, 1.0, "S"),
        Option(
            "--do",
            "remove, zero, install, split, merge, break or share 2 MiB blocks, such as 3, 3-9, 3,5,8-10 or all",
            metavar="OP:BLOCKS",
            repeated=True,
        ),
        Option("--ksm", "with --do share: have the kernel's merging (KSM) run meanwhile; put back at the end", bool),
        Option("--sharing", "what sharing equal pages would free; also of a guest started with --control PATH", bool),
        Option(
            "--with", "with --sharing: and across that guest too, by its --control PATH", metavar="PATH", repeated=True
        ),
        Option("--png", "the map as a picture too", metavar="FILE"),
        Option("--json", "one JSON object instead of tables and maps", bool),
    ),
    Command(
        "activity",
        "run a guest, and show which memory it uses, by watching a part of it at a time",
        "activity",
        *GUEST,
        Option("--seconds", "watch for so long, and a half as long not, to compare (default 10)", float, 10.0, "S"),
        Option("--window", "watch a block for so long (default 0.5)", float, 0.5, "S"),
        Option("--share", "of the blocks are watched at a time, at most (default 0.0625)", float, 0.0625, "X"),
        Option("--threshold", "touched pages that make a block active, of 512 (default 32)", int, 32, "N"),
        Option(
            "--order",
            "blocks at random (default), or one after the other",
            default="random",
            choices=("random", "clock"),
        ),
        Option("--budget", "the guest may wait for so much of its time (default 0.02)", float, 0.02, "X"),
        Option("--full", "count all pages of active blocks too, which costs a fault each", bool),
        Option("--seed", "of the order", int, metavar="N"),
        Option("--png", "the map as a picture too", metavar="FILE"),
        Option("--record-trace", "what was touched, for `pyvmm simulate`", metavar="FILE"),
        Option("--json", "one JSON object instead of text and map", bool),
    ),
    Command(
        "snapshot",
        "show what a snapshot file holds, check that it is whole, or write it anew",
        "snapshot",
        Option(
            "action",
            "info: sizes, pages, vCPUs, parents; check: read and verify all; pack: write it anew",
            choices=("info", "check", "pack"),
        ),
        Option("file", "a snapshot", metavar="FILE"),
        Option("--json", "one JSON object instead of text", bool),
        Option("--out", "pack: into this file (default: in place of FILE)", metavar="FILE"),
        Option("--order", "pack: pages by address, or the working set first", choices=("address", "touch")),
        Option("--block", "pack: stored together, 16K to 2M (default: as it is)", metavar="SIZE"),
        Option("--codec", "pack: raw, lz4 or zstd (default: as it is)", choices=_CODECS),
        Option("--flat", "pack: with all that it builds on, in one file", bool),
    ),
    Command(
        "status",
        "show how a guest is that was started with --control",
        "status",
        _SOCKET,
        Option("--json", "one JSON object instead of text", bool),
    ),
    Command(
        "swap",
        "have a running guest, started with --control, live in less memory; show how that goes",
        "swap",
        _SOCKET,
        Option(
            "--target", "so much of the host's memory may its RAM take, such as 128M; none: all", metavar="SIZE|none"
        ),
        Option("--policy", "who chooses what goes, if nobody does yet (see `pyvmm run --policy`)", metavar="NAME"),
        Option("--live", "show it again and again, until Ctrl-C", bool),
        Option("--json", "one JSON object instead of a table", bool),
    ),
    Command(
        "balloon",
        "have a running guest, started with --control and --balloon, give up memory; show how it uses the rest",
        "balloon",
        _SOCKET,
        Option("size", "so much in all, such as 64M; 0: nothing (default: as it is)", metavar="SIZE", optional=True),
        Option("--wait", "end when it has got no further for so long (default 2)", float, 2.0, "SECONDS"),
        Option("--json", "one JSON object instead of a table", bool),
    ),
    Command(
        "migrate",
        "move a running guest, started with --control, to a `pyvmm receive`",
        "migrate",
        _SOCKET,
        Option("--to", "where it goes: tcp:HOST:PORT, unix:PATH or local:PATH", metavar="ADDRESS"),
        Option(
            "--mode",
            "memory before the guest (default), after it, or both",
            default="precopy",
            choices=("precopy", "postcopy", "hybrid"),
        ),
        Option("--downtime", "the guest may stand for so long (default 20)", float, 20.0, "MS"),
        Option("--abandon", "the destination is dead for certain, and was not heard of: the guest runs on here", bool),
        Option("--channels", "connections for pages, 1 to 8 (default 1)", int, 1, "N"),
        Option("--bandwidth", "at most so many bytes a second, such as 500M", metavar="SIZE"),
        Option("--no-throttle", "never slow the guest down, however fast it writes", bool),
        *_MOVING,
        Option("--json", "one JSON object instead of text", bool),
    ),
    Command(
        "receive",
        "wait for a guest that moves here, and run it on",
        "receive",
        Option("--listen", "where: tcp:HOST:PORT, unix:PATH or local:PATH", metavar="ADDRESS"),
        Option(
            "--unit",
            "memory after the guest: a touch brings a page, a storage block, 2 MiB, or first less and then 2 MiB",
            default="adaptive",
            choices=("adaptive", "page", "block", "large"),
        ),
        *DEVICES,
        *_MOVING,
        _TIMEOUT,
        _STATS,
        _LIVE,
        _CONTROL,
        *_LESS,
        Option("--json", "the report as one JSON object; what the guest prints goes to stderr", bool),
    ),
    Command(
        "migration",
        "show what was recorded of a migration",
        "migration",
        Option("action", "dissect: each frame with its fields", choices=("dissect",)),
        Option("file", "a capture", metavar="CAPTURE"),
        Option("--json", "one JSON object instead of text", bool),
    ),
    Command(
        "guests",
        "list the guests that pyvmm brings",
        "guests",
        Option("guest", "show this guest's options", metavar="GUEST", optional=True),
    ),
    Command(
        "dirty",
        "show what a guest writes over time, and what tracing it costs",
        "dirty",
        _IMAGE,
        Option("--tracker", "one way to trace, or all that work here (default all)", default="all", metavar="NAME"),
        Option("--seconds", "how long it is traced (default 3)", float, 3.0, "N"),
        Option("--interval", "time between two looks (default 100)", int, 100, "MS"),
        Option("--pause", "install the trace while all vCPUs stand, to compare", bool),
        Option("--mem", "RAM, such as 256M or 4G (default 256M)", default="256M", metavar="SIZE"),
        _CPUS,
        _PAGES,
        Option("--append", "the guest's command line (touch: pattern=zipf)", metavar='"K=V ..."'),
        Option("--json", "data instead of curves", bool),
    ),
    Command(
        "simulate",
        "replay a trace of accesses in less memory, and compare who chooses what leaves it",
        "simulate",
        Option("trace", "an access trace (docs/reclaim.md)", metavar="TRACE", optional=True),
        Option(
            "--policy",
            "clock, random, activity, sharing-first, or your own: file.py:Class (default: those four)",
            default="clock,random,activity,sharing-first",
            metavar="NAME[,NAME...]",
        ),
        Option("--memory", "so much the VM may have in memory, such as 64M", metavar="SIZE"),
        Option("--make", "no TRACE, but a synthetic one", choices=("zipf", "hotcold", "scan", "mixed")),
        Option("--ram", "--make: RAM of its VM (default 256M)", default="256M", metavar="SIZE"),
        Option("--touches", "--make: so many (default 1000000)", int, 1_000_000, "N"),
        Option("--out", "--make: write the trace into FILE", metavar="FILE"),
        Option("--seed", "of all that is random (default 1)", int, 1, "N"),
        Option("--small", "no large pages, and so no block comes or goes whole unless a policy says so", bool),
        Option("--blind", "policies are told of faults, not of each touch", bool),
        Option("--window", "how active blocks were is told every so many touches (default 20000)", int, 20_000, "N"),
        Option("--json", "one JSON object instead of a table", bool),
    ),
    Command(
        "host",
        "run many guests in less memory than they were promised (docs/fleet.md)",
        "host",
        Option(
            "action",
            "up: start a fleet, or find it running; status, top: show it; stop: end it; simulate: policies on paper",
            choices=("up", "status", "top", "stop", "simulate"),
        ),
        Option(
            "fleet", "up: its file, fleet.toml; else: its name, which is the file's", metavar="FLEET", optional=True
        ),
        Option("--folder", "where its sockets and logs are (default: as its name says)", metavar="FOLDER"),
        Option("--detach", "up: in the background", bool),
        Option("--json", "status, simulate: one JSON object instead of a table", bool),
        Option("--vms", "simulate: so many VMs, made at random (default: three unlike ones)", int, metavar="N"),
        Option("--trace", "simulate: what VMs of a fleet used: its decisions.log", metavar="FILE"),
        Option(
            "--policy",
            "simulate: these, or your own: file.py:Class (default: all that there are)",
            metavar="NAME[,NAME...]",
        ),
        Option(
            "--budget", "simulate: so much for all of them (default: 70 % of what they are promised)", metavar="SIZE"
        ),
        Option("--ticks", "simulate: so many seconds (default 60)", int, 60, "N"),
        Option("--seed", "simulate: of --vms (default 1)", int, 1, "N"),
    ),
    Command(
        "bench",
        "measure what pyvmm costs, and what each of its techniques brings",
        "bench",
        Option(
            "words",
            "which ones, or all (without any they are listed); report FILE --output DIR: plots and a page of results; "
            "compare FILE FILE: what moved between two",
            metavar="NAME",
            optional=True,
            repeated=True,
        ),
        Option("--quick", "small and short: to see what it measures, not how much that is", bool),
        Option("--json", "lines of data instead of tables", bool),
        Option("--output", "append the data to this file too, line by line", metavar="FILE"),
        Option("--report", "plots and a page of the results, into this folder", metavar="DIR"),
        Option("--check", "end with status 1 where a result lacks what is promised of it", bool),
    ),
    Command(
        "torture",
        "prove the memory engine: a guest that checks its memory, under random operations",
        "torture",
        Option("--seconds", "how long (default 10)", float, 10.0, "N"),
        Option("--seed", "of the sequence of operations (default: one that is printed)", int, metavar="S"),
        Option("--cpus", "vCPUs, 1 to 64 (default 1)", int, 1, "N"),
        Option("--mem", "RAM, 16M or more (default 64M)", default="64M", metavar="SIZE"),
        Option("--pages", "large or small pages behind the RAM", default="auto", choices=("auto", "2m", "4k")),
        Option("--without-move", "as on hosts without UFFDIO_MOVE: pages are copied", bool),
        Option("--json", "the outcome as one JSON object", bool),
    ),
    Command(
        "doctor",
        "say what this host can do, by trying",
        "doctor",
        Option("--json", "one JSON object instead of a table", bool),
        Option("--summary", "the few lines that matter most", bool),
    ),
)
