"""Attention in the absorbed form on Hopper, in Gluon: Triton with layouts of one's own.

Triton gives every warp of a program all the scores of a tile where another product follows, and so makes them twice
with the eight warps that 64 heads by 512 columns need. Here two groups of four warps share both products: half of the
keys each for the scores, half of the columns each for the values. The next tile is on its way meanwhile.

Legend: T tokens, H heads, m heads of a program, n keys of a tile, L latent width, R rope width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

#: Heads of a program, keys of a tile, and warps.
HEADS, KEYS, WARPS = 64, 64, 8

#: As Triton 3.7 calls it, and as 3.6 does.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit(do_not_specialize=["B", "K", "first", "rows", "room", "most", "H"])
def attend(
    q, q_token, q_head, q_col, chosen, chosen_token, chosen_col, table, table_row, table_col, seq_lens, offsets,
    latent, latent_page, latent_row, rope, rope_page, rope_row, scales, scale_page, scale_row,
    out, lse, sums, bounds, B, K, first, rows, room, most, H, scale,
    PAGE: gl.constexpr, L: gl.constexpr, R: gl.constexpr, CHOSEN: gl.constexpr, LEAST: gl.constexpr,
    BLOCK_B: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_L: gl.constexpr, BLOCK_R: gl.constexpr,
    GROUP: gl.constexpr, TYPE: gl.constexpr, FP8: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """As `_attend` of ``backends/_triton/absorbed.py``."""
    in_L: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    in_R: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    in_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    in_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, L // 2, 16])
    row_S: gl.constexpr = gl.SliceLayout(1, in_S)
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, L], TYPE)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, R], TYPE)

    blocks = (H + BLOCK_H - 1) // BLOCK_H
    local, split = gl.program_id(0) // blocks, gl.program_id(1)
    token = first + local
    head = (gl.program_id(0) % blocks) * BLOCK_H
    request = _owner(token, offsets, B, BLOCK_B)
    keys = K
    if not CHOSEN:
        begin = gl.load(offsets + request)
        end = gl.load(offsets + request + 1)
        keys = gl.maximum(gl.load(seq_lens + request) - (end - begin) + (token - begin) + 1, 0)
    parts = gl.maximum(gl.minimum((keys + LEAST - 1) // LEAST, most), 1)
    size = gl.maximum(((keys + parts - 1) // parts + BLOCK_N - 1) // BLOCK_N, 1) * BLOCK_N
    start = split * size
    if (split > 0) & (start >= keys):
        return
    stop = gl.minimum(start + size, keys)
    chosen += token.to(INDEX) * chosen_token
    if CHOSEN:
        stop = _last(chosen, chosen_col, start, stop, LEAST)
    table += request.to(INDEX) * table_row
    q += token.to(INDEX) * q_token

    first_L = _heads(q, head, H, q_head, q_col, 0, BLOCK_H, L, in_L, INDEX)
    rest_R = _heads(q, head, H, q_head, q_col, L, BLOCK_H, R, in_R, INDEX)
    q_latent = gl.allocate_shared_memory(TYPE, [BLOCK_H, L], wide, first_L)
    q_rope = gl.allocate_shared_memory(TYPE, [BLOCK_H, R], narrow, rest_R)
    tiles_L = gl.allocate_shared_memory(TYPE, [2, BLOCK_N, L], wide)
    tiles_R = gl.allocate_shared_memory(TYPE, [2, BLOCK_N, R], narrow)
    parts_P = gl.allocate_shared_memory(TYPE, [BLOCK_H, BLOCK_N], narrow)

    peak = gl.full([BLOCK_H], float("-inf"), gl.float32, row_S)
    total = gl.full([BLOCK_H], 0.0, gl.float32, row_S)
    sums_L = gl.full([BLOCK_H, L], 0.0, gl.float32, in_O)
    nothing = gl.full([BLOCK_H, BLOCK_N], 0.0, gl.float32, in_S)
    if GROUP:
        raw, factor, turned = _read(
            start, stop, chosen, chosen_col, table, table_col, latent, latent_page, latent_row,
            rope, rope_page, rope_row, scales, scale_page, scale_row, PAGE, L, R, CHOSEN, BLOCK_N, GROUP, INDEX,
        )  # fmt: skip
        _put(tiles_L.index(0), tiles_R.index(0), raw, factor, turned, L, R, BLOCK_N)
        raw, factor, turned = _read(
            start + BLOCK_N, stop, chosen, chosen_col, table, table_col, latent, latent_page, latent_row,
            rope, rope_page, rope_row, scales, scale_page, scale_row, PAGE, L, R, CHOSEN, BLOCK_N, GROUP, INDEX,
        )  # fmt: skip
    else:
        _fetch(
            start, stop, chosen, chosen_col, table, table_col, latent, latent_page, latent_row,
            rope, rope_page, rope_row, tiles_L.index(0), tiles_R.index(0), in_L, in_R,
            PAGE, L, R, CHOSEN, BLOCK_N, INDEX,
        )  # fmt: skip
    for key in range(start, stop, BLOCK_N):
        at = ((key - start) // BLOCK_N) % 2
        if not GROUP:
            async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        scores = warpgroup_mma(q_latent, tiles_L.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_rope, tiles_R.index(at).permute((1, 0)), scores, is_async=True)
        if GROUP:
            _put(tiles_L.index(1 - at), tiles_R.index(1 - at), raw, factor, turned, L, R, BLOCK_N)
        else:
            _fetch(
                key + BLOCK_N, stop, chosen, chosen_col, table, table_col, latent, latent_page, latent_row,
                rope, rope_page, rope_row, tiles_L.index(1 - at), tiles_R.index(1 - at), in_L, in_R,
                PAGE, L, R, CHOSEN, BLOCK_N, INDEX,
            )  # fmt: skip
        _, some = _places(key, stop, chosen, chosen_col, CHOSEN, BLOCK_N, gl.SliceLayout(0, in_S))
        scores = warpgroup_mma_wait(0, deps=[scores])

        higher = gl.maximum(peak, gl.max(gl.where(some[None, :], scores * scale, float("-inf")), 1))
        base = _finite(higher)
        shrink = gl.exp2(peak - base)
        weights = gl.where(some[None, :], gl.exp2(gl.fma(scores, scale, gl.expand_dims(-base, 1))), 0.0)
        total = gl.fma(total, shrink, gl.sum(weights, 1))
        peak = higher
        parts_P.store(weights.to(TYPE))
        fence_async_shared()
        sums_L = sums_L * gl.convert_layout(shrink, gl.SliceLayout(1, in_O))[:, None]
        barrier()
        sums_L = warpgroup_mma(parts_P, tiles_L.index(at), sums_L, is_async=True)
        if GROUP:
            raw, factor, turned = _read(
                key + 2 * BLOCK_N, stop, chosen, chosen_col, table, table_col, latent, latent_page, latent_row,
                rope, rope_page, rope_row, scales, scale_page, scale_row, PAGE, L, R, CHOSEN, BLOCK_N, GROUP, INDEX,
            )  # fmt: skip
        sums_L = warpgroup_mma_wait(0, deps=[sums_L])
    async_copy.wait_group(0)

    row_O: gl.constexpr = gl.SliceLayout(1, in_O)
    head_O, head_S = head + gl.arange(0, BLOCK_H, layout=row_O), head + gl.arange(0, BLOCK_H, layout=row_S)
    col = gl.arange(0, L, layout=gl.SliceLayout(0, in_O))
    if size >= keys:  # the only part
        to = (token.to(INDEX) * H + head_O) * L
        mean = gl.where(stop > start, sums_L / gl.convert_layout(total, row_O)[:, None], 0.0)
        gl.store(out + to[:, None] + col[None, :], mean.to(out.dtype.element_ty), mask=(head_O < H)[:, None])
        found = (_finite(peak) + gl.log2(total)) * 0.6931471805599453
        gl.store(lse + token.to(INDEX) * H + head_S, found, mask=head_S < H)
    else:
        part_O = ((local * H + head_O) * room + split) * L
        gl.store(sums + part_O[:, None] + col[None, :], sums_L, mask=(head_O < H)[:, None])
        part = (local * H + head_S) * room + split
        gl.store(bounds + part, peak, mask=head_S < H)
        gl.store(bounds + rows * room + part, gl.where(stop > start, total, -1.0), mask=head_S < H)


@gluon.jit
def _owner(place, offsets, B, BLOCK_B: gl.constexpr):
    i = gl.arange(0, BLOCK_B, layout=gl.BlockedLayout([1], [32], [8], [0]))
    ends = gl.load(offsets + 1 + i, mask=i < B, other=2147483647)
    return gl.sum((ends <= place).to(gl.int32), 0)


@gluon.jit
def _last(chosen, chosen_col, start, stop, STEP: gl.constexpr):
    last = start
    for key in range(start, stop, STEP):
        i = key + gl.arange(0, STEP, layout=gl.BlockedLayout([1], [32], [8], [0]))
        index = gl.load(chosen + i * chosen_col, mask=i < stop, other=-1)
        last = gl.maximum(last, gl.max(gl.where(index >= 0, i + 1, 0), 0))
    return last


@gluon.jit
def _heads(
    q, head, H, q_head, q_col, begin,
    BLOCK_H: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """Columns of the queries from ``begin`` on, [BLOCK_H, WIDTH]."""
    row = head + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, LAYOUT))
    col = begin + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    at = row.to(INDEX)[:, None] * q_head + col[None, :] * q_col
    return gl.load(q + at, mask=(row < H)[:, None], other=0.0)


@gluon.jit
def _places(key, stop, chosen, chosen_col, CHOSEN: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Which keys a tile has, [n], and whether there is one."""
    place = key + gl.arange(0, BLOCK_N, layout=LAYOUT)
    some = place < stop
    if CHOSEN:
        place = gl.load(chosen + place * chosen_col, mask=some, other=-1)
        some = place >= 0
    return place, some


@gluon.jit
def _fetch(
    key, stop, chosen, chosen_col, table, table_col, latent, latent_page, latent_row, rope, rope_page, rope_row,
    to_L, to_R, in_L: gl.constexpr, in_R: gl.constexpr,
    PAGE: gl.constexpr, L: gl.constexpr, R: gl.constexpr, CHOSEN: gl.constexpr, BLOCK_N: gl.constexpr,
    INDEX: gl.constexpr,
):  # fmt: skip
    """Send for the tile that begins at ``key``: zeros where there are no keys."""
    place, some = _places(key, stop, chosen, chosen_col, CHOSEN, BLOCK_N, gl.SliceLayout(1, in_L))
    page, slot = _slots(place, some, table, table_col, PAGE, INDEX)
    col = gl.arange(0, L, layout=gl.SliceLayout(0, in_L))
    at = (page * latent_page + slot * latent_row)[:, None] + col[None, :]
    async_copy.async_copy_global_to_shared(to_L, latent + at, mask=some[:, None])
    place_R, some_R = _places(key, stop, chosen, chosen_col, CHOSEN, BLOCK_N, gl.SliceLayout(1, in_R))
    page_R, slot_R = _slots(place_R, some_R, table, table_col, PAGE, INDEX)
    col_R = gl.arange(0, R, layout=gl.SliceLayout(0, in_R))
    at_R = (page_R * rope_page + slot_R * rope_row)[:, None] + col_R[None, :]
    async_copy.async_copy_global_to_shared(to_R, rope + at_R, mask=some_R[:, None])
    async_copy.commit_group()


@gluon.jit
def _read(
    key, stop, chosen, chosen_col, table, table_col, latent, latent_page, latent_row, rope, rope_page, rope_row,
    scales, scale_page, scale_row,
    PAGE: gl.constexpr, L: gl.constexpr, R: gl.constexpr, CHOSEN: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """A tile of quantised rows: e4m3 codes, four to a word, [n, L/16, 4], their scales [n, L/16], and rope keys, two to
    a word, [n, R/2]."""
    in_codes: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [8, 1, 1], [2, 1, 0])
    in_scales: gl.constexpr = gl.SliceLayout(2, in_codes)
    in_R: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    place, some = _places(key, stop, chosen, chosen_col, CHOSEN, BLOCK_N, gl.SliceLayout(1, in_scales))
    page, slot = _slots(place, some, table, table_col, PAGE, INDEX)
    row, row_scale = page * latent_page + slot * latent_row, page * scale_page + slot * scale_row
    chunk = gl.arange(0, L // 16, layout=gl.SliceLayout(0, in_scales))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, in_codes)))
    at = gl.expand_dims(row[:, None] + 4 * chunk[None, :], 2) + gl.expand_dims(gl.expand_dims(word, 0), 1)
    here = gl.expand_dims(some, 1)
    codes = gl.load(latent + at, mask=gl.expand_dims(here, 2), other=0)
    factors = gl.load(scales + (row_scale[:, None] + (16 * chunk // GROUP)[None, :]), mask=here, other=0)

    place_R, some_R = _places(key, stop, chosen, chosen_col, CHOSEN, BLOCK_N, gl.SliceLayout(1, in_R))
    page_R, slot_R = _slots(place_R, some_R, table, table_col, PAGE, INDEX)
    col = gl.arange(0, R // 2, layout=gl.SliceLayout(0, in_R))
    at_R = (page_R * rope_page + slot_R * rope_row)[:, None] + col[None, :]
    return codes, factors.to(gl.float32, bitcast=True), gl.load(rope + at_R, mask=some_R[:, None], other=0)


@gluon.jit
def _put(to_L, to_R, codes, factors, turned, L: gl.constexpr, R: gl.constexpr, BLOCK_N: gl.constexpr):
    """Such a tile as bfloat16 numbers, where the products read it."""
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    low, high = gl.inline_asm_elementwise(
        BFLOAT16, "=r,=r,r,f", [codes, gl.expand_dims(factors, 2)], (gl.int32, gl.int32), is_pure=True, pack=1
    )
    to_L._reinterpret(gl.int32, [BLOCK_N, L // 2], words).store(gl.reshape(gl.join(low, high), [BLOCK_N, L // 2]))
    to_R._reinterpret(gl.int32, [BLOCK_N, R // 2], words).store(turned)


#: Four e4m3 codes times a scale, as two pairs of bfloat16: e4m3 is exact in float16, and rounded once, from fp32.
BFLOAT16 = gl.constexpr("""{
    .reg .b16 a<2>, h<4>;
    .reg .b32 d<2>;
    .reg .f32 f<4>;
    mov.b32 {a0, a1}, $2;
    cvt.rn.f16x2.e4m3x2 d0, a0;
    cvt.rn.f16x2.e4m3x2 d1, a1;
    mov.b32 {h0, h1}, d0;
    mov.b32 {h2, h3}, d1;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    cvt.f32.f16 f2, h2;
    cvt.f32.f16 f3, h3;
    mul.f32 f0, f0, $3;
    mul.f32 f1, f1, $3;
    mul.f32 f2, f2, $3;
    mul.f32 f3, f3, $3;
    cvt.rn.bf16x2.f32 $0, f1, f0;
    cvt.rn.bf16x2.f32 $1, f3, f2;
}""")


@gluon.jit
def _slots(place, some, table, table_col, PAGE: gl.constexpr, INDEX: gl.constexpr):
    """Pages and places in them, of the keys that there are."""
    place = gl.where(some, place, 0)
    page = gl.load(table + place // PAGE * table_col, mask=some, other=0).to(INDEX)
    return page, place % PAGE


@gluon.jit
def _finite(peak):
    return gl.where(gl.abs(peak) == float("inf"), 0.0, peak)
