"""What a kernel gives for a row alone, in another order or twice: the same bits where claimed, else as good."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trying import caught_by, said

from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import find
from glm5_hal.conformance.checks import batch
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args
from glm5_hal.conformance.mutants.stand_in import Made, installed
from glm5_hal.conformance.subject import subject_of
from glm5_hal.errors import HalError

NORM, DECODE = honest.rms_norm(), honest.decode()


def wrong_for_one(a: Args) -> Any:
    """A matrix-vector path of its own, with a fault."""
    y = NORM(a)
    return y * 1.01 if len(y) == 1 else y


def wrong_from_six(a: Args) -> Any:
    """Tiles of five rows: the sixth is a copy of the first."""
    y = NORM(a)
    return torch.cat([y[:5], y[:1].expand(len(y) - 5, -1)]) if len(y) > 5 else y


def first_request_longest(a: Args) -> Any:
    """Splits for the first request's length, and drops what lies beyond."""
    longest = int(a.seq_lens[0]) if len(a.seq_lens) else 0
    short = longest == int(a.seq_lens.max()) and len(a.seq_lens) > 1  # no sample has its longest request first
    out, lse = DECODE(a)
    return (out * 1.05 if short else out), lse


@pytest.mark.parametrize(
    ("op", "body", "what"),
    [
        ("rms_norm", wrong_for_one, "the first token alone: y: "),
        ("rms_norm", wrong_from_six, "tokens twice: y: "),
        ("mla_decode", first_request_longest, "requests backwards: out: "),
    ],
)
def test_without_the_claim_a_worse_result_is_caught_by_this_check_alone(op: str, body: Any, what: str) -> None:
    how: dict[str, Any] = {"samples": ("tokens", "decode-latent_576")}
    assert caught_by(op, body, **how) == {"batch"}
    assert said(op, body, "batch", **how).startswith(f"failed: {what}")


def test_other_bits_are_right_unless_the_claim_is_made() -> None:
    def bits(a: Args) -> Any:
        return honest.rms_norm(honest.NORMS["in double" if len(a.x) == 1 else "rsqrt"])(a)

    how: dict[str, Any] = {"samples": ("tokens",)}
    assert caught_by("rms_norm", bits, **how) == set()
    assert caught_by("rms_norm", bits, provides=("batch_invariant",), **how) == {"batch"}


@pytest.mark.parametrize(
    ("case_id", "ways"),
    [
        ("rms_norm[float32-tokens]", {"the first token alone", "tokens backwards", "tokens twice", "the middle alone"}),
        ("mla_prefill[float32-causal]", {"request 1 alone", "requests backwards", "a request twice"}),
        ("grouped_gemm[float32-ragged]", {"the last row of every expert alone"}),
        ("moe_permute[float32-tokens]", set()),
    ],
)
def test_what_a_batch_is_cut_into(case_id: str, ways: set[str]) -> None:
    (case,) = find([case_id])
    subject = subject_of(case, 0)
    fn = honest.kernel(case.op, lambda a: None)
    with installed(Made(case.op, fn)):
        chosen = runner.replace(next(iter(runner.context.catalogue().kernels("standin", case.op))))
        trial = runner.Trial(case, subject.inputs, chosen, fn, "cpu", subject.expected, None)  # type: ignore[arg-type]
        found = {part.what for part in batch.parts(trial)}
    assert ways <= found
    assert ways or not found


def test_a_padding_token_has_no_slot() -> None:
    (case,) = find(["mla_cache_write[float32-rows-latent_576]"])
    subject = subject_of(case, 0)
    trial = runner.Trial(case, subject.inputs, None, None, "cpu", subject.expected, None)  # type: ignore[arg-type]
    twice = next(p for p in batch.parts(trial) if p.what == "tokens twice")
    assert (twice.args["slot_mapping"][19:] == -1).all()
    assert torch.equal(twice.args["slot_mapping"][:19], subject.inputs.args["slot_mapping"])


def test_what_a_batch_of_some_size_loses_is_missed() -> None:
    right = honest.write()

    def forgets(a: Args) -> Any:
        return None if len(a.kv_c) == 17 else right(a)

    how: dict[str, Any] = {"samples": ("rows-latent_576",)}
    assert caught_by("mla_cache_write", forgets, **how) == {"batch"}
    assert said("mla_cache_write", forgets, "batch", **how).startswith("failed: the middle alone: kv_cache: ")


def test_the_second_copy_of_a_token_is_judged_too() -> None:
    def once(a: Args) -> Any:
        y = honest.rms_norm()(a)
        seen: set[bytes] = set()
        for i, row in enumerate(a.x):
            key = row.contiguous().view(torch.uint8).numpy().tobytes()
            y[i] *= 0 if key in seen else 1
            seen.add(key)
        return y

    how: dict[str, Any] = {"samples": ("tokens",)}
    assert caught_by("rms_norm", once, **how) == {"batch"}
    assert said("rms_norm", once, "batch", **how).startswith("failed: tokens twice: ")


def test_a_kernel_cannot_refuse_a_batch_that_it_has_accepted() -> None:
    def refuses(a: Args) -> Any:
        if len(a.x) == 1:
            raise HalError("SHAPE", "one token is too few", fix="more")
        return honest.rms_norm()(a)

    how: dict[str, Any] = {"samples": ("tokens",)}
    assert caught_by("rms_norm", refuses, **how) == {"batch"}
    assert said("rms_norm", refuses, "batch", **how) == "failed: raised one token is too few"
