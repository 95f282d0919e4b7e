"""Emulated gating, routing and permutation: plain loops, and what the pages refuse."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from ci.ascend import emulator  # noqa: E402
from ci.ascend.emulator.samples import Arguments, sample  # noqa: E402

npu = torch.ops.npu
BF16 = torch.bfloat16
GATE, ROUTE = "npu_moe_gating_top_k", "npu_moe_init_routing_v2"
FINAL, PERMUTE, UNPERMUTE = "npu_moe_finalize_routing", "npu_moe_token_permute", "npu_moe_token_unpermute"


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


def close(actual: Tensor, expected: Tensor, rtol: float = 2**-7) -> None:
    assert actual.shape == expected.shape
    assert torch.allclose(actual.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("groups", "kept", "merit"), [(1, 1, 0), (8, 4, 1), (8, 3, 0)])
def test_gating(kind: int, groups: int, kept: int, merit: int) -> None:
    given = {**sample(GATE), "norm_type": kind, "group_count": groups, "k_group": kept, "group_select_mode": merit}
    y, index, normed = npu.npu_moe_gating_top_k(**given)
    x, bias = given["x"].double(), given["bias"].double()
    scores = 1 / (1 + (-x).exp()) if kind else x.exp() / x.exp().sum(-1, keepdim=True)
    close(normed, scores, 1e-5)
    for row in range(len(x)):
        ranked = (scores[row] + bias).tolist()
        size = 256 // groups
        members = [range(g * size, g * size + size) for g in range(groups)]
        worth = [sum(sorted((ranked[e] for e in group), reverse=True)[: 1 + merit]) for group in members]
        open_groups = sorted(range(groups), key=lambda g: -worth[g])[:kept]
        experts = sorted((e for g in open_groups for e in members[g]), key=lambda e: (-ranked[e], e))[:8]
        assert index[row].tolist() == experts
        weights = scores[row, experts]
        close(y[row], 2.5 * weights / (weights.sum() if kind else 1.0))
    assert index.dtype is torch.int32


def test_ties_and_nan() -> None:
    x = torch.zeros(1, 8)
    x[0, 2] = float("nan")
    _, index, normed = npu.npu_moe_gating_top_k(x, 8, norm_type=1)
    assert index.tolist() == [[0, 1, 3, 4, 5, 6, 7, 2]]
    assert normed.isnan().all(), "not asked for, so undefined"


@pytest.mark.parametrize("span", [(0, 16), (4, 9)])
@pytest.mark.parametrize("row_idx_type", [0, 1])
def test_routing_sorts_pairs_by_expert(span: tuple[int, int], row_idx_type: int) -> None:
    given = {**sample(ROUTE), "active_expert_range": list(span), "row_idx_type": row_idx_type}
    expanded, row_idx, counts, _ = npu.npu_moe_init_routing_v2(**given)
    experts = given["expert_idx"].flatten().tolist()
    order = sorted((p for p, e in enumerate(experts) if span[0] <= e < span[1]), key=lambda p: experts[p])
    assert torch.equal(expanded[: len(order)], given["x"][[p // 4 for p in order]])
    assert expanded[len(order) :].isnan().all()
    assert counts.tolist() == [experts.count(e) for e in range(*span)]
    if row_idx_type:
        assert row_idx[: len(order)].tolist() == order
    else:
        places = {p: i for i, p in enumerate(order)}
        assert row_idx.tolist() == [places.get(p, -1) for p in range(24)]


def test_counts_come_as_sums_or_as_pairs() -> None:
    given = {**sample(ROUTE), "active_expert_range": [4, 9]}
    counts, sums, pairs = (
        npu.npu_moe_init_routing_v2(**{**given, "expert_tokens_num_type": kind})[2] for kind in (1, 0, 2)
    )
    assert torch.equal(sums, counts.cumsum(0))
    used = [[e, n] for e, n in zip(range(4, 9), counts.tolist(), strict=True) if n]
    assert pairs.tolist() == used + [[0, 0]] * (16 - len(used))


def test_the_active_rows_come_first() -> None:
    given = sample(ROUTE)
    full, _, _, _ = npu.npu_moe_init_routing_v2(**given)
    some, _, _, _ = npu.npu_moe_init_routing_v2(**{**given, "active_num": 10})
    assert torch.equal(some, full[:10])


def test_an_empty_range_is_the_whole_range_and_scales_go_along() -> None:
    given = {**sample(ROUTE), "scale": torch.rand(6)}
    one = npu.npu_moe_init_routing_v2(**given)
    two = npu.npu_moe_init_routing_v2(**{**given, "active_expert_range": []})
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    source = torch.argsort(given["expert_idx"].flatten(), stable=True) // 4
    assert torch.equal(one[3], given["scale"][source])


def test_no_tokens_are_no_rows() -> None:
    given = {
        **sample(ROUTE),
        "x": torch.empty(0, 32),
        "expert_idx": torch.empty(0, 4, dtype=torch.int32),
        "quant_mode": 1,
    }
    expanded, row_idx, counts, scales = npu.npu_moe_init_routing_v2(**{**given, "scale": torch.empty(0)})
    assert expanded.shape == (0, 32)
    assert row_idx.numel() == scales.numel() == 0
    assert counts.tolist() == [0] * 16


@pytest.mark.parametrize("smooth", [None, 1, 16])
def test_dynamic_quantisation(smooth: int | None) -> None:
    scale = None if smooth is None else torch.rand(smooth, 32) + 0.5
    given = {**sample(ROUTE), "quant_mode": 1, "scale": scale}
    values, row_idx, _, scales = npu.npu_moe_init_routing_v2(**given)
    for pair, place in enumerate(row_idx.tolist()):
        row = given["x"][pair // 4].double()
        if scale is not None:
            row = row * scale[int(given["expert_idx"].flatten()[pair]) if smooth == 16 else 0].double()
        step = row.abs().max() / 127
        assert torch.allclose(scales[place].double(), step, rtol=1e-6)
        assert ((values[place].double() - row / step).abs() <= 0.5 + 1e-4).all()


def test_static_quantisation_is_in_float16() -> None:
    given = {**sample(ROUTE), "quant_mode": 0, "scale": torch.tensor([11.3]), "offset": torch.tensor([2.7])}
    values, row_idx, _, _ = npu.npu_moe_init_routing_v2(**given)
    expected = (given["x"].half() * torch.tensor(11.3).half() + torch.tensor(2.7).half()).float().round()
    assert torch.equal(values[row_idx.long()].view(6, 4, 32)[:, 0], expected.clamp(-128, 127).to(torch.int8))


def test_padding_gives_every_expert_the_same_rows() -> None:
    given = {**sample(ROUTE, "padded"), "scale": torch.rand(6)}
    expanded, row_idx, counts, scales = npu.npu_moe_init_routing_v2(**given)
    experts = given["expert_idx"].flatten().tolist()
    assert counts.tolist() == [experts.count(e) for e in range(16)], "counted before any is dropped"
    for expert in range(16):
        mine = [p for p, e in enumerate(experts) if e == expert]
        for rank, pair in enumerate(mine):
            assert row_idx[pair] == (expert * 2 + rank if rank < 2 else -1)
            if rank < 2:
                assert torch.equal(expanded[expert, rank], given["x"][pair // 4])
                assert scales[expert * 2 + rank] == given["scale"][pair // 4]
        assert (expanded[expert, len(mine) :] == 0).all()


@pytest.mark.parametrize("mode", ["plain", "0", "1", "3"])
@pytest.mark.parametrize("bias", [True, False])
def test_finalize_routing(mode: str, bias: bool) -> None:
    given = sample(FINAL, mode)
    given["skip2"] = given["skip1"] * 2
    if not bias:
        given.update(bias=None, export_for_source_row=None)
    if mode in ("1", "3"):
        given["expanded_src_to_dst_row"][:5] = -1
    rows = given["expanded_permuted_rows"].reshape(-1, 32).double()
    index = given["expanded_src_to_dst_row"].tolist()
    expected = given["skip1"].double() + given["skip2"].double()
    for token in range(6):
        for k in range(4):
            place = index[token * 4 + k if mode in ("plain", "3") else k * 6 + token]
            row = rows[place] if place >= 0 else torch.zeros(32, dtype=torch.float64)
            if bias:
                row = row + given["bias"][given["export_for_source_row"][token, k]].double()
            expected[token] += given["scales"][token, k].double() * row
    close(npu.npu_moe_finalize_routing(**given), expected)


def test_without_scales_k_is_an_argument() -> None:
    given = {**sample(FINAL), "scales": None, "bias": None, "skip1": None, "k": 4}
    rows = given["expanded_permuted_rows"][given["expanded_src_to_dst_row"].long()]
    close(npu.npu_moe_finalize_routing(**given), rows.view(6, 4, 32).double().sum(1))


@pytest.mark.parametrize("kept", [None, 0, 20, -4])
def test_permute_and_back(kept: int | None) -> None:
    tokens, indices = torch.randn(6, 32).to(BF16), torch.randint(0, 8, (6, 4))
    permuted, places = npu.npu_moe_token_permute(tokens, indices, kept)
    order = sorted(range(24), key=lambda p: int(indices.flatten()[p]))
    count = 24 if not kept else 20
    assert torch.equal(permuted, tokens[[p // 4 for p in order[:count]]])
    assert places.tolist() == [order.index(p) for p in range(24)]
    probs = torch.rand(6, 4).to(BF16)
    back = npu.npu_moe_token_unpermute(permuted, places, probs)
    share = torch.tensor([[probs[t, k].item() * (order.index(t * 4 + k) < count) for k in range(4)] for t in range(6)])
    close(back, tokens.double() * share.sum(1, keepdim=True))


def test_routing_finalizing_and_unpermuting_agree() -> None:
    given = {**sample(ROUTE), "active_expert_range": [0, 16]}
    rows, row_idx, _, _ = npu.npu_moe_init_routing_v2(**given)
    weights = torch.rand(6, 4).to(BF16)
    final = npu.npu_moe_finalize_routing(rows, None, None, None, weights, row_idx, None, 2)
    close(final, given["x"].double() * weights.double().sum(1, keepdim=True))
    close(npu.npu_moe_token_unpermute(rows, row_idx, weights), final)


Change = Callable[[Arguments], Any]

REFUSED: list[tuple[str, dict[str, Any] | Change, str]] = [
    (GATE, {"x": torch.zeros(5, 256, 1).to(BF16)}, "x has 2 dims"),
    (GATE, {"x": torch.zeros(5, 256).double()}, "x has dtype"),
    (GATE, {"x": torch.zeros(5, 2080).to(BF16), "bias": None}, "at most 2048"),
    (GATE, {"bias": torch.zeros(256)}, "one dtype"),
    (GATE, {"bias": torch.zeros(255).to(BF16)}, "bias has shape"),
    (GATE, {"group_count": 3}, "group_count divides"),
    (GATE, {"group_count": 128}, "more than 2 experts"),
    (GATE, {"k": 0}, "k is within"),
    (GATE, {"group_count": 64, "k_group": 1, "k": 5}, "k is within"),
    (GATE, {"x": torch.zeros(5, 396).to(BF16), "bias": None, "group_count": 66}, "hold at most 2048"),
    (GATE, {"k_group": 2}, "k_group is within"),
    (GATE, {"group_select_mode": 2}, "group_select_mode is one of"),
    (GATE, {"renorm": 1}, "renorm is one of"),
    (GATE, {"norm_type": 2}, "norm_type is one of"),
    (ROUTE, {"x": torch.zeros(6, 4, 8)}, "x has 2 dims"),
    (ROUTE, {"x": torch.zeros(6, 8).double()}, "x has dtype"),
    (ROUTE, lambda a: a.update(expert_idx=a["expert_idx"].long()), "expert_idx has dtype"),
    (ROUTE, lambda a: a.update(expert_idx=a["expert_idx"][:5]), "a row for each"),
    (ROUTE, lambda a: a["expert_idx"][0, 0].fill_(16), r"expert_idx are within \[0, 16\)"),
    (ROUTE, {"expert_num": -1}, "expert_num is within"),
    (ROUTE, {"expert_num": 6000, "expert_tokens_num_type": 2}, "expert_num is within"),
    (ROUTE, {"active_expert_range": [4, 17]}, "active_expert_range lies within"),
    (ROUTE, {"active_expert_range": [5, 5]}, "active_expert_range lies within"),
    (ROUTE, {"active_num": -2}, "at least -1"),
    (ROUTE, {"drop_pad_mode": 2}, "drop_pad_mode is one of"),
    (ROUTE, {"expert_tokens_num_type": 3}, "expert_tokens_num_type is one of"),
    (ROUTE, {"row_idx_type": 2}, "row_idx_type is one of"),
    (ROUTE, {"quant_mode": 4}, "quant_mode is one of"),
    (ROUTE, {"quant_mode": 0}, "scale is given"),
    (ROUTE, {"quant_mode": 1, "offset": torch.zeros(1)}, "offset is None"),
    (ROUTE, {"quant_mode": 1, "scale": torch.zeros(2, 32)}, "scale has one of the shapes"),
    (ROUTE, {"scale": torch.zeros(5)}, "scale has shape"),
    (ROUTE, {"scale": torch.zeros(6).half()}, "scale has dtype"),
    (ROUTE, {"drop_pad_mode": 1, "expert_capacity": 6}, "expert_capacity is within"),
    (ROUTE, {"drop_pad_mode": 1, "expert_capacity": 2, "active_expert_range": [0, 8]}, "the whole range"),
    (FINAL, {"drop_pad_mode": 4}, "drop_pad_mode is one of"),
    (FINAL, {"drop_pad_mode": 3}, "3 dims"),
    (FINAL, {"skip1": None, "skip2": torch.zeros(6, 32).to(BF16)}, "skip2 is None where skip1 is"),
    (FINAL, {"skip1": torch.zeros(5, 32).to(BF16)}, "skip1 has shape"),
    (FINAL, {"scales": torch.zeros(6, 4)}, "one dtype"),
    (FINAL, {"scales": torch.zeros(4, 6).to(BF16)}, "skip1 has shape"),
    (FINAL, {"bias": torch.zeros(16, 8).to(BF16)}, "bias is"),
    (FINAL, {"export_for_source_row": None}, "export_for_source_row is given"),
    (FINAL, lambda a: a["export_for_source_row"].fill_(16), "export_for_source_row is within"),
    (FINAL, lambda a: a.update(expanded_src_to_dst_row=a["expanded_src_to_dst_row"].long()), "has dtype torch.int32"),
    (FINAL, lambda a: a["expanded_src_to_dst_row"].fill_(-1), r"within \[0, 23\]"),
    (FINAL, lambda a: a["expanded_src_to_dst_row"].fill_(24), r"within \[0, 23\]"),
    (PERMUTE, {"tokens": torch.zeros(6, 4, 8)}, "tokens has 2 dims"),
    (PERMUTE, {"indices": torch.zeros(6, 4)}, "indices has dtype"),
    (PERMUTE, {"indices": torch.zeros(5, 4, dtype=torch.int64)}, "a row for each token"),
    (UNPERMUTE, lambda a: a.update(sorted_indices=a["sorted_indices"].long()), "sorted_indices has dtype"),
    (UNPERMUTE, lambda a: a["sorted_indices"].fill_(-1), "not negative"),
    (UNPERMUTE, {"probs": torch.zeros(6, 3).to(BF16)}, "a value for each index"),
    (UNPERMUTE, {"probs": torch.zeros(24).to(BF16)}, "probs has 2 dims"),
    (UNPERMUTE, {"probs": torch.zeros(6, 4).half()}, "probs have"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_what_is_refused(name: str, change: dict[str, Any] | Change, words: str) -> None:
    given = sample(name)
    refuse(name, given, change, words)


def refuse(name: str, given: Arguments, change: dict[str, Any] | Change, words: str) -> None:
    if callable(change):
        change(given)
    else:
        given.update(change)
    with pytest.raises(emulator.ConstraintError, match=words):
        getattr(npu, name)(**given)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (GATE, {"input_ids": torch.zeros(5, dtype=torch.int32)}),
        (ROUTE, {"quant_mode": 3}),
        (PERMUTE, {"padded_mode": True}),
        (UNPERMUTE, {"padded_mode": True}),
    ],
)
def test_what_is_left_out_says_so(name: str, change: Arguments) -> None:
    with pytest.raises(emulator.NotEmulatedError):
        getattr(npu, name)(**{**sample(name), **change})
