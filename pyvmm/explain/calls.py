# calls.py: who called whom, for crash reports. Addresses are linear.
"""`call_chain()` follows saved frame pointers (rbp), kept by code compiled with -fno-omit-frame-pointer."""

from __future__ import annotations

from pyvmm.explain.access import stack_pointer, word_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.scene import Scene

_DEEPEST = 16


def caller(scene: Scene) -> int | None:
    """The call whose return address is on top of the stack: who called, where no frame has been built yet."""
    top = scene.space.number(stack_pointer(scene.registers), word_size(scene.registers))
    return scene.code.call_before(top) if top is not None else None


def call_chain(scene: Scene) -> list[int]:
    """Addresses from innermost to outermost: rip, then the call instructions on the way to it, at most 16.

    A function that has not built its frame yet, or never does, is bridged where its return address is on top of the
    stack; else its caller is missing. The chain ends where a return address does not follow a call.
    """
    registers, size = scene.registers, word_size(scene.registers)
    chain = [registers.pc]
    first = caller(scene)
    if first is not None:
        chain.append(first)
    frame = registers.rbp
    while len(chain) < _DEEPEST:
        above = scene.space.number(frame, size)
        back = scene.space.number(frame + size, size)
        call = scene.code.call_before(back) if back is not None else None
        if above is None or call is None:
            break
        chain.append(call)
        if above <= frame:  # frames lie the higher the older they are; and so there can be no loop
            break
        frame = above
    return chain
