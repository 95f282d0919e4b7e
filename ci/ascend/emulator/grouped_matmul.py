"""npu_grouped_matmul, with a tensor of group sizes and (overload List) with a list of them.

Floating inputs are summed in float32; int8 products are exact. What follows — bias, scale, per-token scale, activation
— is in float32, and the result is rounded once. An antiquantised weight is first brought to x's dtype, as golden code
does. Where page and golden code differ: the page allows bias and scale 1 dim; golden code and the quantised example
give a single 3-dim weight [E, N] of either, so a single weight takes [E, N] and several take [N] each. Formulas 2-2 and
3-2 add a floating bias to int8 products, and the dtype table allows none: the table is followed. The List overload's
page wants None for arguments whose schema default is 0: both are taken.
Not emulated: int4, and what the pages of Ascend950 add (fp8, mx formats, hifloat8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import quantize
from .constraints import Rules

INNER_LIMIT = 65536
NUMBERED = {0: torch.uint8, 1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
BIAS = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.int8: torch.int32,
}
#: Output dtypes by the scale's dtype, where x and weight are int8; None asks for the first.
QUANTISED = {torch.int64: (None, torch.int8), torch.bfloat16: (torch.bfloat16,), torch.float32: (torch.float16,)}
ACTIVATIONS = {
    0: lambda y: y,
    1: torch.relu,
    2: lambda y: functional.gelu(y, approximate="tanh"),
    4: lambda y: y * torch.sigmoid(1.702 * y),
    5: functional.silu,
}
UNUSED = ("offset", "activation_input", "activation_quant_scale", "activation_quant_offset")


@dataclass(frozen=True)
class Call:
    """What both overloads share; lists that were not given are None."""

    x: list[Tensor]
    weight: list[Tensor]
    bias: list[Tensor] | None
    scale: list[Tensor] | None
    antiquant_scale: list[Tensor] | None
    antiquant_offset: list[Tensor] | None
    per_token_scale: list[Tensor] | None
    split_item: int
    output_dtype: torch.dtype | None

    @property
    def single(self) -> bool:
        return len(self.weight) == 1 and self.weight[0].dim() == 3

    @property
    def groups(self) -> int:
        return len(self.weight[0]) if self.single else len(self.weight)


def grouped_matmul(**given: Any) -> list[Tensor]:
    rules = Rules("npu_grouped_matmul", "torch_npu-npu_grouped_matmul.md")
    group_list, group_type, kind = given["group_list"], given["group_type"], given["group_list_type"] or 0
    act = given["act_type"] or 0
    rules.given("group_list is a Tensor", group_type=group_type)
    rules.one_of("group_type", group_type, (-1, 0, 2))
    rules.one_of("group_list_type", kind, (0, 1, 2))
    rules.one_of("act_type", act, ACTIVATIONS)
    others = ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype")
    rules.beyond(any(given[name] is not None for name in others), "dtypes that torch has not")
    number = given["output_dtype"]
    rules.need(number is None or number in NUMBERED, "output_dtype is a dtype of the page's table", number)
    call = _call(rules, given, None if number is None else NUMBERED[number])
    if given["tuning_config"] is not None:
        rules.need(call.x[0].dtype is torch.int8, "tuning_config is for int8 inputs", given["tuning_config"])
    if act:
        rules.need(call.per_token_scale is not None, "act_type is for per-token quantisation", act)
    if group_type == 2:
        return _split_k(rules, call, group_list, kind)
    if group_type == -1:
        rules.absent("group_type is -1", group_list=group_list)
        rules.one_of("split_item", call.split_item, (0, 1))
        _several(rules, call)
        return [_product(call, i, x, slice(None), act) for i, x in enumerate(call.x)]
    rules.one_of("split_item", call.split_item, (2, 3))
    sizes = _sizes(rules, call, group_list, kind)
    return [_grouped(rules, call, sizes, act)]


def grouped_matmul_list(**given: Any) -> list[Tensor]:
    rules = Rules("npu_grouped_matmul", "torch_npu-npu_grouped_matmul.md")
    group_list = given["group_list"]
    rules.absent("group_list is a list", group_type=given["group_type"], per_token_scale=given["per_token_scale"])
    for name in ("group_list_type", "act_type"):
        rules.need(not given[name], f"{name} is None or its default where group_list is a list", given[name])
    call = _call(rules, given, given["output_dtype"])
    if call.scale is not None:
        kinds = [scale.dtype for scale in call.scale]
        rules.need(set(kinds) == {torch.int64}, "scale is int64 where group_list is a list", kinds)
    rules.need(all(w.dim() == 2 for w in call.weight), "weights have 2 dims where group_list is a list", call.weight)
    sizes = None
    if group_list is not None:
        rules.need(len(group_list) != 1, "group_list has not 1 element", group_list)
        sizes = _differences(rules, torch.tensor(group_list, dtype=torch.int64))
        rules.need(len(sizes) == call.groups, f"group_list has an element for each of {call.groups} groups", group_list)
    whole = call.split_item in (2, 3)
    if len(call.x) == 1 and len(call.weight) > 1:
        rules.given("x is one tensor and weight several", group_list=group_list)
        assert sizes is not None
        _ends(rules, sizes, len(call.x[0]))
        if whole:
            return [_grouped(rules, call, sizes, 0)]
        return [_product(call, i, x, slice(None), 0) for i, x in enumerate(call.x[0].split(sizes))]
    _several(rules, call)
    if sizes is not None:
        rules.need(sizes == [len(x) for x in call.x], "group_list's differences are x's first dims", group_list)
    parts = [_product(call, i, x, slice(None), 0) for i, x in enumerate(call.x)]
    return [_joined(rules, parts)] if whole else parts


def _call(rules: Rules, given: dict[str, Any], output_dtype: torch.dtype | None) -> Call:
    x, weight = list(given["x"]), list(given["weight"])
    rules.need(
        1 <= len(x) <= 128 and 1 <= len(weight) <= 128, "x and weight have 1 to 128 tensors", (len(x), len(weight))
    )
    rules.absent("only None is supported", **{name: given[name] or None for name in UNUSED})
    split = given["split_item"] or 0
    rules.one_of("split_item", split, (0, 1, 2, 3))
    names = ("bias", "scale", "antiquant_scale", "antiquant_offset", "per_token_scale")
    lists = {name: list(given[name]) if given[name] else None for name in names}
    call = Call(x, weight, **lists, split_item=split, output_dtype=output_dtype)
    rules.beyond(weight[0].dtype is torch.int32 or x[0].dtype is torch.int32, "int4 packed in int32")
    for name, tensors in {"x": x, "weight": weight}.items():
        rules.need(len({tensor.dtype for tensor in tensors}) == 1, f"tensors of {name} have one dtype", tensors)
        inner = all(tensor.shape[-1] < INNER_LIMIT for tensor in tensors)
        rules.need(inner, f"the last dim of {name} is below {INNER_LIMIT}", tensors)
    for tensor in x:
        rules.dims("x", tensor, 2, 6 if split == 0 else 2)
    for tensor in weight:
        rules.dims("weight", tensor, 2, 3)
    for name, held in lists.items():
        own = x if name == "per_token_scale" else weight
        if held is None:
            continue
        rules.need(len(held) == len(own), f"{name} has {len(own)} tensors", held)
        for tensor, matrix in zip(held, own, strict=True):
            if name != "per_token_scale":  # a value for each column, of each group where the weight has 3 dims
                rules.shape(name, tensor, *matrix.shape[:-2], matrix.shape[-1])
    _dtypes(rules, call)
    return call


def _dtypes(rules: Rules, call: Call) -> None:
    """Table 2 of the page."""
    x, weight, out = call.x[0].dtype, call.weight[0].dtype, call.output_dtype
    rules.need(x in BIAS, f"x has dtype {list(BIAS)}", x)
    if call.bias is not None:
        rules.need(call.bias[0].dtype is BIAS[x], f"bias is {BIAS[x]} for x of {x}", call.bias)
    if x is torch.int8:
        rules.need(weight is torch.int8, "weight is int8 where x is", weight)
        rules.absent("x is int8", antiquant_scale=call.antiquant_scale, antiquant_offset=call.antiquant_offset)
        rules.given("x is int8", scale=call.scale)
        assert call.scale is not None
        kind = call.scale[0].dtype
        rules.need(kind in QUANTISED, f"scale has dtype {list(QUANTISED)}", call.scale)
        rules.need(out in QUANTISED[kind], f"output_dtype is one of {QUANTISED[kind]} for a scale of {kind}", out)
        if call.per_token_scale is not None:
            rules.need(kind is not torch.int64, "scale is bfloat16 or float32 beside per_token_scale", kind)
            for scale, rows in zip(call.per_token_scale, call.x, strict=True):
                rules.dtype("per_token_scale", scale, torch.float32)
                rules.shape("per_token_scale", scale, len(rows))
        return
    rules.absent("x is not int8", scale=call.scale, per_token_scale=call.per_token_scale)
    rules.need(out in (None, x), f"output_dtype is None or {x}", out)
    if weight is torch.int8:
        rules.need(x is not torch.float32, "x is float16 or bfloat16 where weight is int8", x)
        rules.given("weight is int8 and x is not", antiquant_scale=call.antiquant_scale)
        for tensors in (call.antiquant_scale, call.antiquant_offset):
            rules.need(tensors is None or tensors[0].dtype is x, f"antiquant tensors have dtype {x}", tensors)
        return
    rules.need(weight is x, f"weight has x's dtype {x}", weight)
    rules.absent("weight is not int8", antiquant_scale=call.antiquant_scale, antiquant_offset=call.antiquant_offset)
    if x is torch.float32 and out is torch.float32:
        rules.need(len(call.x) == len(call.weight) == 1, "output_dtype float32 is for single tensors", call.weight)


def _several(rules: Rules, call: Call) -> None:
    """x and weight are lists of the same length, a matrix product each."""
    rules.need(
        len(call.x) == len(call.weight), "x and weight have the same number of tensors", (len(call.x), len(call.weight))
    )
    rules.need(all(w.dim() == 2 for w in call.weight), "weights have 2 dims", call.weight)
    rules.need(len({x.dim() for x in call.x}) == 1, "tensors of x have the same dims", call.x)
    for x, weight in zip(call.x, call.weight, strict=True):
        rules.contiguous(x=x)
        rules.need(x.shape[-1] == weight.shape[0], "K of x is K of weight", [x, weight])


def _sizes(rules: Rules, call: Call, group_list: Tensor | None, kind: int) -> list[int]:
    """The rows of each group, for m groups."""
    rows = sum(len(x) for x in call.x)
    if group_list is None:
        rules.need(len(call.x) > 1, "group_list is given where x is one tensor", group_list)
        return [len(x) for x in call.x]
    rules.dtype("group_list", group_list, torch.int64)
    if kind == 2:
        rules.need(call.x[0].dtype is torch.int8, "group_list_type 2 is for int8 inputs", call.x)
        rules.shape("group_list", group_list, call.groups, 2)
        wanted = bool(((group_list[:, 0] >= 0) & (group_list[:, 0] < call.groups)).all())
        rules.need(wanted, f"the groups of group_list are within [0, {call.groups})", group_list.tolist())
        rules.need(bool((group_list[:, 1] >= 0).all()), "group sizes are not negative", group_list.tolist())
        sizes = group_list[:, 1].tolist()
    else:
        rules.dims("group_list", group_list, 1)
        need = f"group_list has an element for each of {call.groups} groups"
        rules.need(len(group_list) == call.groups, need, group_list)
        if kind == 0:
            sizes = _differences(rules, group_list)
        else:
            rules.need(len(group_list) != 1, "group_list of counts has not 1 element", group_list)
            sizes = group_list.tolist()
            rules.need(min(sizes) >= 0, "counts in group_list are not negative", sizes)
    most = 1024 if call.single else 128
    rules.need(call.groups <= most, f"there are at most {most} groups", call.groups)
    _ends(rules, sizes, rows)
    if len(call.x) > 1:
        rules.need(sizes == [len(x) for x in call.x], "group_list's groups are x's first dims", sizes)
    if kind == 2:  # rows lie in the order of the pairs
        by_group = group_list[:, 0].tolist()
        rules.need(by_group == sorted(set(by_group)), "groups of group_list rise", by_group)
        sizes = [dict(zip(by_group, sizes, strict=True)).get(group, 0) for group in range(call.groups)]
    return sizes


def _differences(rules: Rules, ends: Tensor) -> list[int]:
    sizes = ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    rules.need(all(size >= 0 for size in sizes), "group_list does not fall and has nothing below 0", ends.tolist())
    return sizes


def _ends(rules: Rules, sizes: list[int], rows: int) -> None:
    rules.need(sum(sizes) == rows, f"the groups hold all {rows} rows of x", sizes)


def _grouped(rules: Rules, call: Call, sizes: list[int], act: int) -> Tensor:
    if not call.single:
        rules.need(all(w.dim() == 2 for w in call.weight), "weights are one of 3 dims or several of 2", call.weight)
    x = [part for tensor in call.x for part in (tensor.split(sizes) if len(call.x) == 1 else (tensor,))]
    for tensor in call.x:
        rules.dims("x", tensor, 2)
        rules.contiguous(x=tensor)
    parts, start = [], 0
    for group, rows in enumerate(x):
        weight = call.weight[0][group] if call.single else call.weight[group]
        rules.need(rows.shape[1] == weight.shape[0], "K of x is K of weight", [rows, weight])
        parts.append(_product(call, group, rows, slice(start, start + len(rows)), act))
        start += len(rows)
    return _joined(rules, parts)


def _joined(rules: Rules, parts: list[Tensor]) -> Tensor:
    rules.need(len({part.shape[-1] for part in parts}) == 1, "weights have the same N", parts)
    return torch.cat(parts)


def _product(call: Call, group: int, x: Tensor, rows: slice, act: int) -> Tensor:
    """One group's rows times its weight, and what is asked for after it. ``rows`` are its rows in x."""

    def own(tensors: list[Tensor] | None) -> Tensor | None:
        if tensors is None:
            return None
        return tensors[0][group] if call.single else tensors[group]

    weight = own(call.weight)
    assert weight is not None
    out = call.output_dtype or call.x[0].dtype
    if x.dtype is torch.int8:
        y = (x.double() @ weight.double()).float()  # exact: sums of int8 products fit in 53 bits
    else:
        if weight.dtype is torch.int8:
            scale, offset = own(call.antiquant_scale), own(call.antiquant_offset)
            weight = weight.to(x.dtype) if offset is None else weight.to(x.dtype) + offset
            weight = weight * scale
        y = x.float() @ weight.float()
    bias, scale = own(call.bias), own(call.scale)
    if bias is not None:
        y = y + bias.float()
    if scale is not None:
        y = y * quantize.unpacked(scale)
    if call.per_token_scale is not None:
        held = call.per_token_scale[0][rows] if len(call.x) == 1 else call.per_token_scale[group]
        y = ACTIVATIONS[act](y * held[:, None])
    return quantize.int8(y) if out is torch.int8 else y.to(out)


def _split_k(rules: Rules, call: Call, group_list: Tensor | None, kind: int) -> list[Tensor]:
    """x is [M, K] with K in groups, weight [K, N]: one product for each group, as golden code has it."""
    rules.need(len(call.x) == len(call.weight) == 1, "x and weight are single tensors with group_type 2", call.weight)
    x, weight = call.x[0], call.weight[0]
    rules.need(
        x.dtype is not torch.int8 and weight.dtype is not torch.int8, "group_type 2 is not quantised", [x, weight]
    )
    rules.one_of("split_item", call.split_item, (2, 3))
    rules.one_of("group_list_type", kind, (0, 1))
    rules.given("group_type is 2", group_list=group_list)
    rules.beyond(call.bias is not None, "bias with group_type 2")
    assert group_list is not None
    rules.dims("weight", weight, 2)
    rules.dtype("group_list", group_list, torch.int64)
    rules.dims("group_list", group_list, 1)
    sizes = _differences(rules, group_list) if kind == 0 else group_list.tolist()
    rules.need(sum(sizes) == x.shape[1] == weight.shape[0], "the groups hold all of K", [x, weight])
    pairs = zip(x.split(sizes, 1), weight.split(sizes), strict=True)
    return [torch.stack([(a.float() @ b.float()) for a, b in pairs]).to(call.output_dtype or x.dtype)]


KERNELS = {"npu_grouped_matmul": grouped_matmul, "npu_grouped_matmul.List": grouped_matmul_list}
