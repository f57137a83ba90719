# explain: turns a stopped vCPU into an explanation that teaches. For crashes and traces: never on the fast path.
"""Crash reports, page walks, disassembly and traces of guests."""

from pyvmm.explain.facts import ExitFacts
from pyvmm.explain.pagewalk import AddressSpace
from pyvmm.explain.report import Explanation, explain
from pyvmm.explain.trace import TraceFormatter, leaves_ring0

__all__ = ["AddressSpace", "ExitFacts", "Explanation", "TraceFormatter", "explain", "leaves_ring0"]
