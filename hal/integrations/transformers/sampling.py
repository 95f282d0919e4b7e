"""Drawing tokens, and the acceptance of guessed ones such that the result is as if nothing had been guessed.

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", algorithm 1. A guess d, drawn
from q, is kept with probability min(1, p(d)/q(d)); the first that is not kept is replaced by a draw from max(p − q, 0);
after guesses that were all kept one token more is drawn from p. Every token is then distributed as p, whatever q is.
Greedy decoding is the case in which p and q have all their mass in one place.

Legend: B rows, S positions, k guesses, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Sampler:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy, and draws nothing from the generator.
        generator: of the draws, on the logits' device; None is torch's own.
    """

    temperature: float = 0.0
    generator: torch.Generator | None = None

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] in float32, or float64 for float64 logits."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.temperature:
            return functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return (logits / self.temperature).softmax(-1)

    def draw(self, weights: Tensor) -> Tensor:
        """[..., V], not negative, of any positive sum, to [...] int64."""
        if not self.temperature:
            return weights.argmax(-1)
        # Of exponential variables with rates w, the i-th is the smallest with probability w_i / Σ w.
        waits = torch.empty_like(weights).exponential_(generator=self.generator)
        return (weights / waits.clamp_min_(torch.finfo(waits.dtype).tiny)).argmax(-1)  # 0/0 would win

    def uniform(self, like: Tensor) -> Tensor:
        """In [0, 1). Greedy: 0, so that what is possible is certain."""
        if not self.temperature:
            return torch.zeros_like(like)
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)


def accept(p: Tensor, q: Tensor, guesses: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Which guesses are kept, and what comes after them.

    Args:
        p: [B, k+1, V], the model's probabilities at each guess and after the last.
        q: [B, k, V], what each guess was drawn from.
        guesses: [B, k] int64.

    Returns:
        tokens [B, k+1] and the number of guesses kept, [B], both int64. A row's first ``kept + 1`` tokens count: the
        guesses kept and one more.
    """
    (B, k), at = guesses.shape, guesses[..., None]
    chances, before = p[:, :k].gather(-1, at)[..., 0], q.gather(-1, at)[..., 0]
    kept = (sampler.uniform(chances) * before < chances).long().cumprod(1).sum(1)
    place = kept[:, None, None].expand(B, 1, p.shape[-1])
    there = p.gather(1, place)[:, 0]
    left = (there - functional.pad(q, (0, 0, 0, 1)).gather(1, place)[:, 0]).clamp_min(0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, there)  # p and q that are equal but for rounding
    tokens = functional.pad(guesses, (0, 1)).scatter(1, kept[:, None], sampler.draw(left)[:, None])
    return tokens, kept
