"""The run folder: the client is its only writer. Each file is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from reducer.errors import InputError, ReducerError
from reducer.run.tasks.messages import PieceReport, Tally
from reducer.storage.atomic import Files, temporary_name
from reducer.storage.codecs import Hashes, VectorSpool, from_lists, spooled, vectors_table
from reducer.storage.location import Location, Shard, explaining_errors
from reducer.storage.lock import check_unlocked, is_of_lock, locked
from reducer.storage.schemas import (
    HASHES_SCHEMA,
    LEDGER_SCHEMA,
    PLAN_SCHEMA,
    REDUCED_COLUMNS,
    SHARDS_SCHEMA,
    SPOOLED_SCHEMA,
    VECTORS_SCHEMA,
    reduced_schema,
    with_distance_unit,
)

FORMAT = "reducer-run"
#: 2 keeps a plan, and tallies in its parts; 3 hashes of shards and of pieces; 4 vectors.
FORMAT_VERSION = 4
#: Rows of a Parquet row group; fixed, so that the bytes of a file depend on its rows only.
ROW_GROUP = 100_000
SUMMARY, CSV, PARQUET = "summary.json", "reduced.csv", "reduced.parquet"
IMAGES, HASHES, VECTORS = "images", "hashes", "vectors"
PLAN, SHARDS, AVOID, CROSS_LABEL = "plan.parquet", "shards.parquet", "avoid.parquet", "cross_label.parquet"
REPORT = "report.html"
#: Files that a run writes beside its summary, its ledger and its hashes.
OWN_FILES = (PLAN, SHARDS, AVOID, CSV, PARQUET, CROSS_LABEL, REPORT)
#: Part files of photos that are not read begin so; they are made anew from the plan.
UNREAD = "part-unread-"
#: On S3 each takes some requests.
FOOTERS_AT_A_TIME = 16
#: Under which key files carry what is no table.
METADATA = b"reducer"


class RunFolder(Files):
    """A run folder.

    Parameters
    ----------
    place : Location or str
        Where it is, or will be.
    """

    def __init__(self, place: Location | str) -> None:
        super().__init__(place)
        #: Path or URL, to show.
        self.images = self.place.below(IMAGES).path
        self.report = self.place.below(REPORT).path
        self._check_lock: Callable[[], None] | None = None

    @contextmanager
    def locked(self, *, break_lock: bool = False) -> Iterator[None]:
        """Keep other runs out of the folder; every write from then on checks that the lock is still ours.

        Parameters
        ----------
        break_lock : bool
            Whether to take the lock whoever has it now.

        Raises
        ------
        InputError
            If another run has the lock, or the folder cannot be written.
        """
        with locked(self.place, break_lock=break_lock) as self._check_lock:
            yield

    def check_ours(self) -> None:
        """Raise LostLockError if this process has locked the folder and another run has taken the lock meanwhile."""
        if self._check_lock is not None:
            self._check_lock()

    def check_free(self, *, overwrite: bool, break_lock: bool = False) -> None:
        """Refuse a folder that holds something, unless it is a run folder that may be replaced.

        Parameters
        ----------
        overwrite : bool
            Whether a run may be replaced.
        break_lock : bool
            Whether also one that seems to be at work; or the lock is our own.

        Raises
        ------
        InputError
            If it may not be written.
        """
        with explaining_errors(self.place, f"--output {self.path} cannot be used"):
            if not self.place.remote:
                self._check_local()
            if not self.place.holds_something() or all(map(_is_of_the_start, self._names())):
                return
            if not self.is_run():
                raise InputError(
                    f"--output {self.path} is not empty and is no run folder (it has no summary.json of ours): nothing "
                    "in it was touched; give another folder"
                )
            check_unlocked(self.place, break_lock=break_lock)
            if not overwrite:
                raise InputError(f"--output {self.path} holds a run already: give another folder, or --overwrite")

    def _check_local(self) -> None:
        path = Path(self.path)
        if not path.exists():
            parent = next(folder for folder in path.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise InputError(f"--output {path} cannot be made: {parent} is no folder that may be written")
        elif not path.is_dir():
            raise InputError(f"--output {path} is a file: give a folder")

    def is_run(self) -> bool:
        """Whether this is a folder that a run has written, finished or not."""
        try:
            found = self.read_summary()
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and found.get("format") == FORMAT

    def make(self) -> None:
        """Make the folder itself, where there are folders.

        Raises
        ------
        InputError
            If it cannot be made.
        """
        if self.place.on_s3:
            return
        with explaining_errors(self.place, f"--output {self.path} cannot be used"):
            system, root = self.place.open()
            system.makedirs(root, exist_ok=True)

    def start(self, summary: dict[str, Any]) -> None:
        """Take out what an earlier run left (nothing else), and write a first summary.

        Parameters
        ----------
        summary : dict
            Its ``run`` names this run: a plan of another one is not obeyed.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        self.make()
        try:
            # The first summary marks the folder as ours before anything else is taken out or put in.
            self.write_summary(summary)
            if not self.place.on_s3:
                system, root = self.place.open()
                system.makedirs(f"{root}/{IMAGES}", exist_ok=True)
            self.remove_leftovers()
            self._remove([name for name in OWN_FILES if name in self._names()])
            self.remove_parts()
            self._remove([f"{HASHES}/{name}" for name in self.done_pieces().values()])
        except (OSError, ReducerError) as error:
            raise InputError(f"--output {self.path} cannot be used: {error}") from None

    def remove_parts(self) -> None:
        """Take out the ledger, and the vectors beside it: then nothing is ranked."""
        self._remove([f"{IMAGES}/{part}" for part in self.parts()])
        self._remove([f"{VECTORS}/{part}" for part in self.vector_parts()])

    def remove_leftovers(self) -> None:
        """Take out files that a killed run was about to write."""
        if self.place.remote:
            return
        own = [SUMMARY, *OWN_FILES]
        self._remove([name for name in self._names() if name in map(temporary_name, own)])
        for folder in (IMAGES, HASHES, VECTORS):
            own = [name for name in self._names(folder) if name.startswith(".part-")]
            self._remove([f"{folder}/{name}" for name in own if name == temporary_name(name[1:-4])])

    def write_plan(self, rows: pa.Table, terms: dict[str, Any], avoid: Hashes | None = None) -> None:
        """Write the plan, so that the run can go on from it.

        Parameters
        ----------
        rows : pyarrow.Table
            `PLAN_SCHEMA`, with partitions.
        terms : dict
            What goes with it, for JSON: all that decides hashes and ranks.
        avoid : ndarray of uint8, shape (m, hash bytes), optional
            Hashes to avoid.
        """
        if avoid is not None:  # first: the plan is what tells that it is there
            packed = pa.array(list(map(bytes, avoid)), pa.binary())
            self._write(AVOID, parquet_file(pa.table({"packed_hash": packed})))
        self._write(PLAN, parquet_file(_with_metadata(rows, terms)))

    def read_plan(self) -> tuple[pa.Table, dict[str, Any]] | None:
        """The plan and what goes with it; None where there is none.

        Raises
        ------
        InputError
            If it cannot be read.
        """
        if PLAN not in self._names():
            return None
        rows = self._read_parquet(PLAN)
        terms = self._terms_of(rows.schema)
        return rows.replace_schema_metadata(None).cast(PLAN_SCHEMA), terms

    def plan_terms(self) -> dict[str, Any] | None:
        """What goes with the plan, without reading it; None where there is none."""
        if PLAN not in self._names():
            return None
        return self._terms_of(self._schema(PLAN))

    def _terms_of(self, schema: pa.Schema) -> dict[str, Any]:
        if METADATA not in (schema.metadata or {}) or not set(PLAN_SCHEMA.names) <= set(schema.names):
            raise InputError(f"{self.place.below(PLAN).path} is no plan of ours: begin again with --overwrite")
        found: dict[str, Any] = json.loads(schema.metadata[METADATA])
        return found

    def write_shards(self, shards: Sequence[Shard]) -> None:
        """Write which shards there are, and how they are now."""
        rows = [asdict(shard) for shard in shards]
        self._write(SHARDS, parquet_file(pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)))

    def read_shards(self) -> tuple[Shard, ...] | None:
        """The shards of the plan; None where it is about single files."""
        if SHARDS not in self._names():
            return None
        return tuple(Shard(**row) for row in self._read_parquet(SHARDS).to_pylist())

    def write_piece(self, number: int, found: pa.Table, report: PieceReport) -> None:
        """Write what was found in a shard or of a piece: from then on it is done.

        Parameters
        ----------
        number : int
            Its number.
        found : pyarrow.Table
            `HASHES_SCHEMA` rows.
        report : PieceReport
            What came of it.
        """
        self._make_folder(HASHES)
        self._write(f"{HASHES}/part-{number:05d}.parquet", parquet_file(_with_metadata(found, report.as_dict())))

    def _make_folder(self, name: str) -> None:
        if not self.place.on_s3:
            system, root = self.place.open()
            system.makedirs(f"{root}/{name}", exist_ok=True)

    def done_pieces(self) -> dict[int, str]:
        """Names of the files of hashes that are there now, by number."""
        return {int(name[5:-8]): name for name in self._names(HASHES) if _is_part(name)}

    def read_piece(self, number: int) -> tuple[pa.Table, PieceReport]:
        """What `write_piece` has written."""
        rows = self._read_parquet(f"{HASHES}/{self.done_pieces()[number]}")
        return rows.replace_schema_metadata(None).cast(HASHES_SCHEMA), _report(rows.schema.metadata)

    def piece_reports(self) -> dict[int, PieceReport]:
        """What came of each shard or piece that is done, by number; reads no row."""
        names = self.done_pieces()
        with ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
            found = pool.map(lambda name: _report(self._metadata(f"{HASHES}/{name}").metadata), names.values())
            return dict(zip(names, found, strict=True))

    def hashes(self, aside: VectorSpool) -> pa.Table:
        """What was found in all shards and pieces that are done, in the order of their numbers.

        Parameters
        ----------
        aside : VectorSpool
            Gets the vectors.

        Returns
        -------
        pyarrow.Table
            `SPOOLED_SCHEMA`.
        """
        names = sorted(self.done_pieces().items())
        with ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
            rows = []
            for start in range(0, len(names), FOOTERS_AT_A_TIME):  # no more of them than their vectors have room
                some = names[start : start + FOOTERS_AT_A_TIME]
                for table in pool.map(lambda named: self._read_parquet(f"{HASHES}/{named[1]}"), some):
                    rows.append(spooled(table.replace_schema_metadata(None).cast(HASHES_SCHEMA), aside))
        return pa.concat_tables([SPOOLED_SCHEMA.empty_table(), *rows])

    def read_avoid(self) -> Hashes | None:
        """The hashes to avoid that the plan goes with, packed; None where there are none."""
        if AVOID not in self._names():
            return None
        packed: list[bytes] = self._read_parquet(AVOID)["packed_hash"].to_pylist()
        return np.frombuffer(b"".join(packed), dtype=np.uint8).reshape(len(packed), -1)

    def write_part(
        self,
        index: int,
        ledger: pa.Table,
        tally: Tally,
        unit: str,
        vectors: pa.Array | pa.ChunkedArray | None = None,
    ) -> None:
        """Write the ledger rows of one partition: from then on it is done.

        Parameters
        ----------
        index : int
            Its number.
        ledger : pyarrow.Table
            `LEDGER_SCHEMA` rows.
        tally : Tally
            What they add to the totals of the run.
        unit : {"bits", "cosine"}
            Of the distances.
        vectors : pyarrow.Array of binary, optional
            Their vectors, bytes of float16 numbers or null; None leaves those that are there.
        """
        self.replace_part(f"part-{index:05d}.parquet", ledger, tally, unit, vectors)

    def write_unread(self, ledgers: Iterable[pa.Table], unit: str) -> None:
        """Write the ledger rows of the photos that are not read, in parts of their own."""
        for number, ledger in enumerate(ledgers):
            self.replace_part(f"{UNREAD}{number:05d}.parquet", ledger, Tally(), unit)

    def remove_unread(self) -> None:
        """Take out what `write_unread` has written: it may not hold any more."""
        self._remove([f"{IMAGES}/{part}" for part in self.parts() if part.startswith(UNREAD)])

    def replace_part(
        self,
        name: str,
        ledger: pa.Table,
        tally: Tally,
        unit: str,
        vectors: pa.Array | pa.ChunkedArray | None = None,
    ) -> None:
        """Write a part file anew; parameters as for `write_part`."""
        table = None if vectors is None else vectors_table(ledger, vectors)
        if table is not None:  # first: the part is what tells that it is there
            self._make_folder(VECTORS)
            self._write(f"{VECTORS}/{name}", parquet_file(table))
        table = _with_metadata(with_distance_unit(ledger, unit), tally.as_dict())
        self._write(f"{IMAGES}/{name}", parquet_file(table))

    def vector_parts(self) -> list[str]:
        """Names of the files of vectors that are there now: those of the part files."""
        return [name for name in self._names(VECTORS) if _is_part(name)]

    def part_vectors(self, name: str, rows: int) -> pa.Array:
        """Vectors of the rows of a part file, as bytes of float16 numbers; all null where none had one.

        Parameters
        ----------
        name : str
            Of the part file.
        rows : int
            How many it has.
        """
        if name not in self.vector_parts():
            return pa.nulls(rows, pa.binary())
        return from_lists(self._read_parquet(f"{VECTORS}/{name}")["vector"])

    def placed_vectors(self, aside: VectorSpool) -> pa.Table:
        """All vectors kept aside: ``id``, ``label`` and, as ``vector``, the place of each there."""
        schema = pa.schema([*VECTORS_SCHEMA, pa.field("vector", pa.int64())])
        tables = [schema.empty_table()]
        for name in self.vector_parts():
            own = self._read_parquet(f"{VECTORS}/{name}")
            columns = [own["id"], own["label"], aside.put(from_lists(own["vector"]))]
            tables.append(pa.Table.from_arrays(columns, schema=schema))
        return pa.concat_tables(tables)

    def read_part(self, name: str) -> tuple[pa.Table, Tally]:
        """Rows of a part file, and what they add to the totals of the run."""
        rows = self._read_parquet(f"{IMAGES}/{name}")
        return rows.replace_schema_metadata(None), _tally(rows.schema.metadata)

    def footers(self) -> dict[str, tuple[int, Tally]]:
        """Rows of each part file, by its name, and what it adds to the totals of the run; reads no row."""
        names = self.parts()
        with ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
            return dict(zip(names, pool.map(self._footer, names), strict=True))

    def _footer(self, name: str) -> tuple[int, Tally]:
        footer = self._metadata(f"{IMAGES}/{name}")
        return footer.num_rows, _tally(footer.metadata)

    def read_vectors(self, labels: Iterable[str]) -> pa.Table:
        """``id``, ``label`` and ``vector`` of some labels, vectors as bytes of float16 numbers or null."""
        wanted = pa.array(list(labels), pa.string())
        found = []
        for name in self.vector_parts():
            rows = self._read_parquet(f"{VECTORS}/{name}")
            own = rows.filter(pc.is_in(rows["label"], value_set=wanted))
            found.append(pa.table({**{n: own[n] for n in VECTORS_SCHEMA.names}, "vector": from_lists(own["vector"])}))
        empty = pa.schema([*VECTORS_SCHEMA, pa.field("vector", pa.binary())]).empty_table()
        return pa.concat_tables([empty, *(table.cast(empty.schema) for table in found)])

    def _metadata(self, name: str) -> pq.FileMetaData:
        system, root = self.place.open()
        with self._damage_explained(name), system.open(f"{root}/{name}", "rb") as file:
            return pq.read_metadata(file)

    def done_partitions(self) -> dict[int, str]:
        """Names of the part files of the partitions that are done, by number."""
        return {int(part[5:-8]): part for part in self.parts() if not part.startswith(UNREAD)}

    def ledger(self, columns: list[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """The ledger, in manifest order.

        Parameters
        ----------
        columns : list of str, optional
            Only these columns.
        where : pyarrow.compute.Expression, optional
            Only rows for which it holds.
        """
        wanted = columns or LEDGER_SCHEMA.names
        system, root = self.place.open()
        parts = [f"{root}/{IMAGES}/{part}" for part in self.parts()]
        if not parts:
            return LEDGER_SCHEMA.empty_table().select(wanted)
        opened = {"filesystem": system} if self.place.remote else {}
        dataset = pa.dataset.dataset(parts, schema=LEDGER_SCHEMA, format="parquet", **opened)
        with self._damage_explained(IMAGES):
            table = dataset.to_table(columns=list(dict.fromkeys([*wanted, "row"])), filter=where)
        return table.sort_by("row").select(wanted)

    def whole_ledger(self, summary: dict[str, Any], columns: list[str]) -> pa.Table:
        """The ledger of a finished run, all of it.

        Parameters
        ----------
        summary : dict
            From `finished`, read before.
        columns : list of str
            Only these columns; a name that stands twice counts once.

        Raises
        ------
        InputError
            If the run has changed since, or part files are missing.
        """
        ledger = self.ledger(list(dict.fromkeys(columns)))
        self.check_unchanged(summary)
        if ledger.num_rows != summary["photos"]:
            raise InputError(
                f"the ledger of the run in {self.path} has {ledger.num_rows:,} of {summary['photos']:,} photos: part "
                f"files are missing. First: reducer resume {self.path}"
            )
        return ledger

    def check_unchanged(self, summary: dict[str, Any]) -> None:
        """Refuse a run that is not the finished one any more of which the summary tells.

        Raises
        ------
        InputError
            If it was begun anew or gone on with.
        """
        now = self.finished()
        if (now["run"], now["resumed"]) != (summary["run"], summary["resumed"]):
            raise InputError(f"the run in {self.path} has changed meanwhile: try again")

    def reduced(self, id_column: str, label_column: str) -> pa.Table:
        """Return the kept rows of the ledger, in manifest order, in the columns of `reduced_schema`."""
        ledger = self.ledger(["id", "label", *REDUCED_COLUMNS, "kept"])
        return as_reduced(ledger.filter(ledger["kept"]), id_column, label_column)

    def write_reduced(self, id_column: str, label_column: str, formats: str, unit: str) -> None:
        """Write the reduced list from the ledger, in one pass.

        Parameters
        ----------
        id_column, label_column : str
            What the manifest calls its two columns.
        formats : {"csv", "parquet", "both"}
            Which files.
        unit : {"bits", "cosine"}
            Of the distances.
        """
        reduced = with_distance_unit(self.reduced(id_column, label_column), unit)
        for kind, name in (("parquet", PARQUET), ("csv", CSV)):
            if formats in (kind, "both"):
                self._write(name, reduced_file(reduced, kind))

    def write_cross_label(self, pairs: pa.Table) -> None:
        """Write ``cross_label.parquet``."""
        self._write(CROSS_LABEL, parquet_file(pairs))

    def read_cross_label(self) -> pa.Table | None:
        """The near copies under different labels; None where they were not looked for."""
        return self._read_parquet(CROSS_LABEL) if self.has(CROSS_LABEL) else None

    def nearest_cross_label(self) -> pa.Table | None:
        """The first `ROW_GROUP` of them, the nearest, however many there are."""
        if not self.has(CROSS_LABEL):
            return None
        system, root = self.place.open()
        with self._damage_explained(CROSS_LABEL), system.open(f"{root}/{CROSS_LABEL}", "rb") as file:
            pairs = pq.ParquetFile(file)
            return pairs.read_row_group(0) if pairs.num_row_groups else pairs.schema_arrow.empty_table()

    def cross_label_of(self, photo: str) -> list[tuple[str, dict[str, Any]]]:
        """Near copies of a photo under other labels: its own label, and ``id``, ``label`` and ``distance`` of each."""
        pairs = self.read_cross_label()
        if pairs is None:
            return []
        found = []
        for own, other in (("", "other_"), ("other_", "")):
            for pair in pairs.filter(pc.equal(pairs[f"{own}id"], photo)).to_pylist():
                its = {name: pair[f"{other}{name}"] for name in ("id", "label")}
                found.append((pair[f"{own}label"], {**its, "distance": pair["distance"]}))
        return sorted(found, key=lambda pair: (pair[1]["distance"], pair[1]["label"], pair[1]["id"]))

    def write_report(self, page: bytes) -> None:
        """Write ``report.html``."""
        self._write(REPORT, page)

    def remove_report(self) -> None:
        """Take out a report that does not hold any more."""
        if self.has(REPORT):
            self._remove([REPORT])

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **summary}
        self._write(SUMMARY, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def read_summary(self) -> dict[str, Any]:
        """Read ``summary.json``."""
        found: dict[str, Any] = json.loads(self._read(SUMMARY).decode())
        return found

    def summary(self) -> dict[str, Any]:
        """``summary.json`` of a folder that is to be a run's.

        Raises
        ------
        InputError
            If it is none.
        """
        with explaining_errors(self.place, f"{self.path} cannot be read"):
            if not self.is_run():
                raise InputError(f"{self.path} is no run folder: it has no summary.json of ours")
            found = self.read_summary()
            if found.get("format_version") != FORMAT_VERSION:
                raise InputError(
                    f"{self.path} was written by another version of Reducer (format {found.get('format_version')}, "
                    f"this one writes {FORMAT_VERSION}): use that version, or begin again"
                )
            return found

    def finished(self) -> dict[str, Any]:
        """The same of a run that is to be finished.

        Raises
        ------
        InputError
            If it is not.
        """
        found = self.summary()
        if found["status"] != "done":
            raise InputError(
                f"the run in {self.path} is not finished (see reducer status {self.path}). First: reducer resume "
                f"{self.path}"
            )
        return found

    def parts(self) -> list[str]:
        """Names of the part files of the ledger that are there now."""
        return [name for name in self._names(IMAGES) if _is_part(name)]


def as_reduced(rows: pa.Table, id_column: str, label_column: str) -> pa.Table:
    """Ledger rows in the columns of `reducer.storage.schemas.reduced_schema`."""
    schema = reduced_schema(id_column, label_column)
    return rows.select(["id", "label", *REDUCED_COLUMNS]).rename_columns(schema.names).cast(schema)


def reduced_file(reduced: pa.Table, kind: str) -> bytes:
    """A reduced list as the bytes of a file.

    Parameters
    ----------
    reduced : pyarrow.Table
        From `as_reduced`.
    kind : {"csv", "parquet"}
        CSV has the manifest's own two columns only.
    """
    if kind == "parquet":
        return parquet_file(reduced)
    frame = reduced.select(reduced.column_names[:2]).to_pandas()
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text.encode()


def parquet_file(table: pa.Table) -> bytes:
    """A table as the bytes of a file, which depend on its rows only."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _with_metadata(table: pa.Table, content: dict[str, Any]) -> pa.Table:
    return table.replace_schema_metadata({METADATA: json.dumps(content, ensure_ascii=False)})


def _tally(metadata: dict[bytes, bytes] | None) -> Tally:
    return Tally.from_dict(json.loads(metadata[METADATA])) if metadata and METADATA in metadata else Tally()


def _report(metadata: dict[bytes, bytes] | None) -> PieceReport:
    found = metadata and metadata.get(METADATA)
    return PieceReport.from_dict(json.loads(found)) if found else PieceReport()


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def _is_of_the_start(name: str) -> bool:
    """Whether a name is of what a run leaves that was killed before its first summary stood."""
    return is_of_lock(name) or name == temporary_name(SUMMARY)
