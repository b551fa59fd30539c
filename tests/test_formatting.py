"""Sizes and lengths of time as people write them mean what Dask takes them for."""

import dask.utils
import pytest

from reducer.formatting import BYTE_UNITS, SECOND_UNITS, parse_bytes, parse_seconds


@pytest.mark.parametrize("unit", BYTE_UNITS)
def test_bytes_in_every_unit(unit: str) -> None:
    for text in (f"3{unit}", f"1.5 {unit.upper()}", f"2e3{unit}", f"1 000 {unit}"):
        assert parse_bytes(text) == dask.utils.parse_bytes(text)


@pytest.mark.parametrize("unit", SECOND_UNITS)
def test_seconds_in_every_unit(unit: str) -> None:
    for text in (f"3{unit}", f"1.5 {unit.upper()}", f"2e3{unit}", f"1 0 {unit}"):
        assert parse_seconds(text) == dask.utils.parse_timedelta(text)


def test_no_unit_of_dask_is_missing() -> None:
    assert set(BYTE_UNITS) == set(dask.utils.byte_sizes)
    assert set(SECOND_UNITS) - {""} == {unit.lower() for unit in dask.utils.timedelta_sizes}


@pytest.mark.parametrize("text", ["", "MB", "-5", "5 foos", "1.2.3", "inf", "nan", "0x10", "5e", "1..2GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    for parse in (parse_bytes, parse_seconds):
        with pytest.raises(ValueError):
            parse(text)
