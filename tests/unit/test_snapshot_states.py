# test_snapshot_states.py: trees of State in bytes and back; what is no such tree is refused by our own errors alone.
from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvmm.errors import StateError
from pyvmm.snapshot import states
from pyvmm.state import State

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
plain = st.one_of(st.integers(-(1 << 255), (1 << 255) - 1), st.binary(max_size=40), text, st.booleans())
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(text, inner, max_size=4),
        st.builds(State, text, st.integers(0, (1 << 32) - 1), st.dictionaries(text, inner, max_size=4)),
    ),
    max_leaves=20,
)
trees = st.builds(State, text, st.integers(0, (1 << 32) - 1), st.dictionaries(text, values, max_size=5))


def same(a, b):
    """Equal, and of the same types: True is not 1."""
    if type(a) is not type(b):
        return False
    if isinstance(a, State):
        return (a.kind, a.version) == (b.kind, b.version) and same(a.fields, b.fields)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(trees)
@example(State("", 0, {"a": [0, False, -1, 1 << 63, -(1 << 63), (1 << 64) - 1, b"", "", [], {}, True]}))
def test_what_goes_in_comes_out(tree):
    assert same(states.decode(states.encode(tree)), tree)


@given(trees, st.data())
def test_a_part_of_it_is_refused(tree, data):
    raw = states.encode(tree)
    with pytest.raises(StateError):
        states.decode(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(StateError, match="follows"):
        states.decode(raw + b"T")


@given(trees, st.data())
def test_a_changed_byte_raises_only_our_errors(tree, data):
    raw = bytearray(states.encode(tree))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = states.decode(bytes(raw))
    except StateError:
        return
    assert isinstance(found, State)


pieces = st.sampled_from([b"S", b"l", b"d", b"i", b"b", b"s", b"T", b"\0", b"\1\0\0\0", b"\0\0\0\0", b"\xff" * 4])


@given(st.one_of(st.binary(max_size=200), st.lists(pieces).map(b"".join)))
def test_noise_raises_only_our_errors(noise):
    try:
        found = states.decode(noise)
    except StateError:
        return
    assert isinstance(found, State)


def number(value):
    return value.to_bytes(4, "little")


def state_of(value):
    """A state whose one field is these bytes."""
    return b"S" + number(1) + b"k" + number(1) + number(1) + number(1) + b"f" + value


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "1 bytes are said to follow"),
        (b"T", "begin with a state"),
        (state_of(b"x"), "no value begins with"),
        (state_of(b"b" + number(1 << 31)), "2147483648 bytes are said to follow"),
        (state_of(b"l" + number(0xFFFF_FFFF)), "4294967295 items"),
        (state_of(b"d" + number(0x7FFF_FFFF)), "items"),
        (state_of(b"i\0"), "an integer of 0 bytes"),
        (state_of(b"i\xff" + b"1" * 255), "an integer of 255 bytes"),
        (state_of(b"s" + number(1) + b"\xff"), "UTF-8"),
        (state_of((b"l" + number(1)) * 1000 + b"T"), "more than 32 levels"),
        (state_of(b"l" + number(1 << 21) + b"T" * (1 << 21)), "1048576 values"),
        (state_of(b"d" + number(2) + (number(1) + b"a" + b"T") * 2), "'a' comes twice"),
        (bytes(states.MAX_STATES + 1), "holds 67108864 at most"),
    ],
)
def test_what_is_wrong_is_named(raw, named):
    with pytest.raises(StateError, match=named) as error:
        states.decode(raw)
    assert "\n" not in str(error.value)


def nested(levels):
    value = True
    for _ in range(levels):
        value = [value]
    return State("k", 1, {"f": value})


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        (State("k", 1, {"f": None}), "k.f: a state cannot hold a NoneType"),
        (State("k", 1, {"f": [1, {"g": 1.5}]}), r"k.f\[1\].g: .* float"),
        (State("k", 1, {"f": 1 << 256}), "k.f: an integer of more than 32 bytes"),
        (State("k", -1, {}), "version -1"),
        (State("k", 1, {"\udc80": 1}), "not Unicode"),
        (State("k", 1, {3: 1}), "a name that is a int"),
        (nested(32), "more than 32 levels"),
    ],
)
def test_what_cannot_be_saved_is_named(tree, named):
    with pytest.raises(StateError, match=named):
        states.encode(tree)


def test_the_deepest_that_can_be_saved_can_be_read():
    assert states.decode(states.encode(nested(31))) == nested(31)
