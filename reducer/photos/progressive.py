"""Take the first scan of a progressive JPEG, an eighth of the picture's size, which is enough for a hash."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

#: Least ratio of the columns and rows of the first scan's picture to those of the hash's grid; a smaller picture is not
#: taken for the whole.
FIRST_SCAN_FLOOR = 8
BLOCK = 8
#: Most segments of a header; real ones have far fewer.
MOST_SEGMENTS = 1000
START, PROGRESSIVE, SCAN, END = b"\xff\xd8", 0xC2, 0xDA, b"\xff\xd9"
#: Frames of all kinds but for tables that have numbers between theirs.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
APP2, APP14, YCBCR = 0xE2, 0xEE, b"\x01"
#: A marker may be preceded by any number of these, beside its own.
FILL = re.compile(rb"\xff*(?=\xff)")
#: A marker behind the bits of a scan: neither a byte 255 of theirs nor one that says where to start anew.
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
#: Switches restart intervals off for the scan that is added, whose bits have no restart markers among them.
NO_RESTARTS = b"\xff\xdd\x00\x04\x00\x00"


@dataclass(frozen=True, slots=True)
class Component:
    """A component of a picture, told by its frame: its number, and its samples in each direction."""

    number: int
    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class FirstScan:
    """The first scan of a progressive JPEG: its end in the file, and the bits that it lacks.

    Attributes
    ----------
    end : int
        Bytes of the file up to there.
    width, height : int
        Of the picture, in pixels.
    components : tuple of Component
        Of its frame.
    low_bits : int
        Number of the lowest bits of the blocks' means that follow in later scans.
    """

    end: int
    width: int
    height: int
    components: tuple[Component, ...]
    low_bits: int


class _Odd(Exception):
    """A file that is no progressive JPEG, or not one of the usual kind."""


class _Short(Exception):
    """The given beginning of a file ends too early to tell."""


def bytes_needed(head: bytes, grid: tuple[int, int], max_pixels: int) -> int | None:
    """Return how many bytes of a file are needed for a hash, told from its beginning.

    Parameters
    ----------
    head : bytes
        Beginning of the file.
    grid : tuple of int
        Columns and rows, in pixels, that the hash resizes the photo to.
    max_pixels : int
        A picture of more is not decoded anyway.

    Returns
    -------
    int or None
        Bytes; more than there are in ``head`` where it ends too early to tell. None for all of them.
    """
    try:
        return _first_scan(head, grid, max_pixels).end
    except _Odd:
        return None
    except _Short:
        return 4 * len(head)


def first_scan_only(content: bytes, grid: tuple[int, int], max_pixels: int) -> bytes | None:
    """Return a JPEG of the first scan of a progressive one, to be decoded in its place.

    The means of the blocks of 8 by 8 pixels are all that it holds. Where their last bit follows in a later scan (as
    libjpeg's own script has it), it stands as 0 and 1 in turn: left out, everything would be half a step too dark, and
    neighbouring cells of the grid that are nearly equal would round apart.

    Parameters
    ----------
    content : bytes
        The file, or as much of it as `bytes_needed`.
    grid : tuple of int
        Columns and rows, in pixels, that the hash resizes the photo to.
    max_pixels : int
        A picture of more is not decoded anyway.

    Returns
    -------
    bytes or None
        None if it is no progressive JPEG, or too small or too unusual a one: then all of it is to be decoded.

    Notes
    -----
    Progressive JPEG: ITU-T T.81 (1992), annex G; a scan that gives one more bit of the means is one bit per block,
    in rows.
    """
    try:
        scan = _first_scan(content, grid, max_pixels)
    except (_Odd, _Short):
        return None
    return b"".join([memoryview(content)[: scan.end], _alternating_bits(scan) if scan.low_bits else b"", END])


def _alternating_bits(scan: FirstScan) -> bytes:
    """Return a scan that gives the last bit of the first component's blocks, as a chessboard."""
    first = scan.components[0]
    most_columns = max(component.columns for component in scan.components)
    most_rows = max(component.rows for component in scan.components)
    columns = math.ceil(math.ceil(scan.width * first.columns / most_columns) / BLOCK)
    rows = math.ceil(math.ceil(scan.height * first.rows / most_rows) / BLOCK)
    black, white = ("01" * columns)[:columns], ("10" * columns)[:columns]
    bits = "".join(white if row % 2 else black for row in range(rows))
    packed = int(bits + "1" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8))
    header = bytes([0xFF, SCAN, 0, 8, 1, first.number, 0, 0, 0, 0x10])
    return NO_RESTARTS + header + packed.replace(b"\xff", b"\xff\x00")


def _first_scan(content: bytes, grid: tuple[int, int], max_pixels: int) -> FirstScan:
    if not content.startswith(START):
        raise _Odd if len(content) >= len(START) or not START.startswith(content) else _Short
    position, frame = len(START), b""
    for _ in range(MOST_SEGMENTS):
        kind, segment, position = _segment(content, position)
        if kind in FRAMES:
            if kind != PROGRESSIVE:
                raise _Odd
            frame = segment
        elif kind == SCAN:
            break
        several = kind == APP2 and segment.startswith(b"MPF\0")  # pictures, found by their places in the file
        if several or (kind == APP14 and segment.startswith(b"Adobe") and segment[11:12] != YCBCR):
            raise _Odd
    else:
        raise _Odd
    width, height, components = _frame(frame)
    low_bits = _scan(segment, components)
    for pixels, cells in zip((width, height), grid, strict=True):
        if math.ceil(pixels / BLOCK) < FIRST_SCAN_FLOOR * cells:
            raise _Odd
    if width * height > max_pixels:
        raise _Odd
    marker = NEXT_MARKER.search(content, position)
    if marker is None:
        raise _Short
    return FirstScan(marker.start(), width, height, components, low_bits)


def _segment(content: bytes, position: int) -> tuple[int, bytes, int]:
    """Return the segment that begins at a position: its marker, its content, its end."""
    if fill := FILL.match(content, position):
        position = fill.end()
    start = content[position : position + 4]
    if start[:1] not in (b"", b"\xff"):
        raise _Odd
    if len(start) < 4:
        raise _Short
    end = position + 2 + int.from_bytes(start[2:])
    if end > len(content):
        raise _Short
    return start[1], content[position + 4 : end], end


def _frame(segment: bytes) -> tuple[int, int, tuple[Component, ...]]:
    """Return width, height and components of a frame of 8 bits per sample, grey or YCbCr."""
    count = segment[5] if len(segment) > 5 else 0
    if count not in (1, 3) or len(segment) != 6 + 3 * count or segment[0] != 8:
        raise _Odd
    parts = [segment[start : start + 3] for start in range(6, len(segment), 3)]
    components = tuple(Component(number, factors >> 4, factors & 15) for number, factors, _ in parts)
    if bytes(component.number for component in components) == b"RGB":
        raise _Odd
    if not all(component.columns and component.rows for component in components):
        raise _Odd
    return int.from_bytes(segment[3:5]), int.from_bytes(segment[1:3]), components


def _scan(segment: bytes, components: tuple[Component, ...]) -> int:
    """Return how many low bits are left out by a scan of the means of the first component's blocks."""
    count = segment[0] if segment else 0
    if not count or len(segment) != 4 + 2 * count or components[0].number not in segment[1 : 1 + 2 * count : 2]:
        raise _Odd
    first, last, bits = segment[-3:]
    if first or last or bits > 1:
        raise _Odd
    return bits
