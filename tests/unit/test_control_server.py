# test_control_server.py: the control socket and its clients: hasty, slow, mad, many; none disturbs the others.
from __future__ import annotations

import json
import os
import select
import socket
import stat
import threading
from contextlib import ExitStack, suppress

import pytest
from control_help import PATIENCE, until
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.control import server, wire
from pyvmm.control.client import Client
from pyvmm.control.server import Server
from pyvmm.errors import BadInput, ControlError, LifecycleError


def serve(request, reply):
    """Stands for a VM: `pause` fails, `resume` is a fault of ours, `cancel` tells much."""
    if request.do == "pause":
        raise LifecycleError("not now")
    if request.do == "resume":
        raise ZeroDivisionError("ours")
    if request.do == "cancel":
        reply.event({"text": "x" * 30000})
    reply.result({"did": request.do})


@pytest.fixture
def listening(tmp_path):
    """The path of a server that is closed in the end, with nothing left of it."""
    before = set(threading.enumerate())
    made = Server(str(tmp_path / "c"), serve)
    yield str(tmp_path / "c")
    made.close()
    made.close()
    assert os.listdir(tmp_path) == []
    assert set(threading.enumerate()) == before


def connected(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(path)
    return sock


def lines(sock):
    """All that comes until the other side closes, perhaps without having read all of ours."""
    data = b""
    with suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return [json.loads(line) for line in data.splitlines()]


def ask(number, do="status"):
    return wire.encode({"id": number, "do": do})


def works(path):
    with Client(path) as client:
        assert client.ask("status") == {"did": "status"}


def test_it_is_for_its_user_alone(listening):
    mode = os.stat(listening).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    with pytest.raises(BadInput, match=f"control socket {listening}: somebody listens there already"):
        Server(listening, serve)
    works(listening)


def test_answers_come_in_order_and_bear_the_requests_id(listening):
    with connected(listening) as sock:
        sock.sendall(b"".join(ask(number) for number in range(100)) + b"\n  \n" + ask("last"))
        sock.shutdown(socket.SHUT_WR)
        assert [line["id"] for line in lines(sock)] == [*range(100), "last"]


def test_errors_are_answers_and_the_connection_stays(listening):
    with connected(listening) as sock:
        sock.sendall(b"?\n" + ask(1, "fly") + b'{"do": "status"}\n' + ask(2, "pause") + ask(3, "resume") + ask(4))
        sock.shutdown(socket.SHUT_WR)
        found = lines(sock)
    assert [(line["id"], line.get("code")) for line in found] == [
        (None, 2),
        (1, 2),
        (None, 2),
        (2, 1),
        (3, 1),
        (4, None),
    ]
    assert found[3]["error"] == "not now"
    assert found[4]["error"] == "ZeroDivisionError: ours"


def test_what_was_asked_is_done_also_for_one_who_left(tmp_path):
    done = threading.Event()
    made = Server(str(tmp_path / "c"), lambda request, reply: (reply.result({}), done.set()))
    with connected(str(tmp_path / "c")) as sock:
        sock.sendall(ask(1))
    assert done.wait(PATIENCE)
    made.close()


def test_a_line_without_end_is_refused(listening):
    with connected(listening) as sock:
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b" " * (2 * wire.MAX_LINE))
        (found,) = lines(sock)
    assert f"a line of more than {wire.MAX_LINE} bytes" in found["error"]
    works(listening)


@pytest.mark.parametrize("more", [-1, 0])
@pytest.mark.parametrize("before", [b"", ask(0)])  # with it the end is read with what is too much
def test_the_longest_line(listening, more, before):
    line = ask(1)[:-1]
    with connected(listening) as sock:
        sock.sendall(before + line + b" " * (wire.MAX_LINE + more - len(line)) + b"\n")
        sock.shutdown(socket.SHUT_WR)
        found = lines(sock)
    assert len(found) == (2 if before else 1)
    assert any("error" in line for line in found) == (more == 0)


def test_one_too_many_is_told_so(listening):
    with ExitStack() as stack:
        for _ in range(server.MAX_CLIENTS):
            stack.enter_context(Client(listening)).ask("status")
        with connected(listening) as ninth:
            (found,) = lines(ninth)
        assert found == {"id": None, "error": "8 clients are here already: try later", "code": 2}
        with Client(listening) as client, pytest.raises(BadInput, match="8 clients are here already"):
            client.ask("status")
    until(lambda: free(listening))


def free(path):
    with suppress(BadInput, ControlError), Client(path) as client:
        return client.ask("status") == {"did": "status"}
    return False


def ask_without_end(sock):
    for number in range(100_000):
        sock.sendall(ask(number, "cancel"))


def test_one_who_does_not_read_is_dropped(listening, monkeypatch):
    monkeypatch.setattr(server, "MAX_UNREAD", 100_000)
    with connected(listening) as mad:
        mad.settimeout(server.STALL / 2)  # it is not that for which it is dropped
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ask_without_end(mad)
    works(listening)


def test_one_who_reads_nothing_for_long_is_dropped(listening, monkeypatch):
    monkeypatch.setattr(server, "STALL", 0.1)
    with connected(listening) as mad:
        mad.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(server.MAX_OPEN - 1):
            mad.sendall(ask(number, "cancel"))
        works(listening)
        assert gone(mad)


def gone(sock):
    """Has the other side closed? Without reading any of what came."""
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    return bool(poll.poll(PATIENCE * 1000))


def test_one_whose_request_takes_long_holds_nobody(tmp_path):
    go = threading.Event()

    def slow(request, reply):
        if request.do == "pause":
            assert go.wait(PATIENCE)
        serve(request, reply) if request.do == "status" else reply.result({})

    path = str(tmp_path / "c")
    made = Server(path, slow)
    with connected(path) as sock:
        for number in range(3 * server.MAX_OPEN):
            sock.sendall(ask(number, "pause"))
        for _ in range(3):
            works(path)
        go.set()
        sock.shutdown(socket.SHUT_WR)
        assert len(lines(sock)) == 3 * server.MAX_OPEN
    made.close()


def test_no_more_is_read_of_one_with_much_to_answer(tmp_path):
    go = threading.Event()
    made = Server(str(tmp_path / "c"), lambda request, reply: go.wait(PATIENCE) and reply.result({}))
    with connected(str(tmp_path / "c")) as sock:
        sock.setblocking(False)
        poll, sent = select.poll(), 0
        poll.register(sock, select.POLLOUT)
        while poll.poll(200):  # longer than the server takes to read on, if it does
            with suppress(BlockingIOError):
                sent += sock.send(ask(1) * 1000)
            assert sent < 4 << 20
        go.set()
    made.close()


def test_what_is_asked_when_it_closes_is_answered_and_what_waits_is_not(tmp_path):
    begun, go, done = threading.Event(), threading.Event(), []

    def slow(request, reply):
        begun.set()
        assert go.wait(PATIENCE)
        done.append(request.id)
        reply.result({})

    made = Server(str(tmp_path / "c"), slow)
    with connected(str(tmp_path / "c")) as sock:
        sock.sendall(ask(1))
        assert begun.wait(PATIENCE)
        closing = threading.Thread(target=made.close)
        closing.start()
        go.set()
        assert [line["id"] for line in lines(sock)] == [1]
        closing.join(PATIENCE)
    assert done == [1]


JUNK = st.lists(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=40).map(str.encode),
        st.dictionaries(st.sampled_from(["id", "do", "to", "x"]), st.integers() | st.text(max_size=9), max_size=4).map(
            lambda fields: json.dumps(fields).encode()
        ),
        st.just(ask(1)),
        st.just(b"\n"),
    ),
    max_size=12,
)


def test_no_lines_kill_it(listening):
    @given(JUNK, st.booleans())
    @settings(max_examples=60, deadline=None)
    def send(pieces, ends):
        data = b"".join(pieces)
        with connected(listening) as sock:
            sock.sendall(data)
            if ends:
                sock.shutdown(socket.SHUT_WR)
                asked = [line for line in data.split(b"\n") if line.strip()]
                assert len(lines(sock)) == len(asked)
        until(lambda: free(listening))

    send()


# ---- the client ----


def test_nobody_there(tmp_path):
    path = str(tmp_path / "c")
    with pytest.raises(BadInput, match=f"nobody listens at {path}: start the guest with --control {path}"):
        Client(path)
    with pytest.raises(BadInput, match="the path of a socket has 107 bytes at most"):
        Client("x" * 108)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("folder", "file"):
        with pytest.raises(BadInput, match=r"nobody listens at|give the path of a guest's control socket"):
            Client(str(tmp_path / path))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "whoever listened there has gone"),
        (b'{"id": 1', "whoever listened there has gone"),
        (b"hello\n", "answers in a way that no VM"),
        (b"[1]\n", "answers in a way that no VM"),
        (b"[" * 100_000 + b"\n", "answers in a way that no VM"),
        (b'{"id": 2, "result": {}}\n', "whoever listened there has gone"),
        (b'{"id": 1, "error": "because"}\n', "because"),
    ],
)
def test_answers_that_are_none(tmp_path, answer, words):
    path = str(tmp_path / "c")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()

        def reply():
            sock, _ = other.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with Client(path) as client, pytest.raises(ControlError, match=words):
            client.ask("status")
        thread.join(PATIENCE)


def test_an_answer_that_never_comes(tmp_path):
    path = str(tmp_path / "c")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with Client(path, timeout=0.05) as client, pytest.raises(ControlError, match=r"does not answer within 0\.05 s"):
            client.ask("status")


def test_a_client_checks_before_it_asks(listening):
    with Client(listening) as client:
        with pytest.raises(BadInput, match="there is no command"):
            client.ask("fly")
        with pytest.raises(BadInput, match="channels 9"):
            client.stream("migrate", to="x", channels=9)
        assert [len(event["text"]) for event in client.stream("cancel")] == [30000]
