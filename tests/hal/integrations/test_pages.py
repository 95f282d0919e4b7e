"""Pages belong to the rows that may write them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5_hal.integrations.transformers.pages import Claim, Pages


def pages(*lengths: int, size: int = 4) -> Pages:
    made = Pages(size)
    made.tables = [[] for _ in lengths]
    claim(made, [0] * len(lengths), lengths)
    return made


def claim(made: Pages, lengths: Sequence[int], wanted: Sequence[int]) -> Claim:
    found = made.claim(lengths, wanted)
    made.commit(found)
    return found


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_row_gets_as_many_pages_as_its_tokens_fill(length: int, expected: int) -> None:
    made = pages(length)
    assert len(made.tables[0]) == made.count == expected


def test_a_claim_that_is_met_changes_nothing() -> None:
    made = pages(6)
    found = claim(made, [6], [8])
    assert (found.copies, found.taken, found.pool) == ([], [], 2)
    found = claim(made, [6], [9])
    assert (found.copies, found.taken, found.pool) == ([], [2], 3)


def test_a_claim_changes_nothing_until_it_is_committed() -> None:
    made = pages(6, 8)
    made.take([0, 0], [6, 6])
    before = copy.deepcopy(vars(made))
    found = made.claim([6, 6], [9, 17])
    assert vars(made) == before
    assert made.claim([6, 6], [9, 17]) == found


def test_copies_share_pages_until_one_writes_and_full_pages_stay_shared() -> None:
    made = pages(6)
    first, second = made.tables[0]
    made.take([0, 0], [6, 6])
    assert made.tables == [[first, second], [first, second]]
    assert made.shared
    found = claim(made, [6, 6], [7, 7])
    assert (found.copies, found.taken) == ([(second, 2)], [2])
    assert made.tables == [[first, 2], [first, second]]


def test_a_page_that_holds_nothing_yet_is_not_copied() -> None:
    made = pages(8)
    made.take([0, 0], [4, 4])
    assert claim(made, [4, 4], [5, 5]).copies == []
    assert made.tables[0][1] != made.tables[1][1]


def test_pages_that_no_row_has_are_used_again() -> None:
    made = pages(8, 8)
    made.take([0], [8])
    claim(made, [8], [16])
    assert made.count == 4
    assert sorted(made.tables[0]) == [0, 1, 2, 3]
    assert claim(made, [16], [17]).taken == [4]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.data())
def test_no_page_that_a_row_is_about_to_write_is_any_other_rows(lengths: list[int], data: st.DataObject) -> None:
    made, lengths = pages(*lengths), list(lengths)
    for _ in range(4):
        rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
        lengths = [lengths[r] for r in rows]
        made.take(rows, lengths)
        wanted = [n + data.draw(st.integers(0, 6)) for n in lengths]
        copied = claim(made, lengths, wanted).copies
        written = [p for t, n, m in zip(made.tables, lengths, wanted, strict=True) for p in t[n // 4 : -(-m // 4)]]
        assert len(set(written)) == len(written)
        held = [p for t, m in zip(made.tables, wanted, strict=True) for p in t[: -(-m // 4)]]
        assert all(held.count(p) == 1 for p in written)
        assert all(0 <= page < made.count for pair in copied for page in pair)
        lengths = wanted
