# host: what this machine can do for guests, found out by trying. For the doctor, tests, and every choice of a way.
"""`has(Feature.X)`: one feature, tried once a process. `findings()`: all. `without(...)`: as if one were missing."""

from pyvmm.host.feature import Feature, Finding
from pyvmm.host.probe import finding, findings, has, without
from pyvmm.host.settings import facts

__all__ = ["Feature", "Finding", "facts", "finding", "findings", "has", "without"]
