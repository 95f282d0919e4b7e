"""What the indexer's ops share: arguments, constraints, error terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common.attention import PAGES, stores_in
from glm5_hal.ops._common.paging import BATCH
from glm5_hal.spec import Arg, Constraint, Scalar

INDEX_CACHE = Arg("index_cache", "N P X", "C", "index key pages, in the named format", layout="page")

#: Of the ops that score keys.
INDEX_ARGS = (
    Arg("q", "T H D", "F", "index queries, after rope"),
    Arg("weights", "T H", "A", "head weights, already scaled; may be negative"),
    INDEX_CACHE,
    *BATCH,
)

INDEX_SCALARS = (Scalar("cache_format", "named cache format", choices=formats("index")),)


def index_constraints(activations: str = "q") -> tuple[Constraint, ...]:
    """An index format's tensor has its width and its storage dtype."""

    def fits(known: Mapping[str, Any]) -> bool:
        fmt, D = FORMATS[known["cache_format"]], known["D"]
        return not (fmt.group and D % fmt.group) and bool((known["X"],) == fmt.widths(D))

    return (
        Constraint(
            "index_cache has the width of cache_format for index_head_dim D",
            fits,
            "allocate with glm5_hal.cache_format(name).allocate(num_blocks, page_size, index_head_dim, dtype=...)",
        ),
        PAGES,
        stores_in("index_cache", activations),
    )


def logit_amplification(args: Mapping[str, Any]) -> float:
    """Weights of both signs cancel: the terms of a logit are larger than the logit by up to sqrt(heads)."""
    return float(4.0 * args["q"].shape[1] ** 0.5)
