"""Kernels with one thing wrong, by what they are wrong about.

Most are an honest kernel of `honest` with one argument changed; what can go wrong with any op is done to a reference.
"""

from glm5_hal.conformance.mutants.wrong.anywhere import ANYWHERE, anywhere
from glm5_hal.conformance.mutants.wrong.attention import attention
from glm5_hal.conformance.mutants.wrong.base import Wrong
from glm5_hal.conformance.mutants.wrong.caches import the_caches
from glm5_hal.conformance.mutants.wrong.cheats import cheats
from glm5_hal.conformance.mutants.wrong.elementary import elementary
from glm5_hal.conformance.mutants.wrong.experts import the_experts
from glm5_hal.conformance.mutants.wrong.indexer import the_indexer
from glm5_hal.conformance.mutants.wrong.prologs import the_prologs

#: By theme.
THEMES: dict[str, list[Wrong]] = {
    "any op": [*anywhere(), *ANYWHERE],
    "attention": attention(),
    "indexer": the_indexer(),
    "caches": the_caches(),
    "elementary": elementary(),
    "experts": the_experts(),
    "prologs": the_prologs(),
    "cheats": cheats(),
}

ALL = [w for theme in THEMES.values() for w in theme]

__all__ = ["ALL", "THEMES", "Wrong"]
