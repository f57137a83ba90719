# address.py: where the other end is, as people write it.
"""`Address`: tcp:HOST:PORT, unix:PATH or local:PATH."""

from __future__ import annotations

from pyvmm.errors import BadInput
from pyvmm.record import Record
from pyvmm.sockets import check_path

LOOPBACK = "127.0.0.1"
_MAX_HOST = 253


class Address(Record):
    """kind: "tcp" with host and port (0: any free one, to listen on), or "unix" or "local" with path."""

    __slots__ = ("host", "kind", "path", "port")

    def __init__(self, kind: str, host: str = "", port: int = 0, path: str = "") -> None:
        self.kind = kind
        self.host = host
        self.port = port
        self.path = path

    def __str__(self) -> str:
        if self.kind != "tcp":
            return f"{self.kind}:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """It cannot be reached from another host."""
        import ipaddress

        if self.kind != "tcp" or self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False  # a name: whatever it means today

    def warning(self, tls: bool) -> str:
        """One line, if all RAM of the guest would cross a network for everybody to read and change; else nothing."""
        if tls or self.loopback:
            return ""
        return (
            f"{self} is not on this host, and nothing is encrypted: who is on the way reads and changes the guest's "
            "memory; give --tls-cert, --tls-key and --tls-ca, or go through a tunnel"
        )


def parse_address(text: str, listening: bool = False) -> Address:
    """From `tcp:HOST:PORT` (`tcp:PORT` or `tcp::PORT`: this host alone; IPv6 in brackets), `unix:PATH` or `local:PATH`.
    listening: port 0 is any free one. Raises BadInput."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in ("tcp", "unix", "local"):
        raise BadInput(f"{text!r} is no address: give tcp:HOST:PORT, unix:PATH or local:PATH")
    if kind != "tcp":
        return Address(kind, path=check_path(rest, repr(text)))
    host, _, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        _check_ipv6(text, host)
    elif ":" in host or "[" in host or "]" in host:
        raise BadInput(f"{text!r}: write an IPv6 address in brackets, such as tcp:[::1]:4444")
    elif len(host) > _MAX_HOST or not all(c.isascii() and (c.isalnum() or c in "-._") for c in host):
        raise BadInput(f"{text!r}: {host[:40]!r} is no name or address of a host")
    if not (port.isascii() and port.isdigit() and len(port) <= 5) or int(port) > 65535:
        raise BadInput(f"{text!r}: {port[:40]!r} is no port: give tcp:HOST:PORT with a number up to 65535")
    if int(port) == 0 and not listening:
        raise BadInput(f"{text!r}: port 0 is for listening alone")
    return Address("tcp", host or LOOPBACK, int(port))


def _check_ipv6(text: str, host: str) -> None:
    import ipaddress

    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise BadInput(f"{text!r}: {host[:40]!r} is no IPv6 address") from None
