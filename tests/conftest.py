# conftest.py: loads pyvmm's own pytest plugin, ends tests that hang, and sees that tests of KVM leave nothing behind.
from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy  # noqa: F401  (its worker threads come with the first import and stay: not within a test)
import pytest

# Where pyvmm is installed, editable or not, its entry point has loaded the plugin before any conftest.
pytest_plugins = ["pytester", *([] if "pyvmm.pytest_plugin" in sys.modules else ["pyvmm.pytest_plugin"])]

TEST_SECONDS = 60
"""Of one test; `pytest.mark.seconds(N)`: of one that says so."""
SETTLE_SECONDS = 2
"""For what ends by itself soon: KVM's worker threads, children that were killed."""

_stderr = pytest.StashKey[int]()


def pytest_configure(config):
    config.stash[_stderr] = os.dup(2)  # the capture of output is not in place here
    config.addinivalue_line("markers", "seconds(n): so long the test may take")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    marked = item.get_closest_marker("seconds")
    seconds = marked.args[0] if marked else TEST_SECONDS
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def held():
    """What this process has: descriptors by what they are, threads of Python's and of the kernel's, children."""
    found = Counter(f"thread {thread.name}" for thread in threading.enumerate())
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists them
            found[f"descriptor of {os.readlink(f'/proc/self/fd/{fd}')}"] += 1
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found.update(f"child {pid}" for pid in Path(f"/proc/self/task/{task}/children").read_text().split())
            found["task"] += 1
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """A test that needs KVM gives back all that it took. Set up first and so checked last."""
    if request.node.get_closest_marker("needs") is None and "vm" not in request.fixturenames:
        yield
        return
    before = held()
    yield
    end = time.monotonic() + SETTLE_SECONDS
    while (left := held() - before) and time.monotonic() < end:
        time.sleep(0.005)
    assert not left, f"left behind: {', '.join(left.elements())}"


@pytest.fixture
def restored():
    """Makes VMs from snapshot files, with RAM exactly as it was saved; they are closed at the end."""
    from pyvmm import VM

    made = []

    def make(path, **options):
        made.append(VM.restore(str(path), generation=False, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """name -> path, of PEM files: two authorities, and what they signed for 127.0.0.1."""
    import shutil
    import subprocess

    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl command is not here: certificates cannot be made")
    folder = tmp_path_factory.mktemp("tls")

    def make(name, *options):
        subprocess.run(
            [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
             "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt", *options],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip

    for authority, names in (("ca", ("source", "destination")), ("other-ca", ("stranger",))):
        make(authority, "-addext", "keyUsage=critical,keyCertSign")
        for name in names:
            signed = ("-CA", f"{authority}.crt", "-CAkey", f"{authority}.key", "-addext", "basicConstraints=CA:FALSE")
            make(name, *signed, "-addext", "subjectAltName=IP:127.0.0.1,DNS:moon.example")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture
def tls(certificates):
    from pyvmm.migration.tls import Tls

    def make(side, authority="ca", **options):
        return Tls(
            certificates[f"{side}.crt"], certificates[f"{side}.key"], certificates[f"{authority}.crt"], **options
        )

    return make
