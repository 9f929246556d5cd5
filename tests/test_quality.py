"""The numbers in docs/quality.md are those that are measured, and hold what is promised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documents are not beside the tests")


def shown() -> dict[tuple[str, ...], list[float]]:
    """Numbers by table, bits, method and group size."""
    rows = [
        line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| (Word|Mini)", line)
    ]
    return {tuple(row[:4]): [float(cell) for cell in row[4:] if cell.strip(" |")] for row in rows}


def test_least_squares_has_the_error_that_is_promised_on_real_rows():
    errors = {variant: numbers[1] for variant, numbers in shown().items()}
    assert len(errors) == 40
    assert errors["WordLlama", "2", "lsq", "a row"] <= 0.1165
    assert errors["WordLlama", "2", "lsq", "32"] <= 0.089
    for (table, bits, method, group), error in errors.items():
        assert errors[table, bits, "lsq", group] <= error, (table, bits, method, group)


@pytest.mark.real
def test_numbers_are_those_that_are_measured(request):
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    from benchmarks import quality

    expected = shown()
    for real in quality.real_tables(request.config.cache.mkdir("static_text")):
        for measured in quality.measure(real):
            numbers = expected.pop(
                (real.name, str(measured.bits), measured.method, str(measured.group_size or "a row"))
            )
            assert numbers[0] == measured.row_bytes
            assert numbers[1:5] == pytest.approx(measured[5:9], rel=0.006, abs=6e-5)
            if measured.spearman is not None:
                assert numbers[5] == pytest.approx(measured.spearman, abs=0.001)
    assert not expected
