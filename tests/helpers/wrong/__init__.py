"""Kernels with one thing wrong, by what they are wrong about.

Most are an honest kernel of `honest` with one argument changed; what can go wrong with any op is done to a reference.
"""

from wrong.anywhere import ANYWHERE, anywhere
from wrong.attention import attention
from wrong.base import Wrong
from wrong.caches import the_caches
from wrong.elementary import elementary
from wrong.experts import the_experts
from wrong.indexer import the_indexer
from wrong.prologs import the_prologs

ALL = [
    *anywhere(),
    *ANYWHERE,
    *attention(),
    *the_indexer(),
    *the_caches(),
    *elementary(),
    *the_experts(),
    *the_prologs(),
]

__all__ = ["ALL", "Wrong"]
