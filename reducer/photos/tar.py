"""Read tar shards once and forward only: their members in turn, and the damage of a shard."""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from reducer.photos.hashing import PhotoError

#: Most bytes of one member's header, extended headers and all: it is held whole, and `tarfile` makes objects of it that
#: take up to fifteen times as much.
MOST_HEADER_BYTES = 16 * 2**20
#: Most headers of a member, nested for `tarfile`, which would run out of stack; real members have up to four.
MOST_HEADERS = 20
#: Bytes that are rather read and dropped than skipped by a new request: they come about as fast as its first byte.
SKIP = 16 * 2**20
#: Bytes that are looked at together behind the end-of-archive marker.
PIECE = 2**20
#: As many links in a row are followed as Linux does; more are taken for a loop.
MOST_LINKS = 40
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
SPARSE = "sparse: it is stored as a sparse file, which is not read; pack the shard without --sparse"

#: Raised by `tarfile` for a block of zeros.
END_MARKER: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined]

#: Entry of a name: offset and number of bytes of the data of a file, or target of a symbolic link.
_Entry = tuple[int, int] | str


class ShardFile:
    """A shard as a file that is read forward only, for `tarfile` to read from.

    Parameters
    ----------
    blocks_from : callable
        From an offset in bytes to the shard's bytes from there on, in order, in blocks of any size. Errors are
        passed on.
    size : int
        Bytes of the shard; blocks beyond are not looked at.
    digest : hash object, optional
        Updated with every byte that comes, once and in order; nothing is skipped then.
    skip : int, optional
        Where more bytes than these lie between what has come and what is wanted, they are not asked for.

    Attributes
    ----------
    size : int
        As given.
    beginning : bytes
        Bytes of the first `read`, if that was at the beginning.
    short : bool
        Whether the last `read` gave less than was asked for.
    failed : bool
        Whether ``blocks_from`` or its blocks raised something.
    """

    def __init__(
        self,
        blocks_from: Callable[[int], Iterator[bytes]],
        size: int,
        digest: hashlib._Hash | None = None,
        skip: int = SKIP,
    ) -> None:
        self.size = size
        self.beginning = b""
        self.short = False
        self.failed = False
        self._blocks_from = blocks_from
        self._blocks: Iterator[bytes] | None = None
        self._digest = digest
        self._skip = skip
        self._block = memoryview(b"")
        self._start = 0  # of the block in the shard
        self._position = 0
        self._read_in_a_row = 0

    def read(self, size: int = -1) -> bytes:
        """Read a part of a header.

        Parameters
        ----------
        size : int
            Bytes; -1 for all that are left.

        Raises
        ------
        tarfile.ReadError
            If these, with all that was read since the last `seek` or `take`, are more than `MOST_HEADER_BYTES`, or less
            than none.
        """
        if size == -1:
            size = max(0, self.size - self._position)
        if not 0 <= size <= MOST_HEADER_BYTES - self._read_in_a_row:
            raise tarfile.ReadError("no header is so large")
        position, in_a_row = self._position, self._read_in_a_row
        content = self.take(size)
        self._read_in_a_row = in_a_row + size
        self.short = len(content) < size
        if position == 0:
            self.beginning = content
        return content

    def take(self, size: int) -> bytes:
        """Read data.

        Parameters
        ----------
        size : int
            Bytes.

        Returns
        -------
        bytes
            As many as asked for; fewer only at the end of the shard.
        """
        self._read_in_a_row = 0
        left = min(size, self.size - self._position)
        parts: list[memoryview] = []
        while left > 0 and (ahead := self._ahead()):
            parts.append(ahead[:left])
            left -= len(parts[-1])
            self._position += len(parts[-1])
        return b"".join(parts)

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """Go forward, past the end too.

        Parameters
        ----------
        position : int
            Bytes, from where ``whence`` says (as for `io.IOBase.seek`).

        Returns
        -------
        int
            The new position, bytes.

        Raises
        ------
        tarfile.ReadError
            If that lies behind.
        """
        position += {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < self._position:
            raise tarfile.ReadError("a shard is read forward only")
        self._read_in_a_row = 0
        self._position = position
        return position

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def finish(self) -> None:
        """Read to the end, where a digest is wanted."""
        if self._digest is not None:
            self._position = max(self._position, self.size)
            self._ahead()

    def close(self) -> None:
        """Let go of the blocks that are under way."""
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()

    def _ahead(self) -> memoryview:
        """Return the rest of the block at the position; nothing at the end."""
        while self._position >= (end := self._start + len(self._block)) and end < self.size:
            try:
                if self._digest is None and self._position - end > self._skip:
                    self.close()
                    self._blocks, end = None, self._position
                if self._blocks is None:
                    self._blocks = self._blocks_from(end)
                block = next(self._blocks, None)
            except BaseException:
                self.failed = True
                raise
            self._start, self._block = end, memoryview(block or b"")[: self.size - end]
            if self._digest is not None:
                self._digest.update(self._block)
            if block is None:
                break
        return self._block[self._position - self._start :]


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard.

    Attributes
    ----------
    path : str
        Path as stored, without a leading "./"; never resolved: "../x.jpg" is only a name.
    offset : int
        Start of the data in the shard, bytes; 0 with a problem.
    bytes : int
        Size of the data; 0 with a problem.
    problem : str or None
        Reason why the data cannot be read as one range, one line ``kind: detail``; the kind is "sparse", "cut off" or
        "link".
    link : bool
        Whether offset and bytes are those of another member, that this one links to.
    """

    path: str
    offset: int
    bytes: int
    problem: str | None = None
    link: bool = False


class _Tar(tarfile.TarFile):
    """A tar that counts the headers that were read for a member."""

    headers = 0


class _Header(tarfile.TarInfo):
    """A header without the maps of sparse files, which are not read and may be huge."""

    def _proc_member(self, tar: _Tar) -> tarfile.TarInfo:
        tar.headers += 1
        if tar.headers > MOST_HEADERS:
            raise tarfile.ReadError("no member has so many headers")
        header: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return header

    def _proc_gnusparse_00(self, following: tarfile.TarInfo, *_: object) -> None:
        following.sparse = b""

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


class TarScan:
    """The members of a shard, in turn: to be iterated once.

    Files come as they are stored, hard and symbolic links behind the last of them; all else is left out. Beside the
    header that is read, the names of all members are held.

    Parameters
    ----------
    file : ShardFile
        At its beginning.

    Attributes
    ----------
    damage : str or None
        After the iteration: what is wrong with the shard, one line naming the byte where it was found; None if it is
        whole. All that lies before was yielded.
    odd_names : int
        Members left out because their names are not UTF-8 text.
    """

    def __init__(self, file: ShardFile) -> None:
        self.damage: str | None = None
        self.odd_names = 0
        self._file = file
        # A TarFile reads the first header as soon as it is made, and keeps to itself why it stops where it stops. So it
        # is made of an empty tar, and is there for `TarInfo.fromtarfile`, which tells.
        self._tar = _Tar(fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE)), encoding="utf-8")
        stream: Any = file
        self._tar.fileobj = stream
        self._tar.offset = 0
        self._last: Member | None = None
        self._entries: dict[str, _Entry] = {}

    def __iter__(self) -> Iterator[Member]:
        links: list[tuple[str, str, _Entry | None]] = []
        for header in self._headers():
            path = header.name.removeprefix("./")
            entry: _Entry | None = None
            problem = None
            if header.issym():
                entry = header.linkname
            elif header.islnk():
                entry = self._entries.get(posixpath.normpath(header.linkname))
            elif header.issparse():
                problem = SPARSE
            elif self.damage is not None:
                problem = f"cut off: the shard ends at byte {self._file.size}, within it"
            elif header.isreg():
                entry = header.offset_data, header.size

            # The last of a name is what unpacking would leave.
            if entry is None:
                self._entries.pop(posixpath.normpath(path), None)
            else:
                self._entries[posixpath.normpath(path)] = entry

            if not (header.isreg() or header.issym() or header.islnk()):
                continue
            if not _is_text(path):
                self.odd_names += 1
            elif header.isreg():
                offset, size = entry if isinstance(entry, tuple) else (0, 0)
                self._last = Member(path, offset, size, problem)
                yield self._last
            else:
                links.append((path, header.linkname, entry))

        for link in links:
            self._last = self._follow(*link)
            yield self._last

    def content(self) -> bytes:
        """Read the data of the member that was yielded last; once, and not for a link.

        Raises
        ------
        PhotoError
            If the member has a problem, or the shard ends within it after all.
        """
        member, self._last = self._last, None
        if member is None or (member.link and member.problem is None):
            raise ValueError("these data lie behind, or there are none")
        if member.problem is not None:
            kind, _, detail = member.problem.partition(": ")
            raise PhotoError(kind, detail)
        content = self._file.take(member.bytes)
        if len(content) < member.bytes:  # it was longer when its size was asked for
            self.damage = _cut_off(self._file.tell(), member.path)
            raise PhotoError("cut off", f"the shard ends at byte {self._file.tell()}, within it")
        return content

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        """Yield all headers that can be read; `damage` then tells whether the data of the header are there."""
        tar, size = self._tar, self._file.size
        while self.damage is None:
            start = tar.offset
            self._file.seek(start)
            tar.headers = 0
            try:
                header = _Header.fromtarfile(tar)
            except MemoryError:
                raise
            except END_MARKER:
                self.damage = self._behind_marker(start)
                return
            except Exception:  # tarfile stumbles on a broken header in many ways
                if self._file.failed:
                    raise
                self.damage = self._damage(start)
                return
            # Global extended headers add up, however many there are; these few fields are all that is used of them.
            tar.pax_headers = {key: value for key, value in tar.pax_headers.items() if key in tarfile.PAX_FIELDS}

            end = tar.offset
            if header.isreg() and not header.issparse():
                end = header.offset_data + header.size
            sizes_agree = end >= self._file.tell() and 0 <= tar.offset - end < tarfile.BLOCKSIZE
            # No name has a zero in it; it comes of a record that claims to be longer than its header.
            if not sizes_agree or "\0" in header.name:
                self.damage = f"the header at byte {start} is damaged"
                return
            if end > size:
                self.damage = _cut_off(size, header.name.removeprefix("./"))
            yield header

    def _damage(self, start: int) -> str:
        """Return the damage at a position where no header could be read."""
        file = self._file
        if file.size == 0:
            return "it is empty"
        for magic, name in COMPRESSIONS.items():
            if start == 0 and file.beginning.startswith(magic):
                return f"it is compressed ({name}): unpack it first"
        if file.tell() == start:
            return f"it ends at byte {min(start, file.size)} without an end-of-archive marker (cut off?)"
        if file.short and file.tell() >= tarfile.BLOCKSIZE:
            return f"it is cut off at byte {file.tell()}, within the header at byte {start}"
        if start == 0:
            return "it is no tar: there is no sound header at byte 0"
        return f"the header at byte {start} is damaged"

    def _behind_marker(self, start: int) -> str | None:
        """Return the damage behind the end-of-archive marker, where all bytes must be zero."""
        while piece := self._file.take(PIECE):
            if piece.strip(b"\0"):
                return f"there are more data behind the end-of-archive marker at byte {start}"
        return None

    def _follow(self, path: str, target: str, entry: _Entry | None) -> Member:
        """Return the member that a link stands for."""
        folder = posixpath.dirname(path)
        for _ in range(MOST_LINKS):
            if not isinstance(entry, str):
                break
            where = posixpath.normpath(posixpath.join(folder, entry))
            outside = entry.startswith("/") or where.startswith("../")
            folder, entry = posixpath.dirname(where), None if outside else self._entries.get(where)
        if isinstance(entry, tuple):
            return Member(path, *entry, link=True)
        why = "which leads back to itself" if entry is not None else "which is no file that can be read from this shard"
        return Member(path, 0, 0, str(PhotoError("link", f"it leads to {_short(target)}, {why}")), link=True)


def _cut_off(end: int, path: str) -> str:
    return f"it is cut off at byte {end}, within {_short(path)}"


def _short(path: str) -> str:
    """Return a name shortened for a message of one line."""
    return re.sub(r"\s+", " ", path[:200]).encode("utf-8", "backslashreplace").decode()


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
