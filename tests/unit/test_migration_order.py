# test_migration_order.py: which frame may come when; shapes and what they differ in; addresses as people write them.
from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import BadInput, ProtocolError
from pyvmm.layout import GIB, MIB
from pyvmm.migration import frames
from pyvmm.migration.address import Address, parse_address
from pyvmm.migration.frames import CONTROL, MODES
from pyvmm.migration.order import _CANCEL, DESTINATION, PHASES, SOURCE, Order
from pyvmm.migration.shape import Shape, common, decode_shape, differences, refusal
from pyvmm.snapshot.states import decode, encode
from pyvmm.state import State

DOCUMENT = (Path(__file__).parents[2] / "docs/migration-protocol.md").read_text()

# ---- order ----


def hello(mode):
    return frames.Hello(bytes(16), bytes(32), MODES[mode], 1, 0, "", b"x")


WELCOME = frames.Welcome(0, 1, bytes(32))
STATE = frames.States(4, 0, b"abcd")
TAIL = [
    (DESTINATION, frames.Ready(0)), (SOURCE, frames.Commit()), (DESTINATION, frames.Taken()),
    (DESTINATION, frames.Complete(0)), (SOURCE, frames.Done()),
]  # fmt: skip
ROUNDS = [
    (SOURCE, frames.Large(0, 8, b"\xff")),
    (SOURCE, frames.Round(1, 9)), (DESTINATION, frames.RoundDone(1, 9)),
    (SOURCE, frames.Round(2, 3)), (DESTINATION, frames.RoundDone(2, 3)),
]  # fmt: skip
PIECES = [(SOURCE, frames.States(4, 0, b"ab")), (SOURCE, frames.States(4, 2, b"cd"))]
WHOLE = {
    "precopy": [*ROUNDS, *PIECES, (SOURCE, frames.Prepare(2, 0, 4, 0)), *TAIL],
    "postcopy": [(SOURCE, STATE), (SOURCE, frames.Prepare(0, 9, 4, 0)), *TAIL],
    "hybrid": [
        *ROUNDS, *PIECES, (SOURCE, frames.Away(0, 8, b"\1")), (SOURCE, frames.Away(8, 1, b"\1")),
        (SOURCE, frames.Prepare(2, 2, 4, 0)), *TAIL,
    ],
}  # fmt: skip


def ends():
    return {SOURCE: Order(SOURCE), DESTINATION: Order(DESTINATION)}


def play(both, steps):
    for sender, frame in steps:
        both[sender].sent(frame)
        assert both[DESTINATION if sender == SOURCE else SOURCE].came(frame)


def started(mode, steps=()):
    both = ends()
    play(both, [(SOURCE, hello(mode)), (DESTINATION, WELCOME), *steps])
    return both


@pytest.mark.parametrize("mode", MODES)
def test_whole_migrations(mode):
    both = started(mode, WHOLE[mode])
    assert {end.phase for end in both.values()} == {"ended"}
    assert both[DESTINATION].mode == mode


def test_the_table_is_that_of_the_document():
    text = DOCUMENT[DOCUMENT.index("| phase |") :].split("\n\n")[0]
    for phase, moves in PHASES.items():
        if not moves:
            continue
        row = re.search(rf"^\| {phase} \| (.*) \|$", text, re.MULTILINE)[1]
        told = set()
        for part in row.split("; "):
            left, following = part.split(" (")[0].split(" -> ") if " (" not in part else (part.split(" (")[0], phase)
            told |= {(side, name, following) for side, name in re.findall(r"([SD]) ([A-Z_]+)", left)}
        assert told == {(side[0].upper(), kind.name(), following) for (side, kind), following in moves.items()}, phase


@pytest.mark.parametrize("mode", MODES)
def test_what_is_out_of_turn_is_refused_at_every_point(mode):
    """At each point of a whole migration every other frame of both sides, by both ends, unless the table has it."""
    samples = [
        hello(mode), WELCOME, frames.Refuse("no"), frames.Source(1, 1, 1), frames.Large(0, 1, b"\1"), frames.Commit(),
        frames.Taken(), frames.Ready(0), frames.Complete(0), frames.Done(), frames.Have(0, 1, b"\1"),
        frames.Died(1, bytes(32)),
        frames.Resume(bytes(16), bytes(32), 1, 1), frames.Resumed(1, 1), frames.Join(bytes(16), bytes(32), 1, 0),
        frames.Joined(1, 0), frames.Cancel("x"), STATE, frames.Prepare(0, 0, 1, 0), frames.RoundDone(1, 1),
    ]  # fmt: skip
    steps = [(SOURCE, hello(mode)), (DESTINATION, WELCOME), *WHOLE[mode]]
    for done in range(len(steps) + 1):
        for frame in samples:
            for sender in (SOURCE, DESTINATION):
                both = ends()
                play(both, steps[:done])
                receiver = both[DESTINATION if sender == SOURCE else SOURCE]
                phase = receiver.phase
                allowed = (sender, type(frame)) in PHASES[phase] or (
                    isinstance(frame, frames.Cancel) and phase in _CANCEL[sender]
                )
                try:
                    receiver.came(frame)
                    came = True
                except ProtocolError:
                    came = False
                    assert receiver.phase == phase
                assert allowed or not came, (phase, sender, frame)


@given(st.lists(st.tuples(st.sampled_from([SOURCE, DESTINATION]), st.sampled_from(CONTROL)), max_size=30), st.data())
@settings(max_examples=50)
def test_no_order_of_frames_leads_past_the_commit(steps, data):
    """The destination is never in `running` without Commit, nor the source without Taken."""
    end = Order(data.draw(st.sampled_from([SOURCE, DESTINATION])))
    seen = set()
    for sender, kind in steps:
        fixed = {"id": bytes(16), "token": bytes(32), "resume": bytes(32), "proof": bytes(32), "resume_at": "",
                 "reason": "", "shape": b"x", "bits": b"\1", "data": b"x", "offset": 0, "first": 0,
                 "index": 0}  # fmt: skip
        frame = kind(**{name: fixed.get(name, 1) for name in kind.FIELDS})
        try:
            (end.sent if sender == end.side else end.came)(frame)
            seen.add(kind)
        except ProtocolError:
            pass
    if end.phase in ("running", "full"):
        assert {frames.Prepare, frames.Ready, frames.Commit, frames.Taken} <= seen


@pytest.mark.parametrize(
    ("mode", "before", "frame", "words"),
    [
        ("precopy", [], frames.Round(2, 1), "round 2 where 1 should come"),
        ("precopy", [(SOURCE, frames.Round(1, 1))], frames.RoundDone(2, 1), "round 2 where 1"),
        ("postcopy", [], frames.Round(1, 1), "no rounds"),
        ("precopy", [], frames.States(4, 1, b"x"), "from byte 1 on of 4, after 0 of 0"),
        ("precopy", [(SOURCE, frames.States(4, 0, b"x"))], frames.States(5, 1, b"x"), "of 5, after 1 of 4"),
        ("precopy", [(SOURCE, frames.States(4, 0, b"x"))], frames.Prepare(0, 0, 4, 0), "1 bytes of States"),
        ("precopy", [(SOURCE, STATE)], frames.Prepare(0, 0, 4, 0), "not one round"),
        ("precopy", [(SOURCE, STATE)], frames.Prepare(1, 0, 4, 0), "the last round is 0, not 1"),
        ("precopy", [*ROUNDS, *PIECES], frames.Prepare(2, 5, 4, 0), "5 pages away in precopy"),
        ("precopy", [*ROUNDS, *PIECES], frames.Away(0, 1, b"\1"), "nothing is away in precopy"),
        ("hybrid", [*ROUNDS, *PIECES], frames.Away(1, 1, b"\1"), "pages from 1 on, where 0"),
        ("postcopy", [(SOURCE, STATE)], frames.Prepare(0, 0, 4, 0), "0 pages away in postcopy"),
        ("postcopy", WHOLE["postcopy"][:5], frames.Have(0, 1, b"\1"), "nothing was broken"),
        ("precopy", [], frames.Taken(), "TAKEN from the destination in phase open"),
    ],
)  # fmt: skip
def test_what_contradicts_what_came_before(mode, before, frame, words):
    both = started(mode, before)
    sender = DESTINATION if type(frame) in (frames.RoundDone, frames.Have, frames.Taken) else SOURCE
    receiver = both[DESTINATION if sender == SOURCE else SOURCE]
    with pytest.raises(ProtocolError, match=re.escape(words)):
        receiver.came(frame)


def test_who_cancelled_ignores_what_was_on_its_way():
    both = started("precopy", [*ROUNDS, *PIECES, (SOURCE, frames.Prepare(2, 0, 4, 0))])
    both[SOURCE].sent(frames.Cancel("the downtime has become too long"))
    assert not both[SOURCE].came(frames.Ready(0))
    both[DESTINATION].sent(frames.Ready(0))
    both[DESTINATION].came(frames.Cancel("the downtime has become too long"))
    assert both[DESTINATION].phase == both[SOURCE].phase == "ended"
    both = started("precopy", [*ROUNDS, *PIECES, (SOURCE, frames.Prepare(2, 0, 4, 0)), *TAIL[:2]])
    with pytest.raises(ProtocolError, match="phase committed: we may not send"):
        both[SOURCE].sent(frames.Cancel("too late"))


def test_after_a_break():
    both = started("postcopy", [*WHOLE["postcopy"][:5]])
    for end in both.values():
        assert end.phase == "running"
        end.resumed("running")
    play(both, [(DESTINATION, frames.Have(0, 8, b"\1")), (DESTINATION, frames.Have(8, 1, b"\1"))])
    with pytest.raises(ProtocolError, match="from 8 on, where 9 should come"):
        both[SOURCE].came(frames.Have(8, 1, b"\1"))
    with pytest.raises(ProtocolError, match="cannot be handed over once more"):
        both[DESTINATION].resumed("ready")
    again = started("precopy", WHOLE["precopy"][:9])
    assert again[SOURCE].phase == "ready"
    again[SOURCE].sent(frames.Commit())  # and lost
    for end in again.values():
        end.resumed("ready")
    play(again, TAIL[1:])
    for phase in ("open", "ended"):
        with pytest.raises(ProtocolError):
            started("precopy")[SOURCE].resumed(phase)


# ---- shapes ----

BASE = {
    "memory": 4 * GIB, "cpus": 2, "states": {"vm": 1, "vcpu": 1}, "tsc_khz": 2_000_000, "xsave_size": 4096,
    "codecs": ("raw", "lz4"),
}  # fmt: skip


def shape(**changed):
    return Shape(**{**BASE, **changed})


def test_a_shape_there_and_back():
    for each in (shape(), shape(memory=2 * MIB, backing="4k", codecs=()), shape(hugetlb=True, states={})):
        assert decode_shape(each.encode()) == each
    assert len(shape().regions) == 2


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"memory": 2 * GIB}, "RAM: 2G there, 4G here"),
        ({"regions": ((0, 4 * GIB),)}, "RAM regions: 4G@0x0 there, 3G@0x0+1G@0x100000000 here"),
        ({"cpus": 3}, "vCPUs: 3 there, 2 here"),
        ({"backing": "4k"}, "page backing: 4k there, auto here"),
        ({"hugetlb": True}, "hugetlb: True there, False here"),
        ({"states": {"vm": 1, "vcpu": 2}}, "states of vcpu: version 2 there, version 1 here"),
        ({"states": {"vm": 1}}, "states of vcpu: none there, version 1 here"),
        ({"states": {"vm": 1, "vcpu": 1, "block": 3}}, "states of block: version 3 there, none here"),
        ({"tsc_khz": 2_000_501}, "TSC kHz: 2000501 there, 2000000 here"),
        ({"xsave_size": 8192}, "bytes of XSAVE state: 8192 there, 4096 here"),
    ],
)
def test_each_difference_is_named(changed, line):
    assert differences(shape(**changed), shape()) == [line]
    assert refusal([line]) == f"the VMs differ in {line}"


def test_what_is_no_difference():
    assert differences(shape(), shape()) == []
    assert differences(shape(tsc_khz=2_000_500, codecs=("zstd",)), shape()) == []
    assert differences(shape(tsc_khz=3_000_000), shape(), tsc_scaling=True) == []
    assert common(("zstd", "raw"), ("raw", "lz4", "zstd")) == ("raw", "zstd")
    assert len(refusal([f"states of {'x' * 64}: none there, version 1 here"] * 256)) == 1000


@pytest.mark.parametrize(
    "changed",
    [
        {"memory": 4097}, {"memory": 0}, {"memory": True}, {"memory": 1 << 50}, {"regions": []}, {"regions": [0]},
        {"regions": [0, 4 * GIB, 0, 4096]}, {"regions": [0, 5]}, {"regions": [4096, GIB, 0, 3 * GIB]}, {"regions": "x"},
        {"regions": [-4096, 4 * GIB]}, {"cpus": 0}, {"cpus": True}, {"cpus": 5000}, {"backing": "1g"}, {"backing": 1},
        {"hugetlb": 1}, {"states": []}, {"states": {"vm": 0}}, {"states": {"vm": True}}, {"states": {"a\nb": 1}},
        {"states": {"x" * 65: 1}}, {"codecs": [1]}, {"codecs": ["é"]}, {"codecs": "raw"}, {"tsc_khz": 0}, {"more": 1},
        {"xsave_size": 1 << 21},
    ],
)  # fmt: skip
def test_hostile_shapes(changed):
    state = decode(shape().encode())
    state.fields.update(changed)
    with pytest.raises(ProtocolError):
        decode_shape(encode(state))


def test_what_is_no_shape():
    del (lacking := decode(shape().encode())).fields["cpus"]
    for raw in (b"", b"S", shape().encode()[:-1], encode(State("vm", 1, {})), encode(lacking), bytes(1 << 20)):
        with pytest.raises(ProtocolError):
            decode_shape(raw)
    with pytest.raises(ProtocolError, match="version 2, and this pyvmm knows version 1"):
        decode_shape(encode(State("shape", 2, {})))


def test_what_is_said_of_a_shape_fits_into_refuse():
    """Also where names in it are as long as it may be: the other side is to be told."""
    name = b"s" + (30_000).to_bytes(4, "little") + b"\x1b" * 30_000
    twice = b"S\5\0\0\0shape\1\0\0\0\2\0\0\0" + 2 * (name[1:] + b"T")
    for raw in (encode(State("x" * 60_000, 1, {})), encode(State("\n" * 60_000, 1, {})), twice):
        with pytest.raises(ProtocolError, match="shape in HELLO") as error:
            decode_shape(raw)
        frames.Refuse(str(error.value))


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_shapes(tail, keep):
    with suppress(ProtocolError):
        decode_shape(shape().encode()[:keep] + tail)


# ---- addresses ----


@pytest.mark.parametrize(
    ("text", "address", "shown", "loopback"),
    [
        ("tcp:127.0.0.1:80", Address("tcp", "127.0.0.1", 80), "tcp:127.0.0.1:80", True),
        ("tcp:80", Address("tcp", "127.0.0.1", 80), "tcp:127.0.0.1:80", True),
        ("tcp::80", Address("tcp", "127.0.0.1", 80), "tcp:127.0.0.1:80", True),
        ("tcp:[::1]:80", Address("tcp", "::1", 80), "tcp:[::1]:80", True),
        ("tcp:LocalHost:80", Address("tcp", "LocalHost", 80), "tcp:LocalHost:80", True),
        ("tcp:0.0.0.0:80", Address("tcp", "0.0.0.0", 80), "tcp:0.0.0.0:80", False),
        ("tcp:[2001:db8::1]:80", Address("tcp", "2001:db8::1", 80), "tcp:[2001:db8::1]:80", False),
        ("tcp:host.example:65535", Address("tcp", "host.example", 65535), "tcp:host.example:65535", False),
        ("unix:/a b/c:d", Address("unix", path="/a b/c:d"), "unix:/a b/c:d", True),
        ("local:x", Address("local", path="x"), "local:x", True),
    ],
)
def test_addresses(text, address, shown, loopback):
    assert parse_address(text) == address
    assert (str(address), address.loopback) == (shown, loopback)
    assert parse_address(shown) == address
    assert bool(address.warning(tls=False)) == (not loopback)
    assert not address.warning(tls=True)


@pytest.mark.parametrize(
    "text",
    [
        "", "tcp", "tcp:", "tcp:x", "tcp:h:", "tcp:h:65536", "tcp:h:-1", "tcp:h:+1", "tcp:h: 1", "tcp:h:1e3",
        "tcp:h:٣", "tcp:::1:80", "tcp:[::1]80", "tcp:[::g]:80", "tcp:[]:80", "tcp:a b:80", "tcp:a/b:80", "tcp:h:0",
        "tcp:" + "h" * 254 + ":80", "udp:h:80", "unix", "unix:", "unix:a\0b", "unix:" + "x" * 108, "local:",
        "unix:\ud800", "/a/b",
    ],
)  # fmt: skip
def test_what_is_no_address(text):
    with pytest.raises(BadInput):
        parse_address(text)


def test_port_zero_is_for_listening():
    assert parse_address("tcp:0", listening=True).port == 0


@given(st.text(max_size=30), st.sampled_from(["", "tcp:", "unix:", "tcp:h:"]))
def test_any_text_is_an_address_or_named(text, start):
    try:
        address = parse_address(start + text, listening=True)
    except BadInput:
        return
    assert parse_address(str(address), listening=True) == address
