"""Read named columns of a CSV or Parquet file as text, refusing what is not as it should be."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from reducer.errors import InputError, nearest
from reducer.storage.location import Location, explaining_errors

#: How many rows or ids an error message or a report names.
EXAMPLES = 5
PARQUET_MAGIC, GZIP_MAGIC = b"PAR1", b"\x1f\x8b"
#: A row must fit into a block: one of train_clean.csv holds all ids of a label.
CSV_BLOCKS = pa.csv.ReadOptions(block_size=2**26)
CSV_FORM = pa.csv.ParseOptions(newlines_in_values=True)


def column_names(where: str, location: Location) -> list[str]:
    """Names of a file's columns.

    Parameters
    ----------
    where : str
        What error messages call the file, such as ``--manifest train.csv``.
    location : Location
        A CSV file with a header, gzipped or not, or a Parquet file, whatever its name.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    with _opened(where, location) as (file, parquet):
        if parquet:
            names: list[str] = pq.read_schema(file).names
        else:
            # Not Arrow, which refuses a file of one line without a line break.
            text = io.TextIOWrapper(cast(IO[bytes], file), "utf-8-sig", errors="replace", newline="")
            names = next((row for row in csv.reader(text) if row), [])
            text.detach()
    return names


def read_columns(where: str, location: Location, wanted: Sequence[str], hint: str) -> pa.Table:
    """Read columns of a file as text.

    Parameters
    ----------
    where, location
        As for `column_names`.
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
    with _opened(where, location) as (file, parquet):
        table = pq.read_table(file, columns=wanted) if parquet else _read_csv(file, wanted)
    columns = {name: _as_text(where, name, table[name]) for name in wanted}
    for name, column in columns.items():
        refuse_empty(where, name, column)
    return pa.table(columns)


class _Rows(io.StringIO):
    """Rows of CSV that end with a line feed; the writer ends them with CR and LF, to quote texts that hold either."""

    def write(self, row: str) -> int:
        return super().write(row.removesuffix("\r\n") + "\n")


def csv_file(table: pa.Table) -> bytes:
    """Return a table as the bytes of a CSV file (RFC 4180, but with line feeds), the same on every Python.

    A lone CR is quoted too, which Python's own module does not do before 3.11.9 and 3.12.3 where rows end with LF.
    """
    frame = table.to_pandas()
    text: str = frame.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # slower by half, so only then
        rows = _Rows()
        frame.to_csv(rows, index=False, lineterminator="\r\n")
        text = rows.getvalue()
    return text.encode()


def is_parquet(where: str, location: Location) -> bool:
    """Return whether a file begins as Parquet files do."""
    with _opened(where, location) as (_, parquet):
        return parquet


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
def _opened(where: str, location: Location) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, bool]]:
    """The file, unzipped, and whether it is a Parquet file; whatever is wrong with it names it."""
    try:
        with explaining_errors(location, where), location.open_file() as raw:
            start = raw.read(len(PARQUET_MAGIC))
            raw.seek(0)
            if not start:
                raise InputError(f"{where} is empty: expected a CSV or Parquet file")
            if start.startswith(GZIP_MAGIC):
                with gzip.open(raw) as unzipped:
                    yield unzipped, False
            else:
                yield raw, start == PARQUET_MAGIC
    except (EOFError, zlib.error) as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    except (pa.ArrowInvalid, csv.Error) as error:
        raise InputError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _read_csv(file: IO[bytes] | gzip.GzipFile, wanted: list[str]) -> pa.Table:
    text = {name: pa.string() for name in wanted}
    try:
        return pa.csv.read_csv(
            file,
            read_options=CSV_BLOCKS,
            parse_options=CSV_FORM,
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
