# atheris_target.py: runs one Python target under atheris: `python atheris_target.py NAME [options of libFuzzer] [DIR]`.
"""The modules of pyvmm are instrumented as the target imports them; targets themselves know no fuzzer."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent


def main(name: str, arguments: list[str]) -> None:
    """Never comes back."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "unit")]
    with atheris.instrument_imports(include=["pyvmm"]):
        target = importlib.import_module(f"fuzz_{name}")

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        """Some as they come, most with checksums that are right, some changed by one who knows what they are."""
        what = seed % 8
        changed = target.mutate(data, random.Random(seed)) if what > 4 else atheris.Mutate(data, most)
        return (changed if what == 0 else target.repaired(changed))[:most]

    atheris.Setup([sys.argv[0], *arguments], target.one_input, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
