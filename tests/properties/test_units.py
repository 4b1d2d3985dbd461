"""Sizes and times: what is written with a unit is what it says, and anything else is refused in one way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankscope.errors import StudyError
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import resolve_spec
from rankscope.text.formats import parse_bytes, parse_seconds

SIZES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TIMES = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
BLANKS = st.sampled_from(["", " ", "\t"])
HUNDREDTHS = st.integers(1, 10**7)


def verdict(**fields: object) -> StudySpec:
    return resolve_spec({"model": {"id": "m"}, "data": {"id": "d"}, "verdict": fields})


@given(count=st.integers(1, 2**63), unit=st.sampled_from(sorted(SIZES)), blanks=st.tuples(BLANKS, BLANKS, BLANKS))
def test_whole_sizes_are_exact(count: int, unit: str, blanks: tuple[str, str, str]) -> None:
    before, between, after = blanks
    assert parse_bytes(f"{before}{count}{between}{unit}{after}") == count * SIZES[unit]
    assert parse_bytes(f"{count}{unit.upper()}") == parse_bytes(f"{count}{unit.lower()}") == count * SIZES[unit]


@given(hundredths=HUNDREDTHS, unit=st.sampled_from(["kB", "MB", "GB", "TB"]))
def test_sizes_with_decimals_are_exact(hundredths: int, unit: str) -> None:
    written = f"{hundredths // 100}.{hundredths % 100:02d}{unit}"
    assert parse_bytes(written) == hundredths * SIZES[unit] // 100


@given(hundredths=HUNDREDTHS, unit=st.sampled_from(sorted(TIMES)))
def test_times(hundredths: int, unit: str) -> None:
    written = f"{hundredths // 100}.{hundredths % 100:02d}{unit}"
    assert parse_seconds(written) == pytest.approx(hundredths * TIMES[unit] / 100, rel=1e-12)


@given(size=st.integers(1, 2**63 - 1), seconds=st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_numbers_are_taken_as_they_are(size: int, seconds: float) -> None:
    assert parse_bytes(size) == size
    assert parse_seconds(seconds) == seconds
    found = verdict(max_gpu_memory=size, max_runtime=seconds).verdict
    assert (found.max_gpu_memory, found.max_runtime) == (size, seconds)


ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.lists(st.integers(), max_size=2)
    | st.from_regex(r"-?[0-9]{1,5}(\.[0-9]{0,3})?(e-?[0-9]{1,4})? ?([kmgt]i?b|min|[shd])?", fullmatch=True)
    | st.sampled_from(["9" * 400, "9" * 400 + "GB", "9" * 5000, "0", "0.0000000001", "1e400", "inf", "nan", 10**400])
)  # fmt: skip


@given(value=ANYTHING)
def test_anything_else_is_refused_by_name(value: object) -> None:
    for field in ("max_gpu_memory", "max_runtime"):
        try:
            found = getattr(verdict(**{field: value}).verdict, field)
        except StudyError as caught:
            error = str(caught)
        else:
            assert found is value is None or 0 < found < float("inf")
            continue
        assert f"verdict.{field}" in error
        assert len(error.splitlines()) <= 4
        assert max(map(len, error.splitlines())) < 300
    for parse in (parse_bytes, parse_seconds):
        if isinstance(value, str | float):
            try:
                parse(value)
            except ValueError as error:
                assert "expected a" in str(error)  # noqa: PT017


def test_zero_is_no_size() -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes("0.1B")
