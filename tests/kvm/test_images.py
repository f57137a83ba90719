# test_images.py: each boot protocol really boots: a few instructions that print what they were given, and leave.
from __future__ import annotations

import struct

import pytest

from pyvmm import ImageError
from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")

SERIAL = "66 ba f8 03"  # mov dx, 0x3f8
EXIT = "66 ba f4 00"  # mov dx, 0xf4

FLAT16 = bytes.fromhex(
    "ba f8 03  b0 52  ee"  # mov dx, 0x3f8; mov al, 'R'; out dx, al
    "ba f4 00  b0 2a  ee  f4"  # mov dx, 0xf4; mov al, 42; out dx, al; hlt
)

FLAT64 = bytes.fromhex(
    f"48 89 f1  48 89 fe  {SERIAL}  f3 6e"  # mov rcx, rsi; mov rsi, rdi; ...; rep outsb: the command line
    f"{EXIT}  b0 07  ee  f4"  # ...; mov al, 7; out dx, al; hlt
)

MULTIBOOT_CODE = bytes.fromhex(
    "3d 02 b0 ad 2b  75 29"  # cmp eax, 0x2badb002; jne fail
    f"8b 73 10  {SERIAL}"  # mov esi, [ebx + 16]: the command line
    "ac  84 c0  74 03  ee  eb f8"  # again: lodsb; test al, al; jz on; out dx, al; jmp again
    "83 7b 14 00  74 0c"  # on: cmp dword [ebx + 20], 0; jz leave: no modules
    "8b 43 18  8b 30  8b 48 04  29 f1  f3 6e"  # mov eax, [ebx + 24]; esi = its start; ecx = end - start; rep outsb
    f"{EXIT}  b0 05  ee  f4"  # leave: ...; mov al, 5; out dx, al; hlt
    f"{EXIT}  b0 63  ee  f4"  # fail: ...; mov al, 99; out dx, al; hlt
)

PVH_CODE = bytes.fromhex(
    "81 3b 78 c5 6e 33  75 1c"  # cmp dword [ebx], 0x336ec578 (struct hvm_start_info); jne to the hlt
    "83 7b 0c 00  74 0e"  # cmp dword [ebx + 12], 0; jz leave: no modules
    f"8b 43 10  8b 30  8b 48 08  {SERIAL}  f3 6e"  # mov eax, [ebx + 16]; esi = its address; ecx = its size; rep outsb
    f"8a 43 0c  {EXIT}  ee  f4"  # leave: mov al, [ebx + 12]: how many modules; out dx, al; hlt
)


def multiboot(load=0x100000):
    """The a.out kludge: a header that says where all of the file goes."""
    flags, size = 0x10003, 32 + len(MULTIBOOT_CODE)
    header = (0x1BADB002, flags, -(0x1BADB002 + flags) % (1 << 32), load, load, load + size, load + size, load + 32)
    return struct.pack("<8I", *header) + MULTIBOOT_CODE


def pvh(load=0x200000):
    """An ELF64 file with one segment and Xen's note of the 32-bit entry."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", load)
    contents = 64 + 2 * 56
    code_at = contents + len(note)
    size = len(PVH_CODE)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, load, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    notes = struct.pack("<IIQQQQQQ", 4, 4, contents, 0, 0, len(note), len(note), 4)
    segment = struct.pack("<IIQQQQQQ", 1, 5, code_at, load, load, size, size, 1)
    return header + notes + segment + note + PVH_CODE


# image, format, address, command line, what the module holds, memory; status, what is printed
BOOTS = {
    "flat16": (FLAT16, "flat16", None, "", None, "2M", 42, "R"),
    "flat16 elsewhere": (FLAT16, "flat16", 0x500, "", None, "64M", 42, "R"),
    "flat64": (FLAT64, "flat64", None, "a line for the guest", None, "64M", 7, "a line for the guest"),
    "flat64 without a line": (FLAT64, "flat64", None, "", None, "2M", 7, ""),
    "flat64 at 16 MiB": (FLAT64, "flat64", 16 << 20, "x", None, "64M", 7, "x"),
    "flat64 below the hole": (FLAT64, "flat64", 0xBFFF_F000, "high", None, "3G", 7, "high"),
    "multiboot": (multiboot(), None, None, "of its own", None, "64M", 5, "of its own"),
    "multiboot, asked for": (multiboot(), "multiboot", None, "", None, "4M", 5, ""),
    "multiboot, a module": (multiboot(), None, None, "then ", b"its module", "64M", 5, "then its module"),
    "multiboot, 5G": (multiboot(), None, None, "", b"module of the large one", "5G", 5, "module of the large one"),
    "pvh": (pvh(), None, None, "", None, "64M", 0, ""),
    "pvh, a module": (pvh(), None, None, "unread", b"what is in the initrd", "64M", 1, "what is in the initrd"),
    "pvh, a long module": (pvh(), "pvh", None, "", b"0123456789" * 500, "5G", 1, "0123456789" * 500),
    "pvh, an empty module": (pvh(), None, None, "", b"", "64M", 1, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", BOOTS)
def test_it_boots(vm, tmp_path, name):
    image, format, at, append, module, memory, status, printed = BOOTS[name]
    file = tmp_path / "image"
    file.write_bytes(image)
    initrd = None
    if module is not None:
        (tmp_path / "module").write_bytes(module)
        initrd = str(tmp_path / "module")
    machine = vm(memory=memory)
    machine.load(str(file), append, initrd, format, at)
    result = machine.run(timeout=10)
    assert (result.reason, result.status, machine.printed) == ("exit", status, printed)


def test_an_image_that_is_refused_leaves_the_vm_as_it_was(vm, tmp_path):
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.write_bytes(b"neither one nor the other")
    good.write_bytes(multiboot())
    machine = vm()
    with pytest.raises(ImageError):
        machine.load(str(bad))
    with pytest.raises(ImageError):
        machine.load(str(good), initrd=str(tmp_path / "not there"))
    machine.load(str(good), "the second")
    assert machine.run(timeout=10).status == 5
    assert machine.printed == "the second"
