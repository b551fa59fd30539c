"""Tar shards, read forward only: members and their places, and every way in which a shard may be damaged."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from reducer.photos.hashing import PhotoError
from reducer.photos.tar import MOST_HEADER_BYTES, Member, ShardFile, TarScan

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK = tarfile.BLOCKSIZE
SPARSE = "sparse: it is stored as a sparse file, which is not read; pack the shard without --sparse"


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def shard_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def entry(name: bytes, kind: bytes = b"0", size: int | bytes = 0, link: bytes = b"") -> bytes:
    """A header with a right checksum, whatever it says."""
    number = size if isinstance(size, bytes) else b"%011o\0" % size
    header = bytearray(BLOCK)
    for start, value in ((0, name), (100, b"0000644\0"), (108, b"0000000\0" * 2), (124, number), (136, b"0" * 11)):
        header[start : start + len(value)] = value
    header[148:156], header[156:157], header[157 : 157 + len(link)] = b" " * 8, kind, link
    header[257:265] = b"ustar\00000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def stored(name: bytes, content: bytes) -> bytes:
    return entry(name, size=len(content)) + padded(content)


def pax(record: bytes, size: int | None = None) -> bytes:
    """An extended header; its size as is, or as it is said to be."""
    return entry(b"pax", b"x", len(record) if size is None else size) + padded(record)


END = bytes(2 * BLOCK)


@dataclass
class Blocks:
    """A shard's bytes in blocks of one size, and what was asked for."""

    shard: bytes
    size: int = 1000
    offsets: list[int] = field(default_factory=list)
    given: int = 0
    closed: int = 0

    def __call__(self, offset: int) -> Iterator[bytes]:
        self.offsets.append(offset)
        try:
            for start in range(offset, len(self.shard), self.size):
                block = self.shard[start : start + self.size]
                self.given += len(block)
                yield block
        finally:
            self.closed += 1


@dataclass
class Scanned:
    members: list[Member]
    contents: list[bytes | str | None]
    damage: str | None
    odd_names: int
    md5: str

    @property
    def paths(self) -> list[str]:
        return [member.path for member in self.members]


def scanned(shard: bytes, size: int = 1000, wanted: Callable[[int], bool] = lambda number: True) -> Scanned:
    """All there is to be had of a shard: the contents too of those members whose numbers are wanted."""
    digest = hashlib.md5()
    file = ShardFile(Blocks(shard, size), len(shard), digest)
    scan = TarScan(file)
    found = Scanned([], [], None, 0, "")
    for number, member in enumerate(scan):
        found.members.append(member)
        content: bytes | str | None = None
        if not member.link and wanted(number):
            try:
                content = scan.content()
            except PhotoError as error:
                content = str(error)
        found.contents.append(content)
    file.finish()
    file.close()
    found.damage, found.odd_names, found.md5 = scan.damage, scan.odd_names, digest.hexdigest()
    assert found.md5 == hashlib.md5(shard).hexdigest()
    return found


# Whole shards


def name_of(length: int) -> str:
    """Nested so that ustar, which splits a name at a slash, can store as much as it ever can: 155 + 1 + 99."""
    return "/".join(["n" * 77] * (length // 78) + ["n" * (length % 78)])


@pytest.mark.parametrize("form", FORMATS)
def test_every_member_lies_where_it_is_said_to(form: str, tmp_path: Path) -> None:
    files = {
        name_of(length): noise(size, length)
        for length, size in ((1, 0), (99, 1), (100, 511), (101, 512), (255, 513), (300, 70_000))
        if not (form == "ustar" and length > 255)
    }
    files |= {"tür/日本.jpg": noise(5), "./dotted/x.jpg": noise(7), "../up.jpg": noise(3), "/root/a.jpg": noise(4)}
    files["a b\tc'\"\\.jpg"] = noise(6)
    assert {len(name) for name in files} >= {1, 99, 100, 101, 255}
    path = tmp_path / "images_000.tar"
    path.write_bytes(shard_of(files, FORMATS[form]))
    found = scanned(path.read_bytes())
    assert found.damage is None
    assert found.paths == [name.removeprefix("./") for name in files]
    assert found.contents == list(files.values())
    with open(path, "rb") as file:
        for member, content in zip(found.members, files.values(), strict=True):
            file.seek(member.offset)
            assert file.read(member.bytes) == content
            assert member == Member(member.path, member.offset, len(content))


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_what_gnu_tar_writes(form: str, tmp_path: Path) -> None:
    long = "long/" + "x" * (90 if form == "v7" else 99)
    files = {"a/1.jpg": noise(1000), long: noise(10), "a/ü.jpg": noise(20)}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "a/fifo")
    names = ["./a/1.jpg", long, "a/ü.jpg", "a/fifo"] if form != "v7" else ["./a/1.jpg", long, "a/ü.jpg"]
    tar = ["tar", f"--format={form}", "--no-recursion", "-cf", "s.tar", "a", *names]
    subprocess.run(tar, cwd=tmp_path, check=True)
    found = scanned((tmp_path / "s.tar").read_bytes())
    assert (found.damage, found.paths, found.contents) == (None, list(files), list(files.values()))


def test_only_files_come() -> None:
    kinds = [entry(b"k", kind) for kind in (b"3", b"4", b"5", b"6")]
    files = [entry(b"file %d" % number, kind, 3) + padded(b"abc") for number, kind in enumerate((b"0", b"\0", b"7"))]
    old_folder = entry(b"folder/", b"\0")
    found = scanned(b"".join((*kinds, old_folder, *files, END)))
    assert found.paths == ["file 0", "file 1", "file 2"]
    assert (found.contents, found.damage) == ([b"abc"] * 3, None)


@pytest.mark.parametrize("number", [b"%011o\0" % 5, b"\x80" + (5).to_bytes(11), b"          5 "])
def test_numbers_however_written(number: bytes) -> None:
    found = scanned(entry(b"a", size=number) + padded(b"hello") + stored(b"b", b"x") + END)
    assert (found.contents, found.damage) == ([b"hello", b"x"], None)


def test_sizes_in_extended_headers() -> None:
    # As for a file of more than 8 GiB: the header itself says 0.
    found = scanned(pax(b"13 size=1000\n") + entry(b"a") + padded(noise(1000)) + stored(b"b", b"x") + END)
    assert (found.contents, found.damage) == ([noise(1000), b"x"], None)


def test_a_place_past_8_gib() -> None:
    # Never read: a file that is mostly a hole, told by what is asked for.
    size, head = 9 * 2**30, pax(b"19 size=9663676416\n") + entry(b"big")
    tail = stored(b"small", b"x") + END

    def blocks_from(offset: int) -> Iterator[bytes]:
        yield (head + bytes(1000) if offset == 0 else tail[offset - len(head) - size :])

    scan = TarScan(ShardFile(blocks_from, len(head) + size + len(tail)))
    assert list(scan) == [Member("big", len(head), size), Member("small", len(head) + size + BLOCK, 1)]
    assert scan.damage is None


@pytest.mark.parametrize("end", [END, bytes(BLOCK), bytes(10_240), bytes(3_000_000)])
def test_an_end_of_any_length(end: bytes) -> None:
    assert scanned(stored(b"a", b"x") + end).damage is None


def test_a_tar_without_members() -> None:
    found = scanned(bytes(10_240))
    assert (found.members, found.damage) == ([], None)


def test_many_extended_headers_of_one_member() -> None:
    headers = b"".join(pax(b"9 path=%d\n" % n) for n in range(9)) + entry(b"n", b"L", 2) + padded(b"y\0")
    found = scanned(headers + stored(b"x", b"x") + stored(b"z", b"z") + END)
    assert (found.paths, found.contents, found.damage) == (["0", "z"], [b"x", b"z"], None)


def test_a_global_header_is_no_member() -> None:
    comment = b"52 comment=0123456789012345678901234567890123456789\n"
    found = scanned(entry(b"pax_global_header", b"g", len(comment)) + padded(comment) + stored(b"a", b"x") + END)
    assert (found.paths, found.contents, found.damage) == (["a"], [b"x"], None)


def test_global_headers_do_not_add_up() -> None:
    record = b"1000 key%06d=" + b"v" * 984 + b"\n"
    headers = (entry(b"g", b"g", 1000) + padded(record % n) + entry(b"a") for n in range(3000))
    shard = b"".join(headers) + END
    scan = TarScan(ShardFile(Blocks(shard), len(shard)))
    tracemalloc.start()
    assert sum(1 for _ in scan) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scan.damage is None
    assert peak < 1_000_000


# Blocks, skips and the digest

FILES = {
    "first.jpg": noise(1500, 1),
    "an/" + "e" * 97 + "/very long name": noise(3, 2),
    "empty.jpg": b"",
    "whole.jpg": noise(1024, 3),
    "ü.jpg": noise(4097, 4),
}


@pytest.mark.parametrize("size", [1, 2, 3, 511, 512, 513, 1000, 4096, 10_240, 2**20])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("wanted", [0b11111, 0b00000, 0b10101, 0b01010])
def test_blocks_of_any_size_give_the_same(size: int, form: str, wanted: int) -> None:
    shard = shard_of(FILES, FORMATS[form])
    found = scanned(shard, size, lambda number: bool(wanted >> number & 1))
    assert found.paths == list(FILES)
    for number, (member, content) in enumerate(zip(found.members, FILES.values(), strict=True)):
        assert found.contents[number] == (content if wanted >> number & 1 else None)
        assert shard[member.offset :][: member.bytes] == content
    assert found.damage is None


def test_every_cut_of_a_shard_is_told() -> None:
    for form in FORMATS.values():
        shard = shard_of(FILES, form)
        whole = scanned(shard)
        last = whole.members[-1]
        marker = last.offset + last.bytes + -last.bytes % BLOCK
        for end in [*range(0, marker + BLOCK, 97), *range(0, marker + BLOCK, BLOCK), marker + BLOCK - 1]:
            found = scanned(shard[:end], 700)
            assert found.damage is not None
            assert str(end) in found.damage or end < BLOCK
            assert found.paths == whole.paths[: len(found.paths)]
            for number, member in enumerate(whole.members):
                if member.offset + member.bytes <= end and member.bytes:
                    assert found.contents[number] == whole.contents[number]


def test_what_is_not_wanted_is_not_asked_for() -> None:
    shard = shard_of({"a": noise(100), "big": bytes(500_000), "b": noise(100, 1), "also": bytes(20_000), "c": b"c"})
    blocks = Blocks(shard, 5_000)
    file = ShardFile(blocks, len(shard), skip=50_000)
    scan = TarScan(file)
    contents = [scan.content() for member in scan if member.bytes < 1000]
    file.finish()
    file.close()
    assert (contents, scan.damage) == ([noise(100), noise(100, 1), b"c"], None)
    behind = 3 * BLOCK + 500_000 + -500_000 % BLOCK
    assert blocks.offsets == [0, behind]  # 20,000 bytes are rather read
    assert blocks.given == 5_000 + len(shard) - behind
    assert blocks.closed == 2


def test_with_a_digest_all_is_asked_for_once() -> None:
    shard = shard_of({"a": noise(100), "big": bytes(500_000), "b": noise(100, 1)})
    blocks, digest = Blocks(shard, 5_000), hashlib.md5()
    file = ShardFile(blocks, len(shard), digest, skip=50_000)
    assert [member.path for member in TarScan(file)] == ["a", "big", "b"]
    file.finish()
    file.finish()
    file.close()
    assert digest.hexdigest() == hashlib.md5(shard).hexdigest()
    assert (blocks.offsets, blocks.given, blocks.closed) == ([0], len(shard), 1)


def test_without_a_digest_finishing_reads_nothing() -> None:
    blocks = Blocks(noise(100_000))
    file = ShardFile(blocks, 100_000)
    assert file.read(10) == noise(100_000)[:10]
    file.finish()
    assert blocks.given == 1000


@pytest.mark.parametrize("size", [1, 7, 100, 2000])
def test_a_file_is_read_forward_only(size: int) -> None:
    data = noise(1000)
    file = ShardFile(Blocks(data, size), len(data))
    assert (file.read(10), file.tell()) == (data[:10], 10)
    assert file.seek(5, 1) == 15
    assert file.take(300) == data[15:315]
    assert file.seek(-100, 2) == 900
    with pytest.raises(tarfile.ReadError, match="forward"):
        file.seek(899)
    assert file.read() == data[900:]
    assert (file.read(), file.take(1), file.tell()) == (b"", b"", 1000)
    assert file.seek(5000) == 5000
    assert (file.read(5), file.take(5), file.tell()) == (b"", b"", 5000)


def test_nothing_is_asked_for_past_the_end() -> None:
    blocks = Blocks(noise(1000), 100)
    file = ShardFile(blocks, 1000, skip=0)
    file.seek(5000)
    assert (file.read(5), file.take(5), blocks.offsets) == (b"", b"", [])


def test_blocks_that_are_left_are_closed() -> None:
    begun: list[Iterator[bytes]] = []  # kept, or they would be closed as garbage

    def blocks_from(offset: int) -> Iterator[bytes]:
        begun.append(blocks(offset))
        return begun[-1]

    blocks = Blocks(noise(1000), 100)
    file = ShardFile(blocks_from, 1000, skip=200)
    file.take(1)
    file.seek(500)
    assert (file.take(1), blocks.closed) == (noise(1000)[500:501], 1)
    file.close()
    assert (len(begun), blocks.closed) == (2, 2)


def test_blocks_may_be_empty_or_reach_too_far() -> None:
    digest = hashlib.md5()

    def blocks_from(offset: int) -> Iterator[bytes]:
        yield from (b"", b"ab", b"", b"cdef")
        raise AssertionError("that is beyond the end")

    file = ShardFile(blocks_from, 5, digest)
    assert (file.take(3), file.take(9)) == (b"abc", b"de")
    file.finish()
    file.close()
    assert digest.hexdigest() == hashlib.md5(b"abcde").hexdigest()


def test_no_header_is_so_large() -> None:
    file = ShardFile(Blocks(bytes(2 * MOST_HEADER_BYTES), 2**20), 2 * MOST_HEADER_BYTES)
    for size in (MOST_HEADER_BYTES + 1, -1, -BLOCK):
        with pytest.raises(tarfile.ReadError, match="so large"):
            file.read(size)
    for part in (MOST_HEADER_BYTES // 2 - 5, MOST_HEADER_BYTES // 2, 5):
        assert len(file.read(part)) == part
    with pytest.raises(tarfile.ReadError, match="so large"):  # nor one that comes little by little
        file.read(1)
    file.seek(file.tell())
    assert file.read(1) == b"\0"


@pytest.mark.parametrize("error", [PhotoError("unreadable", "gone"), OSError("gone"), MemoryError(), ValueError("bug")])
@pytest.mark.parametrize("good", [0, 1, 3, 4, 12, 20])
def test_what_blocks_raise_is_passed_on(error: Exception, good: int) -> None:
    shard = shard_of(FILES)

    def blocks_from(offset: int) -> Iterator[bytes]:
        for start in range(0, 500 * good, 500):
            yield shard[start : start + 500]
        raise error

    scan = TarScan(ShardFile(blocks_from, len(shard)))
    with pytest.raises(type(error)) as caught:
        for _ in scan:
            scan.content()
    assert caught.value is error
    assert scan.damage is None


def test_too_little_memory_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fromtarfile(_: tarfile.TarFile) -> None:
        raise MemoryError

    scan = TarScan(ShardFile(Blocks(ABC), len(ABC)))
    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", fromtarfile)
    with pytest.raises(MemoryError):
        next(iter(scan))


def test_contents_are_had_once_and_not_of_links() -> None:
    shard = stored(b"a", b"x") + entry(b"l", b"2", link=b"a") + END
    scan = TarScan(ShardFile(Blocks(shard), len(shard)))
    with pytest.raises(ValueError):
        scan.content()
    for member in scan:
        if not member.link:
            assert scan.content() == b"x"
        with pytest.raises(ValueError):
            scan.content()


# Damage

A, B, C = stored(b"a.jpg", noise(1000, 1)), stored(b"b", noise(600, 2)), stored(b"c.jpg", noise(300, 3))
ABC = A + B + C + END
AT_B, AT_C, AT_END = len(A), len(A + B), len(A + B + C)


def flipped(shard: bytes, at: int) -> bytes:
    return shard[:at] + bytes([shard[at] ^ 1]) + shard[at + 1 :]


LONG_NAME = entry(b"././@LongLink", b"L", 600) + padded(b"d/" * 299 + b"x\0")
TIB, MOST = b"\x80" + (2**40).to_bytes(11), b"\x80" + b"\xff" * 11
MINUS_1, MINUS_512, MINUS_1024 = b"\xff" * 12, b"\xff" * 10 + b"\xfe\0", b"\xff" * 10 + b"\xfc\0"
NO_TAR = "it is no tar: there is no sound header at byte 0"
NO_MARKER = "it ends at byte {end} without an end-of-archive marker (cut off?)"
BAD = f"the header at byte {AT_B} is damaged"
CUT_IN_HEADER = f"it is cut off at byte {{end}}, within the header at byte {AT_B}"
CUT = "it is cut off at byte {end}, within b"
MORE = f"there are more data behind the end-of-archive marker at byte {AT_B}"
# The shard, the members that come, and what is said; {end} is the shard's size.
DAMAGED = {
    "cut within data": (ABC[: AT_B + 700], "ab", CUT),
    "cut before data": (ABC[: AT_B + BLOCK], "ab", CUT),
    "cut within padding": (ABC[: AT_B + BLOCK + 600], "ab", NO_MARKER),
    "cut within a header": (ABC[: AT_B + 100], "a", CUT_IN_HEADER),
    "cut at a member": (ABC[:AT_B], "a", NO_MARKER),
    "cut before the marker": (ABC[:AT_END], "abc", NO_MARKER),
    "cut within the marker": (A + bytes(9), "a", CUT_IN_HEADER),
    "empty": (b"", "", "it is empty"),
    "one byte": (b"x", "", NO_TAR),
    "text": (b"id,label\n" * 1000, "", NO_TAR),
    "a photo": (b"\xff\xd8\xff\xe0" + noise(5000), "", NO_TAR),
    "the first header changed": (flipped(ABC, 3), "", NO_TAR),
    "gzip": (gzip.compress(ABC), "", "it is compressed (gzip): unpack it first"),
    "bzip2": (bz2.compress(ABC), "", "it is compressed (bzip2): unpack it first"),
    "xz": (lzma.compress(ABC), "", "it is compressed (xz): unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd" + noise(99), "", "it is compressed (zstd): unpack it first"),
    "a name changed": (flipped(ABC, AT_B + 5), "a", BAD),
    "the checksum changed": (flipped(ABC, AT_B + 150), "a", BAD),
    "garbage": (A + noise(BLOCK) + B + END, "a", BAD),
    "garbage at the end": (A + noise(BLOCK), "a", BAD),
    "bytes lost": (A[:-20] + B + C + END, "a", BAD),
    "zeros between": (A + bytes(BLOCK) + B + END, "a", MORE),
    "two tars": (A + END + B + END, "a", MORE),
    "data far behind": (A + bytes(3_000_000) + b"x", "a", MORE),
    "size no number": (A + entry(b"b", size=b"no number   ") + B + END, "a", BAD),
    "size of 1 TiB": (A + entry(b"b", size=TIB) + B + END, "ab", CUT),
    "size as large as can be": (A + entry(b"b", size=MOST) + B + END, "ab", CUT),
    "size of -1": (A + entry(b"b", size=MINUS_1) + B + END, "a", BAD),
    "size of -1024": (A + entry(b"b", size=MINUS_1024) + B + END, "a", BAD),
    "size as small as can be": (A + entry(b"b", size=b"\xff" + bytes(11)) + B + END, "a", BAD),
    "old folder of -1024": (A + entry(b"b", b"D", MINUS_1024) + B + END, "a", BAD),
    "unknown kind of 1 TiB": (A + entry(b"b", b"Q", TIB) + B + END, "a", CUT),
    "record of length 0": (A + pax(b"0 path=x\n") + B + END, "a", BAD),
    "record of 9,999 digits": (A + pax(b"9" * 9999 + b" path=x\n") + B + END, "a", BAD),
    "record longer than its header": (A + pax(b"999 path=x\n") + B + END, "a", BAD),
    "extended header too long": (A + pax(b"9 path=x\n", 1024) + B + END, "a", BAD),
    "extended header of 1 MiB": (A + pax(b"9 path=x\n", 2**20) + B + END, "a", CUT_IN_HEADER),
    "extended header of 1 GiB": (A + pax(b"9 path=x\n", 2**30) + B + END, "a", BAD),
    "extended header alone": (A + pax(b"9 path=x\n") + END, "a", BAD),
    "extended size of -10000": (A + pax(b"15 size=-10000\n") + B + END, "a", BAD),
    "extended size of 10 TB": (A + pax(b"22 size=9999999999999\n") + stored(b"b", b"b") + END, "ab", CUT),
    "global size": (A + entry(b"g", b"g", 13) + padded(b"13 size=5000\n") + B + END, "a", BAD),
    "cut before a sparse map": (A + pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"), "a", CUT_IN_HEADER),
    "sparse size no number": (A + pax(b"21 GNU.sparse.size=x\n") + B + END, "a", BAD),
    "cut within a long name": ((A + LONG_NAME)[:-600], "a", CUT_IN_HEADER),
    "cut behind a long name": (A + LONG_NAME, "a", CUT_IN_HEADER),
    "sparse file of -1024": (A + entry(b"b", b"S", MINUS_1024) + B + END, "a", BAD),
    "name like a magic number": (
        stored(b"BZh", b"") + noise(BLOCK) + END,
        ["BZh"],
        f"the header at byte {BLOCK} is damaged",
    ),
    "second header like a magic number": (entry(b"n", b"L", 4) + padded(b"x") + b"BZh" + noise(509), "", NO_TAR),
    "50 long names": (A + (entry(b"n", b"L", 1) + padded(b"x")) * 50 + B + END, "a", BAD),
    "long name of -512": (A + entry(b"n", b"L", MINUS_512) + B + END, "a", BAD),
    "long names one after another": (A + (entry(b"n", b"L", 1) + padded(b"x")) * 3000 + B + END, "a", BAD),
}


@pytest.mark.parametrize("size", [100, 513, 2**20])
@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_told_and_what_lies_before_is_had(case: str, size: int) -> None:
    shard, names, expected = DAMAGED[case]
    if len(shard) > 1_000_000 and size < 512:
        size = 5000
    found = scanned(shard, size)
    assert found.damage == expected.format(end=len(shard))
    assert found.paths == [f"{name}.jpg" if name in "ac" else name for name in names]
    contents = {"a": noise(1000, 1), "b": noise(600, 2), "c": noise(300, 3), "BZh": b""}
    cut_off = f"cut off: the shard ends at byte {len(shard)}, within it"
    for name, member, content in zip(names, found.members, found.contents, strict=True):
        if name == "b" and expected == CUT:
            assert (member.offset, member.bytes, member.problem, content) == (0, 0, cut_off, cut_off)
        else:
            assert (member.problem, content) == (None, contents[name])


def test_any_flipped_bit_of_a_header_is_told() -> None:
    random_ = random.Random(1)
    for at in random_.sample(range(AT_B, AT_B + BLOCK), 60):
        found = scanned(flipped(ABC, at))
        assert (found.paths, found.damage) == (["a.jpg"], BAD)


@pytest.mark.parametrize("form", FORMATS)
def test_no_garbage_is_too_much(form: str) -> None:
    # With right checksums, so that all of a header is believed.
    random_ = random.Random(form)
    shard = bytearray(shard_of(FILES, FORMATS[form]))
    for _ in range(300):
        broken = bytearray(shard)
        start = random_.randrange(len(shard) // BLOCK) * BLOCK
        at = random_.choice([random_.randrange(BLOCK), random_.randrange(124, 136), 124, 156])
        broken[start + at] = random_.choice([0, 0x80, 0xFF, *b"0123457gxLKS \n", random_.randrange(256)])
        header = broken[start : start + BLOCK]
        header[148:156] = b" " * 8
        broken[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        found = scanned(bytes(broken))
        for member in found.members:
            assert 0 <= member.offset <= member.offset + member.bytes <= len(broken)


def test_a_huge_size_takes_no_memory() -> None:
    shard = stored(b"a", b"x") + entry(b"b", size=b"\x80" + (2**40).to_bytes(11)) + bytes(1_000_000)
    tracemalloc.start()
    scan = TarScan(ShardFile(Blocks(shard, 1000), len(shard)))
    for member in scan:
        if member.path == "b":
            with pytest.raises(PhotoError, match=f"cut off: the shard ends at byte {len(shard)}, within it"):
                scan.content()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scan.damage == f"it is cut off at byte {len(shard)}, within b"
    assert peak < 100_000


def test_a_shard_that_got_shorter() -> None:
    end = AT_B + 700
    scan = TarScan(ShardFile(Blocks(ABC[:end]), len(ABC)))
    seen = []
    for member in scan:
        seen.append(member.path)
        if member.path == "b":
            with pytest.raises(PhotoError, match=f"cut off: the shard ends at byte {end}, within it"):
                scan.content()
            assert scan.damage is not None
    assert (seen, scan.damage) == (["a.jpg", "b"], f"it is cut off at byte {end}, within b")


# Links


def linked(*entries: bytes) -> dict[str, Member]:
    found = scanned(b"".join(entries) + END)
    assert found.damage is None
    return {member.path: member for member in found.members}


def hard(name: bytes, target: bytes) -> bytes:
    return entry(name, b"1", link=target)


def symbolic(name: bytes, target: bytes) -> bytes:
    return entry(name, b"2", link=target)


def no_file(target: str) -> str:
    return f"link: it leads to {target}, which is no file that can be read from this shard"


def test_links_come_last_with_the_place_of_their_target() -> None:
    shard = (
        symbolic(b"a/s.jpg", b"../b/x.jpg")
        + stored(b"./b/x.jpg", noise(700))
        + hard(b"h.jpg", b"./b/x.jpg")
        + stored(b"z", b"z")
        + END
    )
    for size in (300, 2**20):
        found = scanned(shard, size)
        assert found.paths == ["b/x.jpg", "z", "a/s.jpg", "h.jpg"]
        assert [member.link for member in found.members] == [False, False, True, True]
        for member in (found.members[0], *found.members[2:]):
            assert (member.offset, member.bytes, member.problem) == (2 * BLOCK, 700, None)
            assert shard[member.offset :][: member.bytes] == noise(700)


def test_links_that_lead_somewhere() -> None:
    long = b"l" * 99
    members = linked(
        stored(b"d/x", b"data"),
        symbolic(b"d/next", b"x"),
        symbolic(b"e/chain", b".././d//next"),
        hard(b"e/hard of a symbolic", b"d/next"),  # relative to e then, where no x is
        hard(b"hard", b"d/x"),
        hard(b"hard of a hard", b"hard"),
        symbolic(b"symbolic of a hard", b"hard of a hard"),
        symbolic(b"round/about", b"../round/../d/x"),
        *(symbolic(b"%03d" % n, b"%03d" % (n + 1) if n < 38 else b"d/x") for n in range(39)),
        stored(long, b"long"),
        symbolic(b"to a long name", long),
    )
    at = members["d/x"]
    for name in ("d/next", "e/chain", "hard", "hard of a hard", "symbolic of a hard", "round/about", "000", "038"):
        assert members[name] == Member(name, at.offset, 4, None, True)
    assert members["to a long name"].offset == members["l" * 99].offset
    assert members["e/hard of a symbolic"].problem == no_file("d/next")


def test_links_that_lead_nowhere() -> None:
    sparse = entry(b"sparse", b"S")
    targets = {
        b"nowhere": b"none.jpg",
        b"outside": b"../d/x",
        b"absolute": b"/d/x",
        b"folder": b"d",
        b"up": b"..",
        b"empty": b"",
        b"to a sparse one": b"sparse",
        b"via nowhere": b"nowhere",
        b"odd": b"\xff\n\xfe",
        b"no file any more": b"was",
    }
    members = linked(
        stored(b"../d/x", b"data"),
        stored(b"/d/x", b"data"),
        entry(b"d", b"5"),
        sparse,
        stored(b"was", b"data"),
        entry(b"was", b"5"),
        *(symbolic(name, target) for name, target in targets.items()),
        hard(b"hard to nothing yet", b"later"),
        hard(b"hard to a folder", b"d"),
        stored(b"later", b"data"),
    )
    for name, target in targets.items():
        problem = no_file("\\udcff \\udcfe" if name == b"odd" else target.decode())
        assert members[name.decode()] == Member(name.decode(), 0, 0, problem, True)
    assert members["hard to nothing yet"].problem == no_file("later")
    assert members["hard to a folder"].problem == no_file("d")


def test_links_that_lead_round() -> None:
    members = linked(symbolic(b"self", b"self"), symbolic(b"a", b"b"), symbolic(b"b", b"c"), symbolic(b"c", b"a"))
    assert {member.problem for member in members.values()} == {
        f"link: it leads to {target}, which leads back to itself" for target in ("self", "a", "b", "c")
    }


def test_of_a_name_stored_twice_links_mean_what_unpacking_gives(tmp_path: Path) -> None:
    shard = b"".join(
        (
            stored(b"x", b"one"),
            hard(b"hard 1", b"x"),
            symbolic(b"soft", b"x"),
            stored(b"x", b"two"),
            hard(b"hard 2", b"x"),
            stored(b"x", b"three"),
            END,
        )
    )
    (tmp_path / "s.tar").write_bytes(shard)
    subprocess.run(["tar", "-xf", "s.tar"], cwd=tmp_path, check=True)
    links = [member for member in scanned(shard).members if member.link]
    assert [member.path for member in links] == ["hard 1", "soft", "hard 2"]
    for member in links:
        assert shard[member.offset :][: member.bytes] == (tmp_path / member.path).read_bytes()


def test_links_as_gnu_tar_stores_them(tmp_path: Path) -> None:
    (tmp_path / "d/e").mkdir(parents=True)
    (tmp_path / "d/a.jpg").write_bytes(noise(900))
    (tmp_path / "d/b.jpg").hardlink_to(tmp_path / "d/a.jpg")
    (tmp_path / "d/e/c.jpg").symlink_to("../a.jpg")
    (tmp_path / "d/e" / ("n" * 120)).symlink_to("./c.jpg")
    for form in ("gnu", "pax"):
        subprocess.run(["tar", f"--format={form}", "--sort=name", "-cf", "s.tar", "./d"], cwd=tmp_path, check=True)
        shard = (tmp_path / "s.tar").read_bytes()
        found = scanned(shard)
        assert found.paths == ["d/a.jpg", "d/b.jpg", "d/e/c.jpg", "d/e/" + "n" * 120]
        assert [member.link for member in found.members] == [False, True, True, True]
        assert all(shard[member.offset :][: member.bytes] == noise(900) for member in found.members)


def test_links_come_before_damage_ends_it_all() -> None:
    found = scanned(A + hard(b"h", b"a.jpg") + B[: BLOCK + 100])
    assert found.paths == ["a.jpg", "b", "h"]
    assert found.members[2] == Member("h", BLOCK, 1000, None, True)
    assert found.damage is not None


# Sparse files and odd names


@pytest.mark.parametrize("kind", ["gnu", "oldgnu", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("pieces", [1, 3, 200])  # old GNU headers hold four, and 21 in every block behind
def test_sparse_files_are_told_and_what_follows_is_right(kind: str, pieces: int, tmp_path: Path) -> None:
    with open(tmp_path / "sparse.jpg", "wb") as file:
        for piece in range(pieces):
            file.seek(piece * 65_536 + 4096)
            file.write(noise(4096, piece))
        file.truncate(pieces * 65_536 + 100)
    (tmp_path / "a.jpg").write_bytes(noise(1000))
    (tmp_path / "b.jpg").write_bytes(noise(600))
    form = ["--format=pax", f"--sparse-version={kind}"] if kind[0] in "01" else [f"--format={kind}"]
    names = ["a.jpg", "sparse.jpg", "b.jpg"]
    subprocess.run(["tar", "--sparse", *form, "-cf", "s.tar", *names], cwd=tmp_path, check=True)
    shard = (tmp_path / "s.tar").read_bytes()
    if len(shard) > pieces * 65_536:
        pytest.skip("this file system knows no holes")
    found = scanned(shard)
    assert (found.paths, found.damage) == (names, None)
    assert found.members[1] == Member("sparse.jpg", 0, 0, SPARSE)
    assert found.contents == [noise(1000), SPARSE, noise(600)]
    cut = scanned(shard[: found.members[2].offset - 4 * BLOCK])
    assert cut.paths == names[:2]
    assert cut.damage is not None
    assert "within sparse.jpg" in cut.damage


def test_maps_of_sparse_files_take_no_memory() -> None:
    numbers = b"0," * 2_000_000 + b"0"
    record = b"%d GNU.sparse.map=%s\n" % (len(numbers) + 24, numbers)
    assert len(record) == len(numbers) + 24
    shard = pax(record) + stored(b"s", b"") + stored(b"b", b"x") + END
    tracemalloc.start()
    found = [(member.path, member.problem) for member in TarScan(ShardFile(Blocks(shard, 2**20), len(shard)))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("s", SPARSE), ("b", None)]
    assert peak < 30_000_000


@pytest.mark.parametrize("form", FORMATS)
def test_names_that_are_not_text_are_counted(form: str) -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    files = {"a": noise(600), odd: noise(700), "n/" * 40 + odd: b"x", "b": noise(10)}
    found = scanned(shard_of(files, FORMATS[form]))
    assert (found.paths, found.odd_names, found.damage) == (["a", "b"], 2, None)
    assert found.contents == [noise(600), noise(10)]


def test_an_odd_name_that_is_cut_off_is_damage_too() -> None:
    found = scanned(A + stored(b"\xff\n", noise(1000))[:-300])
    assert (found.paths, found.odd_names) == (["a.jpg"], 1)
    assert found.damage == f"it is cut off at byte {AT_B + BLOCK + 724}, within \\udcff "
