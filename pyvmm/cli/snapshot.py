# snapshot.py: `pyvmm snapshot info|check|pack FILE`: what a snapshot file holds, whether it is whole; written anew.
"""The command. Sizes are bytes, pages 4 KiB."""

from __future__ import annotations

import json
import os

from pyvmm.cli.progress import Bar
from pyvmm.errors import BadInput, SnapshotError, StateError
from pyvmm.layout import BLOCK_SIZE, KIB, MIB, format_size, parse_size, rough_size
from pyvmm.snapshot import Snapshot
from pyvmm.snapshot.inspect import Info
from pyvmm.state import State
from pyvmm.vcpu.registers import Registers, saved_registers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.cli.parse import Arguments

_SCHEMA = 1
_SHOWN = ("rip", "rsp", "rflags", "cr0", "cr3", "cr4", "efer")
_MAIN = ("rip", "rsp", "cr3")


def run(args: Arguments) -> int:
    """The command: 0; 2 for a file that is no snapshot, or not a whole one."""
    packs = args.action == "pack"
    for option in ("json",) if packs else ("out", "order", "block", "codec", "flat"):
        if getattr(args, option):
            raise BadInput(f"--{option} is for {'info and check' if packs else 'pack'}")
    return {"info": _info, "check": _check, "pack": _pack}[args.action](args)


# ---- check ----


def _check(args: Arguments) -> int:
    outcome: dict[str, object] = {"schema": _SCHEMA, "file": args.file, "ok": True, "error": None}
    try:
        with Snapshot.open(args.file) as snapshot:
            with Bar("checking") as bar:
                snapshot.check(bar.told)
            depth = snapshot.depth
    except SnapshotError as error:
        if not args.json:
            raise
        outcome.update(ok=False, error=str(error))
        print(json.dumps(outcome))
        return error.exit_code
    if args.json:
        print(json.dumps(outcome))
    else:
        print(f"{args.file}: whole" + (f", and so is all that it builds on ({depth})" if depth else ""))
    return 0


# ---- pack ----


def _pack(args: Arguments) -> int:
    from pyvmm.snapshot.rewrite import pack

    out = args.out or args.file
    block = None if args.block is None else parse_size(args.block)
    with Bar("reading") as bar:
        pack(
            args.file, out, order=args.order or "address", block_size=block, codec=args.codec, flat=args.flat,
            progress=bar.told,
        )  # fmt: skip
    print(f"{out}: {rough_size(os.path.getsize(out))}")
    return 0


# ---- info ----


def _info(args: Arguments) -> int:
    missing = None
    try:
        snapshot = Snapshot.open(args.file)
    except SnapshotError as error:  # of a parent, perhaps: this file may be whole
        snapshot = Snapshot.open(args.file, parents=False)
        missing = str(error)
    with snapshot:
        info = snapshot.info()
        if args.json:
            print(json.dumps(_as_json(snapshot, info, missing)))
        else:
            _show(snapshot, info, missing)
    return 0


def _vcpus(state: State) -> Iterator[tuple[int, Registers]]:
    """Number and registers of each vCPU, wherever in the tree it is."""
    if state.kind == "vcpu":
        yield state.integer("id"), saved_registers(state)
        return
    for value in state.fields.values():
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, State):
                yield from _vcpus(part)


def _saved_vcpus(snapshot: Snapshot) -> list[tuple[int, Registers]]:
    try:
        return list(_vcpus(snapshot.states))
    except StateError as error:
        raise SnapshotError(f"{snapshot.name}: {error}") from None


def _chain(snapshot: Snapshot) -> list[Snapshot]:
    chain = [snapshot]
    while chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    return chain


def _ratio(info: Info) -> float | None:
    return info.raw_bytes / info.stored_bytes if info.stored_bytes else None


def _as_json(snapshot: Snapshot, info: Info, missing: str | None) -> dict[str, object]:
    """All of it as plain data. Units are in the names of numbers, or pages."""
    header = snapshot.header
    return {
        "schema": _SCHEMA,
        "file": snapshot.name,
        "producer": header.producer,
        "id": snapshot.id.hex(),
        "memory_bytes": snapshot.memory_size,
        "file_bytes": header.file_size,
        "codec": header.codec,
        "block_bytes": header.block_size,
        "blocks": snapshot.blocks,
        "blocks_not_compressed": info.raw_blocks,
        "pages": {"stored": info.stored, "zero": info.zero, "parent": info.inherited},
        "raw_bytes": info.raw_bytes,
        "stored_bytes": info.stored_bytes,
        "large_blocks": info.large_blocks,
        "working_set_pages": info.working_set,
        "vcpus": [{"id": number, **_registers(regs)} for number, regs in _saved_vcpus(snapshot)],
        "depth": snapshot.depth,
        "chain": [
            {"file": each.path, "id": each.id.hex(), "file_bytes": each.header.file_size} for each in _chain(snapshot)
        ],
        "chain_error": missing,
    }


def _registers(regs: Registers) -> dict[str, int]:
    return {"mode": regs.mode, "ring": regs.ring, **{name: getattr(regs, name) for name in _SHOWN}}


def _show(snapshot: Snapshot, info: Info, missing: str | None) -> None:
    from rich.text import Text

    from pyvmm.cli.output import Output
    from pyvmm.cli.picture import new_table

    console, header = Output(), snapshot.header

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)  # paths are not broken

    line(snapshot.name, "bold")
    line(f"by {header.producer}, id {snapshot.id.hex()}")
    pages = new_table(console, "RAM", "pages", "MiB", "share")
    rows = {"stored": info.stored, "zero": info.zero, "in the parent": info.inherited, "all": snapshot.pages}
    for name, count in rows.items():
        if count or name != "in the parent":
            pages.add_row(name, f"{count:,}", f"{count * 4 * KIB / MIB:,.1f}", f"{count / snapshot.pages:.1%}")
    console.print(pages)
    ratio = _ratio(info)
    lines = [
        f"file: {rough_size(header.file_size)}, for {rough_size(snapshot.memory_size)} of RAM",
        f"storage: {snapshot.blocks:,} blocks of {format_size(header.block_size)}, {header.codec}"
        + (f", {ratio:.2f} : 1" if ratio is not None else "")
        + (f", {info.raw_blocks:,} of them as they are" if info.raw_blocks and header.codec != "raw" else ""),
        f"large pages: {info.large_blocks:,} of {-(-snapshot.memory_size // BLOCK_SIZE):,} blocks of 2 MiB",
    ]
    if info.working_set:
        lines.append(f"working set: {info.working_set:,} pages")
    for text in lines:
        line(text)
    vcpus = new_table(console, "vCPU", "mode", "ring", *_SHOWN[:5])
    for number, regs in _saved_vcpus(snapshot):
        vcpus.add_row(
            str(number), str(regs.mode), str(regs.ring), *(f"{getattr(regs, name):#x}" for name in _SHOWN[:5])
        )
    if vcpus.row_count:
        console.print()
        console.print(vcpus)
    if snapshot.depth:
        console.print()
        line(f"ancestors: {snapshot.depth}", "bold")
        for each in _chain(snapshot)[1:]:
            line(f"{os.path.basename(each.path)!r}: {rough_size(each.header.file_size)}, id {each.id.hex()}")
    if missing is not None:
        line(missing, "yellow")
