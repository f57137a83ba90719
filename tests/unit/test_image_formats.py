# test_image_formats.py: the table of formats, files as they come from disk, and what the package costs to import.
import os
import subprocess
import sys

import pytest
from test_image_builders import CODE, build_aout, build_elf, build_multiboot, build_pvh, multiboot_header, pvh_note

from pyvmm import image
from pyvmm.errors import BadInput, ImageError
from pyvmm.layout import MIB, Gpa, ram_regions


def test_every_row_is_named_after_its_key_and_describes_itself_in_one_line():
    assert list(image.FORMATS) == ["pvh", "multiboot", "flat16", "flat64"]
    for name, format in image.FORMATS.items():
        assert format.name == name
        assert format.description
        assert "\n" not in format.description


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (build_pvh(), "pvh"),
        (build_multiboot(), "multiboot"),
        (build_multiboot(64), "multiboot"),
        (build_aout(), "multiboot"),
        (build_elf(notes=pvh_note(0x100010), loads=((0x100000, multiboot_header() + CODE, 0x1000),)), "pvh"),
    ],
)
def test_formats_that_proclaim_themselves(data, format):
    assert image.parse_image(data).format == format


def test_a_named_format_decides():
    both = build_elf(notes=pvh_note(0x100010), loads=((0x100000, multiboot_header() + CODE, 0x1000),))
    assert image.parse_image(both, "multiboot").format == "multiboot"
    assert image.parse_image(CODE, "flat64", Gpa(0x200000)).segments[0].gpa == Gpa(0x200000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (CODE, "not an ELF file and no multiboot header; for bare bytes pass --format flat64 or flat16"),
        (bytes(0x202) + b"HdrS", "a Linux bzImage: pass the vmlinux that it was made from"),
        (
            build_elf(),
            "no PVH note (XEN_ELFNOTE_PHYS32_ENTRY) and no multiboot header; "
            "link one in, or `objcopy -O binary` it and pass --format flat64",
        ),
        (build_pvh()[:-1], "truncated: segment 1 at 0xc4 needs 0x40 bytes, the file has 0x103"),
        (build_pvh(size=3), "PVH note: entry of 3 bytes, where 4 or 8 are needed"),
    ],
)
def test_unknown_and_damaged_images(data, message):
    with pytest.raises(ImageError) as caught:
        image.parse_image(data)
    assert str(caught.value) == message


def test_unknown_format_names_the_known_ones():
    with pytest.raises(BadInput, match=r"no image format 'elf': choose from pvh, multiboot, flat16, flat64") as caught:
        image.parse_image(CODE, "elf")
    assert not isinstance(caught.value, ImageError)


def test_boot_goes_by_the_format_of_the_image():
    ram = ram_regions(2 * MIB)
    assert image.boot_image(image.parse_image(build_multiboot()), ram).entry.registers["rax"] == 0x2BADB002
    assert image.boot_image(image.parse_image(build_pvh()), ram, "x").entry.registers == {"rbx": 0x6000}


def test_boot_refuses_an_image_beyond_the_ram():
    parsed = image.parse_image(build_pvh(entry=4 * MIB, loads=((4 * MIB, CODE, MIB),)))
    with pytest.raises(ImageError, match="needs memory up to 0x500000, the VM has 2M; try --mem 6M"):
        image.boot_image(parsed, ram_regions(2 * MIB))


def test_read_image(tmp_path):
    path = tmp_path / "guest.elf"
    path.write_bytes(build_pvh())
    assert image.read_image(path) == image.read_image(str(path)) == image.parse_image(build_pvh())


def test_the_largest_file_is_read(tmp_path, monkeypatch):
    data = build_pvh()
    path = tmp_path / "guest"
    path.write_bytes(data)
    monkeypatch.setattr(image, "MAX_FILE_SIZE", len(data))
    assert image.read_image(path).format == "pvh"


def make_huge(path):
    with path.open("wb") as file:
        file.truncate(image.MAX_FILE_SIZE + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "a directory, not a file"),
        (lambda path: path.touch(), "empty file"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (make_huge, "1073741825 bytes: at most 1G can be loaded"),
        (lambda path: path.write_bytes(CODE), "not an ELF file and no multiboot header"),
    ],
)
def test_files_that_cannot_be_images_are_named(tmp_path, make, message):
    path = tmp_path / "guest"
    make(path)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageError) as caught:
        image.read_image(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_without_permission(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read all files
    with pytest.raises(ImageError, match=r"^guest\.elf: Permission denied$"):
        image.read_image("guest.elf")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "two\nlines"])
def test_odd_names_make_one_line(name):
    with pytest.raises(ImageError) as caught:
        image.read_image(name)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(repr(name))


def test_the_package_imports_nothing_slow():
    slow = {"typing", "dataclasses", "pathlib", "numpy", "rich", "capstone", "elftools", "hypothesis"}
    script = (
        "import sys; old = set(sys.modules); import pyvmm.image, pyvmm.image.symbols; print(*set(sys.modules) - old)"
    )
    # -S: a site directory may import anything before us.
    run = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(image.__file__)))},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(run.stdout.split())
    assert "pyvmm.image.elf" in loaded
    assert not loaded & slow
