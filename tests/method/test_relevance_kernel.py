"""The CAM's Triton kernel equals the explicit CAM, and GPU compilers accept it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
triton = pytest.importorskip("triton", reason="Triton is not installed: torch brings it for GPUs")


def test_equals_the_maps_in_tritons_interpreter():
    command = [sys.executable, "-m", "tests.method.interpreted"]
    where = {"cwd": Path(__file__).parents[2], "env": os.environ | {"TRITON_INTERPRET": "1"}}
    result = subprocess.run(command, **where, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert len(found) == 11
    for case, difference in found.items():
        assert difference < 1e-6, case


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu(capability):
    """For A100 and H100, whose compiler needs no GPU: types and shared memory fit."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rft.method import relevance_kernel as kernel

    chosen = {"WIDTH": 64, "TILE": kernel.TILE, "TYPE": triton.language.bfloat16}
    kinds = dict.fromkeys(("query", "key", "value", "gradient"), "*bf16")
    kinds |= dict.fromkeys(("row", "part"), "*fp32") | {"scale": "fp32"}
    kinds |= dict.fromkeys(chosen, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel._tile.arg_names}
    source = ASTSource(fn=kernel._tile, signature=signature, constexprs=chosen)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    # products on the matrix units, and no more shared memory than a block may have
    assert "mma" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024
