"""From a kernel to its verdict: what is FAIL, what is UNSUPPORTED and why, and what ends a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from glm5_hal import context, ops
from glm5_hal.backend import Device, Unavailable
from glm5_hal.capability import (
    Requirement,
    absent,
    arch,
    at_least,
    contiguous,
    dtype,
    feature,
    limit,
    multiple_of,
    one_of,
    package,
    when,
)
from glm5_hal.conformance import oracle, runner, subject
from glm5_hal.conformance.cases import Case, cases, find
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import kernel
from glm5_hal.conformance.mutants.stand_in import NAME, Made, failed, installed, judge
from glm5_hal.conformance.results import Result, succeeded
from glm5_hal.conformance.target import targets
from glm5_hal.errors import HalError
from glm5_hal.ops import specs
from glm5_hal.spec import BadInput, Inputs

NORM = kernel("rms_norm", honest.rms_norm())
TOPK = kernel("topk_indices", honest.topk())


def verdicts(results: list[Result]) -> set[tuple[str, str]]:
    return {(r.verdict, r.code) for r in results}


def raising(problem: BaseException) -> Callable[..., Any]:
    def body(a: Any) -> Any:
        raise problem

    return kernel("rms_norm", body)


def judged(case_id: str, *made: Made) -> Result:
    (case,) = find([case_id])
    with installed(*made):
        (result,) = runner.run([case], targets(NAME), 0)
    return result


# --- what a result says ----------------------------------------------------------------------------------------------


def test_a_result_says_what_ran_how_well_and_how_to_run_it_again() -> None:
    result = judged("rms_norm[bfloat16-tokens]", Made("rms_norm", NORM))
    assert (result.case, result.op, result.dtype, result.level) == (
        "rms_norm[bfloat16-tokens]",
        "rms_norm",
        "bfloat16",
        "smoke",
    )
    assert (result.backend, result.kernel, result.evidence, result.device) == (
        "standin:native",
        "standin:native",
        "simulated",
        "stand-in",
    )
    assert result.verdict == "PASS"
    assert result.errors.keys() == result.budget.keys() >= {"y.row", "y.mean", "y.slope", "y.bias", "y.nonfinite"}
    assert all(result.errors[name] <= result.budget[name] for name in result.errors)
    assert result.checks.keys() == CHECKS.keys()
    assert len(result.inputs) == 64
    assert result.seconds > result.kernel_seconds > 0
    assert result.repro == (
        "glm5-hal conformance run --backend standin:native --case 'rms_norm[bfloat16-tokens]' --seed 0"
    )


def test_a_failure_names_its_check_and_every_check_has_its_answer() -> None:
    doubled = kernel("rms_norm", lambda a: 2 * honest.rms_norm()(a))
    result = judged("rms_norm[float32-tokens]", Made("rms_norm", doubled))
    assert (result.verdict, result.code) == ("FAIL", "accuracy")
    assert result.detail.startswith("accuracy: y: row: ")
    assert result.checks["accuracy"] == f"failed: {result.detail.removeprefix('accuracy: ')}"
    assert result.checks["form"] == "ok"
    assert result.checks["graph"] == "n/a: the kernel does not claim graph_safe"


def test_the_seed_draws_other_inputs() -> None:
    first, second = judge("rms_norm", NORM, seeds=(0, 1), dtypes=("float32",), samples=("tokens",))
    assert first.inputs != second.inputs


# --- UNSUPPORTED -----------------------------------------------------------------------------------------------------

DECLARED: dict[str, tuple[str, Requirement, str]] = {
    "DTYPE": ("topk_indices", dtype("scores", "float64"), "scores is "),
    "LIMIT": ("topk_indices", limit("top_k", 0), "top_k must be <= 0, got "),
    "MINIMUM": ("topk_indices", at_least("S", 1 << 20), "S must be >= "),
    "MULTIPLE": ("topk_indices", multiple_of("S", 1 << 20), "S must be multiple of "),
    "CHOICE": ("mla_decode", one_of("kv_lora_rank", 4096), "kv_lora_rank must be one of 4096"),
    "ARCH": ("topk_indices", arch("other"), "this kernel is for other, the device is stand-in"),
    "FEATURE": ("topk_indices", feature("fp8", "buy another"), "lacks fp8"),
    "PACKAGE": ("topk_indices", package("no-such-sdk", ">=2"), "no-such-sdk is not installed"),
    "CONDITION": (
        "topk_indices",
        when(lambda call: False, "rows come in pairs", "pad", reads=(("T", "value"),)),
        "rows come in pairs",
    ),
}


@pytest.mark.parametrize("code", DECLARED)
def test_a_declared_limit_is_unsupported_with_its_code(code: str) -> None:
    op, requirement, said = DECLARED[code]
    results = judge(op, raising_of(op), requires=(requirement,), dtypes=("bfloat16",), errors=True)
    assert verdicts(results) == {("UNSUPPORTED", code)}
    assert all(said in r.detail for r in results)
    assert all(r.ok and not r.kernel for r in results)
    assert not succeeded(results)


def raising_of(op: str) -> Callable[..., Any]:
    def body(a: Any) -> Any:
        raise AssertionError("never called")

    return kernel(op, body)


def test_a_limit_spares_the_cases_beyond_it_alone() -> None:
    results = judge("topk_indices", TOPK, requires=(dtype("scores", "bfloat16"),))
    assert {r.dtype for r in results if r.verdict == "PASS"} == {"bfloat16"}
    assert verdicts([r for r in results if r.dtype != "bfloat16"]) == {("UNSUPPORTED", "DTYPE")}
    assert succeeded(results)


def test_an_argument_that_a_kernel_does_not_take_is_unsupported_where_it_is_given() -> None:
    fn = kernel("mla_decode", honest.decode())
    results = judge("mla_decode", fn, requires=(absent("rope_cache"),), dtypes=("bfloat16",), samples=("decode-*",))
    assert {r.case: (r.verdict, r.code) for r in results} == {
        "mla_decode[bfloat16-decode-latent_576]": ("PASS", ""),
        "mla_decode[bfloat16-decode-latent_512_rope_64]": ("UNSUPPORTED", "UNSUPPORTED_ARG"),
        "mla_decode[bfloat16-decode-fp8_656]": ("PASS", ""),
        "mla_decode[bfloat16-decode-fp8_656_ascend]": ("PASS", ""),
    }


def test_an_op_without_a_kernel_is_unsupported_and_so_are_its_bad_inputs() -> None:
    with installed(Made("rms_norm", NORM)):
        results = list(runner.run(list(cases("smoke", ("topk_indices",))), targets(NAME), 0))
    assert verdicts(results) == {("UNSUPPORTED", "NOT_IMPLEMENTED")}


def test_a_composite_of_missing_parts_is_unsupported_for_the_part_that_is_missing() -> None:
    with installed(Made("topk_indices", TOPK)):
        results = list(runner.run(list(cases("smoke", ("lightning_indexer",))), targets(NAME), 0))
    assert verdicts(results) == {("UNSUPPORTED", "NOT_IMPLEMENTED")}
    assert {r.detail for r in results} == {"has no kernel for indexer_logits"}


def test_a_fused_kernels_own_limit_comes_before_the_parts_that_could_replace_it() -> None:
    fused = kernel("lightning_indexer", honest.indexer())
    results = judge("lightning_indexer", fused, requires=(limit("top_k", 8),), dtypes=("bfloat16",))
    assert verdicts(results) == {("UNSUPPORTED", "LIMIT")}


def test_a_composite_is_judged_on_its_parts() -> None:
    parts = {"indexer_logits": kernel("indexer_logits", honest.logits()), "topk_indices": TOPK}
    passed = judge("lightning_indexer", None, parts=parts, errors=True)
    assert verdicts(passed) == {("PASS", "")}
    assert {r.kernel for r in passed} == {"standin:composite"}
    parts["indexer_logits"] = kernel("indexer_logits", honest.logits(relu=lambda s: s))
    assert ("FAIL", "accuracy") in verdicts(failed(judge("lightning_indexer", None, parts=parts)))


def test_a_composite_claims_what_all_of_its_parts_claim() -> None:
    logits = Made("indexer_logits", kernel("indexer_logits", honest.logits()), frozenset({"deterministic"}))
    every = frozenset({"deterministic", "sorted_indices", "canonical_ties"})
    result = judged("lightning_indexer[bfloat16-integers]", logits, Made("topk_indices", TOPK, every))
    assert result.checks["rerun"] == "ok"
    assert result.checks["batch"].startswith("n/a: the kernel does not claim batch_invariant")
    descending = kernel("topk_indices", honest.topk(ascending=False))
    unsorted = judged("lightning_indexer[bfloat16-integers]", logits, Made("topk_indices", descending, every))
    assert (unsorted.verdict, unsorted.code) == ("FAIL", "accuracy")
    without = frozenset({"deterministic"})
    assert judged("lightning_indexer[bfloat16-integers]", logits, Made("topk_indices", descending, without)).ok


# --- FAIL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "verdict", "code"),
    [
        (RuntimeError("no such tile"), "FAIL", "KERNEL"),
        (NotImplementedError("odd widths"), "FAIL", "KERNEL"),
        (HalError("NO_KERNEL", "not today", fix="wait"), "FAIL", "NO_KERNEL"),
        (HalError("VALUE", "I do not like it"), "FAIL", "VALUE"),
        (SystemExit(0), "FAIL", "KERNEL"),
        (GeneratorExit(), "FAIL", "RAISED"),
        (pytest.skip.Exception("skipped"), "FAIL", "RAISED"),
        (MemoryError(), "OOM", ""),
        (torch.OutOfMemoryError("needs 80 GiB"), "OOM", ""),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, BaseException) else p,
)
def test_whatever_a_kernel_raises_is_its_verdict(problem: BaseException, verdict: str, code: str) -> None:
    result = judged("rms_norm[float32-tokens]", Made("rms_norm", raising(problem)))
    assert (result.verdict, result.code) == (verdict, code)
    assert not result.ok
    assert str(problem).split("\n")[0].removeprefix("[NO_KERNEL] ").removeprefix("[VALUE] ") in result.detail


def test_a_kernel_that_raises_later_fails_the_check_that_it_raised_under() -> None:
    def picky(a: Any) -> Any:
        if not a.x.is_contiguous():
            raise RuntimeError("rows apart")
        return honest.rms_norm()(a)

    result = judged("rms_norm[float32-tokens]", Made("rms_norm", kernel("rms_norm", picky)))
    assert (result.verdict, result.code) == ("FAIL", "layout")
    assert "rows apart" in result.detail


def test_a_requirement_that_cannot_answer_is_a_failure_and_no_excuse() -> None:
    broken = when(lambda call: call.axes["no such axis"] > 1, "reason", "fix", reads=(("D", "value"),))
    results = judge("rms_norm", NORM, requires=(broken,))
    assert verdicts(results) == {("FAIL", "CONTRACT")}


def test_an_interrupt_ends_the_run() -> None:
    with pytest.raises(KeyboardInterrupt):
        judged("rms_norm[float32-tokens]", Made("rms_norm", raising(KeyboardInterrupt())))


def test_a_kernel_that_spoils_its_inputs_spoils_them_for_no_other() -> None:
    def spoils(a: Any) -> Any:
        y = honest.rms_norm()(a)
        a.x.zero_()
        return y

    (case,) = find(["rms_norm[float32-tokens]"])
    bad = Made("rms_norm", kernel("rms_norm", spoils), provider="bad")
    with installed(bad, Made("rms_norm", NORM, provider="good")):
        results = list(runner.run([case], targets(NAME), 0))
    assert [(r.backend, r.verdict) for r in results] == [("standin:bad", "FAIL"), ("standin:good", "PASS")]


def test_parts_that_spoil_their_inputs_do_not_spoil_the_composites() -> None:
    def spoils(a: Any) -> Any:
        found = honest.logits()(a)
        a.q.zero_()
        return found

    parts = (Made("indexer_logits", kernel("indexer_logits", spoils)), Made("topk_indices", TOPK))
    result = judged("lightning_indexer[float32-prefill]", *parts)
    assert (result.verdict, result.code) == ("FAIL", "integrity")


# --- when the suite itself is at fault -------------------------------------------------------------------------------


def test_a_failure_of_the_suite_is_an_error_and_blames_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError("in the oracle")

    monkeypatch.setattr(oracle, "truth", fails)
    result = judged("rms_norm[float32-tokens]", Made("rms_norm", NORM))
    assert (result.verdict, result.code, result.kernel) == ("ERROR", "CONTRACT", "")
    assert "the suite itself failed: ZeroDivisionError: in the oracle" in result.detail
    assert not succeeded([result])


def with_spec(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setitem(specs(), "rms_norm", replace(specs()["rms_norm"], **changes))


def test_inputs_that_prove_nothing_are_mistrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"x": torch.zeros(4, 64), "weight": torch.ones(64), "eps": 1e-5}
    with_spec(monkeypatch, inputs=lambda sample, dtype, draw: Inputs(args))
    zeros = kernel("rms_norm", lambda a: torch.zeros_like(a.x))
    result = judged("rms_norm[float32-tokens]", Made("rms_norm", NORM))
    assert (result.verdict, result.code) == ("MISTRUSTED", "")
    assert "the inputs prove nothing: the oracle's output is zero everywhere" in result.detail
    result = judged("rms_norm[float32-tokens]", Made("rms_norm", zeros))
    assert (result.verdict, result.code) == ("FAIL", "nonfinite")  # which does not show on zeros alone
    ones = judged("rms_norm[float32-tokens]", Made("rms_norm", kernel("rms_norm", lambda a: torch.ones_like(a.x))))
    assert ones.verdict == "FAIL"


def test_an_emulation_that_is_as_wrong_as_zeros_is_mistrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    with_spec(monkeypatch, emulate=lambda x, weight, *, eps: -torch.ones_like(x))
    result = judged("rms_norm[float32-tokens]", Made("rms_norm", NORM))
    assert result.verdict == "MISTRUSTED"
    assert result.detail.startswith("y: the emulation and the floor")


# --- bad inputs ------------------------------------------------------------------------------------------------------


def bad(monkeypatch: pytest.MonkeyPatch, code: str, spoil: Callable[[dict[str, Any]], dict[str, Any]]) -> Result:
    with_spec(monkeypatch, errors=(BadInput("special", code, spoil),))
    return judged("rms_norm[error-special]", Made("rms_norm", NORM))


def test_a_bad_input_that_is_refused_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bad(monkeypatch, "SCALAR", lambda args: {**args, "eps": -1.0})
    assert (result.verdict, result.checks) == ("PASS", {"errors": "ok"})


def test_a_bad_input_that_is_accepted_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bad(monkeypatch, "VALUE", lambda args: args)
    assert (result.verdict, result.code) == ("FAIL", "errors")
    assert result.detail == "accepted; it should raise HalError(VALUE)"


def test_a_bad_input_that_is_refused_with_another_code_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bad(monkeypatch, "VALUE", lambda args: {**args, "eps": -1.0})
    assert (result.verdict, result.code) == ("FAIL", "errors")
    assert "raised SCALAR" in result.detail


def test_a_refusal_after_something_was_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(a: Any) -> Any:
        a.x.zero_()
        raise HalError("VALUE", "too late", fix="earlier")

    with_spec(monkeypatch, errors=(BadInput("special", "VALUE", lambda args: args),))
    result = judged("rms_norm[error-special]", Made("rms_norm", kernel("rms_norm", writes)))
    assert (result.verdict, result.code) == ("FAIL", "errors")
    assert result.detail == "wrote x, spoilt x before refusing"


def test_values_on_a_device_are_checked_because_the_suite_asks_for_it() -> None:
    (case,) = find(["topk_indices[error-seq_lens_too_long]"])
    made, asked = subject.subject_of(case, 0), []

    def op(**args: Any) -> None:
        asked.append(context.effective()[2])
        raise HalError("VALUE", "too long", fix="shorter")

    for device in ("cpu", "cuda:0"):
        assert runner._judge_bad(made, op, dict(made.inputs.args), device)["verdict"] == "PASS"
    assert asked == ["auto", "values"]


# --- targets ---------------------------------------------------------------------------------------------------------


def test_a_backend_is_all_of_its_providers_or_the_one_that_is_named() -> None:
    with installed(Made("rms_norm", NORM, provider="a"), Made("rms_norm", NORM, provider="b")):
        assert [t.policy for t in targets(NAME)] == ["standin:a", "standin:b"]
        assert [t.policy for t in targets("standin:b")] == ["standin:b"]


@pytest.mark.parametrize(
    ("backend", "device", "code", "said"),
    [
        ("standln", None, "UNKNOWN", "did you mean 'standin'?"),
        ("standin:nativ", None, "UNKNOWN", "did you mean 'native'?"),
        ("standin", "cuda:1", "DEVICE", "use cpu:0"),
    ],
)
def test_a_target_that_is_not_there_is_an_error_that_helps(
    backend: str, device: str | None, code: str, said: str
) -> None:
    with installed(Made("rms_norm", NORM)), pytest.raises(HalError) as raised:
        targets(backend, device)
    assert raised.value.code == code
    assert said in raised.value.fix


def test_a_plugin_that_is_not_there_is_told_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_given", [])
    with pytest.raises(HalError) as raised:
        targets("", None, "nowhere/plugin.py")
    monkeypatch.undo()
    context.reset()
    assert raised.value.code == "PLUGIN"
    assert "plugin nowhere/plugin.py: there is no nowhere/plugin.py" in raised.value.what
    assert raised.value.fix == "give a .py file, a package's folder or a module"


def test_a_device_that_is_not_there_is_unavailable() -> None:
    def absent_device() -> Device | Unavailable:
        return Unavailable("no device", "plug one in")

    with installed(Made("rms_norm", NORM), probe=absent_device), pytest.raises(HalError) as raised:
        targets(NAME)
    assert (raised.value.code, raised.value.fix) == ("UNAVAILABLE", "plug one in")


def test_a_backend_without_kernels_is_not_judged() -> None:
    with installed(), pytest.raises(HalError) as raised:
        targets(NAME)
    assert raised.value.code == "NO_KERNEL"


def test_an_oracle_is_computed_once_for_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    subject_of = subject.subject_of

    def counted(case: Case, seed: int) -> Any:
        asked.append(case.id)
        return subject_of(case, seed)

    monkeypatch.setattr(subject, "subject_of", counted)
    chosen = find(["rms_norm[float32-tokens]", "rms_norm[float32-one]"])
    with installed(*(Made("rms_norm", NORM, provider=p) for p in "abc")):
        results = list(runner.run(chosen, targets(NAME), 0))
    assert len(results) == 6
    assert asked == [case.id for case in chosen]


def test_nothing_succeeds_by_being_unsupported() -> None:
    assert not succeeded([])
    passed = judged("rms_norm[float32-tokens]", Made("rms_norm", NORM))
    assert succeeded([passed])
    assert succeeded([passed, replace(passed, verdict="UNSUPPORTED")])
    assert not succeeded([replace(passed, verdict="UNSUPPORTED")])
    assert not succeeded([passed, replace(passed, verdict="MISTRUSTED")])


def test_a_contiguous_only_kernel_passes_and_says_what_it_does_not_take() -> None:
    def strict(a: Any) -> Any:
        assert a.x.is_contiguous()
        return honest.rms_norm()(a)

    (result,) = judge(
        "rms_norm", kernel("rms_norm", strict), requires=(contiguous("x"),), dtypes=("float32",), samples=("tokens",)
    )
    assert result.verdict == "PASS"
    assert result.checks["layout"] == "ok"  # the weight still comes in other layouts


def test_the_stand_in_leaves_nothing_behind() -> None:
    with installed(Made("rms_norm", NORM)):
        pass
    assert ops.rms_norm.choose(torch.ones(2, 8), torch.ones(8), eps=1e-5).backend == "cpu"
