# guests.py: `pyvmm guests`: what pyvmm brings to run. Texts come from the guests' own ELF notes.
"""Lists the guests, or one guest's options."""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.image import elf
from pyvmm.machine.loader import guest_names, guest_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.parse import Arguments


def about(guest: str) -> tuple[str, list[str]]:
    """What a guest does, in a line, and a line for each of its options ("" and none where it does not say)."""
    with open(guest_path(guest), "rb") as file:
        notes = elf.read(file.read()).notes
    for note in notes:
        if note.name.rstrip(b"\0") == b"pyvmm" and note.type == lib.PV_NOTE_ABOUT:
            first, *options = note.descriptor.rstrip(b"\0").decode("utf-8", "replace").splitlines()
            return first, options
    return "", []


def run(args: Arguments) -> int:
    """Prints the list, or the options of one guest."""
    name = args.guest
    if name is None:
        for guest in guest_names():
            print(f"{guest:10} {about(guest)[0]}")
        return 0
    line, options = about(name)
    print(f"{name}: {line}")
    if not any(option.startswith("cpus=") for option in options):  # the guests' library takes it for all
        options.append("cpus=N vCPUs to look for, where the machine cannot tell")
    for option in options:
        word, _, meaning = option.partition(" ")
        print(f"  {word:28} {meaning}")
    return 0
