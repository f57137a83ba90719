# test_migration_transport.py: who listens and who connects, by TCP, TLS, UNIX sockets; peers that stall, go or lie.
from __future__ import annotations

import os
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest

from pyvmm._native import ffi
from pyvmm.errors import BadInput, HostError, LifecycleError, MigrationError, PeerGone, ProtocolError
from pyvmm.migration import pump
from pyvmm.migration.accepting import Acceptor
from pyvmm.migration.address import parse_address
from pyvmm.migration.connection import Connection
from pyvmm.migration.decision import Decision, Watch
from pyvmm.migration.frames import Cancel, Hello, Join, Joined, Ping, Pong, States, encode
from pyvmm.migration.opening import Terms, Ways
from pyvmm.migration.order import DESTINATION, SOURCE
from pyvmm.migration.pages import Arrivals, PageChannel
from pyvmm.migration.tls import Tls
from pyvmm.migration.transport import connect, listen

PAGE = 4096


def at(text):
    return parse_address(text, listening=True)


def accepted(listener, results):
    try:
        results.append(listener.accept(5, handshake=2))
    except MigrationError as error:
        results.append(error)


@contextmanager
def both(address, ours=None, theirs=None):
    """(source's connection, destination's), or the error of either in its place."""
    with ExitStack() as stack:
        listener = stack.enter_context(listen(address, theirs))
        results = []
        thread = threading.Thread(target=accepted, args=(listener, results))
        thread.start()
        try:
            out = stack.enter_context(connect(listener.address, ours, 2))
        except MigrationError as error:
            out = error
        thread.join()
        (into,) = results
        if isinstance(into, Connection):
            stack.enter_context(into)
        yield out, into


@pytest.fixture(params=["tcp", "tcp6", "unix", "local", "tls"])
def ends(request, tmp_path):
    address = {"tcp": "tcp:0", "tcp6": "tcp:[::1]:0", "tls": "tcp:0"}.get(request.param)
    tls = request.getfixturevalue("tls") if request.param == "tls" else None
    options = (tls("source"), tls("destination")) if tls else ()
    with both(at(address or f"{request.param}:{tmp_path}/s"), *options) as (out, into):
        assert out.secure == into.secure == (tls is not None)
        yield out, into


def flood(connection, timeout):
    """More than any socket holds."""
    for _ in range(1000):
        connection.send(States(1 << 20, 0, bytes(1 << 20)), timeout)


def test_frames_both_ways(ends):
    out, into = ends
    big = States(1 << 20, 0, os.urandom(1 << 20))
    sender = threading.Thread(target=out.send, args=(big,))
    sender.start()
    assert into.recv() == big
    sender.join()
    for number in range(50):
        out.send(Ping(number))
        assert into.recv() == Ping(number)
        into.send(Pong(number))
    assert [out.recv() for _ in range(50)] == [Pong(number) for number in range(50)]
    assert out.sequences == (51, 50)


def test_who_says_nothing_is_not_waited_for(ends):
    out, into = ends
    with pytest.raises(PeerGone, match="stalled"):
        into.recv(0.02)
    out._socket.send(encode(Ping(1), 0)[:-1])
    with pytest.raises(PeerGone, match="stalled"):  # in the midst of a frame
        into.recv(0.02)
    with pytest.raises(PeerGone, match="stalled"):
        flood(out, 0.02)


def test_who_goes(ends):
    out, into = ends
    out.send(Cancel("enough"))
    out.close()
    assert into.recv() == Cancel("enough")
    with pytest.raises(PeerGone, match=r"closed the connection|broke the connection off"):
        into.recv()
    with pytest.raises(PeerGone):
        flood(into, 5)
    with pytest.raises(PeerGone):
        out.send(Ping(1))


def test_garbage(ends):
    out, into = ends
    out._socket.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ProtocolError, match=r"the source.*not a frame of pyvmm"):
        into.recv()


def test_another_thread_ends_a_wait(ends):
    _, into = ends
    waiting, errors = threading.Event(), []

    def wait():
        waiting.set()
        try:
            into.recv(30)
        except PeerGone as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    into.end()
    thread.join()
    assert len(errors) == 1


def test_pages(ends):
    """Over each transport, after frames, in several rounds, and the connection ends in order."""
    pages = 600
    source, target = bytearray(os.urandom(8) * 512 * pages), bytearray(pages * PAGE)
    source[70 * PAGE : 90 * PAGE] = bytes(20 * PAGE)
    out, into = ends
    out.send(Ping(1))
    into.recv()
    arrivals = Arrivals(pages)
    sending = PageChannel(out, ffi.from_buffer("uint8_t[]", source), pages)
    receiving = PageChannel(into, ffi.from_buffer("uint8_t[]", target), pages)
    results = []
    for number in (1, 2):
        arrivals.begin(number)
        thread = threading.Thread(target=lambda: results.append(receiving.receive(arrivals, 1 << 20)))
        thread.start()
        sending.send([(0, pages)], number)
        sending.send_end(number, pages)
        thread.join()
    assert results == [pages, pages]
    assert source == target
    assert sending.stream.zero_pages == receiving.stream.zero_pages == 40
    sending.close()
    with pytest.raises(PeerGone):
        receiving.receive(arrivals, 1)
    receiving.close()


# ---- TLS ----


def test_tls_by_name(tls):
    with both(at("tcp:0"), tls("source", name="moon.example"), tls("destination")) as (out, into):
        out.send(Ping(1))
        assert into.recv() == Ping(1)
        assert out._socket.version() == "TLSv1.3"
    with both(at("tcp:0"), tls("source", name="mars.example"), tls("destination")) as (out, into):
        assert "its certificate is not believed" in str(out)
        assert "mars.example" in str(out)
        assert isinstance(into, MigrationError)


def refused(out):
    """What the source is told: TLS 1.3 lets it find out only when it reads."""
    if isinstance(out, MigrationError):
        return str(out)
    with pytest.raises(MigrationError) as error:
        out.recv(2)
    return str(error.value)


def test_a_stalled_side_holds_nobody_up(tls, monkeypatch):
    monkeypatch.setattr(pump, "LINGER", 0.05)
    ram = bytearray(os.urandom(8) * 512 * 512)
    with both(at("tcp:0"), tls("source"), tls("destination")) as (out, into):
        before = set(threading.enumerate())
        channel = PageChannel(out, ffi.from_buffer("uint8_t[]", ram), 512, timeout=0.05)
        (thread,) = set(threading.enumerate()) - before
        with pytest.raises(PeerGone, match="stalled"):
            channel.send([(0, 512)] * 300, 1)
        channel.close()
        thread.join(10)
        assert not thread.is_alive()
        assert into.fileno() >= 0


def test_who_is_not_believed(tls):
    with both(at("tcp:0"), tls("stranger", "ca"), tls("destination")) as (out, into):
        assert "its certificate is not believed" in str(into)
        assert "does not believe our certificate" in refused(out)
    with both(at("tcp:0"), tls("source"), tls("stranger", "other-ca")) as (out, into):
        assert "its certificate is not believed" in str(out)
        assert "does not believe our certificate" in str(into)


def test_who_has_no_certificate(tls, certificates):
    anonymous = tls("source")
    anonymous._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous._client.load_verify_locations(certificates["ca.crt"])
    with both(at("tcp:0"), anonymous, tls("destination")) as (out, into):
        assert "showed no certificate: start it with --tls-cert" in str(into)
        assert "asks for a certificate" in refused(out)


def test_an_older_tls(tls):
    old = tls("source")
    old._client.minimum_version = ssl.TLSVersion.TLSv1_2
    old._client.maximum_version = ssl.TLSVersion.TLSv1_2
    with both(at("tcp:0"), old, tls("destination")) as (out, into):
        assert isinstance(out, MigrationError)
        assert "does not speak TLS 1.3" in str(into)


def test_who_does_not_speak_tls(tls):
    with listen(at("tcp:0"), tls("destination")) as listener:
        for begun in (b"", b"\x16"):
            with connect(listener.address) as out:
                out._socket.send(begun)
                with pytest.raises(PeerGone, match="stalled in the TLS handshake"):
                    listener.accept(5, handshake=0.02)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n"):
            with connect(listener.address) as out:
                if words:
                    out._socket.send(words)
                else:
                    out.close()
                with pytest.raises(MigrationError, match=r"does not speak TLS|broke the connection off"):
                    listener.accept(5, handshake=2)
        with ExitStack() as stack:  # and the next one is served
            results = []
            thread = threading.Thread(target=accepted, args=(listener, results))
            thread.start()
            stack.enter_context(connect(listener.address, tls("source")))
            thread.join()
            assert stack.enter_context(results[0]).secure


def test_a_witness_joins_without_tls(tls):
    """And nobody else does."""
    join = Join(bytes(16), bytes(32), 3, 0)
    with listen(at("tcp:0"), tls("destination")) as listener:
        for frame in (join, Hello(bytes(16), bytes(32), 1, 1, 0, "", b"x"), Ping(1)):
            with connect(listener.address, tls("source"), witness=True) as out:
                out.send(frame)
                with listener.accept(5) as into:
                    assert into.plain_witness
                    assert not into.secure
                    if frame == join:
                        assert into.recv() == join
                        into.send(Joined(3, 0))
                        assert out.recv() == Joined(3, 0)
                        assert out.sequences == (1, 1)
                        os.close(out.detach())
                        assert out.fileno() == -1
                    else:
                        with pytest.raises(ProtocolError, match=r"does not speak TLS 1\.3: give --tls-cert"):
                            into.recv()
    with both(at("tcp:0"), tls("source"), tls("destination")) as (out, into):
        assert not into.plain_witness
        for each in (out, into):
            with pytest.raises(LifecycleError, match="cannot be handed to another process"):
                each.detach()
    with both(at("tcp:0")) as (_, into):
        assert not into.plain_witness


@pytest.mark.parametrize("kind", ["tls", "tcp"])
def test_both_witnesses_of_a_migration(tls, kind):
    """By the ways of both sides: each one's end goes to its own witness, and is watched at the other."""
    ours, theirs = (tls("source"), tls("destination")) if kind == "tls" else (None, None)
    terms = Terms(bytes(16), b"t" * 32, bytes(32), "precopy", 1, 0)
    places = {"source-witness": SOURCE, "destination-witness": DESTINATION}
    with ExitStack() as stack:
        acceptor = Acceptor(listen(at("tcp:0"), theirs))
        stack.callback(acceptor.close)
        acceptor.expect(terms, [(place, 0) for place in places])
        ways = Ways(acceptor._listener.address, ours)
        with pytest.raises(MigrationError, match="refuses a connection for source-witness: it belongs to no migration"):
            ways.join(Terms(bytes(16), bytes(32), bytes(32), "precopy", 1, 0), "source-witness", 0, stack)
        for place, side in places.items():
            near = ways.join(terms, place, 0, stack)
            far = stack.enter_context(acceptor.joined(place, 0))
            assert not near.secure
            assert far.plain_witness == (kind == "tls")
            own, other = (near, far) if side == SOURCE else (far, near)
            decision = stack.enter_context(Decision(side))
            decision.start_witness(own, terms.token)
            watch = Watch(other, side, terms.token)
            assert watch.died() is None
            assert not watch.gone
            decision.release()
            assert watch.died(5) is None
            assert watch.gone


def test_who_resets_before_a_word(tls):
    with listen(at("tcp:0"), tls("destination")) as listener:
        with connect(listener.address) as out:
            out._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with pytest.raises(PeerGone, match="broke the connection off"):
            listener.accept(5)


def test_a_destination_without_tls(tls):
    with listen(at("tcp:0")) as listener:
        with pytest.raises(PeerGone, match="stalled in the TLS handshake"):
            connect(listener.address, tls("source"), 0.05)
        listener.accept(5).close()


def test_files_that_are_no_certificates(tls, certificates, tmp_path):
    empty = tmp_path / "empty.pem"
    empty.touch()
    good = [certificates[name] for name in ("source.crt", "source.key", "ca.crt")]
    Tls(*good)
    for place in range(3):
        for wrong, words in ((str(empty), "empty.pem"), (str(tmp_path / "none"), "none: No such file")):
            with pytest.raises(BadInput, match=words):
                Tls(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(BadInput, match="no certificate and its unencrypted key"):
        Tls(good[0], certificates["ca.key"], good[2])
    for call in (listen, connect):
        with pytest.raises(BadInput, match="TLS is for tcp"):
            call(at(f"unix:{tmp_path}/s"), tls("source"))


# ---- sockets with a path ----


def test_a_socket_is_for_its_user_alone_and_goes(tmp_path):
    path = tmp_path / "s"
    listener = listen(at(f"unix:{path}"))
    mode = path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert listener.accept(0) is None
    listener.close()
    listener.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), listen(at(f"unix:{path}")):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_dead_listener_is_replaced_and_a_live_one_is_not(tmp_path):
    path = tmp_path / "s"
    code = f"import os, pyvmm.migration.transport as t, pyvmm.migration.address as a; " \
           f"t.listen(a.parse_address('unix:{path}')); os.kill(os.getpid(), 9)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == -9
    assert stat.S_ISSOCK(path.stat().st_mode)
    with pytest.raises(MigrationError, match=r"nobody listens at unix:.*pyvmm receive --listen"):
        connect(at(f"unix:{path}"))
    with listen(at(f"unix:{path}")) as listener, connect(listener.address) as out:
        with pytest.raises(BadInput, match="somebody listens there already"):
            listen(at(f"local:{path}"))
        with listener.accept(5) as into:
            out.send(Ping(1))
            assert into.recv() == Ping(1)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_listener_is_a_live_one(tmp_path):
    with ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(tmp_path / "s"))
        busy.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(str(tmp_path / "s"))
        with pytest.raises(BadInput, match="somebody listens"):
            listen(at(f"unix:{tmp_path}/s"))


def test_what_is_no_socket_stays(tmp_path):
    for path in (tmp_path / "file", tmp_path / "folder", tmp_path / "link"):
        if path.name == "folder":
            path.mkdir()
        elif path.name == "link":
            path.symlink_to("nowhere")
        else:
            path.write_text("kept")
        with pytest.raises(BadInput, match="no socket is there"):
            listen(at(f"unix:{path}"))
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(HostError, match="No such file"):
        listen(at(f"unix:{tmp_path}/none/s"))


def test_who_took_the_place_keeps_it(tmp_path):
    path = tmp_path / "s"
    listener = listen(at(f"unix:{path}"))
    path.unlink()
    with listen(at(f"unix:{path}")):
        listener.close()
        assert path.exists()


def test_only_one_of_many_listens(tmp_path):
    """All replace the same dead socket at once."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    results, barrier = [], threading.Barrier(8)

    def one():
        barrier.wait()
        try:
            results.append(listen(at(f"unix:{tmp_path}/s")))
        except BadInput:
            results.append(None)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = filter(None, results)
    with winner, connect(winner.address) as out, ExitStack() as stack:
        out.send(Ping(1))
        for _ in threads:  # those who looked whether anybody listens come first, and are gone
            into = stack.enter_context(winner.accept(5))
            try:
                assert into.recv() == Ping(1)
                break
            except PeerGone:
                continue
        else:
            pytest.fail("who connected did not come through")


# ---- TCP ----


def test_tcp_places(monkeypatch):
    with listen(at("tcp:0")) as listener:
        assert listener._socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(HostError, match="Address already in use"):
            listen(listener.address)
        port = listener.address.port
    with pytest.raises(MigrationError, match=f"nobody listens at tcp:127.0.0.1:{port}: start 'pyvmm receive"):
        connect(at(f"tcp:{port}"))
    with pytest.raises(HostError, match="cannot listen there"):
        listen(at("tcp:192.0.2.1:0"))

    def fails(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(HostError, match="Name or service not known"):
        listen(at("tcp:host.invalid:1"))
    with pytest.raises(MigrationError, match="Name or service not known"):
        connect(at("tcp:host.invalid:1"))


def test_a_destination_that_does_not_accept():
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        with pytest.raises(PeerGone, match="does not answer"):
            stack.enter_context(connect(at(f"tcp:{full.getsockname()[1]}"), timeout=0.05))


def test_sockets_are_set_up():
    with both(at("tcp:0")) as ends:
        for end in ends:
            assert end._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert end._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert not os.get_inheritable(end.fileno())


def test_who_stalls_in_the_handshake_is_in_nobodys_way(tls):
    """With TLS: one connects and says nothing; another is served meanwhile; and closing waits for neither."""
    listener = listen(at("tcp:0"), tls("destination"))
    acceptor = Acceptor(listener)
    try:
        with socket.create_connection((listener.address.host, listener.address.port)) as mute:
            with connect(listener.address, tls("source")) as source:
                source.send(Hello(bytes(16), bytes(32), 1, 1, 0, "", b"x"))
                found = acceptor.hello(5)
                assert found is not None
                found[0].close()
            begin = time.monotonic()
            acceptor.close()
            assert time.monotonic() - begin < 5
            assert mute.recv(1) == b""
    finally:
        acceptor.close()


def test_many_connect_to_a_path_at_once(tmp_path):
    """More than wait there at most: they wait too, and do not fail at once, as without blocking they would."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening, ExitStack() as stack:
        listening.bind(path)
        listening.listen(0)
        address = parse_address(f"unix:{path}")
        stack.enter_context(connect(address))
        with pytest.raises(PeerGone, match="does not answer"):
            connect(address, timeout=0.05)
        made = []
        thread = threading.Thread(target=lambda: made.append(connect(address)))
        thread.start()
        for _ in range(2):
            stack.enter_context(listening.accept()[0])
        thread.join(10)
        stack.enter_context(made[0])
        made[0].send(Ping(1))
