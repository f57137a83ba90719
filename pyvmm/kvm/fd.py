# fd.py: a file descriptor of KVM's and its ioctls; what Kvm, VmFd and VcpuFd share.
"""`KvmFd`: owns one descriptor; every ioctl that fails raises a KernelError naming it and its arguments."""

from __future__ import annotations

import os

from pyvmm._native import ffi, lib
from pyvmm.errors import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from pyvmm._native import CData


class KvmFd:
    """A descriptor that is closed at the end of its `with`, or by close()."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Closes the descriptor; a second call does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> KvmFd:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def ioctl(self, name: str, argument: CData, **shown: object) -> int:
        """The ioctl `name` with a pointer. `shown`: what an error is to say of the arguments."""
        return check(lib.pv_ioctl(self.fd, getattr(lib, name), argument), name, **shown)

    def ioctl_value(self, name: str, value: int = 0, **shown: object) -> int:
        """The ioctl `name` with an integer, or without argument."""
        return check(lib.pv_ioctl_value(self.fd, getattr(lib, name), value), name, **shown)

    def get(self, name: str, struct: str, **shown: object) -> bytes:
        """The bytes that a KVM_GET_* ioctl puts into `struct`."""
        data = ffi.new(f"{struct} *")
        self.ioctl(name, data, **shown)
        return bytes(ffi.buffer(data))

    def put(self, name: str, struct: str, data: bytes, **shown: object) -> None:
        """Hands `data`, exactly one `struct`, to a KVM_SET_* ioctl. The caller has checked its length."""
        target = ffi.new(f"{struct} *")
        ffi.memmove(target, data, ffi.sizeof(struct))
        self.ioctl(name, target, **shown)
