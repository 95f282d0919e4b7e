"""Relations between ops: two ways to one result, on the backend's own kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import cases, find
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args, kernel
from glm5_hal.conformance.mutants.stand_in import NAME, Made, installed
from glm5_hal.conformance.relations import GROUP, RELATIONS
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.target import targets
from glm5_hal.errors import HalError
from glm5_hal.ops import specs

HONEST: dict[str, honest.Body] = {
    "mla_decode": honest.decode(),
    "sparse_mla": honest.sparse(),
    "mla_prefill": honest.prefill(),
    "indexer_logits": honest.logits(),
    "moe_experts": honest.experts(),
    "moe_permute": honest.permute(),
    "moe_combine": honest.combine(),
}


def judged(names: tuple[str, ...], **instead: honest.Body | None) -> list[Result]:
    bodies = {**HONEST, **instead}
    made = [Made(op, kernel(op, body)) for op, body in bodies.items() if body is not None]
    chosen = [c for c in cases("smoke", (GROUP,)) if c.sample.id in names]
    with installed(*made):
        return list(runner.run(chosen, targets(NAME), 0))


ALL = tuple(r.name for r in RELATIONS)


def test_they_hold_between_honest_kernels() -> None:
    results = judged(ALL)
    assert {r.verdict for r in results} == {"PASS"}
    assert {r.dtype for r in results} == {"bfloat16", "float16", "float32"}


def test_they_hold_between_kernels_that_are_honest_in_different_ways() -> None:
    ways = list(honest.WAYS.values())
    results = judged(
        ALL,
        mla_decode=honest.decode(ways[1]),
        sparse_mla=honest.sparse(ways[2]),
        mla_prefill=honest.prefill(ways[-1]),
        moe_experts=honest.experts(keep=False, product=honest.blocked),
    )
    assert {r.verdict for r in results} == {"PASS"}


def test_a_relation_is_a_case_like_any_other() -> None:
    (case,) = find(["metamorphic[bfloat16-sparse_is_dense]"])
    with installed(*(Made(op, kernel(op, body)) for op, body in HONEST.items())):
        one, again = (next(runner.run([case], targets(NAME), seed)) for seed in (3, 3))
    assert one.repro.endswith("--case 'metamorphic[bfloat16-sparse_is_dense]' --seed 3")
    assert (one.op, one.kernel, one.checks) == (GROUP, "standin:native", {GROUP: "ok"})
    assert one.inputs == again.inputs
    assert len(one.inputs) == 64
    assert one.errors["out.row"] <= one.budget["out.row"]


def test_a_name_that_is_near_is_suggested() -> None:
    with pytest.raises(HalError) as raised:
        find(["metamorphic[bfloat16-sparse_is_dence]"])
    assert "sparse_is_dense" in raised.value.fix


def test_without_one_of_its_ops_it_is_unsupported() -> None:
    for result in judged(("sparse_is_dense",), sparse_mla=None):
        assert (result.verdict, result.code, result.kernel) == ("UNSUPPORTED", "NOT_IMPLEMENTED", "")
        assert "sparse_mla" in result.detail


def shifted(part: str) -> honest.Body:
    """The log-sum-exp in another base, or a result that is 2 % too large."""

    def body(a: Args) -> Any:
        out, lse = honest.decode()(a)
        return (out * 1.02, lse) if part == "out" else (out, lse / 0.6931)

    return body


def by_page(a: Args) -> Any:
    """Reads the first page of a request from where the page before it lies in memory."""
    a.block_table = a.block_table.clone()
    odd = a.block_table[:, 0] % 2 == 1
    a.block_table[odd, 0] -= 1
    return honest.decode()(a)


def last_expert_first(a: Args) -> Any:
    """Takes expert 0's weights for the last expert's."""
    down = a.w_down.clone()
    down[-1] = down[0]
    return honest.experts()(Args(**{**vars(a), "w_down": down}))


def forgets_earlier_keys(a: Args) -> Any:
    """Masks top-left: a chunk sees too few keys, a whole prompt all of its own."""
    q, k = a.cu_seqlens_q, a.cu_seqlens_k
    if int(k[-1]) > int(q[-1]):
        a.k, a.v, a.cu_seqlens_k = a.k[: int(q[-1])], a.v[: int(q[-1])], q
    return honest.prefill()(a)


@pytest.mark.parametrize(
    ("name", "op", "body"),
    [
        ("sparse_is_dense", "mla_decode", shifted("out")),
        ("sparse_is_dense", "mla_decode", shifted("lse")),
        ("mha_is_absorbed", "mla_decode", shifted("out")),
        ("split_and_merged", "mla_decode", shifted("lse")),
        ("pages_of_decode", "mla_decode", by_page),
        ("chunked_prefill", "mla_prefill", forgets_earlier_keys),
        ("experts_permuted", "moe_experts", last_expert_first),
        ("identity_experts", "moe_combine", lambda a: honest.combine()(a) * 1.02),
    ],
)
def test_a_wrong_kernel_breaks_it(name: str, op: str, body: honest.Body) -> None:
    for result in judged((name,), **{op: body}):
        assert (result.verdict, result.code) == ("FAIL", GROUP)
        assert result.detail.startswith(next(r.what for r in RELATIONS if r.name == name))


def test_a_mistake_that_kernel_and_reference_share_shows_here_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were mla_decode's reference itself off, its kernel would agree with it."""
    spec = specs()["mla_decode"]

    def off(*args: Any, **kwargs: Any) -> Any:
        out, lse = spec.reference(*args, **kwargs)
        return out * 1.02, lse

    off.__signature__ = spec.signature  # type: ignore[attr-defined]
    monkeypatch.setitem(specs(), "mla_decode", replace(spec, reference=off))
    wrong = kernel("mla_decode", shifted("out"))
    (own,) = find(["mla_decode[float32-decode-latent_576]"])
    with installed(*(Made(op, wrong if op == "mla_decode" else kernel(op, body)) for op, body in HONEST.items())):
        accuracy = next(runner.run([own], targets(NAME), 0)).checks["accuracy"]
        relation = next(runner.run(find(["metamorphic[float32-sparse_is_dense]"]), targets(NAME), 0))
    assert accuracy == "ok"
    assert relation.verdict == "FAIL"
