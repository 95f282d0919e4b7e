"""Generate with transformers' GLM-5 on the backend that GLM5_BACKEND names, and say which kernel served each op.

Without a checkpoint it builds a small random model of the same class: the tokens mean nothing, every operator runs.

    python examples/run_glm5.py
    GLM5_BACKEND="cpu; sparse_mla=cpu:reference" python examples/run_glm5.py --model deepseek-v3.2
    python examples/run_glm5.py --checkpoint FOLDER --prompt "Hello" --dtype bfloat16
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

import glm5_hal
from glm5_hal.integrations.transformers import apply

SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 64,
    "first_k_dense_replace": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "glm-5": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM, {}),
    "glm-5.2": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM, {"indexer_types": ["full", "shared", "shared", "full"]}),
    "deepseek-v3.2": (DeepseekV32Config, DeepseekV32ForCausalLM, {"n_group": 4, "topk_group": 2}),
}


def main() -> None:
    options = parsed()
    torch.manual_seed(options.seed)
    model, ids, decode = loaded(options) if options.checkpoint else built(options)
    apply(model)
    glm5_hal.watch(counters=True)
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=options.tokens, do_sample=False)
    seconds = time.perf_counter() - start
    counted = glm5_hal.counts()
    glm5_hal.watch()
    print(f"{ids.shape[1]} tokens of prompt, {out.shape[1] - ids.shape[1]} new ones in {seconds:.2f} s")
    print(decode(out[0, ids.shape[1] :]))
    print(f"\n{'op':20} {'served by':16} {'calls':>7} {'ms in all':>10} {'ms each':>9}")
    for name, row in sorted(counted.items(), key=lambda item: -item[1]["seconds"]):
        op, kernel = name.rstrip("]").split("[")
        spent = 1e3 * row["seconds"]
        print(f"{op:20} {kernel:16} {row['calls']:7d} {spent:10.2f} {spent / row['calls']:9.4f}")
    print("\nAn op that is made of others (mla_prolog, moe_experts) includes their time.")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a local folder of a GLM-5 or DeepSeek-V3.2 checkpoint")
    parser.add_argument("--model", choices=MODELS, default="glm-5", help="the small model to build otherwise")
    parser.add_argument("--prompt", default="Hello", help="for a checkpoint; the small model gets random tokens")
    parser.add_argument("--prompt-tokens", type=int, default=100, help="for the small model")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def built(options: argparse.Namespace) -> tuple[Any, torch.Tensor, Any]:
    config, model, changes = MODELS[options.model]
    made = model(config(**{**SMALL, **changes})).eval()
    made = made.to(options.device, getattr(torch, options.dtype))
    ids = torch.randint(SMALL["vocab_size"], (1, options.prompt_tokens), device=options.device)
    return made, ids, lambda new: f"tokens: {new.tolist()}"


def loaded(options: argparse.Namespace) -> tuple[Any, torch.Tensor, Any]:
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=getattr(torch, options.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids.to(options.device)
    return model.eval().to(options.device), ids, tokenizer.decode


if __name__ == "__main__":
    main()
