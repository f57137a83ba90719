# test_control_wire.py: requests on a control socket: what is taken, and how all else is refused.
from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.control import wire
from pyvmm.control.control import Control
from pyvmm.errors import BadInput, HostError, LifecycleError, MigrationError


def request(**fields):
    return wire.Request(wire.decode(json.dumps(fields).encode()))


def test_what_is_not_given_has_its_default():
    found = request(id=7, do="migrate", to="unix:/s", channels=8, bandwidth=None)
    assert (found.id, found.do) == (7, "migrate")
    assert found.arguments == {
        "to": "unix:/s", "mode": "precopy", "downtime": 0.02, "channels": 8, "bandwidth": None, "throttle": True,
        "tls_cert": None, "tls_key": None, "tls_ca": None, "capture": None,
    }  # fmt: skip


def test_a_whole_number_is_a_number():
    assert request(id="a", do="migrate", to="x", downtime=1).arguments["downtime"] == 1.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "a request has an id"),
        ({"id": -1, "do": "status"}, "a request has an id"),
        ({"id": True, "do": "status"}, "a request has an id"),
        ({"id": 1.5, "do": "status"}, "a request has an id"),
        ({"id": 1 << 53, "do": "status"}, "a request has an id"),
        ({"id": "x" * 65, "do": "status"}, "a request has an id"),
        ({"id": 1}, "a request says what to do"),
        ({"id": 1, "do": 3}, "a request says what to do"),
        (
            {"id": 1, "do": "fly"},
            'there is no command "fly": choose one of status, swap, balloon, migrate, cancel, abandon, pause',
        ),
        ({"id": 1, "do": "x" * 9999}, "there is no command"),
        ({"id": 1, "do": "status", "loud": 1}, 'status has no argument "loud": it takes none'),
        ({"id": 1, "do": "migrate", "too": "x"}, 'migrate has no argument "too": it takes to, mode,'),
        ({"id": 1, "do": "migrate"}, "migrate needs to"),
        ({"id": 1, "do": "migrate", "to": 5}, "to: 5 is not a text"),
        ({"id": 1, "do": "migrate", "to": ["x" * 9999]}, "is not a text"),
        ({"id": 1, "do": "migrate", "to": "x" * 4097}, "to: 4097 characters; 4096 are the most"),
        ({"id": 1, "do": "migrate", "to": "x", "mode": "warp"}, 'mode "warp": choose one of precopy, postcopy, hybrid'),
        ({"id": 1, "do": "migrate", "to": "x", "channels": 0}, "channels 0: give 1 to 8"),
        ({"id": 1, "do": "migrate", "to": "x", "channels": 9}, "channels 9: give 1 to 8"),
        ({"id": 1, "do": "migrate", "to": "x", "channels": 10**400}, "channels 1000"),
        ({"id": 1, "do": "migrate", "to": "x", "channels": True}, "channels: true is not a whole number"),
        ({"id": 1, "do": "migrate", "to": "x", "channels": 2.0}, "channels: 2.0 is not a whole number"),
        ({"id": 1, "do": "migrate", "to": "x", "downtime": "1"}, 'downtime: "1" is not a number'),
        ({"id": 1, "do": "migrate", "to": "x", "downtime": 0}, "downtime 0: give 0.0001 to 3600"),
        ({"id": 1, "do": "migrate", "to": "x", "bandwidth": 0}, "bandwidth 0: give 1 to"),
        ({"id": 1, "do": "migrate", "to": "x", "throttle": 1}, "throttle: 1 is not true or false"),
        ({"id": 1, "do": "stop", "status": 256}, "status 256: give 0 to 255"),
    ],
)
def test_what_cannot_be_is_named(fields, words):
    with pytest.raises(BadInput) as found:
        request(**fields)
    assert words in str(found.value)
    assert len(str(found.value)) < 200


@pytest.mark.parametrize(
    "line",
    [
        b"", b"hello", b"[1]", b"3", b"null", b'"x"', b"{", b'{"id": NaN}', b'{"id": -Infinity}', b"\xff\xfe",
        b"[" * 60000, b'{"a":' * 10000, b'{"id": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda line: f"{line[:8]!r}-{len(line)}",
)  # fmt: skip
def test_what_is_no_object_is_refused(line):
    with pytest.raises(BadInput, match="send one object a line"):
        wire.decode(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
NAMES = st.sampled_from([*wire.COMMANDS, *(a.name for table in wire.COMMANDS.values() for a in table), "x"])


@given(st.dictionaries(NAMES | st.just("id") | st.just("do"), JSON | NAMES))
def test_any_object_is_a_request_or_refused_in_one_line(fields):
    try:
        found = wire.Request(fields)
    except BadInput as error:
        line = wire.answer_error(1, error)
        assert line.count(b"\n") == 1
        assert json.loads(line)["code"] == 2
        return
    assert found.arguments.keys() == {argument.name for argument in wire.COMMANDS[found.do]}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BadInput("not so"), {"id": 3, "error": "not so", "code": 2}),
        (MigrationError("gone"), {"id": 3, "error": "gone", "code": 1}),
        (LifecycleError("not now"), {"id": 3, "error": "not now", "code": 1}),
        (HostError("two\nlines"), {"id": 3, "error": "two lines", "code": 1}),
        (KeyError("x"), {"id": 3, "error": "KeyError: 'x'", "code": 1}),
    ],
)
def test_an_error_is_one_line_with_a_status(error, line):
    assert json.loads(wire.answer_error(3, error)) == line


def test_each_command_is_done_by_something(tmp_path):
    with Control(None, str(tmp_path / "c")) as control:
        assert control._handlers.keys() == wire.COMMANDS.keys()
