"""How many parameters, FLOPs and cache bytes a model has, each from one table of what it is made of.

Parameters: :func:`weights` lists every kind of tensor of the checkpoint; all totals are sums over it.
FLOPs: :func:`cost_sheet` lists every matrix product of one token; all totals are sums over it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from glm5_hal.errors import HalError
from glm5_hal.formats import FORMATS
from glm5_hal.params.config import ModelConfig

FLOPS_CONVENTION = (
    "one forward pass of one token through the main model (no MTP layer), 2 FLOPs per multiply-add; attention in the "
    "absorbed decode form; matrix products only: no norms, RoPE, softmax, activations or top-k; the token sees "
    "`context` keys, itself included; the indexer scores all of them even where top-k would keep them all"
)


@dataclass(frozen=True)
class Weight:
    """Equal tensors of the checkpoint: how many there are, and how many of them one token uses."""

    name: str
    component: str
    shape: tuple[int, ...]
    copies: int
    active: int
    mtp: bool = False

    @property
    def total(self) -> int:
        return self.copies * prod(self.shape)

    @property
    def total_active(self) -> int:
        return self.active * prod(self.shape)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. Shared tensors count once: the MTP layer uses the main embedding and lm_head.

    ``main_layers`` and ``active_layers`` are the decoder layers alone; the ``without`` and ``active`` counts add the
    final norm to them. An expert counts as active if the token is routed to it, and every other weight always does.
    """

    total_checkpoint: int
    main: int
    main_without_embedding_and_head: int
    main_layers: int
    mtp: int
    active: int
    active_with_lm_head: int
    active_with_embedding_and_head: int
    active_layers: int
    by_component: dict[str, int]
    active_by_component: dict[str, int]
    mtp_by_component: dict[str, int]


@dataclass(frozen=True)
class Cost:
    """One line of the cost sheet: one token, one run; ``runs`` is the number of layers that have it.

    ``weight_bytes`` is for FP8 block weights as engines hold them (block scales left out): one byte per element, two
    where a matrix stays BF16. ``cache_bytes`` is what is read from FP8 caches (``fp8_656``, ``fp8_132``), None for
    widths that these formats do not have.
    """

    name: str
    flops: int
    weight_bytes: int
    runs: int
    cache_bytes: int | None = 0

    @property
    def total_flops(self) -> int:
        return self.flops * self.runs


@dataclass(frozen=True)
class CacheBytes:
    """Cache bytes per token: in the layers that need the cache, and where an engine allocates it in every layer."""

    format: str
    kind: str
    per_layer: int
    needed: int
    needed_with_mtp: int
    all_layers: int
    all_layers_with_mtp: int


def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Every kind of tensor in the checkpoint, by its name there; ``*`` stands for the layer and expert numbers."""
    c, hidden = config, config.hidden_size
    vocabulary = (c.vocab_size, hidden)
    main = [
        Weight("model.embed_tokens.weight", "embedding", vocabulary, 1, 1),
        *_layers(c, layers=c.num_hidden_layers, full=c.num_full_indexers, sparse=c.num_moe_layers, mtp=False),
        Weight("model.norm.weight", "final_norm", (hidden,), 1, 1),
    ]
    if not c.tie_word_embeddings:
        main.append(Weight("lm_head.weight", "lm_head", vocabulary, 1, 1))
    n = c.num_nextn_predict_layers
    if n == 0:
        return tuple(main)
    extra = {
        "enorm.weight": ("norms", (hidden,)),
        "hnorm.weight": ("norms", (hidden,)),
        "eh_proj.weight": ("eh_proj", (hidden, 2 * hidden)),
        "shared_head.norm.weight": ("norms", (hidden,)),
    }
    # An MTP layer has its own indexer whatever the main layers share, and is always a mixture of experts.
    mtp = _layers(c, layers=n, full=n, sparse=n, mtp=True)
    mtp += [Weight(f"model.layers.*.{name}", part, shape, n, n, True) for name, (part, shape) in extra.items()]
    return (*main, *mtp)


def _layers(c: ModelConfig, *, layers: int, full: int, sparse: int, mtp: bool) -> list[Weight]:
    hidden, heads = c.hidden_size, c.num_attention_heads
    found: list[Weight] = []

    def add(component: str, copies: int, shapes: dict[str, tuple[int, ...]], active: int | None = None) -> None:
        used = copies if active is None else active
        found.extend(
            Weight(f"model.layers.*.{n}", component, s, copies, used, mtp) for n, s in shapes.items() if copies
        )

    mla: dict[str, tuple[int, ...]] = {
        "self_attn.q_a_proj.weight": (c.q_lora_rank, hidden),
        "self_attn.q_a_layernorm.weight": (c.q_lora_rank,),
        "self_attn.q_b_proj.weight": (heads * c.qk_head_dim, c.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (c.kv_lora_rank + c.qk_rope_head_dim, hidden),
        "self_attn.kv_a_layernorm.weight": (c.kv_lora_rank,),
        "self_attn.kv_b_proj.weight": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "self_attn.o_proj.weight": (hidden, heads * c.v_head_dim),
    }
    if c.attention_bias:
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            mla[f"self_attn.{name}.bias"] = mla[f"self_attn.{name}.weight"][:1]
    add("mla", layers, mla)
    indexer: dict[str, tuple[int, ...]] = {
        "self_attn.indexer.wq_b.weight": (c.index_n_heads * c.index_head_dim, c.q_lora_rank),
        "self_attn.indexer.wk.weight": (c.index_head_dim, hidden),
        "self_attn.indexer.k_norm.weight": (c.index_head_dim,),
        "self_attn.indexer.k_norm.bias": (c.index_head_dim,),
        "self_attn.indexer.weights_proj.weight": (c.index_n_heads, hidden),
    }
    add("indexer", full, indexer)
    add("norms", layers, {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)})
    add("dense_mlp", layers - sparse, _swiglu("mlp.", hidden, c.intermediate_size))
    router: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (c.n_routed_experts, hidden),
        "mlp.gate.e_score_correction_bias": (c.n_routed_experts,),
    }
    add("router", sparse, router)
    expert = _swiglu("mlp.experts.*.", hidden, c.moe_intermediate_size)
    add("routed_experts", sparse * c.n_routed_experts, expert, active=sparse * c.num_experts_per_tok)
    shared = _swiglu("mlp.shared_experts.", hidden, c.moe_intermediate_size * c.n_shared_experts)
    add("shared_experts", sparse if c.n_shared_experts else 0, shared)
    return found


def _swiglu(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


def parameters(config: ModelConfig) -> Parameters:
    """Exact parameter counts, router biases included."""
    table = weights(config)
    main = [w for w in table if not w.mtp]
    by_component = _sum((w.component, w.total) for w in main)
    active = _sum((w.component, w.total_active) for w in main)
    mtp = _sum((w.component, w.total) for w in table if w.mtp)
    # A tied lm_head is no tensor of its own, but the token is multiplied by it all the same.
    matrix = by_component["embedding"]
    outside = matrix + by_component.get("lm_head", 0)
    without = sum(by_component.values()) - outside
    active_without = sum(active.values()) - outside
    return Parameters(
        total_checkpoint=sum(w.total for w in table),
        main=without + outside,
        main_without_embedding_and_head=without,
        main_layers=without - by_component["final_norm"],
        mtp=sum(mtp.values()),
        active=active_without,
        active_with_lm_head=active_without + matrix,
        active_with_embedding_and_head=active_without + outside,
        active_layers=active_without - active["final_norm"],
        by_component=by_component,
        active_by_component=active,
        mtp_by_component=mtp,
    )


def _sum(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, value in pairs:
        sums[key] = sums.get(key, 0) + value
    return sums


def cost_sheet(config: ModelConfig, context: int) -> tuple[Cost, ...]:
    """What one token costs that sees ``context`` keys, itself included. :data:`FLOPS_CONVENTION` says what counts."""
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise HalError("CONFIG", f"context is {context!r}, not a positive integer", value=context, fix="give >= 1 keys")
    c, hidden, heads, latent = config, config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    layers, full, sparse = c.num_hidden_layers, c.num_full_indexers, c.num_moe_layers
    keys = min(context, c.index_topk)
    row = latent + c.qk_rope_head_dim

    def gemm(name: str, elements: int, runs: int, *, bytes_each: int = 1) -> Cost:
        return Cost(name, 2 * elements, elements * bytes_each, runs)

    expert = 3 * hidden * c.moe_intermediate_size
    index_flops = 2 * c.index_n_heads * c.index_head_dim * context
    attention_flops = 2 * heads * (row + latent) * keys
    return (
        gemm("q_a + kv_a", (c.q_lora_rank + row) * hidden, layers),
        gemm("q_b", heads * c.qk_head_dim * c.q_lora_rank, layers),
        gemm("indexer wq_b", c.index_n_heads * c.index_head_dim * c.q_lora_rank, full),
        # weights_proj is BF16 in the checkpoint; engines widen wk to fuse the two.
        gemm("indexer wk + weights_proj", (c.index_head_dim + c.index_n_heads) * hidden, full, bytes_each=2),
        gemm("absorb W_UK", heads * c.qk_nope_head_dim * latent, layers),
        Cost("index logits", index_flops, 0, full, _read("fp8_132", context, c)),
        Cost("sparse attention", attention_flops, 0, layers, _read("fp8_656", keys, c)),
        gemm("W_UV", heads * latent * c.v_head_dim, layers),
        gemm("o_proj", hidden * heads * c.v_head_dim, layers),
        gemm("router", c.n_routed_experts * hidden, sparse, bytes_each=2),
        gemm("routed experts", c.num_experts_per_tok * expert, sparse),
        gemm("shared experts", c.n_shared_experts * expert, sparse),
        gemm("dense MLP", 3 * hidden * c.intermediate_size, c.num_dense_layers),
        gemm("lm_head", c.vocab_size * hidden, 1, bytes_each=2),
    )


def kv_cache_bytes(config: ModelConfig) -> dict[str, CacheBytes]:
    """Bytes per token in each named format, for BF16 activations; without the formats that refuse the widths."""
    layers, mtp = config.num_hidden_layers, config.num_nextn_predict_layers
    found = {}
    for name, cache in FORMATS.items():
        row = _row_bytes(name, config)
        if row is not None:
            need = config.num_full_indexers if cache.kind == "index" else layers
            found[name] = CacheBytes(name, cache.kind, *(row * n for n in (1, need, need + mtp, layers, layers + mtp)))
    return found


def _row_bytes(name: str, config: ModelConfig) -> int | None:
    """Bytes of one token in one layer, None if the format cannot hold the model's widths."""
    index = FORMATS[name].kind == "index"
    dims = (config.index_head_dim,) if index else (config.kv_lora_rank, config.qk_rope_head_dim)
    try:
        return FORMATS[name].bytes_per_token(*dims)
    except HalError:
        return None


def _read(name: str, keys: int, config: ModelConfig) -> int | None:
    row = _row_bytes(name, config)
    return None if row is None else row * keys
