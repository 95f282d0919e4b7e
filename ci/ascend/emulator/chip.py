"""Which chip the emulator stands in for: limits differ, and not every op exists on each."""

from __future__ import annotations

from dataclasses import dataclass

CHIPS = ("A2", "A3", "Ascend950")
#: The docs' product tables. An op that is not named here is listed for A2 and A3.
LISTED = {
    "npu_add_rms_norm": CHIPS,
    "npu_format_cast": CHIPS,
    "npu_lightning_indexer": CHIPS,
    "npu_sparse_flash_attention": CHIPS,
    "npu_quant_lightning_indexer": CHIPS,
    "npu_kv_quant_sparse_flash_attention": CHIPS,
    "npu_mla_prolog_v3": CHIPS,
    "npu_mla_prolog_v3_functional": CHIPS,
    "npu_swiglu": ("A2",),
    "npu_moe_finalize_routing": ("A2",),
    "get_npu_format": CHIPS,
    # No page of the documents describes these two; only golden code does.
    "npu_moe_token_permute": CHIPS,
    "npu_moe_token_unpermute": CHIPS,
}


@dataclass
class Chip:
    name: str = "A2"
    #: Refuse an op on a chip that its page does not list.
    listed_only: bool = True
    #: `npu_lightning_indexer` lists positions hidden by the causal mask after the visible ones, as its golden code
    #: does; otherwise they are −1, as in the golden code of `npu_quant_lightning_indexer`.
    hidden_positions: bool = False

    @property
    def is_950(self) -> bool:
        return self.name == "Ascend950"


#: The chip in use; `install` sets it.
CHIP = Chip()


def lists(op: str, chip: str) -> bool:
    return chip in LISTED.get(op, ("A2", "A3"))
