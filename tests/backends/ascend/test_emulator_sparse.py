"""Emulated indexers and sparse attentions: loops in float64 over requests, and what the pages refuse."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
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
LI, QLI = "npu_lightning_indexer", "npu_quant_lightning_indexer"
SFA, KVQ = "npu_sparse_flash_attention", "npu_kv_quant_sparse_flash_attention"


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


def requests(given: Arguments, kv: str) -> list[tuple[list[int], list[int]]]:
    """For each request: its query rows and its key rows, both as indices into the flattened tensors."""
    lengths_q, lengths_k = given.get("actual_seq_lengths_query"), given.get(f"actual_seq_lengths_{kv}")
    query, key = given["query"], given["key"]
    layout = given.get("layout_kv" if kv == "kv" else "layout_key", "BSND")
    if given.get("layout_query", "BSND") == "TND":
        ends = [0, *lengths_q.tolist()]
        rows = [list(range(a, b)) for a, b in pairwise(ends)]
    else:
        width = query.shape[1]
        counts = [width] * len(query) if lengths_q is None else lengths_q.tolist()
        rows = [list(range(b * width, b * width + count)) for b, count in enumerate(counts)]
    found = []
    for b, mine in enumerate(rows):
        if layout == "PA_BSND":
            size = key.shape[1]
            slots = [int(given["block_table"][b, p // size]) * size + p % size for p in range(int(lengths_k[b]))]
        elif layout == "TND":
            ends = [0, *lengths_k.tolist()]
            slots = list(range(ends[b], ends[b + 1]))
        else:
            count = key.shape[1] if lengths_k is None else int(lengths_k[b])
            slots = list(range(b * key.shape[1], b * key.shape[1] + count))
        found.append((mine, slots))
    return found


def flat(tensor: Tensor, layout: str) -> Tensor:
    return tensor if layout == "TND" else tensor.flatten(0, 1)


def index_scores(given: Arguments) -> Iterator[tuple[int, Tensor, int]]:
    """Each query row, its scores of every position, and how many of them it may see."""
    q = flat(given["query"], given.get("layout_query", "BSND")).double()
    w = flat(given["weights"], given.get("layout_query", "BSND")).double()
    k = flat(given["key"], given.get("layout_key", "BSND"))[:, 0].double()
    for rows, slots in requests(given, "key"):
        for i, row in enumerate(rows):
            scores = torch.stack([(w[row] * (q[row] @ k[slot]).clamp(min=0)).sum() for slot in slots])
            causal = given.get("sparse_mode", 3) == 3
            yield row, scores, len(slots) - len(rows) + i + 1 if causal else len(slots)


@pytest.mark.parametrize("case", ["plain", "BSND", "TND"])
@pytest.mark.parametrize("sparse_mode", [0, 3])
def test_lightning_indexer_lists_the_best_visible_positions(case: str, sparse_mode: int) -> None:
    given = {**sample(LI, case), "sparse_mode": sparse_mode}
    indices, values = npu.npu_lightning_indexer(**given)
    width = given["sparse_count"]
    rows, value_rows = indices.view(-1, width), values.view(-1, width) if values.numel() else None
    seen = 0
    for row, scores, visible in index_scores(given):
        kept = min(width, visible)
        best = scores[:visible].sort(descending=True).values[:kept]
        chosen = rows[row]
        assert (chosen[kept:] == -1).all()
        assert len(set(chosen[:kept].tolist())) == kept
        assert torch.allclose(scores[chosen[:kept].long()], best, rtol=1e-5)
        if value_rows is not None:
            assert torch.allclose(value_rows[row, :kept].double(), best, rtol=1e-2)
        seen += 1
    assert seen == len(rows)


def test_ties_go_to_the_lower_position() -> None:
    given = sample(LI)
    given["key"][:] = given["key"][0, 0]
    indices, _ = npu.npu_lightning_indexer(**given)
    assert indices[0, 0, :20].tolist() == list(range(20))


def test_hidden_positions_are_listed_last_where_that_is_asked_for() -> None:
    given = sample(LI, "BSND")
    plain, _ = npu.npu_lightning_indexer(**given)
    emulator.install(hidden_positions=True)
    listed, _ = npu.npu_lightning_indexer(**given)
    assert plain[0, 0, 0, 28:].tolist() == [-1] * 12
    assert listed[0, 0, 0, :28].tolist() == plain[0, 0, 0, :28].tolist()
    assert listed[0, 0, 0, 28:].tolist() == [28, 29] + [-1] * 10


def test_more_queries_than_keys_leave_rows_that_see_nothing() -> None:
    given = sample(LI, "TND")
    given.update(actual_seq_lengths_key=torch.tensor([10, 11], dtype=torch.int32), key=given["key"][:11])
    indices, _ = npu.npu_lightning_indexer(**given)
    assert indices[1, 0].tolist() == [-1] * 8
    assert indices[2, 0].tolist() == [0] + [-1] * 7


def test_float32_weights_are_taken_on_a2() -> None:
    given = sample(LI)
    wide, _ = npu.npu_lightning_indexer(**{**given, "weights": given["weights"].float()})
    assert torch.equal(wide, npu.npu_lightning_indexer(**given)[0])


def test_quant_lightning_indexer_ranks_by_its_golden_scores() -> None:
    given = sample(QLI)
    indices = npu.npu_quant_lightning_indexer(**given)
    q, k = given["query"].long(), given["key"].flatten(0, 1)[:, 0].long()
    wq = (given["weights"] * given["query_dequant_scale"]).double()
    ks = given["key_dequant_scale"].flatten().double()
    for rows, slots in requests(given, "key"):
        for i, row in enumerate(rows):
            visible = slots[: len(slots) - len(rows) + i + 1]
            parts = torch.stack([(q[row] @ k[s]).clamp(min=0).double() / 1024 for s in visible]).half().double()
            scores = (parts * wq[row]).sum(1) * ks[visible]
            kept = min(24, len(visible))
            chosen = indices[row, 0, :kept].long()
            assert torch.allclose(scores[chosen], scores.sort(descending=True).values[:kept], rtol=1e-5)
            assert (indices[row, 0, kept:] == -1).all()


def attended(given: Arguments, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each query row, its output, largest score and sum, by loops over what it selects."""
    index = flat(given["sparse_indices"], given.get("layout_query", "BSND"))[:, 0]
    block = given.get("sparse_block_size", 1)
    for rows, slots in requests(given, "kv"):
        for i, row in enumerate(rows):
            positions = [b * block + o for b in index[row].tolist() if b >= 0 for o in range(block)]
            positions = [p for p in positions if p < len(slots)]
            visible = [p for p in positions if given.get("sparse_mode", 3) == 0 or p <= len(slots) - len(rows) + i]
            taken = [slots[p] for p in (visible or positions)]  # golden code averages what is hidden
            scores = q[row] @ k[taken].T * given["scale_value"] * bool(visible)
            top = scores.amax(-1)
            yield row, torch.softmax(scores, -1) @ v[taken], top, (scores - top[:, None]).exp().sum(-1)


@pytest.mark.parametrize("case", ["plain", "BSND"])
@pytest.mark.parametrize("sparse_mode", [0, 3])
def test_sparse_flash_attention(case: str, sparse_mode: int) -> None:
    given = {**sample(SFA, case), "sparse_mode": sparse_mode}
    out, largest, total = npu.npu_sparse_flash_attention(**given)
    lq, lk = given.get("layout_query", "BSND"), given.get("layout_kv", "BSND")
    q = torch.cat((flat(given["query"], lq), flat(given["query_rope"], lq)), -1).double()
    v = flat(given["key"], lk)[:, 0].double()
    k = torch.cat((v, flat(given["key_rope"], lk)[:, 0].double()), -1)
    rows = out.flatten(0, -3)
    for row, expected, top, mass in attended(given, q, k, v):
        assert torch.allclose(rows[row].double(), expected, atol=2e-2, rtol=2**-7)
        if largest.numel():
            assert torch.allclose(largest.view(-1, 4)[row].double(), top, atol=1e-4)
            assert torch.allclose(total.view(-1, 4)[row].double(), mass, rtol=1e-4)


@pytest.mark.parametrize("sparse_mode", [0, 3])
def test_block_wise_selection_stops_at_the_request_s_end(sparse_mode: int) -> None:
    given = {**sample(SFA), "sparse_mode": sparse_mode}
    index = torch.tensor([[0, 9, 4], [4, 2, 0], [9, 1, -1]], dtype=torch.int32)[:, None]
    given.update(sparse_indices=index, sparse_block_size=2)
    given["actual_seq_lengths_kv"] = torch.tensor([19, 20], dtype=torch.int32)
    out, _, _ = npu.npu_sparse_flash_attention(**given)
    q = torch.cat((given["query"], given["query_rope"]), -1).double()
    v = given["key"].flatten(0, 1)[:, 0].double()
    k = torch.cat((v, given["key_rope"].flatten(0, 1)[:, 0].double()), -1)
    for row, expected, _, _ in attended(given, q, k, v):
        assert torch.allclose(out[row].double(), expected, atol=2e-2, rtol=2**-7)


def test_a_row_that_selects_nothing_is_zeros_and_pages_not_in_use_do_not_count() -> None:
    given = sample(SFA)
    given["sparse_indices"][1] = -1
    spare = next(b for b in range(8) if b not in given["block_table"].flatten().tolist())
    given["key"][spare] = float("nan")
    out, _, _ = npu.npu_sparse_flash_attention(**given)
    assert (out[1] == 0).all()
    assert out.isfinite().all()


def test_sinks_on_ascend950_join_the_sum() -> None:
    emulator.install(soc="Ascend950")
    given = {**sample(SFA), "sinks": torch.tensor([0.5, 1.0, -1.0, 3.0])}
    out, _, _ = npu.npu_sparse_flash_attention(**given)
    q = torch.cat((given["query"], given["query_rope"]), -1).double()
    v = given["key"].flatten(0, 1)[:, 0].double()
    k = torch.cat((v, given["key_rope"].flatten(0, 1)[:, 0].double()), -1)
    for row, expected, top, mass in attended(given, q, k, v):
        share = mass / (mass + (given["sinks"].double() - top).exp())
        assert torch.allclose(out[row].double(), expected * share[:, None], atol=2e-2, rtol=2**-7)


def test_kv_quant_sparse_flash_attention_reads_rows_of_656_bytes() -> None:
    given = sample(KVQ)
    out = npu.npu_kv_quant_sparse_flash_attention(**given)
    rows = given["key"].flatten(0, 1)[:, 0]
    scales = rows[:, 640:].contiguous().view(torch.float32)
    v = (rows[:, :512].float().view(-1, 4, 128) * scales[..., None]).flatten(1).to(torch.bfloat16).double()
    rope = rows[:, 512:640].contiguous().view(torch.bfloat16).double()
    given["sparse_indices"] = given["sparse_indices"]
    for row, expected, _, _ in attended(given, given["query"].double(), torch.cat((v, rope), -1), v):
        assert torch.allclose(out[row].double(), expected, atol=3e-2, rtol=2**-6)
    assert out.shape == (3, 4, 512)


def test_the_quantised_attention_rounds_probabilities_to_query_s_dtype() -> None:
    """Eleven equal keys: 11 times the float16 next to 1/11 is less than the float16 below 1 and half a step more."""
    given = sample(KVQ)
    given.update(query=torch.zeros(3, 4, 576).half(), sparse_mode=0)
    given["sparse_indices"] = torch.arange(11, dtype=torch.int32).repeat(3, 1, 1)
    rows = given["key"].view(-1, 656)
    rows[:, :512], rows[:, 512:640] = 1, 0
    rows[:, 640:] = torch.ones(len(rows), 4).view(torch.int8)
    assert (npu.npu_kv_quant_sparse_flash_attention(**given) == 1 - 2**-11).all()


def test_a_decode_step_of_glm5_is_fast_enough() -> None:
    tokens, positions, block = 4, 8192, 128
    pages, bf16 = positions // block, torch.bfloat16
    table = torch.arange(pages, dtype=torch.int32).repeat(tokens, 1)
    shared = {"block_table": table, "actual_seq_lengths_query": torch.arange(1, tokens + 1, dtype=torch.int32),
              "layout_query": "TND"}  # fmt: skip
    lengths = torch.full((tokens,), positions, dtype=torch.int32)
    started = time.monotonic()
    indices, _ = npu.npu_lightning_indexer(
        torch.randn(tokens, 32, 128).to(bf16), torch.randn(pages, block, 1, 128).to(bf16),
        torch.randn(tokens, 32).to(bf16), layout_key="PA_BSND", actual_seq_lengths_key=lengths, **shared,
    )  # fmt: skip
    key = torch.randn(pages, block, 1, 512).to(bf16)
    npu.npu_sparse_flash_attention(
        torch.randn(tokens, 64, 512).to(bf16), key, key, indices, 1 / 16, layout_kv="PA_BSND", attention_mode=2,
        query_rope=torch.randn(tokens, 64, 64).to(bf16), key_rope=torch.randn(pages, block, 1, 64).to(bf16),
        actual_seq_lengths_kv=lengths, **shared,
    )  # fmt: skip
    assert time.monotonic() - started < 5, "0.2 s where nothing else runs"


def test_softmax_statistics_are_a_natural_logarithm_s() -> None:
    given = sample(SFA, "BSND")
    _, largest, total = npu.npu_sparse_flash_attention(**given)
    assert largest.shape == total.shape == (2, 1, 2, 4)
    assert math.isfinite(float((largest + total.log()).sum()))
