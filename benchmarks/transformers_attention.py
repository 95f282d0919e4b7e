"""The attention block of transformers' GLM-5, as it is and with `apply` on, at GLM-5's real widths on a CPU.

One request. Both run in one process and one dtype on the same weights and the same cached tokens, in turns; each time
is the least of several, and their outputs are compared. One new token is timed twice: a single layer, where each call
finds its code and its page tables driven out of the caches by the call of another way before it; and layer after layer,
as a step of decoding runs, each with weights of its own that come from memory. Peak memory is that of a process of its
own for each of the ways: resident memory at its peak during one pass less what was resident before it.

The core is what turns projected queries and the cached latents into head outputs: transformers' expands all latents,
masks and attends; ours multiplies the queries by W_UK, attends to the chosen latents and multiplies by W_UV. The limit
of decoding is the block's weights over the measured rate of reading memory.

    python benchmarks/transformers_attention.py [--json] [--dtype bfloat16|float32] [--threads N] [--repeat N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from _measure import grown, least, rates
from torch import Tensor

WIDTHS: dict[str, Any] = {
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
#: What is not measured is small.
REST = {"vocab_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 1}
CACHED, PREFILL = 4096, 2048
#: Layers of a pass: four times the weights of the core are more than caches hold.
LAYERS = 4
WAYS = ("eager", "sdpa", "ours")

#: A pass by each way.
Turns = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Result:
    """Times in ms by way; the ratio is the faster of transformers' two over ours."""

    what: str
    dtype: str
    ms: dict[str, float]
    ratio: float
    difference: float


def decoder(dtype: torch.dtype) -> Any:
    from transformers import GlmMoeDsaConfig, GlmMoeDsaModel

    torch.manual_seed(0)
    with torch.device("meta"):
        made = GlmMoeDsaModel(GlmMoeDsaConfig(**WIDTHS, **REST, pad_token_id=None)).to(dtype)
    made = made.to_empty(device="cpu").eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        fan_in = parameter.shape[-1]
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, fan_in**-0.5)
    made.rotary_emb = type(made.rotary_emb)(made.config)
    return made


class Block:
    """One attention block, its inputs, and a cache for each way to run it."""

    def __init__(self, dtype: torch.dtype, tokens: int, cached: int) -> None:
        from transformers import DynamicCache

        from glm5_hal.integrations.transformers import PagedCache, apply

        self.model = apply(decoder(dtype))
        self.x = torch.randn(1, tokens, WIDTHS["hidden_size"], dtype=dtype)
        self.tokens, self.cached = tokens, cached
        L, R, D = (WIDTHS[name] for name in ("kv_lora_rank", "qk_rope_head_dim", "index_head_dim"))
        latent, rope, keys = (torch.randn(cached, width).to(dtype) for width in (L, R, D))
        self.paged = PagedCache(self.model, batch_size=1, max_length=cached + tokens)
        self.theirs = DynamicCache(config=self.model.config)
        if cached:
            self.paged.latent[0][0].flatten(0, 1)[self._slots()] = torch.cat([latent, rope], 1)
            self.paged.index[0].flatten(0, 1)[self._slots()] = keys
            self.paged.seen = cached
            self.theirs.update(latent[None, None], apart(rope)[None, None], 0)
            self.theirs.update_indexer(torch.cat([apart(keys[:, :R]), keys[:, R:]], 1)[None], 0)

    def _slots(self) -> Tensor:
        table, page = self.paged.block_table[0].long(), self.paged.layout.page_size
        places = torch.arange(self.cached)
        return table[places // page] * page + places % page

    def prepared(self, way: str) -> Callable[[], Tensor]:
        """A pass of this way, to be called again and again: each leaves the cache as it was."""
        return self._ours() if way == "ours" else self._transformers(way)

    def _ours(self) -> Callable[[], Tensor]:
        from glm5_hal.integrations.transformers import forwards
        from glm5_hal.integrations.transformers.step import active

        module = self.model.layers[0].self_attn

        def run() -> Tensor:
            if not self.cached:
                self.paged.reset()
            at = forwards.begin(self.model.rotary_emb, self.paged, 1, self.tokens, None, None)
            with active(at.step):
                out: Tensor = module(self.x, at=at, chosen=None)[0]
            return out

        return run

    def _transformers(self, way: str) -> Callable[[], Tensor]:
        from transformers.masking_utils import create_causal_mask

        module = self.model.layers[0].self_attn
        positions = torch.arange(self.cached, self.cached + self.tokens)[None]

        def run() -> Tensor:
            self.model.config._attn_implementation = way
            mask = create_causal_mask(
                config=self.model.config, inputs_embeds=self.x, attention_mask=None, past_key_values=self.theirs,
                position_ids=positions, allow_is_causal_skip=False,
            )  # fmt: skip
            tables = self.model.rotary_emb(self.x, position_ids=positions)
            # The class's own forward: the instance has ours.
            out: Tensor = type(module).forward(
                module, self.x, tables, mask, past_key_values=self.theirs, position_ids=positions
            )[0]
            self.theirs.crop(-self.tokens)
            return out

        return run

    def cores(self) -> Turns:
        """Head outputs from projected queries, one new token."""
        from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as modeling

        from glm5_hal import ops
        from glm5_hal.ops._common.products import multiply

        module = self.model.layers[0].self_attn
        ours, keys = module._glm5_hal, self.theirs.layers[0]
        w_uk, R = ours.weights["w_uk"], WIDTHS["qk_rope_head_dim"]
        (H, K, L), dtype, scale = w_uk.shape, self.x.dtype, ours.scale
        q_nope, q_rope = torch.randn(1, H, K).to(dtype), torch.randn(1, H, R).to(dtype)
        chosen = torch.randperm(self.cached)[: WIDTHS["index_topk"]].sort().values.int()[None]
        held, table = self.paged.latent[0][0], self.paged.block_table
        lens, cu = torch.tensor([self.cached], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        query = torch.cat([q_nope, apart(q_rope)], -1)[:, :, None]

        def absorbed() -> Tensor:
            q = torch.cat([multiply(q_nope.transpose(0, 1), w_uk).transpose(0, 1), q_rope], -1)
            z, _ = ops.sparse_mla(q, held, chosen, table, lens, cu, scale=scale, kv_lora_rank=L)
            return multiply(z.transpose(0, 1), ours.w_uv).transpose(0, 1).flatten()

        def expanded(attend: Callable[..., Any]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                k, v = module.expand_kv(keys.keys, keys.values)
                away = chosen.new_ones((1, 1, self.cached), dtype=torch.bool).scatter(-1, chosen[None].long(), False)
                mask = torch.zeros(1, 1, 1, self.cached, dtype=dtype).masked_fill(away[:, None], torch.finfo(dtype).min)
                out: Tensor = attend(module, query, k, v, mask, scaling=scale)[0]
                return out.flatten()

            return run

        sdpa = modeling.ALL_ATTENTION_FUNCTIONS["sdpa"]
        return {"eager": expanded(modeling.eager_attention_forward), "sdpa": expanded(sdpa), "ours": absorbed}


def apart(x: Tensor) -> Tensor:
    """The rope dims as transformers keeps them: what belongs to the pairs' first halves first."""
    return torch.cat([x[..., ::2], x[..., 1::2]], -1)


# --- time ------------------------------------------------------------------------------------------------------------


def result(what: str, dtype: torch.dtype, calls: Turns, repeat: int) -> Result:
    seconds, outs = least(calls, repeat)
    ms = {way: 1e3 * taken for way, taken in seconds.items()}
    theirs = outs["eager"].float()
    difference = float((outs["ours"].float() - theirs).norm() / theirs.norm())
    return Result(what, str(dtype)[6:], ms, min(ms["eager"], ms["sdpa"]) / ms["ours"], difference)


def after_another(what: str, dtype: torch.dtype, layers: Sequence[Turns], repeat: int) -> Result:
    """A pass through all layers, per layer."""

    def passing(way: str) -> Callable[[], Tensor]:
        return lambda: [layer[way]() for layer in layers][-1]

    one = result(what, dtype, {way: passing(way) for way in WAYS}, repeat)
    return replace(one, ms={way: ms / len(layers) for way, ms in one.ms.items()})


def turns(block: Block) -> Turns:
    """Each way's pass over the same weights, inputs and cached tokens."""
    return {way: block.prepared(way) for way in WAYS}


# --- memory ----------------------------------------------------------------------------------------------------------


def growth(way: str, dtype: torch.dtype) -> float:
    """MB by which one prefill pushes this process's memory up."""
    small = Block(dtype, 16, 0)
    small.prepared(way)()
    run = Block(dtype, PREFILL, 0).prepared(way)
    del small
    return grown(run)[0] / 2**20


def growths(dtype: str, threads: int) -> dict[str, float]:
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--growth", way, "--dtype", dtype, "--threads", str(threads)]
        found[way] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--growth", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    with torch.no_grad():
        if options.growth:
            print(growth(options.growth, dtype))
            return
        report(options, dtype)


def report(options: argparse.Namespace, dtype: torch.dtype) -> None:
    decode = [Block(dtype, 1, CACHED) for _ in range(LAYERS)]
    rows = []
    for part, layers in (("core", [b.cores() for b in decode]), ("block", [turns(b) for b in decode])):
        rows.append(result(f"{part}, 1 token, {CACHED} cached", dtype, layers[0], options.repeat))
        rows.append(after_another(f"{part}, layer after layer", dtype, layers, options.repeat))
    weights = sum(p.numel() * p.element_size() for p in decode[0].model.layers[0].self_attn.parameters())
    del decode, layers
    rows.append(result(f"block, prefill of {PREFILL}", dtype, turns(Block(dtype, PREFILL, 0)), min(options.repeat, 3)))
    memory = growths(options.dtype, options.threads)
    machine = rates(options.repeat)
    bound = weights / machine["read GB/s"] / 1e6
    if options.json:
        print(
            json.dumps({"rows": [asdict(r) for r in rows], "prefill_MB": memory, "machine": machine, "bound_ms": bound})
        )
        return
    for row in rows:
        times = "  ".join(f"{way} {ms:8.2f} ms" for way, ms in row.ms.items())
        print(f"{row.what:28} {row.dtype:9} {times}  {row.ratio:6.1f}x  differ by {row.difference:.1e}")
    print(f"peak of the prefill, MB      {options.dtype:9} " + "  ".join(f"{w} {mb:11.0f}" for w, mb in memory.items()))
    print(f"the block's weights at {machine['read GB/s']:.1f} GB/s: {bound:.1f} ms; products: {machine}")


if __name__ == "__main__":
    main()
