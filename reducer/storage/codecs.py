"""Unit vectors as they are kept: made alike from whatever is given, and packed. Pure but for `VectorSpool`."""

from __future__ import annotations

import hashlib
import re
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reducer.storage.schemas import SPOOLED_SCHEMA, VECTORS_SCHEMA

#: Kind of the failure of photos without a vector that can be ranked.
NO_VECTOR = "no vector"
#: What is wrong with a vector, by its number in `as_units`.
PROBLEMS = ("", "its vector holds numbers that are not finite", "its vector is all zeros")
#: Rounding each number to float16 changes the length of a unit vector by at most half of this.
ROUNDING = 2**-10
#: Of float64.
LARGEST = np.finfo(np.float64).max
#: Vectors that are scaled at a time: few enough that their float64 numbers stay in the processor's cache.
BLOCK = 512


Hashes = NDArray[np.uint8]
Vectors = NDArray[np.float16]
Positions = NDArray[np.int64]
#: Hashes that are parsed at a time.
PARSED_ROWS = 2**16
#: What stands for a character that is no hexadecimal digit.
NO_DIGIT = 255


def as_units(vectors: NDArray[np.floating]) -> tuple[Vectors, NDArray[np.uint8]]:
    """Scale vectors to length 1 and round them to float16.

    Parameters
    ----------
    vectors : ndarray of float16, float32 or float64, shape (n, dimensions)
        The vectors. Of float16 those that are unit vectors already, but for that rounding, stay as they are: so what
        was kept can be given again.

    Returns
    -------
    ndarray of float16, shape (n, dimensions)
        Zeros where a vector has no direction.
    ndarray of uint8, shape (n,)
        What is wrong with each, as a place in `PROBLEMS`.

    Notes
    -----
    The squares are added one dimension after the other (`numpy.add.accumulate` does so by its definition, a sum need
    not), so that the last bit of a length is the same on every machine.
    """
    units = np.zeros(vectors.shape, dtype=np.float16)
    problem = np.zeros(len(vectors), dtype=np.uint8)
    for start in range(0, len(vectors), BLOCK):
        own = slice(start, start + BLOCK)
        wide = vectors[own].astype(np.float64)
        if vectors.dtype == np.float64:
            # Their squares may be out of its range, those of smaller kinds never are. A power of two changes no bit.
            peak = np.abs(wide).max(axis=1, initial=0)
            wide = np.ldexp(wide, -np.frexp(np.where(np.isfinite(peak), peak, LARGEST))[1][:, None])
        length = np.sqrt(np.add.accumulate(np.square(wide), axis=1)[:, -1])
        bad = ~np.isfinite(length)
        problem[own][bad], problem[own][length == 0] = 1, 2
        good = (length > 0) & ~bad
        scaled = (wide[good] / length[good, None]).astype(np.float16)
        if vectors.dtype == np.float16:
            kept = np.abs(length[good] - 1) <= ROUNDING
            scaled[kept] = vectors[own][good][kept]
        units[own][good] = scaled
    return units, problem


def vector_field(dimensions: int) -> pa.Field:
    """The column of vectors of ``RUN/vectors``."""
    about = {"description": "unit vector; zeros where the photo failed", "unit": "1"}
    return pa.field("vector", pa.list_(pa.float16(), dimensions), metadata=about)


def units_of(packed: pa.Array | pa.ChunkedArray) -> Vectors:
    """Vectors from bytes of float16 numbers, of which none is null, shape (n, dimensions); n >= 1."""
    units: Vectors = np.frombuffer(b"".join(packed.to_pylist()), np.float16).reshape(len(packed), -1)
    return units


def packed(units: Vectors) -> pa.Array:
    """Return vectors as bytes of float16 numbers.

    Parameters
    ----------
    units : ndarray of float16, shape (n, dimensions)
    """
    numbers = pa.py_buffer(np.ascontiguousarray(units))
    size = units.shape[1] * units.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(units), [None, numbers]).cast(pa.binary())


def vectors_table(rows: pa.Table, vectors: pa.Array | pa.ChunkedArray) -> pa.Table | None:
    """Return what ``RUN/vectors`` keeps of rows of the ledger and their vectors, which are bytes or null.

    Returns
    -------
    pyarrow.Table or None
        `VECTORS_SCHEMA` and ``vector``; None where all vectors are null, since then nobody knows their dimensions.
    """
    there = vectors.drop_null()
    if not len(there):
        return None
    lists = as_lists(vectors, len(there[0].as_py()) // np.float16().nbytes)
    schema = pa.schema([*VECTORS_SCHEMA, vector_field(lists.type.list_size)])
    return pa.Table.from_arrays([rows["id"], rows["label"], lists], schema=schema)


def as_lists(vectors: pa.Array | pa.ChunkedArray, dimensions: int) -> pa.Array:
    """Return vectors, given as bytes of float16 numbers, as lists of a fixed length; zeros where one is null.

    Not null: a list of fixed size that is null is refused, in a Parquet file, by versions of Arrow up to 24.
    """
    there = _numpy(pc.is_valid(vectors))
    units = np.zeros((len(there), dimensions), dtype=np.float16)
    if there.any():
        units[there] = units_of(vectors.drop_null())
    return pa.FixedSizeListArray.from_arrays(pa.array(units.reshape(-1)), dimensions)


def _numpy(column: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (
        column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
    )
    return found


def from_lists(lists: pa.ChunkedArray) -> pa.Array:
    """The column ``vector`` of `vectors_table` as bytes of float16 numbers; null where all are zeros."""
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in lists.chunks]
    units = np.concatenate(values or [np.empty(0, np.float16)]).reshape(-1, lists.type.list_size)
    there = units.any(axis=1)
    return pc.replace_with_mask(pa.nulls(len(units), pa.binary()), pa.array(there), packed(units[there]))


def spooled(rows: pa.Table, spool: VectorSpool) -> pa.Table:
    """Return `HASHES_SCHEMA` rows as `SPOOLED_SCHEMA`, with their vectors put into the spool."""
    column = rows.schema.get_field_index("vector")
    return rows.set_column(column, SPOOLED_SCHEMA.field(column), spool.put(rows["vector"])).cast(SPOOLED_SCHEMA)


class VectorSpool:
    """Vectors in a file without a name, in the order in which they come; memory holds those in use only.

    Attributes
    ----------
    dimensions : int
        Of the vectors; 0 before there are any.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this
        self._rows = self.dimensions = 0

    def put(self, vectors: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Keep vectors, bytes of float16 numbers or null; return the position of each, null where one is null."""
        there = _numpy(pc.is_valid(vectors))
        places = np.full(len(vectors), -1, dtype=np.int64)
        if there.any():
            places[there] = self.append(units_of(vectors.drop_null()))
        return pa.array(places, mask=places < 0)

    def append(self, units: Vectors) -> Positions:
        """Keep vectors, and return the position of each.

        Parameters
        ----------
        units : ndarray of float16, shape (n, dimensions)
        """
        positions = np.arange(self._rows, self._rows + len(units))
        self.dimensions = units.shape[1]
        self._file.write(units.tobytes())
        self._file.flush()
        self._rows += len(units)
        return positions

    def packed(self, places: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Vectors by their places, as bytes of float16 numbers; null where a place is null."""
        own: Positions = places.drop_null().to_numpy()
        found = pa.nulls(len(places), pa.binary())
        if not len(own):
            return found
        kept = np.memmap(self._file, np.float16, "r", shape=(self._rows, self.dimensions))
        there = pc.is_valid(places)
        there = there.combine_chunks() if isinstance(there, pa.ChunkedArray) else there
        return pc.replace_with_mask(found, there, packed(kept[own]))


def digest_of(key: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def to_hex(packed: bytes, bits: int) -> str:
    """Write a packed hash as imagehash's ``str()`` does.

    Parameters
    ----------
    packed : bytes
        The hash, padded with zero bits at its end (`numpy.packbits`).
    bits : int
        How many bits it has.
    """
    return f"{int.from_bytes(packed) >> -bits % 8:0{-(-bits // 4)}x}"


def from_hex(text: str, bits: int) -> bytes:
    """Pack a hash that `to_hex` or imagehash wrote.

    Raises
    ------
    ValueError
        If it is no hash of that many bits.
    """
    value = int(text, 16) if re.fullmatch(r"[0-9a-fA-F]+", text) else -1
    if len(text) != -(-bits // 4) or not 0 <= value < 1 << bits:
        raise ValueError(f"{text!r} is no hash of {bits} bits: expected {-(-bits // 4)} hexadecimal digits")
    return (value << -bits % 8).to_bytes(-(-bits // 8))


def all_from_hex(texts: pa.ChunkedArray, bits: int) -> NDArray[np.uint8]:
    """`from_hex` of many at a time.

    Parameters
    ----------
    texts : pyarrow.ChunkedArray of string, shape (n,)
        Hashes in hex, none of them null.
    bits : int
        Bits of a hash.

    Returns
    -------
    ndarray of uint8, shape (n, hash bytes)

    Raises
    ------
    ValueError
        If one is no hash of that many bits.
    """
    digits = -(-bits // 4)
    if pc.any(pc.not_equal(pc.binary_length(texts), digits)).as_py():
        raise ValueError(f"not all hashes have {digits} hexadecimal digits, as those of {bits} bits have")
    value = np.full(256, NO_DIGIT, dtype=np.uint8)
    for digit, characters in enumerate(zip("0123456789abcdef", "0123456789ABCDEF", strict=True)):
        value[[ord(character) for character in characters]] = digit
    packed = np.empty((len(texts), -(-bits // 8)), dtype=np.uint8)
    padding = -bits % 8
    for start in range(0, len(texts), PARSED_ROWS):
        share = texts.slice(start, PARSED_ROWS)
        text = np.frombuffer("".join(share.to_pylist()).encode(), dtype=np.uint8).reshape(len(share), digits)
        half_bytes = value[text]
        if (half_bytes == NO_DIGIT).any():
            raise ValueError("not all hashes are hexadecimal digits")
        number = np.pad(half_bytes, ((0, 0), (digits % 2, 0)))
        number = np.bitwise_or(number[:, 0::2] << 4, number[:, 1::2])
        if padding:
            # The text is a number, aligned right; packed bits are aligned left.
            if (number[:, 0] >> (8 - padding)).any():
                raise ValueError(f"not all hashes have {bits} bits")
            number = np.bitwise_or(number << padding, np.pad(number[:, 1:], ((0, 0), (0, 1))) >> (8 - padding))
        packed[start : start + PARSED_ROWS] = number
    return packed
