"""Hopper's own kernel: for which calls it is, and how it is handed a cache. That it computes the right thing only a GPU
can show; that it compiles and does not spill, the job of ``ci/triton_compile.py``."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from judging import accepts

from glm5_hal.backends import cuda
from glm5_hal.conformance.workloads import Load, workloads
from glm5_hal.formats import FORMATS
from glm5_hal.ops._common import caches as bytes_of
from glm5_hal.signature import Facts

pytest.importorskip("triton.experimental.gluon")

from glm5_hal.backends._triton import absorbed
from glm5_hal.backends._triton.rows import Fields, fields
from glm5_hal.backends.cuda import gluon, hopper

OPS = ("mla_decode", "sparse_mla")
HOPPER = Facts(arch="sm_90", versions={"triton": "3.6.0"})


def call(op: str, form: str = "latent_576", tokens: int = 2, **changed: Any) -> dict[str, Any]:
    """A decode step of requests of one token each, at GLM-5's widths."""
    made = next(c for c in workloads((Load(tokens, 192),)) if (c.op, c.cache_format) == (op, form)).make("cpu")
    return {**made, **changed}


@pytest.mark.parametrize("op", OPS)
def test_it_is_asked_before_the_kernel_for_every_chip(op: str) -> None:
    names = [kernel.provider for kernel in cuda.kernels() if kernel.op == op]
    assert names[:2] == ["gluon", "triton"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["latent_576", "fp8_656"])
def test_it_takes_glm5s_calls_on_hopper_and_on_nothing_else(op: str, form: str) -> None:
    (kernel,) = (k for k in cuda.kernels() if (k.op, k.provider) == (op, "gluon"))
    assert accepts(kernel, call(op, form), HOPPER)
    for facts in (Facts(arch="sm_80"), Facts(arch="sm_100"), Facts(arch="sm_90", versions={"triton": "3.5.0"})):
        assert not accepts(kernel, call(op, form), facts)


def test_of_many_tokens_chosen_rows_are_for_the_kernel_for_every_chip() -> None:
    (kernel,) = (k for k in cuda.kernels() if (k.op, k.provider) == ("sparse_mla", "gluon"))
    assert accepts(kernel, call("sparse_mla", tokens=64), HOPPER)
    assert not accepts(kernel, call("sparse_mla", tokens=65), HOPPER)


@pytest.mark.parametrize("version", ["3.5.1", "3.8.0"])
def test_a_triton_whose_gluon_is_not_known_is_left_to_the_others(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Nothing of Gluon is imported then: another Triton may lack a name that it has."""
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.delitem(sys.modules, gluon.__name__)
    providers = {kernel.provider for kernel in cuda.kernels()}
    assert "triton" in providers
    assert "gluon" not in providers
    assert gluon.__name__ not in sys.modules


def test_numbers_that_its_products_do_not_have_are_refused() -> None:
    (kernel,) = (k for k in cuda.kernels() if (k.op, k.provider) == ("mla_decode", "gluon"))
    given, codes = call("mla_decode"), call("mla_decode", "fp8_656")
    assert accepts(kernel, {**given, "q": given["q"].half(), "kv_cache": given["kv_cache"].half()}, HOPPER)
    assert not accepts(kernel, {**given, "q": given["q"].float(), "kv_cache": given["kv_cache"].float()}, HOPPER)
    assert not accepts(kernel, {**codes, "q": codes["q"].half()}, HOPPER)
    assert not accepts(kernel, {**given, "kv_lora_rank": 448}, HOPPER)


# --- a cache's rows --------------------------------------------------------------------------------------------------


def rows(form: str, cache: torch.Tensor, *more: torch.Tensor) -> Fields:
    return fields(FORMATS[form], bytes_of.held(cache, more[0] if more else None), 512)


@pytest.mark.parametrize("form", ["latent_576", "latent_512_rope_64"])
def test_rows_are_copied_by_sixteen_bytes(form: str) -> None:
    held = rows(form, *FORMATS[form].allocate(3, 64, 512, 64, dtype=torch.bfloat16, device="cpu"))
    kernel, given, fixed = gluon.forward(held)
    assert kernel is hopper.attend
    assert given is held
    assert fixed == {"BLOCK_H": 64, "BLOCK_N": 64, "num_warps": 8}


@pytest.mark.parametrize("form", ["fp8_656", "fp8_656_ascend"])
def test_quantised_rows_are_read_by_words(form: str) -> None:
    (cache,) = FORMATS[form].allocate(3, 64, 512, 64, dtype=torch.bfloat16, device="cpu")
    cache.random_(0, 256)
    held = rows(form, cache)
    kernel, given, _ = gluon.forward(held)
    assert kernel is hopper.attend
    assert (given.latent.shape, given.group) == ((3, 64, 128), 128)
    for name in ("latent", "rope", "scale"):
        words, before = getattr(given, name), getattr(held, name)
        assert (words.dtype, words.data_ptr()) == (torch.int32, before.data_ptr())
        assert torch.equal(words.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))


def test_a_cache_that_does_not_lie_so_goes_to_the_kernel_for_every_chip() -> None:
    """No format promises it; what lies at odd places is rare, and slow, and right."""
    odd = torch.zeros(2 * 64 * 577, dtype=torch.bfloat16).view(2, 64, 577)[..., 1:]
    assert gluon.forward(rows("latent_576", odd))[0] is absorbed._attend
    data = torch.zeros(2 * 64 * 656 + 8, dtype=torch.uint8)[8:].view(2, 64, 656)
    assert gluon.forward(rows("fp8_656", data))[0] is absorbed._attend
