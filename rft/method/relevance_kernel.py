"""A layer of the class activation map as one Triton kernel that never writes a map.

It computes the same r A as `relevance.through_maps`, with A = mean_heads relu(G * P), but without a
full map: with P = exp(q k / sqrt(S) - lse) and G = dO v, one tile of both at a time is computed
from tiles of the heads and summed over the queries immediately, as in fused attention. Numbers are
fp32, and products of bf16 heads are exact before they are summed in fp32.

The sums over queries are written per tile of queries and head, and added up afterwards: unlike with
atomic additions, two runs give the same bits.

Importing this module requires Triton, which torch's GPU builds include. tests/method runs it in
Triton's interpreter on a CPU.

Shapes: B batch, N heads, L tokens, S head width, T tiles of queries.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rft.method.relevance import Heads

TILE = 64  # queries, and keys, that a program holds at once


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def through_tiles(
    row_BL: Tensor, heads: Heads, gradient: Tensor, *, widened: bool = False
) -> Tensor:
    """Compute r A, fp32 (B, L); see `relevance.Through`.

    With `widened`, bf16 heads are multiplied as fp32, which changes no digit of a product. Triton's
    interpreter needs it, because it cannot multiply bf16.
    """
    query, key, value = heads
    batch, num_heads, tokens, width = query.shape
    tiles = triton.cdiv(tokens, TILE)
    part_BXL = row_BL.new_empty(batch, num_heads * tiles, tokens)
    launch: Any = _tile[(batch * num_heads, tiles)]
    launch(
        query, key, value, gradient, row_BL, part_BXL,
        *query.stride(), *key.stride(), *value.stride(), *gradient.stride(), *row_BL.stride(),
        num_heads, tokens, width, width**-0.5,
        # tl.dot needs sides that are powers of two and at least 16
        WIDTH=max(16, triton.next_power_of_2(width)),
        TILE=TILE,
        TYPE=tl.float32 if widened else TYPES[query.dtype],
    )  # fmt: skip
    return part_BXL.sum(dim=1) / num_heads


@triton.jit
def _load(
    start, first, stride_l, stride_s, tokens, width,
    TILE: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Load a tile (TILE, WIDTH) of tokens `first`..., zero beyond the last token and the width."""
    l = first + tl.arange(0, TILE)[:, None]  # noqa: E741
    s = tl.arange(0, WIDTH)[None, :]
    inside = (l < tokens) & (s < width)
    return tl.load(start + l * stride_l + s * stride_s, mask=inside, other=0.0).to(TYPE)


@triton.jit
def _tile(
    query, key, value, gradient, row, part,
    query_b, query_n, query_l, query_s,
    key_b, key_n, key_l, key_s,
    value_b, value_n, value_l, value_s,
    gradient_b, gradient_n, gradient_l, gradient_s,
    row_b, row_l,
    heads, tokens, width, scale,
    WIDTH: tl.constexpr, TILE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Write the sums over one tile of queries, of one head of one image, for every key."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first = tl.program_id(1) * TILE
    # int64, because offsets in a batch of heads exceed 32 bits
    image = image.to(tl.int64)
    query += image * query_b + head * query_n
    key += image * key_b + head * key_n
    value += image * value_b + head * value_n
    gradient += image * gradient_b + head * gradient_n
    part += (image * heads + head) * tl.num_programs(1) * tokens + tl.program_id(1) * tokens

    q = _load(query, first, query_l, query_s, tokens, width, TILE, WIDTH, TYPE)
    d = _load(gradient, first, gradient_l, gradient_s, tokens, width, TILE, WIDTH, TYPE)
    i = first + tl.arange(0, TILE)
    # 0 beyond the last token, so that those queries add nothing
    r = tl.load(row + image * row_b + i * row_l, mask=i < tokens, other=0.0)

    # online softmax: the sum over all keys, kept finite by the largest score so far
    largest = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, tokens, TILE):
        k = _load(key, start, key_l, key_s, tokens, width, TILE, WIDTH, TYPE)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        j = start + tl.arange(0, TILE)
        score = tl.where((j < tokens)[None, :], score, -float("inf"))
        larger = tl.maximum(largest, tl.max(score, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(score - larger[:, None]), axis=1)
        largest = larger

    for start in range(0, tokens, TILE):
        k = _load(key, start, key_l, key_s, tokens, width, TILE, WIDTH, TYPE)
        v = _load(value, start, value_l, value_s, tokens, width, TILE, WIDTH, TYPE)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        probability = tl.exp(score - largest[:, None]) / total[:, None]
        of_map = tl.dot(d, tl.trans(v), input_precision="ieee")
        # a NaN propagates, as in the eager CAM, because it must stop the run
        kept = tl.maximum(probability * of_map, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weighed = kept * r[:, None]
        j = start + tl.arange(0, TILE)
        tl.store(part + j, tl.sum(weighed, axis=0), mask=j < tokens)
