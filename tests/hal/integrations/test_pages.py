"""Pages belong to the rows that may write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5_hal.integrations.transformers.pages import Pages


def pages(*lengths: int, size: int = 4) -> Pages:
    made = Pages(size)
    made.tables = [[] for _ in lengths]
    made.claim([0] * len(lengths), lengths)
    return made


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_row_gets_as_many_pages_as_its_tokens_fill(length: int, expected: int) -> None:
    made = pages(length)
    assert len(made.tables[0]) == made.count == expected


def test_a_claim_that_is_met_changes_nothing() -> None:
    made = pages(6)
    assert made.claim([6], [8]) == ([], False)
    assert made.claim([6], [9]) == ([], True)


def test_copies_share_pages_until_one_writes_and_full_pages_stay_shared() -> None:
    made = pages(6)
    first, second = made.tables[0]
    made.take([0, 0], [6, 6])
    assert made.tables == [[first, second], [first, second]]
    assert made.shared
    assert made.claim([6, 6], [7, 7]) == ([(second, 2)], True)
    assert made.tables == [[first, 2], [first, second]]


def test_a_page_that_holds_nothing_yet_is_not_copied() -> None:
    made = pages(8)
    made.take([0, 0], [4, 4])
    assert made.claim([4, 4], [5, 5])[0] == []
    assert made.tables[0][1] != made.tables[1][1]


def test_pages_that_no_row_has_are_used_again() -> None:
    made = pages(8, 8)
    made.take([0], [8])
    made.claim([8], [16])
    assert made.count == 4


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.data())
def test_no_page_that_a_row_is_about_to_write_is_any_other_rows(lengths: list[int], data: st.DataObject) -> None:
    made, lengths = pages(*lengths), list(lengths)
    for _ in range(4):
        rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
        lengths = [lengths[r] for r in rows]
        made.take(rows, lengths)
        wanted = [n + data.draw(st.integers(0, 6)) for n in lengths]
        copied = made.claim(lengths, wanted)[0]
        written = [p for t, n, m in zip(made.tables, lengths, wanted, strict=True) for p in t[n // 4 : -(-m // 4)]]
        assert len(set(written)) == len(written)
        held = [p for t, m in zip(made.tables, wanted, strict=True) for p in t[: -(-m // 4)]]
        assert all(held.count(p) == 1 for p in written)
        assert all(0 <= page < made.count for pair in copied for page in pair)
        lengths = wanted
