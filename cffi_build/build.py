# build.py: builds pyvmm._native (cffi API mode) and the guests, in place. Run by `make build` and by hatch_build.py.
"""Generates, compiles and sweeps the extension; builds the guests with make."""

from __future__ import annotations

import compileall
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = (
    "run.c", "map.c", "sys.c", "bits.c", "ring.c", "bare.c", "measure.c",
    "engine.c", "pagemap.c", "uffd.c", "fault.c", "install.c", "remove.c", "assign.c", "blocks.c", "unit.c", "coarse.c",
    "limit.c", "balloon.c",
    "sample.c",
    "scan.c", "sharing.c",
    "live.c", "live_block.c", "live_drain.c", "filehome.c",
    "checksum.c", "codec.c", "pack.c", "unpack.c", "load.c",
    "stream.c", "peerhome.c", "inbox.c", "serve.c",
    "digest.c", "swap.c", "swap_slots.c", "swap_in.c", "swap_out.c", "swap_refs.c", "swap_thread.c",
)  # fmt: skip
FLAGS = ("-std=gnu11", "-O2", "-g", "-fvisibility=hidden")
STRICT = ("-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wstrict-prototypes", "-Wvla", "-Wundef")


def missing_tools() -> list[str]:
    """Debian packages that the build lacks on this machine."""
    packages = []
    programs = (os.environ.get("CC", "gcc"), "ld", "make")
    if not all(shutil.which(program) for program in programs) or not Path("/usr/include/stdio.h").exists():
        packages.append("build-essential")
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        packages.append("python3-dev")
    if not Path("/usr/include/linux/kvm.h").exists():
        packages.append("linux-libc-dev")
    if importlib.util.find_spec("ensurepip") is None:
        packages.append("python3-venv")
    return packages


def require_tools() -> None:
    """Ends with the one line that brings what is missing, before anything half-builds."""
    packages = missing_tools()
    if packages:
        sys.exit(f"pyvmm: the build lacks tools; run: sudo apt-get install -y {' '.join(packages)}")


def sweep(ffi: object, lib: object) -> None:
    """Touches every type and constant once: cffi notices a wrong width or a missing name only at first use."""
    for name in dir(lib):
        getattr(lib, name)
    typedefs, structs, unions = ffi.list_types()  # type: ignore[attr-defined]
    for name in [*typedefs, *(f"struct {tag}" for tag in structs), *(f"union {tag}" for tag in unions)]:
        try:
            ffi.sizeof(name)  # type: ignore[attr-defined]
        except ffi.error as error:  # type: ignore[attr-defined]
            if "don't know the size" not in str(error):
                raise
            continue  # an opaque struct has neither size nor fields
        _ = ffi.typeof(name).fields if name.startswith("struct") else None  # type: ignore[attr-defined]


def check_warnings() -> None:
    """Our own C files must compile without a warning (the guests' Makefile always asks for that)."""
    for source in SOURCES:
        compiler = os.environ.get("CC", "gcc")
        subprocess.run([compiler, *FLAGS, *STRICT, "-fsyntax-only", str(HERE / source)], check=True)


def build_extension() -> None:
    """Compiles pyvmm/_native.*.so."""
    from cffi import FFI

    generated = HERE / "generated"
    generated.mkdir(exist_ok=True)
    ffi = FFI()
    ffi.cdef((HERE / "native.cdef").read_text())
    ffi.set_source(
        "pyvmm._native",
        '#include "native.h"\n',
        sources=[str(HERE / source) for source in SOURCES],
        include_dirs=[str(HERE)],
        depends=[str(path) for path in (*HERE.glob("*.h"), ROOT / "guest/abi.h")],
        extra_compile_args=list(FLAGS),
        libraries=["pthread", "dl"],
    )
    built = Path(ffi.compile(tmpdir=str(generated)))
    target = ROOT / "pyvmm" / built.name
    if not target.exists() or target.read_bytes() != built.read_bytes():
        fresh = target.with_suffix(".new")  # renamed into place: a running pyvmm keeps the file that it has mapped
        shutil.copy2(built, fresh)
        fresh.replace(target)
    check = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pyvmm._native import ffi, lib; "
    check += f"sys.path.insert(0, {str(HERE)!r}); import build; build.sweep(ffi, lib)"
    subprocess.run([sys.executable, "-c", check], check=True)


def build_guests() -> None:
    """Builds guest/*.c into pyvmm/guests/*.elf."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "guest")], check=True)


def main() -> None:
    """Builds all; with --tools only looks whether that is possible, with --check only holds the C to no warnings."""
    if sys.version_info < (3, 11):  # noqa: UP036 (an older Python is just what this is for)
        sys.exit("pyvmm: needs Python 3.11 or newer; run make with PYTHON=python3.11, or a newer one")
    require_tools()
    if "--check" in sys.argv:
        check_warnings()
    elif "--tools" not in sys.argv:
        build_extension()
        build_guests()
        compileall.compile_dir(ROOT / "pyvmm", quiet=1)  # the first start is to be as quick as the second


if __name__ == "__main__":
    main()
