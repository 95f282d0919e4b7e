"""GLM-5 and DeepSeek-V3.2 of Hugging Face transformers, run through the operators.

>>> from glm5_hal.integrations.transformers import apply, remove
>>> apply(model)                    # attention, indexer, router, experts, MLPs and norms now dispatch to the backend
>>> model.generate(**inputs)        # as before: batches, padding, beams, chunked prefill, assisted generation
>>> remove(model)                   # the model is what it was, bit for bit

With the draft layer of its checkpoint the model makes several tokens per pass, and the same ones:

>>> mtp = load_mtp(model, folder)
>>> speculate(model, mtp, **inputs, max_new_tokens=256).sequences

`PagedCache` is the cache that takes the place of transformers' own; `generate` makes one by itself. What the operators
cannot do (gradients, 4D masks, attention weights as an output) raises a `HalError` and never falls back.
"""

from __future__ import annotations

from glm5_hal.integrations.transformers.cache import PagedCache
from glm5_hal.integrations.transformers.checkpoint import load_mtp
from glm5_hal.integrations.transformers.models import apply, remove
from glm5_hal.integrations.transformers.mtp import Mtp
from glm5_hal.integrations.transformers.speculate import Speculated, speculate

__all__ = ["Mtp", "PagedCache", "Speculated", "apply", "load_mtp", "remove", "speculate"]
