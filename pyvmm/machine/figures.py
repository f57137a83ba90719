# figures.py: counts of one VM, gathered from its parts. For `vm.stats()`.
"""`stats` and `unknown_ports`."""

from __future__ import annotations

from pyvmm.machine.exits import EXIT_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import CData
    from pyvmm.bus import Bus
    from pyvmm.kvm import VmFd
    from pyvmm.vcpu import Vcpu


def stats(vm: VmFd, vcpus: list[Vcpu], ports: CData, mmio: Bus) -> dict[str, dict[str, int]]:
    """As VM.stats() says."""
    exits: dict[str, int] = {}
    sums: dict[str, int] = {}
    for vcpu in vcpus:
        for reason, count in vcpu.exits().items():
            name = EXIT_NAMES.get(reason, str(reason))
            exits[name] = exits.get(name, 0) + count
        for name, count in vcpu.fd.stats().items():
            sums[name] = sums.get(name, 0) + count
    unknown = mmio.unknown.values()
    return {
        "exits": exits,
        "ports": {"reads": sum(ports.reads), "writes": sum(ports.writes)},
        "mmio": {"reads": sum(count[0] for count in unknown), "writes": sum(count[1] for count in unknown)},
        "kvm": vm.stats(),
        "vcpus": sums,
    }


def unknown_ports(ports: CData) -> dict[int, tuple[int, int]]:
    """Ports that nobody claims and the guest used: port -> (reads, writes)."""
    reads, writes = list(ports.reads), list(ports.writes)
    return {port: (reads[port], writes[port]) for port in range(len(reads)) if reads[port] or writes[port]}
