"""Compare the CAM's Triton kernel with the explicit CAM, in Triton's interpreter.

A separate program with TRITON_INTERPRET=1, which Triton reads at import. Prints the largest
difference of each case, as a share of the largest number.
"""

import json

import torch

from rft.method import relevance
from rft.method.relevance_kernel import through_tiles

# images, heads, tokens, head width: tokens fewer than, equal to and more than one or many tiles,
# widths that are not a power of two, or below the minimum of a product
CASES = [(3, 2, 17, 16), (2, 3, 50, 64), (1, 2, 64, 8), (2, 2, 65, 24), (1, 2, 197, 80)]


def difference(
    case: tuple[int, int, int, int], dtype: torch.dtype, *, broken: bool = False
) -> float:
    """Compare one layer's rows; its heads have the memory layout of a tower's.

    `broken` has a NaN in the gradient of the first image: both must then have the same ones.
    """
    images, heads, tokens, width = case
    draws = torch.Generator().manual_seed(0)
    projected = 2 * torch.randn(images, tokens, 3 * heads * width, generator=draws)
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.to(dtype).chunk(3, -1)
    )
    gradient = torch.randn(images, tokens, heads, width, generator=draws).to(dtype).transpose(1, 2)
    row_BL = torch.rand(images, tokens, generator=draws)
    if broken:
        gradient[0, 0, 1, 0] = torch.nan
    tiles = through_tiles(row_BL, (query, key, value), gradient, widened=True)
    maps = relevance.through_maps(row_BL, (query, key, value), gradient)
    if broken:
        assert maps[0].isnan().any()
        assert torch.equal(tiles.isnan(), maps.isnan())
        tiles, maps = tiles.nan_to_num(), maps.nan_to_num()
    return float((tiles - maps).abs().max() / maps.abs().max())


if __name__ == "__main__":
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {f"{case} {name}": difference(case, types[name]) for case in CASES for name in types}
    found["NaN"] = difference(CASES[1], torch.float32, broken=True)
    print(json.dumps(found))
