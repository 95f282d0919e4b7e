"""Emulated MLA prologs and cache writes, transposed products, dynamic quantisation: float64, and what is refused."""

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
KV, PROLOG, FUNCTIONAL = "npu_kv_rmsnorm_rope_cache", "npu_mla_prolog_v3", "npu_mla_prolog_v3_functional"
PRODUCT, QUANT = "npu_transpose_batchmatmul", "npu_dynamic_quant"


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


def close(actual: Tensor, expected: Tensor, rtol: float = 2**-7) -> None:
    assert actual.shape == expected.shape
    bound = rtol * float(expected.abs().max())
    assert torch.allclose(actual.double(), expected.double(), rtol=rtol, atol=bound)


def normed(x: Tensor, gamma: Tensor, epsilon: float = 1e-5) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gamma.double()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x0, x1) as complex numbers; real parts go to the first half, imaginary ones to the second."""
    pair = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    first, second = (torch.complex(cos.double(), sin.double()) * torch.cat((pair, pair), -1)).chunk(2, -1)
    return torch.cat((first.real, second.imag), -1)


def unpaged(cache: Tensor, nz: int) -> Tensor:
    """[slots, D] of a paged cache; in FRACTAL_NZ ``nz`` columns of every row lie together."""
    blocks, size, _, width = cache.shape
    if not nz:
        return cache.reshape(-1, width)
    return cache.view(blocks, width // nz, size, nz).transpose(1, 2).reshape(blocks * size, width)


SLOTS = {
    **{mode: [5, 17, 2, 31, 8, 9] for mode in ("plain", "PA", "PA_NZ")},
    **{mode: [24, 25, 26, 8, 9, 10] for mode in ("PA_BLK_BNSD", "PA_BLK_NZ")},
    "Norm": [0, 3, 7, 9, 10, 12],
}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("case", list(SLOTS))
def test_kv_rmsnorm_rope_cache_writes_norm_and_rotation_to_its_slots(case: str, quantised: bool) -> None:
    given = sample(KV, case)
    scales = {"k_rope_scale": torch.rand(64) * 30, "c_kv_scale": torch.rand(512) * 30} if quantised else {}
    if quantised:
        for name in ("k_cache", "ckv_cache"):
            given[name] = torch.randint(-128, 128, given[name].shape, dtype=torch.int8)
    before = {name: given[name].clone() for name in ("k_cache", "ckv_cache")}
    out = npu.npu_kv_rmsnorm_rope_cache(**given, **scales)
    kv = given["kv"].double()
    embedded = rotated(kv[..., 512:], given["cos"], given["sin"])
    y = normed(kv[..., :512], given["gamma"])
    assert out[0].data_ptr() == given["k_cache"].data_ptr()
    assert out[1].data_ptr() == given["ckv_cache"].data_ptr()
    nz = (32 if quantised else 16) if case.endswith("NZ") else 0
    for name, rows, scale in (("k_cache", embedded, "k_rope_scale"), ("ckv_cache", y, "c_kv_scale")):
        now, was = unpaged(given[name], nz), unpaged(before[name], nz)
        rest = torch.ones(len(now), dtype=torch.bool)
        rest[SLOTS[case]] = False
        assert torch.equal(now[rest], was[rest])
        written = now[SLOTS[case]].double()
        if quantised:
            exact = (rows.flatten(0, 2) * scales[scale].double()).clamp(-128, 127)
            assert ((written - exact).abs() <= 0.5 + 1e-2).all()
        else:
            close(written, rows.flatten(0, 2))
    if case == "Norm":
        assert out[2].isnan().all()
        assert out[3].isnan().all()
    else:
        close(out[2], embedded)
        close(out[3], y)


def test_outputs_that_are_not_asked_for_are_undefined_and_negative_slots_are_left_out() -> None:
    given = {**sample(KV), "is_output_kv": False}
    given["index"][:] = -1
    before = given["ckv_cache"].clone()
    _, ckv_cache, embedded, y = npu.npu_kv_rmsnorm_rope_cache(**given)
    assert torch.equal(ckv_cache, before)
    assert embedded.isnan().all()
    assert y.isnan().all()


def prolog(given: Arguments) -> dict[str, Tensor]:
    """The page's four paths in float64, over dequantised weights."""

    def weight(name: str, scale: str) -> Tensor:
        scaled = given.get(scale)
        return given[name].double() * (1.0 if scaled is None else scaled.double())

    x = given["token_x"].double() * (given["dequant_scale_x"].double() if "dequant_scale_x" in given else 1.0)
    cos, sin = given["rope_cos"], given["rope_sin"]
    c_q = normed(x @ weight("weight_dq", "dequant_scale_w_dq"), given["rmsnorm_gamma_cq"]) * given.get(
        "qc_qr_scale", 1.0
    )
    smooth = given.get("smooth_scales_cq")
    smoothed = c_q if smooth is None else c_q * smooth.double()
    q = (smoothed @ weight("weight_uq_qr", "dequant_scale_w_uq_qr")).unflatten(-1, (2, 256))
    kv = x @ weight("weight_dkv_kr", "dequant_scale_w_dkv_kr")
    return {
        "query": torch.einsum("tnd,ndc->tnc", q[..., :192], given["weight_uk"].double()),
        "query_rope": rotated(q[..., 192:], cos[:, None], sin[:, None]),
        "query_norm": smoothed,
        "ckv": normed(kv[:, :512], given["rmsnorm_gamma_ckv"]) * given.get("kc_scale", 1.0),
        "k_rope": rotated(kv[:, 512:], cos, sin),
    }


SLOT = [5, 40, 17]


@pytest.mark.parametrize("case", ["plain", "TND", "PA_NZ"])
@pytest.mark.parametrize("factors", [{}, {"qc_qr_scale": 0.5, "kc_scale": 3.0}])
def test_the_unquantised_prolog(case: str, factors: Arguments) -> None:
    given = {**sample(PROLOG, case), **factors}
    before = {name: given[name].clone() for name in ("kv_cache", "kr_cache")}
    query, query_rope, q_scale, query_norm, norm_scale = npu.npu_mla_prolog_v3(**given)
    expected = prolog(given)
    close(query, expected["query"], 2**-6)
    close(query_rope, expected["query_rope"], 2**-6)
    close(query_norm, expected["query_norm"], 2**-6)
    assert q_scale.numel() == norm_scale.numel() == 0
    for name, rows in (("kv_cache", expected["ckv"]), ("kr_cache", expected["k_rope"])):
        if case == "TND":
            close(given[name][:, 0], rows)
            continue
        now, was = (unpaged(one, 16 if case == "PA_NZ" else 0) for one in (given[name], before[name]))
        close(now[SLOT], rows)
        now[SLOT] = was[SLOT]
        assert torch.equal(now, was)


@pytest.mark.parametrize("case", ["1-0", "1-2", "1-3", "2-0", "2-1", "2-3"])
def test_quantised_prologs(case: str) -> None:
    given = sample(PROLOG, case)
    query, query_rope, q_scale, query_norm, norm_scale = npu.npu_mla_prolog_v3(**given)
    expected = prolog(given)
    kv = int(case[-1])
    close(query_norm.double() * norm_scale.double(), expected["query_norm"], 2**-6)
    rope = query_rope.double()
    if kv == 1:
        close(query.double() * q_scale.double(), expected["query"], 2**-5)
        rope = rope * q_scale.double() / given["quant_scale_ckv"].double()
    else:
        close(query, expected["query"], 2**-5)
    close(rope, expected["query_rope"], 2**-5)
    rows = given["kv_cache"].view(-1, given["kv_cache"].shape[-1])[SLOT]
    ropes = given["kr_cache"].view(-1, 64)[SLOT].double()
    if kv == 3:
        scales = rows[:, 640:].contiguous().view(torch.float32).double()
        ckv = (rows[:, :512].double().unflatten(-1, (4, 128)) * scales[..., None]).flatten(1)
        ropes = rows[:, 512:640].contiguous().view(BF16).double()
    else:
        ckv = rows.double() / (given["quant_scale_ckv"].double() if kv else 1.0)
    if kv == 2:
        ropes = ropes / given["quant_scale_ckr"].double()
        inside = expected["k_rope"].abs() * given["quant_scale_ckr"].double() < 127
        steps = (ropes - expected["k_rope"]).abs() * given["quant_scale_ckr"].double()
        assert (steps[inside] <= 0.5 + 1e-2).all()
    else:
        close(ropes, expected["k_rope"], 2**-6)
    if kv in (1, 2):
        inside = expected["ckv"].abs() * given["quant_scale_ckv"].double() < 127
        steps = (ckv - expected["ckv"]).abs() * given["quant_scale_ckv"].double()
        assert (steps[inside] <= 0.5 + 1e-2).all()
    else:
        close(ckv, expected["ckv"], 2**-6)


def test_the_functional_prolog_returns_what_the_other_one_writes() -> None:
    given = sample(PROLOG)
    *functional, kv_cache, kr_cache = npu.npu_mla_prolog_v3_functional(**given)
    in_place = npu.npu_mla_prolog_v3(**given)
    assert all(torch.equal(a, b) for a, b in zip(functional, in_place, strict=True))
    assert torch.equal(kv_cache, given["kv_cache"])
    assert torch.equal(kr_cache, given["kr_cache"])


def test_the_query_norm_is_given_on_request_alone() -> None:
    outputs = npu.npu_mla_prolog_v3(**{**sample(PROLOG), "query_norm_flag": False})
    assert outputs[3].shape == (0,)
    assert outputs[3].dtype is BF16


def test_glm5_s_widths_fit() -> None:
    from ci.ascend.emulator.attention_samples import nz

    hidden, rank, heads, nope, tokens = 6144, 2048, 64, 192, 1
    zeros = lambda *shape: torch.zeros(*shape, dtype=BF16)  # noqa: E731
    out = npu.npu_mla_prolog_v3(
        zeros(tokens, hidden), nz(zeros(hidden, rank)), nz(zeros(rank, heads * (nope + 64))), zeros(heads, nope, 512),
        nz(zeros(hidden, 576)), zeros(rank), zeros(512), zeros(tokens, 64), zeros(tokens, 64), zeros(4, 64, 1, 512),
        zeros(4, 64, 1, 64), cache_index=torch.zeros(tokens, dtype=torch.int64),
    )  # fmt: skip
    assert out[0].shape == (tokens, heads, 512)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_transpose_batchmatmul(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 4, 64).to(dtype), torch.randn(4, 64, 32).to(dtype)
    expected = torch.einsum("mbk,bkn->mbn", x.double(), weight.double())
    out = npu.npu_transpose_batchmatmul(x, weight, perm_x1=[1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2])
    close(out, expected, 2**-7 if dtype is not torch.float32 else 1e-5)
    turned = npu.npu_transpose_batchmatmul(x.transpose(0, 1), weight)
    assert torch.equal(turned, out), "None is [0, 1, 2] in and [1, 0, 2] out"
    split = npu.npu_transpose_batchmatmul(x, weight, perm_x1=[1, 0, 2], batch_split_factor=4)
    assert torch.equal(split, out.reshape(5, 4, 32).transpose(0, 1))


@pytest.mark.parametrize("smooth", ["none", "one", "groups"])
def test_dynamic_quant(smooth: str) -> None:
    x = torch.randn(6, 64).to(BF16)
    x[4] = 0
    smooth_scales = {"none": None, "one": torch.rand(64).to(BF16), "groups": torch.rand(3, 64).to(BF16)}[smooth]
    ends = torch.tensor([1, 4, 6], dtype=torch.int32) if smooth == "groups" else None
    y, scale = npu.npu_dynamic_quant(x, smooth_scales=smooth_scales, group_index=ends)
    factor = {
        "none": lambda: torch.ones(6, 64),
        "one": lambda: smooth_scales.expand(6, 64),
        "groups": lambda: smooth_scales[[0, 1, 1, 1, 2, 2]],
    }[smooth]()
    exact = x.double() * factor.double()
    assert torch.allclose(scale.double(), exact.abs().amax(-1) / 127, rtol=1e-6)
    assert ((y.double() * scale.double()[:, None] - exact).abs() <= scale.double()[:, None] * 0.501).all()
    assert y.dtype is torch.int8


Change = Callable[[Arguments], Any]


def plain_weight(name: str) -> Change:
    return lambda given: given.update({name: given[name].clone()})


SMOOTH = {"smooth_scales": torch.ones(2, 64).to(BF16)}
REFUSED: list[tuple[str, dict[str, Any] | Change, str]] = [
    (KV, {"cache_mode": "PA_BSND"}, "cache_mode is one of"),
    (KV, {"kv": torch.zeros(2, 1, 3, 512).to(BF16)}, "kv has shape"),
    (KV, {"kv": torch.zeros(2, 2, 3, 576).to(BF16)}, "kv has shape"),
    (KV, {"kv": torch.zeros(2, 1, 3, 576)}, "kv has dtype"),
    (KV, {"kv": torch.zeros(6, 576).to(BF16)}, "kv has 4 dims"),
    (KV, {"gamma": torch.zeros(64).to(BF16)}, "gamma has shape"),
    (KV, {"gamma": torch.zeros(512)}, "gamma has dtype"),
    (KV, {"cos": torch.zeros(2, 1, 1, 64).to(BF16)}, "cos has shape"),
    (KV, lambda a: a.update(index=a["index"].int()), "index has dtype"),
    (KV, lambda a: a.update(index=a["index"][:3]), "index has shape"),
    (KV, lambda a: a["index"][0].fill_(17), "no duplicates"),
    (KV, lambda a: a["index"][0].fill_(32), "index is below 32"),
    (KV, {"k_rope_offset": torch.zeros(64)}, "k_rope_offset is None"),
    (KV, {"k_rope_scale": torch.zeros(64)}, "given together"),
    (KV, {"k_rope_scale": torch.zeros(64), "c_kv_scale": torch.zeros(512)}, "k_cache has dtype torch.int8"),
    (KV, {"k_cache": torch.zeros(4, 8, 1, 64, dtype=torch.int8)}, "k_cache has dtype"),
    (KV, lambda a: a.update(k_cache=a["ckv_cache"], ckv_cache=a["k_cache"]), "last dim of k_cache is 64"),
    (KV, lambda a: a.update(k_cache=a["k_cache"][:2]), "same slots"),
    (KV, lambda a: a.update({n: a[n].view(1, 32, 1, -1) for n in ("k_cache", "ckv_cache")}), "block_num is at least"),
    (PROLOG, plain_weight("weight_dq"), "weight_dq is in format FRACTAL_NZ"),
    (PROLOG, plain_weight("weight_uq_qr"), "weight_uq_qr is in format FRACTAL_NZ"),
    (PROLOG, plain_weight("weight_dkv_kr"), "weight_dkv_kr is in format FRACTAL_NZ"),
    (PROLOG, lambda a: a.update(weight_uk=npu.npu_format_cast(a["weight_uk"], 29)), "weight_uk is in format ND"),
    (PROLOG, {"cache_mode": "BNSD"}, "cache_mode is one of"),
    (PROLOG, {"token_x": torch.zeros(3, 1000).to(BF16)}, "He is one of"),
    (PROLOG, {"token_x": torch.zeros(1, 1, 3, 1024).to(BF16)}, "token_x has 2 to 3 dims"),
    (PROLOG, {"weight_dq": torch.zeros(1024, 1024).to(BF16)}, "Hcq is one of"),
    (PROLOG, {"weight_uk": torch.zeros(3, 192, 512).to(BF16)}, "N is one of"),
    (PROLOG, {"weight_uk": torch.zeros(2, 256, 512).to(BF16)}, "D is one of"),
    (PROLOG, {"weight_uk": torch.zeros(2, 192, 256).to(BF16)}, "weight_uk has shape"),
    (PROLOG, {"rope_cos": torch.zeros(3, 32).to(BF16)}, "rope_cos has shape"),
    (PROLOG, {"rope_cos": torch.zeros(3, 64)}, "rope_cos has dtype"),
    (PROLOG, {"rmsnorm_gamma_cq": torch.zeros(2048)}, "rmsnorm_gamma_cq has dtype"),
    (PROLOG, {"rmsnorm_gamma_ckv": torch.zeros(576).to(BF16)}, "rmsnorm_gamma_ckv has shape"),
    (PROLOG, lambda a: a.update({n: a[n].view(8, 8, 1, -1) for n in ("kv_cache", "kr_cache")}), "BlockSize is"),
    (PROLOG, lambda a: a.update(kr_cache=a["kr_cache"][:2]), "same slots"),
    (PROLOG, lambda a: a.update(kv_cache=a["kv_cache"].half()), "kv_cache has dtype"),
    (PROLOG, {"cache_index": None}, "cache_index is given"),
    (PROLOG, {"cache_index": torch.tensor([5, 40, 17], dtype=torch.int32)}, "cache_index has dtype"),
    (PROLOG, {"cache_index": torch.tensor([5, 40, 40])}, "no duplicates"),
    (PROLOG, {"cache_index": torch.tensor([5, 40, 64])}, "within"),
    (PROLOG, {"cache_index": torch.tensor([5, 40, -1])}, "within"),
    (PROLOG, {"cache_index": torch.tensor([5, 40])}, "cache_index has shape"),
    (PROLOG, {"cache_index": torch.tensor([5, 0, 40, 0, 17])[::2]}, "cache_index is contiguous"),
    (PROLOG, lambda a: a.update(rope_sin=a["rope_sin"].T.contiguous().T), "rope_sin is contiguous"),
    (PROLOG, {"weight_quant_mode": 6}, "weight_quant_mode is one of"),
    (PROLOG, {"kv_cache_quant_mode": 1}, "is one of"),
    (PROLOG, {"query_quant_mode": 1}, "query_quant_mode is 0"),
    (PROLOG, {"ckvkr_repo_mode": 1}, "ckvkr_repo_mode is 0"),
    (PROLOG, {"quant_scale_repo_mode": 1}, "quant_scale_repo_mode is 0"),
    (PROLOG, {"smooth_scales_cq": torch.ones(1, 2048)}, "smooth_scales_cq is None"),
    (PROLOG, {"dequant_scale_x": torch.ones(3, 1)}, "dequant_scale_x is None"),
    (PROLOG, {"weight_quant_mode": 1}, "weight_uq_qr has dtype"),
    (PRODUCT, {"perm_x1": [1, 1, 2]}, "perm_x1 is one of"),
    (PRODUCT, {"perm_x2": [0, 2, 1]}, "perm_x2 is one of"),
    (PRODUCT, {"perm_y": [0, 1, 2]}, "perm_y is one of"),
    (PRODUCT, {"bias": torch.zeros(32)}, "bias is None"),
    (PRODUCT, {"input": torch.zeros(5, 64).to(BF16)}, "input has 3 dims"),
    (PRODUCT, {"weight": torch.zeros(4, 64, 32)}, "one dtype"),
    (PRODUCT, {"input": torch.zeros(5, 4, 64).double()}, "input has dtype"),
    (PRODUCT, {"weight": torch.zeros(5, 64, 32).to(BF16)}, "weight is"),
    (PRODUCT, {"weight": torch.zeros(4, 64, 24).to(BF16)}, "multiples of 16"),
    (PRODUCT, {"input": torch.zeros(1, 1024, 64).to(BF16), "weight": torch.zeros(1024, 64, 16).to(BF16)}, "K·B"),
    (PRODUCT, {"batch_split_factor": 3}, "batch_split_factor divides"),
    (QUANT, {"input": torch.zeros(4, 64)}, "input has dtype"),
    (QUANT, {"input": torch.zeros(64).to(BF16)}, "more than 1 dim"),
    (QUANT, {"smooth_scales": torch.zeros(32).to(BF16)}, "smooth_scales has shape"),
    (QUANT, {"smooth_scales": torch.zeros(64)}, "smooth_scales has dtype"),
    (QUANT, {"group_index": torch.tensor([12], dtype=torch.int32)}, "smooth_scales is given"),
    (QUANT, {**SMOOTH, "group_index": torch.tensor([4, 11], dtype=torch.int32)}, "ends at"),
    (QUANT, {**SMOOTH, "group_index": torch.tensor([4, 12])}, "group_index has dtype"),
    (QUANT, {**SMOOTH, "group_index": torch.tensor([12, 4], dtype=torch.int32)}, "does not fall"),
    (QUANT, {"dst_type": 3}, "dst_type is int8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_what_is_refused(name: str, change: dict[str, Any] | Change, words: str) -> None:
    given = sample(name)
    if callable(change):
        change(given)
    else:
        given.update(change)
    with pytest.raises(emulator.ConstraintError, match=words):
        getattr(npu, name)(**given)


def test_in_place_and_functional_prologs_refuse_under_their_own_names() -> None:
    for name in (PROLOG, FUNCTIONAL):
        with pytest.raises(emulator.ConstraintError, match=f"^{name}: "):
            getattr(npu, name)(**{**sample(PROLOG), "cache_index": None})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (KV, {"v": torch.zeros(1)}),
        (PROLOG, {"cache_mode": "PA_BLK_BSND"}),
        (PROLOG, {"weight_quant_mode": 3}),
        (PRODUCT, {"scale": torch.zeros(128, dtype=torch.int64)}),
        (QUANT, {"quant_mode": "pertensor"}),
    ],
)
def test_what_is_left_out_says_so(name: str, change: Arguments) -> None:
    with pytest.raises(emulator.NotEmulatedError):
        getattr(npu, name)(**{**sample(name), **change})
