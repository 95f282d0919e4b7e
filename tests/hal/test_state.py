"""What serving needs beside calls: cache formats, prepared weights, the plan of a step, rope tables."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import installed, raised, stand_in

import glm5_hal
from glm5_hal import Prepared, StepPlan, cache_format, preferred_formats, prepare, rope_tables
from glm5_hal.plugins import PluginRecord
from glm5_hal.state import FORMATS, current_plan, formats, host_list, schedule

# Cache formats

MLA, INDEX = (512, 64), (128,)


@pytest.mark.parametrize(
    ("name", "dims", "widths", "bytes_per_token"),
    [
        ("latent_576", MLA, (576,), 1152),
        ("latent_512_rope_64", MLA, (512, 64), 1152),
        ("fp8_656", MLA, (656,), 656),
        ("fp8_656_ascend", MLA, (656,), 656),
        ("bf16_128", INDEX, (128,), 256),
        ("fp8_132", INDEX, (132,), 132),
    ],
)
def test_the_formats_have_their_published_sizes(
    name: str, dims: tuple[int, ...], widths: tuple[int, ...], bytes_per_token: int
) -> None:
    fmt = cache_format(name)
    assert fmt.widths(*dims) == widths
    assert fmt.bytes_per_token(*dims) == bytes_per_token
    pages = fmt.allocate(3, 8, *dims, dtype=torch.bfloat16)
    assert sum(t.numel() * t.itemsize for t in pages) == 3 * 8 * bytes_per_token
    assert [tuple(t.shape) for t in pages] == [(3, 8, w) for w in widths]
    assert len(pages) == len(fmt.tensors)
    assert not any(t.any() for t in pages)


def test_every_format_is_listed_by_its_kind() -> None:
    assert {*formats("latent"), *formats("index")} == set(FORMATS)
    assert formats("nothing") == ()


def test_a_cache_is_in_the_activations_dtype_unless_the_format_says_otherwise() -> None:
    for dtype in (torch.float32, torch.float16):
        (plain,) = cache_format("latent_576").allocate(1, 2, *MLA, dtype=dtype)
        (packed,) = cache_format("fp8_656").allocate(1, 2, *MLA, dtype=dtype)
        assert (plain.dtype, packed.dtype) == (dtype, torch.uint8)
    assert cache_format("latent_576").bytes_per_token(*MLA, itemsize=4) == 2304
    assert cache_format("fp8_656").bytes_per_token(*MLA, itemsize=4) == 656
    assert cache_format("bf16_128").allocate(1, 2, 128, dtype=torch.float32, device="meta")[0].is_meta


def test_a_format_that_does_not_exist() -> None:
    problem = raised(cache_format, "fp8_655")
    assert (problem.code, problem.value) == ("UNKNOWN", "fp8_655")
    assert "did you mean 'fp8_656'?" in problem.fix


@pytest.mark.parametrize(
    ("name", "dims", "words"),
    [
        ("latent_576", (512,), "takes the dims (kv_lora_rank, rope_dim), got (512,)"),
        ("fp8_132", MLA, "takes the dims (index_head_dim), got (512, 64)"),
        ("fp8_656", (500, 64), "groups of 128; 500 is not a multiple"),
    ],
)
def test_dims_that_a_format_cannot_have(name: str, dims: tuple[int, ...], words: str) -> None:
    for method in (cache_format(name).widths, cache_format(name).bytes_per_token):
        problem = raised(method, *dims)
        assert problem.code == "SHAPE"
        assert words in problem.what


def test_a_backends_favourite_comes_first() -> None:
    formats = {"latent": ("fp8_656", "latent_576"), "index": ("fp8_132",)}
    broken = PluginRecord("bad", "m", "d", "1", False, "broken", "IMPORT", "no sdk", "install it")
    with installed(stand_in("acme", cache_formats=formats), stand_in("plain"), broken):
        assert [f.name for f in preferred_formats("acme", "latent")] == ["fp8_656", "latent_576"]
        assert [f.name for f in preferred_formats("plain", "index")] == ["bf16_128"]
        assert preferred_formats("acme", "other") == ()
        assert raised(preferred_formats, "acmee", "latent").code == "UNKNOWN"
        problem = raised(preferred_formats, "bad", "latent")
        assert (problem.code, problem.fix) == ("PLUGIN", "install it")


# Prepared weights

GEMM = {"w_gate_up": torch.randn(2, 6, 4), "w_down": torch.randn(2, 4, 3)}


def prepared(make: Any, op: str = "moe_experts", weights: Mapping[str, torch.Tensor] = GEMM) -> Any:
    with installed(stand_in("acme", prepare=make)):
        return prepare(op, weights, backend="acme")


def test_without_a_form_of_its_own_a_backend_gets_plain_contiguous_weights() -> None:
    for make in (None, lambda op, weights: None):
        made = prepared(make, weights={"w_down": GEMM["w_down"].mT})
        assert (made.op, made.format) == ("moe_experts", "plain")
        assert made["w_down"].is_contiguous()
        assert torch.equal(made["w_down"], GEMM["w_down"].mT)


def test_a_backends_own_form_keeps_names_shapes_and_dtypes() -> None:
    made = prepared(lambda op, w: Prepared(op, {n: t.mT.contiguous().mT for n, t in w.items()}, "acme_nz"))
    assert made.format == "acme_nz"
    assert not made["w_down"].is_contiguous()
    assert torch.equal(made["w_down"], GEMM["w_down"])


def replaced(**changes: Any) -> Any:
    return lambda op, w: Prepared(op, {**w, **changes}, "acme_nz")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (replaced(w_down=torch.randn(2, 3, 4)), "changed or dropped w_down"),
        (replaced(w_down=GEMM["w_down"].half()), "changed or dropped w_down"),
        (lambda op, w: Prepared(op, {"w_down": w["w_down"]}), "changed or dropped w_gate_up"),
        (lambda op, w: dict(w), "returned {"),
        (lambda op, w: Prepared("rms_norm", w), "returned Prepared(op='rms_norm'"),
    ],
)
def test_a_backend_that_breaks_the_contract_of_preparing(make: Any, words: str) -> None:
    problem = raised(prepared, make)
    assert problem.code == "CONTRACT"
    assert words in problem.what
    assert "acme" in problem.what


def test_a_form_is_of_use_only_to_an_op_that_can_be_told_of_it() -> None:
    weights = {"weight": torch.ones(4)}
    assert prepared(lambda op, w: Prepared(op, w), "rms_norm", weights).format == "plain"
    problem = raised(prepared, lambda op, w: Prepared(op, w, "acme_nz"), "rms_norm", weights)
    assert problem.code == "CONTRACT"
    assert "'acme_nz', which rms_norm cannot be told" in problem.what


def test_preparing_for_names_that_do_not_exist() -> None:
    with installed(stand_in("acme")):
        assert "did you mean 'rms_norm'?" in raised(prepare, "rms_nrom", {}, backend="acme").fix
        problem = raised(prepare, "rms_norm", {"wieght": torch.ones(1)}, backend="acme")
        assert (problem.code, problem.value) == ("UNKNOWN", "wieght")
        assert raised(prepare, "rms_norm", {}, backend="emca").code == "UNKNOWN"


# Step plans


def batch(lens: list[int], queries: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = [0, *itertools.accumulate(queries)]
    return torch.tensor(lens, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)


@pytest.fixture
def plan() -> Iterator[StepPlan]:
    made = StepPlan.build(*batch([7, 3, 9], [2, 0, 3]))
    with made.active():
        yield made


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per read of a tensor's values."""
    made: list[int] = []
    tolist = torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> Any:
        made.append(1)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    return made


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6))
def test_a_plan_holds_lengths_and_their_maxima(pairs: list[tuple[int, int]]) -> None:
    lens, queries = [a for a, _ in pairs], [b for _, b in pairs]
    plan = StepPlan.build(*batch(lens, queries))
    assert plan.host["seq_lens"] == tuple(lens)
    assert plan.host["cu_seqlens_q"] == (0, *itertools.accumulate(queries))
    assert (plan.max_seq_len, plan.max_q_len) == (max(lens, default=0), max(queries, default=0))


def test_with_host_lists_nothing_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seq_lens, offsets = batch([7, 3], [1, 2])
    seen = reads(monkeypatch)
    plan = StepPlan.build(seq_lens, offsets, host_seq_lens=[7, 3], host_cu_seqlens_q=(0, 1, 3))
    with plan.active():
        assert (host_list(seq_lens), host_list(offsets)) == ((7, 3), (0, 1, 3))
    assert seen == []
    StepPlan.build(seq_lens, offsets)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("tensors", "host", "code"),
    [
        (batch([7, 3], [1]), {}, "SHAPE"),
        (batch([7], [1]), {"host_seq_lens": [7, 7]}, "SHAPE"),
        (batch([7], [1]), {"host_cu_seqlens_q": [0]}, "SHAPE"),
        (batch([], []), {"host_cu_seqlens_q": []}, "SHAPE"),
        (batch([7, 3], [2, -1]), {}, "VALUE"),
        (batch([-1], [1]), {}, "VALUE"),
        (batch([7], [1]), {"host_cu_seqlens_q": [1, 2]}, "VALUE"),
    ],
)
def test_lengths_that_do_not_fit_together(tensors: Any, host: dict[str, Any], code: str) -> None:
    problem = raised(StepPlan.build, *tensors, **host)
    assert problem.code == code
    assert problem.what.startswith("StepPlan: ")


def test_kernels_read_the_active_plan_without_a_sync(monkeypatch: pytest.MonkeyPatch, plan: StepPlan) -> None:
    seen = reads(monkeypatch)
    assert current_plan() is plan
    assert host_list(plan.seq_lens) == (7, 3, 9)
    assert host_list(plan.cu_seqlens_q.view(-1)) == (0, 2, 2, 5), "another tensor of the same memory"
    assert seen == []
    assert host_list(torch.tensor([7, 3, 9], dtype=torch.int32)) == (7, 3, 9), "equal values elsewhere are read"
    assert len(seen) == 1


def test_without_a_plan_the_device_is_read() -> None:
    assert current_plan() is None
    assert host_list(torch.tensor([4, 5])) == (4, 5)


def test_other_elements_of_the_same_memory_are_not_the_plans() -> None:
    memory = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    plan = StepPlan.build(memory[:2], torch.tensor([0, 1, 2], dtype=torch.int32))
    with plan.active():
        assert host_list(memory[:2]) == (1, 2)
        assert host_list(memory[::2]) == (1, 3)
        assert host_list(memory[:3]) == (1, 2, 3)
        assert host_list(memory[:2].view(torch.float32)) != (1, 2)


def test_a_plan_whose_lengths_were_written_since_is_not_believed(plan: StepPlan) -> None:
    built: list[str] = []

    def build() -> int:
        built.append("tiles")
        return len(built)

    assert schedule("tiles", build) == schedule("tiles", build) == 1
    plan.seq_lens.add_(1)
    assert host_list(plan.seq_lens) == (8, 4, 10)
    assert host_list(plan.cu_seqlens_q) == (0, 2, 2, 5), "the other one was not written"
    assert schedule("tiles", build) == 2


def test_inference_tensors_are_believed() -> None:
    """They have no write counter; whoever writes them makes a new plan."""
    with torch.inference_mode():
        plan = StepPlan.build(*batch([7, 3], [1, 2]))
        with plan.active():
            assert host_list(plan.seq_lens) == (7, 3)
    assert plan.seq_lens.is_inference()


def test_plans_nest_and_end_with_their_block(plan: StepPlan) -> None:
    inner = StepPlan.build(*batch([1], [1]))

    def fail() -> None:
        with inner.active():
            assert current_plan() is inner
            assert host_list(inner.seq_lens) == (1,)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert current_plan() is plan
    assert host_list(plan.seq_lens) == (7, 3, 9)


def test_another_thread_has_no_plan(plan: StepPlan) -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(current_plan()))
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_schedule_is_built_once_per_step_and_key(plan: StepPlan) -> None:
    built: list[str] = []

    def build(key: str) -> Any:
        return schedule(key, lambda: built.append(key) or object())

    assert build("a") is build("a")
    assert build("a") is not build("b")
    assert built == ["a", "b"]
    with StepPlan.build(*batch([1], [1])).active():
        build("a")
    assert built == ["a", "b", "a"]


def test_a_schedule_may_be_built_from_another(plan: StepPlan) -> None:
    assert schedule("outer", lambda: schedule("inner", lambda: 2) + 1) == 3
    assert schedule("inner", lambda: 0) == 2


def test_without_a_plan_a_schedule_is_built_every_time() -> None:
    numbers = itertools.count()
    assert [schedule("a", lambda: next(numbers)) for _ in range(2)] == [0, 1]


def test_a_schedule_is_built_once_by_many_threads(plan: StepPlan) -> None:
    import contextvars

    built: list[int] = []

    def build() -> None:
        built.append(1)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(schedule, "a", build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


# Rope tables

THETA = 1e6


def by_hand(position: int, rotary: int, theta: float) -> list[tuple[float, float]]:
    angles = [position / theta ** (2 * i / rotary) for i in range(rotary // 2)]
    return [(math.cos(a), math.sin(a)) for a in angles]


@pytest.mark.parametrize("position", [0, 1, 4095, 200_000, 1_000_003])
def test_the_angles_are_those_of_float64(position: int) -> None:
    cos, sin = rope_tables(torch.tensor([position]), 64, THETA)
    assert cos.shape == sin.shape == (1, 32)
    assert cos.dtype == sin.dtype == torch.float32
    for i, (c, s) in enumerate(by_hand(position, 64, THETA)):
        assert abs(float(cos[0, i]) - c) < 1e-7
        assert abs(float(sin[0, i]) - s) < 1e-7


def test_angles_in_fp32_would_be_visibly_wrong_far_out() -> None:
    """The trap that the function is there for: at position 200,000 fp32 angles are off by more than 1e-3."""
    position = torch.tensor([200_000 - n for n in range(64)])
    inverse = 1.0 / (THETA ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    naive = (position.float()[:, None] * inverse).cos()
    cos, _ = rope_tables(position, 64, THETA)
    assert (naive - cos).abs().max() > 1e-3


def test_positions_may_be_of_any_integer_dtype_and_none_at_all() -> None:
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(
            rope_tables(torch.tensor([5], dtype=dtype), 8, 1e4)[0], rope_tables(torch.tensor([5]), 8, 1e4)[0]
        )
    assert rope_tables(torch.empty(0, dtype=torch.int64), 8, 1e4)[0].shape == (0, 4)


@pytest.mark.parametrize(("rotary", "theta"), [(63, 1e4), (0, 1e4), (-2, 1e4), (64, 0.0), (64, -1.0)])
def test_tables_that_cannot_be(rotary: int, theta: float) -> None:
    assert raised(rope_tables, torch.tensor([1]), rotary, theta).code == "SCALAR"


def test_everything_here_is_reached_from_the_package() -> None:
    assert glm5_hal.StepPlan is StepPlan
    assert glm5_hal.rope_tables is rope_tables
