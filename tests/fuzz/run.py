# run.py: `make fuzz`: runs each target for some seconds, guided by coverage, and says what came of it. Python targets
# need atheris, C targets clang; what is found is kept in out/fuzz/.
"""`python tests/fuzz/run.py [--seconds N] [TARGET ...]`, or `TARGET --input FILE` for one input. Ends with 1 where
something was found, with 2 where a tool is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "out" / "fuzz"
PYTHON_TARGETS = ("frames", "shape", "capture", "snapshot", "image", "destination", "virtio")
# What each is made of, and a macro that one of these needs.
C_TARGETS = {
    "stream": ("checksum.c", "bits.c", "stream.c"),
    "blocks": ("checksum.c", "bits.c", "codec.c", "unpack.c", "load.c"),
}
RENAMED = {"stream.c": "-Drecvmsg=fuzz_recvmsg"}
C_FLAGS = ("-std=gnu11", "-g", "-O1", f"-I{ROOT / 'cffi_build'}")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
C_MAX_SIZE = {"stream": 4096, "blocks": 40_000}
LIMITS = ("-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1")
_PROGRESS = re.compile(rb"^#\d+\s.*?cov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)
_RUNS = re.compile(rb"stat::number_of_executed_units: (\d+)")
_SHOWN = 160
"""Bytes of an input that are printed."""


def build(
    name: str, place: Path, compiler: str, flags: tuple[str, ...], link_flags: tuple[str, ...], *more: str
) -> Path:
    """Compiles and links a C target, what it tests, and `more` files of this folder, in `place`."""
    sources = [ROOT / "cffi_build" / source for source in C_TARGETS[name]]
    objects = []
    for source in (*sources, *(HERE / source for source in (f"fuzz_{name}.c", *more))):
        objects.append(str(place / f"{source.stem}.o"))
        renamed = [RENAMED[source.name]] if source.name in RENAMED else []
        subprocess.run([compiler, *C_FLAGS, *flags, *renamed, "-c", str(source), "-o", objects[-1]], check=True)
    program = place / f"fuzz_{name}"
    subprocess.run([compiler, *flags, *link_flags, *objects, "-o", str(program), "-lpthread", "-ldl"], check=True)
    return program


def missing_tool(name: str) -> str:
    """What a target lacks, and how to get it; or nothing."""
    if name in C_TARGETS:
        return "" if shutil.which("clang") else "clang is missing: sudo apt-get install -y clang"
    if importlib.util.find_spec("atheris"):
        return ""
    with open(ROOT / "pyproject.toml", "rb") as file:
        (wanted,) = tomllib.load(file)["project"]["optional-dependencies"]["fuzz"]
    return f"atheris is missing: {os.path.relpath(sys.executable)} -m pip install '{wanted}'"


def module(name: str) -> object:
    """A module of this folder, which may import those of tests/unit."""
    for path in (str(HERE.parent / "unit"), str(HERE)):
        if path not in sys.path:
            sys.path.insert(0, path)
    return importlib.import_module(name)


def command(name: str) -> list[str]:
    """Begins the target, under its fuzzer."""
    if name in PYTHON_TARGETS:
        most = module(f"fuzz_{name}").MAX_SIZE
        return [sys.executable, str(HERE / "atheris_target.py"), name, f"-max_len={most}"]
    place = OUT / name
    place.mkdir(parents=True, exist_ok=True)
    program = build(name, place, "clang", ("-fsanitize=fuzzer-no-link", *SANITIZERS), ("-fsanitize=fuzzer",))
    return [str(program), f"-max_len={C_MAX_SIZE[name]}"]


def fuzz(name: str, seconds: int) -> bool:
    """Runs one target, and prints a line of what came of it, or what was found. Was nothing found?"""
    place = OUT / name
    seeds, corpus = place / "seeds", place / "corpus"
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir(parents=True)
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(module("seeds").SEEDS[name]()):
        (seeds / f"{number:03}").write_bytes(seed)
    before = set(place.glob("*-*"))
    line = [
        *command(name),
        f"-max_total_time={seconds}",
        f"-artifact_prefix={place}/",
        *LIMITS,
        str(corpus),
        str(seeds),
    ]
    print(f"{name:11} {seconds} s, {len(list(corpus.iterdir()))} inputs of earlier runs ...", end=" ", flush=True)
    log = place / "log"
    with open(log, "wb") as file:
        status = subprocess.run(
            line, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT, check=False
        ).returncode
    said = log.read_bytes()
    runs, steps = _RUNS.findall(said), _PROGRESS.findall(said)
    if runs and steps:
        cover, features, kept = (int(part) for part in steps[-1])
        print(f"{int(runs[-1]):,} runs; covers {cover} edges, {features} features; {kept} inputs kept")
    else:
        print("did not come to its end")
    if status == 0:
        return True
    _tell_finding(name, log, sorted(set(place.glob("*-*")) - before))
    return False


def _tell_finding(name: str, log: Path, found: list[Path]) -> None:
    for path in found:
        raw = path.read_bytes()
        print(
            f"  FOUND {path.relative_to(ROOT)}, {len(raw)} bytes: {raw[:_SHOWN]!r}{'...' if len(raw) > _SHOWN else ''}"
        )
        print(f"  again: {os.path.relpath(sys.executable)} tests/fuzz/run.py {name} --input {path.relative_to(ROOT)}")
    told = [text for text in log.read_text(errors="replace").splitlines() if _says_why(text)]
    print("\n".join(f"  | {text}" for text in told[-12:]))
    print(f"  all of it: {log.relative_to(ROOT)}")


def _says_why(line: str) -> bool:
    return bool(re.search(r"Error\b|File \"|not so:|runtime error|ERROR:|SUMMARY:|^    [^\s#]", line))


def one(name: str, path: str) -> int:
    """Runs a target on one input, a Python target without a fuzzer. Raises, or returns, what the target does."""
    if name in C_TARGETS:
        return subprocess.run([*command(name), path], check=False).returncode
    module(f"fuzz_{name}").one_input(Path(path).read_bytes())
    return 0


def main() -> int:
    """The command."""
    known = (*PYTHON_TARGETS, *C_TARGETS)
    parser = argparse.ArgumentParser(description="fuzz what reads hostile input, guided by coverage")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (%(default)s)")
    parser.add_argument("--input", metavar="FILE", help="run the one target on this input, and on nothing else")
    args = parser.parse_args()
    if unknown := [name for name in args.targets if name not in known]:
        parser.error(f"no target {unknown[0]!r}: choose from {', '.join(known)}")
    if args.seconds < 1:
        parser.error("--seconds: 1 or more")
    if args.input and len(args.targets) != 1:
        parser.error("--input: name the one target that it is for")
    if args.input:
        return one(args.targets[0], args.input)
    found, lacking = [], {}
    for name in args.targets or known:
        if why := missing_tool(name):
            lacking.setdefault(why, []).append(name)
        elif not fuzz(name, args.seconds):
            found.append(name)
    for why, names in lacking.items():
        print(f"not run: {', '.join(names)}: {why}")
    return 1 if found else 2 if lacking else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
