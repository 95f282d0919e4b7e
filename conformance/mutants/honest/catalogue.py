"""Every op's honest kernels, by what is particular about them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from glm5_hal.conformance.mutants import honest

#: What they take: they compute in fp32, so float64 is not theirs.
DTYPES = ("float32", "bfloat16", "float16")

CLAIMED = ("deterministic",)
SORTED = ("deterministic", "sorted_indices")
CANONICAL = ("deterministic", "sorted_indices", "canonical_ties")


def reverse(at: torch.Tensor) -> torch.Tensor:
    return at.flip(0)


def valid(order: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda row, keys: order(row[row >= 0].long())


def shuffled(row: torch.Tensor, k: int) -> torch.Tensor:
    """The best, in no order; among equals, whichever (but the same at every call)."""
    generator = torch.Generator().manual_seed(len(row))
    order = torch.randperm(len(row), generator=generator)
    best = order[row[order].argsort(descending=True)[:k]]
    return best[torch.randperm(len(best), generator=generator)]


def torch_topk(row: torch.Tensor, k: int) -> torch.Tensor:
    return row.topk(min(k, len(row))).indices


def in_double(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    return honest.rope_complex(x.double(), cos.double(), sin.double(), layout).float()


FUSED = honest.Prolog(keep=True)
SEQUENTIAL = honest.Prolog(product=honest.sequential, turn=honest.rope_complex, norm=honest.NORMS["1/sqrt, sequential"])
BLOCKED = honest.Prolog(product=honest.blocked, norm=honest.NORMS["rounded before the weight"], turn=in_double)
PARTLY = honest.Prolog(keep=True, product=honest.halving, norm=honest.NORMS["in double"])

#: By op: name -> (body, claims).
HONEST: dict[str, dict[str, tuple[honest.Body, tuple[str, ...]]]] = {
    "rms_norm": {name: (honest.rms_norm(norm), CLAIMED) for name, norm in honest.NORMS.items()},
    "add_rms_norm": {
        f"{name}, of the {'stored' if stored else 'fp32'} sum": (honest.add_rms_norm(norm, stored), CLAIMED)
        for name, norm in honest.NORMS.items()
        for stored in (True, False)
    },
    "rope": {
        "by parts": (honest.rope(), CLAIMED),
        "complex": (honest.rope(honest.rope_complex), CLAIMED),
        "in double": (honest.rope(wide=torch.float64), CLAIMED),
    },
    "silu_and_mul": {
        "torch": (honest.silu_and_mul(), CLAIMED),
        "by division": (honest.silu_and_mul(honest.silu_by_division), CLAIMED),
        "by tanh": (honest.silu_and_mul(honest.silu_by_tanh), CLAIMED),
        "base 2, rounded twice": (honest.silu_and_mul(honest.silu_base_2, twice=True), CLAIMED),
    },
    "hadamard": {
        "matrix": (honest.hadamard(), CLAIMED),
        "scale first": (honest.hadamard(scale_first=True), CLAIMED),
        "sequential": (honest.hadamard(product=honest.sequential), CLAIMED),
        "pairwise": (honest.hadamard(product=honest.halving, scale_first=True), CLAIMED),
    },
    "mla_decode": {
        **{name: (honest.decode(how), CLAIMED) for name, how in honest.WAYS.items()},
        "keys backwards": (honest.decode(honest.WAYS["p stored, exact sum, tiles of 8"], order=reverse), CLAIMED),
    },
    "sparse_mla": {
        **{name: (honest.sparse(how), CLAIMED) for name, how in honest.WAYS.items()},
        "keys backwards": (
            honest.sparse(honest.WAYS["p stored, exact sum, tiles of 8"], chosen=valid(reverse)),
            CLAIMED,
        ),
        "keys by size of index": (
            honest.sparse(honest.WAYS["base 2, scale in q"], chosen=valid(lambda at: at.sort(descending=True).values)),
            CLAIMED,
        ),
    },
    "mla_prefill": {name: (honest.prefill(how), CLAIMED) for name, how in honest.WAYS.items()},
    "indexer_logits": {
        "matmul": (honest.logits(), CLAIMED),
        "sequential": (honest.logits(honest.sequential, heads=honest.heads_reversed), CLAIMED),
        "pairwise": (honest.logits(honest.halving, scale_last=True), CLAIMED),
        "sizes in the scores, signs in the sum": (honest.logits(honest.einsum, heads=honest.sign_and_size), CLAIMED),
        "key scale after the heads": (honest.logits(honest.blocked, scale_last=True), CLAIMED),
        "in double": (honest.logits(honest.in_double), CLAIMED),
    },
    "topk_indices": {
        "sort": (honest.topk(), CANONICAL),
        "partition": (honest.topk(honest.by_partition), SORTED),
        "last of equals": (honest.topk(honest.last_of_ties), SORTED),
        "torch, best first": (honest.topk(torch_topk, ascending=False), CLAIMED),
        "shuffled": (honest.topk(shuffled, ascending=False), CLAIMED),
    },
    "lightning_indexer": {
        "sort": (honest.indexer(), CANONICAL),
        "partition, sequential": (
            honest.indexer(honest.logits(honest.sequential, scale_last=True), honest.topk(honest.by_partition)),
            SORTED,
        ),
        "shuffled, heads backwards": (
            honest.indexer(honest.logits(heads=honest.heads_reversed), honest.topk(shuffled, ascending=False)),
            CLAIMED,
        ),
        "last of equals": (honest.indexer(choose=honest.topk(honest.last_of_ties)), SORTED),
    },
    "mla_cache_write": {
        "by bits": (honest.write(), CLAIMED),
        "by log2": (honest.write(honest.Quantiser(power=honest.power_by_log2)), CLAIMED),
        "by the reciprocal": (honest.write(honest.Quantiser(divide=lambda x, s: x * (1 / s))), CLAIMED),
    },
    "index_cache_write": {
        "by bits": (honest.write(), CLAIMED),
        "by log2": (honest.write(honest.Quantiser(power=honest.power_by_log2)), CLAIMED),
        "by the reciprocal": (honest.write(honest.Quantiser(divide=lambda x, s: x * (1 / s))), CLAIMED),
    },
    "mla_prolog": {
        "as the contract": (honest.mla_prolog(), CLAIMED),
        "fused": (honest.mla_prolog(FUSED), CLAIMED),
        "sequential": (honest.mla_prolog(SEQUENTIAL), CLAIMED),
        "blocked": (honest.mla_prolog(BLOCKED), CLAIMED),
        "fused, pairwise, norms in double": (honest.mla_prolog(PARTLY), CLAIMED),
    },
    "indexer_prolog": {
        "as the contract": (honest.indexer_prolog(), CLAIMED),
        "fused": (honest.indexer_prolog(FUSED), CLAIMED),
        "sequential": (honest.indexer_prolog(SEQUENTIAL, norm=honest.layer_norm_by_moments), CLAIMED),
        "blocked": (honest.indexer_prolog(BLOCKED), CLAIMED),
        "fused, pairwise": (honest.indexer_prolog(PARTLY, norm=honest.layer_norm_by_moments), CLAIMED),
    },
    "moe_route": {
        "sort": (honest.route(), ("deterministic", "canonical_ties")),
        "torch": (honest.route(torch.sigmoid, torch_topk, normalise=lambda w: w * (1 / (w.sum() + 1e-20))), CLAIMED),
        "partition": (honest.route(best=honest.by_partition), CLAIMED),
        "last of equals": (honest.route(best=honest.last_of_ties), CLAIMED),
        "sequential normalisation": (
            honest.route(normalise=lambda w: w / (honest.sequential_sum(w.flip(0)[None]) + 1e-20)),
            CLAIMED,
        ),
    },
    "moe_permute": {"counting": (honest.permute(), CLAIMED)},
    "grouped_gemm": {
        "fp32": (honest.gemm(), CLAIMED),
        "native": (honest.gemm(native=True), CLAIMED),
        "sequential": (honest.gemm(honest.sequential), CLAIMED),
        "blocked": (honest.gemm(honest.blocked), CLAIMED),
    },
    "moe_combine": {
        "in order": (honest.combine(), CLAIMED),
        "backwards, shared first": (honest.combine(backwards=True, shared_first=True), CLAIMED),
    },
    "moe_experts": {
        "fused": (honest.experts(), CLAIMED),
        "stored between": (honest.experts(keep=False, product=honest.blocked), CLAIMED),
        "sequential": (honest.experts(keep=False, product=honest.sequential), CLAIMED),
    },
}
