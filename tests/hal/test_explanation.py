"""explain: every candidate's answer, for a real call or one that is described by its axes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import first_sample, installed, raised, stand_in

import glm5_hal
from glm5_hal import explain
from glm5_hal.backend import Kernel, Unavailable
from glm5_hal.capability import Rejected, arch, feature, limit
from glm5_hal.errors import HalError
from glm5_hal.explanation import Explanation, described
from glm5_hal.metadata import axis_names
from glm5_hal.ops import specs
from glm5_hal.plugins import PluginRecord

pytestmark = pytest.mark.usefixtures("fresh")


TOPK = specs()["topk_indices"]


def acme() -> Any:
    """Two kernels for the CPU, and a backend for another device."""
    small = Kernel("topk_indices", "native", TOPK.reference, (limit("top_k", 2048),))
    kernels = [small, Kernel("topk_indices", "torch", TOPK.reference)]
    return installed(stand_in("acme", kernels), stand_in("quux", [small], device_type="quux"))


def test_a_call_described_by_its_axes() -> None:
    with acme():
        found = explain("topk_indices", top_k=4096, T=3, S=131072, dtype="bfloat16")
    assert found.ok
    assert {n: (m.dtype, m.shape, m.device) for n, m in found.call.tensors.items() if m} == {
        "scores": ("bfloat16", (3, 131072), "cpu"),
        "seq_lens": ("int32", (3,), "cpu"),
    }
    assert found.call.scalars == {"top_k": 4096}
    assert [s.candidate for s in found.resolution.trace] == ["acme:native", "acme:torch"]


def test_the_text_has_one_line_per_candidate_with_the_choice_marked() -> None:
    with acme():
        head, policy, *lines = str(explain("topk_indices", top_k=4096, T=3, S=9)).splitlines()
    assert head == "topk_indices(scores float32[3, 9], seq_lens int32[3]; top_k=4096)"
    assert policy == "policy: auto (default)"
    assert [" ".join(line.split()) for line in lines] == [
        "acme:native rejected LIMIT top_k must be <= 2048, got 4096 -> use top_k=2048, or another kernel",
        "* acme:torch accepted",
    ]


def test_a_plugin_that_is_broken_is_told_under_auto_and_only_there() -> None:
    broken = PluginRecord("broken", "m", "d", "1", False, "broken", "IMPORT", "its import raised", "mend it")
    with installed(stand_in("acme", [Kernel("topk_indices", "native", TOPK.reference)]), broken):
        assert "- broken             rejected  PLUGIN  its import raised  -> mend it" in str(explain("topk_indices"))
        with glm5_hal.use("acme"):
            assert "broken" not in str(explain("topk_indices"))


def test_what_comes_after_the_choice_answers_too() -> None:
    with acme():
        found = explain("topk_indices", top_k=64)
    assert [(s.candidate, str(s.decision)) for s in found.resolution.trace] == [
        ("acme:native", "accepted"),
        ("acme:torch", "accepted"),
    ]


def test_what_the_policy_leaves_out_is_shown_with_what_would_allow_it() -> None:
    slow = Kernel("topk_indices", "reference", TOPK.reference)
    small = Kernel("topk_indices", "native", TOPK.reference, (limit("top_k", 2048),))
    others = [stand_in("other", [small], builtin=True), stand_in("quux", [small], device_type="quux")]
    with installed(stand_in("acme", [small, slow]), *others), glm5_hal.use("acme"):
        found = explain("topk_indices", top_k=4096)
        problem = raised(glm5_hal.ops.topk_indices, torch.zeros(1, 9), torch.tensor([9]).int(), top_k=4096)
    assert not found.ok
    rows = [(s.candidate, s.decision.code, s.decision.fix) for s in found.left_out if isinstance(s.decision, Rejected)]
    assert rows == [
        ("acme:reference", "NOT_LISTED", "GLM5_BACKEND=acme:reference"),
        ("other", "NOT_LISTED", "add ',other' to GLM5_BACKEND to allow it"),
    ]
    assert [step["candidate"] for step in found.as_dict()["left_out"]] == ["acme:reference", "other"]
    assert " - other " in str(found)
    assert [s.candidate for s in problem.trace] == ["acme:native", "acme:reference", "other"]
    assert problem.fix == "use top_k=2048, or another kernel"


def test_a_call_with_tensors() -> None:
    scores, lens = torch.zeros(2, 6).t().contiguous().t(), torch.tensor([6, 6], dtype=torch.int32)
    with acme():
        for found in (
            explain("topk_indices", scores, lens, top_k=2),
            explain("topk_indices", scores=scores, seq_lens=lens, top_k=2),
        ):
            assert found.ok
            assert found.call.tensors["scores"].strides == (1, 2)  # type: ignore[union-attr]
        assert raised(explain, "topk_indices", scores, lens, top_k=0).code == "SCALAR"
        assert raised(explain, "topk_indices", scores, top_k=2).code == "TYPE"


def test_the_policy_in_force_is_explained() -> None:
    with acme(), glm5_hal.use("quux,acme:native", require="deterministic"):
        found = explain("topk_indices", device="cpu")
    assert not found.ok
    assert [(s.candidate, s.decision.code) for s in found.resolution.trace if isinstance(s.decision, Rejected)] == [
        ("quux", "DEVICE"),
        ("acme:native", "ATTRIBUTE"),
    ]
    text = str(found)
    assert "policy: quux,acme:native (hal.use)" in text
    assert "no kernel takes this call; nothing was tried, nothing was copied" in text


def test_a_device_without_a_backend_points_to_the_doctor() -> None:
    with acme():
        found = explain("topk_indices", device="corge:3")
        assert not found.ok
        assert "`glm5-hal doctor`" in str(found)
        assert explain("topk_indices", device="quux:3").resolution.chosen is not None


def test_tensors_are_described_where_the_named_backend_computes() -> None:
    with acme(), glm5_hal.use("quux,acme"):
        found = explain("topk_indices")
    assert found.call.tensors["scores"].device == "quux"  # type: ignore[union-attr]
    assert found.resolution.chosen is not None
    assert found.resolution.chosen.name == "quux:native"


def test_a_device_that_is_not_there_may_be_supposed() -> None:
    def probe() -> Any:
        return Unavailable("no such device", "buy one")

    needs = (arch("q2"), feature("fast", "buy a better one"), limit("top_k", 2048))
    kernels = [Kernel("topk_indices", "native", TOPK.reference, needs)]
    with installed(stand_in("quux", kernels, device_type="quux", probe=probe)), glm5_hal.use("quux"):
        absent, other = explain("topk_indices"), explain("topk_indices", arch="q1")
        large, fits = explain("topk_indices", arch="q2", top_k=4096), explain("topk_indices", arch="q2")
    assert [step.decision.code for step in absent.resolution.trace] == ["UNAVAILABLE"]  # type: ignore[union-attr]
    assert "add arch=" in str(absent)
    assert [step.decision.code for step in other.resolution.trace] == ["ARCH"]  # type: ignore[union-attr]
    assert [step.decision.code for step in large.resolution.trace] == ["LIMIT"]  # type: ignore[union-attr]
    assert fits.ok
    assert "supposed: a device of architecture q2" in str(fits)
    assert (fits.as_dict()["supposed"], absent.as_dict()["supposed"]) == ("q2", None)


def test_a_plugin_that_breaks_when_it_is_asked_is_one_line_of_the_answer() -> None:
    def kernels() -> Any:
        raise RuntimeError("no memory")

    with installed(stand_in("bad", kernels), stand_in("acme", [Kernel("topk_indices", "native", TOPK.reference)])):
        found = explain("topk_indices")
    assert found.resolution.chosen is not None
    assert found.resolution.chosen.name == "acme:native"
    assert "no memory" in str(found)


def test_as_data_it_is_json() -> None:
    with acme():
        data = json.loads(json.dumps(explain("topk_indices", top_k=4096, T=1, S=2).as_dict()))
    assert data["op"] == "topk_indices"
    assert data["policy"] == {"text": "auto", "provenance": "default"}
    assert data["tensors"]["scores"] == {"dtype": "float32", "shape": [1, 2]}
    assert data["scalars"] == {"top_k": 4096}
    assert data["chosen"] == "acme:torch"
    assert [step["accepted"] for step in data["trace"]] == [False, True]
    assert set(data["trace"][0]) == {"candidate", "accepted", "code", "detail", "fix"}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"topk": 3}, "UNKNOWN", "did you mean 'top_k'?"),
        ({"Q": 3}, "UNKNOWN", "known: S, T, arch, device, dtype, top_k"),
        ({"T": -1}, "SHAPE", "axis T is -1"),
        ({"T": "many"}, "SHAPE", "axis T is 'many'"),
        ({"T": 2.5}, "SHAPE", "axis T is 2.5"),
        ({"T": True}, "SHAPE", "axis T is True"),
        ({"top_k": 0}, "SCALAR", "top_k is 0"),
        ({"top_k": "all"}, "TYPE", "top_k is 'all'"),
        ({"dtype": "bfloat17"}, "DTYPE", "takes no bfloat17"),
        ({"dtype": "int8"}, "DTYPE", "one of float32, bfloat16"),
        ({"device": 3}, "DEVICE", "3 is not a device"),
    ],
)
def test_a_description_that_is_wrong(changes: dict[str, Any], code: str, words: str) -> None:
    problem = raised(explain, "topk_indices", **changes)
    assert problem.code == code
    assert words in str(problem)


def test_an_op_that_does_not_exist() -> None:
    problem = raised(explain, "topk_indexes")
    assert problem.code == "UNKNOWN"
    assert "did you mean 'topk_indices'?" in problem.fix


every_op = pytest.mark.parametrize("name", specs())


@every_op
def test_without_changes_the_first_sample_is_described(name: str) -> None:
    args = first_sample(specs()[name])
    call = explain(name).call
    for tensor, meta in call.tensors.items():
        assert (meta is None) is (args[tensor] is None)
        if meta is not None:
            assert (meta.shape, meta.dtype) == (tuple(args[tensor].shape), str(args[tensor].dtype)[6:])
    assert call.scalars == {n: args[n] for n in specs()[name].options}


@every_op
def test_every_op_can_be_described_in_every_dtype_of_its_first_sample(name: str) -> None:
    for dtype in next(iter(specs()[name].samples())).dtypes:
        assert explain(name, dtype=dtype).resolution.trace


def test_a_named_choice_brings_tensors_that_go_with_it() -> None:
    for name, spec in specs().items():
        scalar = spec.options.get("cache_format")
        for choice in scalar.choices if scalar else ():
            assert explain(name, cache_format=choice).call.scalars["cache_format"] == choice


def asked(name: str, changes: dict[str, Any]) -> Explanation | HalError:
    try:
        return explain(name, **changes)
    except HalError as refused:
        return refused


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@every_op
def test_whatever_is_asked_each_candidate_says_yes_or_no_with_code_detail_and_fix(
    name: str, data: st.DataObject
) -> None:
    spec = specs()[name]
    base = described(spec, {})
    axes = sorted({n for n in axis_names(spec) if n in base.axes and n not in spec.options})
    changes: dict[str, Any] = data.draw(
        st.dictionaries(st.sampled_from(axes), st.integers(0, 5000), max_size=3) if axes else st.just({})
    )
    dtypes = sorted({d for allowed in spec.dtypes.values() for d in allowed if "float" in d})
    if data.draw(st.booleans()) and dtypes:
        changes["dtype"] = data.draw(st.sampled_from(dtypes))
    changes["device"] = data.draw(st.sampled_from(["cpu", "cpu", "meta", "quux:1"]))
    policy = data.draw(st.sampled_from(["auto", "cpu", "cpu:torch", "cpu:reference,auto", "cpu:torch,cpu:reference"]))
    require = data.draw(st.sets(st.sampled_from(sorted(spec.attributes))))
    with glm5_hal.use(policy, require=require):
        found = asked(name, changes)
    if isinstance(found, HalError):  # the op itself takes no such call, whatever the kernels
        assert found.code in ("SHAPE", "DTYPE", "CONTRACT", "SCALAR")
        assert found.code != "CONTRACT" or "exactly" in found.what, "a dtype that the sample cannot be drawn in"
        assert found.fix
        return
    assert found.ok is any(str(s.decision) == "accepted" for s in found.resolution.trace)
    for step in found.resolution.trace:
        if isinstance(step.decision, Rejected):
            assert step.decision.code.isupper()
            assert step.decision.detail
            assert step.decision.fix
    json.dumps(found.as_dict())
