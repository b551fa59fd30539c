"""Read named columns of a file that holds a table as text, refusing what is not as it should be."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import feather

from reducer.errors import InputError, nearest
from reducer.storage.location import Location, explaining_errors

#: How many rows or ids an error message or a report names.
EXAMPLES = 5
CSV, PARQUET, FEATHER, JSON_LINES = "CSV", "Parquet", "Feather", "JSON lines"
#: Kinds of files, by how they begin; what is none of them is CSV.
KINDS = {
    b"PAR1": PARQUET,
    b"ARROW1": FEATHER,
    b"FEA1": "Feather of version 1",
    b"{": JSON_LINES,
    b"[": "a JSON array",
    b"<": "HTML or XML",
    b"SQLite format 3": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array of numpy",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle"),
    b"%PDF": "a PDF",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"PK\x05\x06": "an empty zip archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"\xff\xd8\xff": "a JPEG photo",
    b"\x89PNG": "a PNG picture",
    b"version https://git-lfs": "a pointer of Git LFS, in the place of the file that `git lfs pull` fetches",
}
#: Kinds whose beginning a header of CSV may have too: they count where the text holds NUL, as no text does.
BINARY_KINDS = {b"ORC": "an ORC file", b"Obj\x01": "an Avro file", b"\xff\xff\xff\xff": "a stream of Arrow"}
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
BEGINNING = 512
#: What unpacks files that begin so.
COMPRESSED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
ZIP_MAGIC, EXCEL_MEMBER = b"PK\x03\x04", "[Content_Types].xml"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
#: Separators of cells.
SEPARATORS = (",", ";", "\t", "|")
EXPECTED = "give CSV, JSON lines, Parquet or Feather"
#: A row must fit into a block: one of train_clean.csv holds all ids of a label.
CSV_BLOCKS = pa.csv.ReadOptions(block_size=2**26)


def columns_of(where: str, location: Location) -> list[pa.Field]:
    """Names and types of a file's columns; those of CSV are text.

    Parameters
    ----------
    where : str
        What error messages call the file, such as ``--manifest train.csv``.
    location : Location
        A file, whatever its name: CSV with a header (separated by ``,``, ``;``, TAB or ``|``; UTF-8 or UTF-16) or JSON
        lines, both also compressed by gzip, bz2, xz or as the one file of a zip archive; Parquet or Feather; or a
        folder of Parquet files.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    parts = parts_of(where, location)
    with _opened(where, location if parts is None else parts[0]) as (file, kind):
        _readable(where, kind)
        if kind == PARQUET:
            return list(pq.read_schema(file))
        if kind == FEATHER:
            return list(pa.ipc.open_file(file).schema)
        if kind == JSON_LINES:
            return [pa.field(name, pa.array([value]).type) for name, value in next(_json_rows(where, file), {}).items()]
        return [pa.field(name, pa.string()) for name in _first_row(where, file)[0]]


def column_names(where: str, location: Location) -> list[str]:
    """Names of a file's columns; parameters and errors as for `columns_of`."""
    return [field.name for field in columns_of(where, location)]


def read_columns(where: str, location: Location, wanted: Sequence[str], hint: str) -> pa.Table:
    """Read columns of a file as text.

    Parameters
    ----------
    where, location
        As for `columns_of`.
    wanted : sequence of str
        Which; each cell must hold text or a whole number.
    hint : str
        What to do when one is missing.

    Raises
    ------
    InputError
        If the file cannot be read, lacks a column, or a cell is empty.
    """
    wanted = list(dict.fromkeys(wanted))
    names = column_names(where, location)
    for name in wanted:
        if names.count(name) > 1:
            raise InputError(f"{where} has {names.count(name)} columns called {name!r}")
        if name not in names:
            known = ", ".join(map(repr, names))
            raise InputError(f"{where} has no column {name!r}{nearest(name, names)}; it has {known}. {hint}")
    parts = parts_of(where, location)
    if parts is None:
        table = _read(where, location, wanted)
    else:
        try:
            table = pa.concat_tables([_read(where, part, wanted) for part in parts], promote_options="permissive")
        except pa.ArrowTypeError as error:
            raise InputError(f"{where}: its parts have different columns: {error}") from None
    columns = {name: _as_text(where, name, table[name]) for name in wanted}
    for name, column in columns.items():
        refuse_empty(where, name, column)
    return pa.table(columns)


def _read(where: str, location: Location, wanted: list[str]) -> pa.Table:
    """Read columns of one file."""
    with _opened(where, location) as (file, kind):
        _readable(where, kind)
        if kind == PARQUET:
            return pq.read_table(file, columns=wanted)
        if kind == FEATHER:
            return feather.read_table(file, columns=wanted, memory_map=False)
        if kind == JSON_LINES:
            return _read_json(where, file, wanted)
        _, separator = _first_row(where, file)
        file.seek(0)
        return _read_csv(file, wanted, separator)


def whole_number_type(columns: Sequence[pa.Field], name: str) -> str | None:
    """Return Arrow's name of the type of a column of `columns_of`, if it holds whole numbers; else None."""
    kind = next((field.type for field in columns if field.name == name), None)
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) if kind is not None and pa.types.is_integer(kind) else None


def holds_bytes(kind: pa.DataType) -> bool:
    """Tell whether values of a type are bytes, such as pictures, or hold some."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(holds_bytes(kind.field(place).type) for place in range(kind.num_fields))


def read_others(where: str, location: Location, names: Sequence[str]) -> Iterator[pa.Table]:
    """Read columns of a file as they are, some rows at a time; those of CSV as text, character for character.

    Parameters
    ----------
    where, location
        As for `columns_of`.
    names : sequence of str
        Which; there are some.

    Yields
    ------
    pyarrow.Table
        Rows in their order, all with the same schema.

    Raises
    ------
    InputError
        As for `read_columns`.
    """
    wanted, schema = list(names), None
    for part in parts_of(where, location) or [location]:
        with _opened(where, part) as (file, kind):
            for table in _tables(where, file, kind, wanted):
                schema = schema or table.schema
                yield table.cast(schema)


def _tables(where: str, file: IO[bytes], kind: str, wanted: list[str]) -> Iterator[pa.Table]:
    """Yield columns of one file, some rows at a time."""
    if kind == PARQUET:
        for batch in pq.ParquetFile(file).iter_batches(columns=wanted):
            yield pa.Table.from_batches([batch]).select(wanted)
    elif kind == FEATHER:
        yield feather.read_table(file, columns=wanted, memory_map=False).select(wanted)
    elif kind == JSON_LINES:
        rows = list(_json_rows(where, file))
        try:
            yield pa.table({name: pa.array([row.get(name) for row in rows]) for name in wanted})
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # values of several types
            texts = {name: [json.dumps(row.get(name), ensure_ascii=False) for row in rows] for name in wanted}
            yield pa.table(texts)
    else:
        _, separator = _first_row(where, file)
        file.seek(0)
        convert = pa.csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.binary()))
        form = pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
        with pa.csv.open_csv(file, CSV_BLOCKS, form, convert) as batches:
            for batch in batches:
                yield pa.table({name: _decoded(batch[name]) for name in wanted})


def _decoded(column: pa.Array) -> pa.Array:
    """Return bytes as text; what is no UTF-8 is replaced (U+FFFD)."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([cell.decode(errors="replace") for cell in column.to_pylist()], pa.string())


def parts_of(where: str, location: Location) -> list[Location] | None:
    """Return the Parquet files of a folder, in the order of their names; None for a single file.

    Raises
    ------
    InputError
        If it is a folder without any, or cannot be listed.
    """
    with explaining_errors(location, where):
        if location.remote:
            system, path = location.open()
            is_folder = (location.on_s3 or path.endswith("/")) and system.isdir(path)
            names = [posixpath.basename(file) for file in system.ls(path, detail=False)] if is_folder else []
        else:
            is_folder = os.path.isdir(location.path)
            names = os.listdir(location.path) if is_folder else []
    if not is_folder:
        return None
    parts = sorted(name for name in names if name.endswith(".parquet") and not name.startswith((".", "_")))
    if not parts:
        raise InputError(f"{where} is a folder without Parquet files: {EXPECTED}")
    return [location.below(name) for name in parts]


class _Rows(io.StringIO):
    """Rows of CSV that end with a line feed; the writer ends them with CR and LF, to quote texts that hold either."""

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")


def csv_file(table: pa.Table, *, header: bool = True) -> bytes:
    """Return a table as the bytes of a CSV file (RFC 4180, but with line feeds), the same on every Python.

    A lone CR is quoted too, which Python's own module does not do before 3.11.9 and 3.12.3 where rows end with LF.
    """
    frame = table.to_pandas()
    text: str = frame.to_csv(index=False, header=header, lineterminator="\n")
    if "\r" in text:  # slower by half, so only then
        rows = _Rows()
        frame.to_csv(rows, index=False, header=header, lineterminator="\r\n")
        text = rows.getvalue()
    return text.encode()


def is_parquet(where: str, location: Location) -> bool:
    """Return whether a file begins as Parquet files do."""
    with _opened(where, location) as (_, kind):
        return kind == PARQUET


def read_lines(where: str, location: Location) -> list[str]:
    """The lines of a text file, gzipped or not, without blank ones and the blanks around them.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    with _opened(where, location) as (file, _):
        try:
            lines = file.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{where} cannot be read: it is not UTF-8 text ({error})") from None
    return [line.strip() for line in lines if line.strip()]


@contextmanager
def _opened(where: str, location: Location) -> Iterator[tuple[IO[bytes], str]]:
    """Open a file, unpacked and in UTF-8 if it is text, and name its kind; whatever is wrong with it names it."""
    try:
        with explaining_errors(location, where), ExitStack() as opened:
            file = _unpacked(where, opened.enter_context(location.open_file()), opened)
            start = _start_of(file)
            if start[:2] in UTF16_MARKS:
                file = io.BytesIO(file.read().decode("utf-16").encode())
                start = _start_of(file)
            if not start:
                raise InputError(f"{where} is empty: {EXPECTED}")
            kind = _kind_of(start)
            if kind in (PARQUET, FEATHER) and not file.seekable():
                file = io.BytesIO(file.read())
            yield file, kind
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    except (pa.ArrowInvalid, csv.Error) as error:
        if "invalid UTF8" in str(error):
            raise InputError(f"{where} cannot be read: it is not UTF-8 text; save it as UTF-8") from None
        raise InputError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _start_of(file: IO[bytes]) -> bytes:
    """Return the first bytes of a file, which stays at its beginning."""
    start = file.read(BEGINNING)
    file.seek(0)
    return start


def _kind_of(start: bytes) -> str:
    """Return the kind of a file that begins so."""
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    kind = next((kind for magic, kind in KINDS.items() if text.startswith(magic)), CSV)
    if kind != CSV or b"\0" not in start:
        return kind
    if start.startswith(TAR_MAGIC, TAR_MAGIC_AT):
        return "a tar archive"
    kinds = (kind for magic, kind in BINARY_KINDS.items() if start.startswith(magic))
    return next(kinds, "neither text in UTF-8 nor a kind of table that is known here")


def _unpacked(where: str, file: IO[bytes], opened: ExitStack) -> IO[bytes]:
    """Return what is in a compressed file, or the file itself."""
    start = _start_of(file)
    for magic, unpack in COMPRESSED.items():
        if start.startswith(magic):
            return cast(IO[bytes], opened.enter_context(unpack(file)))
    if not start.startswith(ZIP_MAGIC):
        return file
    archive = opened.enter_context(zipfile.ZipFile(file))
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if EXCEL_MEMBER in names:
        raise InputError(f"{where} is an Excel workbook: {EXPECTED}")
    if len(names) != 1:
        raise InputError(
            f"{where} is a zip archive of {len(names)} files ({', '.join(names[:EXAMPLES])}): unpack it and give "
            "the one that is meant"
        )
    return opened.enter_context(archive.open(names[0]))


def _readable(where: str, kind: str) -> None:
    """Refuse kinds of files that hold no table, or one that is not read here."""
    if kind not in (CSV, PARQUET, FEATHER, JSON_LINES):
        raise InputError(f"{where} is {kind}: {EXPECTED}")


def _first_row(where: str, file: IO[bytes]) -> tuple[list[str], str]:
    """Return the first row of a CSV file that is not empty, and its separator: what stands most often in the header."""
    # Not Arrow, which refuses a file of one line without a line break.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
    lines = (line for line in text if line.strip())
    header = next(lines, "")
    separator = max(SEPARATORS, key=re.sub(r'"[^"]*"', "", header).count)
    names = next(csv.reader(itertools.chain([header], lines), delimiter=separator), [])
    text.detach()
    return names, separator


def _json_rows(where: str, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lines."""
    for number, line in enumerate((line.removeprefix(codecs.BOM_UTF8) for line in file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{where}: line {number} is no JSON object ({error}): expected JSON lines, one object a row"
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: line {number} is no JSON object: expected JSON lines, one object a row")
        yield row


def _read_json(where: str, file: IO[bytes], wanted: Sequence[str]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    for row in _json_rows(where, file):
        for name, column in columns.items():
            column.append(row.get(name))
    try:
        return pa.table({name: pa.array(column) for name, column in columns.items()})
    except pa.ArrowTypeError as error:
        raise InputError(f"{where}: the values of a column are of several types: {error}") from None


def _read_csv(file: IO[bytes], wanted: list[str], separator: str) -> pa.Table:
    text = {name: pa.string() for name in wanted}
    try:
        return pa.csv.read_csv(
            file,
            read_options=CSV_BLOCKS,
            parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=text,
                # Only an empty cell is null: "NA", "None" and "null" are names like any other.
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        if "Empty CSV file" not in str(error):
            raise
        return pa.schema(text).empty_table()  # a header without a line break behind it


def _as_text(where: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (text or pa.types.is_integer(kind)):
        raise InputError(f"{where}: column {name!r} is {column.type}; expected text or whole numbers")
    return column.cast(kind).cast(pa.string())


def release_unused() -> None:
    """Give back memory of tables that are gone: Arrow keeps it, in all as much as what a large plan holds."""
    pa.default_memory_pool().release_unused()


def with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    """A table with another column of the same kind in the place of one."""
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), column)


def refuse_empty(where: str, name: str, column: pa.ChunkedArray) -> None:
    """Name the rows of a text column that hold nothing.

    Raises
    ------
    InputError
        If there are any.
    """
    rows = np.flatnonzero(pc.or_kleene(pc.is_null(column), pc.equal(column, "")).to_numpy())
    if len(rows):
        shown = ", ".join(str(row + 1) for row in rows[:EXAMPLES])
        more = f" and {len(rows) - EXAMPLES} more" if len(rows) > EXAMPLES else ""
        raise InputError(
            f"{where}: column {name!r} is empty in row {shown}{more} (the first row below the header is row 1): fill "
            "it in or take the row out"
        )


def in_nanoseconds(rows: pa.Table) -> pa.Table:
    """Rows of the ledger whose times are plain nanoseconds since 1970 UTC."""
    place = rows.column_names.index("mtime")
    return rows.set_column(place, "mtime", rows["mtime"].cast(pa.int64()))


def counts(column: pa.ChunkedArray | pa.Array) -> dict[str, int]:
    """Count how often each text stands in a column; sorted by text."""
    return dict(sorted((pair["values"], pair["counts"]) for pair in pc.value_counts(column).to_pylist()))
