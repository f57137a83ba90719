# test_native.py: the C functions are declared three times (native.h and what it includes; native.cdef;
# _native.pyi): alike, or this fails.
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pyvmm._native import ffi, lib

ROOT = Path(__file__).parents[2]
FUNCTION = re.compile(
    r"^(?P<result>[\w ]+?[ *]+)(?P<name>pv_\w+)\((?P<arguments>[^)]*)\)(?P<checked> PV_CHECKED)?;", re.MULTILINE
)


def functions(name):
    """name -> match, of a C file without its comments."""
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "cffi_build" / name).read_text(), flags=re.DOTALL)
    return {found["name"]: found for found in FUNCTION.finditer(text)}


def stub():
    """name -> how many arguments, of _native.pyi."""
    tree = ast.parse((ROOT / "pyvmm" / "_native.pyi").read_text())
    (lib_class,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Lib"]
    return {
        node.name: [argument.arg for argument in node.args.args[1:]]
        for node in lib_class.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("pv_")
    }


HEADER, CDEF, STUB = (
    functions("native.h")
    | functions("engine.h")
    | functions("snapshot.h")
    | functions("stream.h")
    | functions("peer.h")
    | functions("swap.h"),
    functions("native.cdef"),
    stub(),
)


def arguments(found):
    return [] if found["arguments"] == "void" else [" ".join(part.split()) for part in found["arguments"].split(",")]


def test_the_same_functions_everywhere():
    built = {name for name in dir(lib) if name.startswith("pv_")}
    assert len(HEADER) > 15
    assert set(HEADER) == set(CDEF) == set(STUB) == built


@pytest.mark.parametrize("name", sorted(HEADER))
def test_a_function_is_declared_alike(name):
    header, cdef = HEADER[name], CDEF[name]
    assert (header["result"], arguments(header)) == (cdef["result"], arguments(cdef))
    assert len(STUB[name]) == len(arguments(header))
    assert len(ffi.typeof(getattr(lib, name)).args) == len(arguments(header))


@pytest.mark.parametrize("name", sorted(HEADER))
def test_what_may_return_an_error_is_checked(name):
    result = HEADER[name]["result"].strip()
    assert bool(HEADER[name]["checked"]) == (result == "int"), f"{result} {name}"
