"""Small random models of transformers with 32 index heads, their float64 versions, and how runs are compared."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.models.deepseek_v32 import modeling_deepseek_v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa

from glm5_hal import ops
from glm5_hal.ops import specs

VOCAB, TOP_K = 97, 16
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 128,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "qk_nope_head_dim": 20,
    "index_topk": TOP_K,
    "index_head_dim": 32,
    "index_n_heads": 32,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "eos_token_id": None,
    "pad_token_id": None,  # its embedding would be zero, and with it every index score
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
GLM = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SHARED = {"indexer_types": ["full", "shared", "shared", "full"]}
DEEPSEEK = {"rope_parameters": YARN, "n_group": 4, "topk_group": 2}

#: GLM-5, GLM-5.2 with shared indexers, DeepSeek-V3.2 with groups of experts and YaRN.
KINDS = ("glm", "shared", "deepseek")


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, eager, in eval mode. Its biases and gains are random too."""
    torch.manual_seed(seed)
    if kind == "deepseek":
        made: Any = DeepseekV32ForCausalLM(DeepseekV32Config(**{**SIZES, **DEEPSEEK, **changes}))
    else:
        shared = SHARED if kind == "shared" else {}
        made = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**{**SIZES, **GLM, **shared, **changes}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
        for name, buffer in made.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.1 * torch.randn_like(buffer)
    made.set_attn_implementation("eager")
    made.set_experts_implementation("eager")
    return made.eval()


def tokens(batch: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (batch, columns), generator=torch.Generator().manual_seed(1000 + seed))


# --- float64 throughout ----------------------------------------------------------------------------------------------


def _widened(modeling: ModuleType) -> ModuleType:
    """transformers' own module with float64 where it says float32: its norms, rope tables, router, scores, softmax."""
    name = f"{modeling.__name__}_float64"
    if name not in sys.modules:
        text = Path(str(modeling.__file__)).read_text(encoding="utf-8")
        for narrow, wide in (
            ("torch.float32", "torch.float64"),
            (".float()", ".double()"),
            ("torch.float)", "torch.double)"),
        ):
            assert narrow in text
            text = text.replace(narrow, wide)
        spec = importlib.util.spec_from_loader(name, loader=None)
        assert spec is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        module.__package__, module.__file__ = modeling.__package__, modeling.__file__
        exec(compile(text, name, "exec"), module.__dict__)
    return sys.modules[name]


def float64(narrow: Any) -> Any:
    """The same model in float64, with nothing in it computed below that."""
    deepseek = isinstance(narrow, DeepseekV32ForCausalLM)
    module = _widened(modeling_deepseek_v32 if deepseek else modeling_glm_moe_dsa)
    made = getattr(module, type(narrow).__name__)(narrow.config).double()
    made.load_state_dict(narrow.state_dict())
    made.set_attn_implementation("eager")
    made.set_experts_implementation("eager")
    return made.eval()


# --- runs ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: Any, ids: Tensor, steps: int, cache: Any = None) -> tuple[Tensor, Tensor]:
    """Prefill, then ``steps`` cached greedy steps: logits of every column [B, S+steps, V], and the tokens."""
    out = model(ids, past_key_values=cache, use_cache=True)
    logits, chosen = [out.logits], [out.logits[:, -1:].argmax(-1)]
    for _ in range(steps):
        out = model(chosen[-1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
        chosen.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(logits, 1), torch.cat(chosen, 1)


@contextmanager
def gaps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Of every row that an indexer chooses for here: how far the last chosen score is above the first unchosen one, as
    a part of the row's largest score. Rows where nothing is left out have no gap."""
    found: list[float] = []
    indexer, scores_of = ops.lightning_indexer, specs()["lightning_indexer"].accuracy["indices"].scores

    def watched(*args: Any, **kwargs: Any) -> Any:
        call = specs()["lightning_indexer"].bind(*args, **kwargs)
        scores, _ = scores_of(call)
        ranked = scores.sort(-1, descending=True).values
        k = call["top_k"]
        for row in ranked:
            if len(row) > k and row[k] > -torch.inf:
                found.append(float((row[k - 1] - row[k]) / row[row > -torch.inf].abs().max().clamp_min(1e-30)))
        return indexer(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "lightning_indexer", watched)
        yield found
