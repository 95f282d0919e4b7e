"""Both emulated versions of npu_fused_infer_attention_score: loops in float64, and what the pages refuse."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
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
FIRST, SECOND = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
BF16 = torch.bfloat16
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, hide: Callable[[int, int], bool]) -> tuple[Tensor, Tensor]:
    """[N, S, D] by loops in float64: outputs and natural lse; key heads are shared by groups of query heads."""
    heads, rows, _ = q.shape
    out, lse = torch.zeros(heads, rows, v.shape[-1], dtype=torch.float64), torch.full((heads, rows, 1), -math.inf)
    for n in range(heads):
        m = n * len(k) // heads
        for i in range(rows):
            seen = [j for j in range(k.shape[1]) if not hide(i, j)]
            if seen:
                scores = k[m, seen].double() @ q[n, i].double() * scale
                lse[n, i, 0] = scores.exp().sum().log()
                out[n, i] = torch.softmax(scores, 0) @ v[m, seen].double()
    return out, lse


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert torch.allclose(actual.double(), expected, atol=2e-2, rtol=2**-6)


def call(version: str, given: Arguments) -> tuple[Tensor, Tensor]:
    return getattr(npu, version)(**given)


def word(version: str, first: str, second: str) -> str:
    return first if version == FIRST else second


def pages_of(given: Arguments, name: str, request: int, length: int) -> Tensor:
    """[N, S, D] of one request out of pages [blocks, N, block_size, D]."""
    size = given["block_size"]
    table = given["block_table"][request].tolist()
    return torch.stack([given[name][table[p // size], :, p % size] for p in range(length)], 1)


@pytest.mark.parametrize("version", [FIRST, SECOND])
@pytest.mark.parametrize("mode", [0, 3])
def test_absorbed_mla_over_pages(version: str, mode: int) -> None:
    given = {**sample(version), "sparse_mode": mode, "atten_mask": CAUSAL if mode else None}
    out, lse = call(version, given)
    ends = given[word(version, "actual_seq_lengths", "actual_seq_qlen")]
    lengths = given[word(version, "actual_seq_lengths_kv", "actual_seq_kvlen")]
    q = torch.cat((given["query"], given["query_rope"]), -1).transpose(0, 1)
    for request, (start, end) in enumerate(pairwise([0, *ends])):
        length, rows = lengths[request], end - start
        v = pages_of(given, "key", request, length)
        k = torch.cat((v, pages_of(given, "key_rope", request, length)), -1)

        def hide(i: int, j: int, behind: int = length - rows) -> bool:
            return mode == 3 and j > i + behind

        expected, _ = attend(q[:, start:end], k, v, 1 / 16, hide)
        close(out[start:end].transpose(0, 1), expected)
    assert lse.shape == (0,)


def test_lse_of_absorbed_mla_is_natural_and_has_a_row_for_each_token() -> None:
    given = {**sample(SECOND), "return_softmax_lse": True}
    out, lse = call(SECOND, given)
    assert lse.shape == (*out.shape[:2], 1)
    assert lse.dtype is torch.float32
    v = pages_of(given, "key", 1, 37)
    k = torch.cat((v, pages_of(given, "key_rope", 1, 37)), -1)
    q = torch.cat((given["query"], given["query_rope"]), -1)[2:].transpose(0, 1)
    _, expected = attend(q, k, v, 1 / 16, lambda i, j: False)
    assert torch.allclose(lse[2], expected[:, 0], atol=1e-4)


@pytest.mark.parametrize("pages", ["BnBsH", "NZ"])
def test_pages_may_hold_heads_side_by_side_or_in_fractal_nz(pages: str) -> None:
    given = sample(SECOND)
    expected, _ = call(SECOND, given)
    for name in ("key", "value", "key_rope"):
        blocks, heads, size, width = given[name].shape
        if pages == "BnBsH":
            given[name] = given[name].transpose(1, 2).reshape(blocks, size, heads * width)
        else:
            given[name] = given[name].view(blocks, heads, size, width // 16, 16).transpose(2, 3).contiguous()
    assert torch.equal(call(SECOND, given)[0], expected)


def test_an_output_of_ntd_has_heads_first() -> None:
    given = sample(SECOND)
    expected, _ = call(SECOND, given)
    assert torch.equal(call(SECOND, {**given, "input_layout": "TND_NTD"})[0], expected.transpose(0, 1))


@pytest.mark.parametrize("version", [FIRST, SECOND])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "BNSD_BSND", "BNSD_NBSD", "BSH_NBSD"])
def test_shared_key_heads_in_every_layout(version: str, layout: str) -> None:
    given = sample(version, layout)
    out, lse = call(version, given)
    entry, _, exit_ = layout.partition("_")

    def by_head(tensor: Tensor, heads: int) -> Tensor:
        tensor = tensor.unflatten(-1, (heads, -1)) if entry == "BSH" else tensor
        return tensor if entry == "BNSD" else tensor.transpose(1, 2)

    q, k, v = (by_head(given[name], heads) for name, heads in (("query", 4), ("key", 2), ("value", 2)))
    parts = [attend(*one, 0.125, lambda i, j: False) for one in zip(q, k, v, strict=True)]
    expected, logs = (torch.stack(part) for part in zip(*parts, strict=True))
    shaped = {
        "BNSD": expected,
        "BSND": expected.transpose(1, 2),
        "BSH": expected.transpose(1, 2).flatten(2),
        "NBSD": expected.transpose(0, 1),
    }[exit_ or entry]
    close(out, shaped)
    assert torch.allclose(lse, logs, atol=1e-4)


@pytest.mark.parametrize(("mode", "hide"), [(2, lambda i, j: j > i), (3, lambda i, j: j > i + 3)])
def test_causal_modes_align_left_and_right(mode: int, hide: Callable[[int, int], bool]) -> None:
    given = {**sample(SECOND, "BNSD"), "sparse_mode": mode, "atten_mask": CAUSAL[None]}
    out, _ = call(SECOND, given)
    for b in range(2):
        expected, _ = attend(given["query"][b], given["key"][b], given["value"][b], 0.125, hide)
        close(out[b], expected)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("batched", [True, False])
def test_a_full_mask_hides_what_is_set(mode: int, batched: bool) -> None:
    mask = torch.rand(2, 1, 6, 9) > 0.6 if batched else torch.rand(6, 9) > 0.6
    given = {**sample(SECOND, "BNSD"), "sparse_mode": mode, "atten_mask": mask.to(torch.uint8)}
    out, lse = call(SECOND, given)
    for b in range(2):
        own = mask[b, 0] if batched else mask
        expected, logs = attend(given["query"][b], given["key"][b], given["value"][b], 0.125, lambda i, j: own[i, j])  # noqa: B023
        close(out[b], expected)
        assert torch.allclose(lse[b], logs, atol=1e-4)


def test_a_row_without_visible_keys_is_zeros() -> None:
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[2] = True
    out, lse = call(SECOND, {**sample(SECOND, "BNSD"), "atten_mask": mask})
    assert (out[:, :, 2] == 0).all()
    assert lse[:, :, 2].isneginf().all()


def test_lengths_cut_queries_and_keys_and_one_length_is_for_all() -> None:
    given = sample(SECOND, "BNSD")
    out, _ = call(SECOND, {**given, "actual_seq_qlen": [4], "actual_seq_kvlen": [5, 9]})
    for b, keys in enumerate((5, 9)):
        k, v = given["key"][b, :, :keys], given["value"][b, :, :keys]
        expected, _ = attend(given["query"][b, :, :4], k, v, 0.125, lambda i, j: False)
        close(out[b, :, :4], expected)
        assert (out[b, :, 4:] == 0).all()


def test_probabilities_are_rounded_to_query_s_dtype() -> None:
    """Eleven equal keys: 11 times the float16 next to 1/11 is less than the float16 below 1 and half a step more."""
    q, k = torch.zeros(1, 1, 2, 64).half(), torch.ones(1, 1, 11, 64).half()
    out, _ = npu.npu_fused_infer_attention_score_v2(q, k, k, num_query_heads=1, input_layout="BNSD")
    assert (out == 1 - 2**-11).all()


def test_no_keys_give_zeros() -> None:
    given = sample(SECOND, "BNSD")
    empty = {name: given[name][:, :, :0] for name in ("key", "value")}
    out, _ = call(SECOND, {**given, **empty})
    assert (out == 0).all()


def unabsorbed(layout: str = "TND") -> Arguments:
    """The vendor's third example of the second version, smaller: rope beside D 128, a key head for each query head."""
    torch.manual_seed(0)
    sizes = {"query": (6, 128), "key": (11, 128), "value": (11, 128), "query_rope": (6, 64), "key_rope": (11, 64)}
    made = {name: torch.randn(tokens, 3, width).half() for name, (tokens, width) in sizes.items()}
    if layout.startswith("NTD"):
        made = {name: tensor.transpose(0, 1).contiguous() for name, tensor in made.items()}
    lengths = {"actual_seq_qlen": [2, 6], "actual_seq_kvlen": [4, 11], "input_layout": layout}
    return {**made, **lengths, "num_query_heads": 3, "num_key_value_heads": 3, "softmax_scale": 0.1, "inner_precise": 1}


@pytest.mark.parametrize("layout", ["TND", "NTD_TND"])
def test_rope_beside_128_dims_unpaged(layout: str) -> None:
    out, _ = call(SECOND, unabsorbed(layout))
    given = unabsorbed()
    q, k = (torch.cat((given[n], given[f"{n}_rope"]), -1).transpose(0, 1) for n in ("query", "key"))
    v = given["value"].transpose(0, 1)
    for (a, b), (c, d) in zip(pairwise([0, 2, 6]), pairwise([0, 4, 11]), strict=True):
        expected, _ = attend(q[:, a:b], k[:, c:d], v[:, c:d], 0.1, lambda i, j: False)
        close(out[a:b].transpose(0, 1), expected)


def test_a_sink_takes_its_share() -> None:
    given = unabsorbed()
    given = {n: v for n, v in given.items() if not n.endswith("_rope")}
    plain, lse = call(SECOND, {**given, "return_softmax_lse": True})
    sink = torch.tensor([0.5, -1.0, 3.0]).to(BF16)
    out, _ = call(SECOND, {**given, "learnable_sink": sink})
    share = torch.sigmoid(lse[..., 0] - sink.float())
    close(out, plain.double() * share[..., None].double())


Change = Callable[[Arguments], Any]


def strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


MLA: list[tuple[dict[str, Any] | Change, str]] = [
    ({"input_layout": "SBH"}, "input_layout is one of"),
    ({"input_layout": "NTD_TND"}, "query has 4 heads|input_layout is one of"),
    ({"key_rope": None}, "given together"),
    ({"query_rope": None}, "given together"),
    (lambda a: a.update(query_rope=a["query_rope"].half()), "one dtype"),
    (lambda a: a.update(query_rope=a["query_rope"][..., :32].contiguous()), "query_rope has shape"),
    (lambda a: a.update(key_rope=a["key_rope"][..., :32].contiguous()), "key_rope has shape"),
    (lambda a: a.update(query=a["query"][..., :256].contiguous()), "D of query beside query_rope"),
    (lambda a: a.update({n: a[n][:, :3].contiguous() for n in ("query", "query_rope")}), "query has 4 heads"),
    ({"num_query_heads": 0}, "above 0"),
    ({"num_key_value_heads": 3}, "key heads divide"),
    ({"num_key_value_heads": 2}, "N of key is 1"),
    ({"sparse_mode": 1, "atten_mask": None}, "sparse_mode with D 512"),
    ({"sparse_mode": 2}, "sparse_mode with D 512"),
    ({"sparse_mode": 5}, "sparse_mode with D 512"),
    ({"atten_mask": None}, "atten_mask is given"),
    ({"atten_mask": CAUSAL[:1024]}, "atten_mask has one of the shapes"),
    ({"atten_mask": ~CAUSAL}, "lower triangle visible"),
    ({"atten_mask": CAUSAL.float()}, "atten_mask has dtype"),
    ({"sparse_mode": 0}, "atten_mask is None"),
    ({"actual_seq_qlen": None}, "query_lengths is given"),
    ({"actual_seq_kvlen": None}, "key_lengths is given"),
    ({"actual_seq_qlen": [2, 2]}, "end at T = 3"),
    ({"actual_seq_qlen": [3, 2]}, "prefix sums"),
    ({"actual_seq_qlen": [1, 2, 3]}, "element for each request"),
    ({"actual_seq_kvlen": [20, 50]}, "block_table has at least 4 columns"),
    (lambda a: a.update(block_table=a["block_table"].long()), "block_table has dtype"),
    (lambda a: a.update(block_table=a["block_table"][:1]), "a row for each of 2 requests"),
    (lambda a: a["block_table"].fill_(8), "block ids in use"),
    ({"block_size": 8}, "multiple of 16"),
    ({"block_size": 2048}, "multiple of 16"),
    ({"block_size": 32}, "key has shape"),
    (lambda a: a.update({n: a[n].transpose(1, 2).contiguous() for n in ("key", "value", "key_rope")}), "key has shape"),
    (lambda a: a.update({n: a[n][:4].contiguous() for n in ("key", "value", "key_rope")}), "at least 5 blocks"),
    (lambda a: a.update(value=a["value"][..., :256].contiguous()), "value has key's shape"),
    (lambda a: a.update(query=strided(a["query"])), "query is contiguous"),
    ({"inner_precise": 4}, "inner_precise is one of"),
    ({"quant_scale_p": torch.ones(1)}, "quant_scale_p is None"),
    ({"query_dtype": 15}, "query_dtype is None"),
    ({"learnable_sink": torch.zeros(4)}, "learnable_sink has dtype"),
]  # fmt: skip
DENSE: list[tuple[dict[str, Any] | Change, str]] = [
    ({"num_query_heads": 2}, "query has 2 heads"),
    ({"num_key_value_heads": 4}, "key has 4 heads"),
    (lambda a: a.update(value=a["value"][..., :32].contiguous()), "value has key's shape"),
    (lambda a: a.update({n: a[n][..., :24].contiguous() for n in ("query", "key", "value")}), "multiple of 16"),
    (lambda a: a.update(query=torch.zeros(2, 4, 6, 528).to(BF16)), "at most 512"),
    (lambda a: a.update(key=a["key"].half()), "one dtype"),
    ({"sparse_mode": 1}, "atten_mask is given with sparse_mode 1"),
    ({"sparse_mode": 9}, "sparse_mode 9 is for calls with query_rope"),
    ({"sparse_mode": 7}, "sparse_mode is one of"),
    ({"atten_mask": torch.zeros(5, 9, dtype=torch.bool)}, "atten_mask covers"),
    ({"atten_mask": torch.zeros(3, 6, 9, dtype=torch.bool)}, "1 row of batches or B"),
    ({"actual_seq_kvlen": [10, 3]}, "key lengths are at most 9"),
    ({"actual_seq_qlen": [7, 3]}, "query lengths are at most 6"),
    ({"actual_seq_kvlen": []}, "1 element or at least 2"),
    ({"actual_seq_kvlen": [-1, 3]}, "not negative"),
    ({"input_layout": "BNSD_NBSD", "query": torch.zeros(2, 4, 1, 64).to(BF16)}, r"within \(1, 16\]"),
    ({"input_layout": "BNSD_BSND", "query": torch.zeros(2, 4, 1, 64).to(BF16)}, "above 1 for BNSD_BSND"),
    ({"query": torch.zeros(2, 4, 1, 64).to(BF16), "inner_precise": 2}, "inner_precise is one of"),
    ({"block_table": torch.zeros(2, 1, dtype=torch.int32), "block_size": 16}, "key_lengths is given"),
    ({"block_table": torch.zeros(2, 1, dtype=torch.int32), "block_size": 16, "actual_seq_kvlen": [9]},
     "block_size is 128, 256"),
    ({"learnable_sink": torch.zeros(4).to(BF16)}, "input_layout beside learnable_sink"),
]  # fmt: skip
CASES = [("plain", *row) for row in MLA] + [("BNSD", *row) for row in DENSE]


@pytest.mark.parametrize(("case", "change", "words"), CASES)
def test_what_is_refused(case: str, change: dict[str, Any] | Change, words: str) -> None:
    given = sample(SECOND, case)
    if callable(change):
        change(given)
    else:
        given.update(change)
    with pytest.raises(emulator.ConstraintError, match=words):
        call(SECOND, given)


def test_the_first_version_gives_no_lse_of_absorbed_mla() -> None:
    with pytest.raises(emulator.ConstraintError, match="softmax_lse_flag is False with D 512"):
        call(FIRST, {**sample(FIRST), "softmax_lse_flag": True})


@pytest.mark.parametrize(
    ("widths", "heads", "words"),
    [((256, 256, 256), 2, "D of query, key and value"), ((192, 192, 192), 4, "D of query, key and value")],
)
def test_dense_token_layouts_know_few_widths(widths: tuple[int, int, int], heads: int, words: str) -> None:
    """GLM-5's unabsorbed 256 is not one of them."""
    q, k, v = (torch.randn(4, n, d).half() for n, d in zip((heads, 2, 2), widths, strict=True))
    given = {"actual_seq_qlen": [4], "actual_seq_kvlen": [4], "num_query_heads": heads, "num_key_value_heads": 2,
             "input_layout": "TND"}  # fmt: skip
    with pytest.raises(emulator.ConstraintError, match=words):
        npu.npu_fused_infer_attention_score_v2(q, k, v, **given)


@pytest.mark.parametrize(
    "change", [{"sparse_mode": 4}, {"pse_shift": torch.zeros(1)}, {"quant_scale_out": torch.ones(1)}]
)
def test_what_is_left_out_says_so(change: Arguments) -> None:
    with pytest.raises(emulator.NotEmulatedError):
        call(SECOND, {**sample(SECOND, "BNSD"), **change})
