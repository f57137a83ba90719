# test_cli_steps.py: blocks and operations as people type them, and what becomes of them on a VM made by hand.
from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvmm.cli.steps import BLOCK_PAGES, OPERATIONS, parse_blocks, parse_step
from pyvmm.errors import BadInput, HostError
from pyvmm.layout import BLOCK_SIZE, PAGE_SIZE

LIMIT = 1000
NUMBERS = st.integers(0, LIMIT - 1)
RANGES = st.tuples(NUMBERS, NUMBERS).map(sorted).map(tuple)


@given(st.lists(NUMBERS | RANGES, min_size=1, max_size=8))
def test_blocks_are_those_that_are_named_each_once_in_the_order_given(parts):
    text = ",".join(str(part) if isinstance(part, int) else f"{part[0]}-{part[1]}" for part in parts)
    named = [block for part in parts for block in ([part] if isinstance(part, int) else range(part[0], part[1] + 1))]
    assert parse_blocks(text, LIMIT) == [block for i, block in enumerate(named) if block not in named[:i]]


@given(st.text(alphabet="0123456789-,al ²", max_size=12))
@example("-")
@example("1-2-3")
@example(",")
@example("9" * 5000)
def test_any_text_is_blocks_of_the_vm_or_bad_input_in_one_line(text):
    try:
        blocks = parse_blocks(text, LIMIT)
    except BadInput as error:
        message, blocks = str(error), [0]
    else:
        message = ""
    assert "\n" not in message
    assert blocks
    assert set(blocks) <= set(range(LIMIT))
    assert len(set(blocks)) == len(blocks)


def test_all_is_all():
    assert parse_blocks("all", 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "blocks '': give numbers and ranges, such as 3,5,8-10, or all"),
        ("3,", "blocks '3,': give numbers"),
        ("x", "'x'"),
        ("-3", "'-3'"),
        ("3-", "'3-'"),
        ("1-2-3", "'1-2-3'"),
        ("0x3", "'0x3'"),
        ("²", "'²'"),
        ("9-3", "blocks 9-3: the first is behind the last; give 3-9"),
        ("16", "block 16: the VM has 16 of 2 MiB, 0 to 15; --mem gives it more"),
        ("3-99999999999999999999", "block 99999999999999999999: the VM has 16"),
        ("9" * 5000, "give numbers"),
    ],
)
def test_bad_blocks_are_named(text, words):
    with pytest.raises(BadInput) as error:
        parse_blocks(text, 16)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("split", "--do 'split': give an operation and blocks, such as split:3-5"),
        ("", "--do ''"),
        ("fly:3", "--do 'fly:3': no operation 'fly': choose one of remove, zero, install, split, merge, break"),
        (":3", "no operation ''"),
        ("split:", "blocks ''"),
        ("split:32", "block 32: the VM has 32"),
    ],
)
def test_bad_steps_are_named(text, words):
    with pytest.raises(BadInput) as error:
        parse_step(text, 64 << 20)
    assert words in str(error.value)


class Recorder:
    """An engine that notes what it is asked for. Some blocks are in use."""

    def __init__(self, busy=()):
        self.calls = []
        self.busy = busy

    def _note(self, block, *call):
        self.calls.append(call)
        if block in self.busy:
            raise HostError(f"block {block} is in use")

    def remove(self, page, count, what="aside"):
        self._note(page // BLOCK_PAGES, "remove", page, count, what)
        return count - 1

    def install(self, page, count):
        self._note(page // BLOCK_PAGES, "install", page, count)

    def split(self, block):
        self._note(block, "split", block)

    def merge(self, block):
        self._note(block, "merge", block)

    def break_(self, block):
        self._note(block, "break", block)

    def share(self, block):
        self._note(block, "share", block)


def perform(text, size=8 * BLOCK_SIZE, busy=(), ended=False):
    engine = Recorder(busy)
    step = parse_step(text, size)
    step.perform(SimpleNamespace(memory=SimpleNamespace(engine=engine, size=size), ended=ended))
    return step, engine.calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("remove:3", [("remove", 3 * 512, 512, "aside")]),
        ("zero:1,0", [("remove", 512, 512, "zero"), ("remove", 0, 512, "zero")]),
        ("install:0-1", [("install", 0, 512), ("install", 512, 512)]),
        ("split:7", [("split", 7)]),
        ("merge:2-3", [("merge", 2), ("merge", 3)]),
        ("break:5", [("break", 5)]),
    ],
)
def test_each_operation_asks_the_engine_for_what_it_says(text, calls):
    step, made = perform(text)
    assert made == calls
    assert step.finished
    assert (step.done, step.failed, step.reason) == (len(calls), 0, "")
    assert step.pages == (511 * len(calls) if text.startswith(("remove", "zero")) else 0)


def test_to_share_is_to_break_to_drop_zeros_and_to_let_the_kernel_merge():
    step, made = perform("share:2")
    assert made == [("break", 2), ("remove", 2 * 512, 512, "zero"), ("share", 2)]
    assert (step.done, step.failed, step.pages) == (1, 0, 511)


def test_the_last_block_may_be_part_of_one():
    assert perform("remove:all", BLOCK_SIZE + 3 * PAGE_SIZE)[1] == [
        ("remove", 0, 512, "aside"),
        ("remove", 512, 3, "aside"),
    ]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_block_in_use_does_not_keep_the_others(operation):
    step, calls = perform(f"{operation}:0-4", busy=(1, 3))
    more = 3 * 2 if operation == "share" else 0
    assert (len(calls), step.done, step.failed, step.finished) == (5 + more, 3, 2, True)
    assert step.reason == "block 1 is in use"


def test_nothing_is_done_after_the_guests_end():
    step, calls = perform("split:all", ended=True)
    assert (calls, step.finished) == ([], False)
