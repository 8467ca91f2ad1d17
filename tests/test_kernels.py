"""CUDA kernels where no CUDA is: interpreted against their torch twins, and compiled for real.

Triton decides on import whether it interprets, so the interpreter runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from talkhead_cli.blocks.planes import TriPlanes

triton = pytest.importorskip("triton")

TWINS = """
import json, torch
from talkhead_cli.blocks.planes import TriPlanes
from talkhead_cli.blocks.planes_triton import ReadPlanes

worst = {}
torch.manual_seed(0)
for n in (0, 1, 300):
    planes = TriPlanes((5, 16, 9), 4)
    x = (torch.rand(n, 3) * 2.6 - 1.3).requires_grad_()  # a third lies outside the box
    twins = [planes(x), ReadPlanes.apply(x, torch.float32, *planes.levels)]
    weight = torch.randn_like(twins[0])
    slopes = [torch.autograd.grad((t * weight).sum(), [x, *planes.levels]) for t in twins]
    pairs = {"value": twins, "x": [s[0] for s in slopes]}
    pairs |= {f"level {i}": [s[1 + i] for s in slopes] for i in range(3)}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape and (n == 0 or a.abs().max() > 0), name
        gap = float((a - b).detach().abs().max() / a.detach().abs().max()) if n else 0.0
        worst[name] = max(worst.get(name, 0.0), gap)
half = ReadPlanes.apply(x, torch.float16, *planes.levels)
worst["half"] = float((half - twins[0]).detach().abs().max())
print(json.dumps({"worst": worst, "half": str(half.dtype)}))
"""


def test_planes_kernel_equals_grid_sample_in_values_and_gradients() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWINS], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("half") == "torch.float16"
    assert found["worst"].pop("half") < 1e-3
    assert set(found["worst"]) == {"value", "x", "level 0", "level 1", "level 2"}
    assert max(found["worst"].values()) < 1e-5, found


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("precision", ["*fp32", "*fp16"])
def test_planes_kernels_compile(architecture: int, precision: str) -> None:
    """The interpreter takes much that the compiler refuses; no GPU is needed to ask it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from talkhead_cli.blocks import planes_triton as kernels

    counts = dict.fromkeys(("n", "side", "stride", "column"), "i32")
    read = {"x": "*fp32", "texels": "*fp32", "out": precision, **counts}
    spread = {"x": "*fp32", "texels": "*fp32", "grad": precision, "grad_x": "*fp32",
              "grad_texels": "*fp32", **counts}  # fmt: skip
    for kernel, signature in ((kernels._read, read), (kernels._spread, spread)):
        source = ASTSource(
            fn=kernel, signature={**signature, "C": "constexpr", "BLOCK": "constexpr"},
            constexprs={"C": 4, "BLOCK": kernels.BLOCK},
        )  # fmt: skip
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert len(made.asm["cubin"]) > 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_planes_on_cuda_equal_planes_on_the_cpu() -> None:
    torch.manual_seed(0)
    planes = TriPlanes((16, 64, 128), 4)
    x = torch.rand(5000, 3) * 2.4 - 1.2
    found = []
    for device in ("cpu", "cuda"):
        here, at = planes.to(device), x.to(device).requires_grad_()
        value = here(at)
        slopes = torch.autograd.grad(value.square().sum(), [at, *here.levels])
        found.append([value.detach().cpu(), *(s.cpu() for s in slopes)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
