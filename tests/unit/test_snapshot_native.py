# test_snapshot_native.py: checksums against published vectors and zstd's own; codecs and block reading at their limits.
from __future__ import annotations

import ctypes
import errno
import os
import random
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from snapshot_files import AVAILABLE, xxh64

from pyvmm._native import ffi, lib
from pyvmm.snapshot.format import CODECS

RAW, LZ4, ZSTD = lib.PV_CODEC_RAW, lib.PV_CODEC_LZ4, lib.PV_CODEC_ZSTD
MAX = lib.PV_STORE_MAX
PACKED = [CODECS.index(name) for name in AVAILABLE if name != "raw"]
P32 = 2654435761


def sanity_buffer(size):
    """The input of the vectors that xxHash publishes with its source (cli/xsum_sanity_check.c)."""
    out, state = bytearray(size), P32
    for i in range(size):
        out[i] = state >> 56 & 0xFF
        state = state * 0x9E3779B185EBCA8D & (1 << 64) - 1
    return bytes(out)


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [
        (b"", 0, 0xEF46DB3751D8E999),
        (b"a", 0, 0xD24EC4F1A98C6E5B),
        (b"abc", 0, 0x44BC2CF5AD770999),
        (b"", P32, 0xAC75FDA2929B17EF),
        (sanity_buffer(1), 0, 0xE934A84ADB052768),
        (sanity_buffer(1), P32, 0x5014607643A9B4C3),
        (sanity_buffer(14), 0, 0x8282DCC4994E35C8),
        (sanity_buffer(14), P32, 0xC3BD6BF63DEB6DF0),
        (sanity_buffer(222), 0, 0xB641AE8CB691C174),
        (sanity_buffer(222), P32, 0x20CB8AB7AE10C14A),
    ],
)
def test_published_vectors(data, seed, expected):
    assert lib.pv_hash(ffi.from_buffer(data), len(data), seed) == expected


@given(st.lists(st.integers(0, 40) | st.sampled_from([64, 4096, 4100, 65536]), max_size=30), st.integers(0, 1 << 32))
@example([4096] * 30, 1)
@example([40] * 9 + [33] * 7 + [31] * 8 + [0] * 3 + [4100] * 5, 2)
def test_many_at_once_as_one_by_one(sizes, seed):
    rng = random.Random(seed)
    pieces = [rng.randbytes(size) for size in sizes]
    held = [ffi.from_buffer("uint8_t[]", piece) for piece in pieces]
    hashes = ffi.new("uint64_t[]", len(sizes) + 1)
    lib.pv_hash_many(ffi.new("const uint8_t *[]", held), ffi.new("uint32_t[]", sizes), len(sizes), hashes)
    assert list(hashes) == [lib.pv_hash(piece, len(piece), 0) for piece in held] + [0]


@given(st.binary(max_size=300))
def test_the_same_as_zstd_has_in_its_frames(data):
    """A zstd frame with a checksum ends with the low half of the content's XXH64 (RFC 8878, 3.1.1)."""
    try:
        zstd = ctypes.CDLL("libzstd.so.1")
    except OSError:
        pytest.skip("no libzstd.so.1")
    zstd.ZSTD_createCCtx.restype = ctypes.c_void_p
    context = ctypes.c_void_p(zstd.ZSTD_createCCtx())
    zstd.ZSTD_CCtx_setParameter(context, 201, 1)  # ZSTD_c_checksumFlag
    out = ctypes.create_string_buffer(1000)
    zstd.ZSTD_compress2.restype = ctypes.c_size_t
    size = zstd.ZSTD_compress2(context, out, ctypes.c_size_t(1000), data, ctypes.c_size_t(len(data)))
    zstd.ZSTD_freeCCtx(context)
    assert out.raw[size - 4 : size] == (xxh64(data) & 0xFFFF_FFFF).to_bytes(4, "little")


def compressed(codec, data, room=MAX):
    out = bytearray(room)
    size = lib.pv_codec_compress(codec, 1, ffi.from_buffer(data), len(data), ffi.from_buffer(out), room)
    return bytes(out[:size]) if size >= 0 else size


def decompressed(codec, data, size):
    out = bytearray(size + 64)
    out[size:] = b"\xa5" * 64
    result = lib.pv_codec_decompress(codec, ffi.from_buffer(data), len(data), ffi.from_buffer(out), size)
    assert out[size:] == b"\xa5" * 64  # nothing behind the end
    return bytes(out[:size]) if result == 0 else result


@pytest.mark.parametrize("codec", PACKED)
@given(data=st.binary(min_size=1, max_size=100).map(lambda part: part * 50))
def test_codecs_give_back_what_they_got(codec, data):
    packed = compressed(codec, data)
    assert decompressed(codec, packed, len(data)) == data
    assert decompressed(codec, packed, len(data) + 1) == -errno.EILSEQ
    assert len(data) == 1 or decompressed(codec, packed, len(data) - 1) == -errno.EILSEQ
    assert len(packed) == 1 or decompressed(codec, packed[:-1], len(data)) == -errno.EILSEQ


@pytest.mark.parametrize("codec", PACKED)
@given(data=st.binary(min_size=1, max_size=200), size=st.integers(1, 5000))
def test_codecs_refuse_noise(codec, data, size):
    result = decompressed(codec, data, size)
    assert result == -errno.EILSEQ or len(result) == size  # noise may be a block of lz4


@pytest.mark.parametrize("codec", PACKED)
def test_codecs_keep_to_their_sizes(codec):
    noise = os.urandom(4096)
    assert compressed(codec, noise, 4088) == -errno.ENOSPC
    assert compressed(codec, noise[:0]) == -errno.EINVAL
    byte = ffi.from_buffer(noise)
    assert lib.pv_codec_decompress(codec, byte, MAX + 1, byte, 1) == -errno.EINVAL
    assert lib.pv_codec_decompress(codec, byte, 1, byte, MAX + 1) == -errno.EINVAL
    assert lib.pv_codec_decompress(codec, byte, 0, byte, 1) == -errno.EINVAL


@pytest.mark.skipif("zstd" not in AVAILABLE, reason="no libzstd.so.1")
def test_zstd_reads_its_present_format_alone():
    packed = compressed(ZSTD, b"z" * 100)
    skippable = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"
    assert decompressed(ZSTD, skippable + packed, 100) == -errno.EILSEQ


def test_codecs_by_number():
    assert [lib.pv_codec_available(number) for number in (RAW, -1, lib.PV_CODECS)] == [0, -errno.EINVAL, -errno.EINVAL]
    assert compressed(RAW, b"x" * 100) == -errno.EINVAL


@pytest.mark.parametrize(("codec", "library"), [("lz4", "liblz4.so.1"), ("zstd", "libzstd.so.1")])
def test_a_host_without_a_library_lacks_that_codec_alone(codec, library, tmp_path):
    (tmp_path / library).touch()  # found first, and no library
    program = (
        "from pyvmm.snapshot.results import require_codec\nfrom pyvmm.errors import HostError\n"
        f"require_codec('raw')\ntry: require_codec({codec!r})\nexcept HostError as error: print(error)"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert f"codec {codec} needs {library}" in done.stdout
    assert done.stdout.count("\n") == 1


# ---- pv_block_read ----


@pytest.fixture
def stored(tmp_path):
    """(descriptor, read) of a file of one block at 16: 4096 bytes of 7, as each codec has them."""

    def make(codec):
        data = b"\x07" * 4096
        bytes_stored = data if codec == RAW else compressed(codec, data)
        whole = bytes_stored + bytes(-len(bytes_stored) % 8)
        path = tmp_path / str(codec)
        path.write_bytes(bytes(16) + whole)
        fd = os.open(path, os.O_RDONLY)
        files.append(fd)

        right = xxh64(whole)

        def read(offset=16, length=None, checksum=right, codec=codec, size=4096):
            length = len(bytes_stored) if length is None else length
            out = bytearray(max(size, 8) + 64)
            out[size:] = b"\xa5" * len(out[size:])
            result = lib.pv_block_read(fd, offset, length, checksum, codec, size, ffi.from_buffer(out))
            assert out[size:] == b"\xa5" * len(out[size:])
            return bytes(out[:size]) if result == 0 else result

        return read

    files = []
    yield make
    for fd in files:
        os.close(fd)


@pytest.mark.parametrize("codec", [RAW, *PACKED])
def test_a_block_is_read(stored, codec):
    read = stored(codec)
    assert read() == b"\x07" * 4096
    assert read(checksum=1) == -errno.EBADMSG
    assert read(offset=24) == -errno.ENODATA
    assert read(offset=1 << 40) == -errno.ENODATA
    assert [read(length=wrong) for wrong in (0, MAX + 1)] == [-errno.EINVAL] * 2
    assert [read(offset=wrong) for wrong in ((1 << 63) - 1, 1 << 63)] == [-errno.EINVAL] * 2
    assert read(size=0) == -errno.EINVAL


@pytest.mark.parametrize("codec", PACKED)
def test_a_block_of_another_size_is_refused(stored, codec):
    read = stored(codec)
    assert read(size=4088) == -errno.EILSEQ
    assert read(size=4104) == -errno.EILSEQ


def test_a_raw_block_is_as_long_as_its_pages(stored):
    read = stored(RAW)
    assert read(size=4088) == -errno.EINVAL
    assert read(length=4095, size=4095) == -errno.EINVAL


def test_a_descriptor_that_cannot_be_read():
    assert lib.pv_block_read(-1, 0, 8, 0, RAW, 8, ffi.new("uint8_t[]", 8)) == -errno.EBADF
