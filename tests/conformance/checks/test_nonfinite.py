"""A NaN reaches its own token's result, and no other's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trying import caught_by, said

from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args

NORM, GEMM, PREFILL, LOGITS = honest.rms_norm(), honest.gemm(), honest.prefill(), honest.logits()


def swallowed(a: Args) -> Any:
    """As fmax does, which prefers a number: what is no number counts as zero."""
    return NORM(Args(x=a.x.nan_to_num(), weight=a.weight, eps=a.eps))


def leaks(a: Args) -> Any:
    """Rows of a tile are added times zero, to keep a vector unit busy."""
    y = NORM(a)
    return y + 0.0 * y.sum(0, keepdim=True) if len(y) > 1 else y


def whole_block(a: Args) -> Any:
    """One absolute maximum for all rows: a NaN of one scales all."""
    y = NORM(a)
    top = a.x.abs().amax() if a.x.numel() else a.x.new_ones(())
    return (y / top) * top if bool(top > 0) is False and a.x.numel() else y * (top / top) if a.x.numel() else y


def masked_by_zero(a: Args) -> Any:
    """Unseen keys get a probability of zero, and zero times a value that is not finite is not zero."""
    out, lse = PREFILL(a)
    return out + 0.0 * a.v.float().sum(0).to(out.dtype) if len(a.v) and len(out) else out, lse


@pytest.mark.parametrize(
    ("op", "body", "what"),
    [
        ("rms_norm", swallowed, "with nan in x[2, 48]: y[2, 0] is the number "),
        ("rms_norm", leaks, "with nan in x[2, 48]: y: nonfinite: "),
        ("rms_norm", whole_block, "with nan in x[2, 48]: y: nonfinite: "),
        ("mla_prefill", masked_by_zero, "with nan in q["),
    ],
)
def test_it_is_caught_by_this_check_alone(op: str, body: Any, what: str) -> None:
    how: dict[str, Any] = {"samples": ("tokens", "causal")}
    assert caught_by(op, body, **how) == {"nonfinite"}
    assert said(op, body, "nonfinite", **how).startswith(f"failed: {what}")


def test_a_token_may_spread_it_over_all_of_its_own_result() -> None:
    def spreads(a: Args) -> Any:
        y = honest.rope()(a)
        bad = ~y.flatten(1).isfinite().all(1)
        return torch.where(bad.view(-1, *[1] * (y.dim() - 1)), torch.nan, y)

    assert caught_by("rope", spreads, samples=("heads-*",)) == set()


@pytest.mark.parametrize(
    ("op", "name", "what"),
    [
        ("mla_cache_write", "kv_c", "kv_cache[3, 4, 128] is the number 0.0: it was lost on its way"),
        ("moe_permute", "x", "permuted[9, 20] is the number 0.0: it was lost on its way"),
    ],
)
def test_a_nan_is_not_lost_on_its_way_into_a_cache_or_to_an_expert(op: str, name: str, what: str) -> None:
    right = honest.write() if op == "mla_cache_write" else honest.permute()

    def swallows(a: Args) -> Any:
        return right(Args(**{**vars(a), name: getattr(a, name).nan_to_num(0.0)}))

    how: dict[str, Any] = {"samples": ("rows-latent_576", "tokens")}
    assert caught_by(op, swallows, **how) == {"nonfinite"}
    assert said(op, swallows, "nonfinite", **how).endswith(what)


def test_a_router_that_meets_a_nan_still_names_experts() -> None:
    right = honest.route()

    def lost(a: Args) -> Any:
        weights, ids = right(a)
        return weights, ids.masked_fill(~a.router_logits.isfinite().all(-1, keepdim=True), 1 << 20)

    how: dict[str, Any] = {"dtypes": ("float32",)}
    assert caught_by("moe_route", lost, **how) == {"nonfinite"}
    assert " is no choice: 1048576 is none of " in said("moe_route", lost, "nonfinite", **how)
