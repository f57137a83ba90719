# test_layers.py: a module imports only from its own package and from layers below (docs/design.md has the picture).
from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pyvmm

LAYERS = (
    ("__main__", "pytest_plugin"),
    ("cli",),
    ("bench",),
    ("testing",),
    ("fleet",),
    ("control",),
    ("machine",),
    ("explain", "host"),
    ("console",),
    ("vcpu", "bus", "devices"),
    ("migration",),
    ("snapshot",),
    ("memory",),
    ("kvm",),
    ("_native",),
    ("image",),
    ("layout", "sockets", "state"),
    ("errors", "record"),
)
"""From top to bottom; those of one line are peers, which do not know each other."""
LEVELS = {name: len(LAYERS) - level for level, layer in enumerate(LAYERS) for name in layer}

ROOT = Path(pyvmm.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))


def imported(tree, module, is_package):
    """(line, full name) of each import of pyvmm's own, at any depth and for types alone too."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "pyvmm")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            if base == "pyvmm":
                yield from ((node.lineno, f"pyvmm.{alias.name}") for alias in node.names)
            elif base.startswith("pyvmm."):
                yield node.lineno, base


def violations(text, module, is_package=False):
    own = module.split(".")[1]
    for line, name in imported(ast.parse(text), module, is_package):
        other = name.split(".")[1] if "." in name else ""
        if other == own or other == "__version__":
            continue
        if other not in LEVELS:
            yield f"{module}:{line}: imports {name}: name the module that has it, or its layer here"
        elif LEVELS[other] >= LEVELS[own]:
            yield f"{module}:{line}: imports {name} from a layer that is not below its own"


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts), parts[-1] == "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    module, is_package = name_of(path)
    if module == "pyvmm":  # the list of what is public: knows all, and nothing of it at run time
        assert {node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)} == {
            "__future__"
        }
        return
    assert not list(violations(path.read_text(), module, is_package))


def test_every_module_has_a_layer_and_every_layer_is_there():
    found = {path.relative_to(ROOT).parts[0].partition(".")[0] for path in (*SOURCES, *ROOT.glob("*.pyi"))}
    assert found - {"__init__"} == LEVELS.keys()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("pyvmm.vcpu.x", "from pyvmm.bus import Bus"),
        ("pyvmm.memory.x", "def f():\n    import pyvmm.machine"),
        ("pyvmm.kvm.x", "if TYPE_CHECKING:\n    from pyvmm.memory.space import GuestMemory"),
        ("pyvmm.devices.x", "from pyvmm import VM"),
        ("pyvmm.devices.x", "from ..machine import VM"),
        ("pyvmm.image.x", "from pyvmm._native import lib"),
        ("pyvmm.state", "import pyvmm"),
    ],
)
def test_what_is_forbidden_is_found(module, text):
    assert len(list(violations(text, module))) == 1


@pytest.mark.parametrize("text", ["from pyvmm.vcpu.y import A", "from .y import A", "import struct, pyvmm.errors"])
def test_what_is_allowed_is_not(text):
    assert not list(violations(text, "pyvmm.vcpu.x"))
