"""mcoplib's ops with vLLM's names as kernels of ours, by their schemas, host code and kernels at f722323."""

from __future__ import annotations

from glm5_hal.backends._libraries.vllm_ops import declared

rms_norm, add_rms_norm, silu_and_mul, mla_cache_write = declared("mcoplib")
