# tls.py: TLS 1.3 with certificates of both sides, for connections of a migration over TCP.
"""`Tls`: the files that prove who we are, and who the other side must be."""

from __future__ import annotations

import select
import ssl
import time

from pyvmm.errors import BadInput, MigrationError, PeerGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

WITHOUT_TLS = "does not speak TLS 1.3: give --tls-cert, --tls-key and --tls-ca to both"


class Tls:
    """certificate, key: PEM files of this side; authority: of those that signed the other side's certificate, and
    nobody else is believed; name: what that certificate is for, if not the host that is connected to. Raises BadInput,
    naming the file, for one that cannot be used."""

    def __init__(self, certificate: str, key: str, authority: str, name: str = "") -> None:
        self.name = name
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, certificate, key, authority)
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, certificate, key, authority)

    def wrap(self, sock: socket.socket, peer: str, host: str | None, timeout: float) -> ssl.SSLSocket:
        """The socket, with the handshake done. host: connected to; None: it was accepted. Closes it where that fails.
        Raises MigrationError, PeerGone; one line each."""
        context = self._server if host is None else self._client
        sock.setblocking(False)
        name = None if host is None else self.name or host
        try:
            secure = context.wrap_socket(
                sock, server_side=host is None, server_hostname=name, do_handshake_on_connect=False
            )
        except OSError as error:  # gone already
            sock.close()
            raise PeerGone(f"{peer} went in the midst of the TLS handshake: {error.strerror or error}") from None
        try:
            _shake_hands(secure, peer, time.monotonic() + timeout)
        except BaseException:
            secure.close()
            raise
        return secure


def _context(protocol: int, certificate: str, key: str, authority: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no session is resumed: each handshake proves both sides
    for path in (certificate, key, authority):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise BadInput(f"TLS: {path}: {error.strerror}") from None
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError):
        raise BadInput(f"TLS: {certificate} and {key} are no certificate and its unencrypted key, in PEM") from None
    try:
        context.load_verify_locations(authority)
    except (ssl.SSLError, OSError):
        raise BadInput(f"TLS: {authority} holds no certificate of an authority, in PEM") from None
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # never asks on a terminal that may not be there


def _shake_hands(secure: ssl.SSLSocket, peer: str, deadline: float) -> None:
    while True:
        try:
            secure.do_handshake()
            return
        except ssl.SSLWantReadError:
            events = select.POLLIN
        except ssl.SSLWantWriteError:
            events = select.POLLOUT
        except OSError as error:
            raise told(error, peer) from None
        poll = select.poll()
        poll.register(secure, events)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise PeerGone(f"{peer} stalled in the TLS handshake")


def told(error: OSError, peer: str) -> MigrationError:
    """What an error of a TLS connection means, in one line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return MigrationError(f"{peer}: its certificate is not believed: {error.verify_message}")
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    if reason is not None and "UNEXPECTED_EOF" not in reason:
        if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return MigrationError(f"{peer} showed no certificate: start it with --tls-cert and --tls-key")
        if "CERTIFICATE_REQUIRED" in reason:
            return MigrationError(f"{peer} asks for a certificate: give --tls-cert and --tls-key")
        if "ALERT" in reason and ("CERTIFICATE" in reason or "UNKNOWN_CA" in reason):
            return MigrationError(f"{peer} does not believe our certificate: its --tls-ca must have signed it")
        if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL") or "RECORD_LAYER" in reason:
            return MigrationError(f"{peer} {WITHOUT_TLS}")
        return MigrationError(f"{peer}: TLS failed: {reason.replace('_', ' ').lower()}")
    if isinstance(error, (ssl.SSLError, ConnectionResetError, BrokenPipeError)):
        return PeerGone(f"{peer} broke the connection off")
    return PeerGone(f"{peer}: {error.strerror or error}")
