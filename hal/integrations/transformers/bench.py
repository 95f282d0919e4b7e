"""A model's layers at their real widths, timed: which kernel serves each op, how often, and how long it takes.

One dense and one sparse layer are built with random weights, and a cache that holds ``context`` tokens already. All
widths are the model's own, but for the number of experts: 256 of them would take 19 GB a layer. A token of a batch of
one has eight anyway, so its time is that of the whole layer; larger batches would touch more of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import glm5_hal
from glm5_hal import context as policies
from glm5_hal.errors import HalError, suggest
from glm5_hal.integrations.transformers import PagedCache, apply
from glm5_hal.params import config as configs

if TYPE_CHECKING:
    from rich.console import RenderableType

#: What is no layer stays small.
VOCABULARY = 64

#: Passes before the first one that counts: caches grow, calls are resolved.
WARM = 2


@dataclass(frozen=True)
class OpTime:
    """One op in all timed passes. ``seconds`` is host time; a composite's includes that of its parts."""

    op: str
    kernel: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class ModelBench:
    """Median seconds of one pass through the two layers, and the time of each op over all passes."""

    model: str
    device: str
    dtype: str
    threads: int
    batch: int
    tokens: int
    context: int
    experts: int
    passes: int
    seconds: float
    ops: tuple[OpTime, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: str,
    *,
    backend: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    context: int = 4096,
    batch: int = 1,
    tokens: int = 1,
    experts: int = 8,
    passes: int = 5,
) -> ModelBench:
    """Time passes of ``tokens`` new tokens for each of ``batch`` rows with ``context`` cached ones.

    Args:
        model: "glm-5", "glm-5.2", "deepseek-v3.2" or the path of a config.json.
        backend: a policy, as in GLM5_BACKEND; None for the one in force.
        dtype, device: of weights and activations.
        experts: routed experts to build.
        passes: how many are timed.

    Raises:
        HalError: CONFIG for a model that is none or counts that do not fit; what apply and the ops raise.
    """
    if min(context, batch, tokens - 1, passes - 1) < 0 or batch < 1:
        fix = "context is at least 0; batch, tokens and passes at least 1"
        raise HalError("CONFIG", f"context={context}, batch={batch}, tokens={tokens}, passes={passes}", fix=fix)
    with torch.no_grad(), policies.use(backend) if backend else nullcontext():
        decoder = apply(_decoder(model, getattr(torch, dtype), torch.device(device), experts))
        cache = _filled(decoder, batch, context, tokens)
        ids = torch.randint(VOCABULARY, (batch, tokens), device=device)
        glm5_hal.watch(counters=True)
        for _ in range(WARM):
            _timed(decoder, ids, cache)
        glm5_hal.clear_counts()
        spent = sorted(_timed(decoder, ids, cache) for _ in range(passes))
        counted = glm5_hal.counts()
        glm5_hal.watch()
    rows = [OpTime(*_parted(name), row["calls"], row["seconds"]) for name, row in counted.items()]
    return ModelBench(
        model, device, dtype, torch.get_num_threads(), batch, tokens, context, experts, passes,
        spent[passes // 2], tuple(sorted(rows, key=lambda r: -r.seconds)),
    )  # fmt: skip


def _timed(decoder: Any, ids: torch.Tensor, cache: PagedCache) -> float:
    """Seconds of one pass, after which the cache is as it was."""
    _wait(ids.device)
    start = time.perf_counter()
    decoder(ids, past_key_values=cache)
    _wait(ids.device)
    spent = time.perf_counter() - start
    cache.crop(-ids.shape[1])
    return spent


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _parted(name: str) -> tuple[str, str]:
    op, _, kernel = name.rstrip("]").partition("[")
    return op, kernel


def _decoder(model: str, dtype: torch.dtype, device: torch.device, experts: int) -> Any:
    """A dense and a sparse layer of the model, weights random, nothing learnt."""
    from transformers import DeepseekV32Config, DeepseekV32Model, GlmMoeDsaConfig, GlmMoeDsaModel

    kinds = {"glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaModel), "deepseek_v32": (DeepseekV32Config, DeepseekV32Model)}
    values = _values(model)
    kind = values.get("model_type")
    if kind not in kinds:
        raise HalError(
            "CONFIG", f"{model}: model_type {kind!r} has no layers here", value=kind, fix=suggest(str(kind), kinds)
        )
    active = values["num_experts_per_tok"]
    if not active <= experts <= values["n_routed_experts"]:
        fix = f"between {active}, which every token uses, and {values['n_routed_experts']}"
        raise HalError("CONFIG", f"{experts} experts", value=experts, fix=fix)
    config_class, decoder_class = kinds[kind]
    lists = {"mlp_layer_types": ["dense", "sparse"]} | (
        {"indexer_types": ["full"] * 2} if "indexer_types" in values else {}
    )
    config = config_class(
        **{
            **values,
            **lists,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "vocab_size": VOCABULARY,
            "n_routed_experts": experts,
            "n_group": 1,
            "topk_group": 1,
            "pad_token_id": None,
        }
    )
    with torch.device("meta"):
        made = decoder_class(config).to(dtype)
    made = made.to_empty(device=device).eval().requires_grad_(False)
    for name, tensor in made.named_parameters():
        tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, tensor.shape[-1] ** -0.5)
    for name, tensor in made.named_buffers():
        if "bias" in name:
            tensor.zero_()
    made.rotary_emb = type(made.rotary_emb)(config).to(device)
    return made


def _values(model: str) -> Mapping[str, Any]:
    """The config.json as it stands; a built-in one by its name."""
    configs.load(model)  # says what is wrong with a name or a file
    known = configs.BUILT_IN.get(model.casefold())
    path = Path(configs.__file__).with_name("configs") / known if known else Path(model)
    text = (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _filled(decoder: Any, batch: int, context: int, tokens: int) -> PagedCache:
    """A cache with ``context`` random tokens in every row, and room for more."""
    cache = PagedCache(decoder, batch_size=batch, max_length=context + tokens)
    for tensor in (*(t for held in cache.latent for t in held), *(t for t in cache.index if t is not None)):
        if tensor.is_floating_point():
            tensor.normal_()
        else:
            tensor.fill_(0x30)  # e4m3 codes of 0.5, scales of 6e-10: small, and nowhere NaN
    cache.seen = context
    return cache


def render(found: ModelBench) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    shown = Table("op", "kernel", header_style="bold")
    for column in ("calls a pass", "ms a call", "ms a pass", "share"):
        shown.add_column(column, justify="right")
    for row in found.ops:
        each = row.seconds / found.passes
        shown.add_row(
            row.op, row.kernel, f"{row.calls / found.passes:g}", f"{1e3 * row.seconds / row.calls:.3f}",
            f"{1e3 * each:.3f}", f"{each / found.seconds:.0%}",
        )  # fmt: skip
    head = (
        f"{found.model}, {found.dtype} on {found.device}, {found.threads} threads: a dense and a sparse layer, "
        f"{found.batch} x {found.tokens} tokens after {found.context} cached, {found.experts} experts built"
    )
    tail = (
        f"one pass: {1e3 * found.seconds:.2f} ms (median of {found.passes}). An op made of others includes their time; "
        "what no op does (projections, residuals) has no row."
    )
    return Group(head, shown, tail)
