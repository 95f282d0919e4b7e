"""What the pages of the indexers and sparse attentions refuse: one broken constraint a line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from ci.ascend import emulator  # noqa: E402
from ci.ascend.emulator.samples import Arguments, sample  # noqa: E402

npu = torch.ops.npu
LI, QLI = "npu_lightning_indexer", "npu_quant_lightning_indexer"
SFA, KVQ = "npu_sparse_flash_attention", "npu_kv_quant_sparse_flash_attention"


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


ROPED = ("query", "query_rope")
Change = Callable[[Arguments], Any]


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


LENGTHS: list[tuple[dict[str, Any] | Change, str]] = [
    ({"actual_seq_lengths_query": None}, "is given"),
    ({"actual_seq_lengths_query": torch.tensor([1, 3])}, "actual_seq_lengths_query has dtype torch.int32"),
    ({"actual_seq_lengths_query": i32(3, 1)}, "prefix sums"),
    ({"actual_seq_lengths_query": i32(0, 1, 3)}, "block_table has one row for each of 3 requests"),
    ({"actual_seq_lengths_query": i32(1, 2)}, "end at T = 3"),
    ({"actual_seq_lengths_query": i32(1, 4)}, "end at T = 3"),
    ({"block_table": None}, "block_table is given"),
    (lambda a: a.update(block_table=a["block_table"].long()), "block_table has dtype torch.int32"),
    (lambda a: a.update(block_table=a["block_table"][:, :1]), r"are within \[0, 16\]"),
    (lambda a: a["block_table"].fill_(8), r"block ids in use are within \[0, 8\)"),
    ({"sparse_mode": 1}, "sparse_mode is one of"),
    ({"pre_tokens": 5}, "pre_tokens has its default"),
    ({"next_tokens": 5}, "next_tokens has its default"),
    ({"layout_query": "SBH"}, "layout_query is one of"),
    ({"layout_query": "BSND"}, "query has 4 dims"),
]
INDEXERS: list[tuple[dict[str, Any] | Change, str]] = [
    *LENGTHS,
    ({"layout_key": "PA_BNSD"}, "layout_key is one of"),
    ({"layout_key": "BSND"}, "layout_key is layout_query"),
    ({"actual_seq_lengths_key": None}, "actual_seq_lengths_key is given"),
    ({"actual_seq_lengths_key": i32(20)}, "one element for each of 2 requests"),
    ({"actual_seq_lengths_key": i32(20, -1)}, "actual_seq_lengths_key are within"),
    (lambda a: a.update(key=a["key"].view(16, 8, 1, 128)), "block_size is a multiple of 16"),
    (lambda a: a.update(key=a["key"].repeat(1, 1, 2, 1)), "N of key is 1"),
    (lambda a: a.update(query=a["query"].repeat(1, 9, 1), weights=a["weights"].repeat(1, 9)), "at most 64"),
    (lambda a: a.update(query=a["query"][..., :64], key=a["key"][..., :64]), "D of query and key is 128"),
    (lambda a: a.update(weights=a["weights"][:, :4]), "weights has shape"),
    (lambda a: a.update(query=strided(a["query"])), "query is contiguous"),
    (lambda a: a.update(weights=strided(a["weights"])), "weights is contiguous"),
    ({"sparse_count": 0}, "sparse_count is 1 to 2048"),
]
ATTENTIONS: list[tuple[dict[str, Any] | Change, str]] = [
    *LENGTHS,
    ({"attention_mode": 0}, "attention_mode is 2"),
    ({"layout_kv": "BSND"}, "layout_kv is layout_query"),
    ({"actual_seq_lengths_kv": None}, "actual_seq_lengths_kv is given"),
    ({"sparse_block_size": 3}, "power of two"),
    ({"sparse_block_size": 256}, "power of two"),
    (lambda a: a.update(sparse_indices=a["sparse_indices"].long()), "sparse_indices has dtype"),
    (lambda a: a.update(sparse_indices=a["sparse_indices"][:2]), "sparse_indices have query's rows"),
    (lambda a: a.update(sparse_indices=a["sparse_indices"][..., :0]), "sparse_size > 0"),
    (lambda a: a["sparse_indices"][0, 0, 0:2].copy_(i32(-1, 3)), "valid indices come before"),
    (lambda a: a["sparse_indices"][0, 0, 0].fill_(20), "inside its request"),
    (lambda a: a["sparse_indices"][0, 0, 0].fill_(-2), "a block or -1"),
    (lambda a: a.update(sparse_indices=strided(a["sparse_indices"])), "sparse_indices is contiguous"),
    (lambda a: a.update(query=strided(a["query"])), "query is contiguous"),
    (
        lambda a: a.update(query=a["query"].repeat_interleave(3, 1)[:, :3].contiguous()),
        "N of query is one of|query_rope has",
    ),
]
ONLY: dict[str, list[tuple[dict[str, Any] | Change, str]]] = {
    LI: [
        *INDEXERS,
        ({"sparse_count": 2049}, "sparse_count is 1 to 2048"),
        ({"sparse_count": 9216}, "sparse_count is 1 to 2048"),
        ({"return_value": True}, "return_value is for keys that are not paged"),
        (lambda a: a.update(query=a["query"].half()), "one dtype"),
        (lambda a: a.update(query=a["query"].float(), key=a["key"].float()), "query has dtype"),
        (lambda a: a.update(weights=a["weights"].half()), "weights have query's dtype"),
        (lambda a: a.update(key=strided(a["key"])), "key is contiguous"),
    ],
    QLI: [
        *INDEXERS,
        ({"sparse_count": 3072}, "sparse_count is 1 to 2048"),
        ({"query_quant_mode": 1}, "query_quant_mode is one of"),
        ({"key_quant_mode": 1}, "key_quant_mode is one of"),
        (lambda a: a.update(weights=a["weights"].to(torch.bfloat16)), "scales have dtypes"),
        (lambda a: a.update(key_dequant_scale=a["key_dequant_scale"].float()), "scales have dtypes"),
        (lambda a: a.update(key_dequant_scale=a["key_dequant_scale"][:4]), "key_dequant_scale has shape"),
        (lambda a: a.update(query_dequant_scale=a["query_dequant_scale"][:, :4]), "query_dequant_scale has shape"),
        (lambda a: a.update(query=a["query"].half(), key=a["key"].half()), "query has dtype"),
        (lambda a: (a["weights"].fill_(300), a["query_dequant_scale"].fill_(300)), "within float16"),
    ],
    SFA: [
        *ATTENTIONS,
        ({"value": None}, "value is given"),
        ({"query_rope": None}, "query_rope is given"),
        ({"key_rope": None}, "key_rope is given"),
        ({"return_softmax_lse": True}, "return_softmax_lse is for keys that are not paged"),
        ({"sinks": torch.zeros(4)}, "sinks are for Ascend950"),
        (lambda a: a.update(value=a["value"] + 1), "value holds what key holds"),
        (lambda a: a.update(query=a["query"].half()), "one dtype"),
        (lambda a: a.update(query_rope=a["query_rope"].half()), "one dtype"),
        (lambda a: a.update(query_rope=a["query_rope"][..., :32]), "query_rope has shape"),
        (lambda a: a.update(key_rope=a["key_rope"][..., :32]), "key_rope has shape"),
        (lambda a: a.update(value=a["value"][:4]), "value has shape"),
        (lambda a: a.update(query=a["query"][..., :256]), "D of query, key and value is 512"),
        (lambda a: a.update({n: a[n].repeat(1, 2, 1)[:, :6].contiguous() for n in ROPED}), "N of query is one of"),
        (lambda a: a.update(key_rope=strided(a["key_rope"])), "key_rope is contiguous"),
        (lambda a: a.update({n: strided(a[n]) for n in ("key", "value")}), "key is contiguous"),
    ],
    KVQ: [
        *ATTENTIONS,
        ({"sparse_block_size": 32}, "power of two, at most 16"),
        ({"key_quant_mode": 0}, "key_quant_mode is 2"),
        ({"value_quant_mode": 0}, "value_quant_mode is 2"),
        ({"quant_scale_repo_mode": 0}, "quant_scale_repo_mode is 1"),
        ({"tile_size": 64}, "tile_size is 128"),
        ({"rope_head_dim": 32}, "rope_head_dim is 64"),
        ({"key_dequant_scale": torch.ones(1)}, "key_dequant_scale is None"),
        (lambda a: a.update(query=a["query"][..., :512]), "D of query is 576"),
        (lambda a: a.update(key=a["key"][..., :640]), "D of key is 656"),
        (lambda a: a.update(key=a["key"].view(torch.uint8).to(torch.int16)), "key has dtype"),
        (lambda a: a.update(value=a["value"].half()), "one dtype"),
        (lambda a: a.update(query=torch.zeros(3, 48, 576).to(torch.bfloat16)), "N of query is one of"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), [(name, *row) for name, rows in ONLY.items() for row in rows])
def test_what_is_refused(name: str, change: dict[str, Any] | Change, words: str) -> None:
    given = sample(name)
    if callable(change):
        change(given)
    else:
        given.update(change)
    with pytest.raises(emulator.ConstraintError, match=words):
        getattr(npu, name)(**given)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (LI, lambda a: a.update({n: a[n][:, :4].contiguous() for n in ("query", "weights")}), "N of query"),
        (LI, lambda a: a.update(weights=a["weights"].float()), "weights have query's dtype"),
        (SFA, {"sparse_block_size": 2}, "at most 1"),
        (SFA, {"sinks": torch.zeros(3)}, "sinks has shape"),
        (SFA, {"sinks": torch.zeros(4).half()}, "sinks has dtype"),
    ],
)  # fmt: skip
def test_what_ascend950_refuses(name: str, change: dict[str, Any] | Change, words: str) -> None:
    emulator.install(soc="Ascend950")
    test_what_is_refused(name, change, words)


def test_limits_that_only_one_chip_has() -> None:
    given = sample(SFA)
    odd = {**given, **{n: given[n].repeat(1, 2, 1)[:, :6].contiguous() for n in ("query", "query_rope")}}
    apart = {**given, "key": torch.stack((given["key"], given["key"]), 1)[:, 0]}
    for name in ("value",):
        apart[name] = apart["key"]
    for one in (odd, apart):
        with pytest.raises(emulator.ConstraintError):
            npu.npu_sparse_flash_attention(**one)
    emulator.install(soc="Ascend950")
    assert npu.npu_sparse_flash_attention(**odd)[0].shape == (3, 6, 512)
    assert torch.equal(npu.npu_sparse_flash_attention(**apart)[0], npu.npu_sparse_flash_attention(**given)[0])


def test_the_quantised_indexer_lets_pages_lie_apart() -> None:
    given = sample(QLI)
    apart = {name: torch.stack((given[name], given[name]), 1)[:, 0] for name in ("key", "key_dequant_scale")}
    assert torch.equal(npu.npu_quant_lightning_indexer(**{**given, **apart}), npu.npu_quant_lightning_indexer(**given))


def test_hifloat8_is_left_out_and_says_so() -> None:
    with pytest.raises(emulator.NotEmulatedError, match="hifloat8"):
        npu.npu_quant_lightning_indexer(**{**sample(QLI), "query_dtype": 290})
