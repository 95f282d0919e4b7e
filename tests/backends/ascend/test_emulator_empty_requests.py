"""Emulated npu_fused_infer_attention_score(_v2): requests without query tokens, without keys, or without either.

The pages let a prefix sum equal its predecessor. What such a call gives is what it gives without the request.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from ci.ascend import emulator  # noqa: E402
from ci.ascend.emulator.samples import Arguments, sample  # noqa: E402

npu = torch.ops.npu
FIRST, SECOND = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
QUERIES = {FIRST: "actual_seq_lengths", SECOND: "actual_seq_qlen"}
KEYS = {FIRST: "actual_seq_lengths_kv", SECOND: "actual_seq_kvlen"}
LSE = {FIRST: "softmax_lse_flag", SECOND: "return_softmax_lse"}

versions = pytest.mark.parametrize("version", [FIRST, SECOND])
modes = pytest.mark.parametrize("mode", [0, 3], ids=["dense", "causal"])
places = pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


def masked(given: Arguments, mode: int) -> Arguments:
    return {**given, "sparse_mode": mode, "atten_mask": CAUSAL if mode else None}


def inserted(rows: Tensor, at: int, more: Tensor) -> Tensor:
    return torch.cat((rows[:at], more, rows[at:]))


def paged(version: str, mode: int) -> Arguments:
    """Absorbed MLA: requests of 2 and 1 tokens, 20 and 37 keys."""
    given = masked(sample(version), mode)
    return given if version == FIRST else {**given, LSE[version]: True}  # the first version has no lse with D 512


def unpaged(version: str, mode: int, rope: bool = True) -> Arguments:
    """Requests of 2 and 4 tokens, 4 and 7 keys, 3 heads of 128 dims."""
    sizes = {"query": (6, 128), "key": (11, 128), "value": (11, 128), "query_rope": (6, 64), "key_rope": (11, 64)}
    made = {n: torch.randn(tokens, 3, width).half() for n, (tokens, width) in sizes.items() if rope or "rope" not in n}
    heads, scale = ("num_heads", "scale") if version == FIRST else ("num_query_heads", "softmax_scale")
    words = {heads: 3, scale: 0.1, QUERIES[version]: [2, 6], KEYS[version]: [4, 11], LSE[version]: True}
    return masked({**made, **words, "num_key_value_heads": 3, "input_layout": "TND"}, mode)


def with_a_paged_request(given: Arguments, version: str, place: int, tokens: int, keys: int) -> Arguments:
    """One more request, whose queries are ones; blocks past its keys are no blocks."""
    ends, lengths = list(given[QUERIES[version]]), list(given[KEYS[version]])
    start = [0, *ends][place]
    more = {n: inserted(given[n], start, torch.ones_like(given[n][:tokens])) for n in ("query", "query_rope")}
    blocks = torch.arange(3, dtype=torch.int32)[None]
    table = inserted(given["block_table"], place, blocks.where(blocks * given["block_size"] < keys, -1))
    return {
        **given,
        **more,
        QUERIES[version]: [*ends[:place], start + tokens, *(end + tokens for end in ends[place:])],
        KEYS[version]: [*lengths[:place], keys, *lengths[place:]],
        "block_table": table,
    }


def with_a_request(given: Arguments, version: str, place: int, tokens: int, keys: int) -> Arguments:
    """One more request, whose queries and keys are ones."""
    more = {}
    for names, word, count in ((("query",), QUERIES[version], tokens), (("key", "value"), KEYS[version], keys)):
        ends = list(given[word])
        start = [0, *ends][place]
        for name in {*names, f"{names[0]}_rope"} & given.keys():
            more[name] = inserted(given[name], start, torch.ones(count, *given[name].shape[1:]).half())
        more[word] = [*ends[:place], start + count, *(end + count for end in ends[place:])]
    return {**given, **more}


def heads_first(given: Arguments, layout: str) -> Arguments:
    names = [name for name in ("query", "key", "value", "query_rope", "key_rope") if name in given]
    return {**given, **{n: given[n].transpose(0, 1).contiguous() for n in names}, "input_layout": layout}


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@versions
@modes
@places
@pytest.mark.parametrize("keys", [0, 20])
def test_a_paged_request_without_tokens_changes_nothing(version: str, mode: int, place: int, keys: int) -> None:
    op, given = getattr(npu, version), paged(version, mode)
    assert same(op(**with_a_paged_request(given, version, place, 0, keys)), op(**given))


@versions
@modes
@places
@pytest.mark.parametrize("keys", [0, 5])
@pytest.mark.parametrize("rope", [True, False])
def test_an_unpaged_request_without_tokens_changes_nothing(
    version: str, mode: int, place: int, keys: int, rope: bool
) -> None:
    op, given = getattr(npu, version), unpaged(version, mode, rope)
    assert same(op(**with_a_request(given, version, place, 0, keys)), op(**given))


@places
def test_nor_does_it_where_heads_come_first(place: int) -> None:
    op, given = getattr(npu, SECOND), unpaged(SECOND, 3)
    expected = op(**given)
    out, lse = op(**heads_first(with_a_request(given, SECOND, place, 0, 5), "NTD"))
    assert same((out.transpose(0, 1), lse), expected)
    assert same(op(**heads_first(with_a_request(given, SECOND, place, 0, 5), "NTD_TND")), expected)


@modes
def test_requests_without_tokens_may_follow_each_other(mode: int) -> None:
    op, given = getattr(npu, SECOND), unpaged(SECOND, mode)
    more = with_a_request(with_a_request(given, SECOND, 1, 0, 5), SECOND, 1, 0, 0)
    assert more["actual_seq_qlen"] == [2, 2, 2, 6]
    assert same(op(**more), op(**given))


@versions
@modes
@places
@pytest.mark.parametrize("pages", [True, False])
def test_a_request_without_keys_has_zeros(version: str, mode: int, place: int, pages: bool) -> None:
    """Assumed: the pages speak of a call without keys only. A length of 0, or a prefix sum that adds nothing."""
    make, add = (paged, with_a_paged_request) if pages else (unpaged, with_a_request)
    op, given = getattr(npu, version), make(version, mode)
    start = [0, *given[QUERIES[version]]][place]
    out, lse = op(**add(given, version, place, 2, 0))
    assert (out[start : start + 2] == 0).all()
    assert lse[start : start + 2].isneginf().all()
    rest = tuple(torch.cat((part[:start], part[start + 2 :])) for part in (out, lse))
    assert same(rest, op(**given))


def test_a_query_without_tokens_gives_nothing() -> None:
    given = unpaged(SECOND, 0, rope=False)
    out, lse = npu.npu_fused_infer_attention_score_v2(
        **{**given, "query": given["query"][:0], "actual_seq_qlen": [0, 0]}
    )
    assert out.shape == (0, 3, 128)
    assert lse.shape == (0, 3, 1)


def test_a_batch_may_hold_a_request_of_length_0() -> None:
    given = sample(SECOND, "BNSD")
    whole, logs = npu.npu_fused_infer_attention_score_v2(**given)
    out, lse = npu.npu_fused_infer_attention_score_v2(**given, actual_seq_qlen=[0, 6])
    assert (out[0] == 0).all()
    assert lse[0].isneginf().all()
    assert same((out[1], lse[1]), (whole[1], logs[1]))


@pytest.mark.parametrize("lengths", [[20, -1], [-20, 37]])
def test_paged_lengths_are_not_negative(lengths: list[int]) -> None:
    with pytest.raises(emulator.ConstraintError, match="key lengths are not negative"):
        npu.npu_fused_infer_attention_score_v2(**{**paged(SECOND, 3), "actual_seq_kvlen": lengths})
