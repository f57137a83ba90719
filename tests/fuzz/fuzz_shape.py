# fuzz_shape.py: the shape in a HELLO, hostile, and the tree of states in which it is encoded.
"""`one_input()`; `repaired()` and `mutate()` for fuzzers."""

from __future__ import annotations

import random

from checks import one_line

from pyvmm.errors import ProtocolError, StateError
from pyvmm.migration.frames import Refuse
from pyvmm.migration.shape import Shape, common, decode_shape, differences, refusal
from pyvmm.snapshot import states
from pyvmm.state import State

MAX_SIZE = 4096
OURS = Shape(2 << 20, 1, {"vm": 1, "vcpu": 2}, 2_000_000, 4096, codecs=("zstd", "raw"))
_INTEGERS = (-1, 0, 1, 512, 4096, 2 << 20, 3 << 30, 4 << 30, 1 << 32, 1 << 40, 1 << 52, 1 << 64, 1 << 247)


def one_input(data: bytes) -> None:
    """What is refused is said in words that fit into REFUSE; what is taken is encoded and compared without harm."""
    try:
        tree = states.decode(data)
    except StateError as error:
        one_line(error)
    else:
        assert states.decode(states.encode(tree)) == tree
    try:
        shape = decode_shape(data)
    except ProtocolError as error:
        Refuse(str(error))
        return
    assert decode_shape(shape.encode()) == shape
    assert differences(shape, shape) == []
    for scaling in (True, False):
        Refuse(refusal(differences(shape, OURS, scaling)))
        Refuse(refusal(differences(OURS, shape, scaling)))
    assert set(common(shape.codecs, OURS.codecs)) <= set(shape.codecs)


# ---- for fuzzers ----


def repaired(data: bytes) -> bytes:
    """There is no checksum in it."""
    return data


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Another value in the tree, whose counts and lengths stay right."""
    try:
        tree = states.decode(data)
    except StateError:
        tree = states.decode(OURS.encode())
    if rng.random() < 0.1:
        tree.kind, tree.version = rng.choice((("shape", 2), ("x" * rng.randrange(2000), 1), ("shape", 0)))
    else:
        _change(tree.fields, rng)
    try:
        return states.encode(tree)
    except StateError:
        return data


def _change(held: dict | list, rng: random.Random) -> None:
    """Something in a table or list; or in one that it holds."""
    keys = list(held) if isinstance(held, dict) else list(range(len(held)))
    if not keys or rng.random() < 0.1:
        if isinstance(held, dict):
            held[rng.choice(("", "vcpu", "vm\n", "x" * 70, "y" * 900))] = _value(rng)
        else:
            held.insert(rng.randint(0, len(held)), _value(rng))
        return
    key = rng.choice(keys)
    inner = held[key].fields if isinstance(held[key], State) else held[key]
    if isinstance(inner, (dict, list)) and rng.random() < 0.8:
        _change(inner, rng)
    elif rng.random() < 0.2:
        del held[key]
    else:
        held[key] = _value(rng)


def _value(rng: random.Random) -> object:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(_INTEGERS) + rng.choice((-1, 0, 0, 1, 4096))
    if kind == 1:
        return rng.choice((True, False))
    if kind == 2:
        return rng.choice(("auto", "4k", "raw", "", "x" * 65, "\x1b[m", "\u2028"))
    if kind == 3:
        return rng.randbytes(rng.randrange(20))
    if kind == 4:
        return [rng.choice(_INTEGERS[1:]) for _ in range(rng.randrange(8))]
    return State("s" * rng.randrange(3), rng.randrange(3), {"k": rng.choice(_INTEGERS)})
