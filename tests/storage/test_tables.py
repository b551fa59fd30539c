from __future__ import annotations

import io

import pandas as pd
import pyarrow as pa

from reducer.storage.tables import csv_file


def test_a_csv_file_reads_back_whatever_its_texts_hold() -> None:
    """A lone CR is the text that Python quotes of late only, where rows end with a line feed."""
    texts = ["plain", "church\rBern", "two\nlines", "both\r\nof them", 'a "word"', "a,b", " ", "é", "\r"]
    table = pa.table(
        {"id": [str(number) for number in range(len(texts))], "landmark\rid": texts, "n": range(len(texts))}
    )
    content = csv_file(table)
    assert content.startswith(b'id,"landmark\rid",n\n0,plain,0\n1,"church\rBern",1\n2,"two\nlines",2\n')
    assert content.endswith(b'8,"\r",8\n')
    pd.testing.assert_frame_equal(
        pd.read_csv(io.BytesIO(content), dtype={"id": str}, keep_default_na=False), table.to_pandas()
    )


def test_of_no_rows_there_is_the_header() -> None:
    assert csv_file(pa.table({"id": pa.array([], pa.string()), "label": pa.array([], pa.string())})) == b"id,label\n"
