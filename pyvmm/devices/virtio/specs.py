# specs.py: virtio devices by name, as programs and command lines ask for them. A new kind of device is one row here.
"""`make()`: a device out of its description, such as "rng", "console" or "block:disk.img,ro"."""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.virtio.model import Model


def _rng(rest: str, output: Callable[[bytes], None]) -> Model:
    from pyvmm.devices.virtio.rng import Rng

    if not rest:
        return Rng()
    key, _, seed = rest.partition("=")
    if key != "seed" or not (seed.isascii() and seed.isdigit()) or len(seed) > 40:
        raise BadInput(f"device 'rng:{rest}': give rng, or rng:seed=N")
    return Rng(int(seed))


def _console(rest: str, output: Callable[[bytes], None]) -> Model:
    from pyvmm.devices.virtio.console import VirtioConsole

    if rest:
        raise BadInput(f"device 'console:{rest}': a console takes no options")
    return VirtioConsole(output)


def _block(rest: str, output: Callable[[bytes], None]) -> Model:
    from pyvmm.devices.virtio.block import Block
    from pyvmm.devices.virtio.rawfile import RawFile

    path = rest.removesuffix(",ro")
    if not path:
        raise BadInput("device 'block': give block:FILE or block:FILE,ro")
    return Block(RawFile(path, read_only=path != rest))


def _swap_disk(rest: str, output: Callable[[bytes], None]) -> Model:
    from pyvmm.devices.virtio.block import Block
    from pyvmm.devices.virtio.swapdisk import make

    what, *options = rest.split(",")
    mode, durable = "replace", False
    for option in options:
        key, _, value = option.partition("=")
        if key == "mode":
            mode = value
        elif option in ("durable", "volatile"):
            durable = option == "durable"
        else:
            raise BadInput(
                f"swap disk {rest!r}: {option!r} is none of mode=naive|references|replace, durable, volatile"
            )
    if not what:
        raise BadInput("device 'swapdisk': give swapdisk:SIZE or swapdisk:FILE")
    return Block(make(what, mode, durable))


def _balloon(rest: str, output: Callable[[bytes], None]) -> Model:
    from pyvmm.devices.virtio.balloon import Balloon

    if rest:
        raise BadInput(f"device 'balloon:{rest}': a balloon takes no options")
    return Balloon()


KINDS: dict[str, Callable[[str, Callable[[bytes], None]], Model]] = {
    "rng": _rng,
    "console": _console,
    "balloon": _balloon,
    "block": _block,
    "swapdisk": _swap_disk,
}


def make(spec: str, output: Callable[[bytes], None]) -> Model:
    """The device; output: where a console's goes. Raises BadInput."""
    name, _, rest = spec.partition(":")
    if name not in KINDS:
        raise BadInput(f"no device {name!r}: choose one of {', '.join(KINDS)}")
    return KINDS[name](rest, output)


def linux_options(count: int) -> list[str]:
    """What tells a Linux kernel (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES) where a VM's virtio devices are."""
    step, base = lib.PV_VIRTIO_STEP, lib.PV_VIRTIO_GPA
    return [f"virtio_mmio.device={step >> 10}K@{base + slot * step:#x}:{irq_of(slot)}" for slot in range(count)]


def irq_of(slot: int) -> int:
    """The interrupt line of the VM's n-th virtio device: PV_VIRTIO_IRQ of guest/abi.h."""
    return 5 + slot if slot < 3 else 6 + slot
