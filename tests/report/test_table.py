from __future__ import annotations

import pytest

from tricorn.report.table import table


def test_words_stand_left_and_numbers_right() -> None:
    text = table(
        ["strategy", "accuracy", "bytes sent", "exactly once", "note"],
        [["ps", 0.98333, 12_345_678, True, None], ["dp × 2", 0.9, 1024.0, False, "tie"]],
    )
    assert text.splitlines() == [
        "strategy  accuracy  bytes sent  exactly once  note",
        "────────  ────────  ──────────  ────────────  ────",
        "ps          0.9833  12,345,678  yes",
        "dp × 2         0.9       1,024  no            tie",
    ]


def test_a_table_without_rows_has_its_headers() -> None:
    assert table(["a", "bc"], []).splitlines() == ["a  bc", "─  ──"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [[1]])
