"""vllm-gcu's ops with vLLM's names as kernels of ours, by their schemas and host code at 7b5aaca. What they compute is
in a closed library, and taken to be what vLLM's do."""

from __future__ import annotations

from glm5_hal.backends._libraries.vllm_ops import declared

rms_norm, add_rms_norm, silu_and_mul, mla_cache_write = declared("vllm_gcu")
