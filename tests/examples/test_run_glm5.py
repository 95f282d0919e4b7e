"""examples/run_glm5.py generates on the backend that GLM5_BACKEND names, and says who served what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/run_glm5.py"
TINY = ("--prompt-tokens", "70", "--tokens", "3")
pytest.importorskip("transformers")


def run(*options: str, backend: str = "cpu") -> str:
    env = {**os.environ, "GLM5_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(text: str) -> dict[tuple[str, str], int]:
    """Calls by op and kernel."""
    return {(op, by): int(n) for op, by, n in re.findall(r"^(\w+) +(\w+:\w+) +(\d+) ", text, re.MULTILINE)}


@pytest.mark.parametrize("model", ["glm-5", "glm-5.2", "deepseek-v3.2"])
def test_it_builds_a_small_model_and_says_which_kernel_served_each_op(model: str) -> None:
    text = run("--model", model, *TINY)
    assert "70 tokens of prompt, 3 new ones" in text
    calls = table(text)
    assert calls["sparse_mla", "cpu:torch"] == 4 * 3
    assert calls["lightning_indexer", "cpu:torch"] == (2 if model == "glm-5.2" else 4) * 3


def test_it_runs_on_the_backend_that_is_named() -> None:
    calls = table(run(*TINY, backend="cpu; sparse_mla=cpu:reference"))
    assert ("sparse_mla", "cpu:reference") in calls
    assert ("sparse_mla", "cpu:torch") not in calls


def test_it_loads_a_local_checkpoint(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate("abcde")}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path)
    sizes = {"vocab_size": 5, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": None}
    sizes |= {"num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "intermediate_size": 16}
    torch.manual_seed(0)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**sizes, **rope, pad_token_id=None)).save_pretrained(tmp_path)
    text = run("--checkpoint", str(tmp_path), "--prompt", "a b c", "--tokens", "4", "--dtype", "bfloat16")
    assert "3 tokens of prompt, 4 new ones" in text
    assert re.search(r"^[a-e]( [a-e]){3}$", text, re.MULTILINE)


PLANTED = """
from dataclasses import replace
from functools import wraps
from glm5_hal import Backend, Device, hookimpl
from glm5_hal.backends import _torch

def loses_a_key(right):
    @wraps(right)
    def sparse_mla(q, kv_cache, indices, *args, **kwargs):
        late = indices.clone()
        late[(indices >= 64).any(-1), 0] = -1
        return right(q, kv_cache, late, *args, **kwargs)
    return sparse_mla

def kernels():
    return tuple(replace(k, fn=loses_a_key(k.fn)) if k.op == "sparse_mla" else k for k in _torch.kernels())

@hookimpl
def glm5_backend():
    return Backend("planted", "cpu", lambda: Device("cpu", "planted", "x", evidence="simulated"), kernels)
"""


def installed(folder: Path) -> None:
    """A vendor's package as pip would leave it, with one kernel that loses a key once the context is long."""
    (folder / "planted.py").write_text(PLANTED)
    info = folder / "planted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[glm5_hal.backends]\nplanted = planted\n")


def test_shadow_mode_names_the_op_that_made_the_model_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path)
    found = tmp_path / "shadow.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GLM5_SHADOW", f"*:1;file={found}")
    assert ("sparse_mla", "planted:torch") in table(run(*TINY, backend="planted"))
    monkeypatch.delenv("GLM5_SHADOW")
    told = subprocess.run(
        [sys.executable, "-m", "glm5_hal", "report", str(found), "--json"], capture_output=True, text=True
    )
    assert told.returncode == 1, told.stderr
    worst, *others = json.loads(told.stdout)["ops"]
    assert (worst["op"], worst["kernel"]) == ("sparse_mla", "planted:torch")
    assert worst["failed"] > 0
    assert worst["worst"] > 1
    assert "indices:int32[" in worst["signature"]
    assert {row["failed"] for row in others} == {0}
    assert len(others) >= 10
