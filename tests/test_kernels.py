"""CUDA kernels where no CUDA is: interpreted against their torch twins, and compiled for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from talkhead_cli.blocks.planes import TriPlanes

triton = pytest.importorskip("triton")


def twins(device: str) -> dict[str, dict[str, float]]:
    """How far kernels lie from their torch twins, by kernel and by what they say."""
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    script = Path(__file__).with_name("kernel_twins.py")
    done = subprocess.run(
        [sys.executable, str(script), device],
        env={**os.environ, **interpreted},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
    ],
)
def test_kernels_equal_their_twins(device: str) -> None:
    found = twins(device)
    planes = found["planes"]
    assert planes.pop("half") < 1e-3
    assert set(planes) == {"value", "x", "level 0", "level 1", "level 2"}
    assert max(planes.values()) < 1e-5, planes
    motions = found["motions"]
    assert len(motions) == 4 and max(motions.values()) < 1e-5, motions
    marching = found["marching"]
    assert len(marching) == 7 and max(marching.values()) < 1e-5, marching
    # products of sixteen bits
    limits = {"density": 0.01, "colour": 0.002, "attention": 0.001, "shift": 0.005}
    assert set(found["field"]) == set(limits)
    for name, limit in limits.items():
        assert found["field"][name] < limit, (name, found["field"])
    marched = found["fused"]
    assert marched.pop("while exploring") < 0.03, "three times the samples, laid otherwise"
    assert len(marched) == 4 and max(marched.values()) < 0.01, marched
    assert len(found["recording"]) == (2 if device == "cuda" else 0)
    assert max(found["recording"].values(), default=0) < 1e-5, found["recording"]


def compiled(kernel: Any, architecture: int, kinds: dict[str, str], **constants: Any) -> Any:
    """A kernel as a GPU of that architecture would run it; none is needed to make it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # tensors begin where an access of sixteen bytes may
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in kinds.items()
        if kind.startswith("*")
    }
    source = ASTSource(
        fn=kernel,
        signature={**kinds, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs=aligned,
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert len(made.asm["cubin"]) > 1000
    return made


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("precision", ["*fp32", "*fp16"])
def test_planes_kernels_compile(architecture: int, precision: str) -> None:
    """The interpreter takes much that the compiler refuses."""
    from talkhead_cli.blocks import planes_triton as kernels

    counts = dict.fromkeys(("n", "side", "n_levels", "level"), "i32")
    read = {"x": "*fp32", "texels": "*fp32", "out": precision, **counts}
    spread = {
        "x": "*fp32",
        "texels": "*fp32",
        "grad": precision,
        "grad_x": "*fp32",
        "grad_texels": "*fp32",
        **counts,
    }
    for kernel, kinds in ((kernels._read, read), (kernels._spread, spread)):
        compiled(kernel, architecture, kinds, C=4, ROOM=4, BLOCK=kernels.BLOCK)


def test_texels_are_read_and_added_to_as_one() -> None:
    """Four channels are one access: one by one they make training wait for memory."""
    from talkhead_cli.blocks import planes_triton as kernels

    counts = dict.fromkeys(("n", "side", "n_levels", "level"), "i32")
    kinds = {
        "x": "*fp32",
        "texels": "*fp32",
        "grad": "*fp16",
        "grad_x": "*fp32",
        "grad_texels": "*fp32",
        **counts,
    }
    ptx = compiled(kernels._spread, 90, kinds, C=4, ROOM=4, BLOCK=kernels.BLOCK).asm["ptx"]
    assert ptx.count("relaxed.add.v4.f32") == 3 * 4
    assert ptx.count("ld.global.v4.b32") == 3 * 4


@pytest.mark.parametrize("architecture", [80, 90])
def test_motions_kernels_compile(architecture: int) -> None:
    from talkhead_cli.blocks import rigid_triton as kernels

    move = {"x": "*fp32", "motion": "*fp32", "row": "*i64", "out": "*fp32", "n": "i32"}
    back = {
        "x": "*fp32",
        "motion": "*fp32",
        "row": "*i64",
        "grad": "*fp32",
        "grad_x": "*fp32",
        "grad_motion": "*fp32",
        "n": "i32",
    }
    for many in (True, False):
        shape = {"MANY": many, "BLOCK": kernels.BLOCK}
        compiled(kernels._move, architecture, move, **shape)
        for of_x in (True, False):
            compiled(kernels._move_back, architecture, back, OF_X=of_x, OF_MOTION=True, **shape)


@pytest.mark.parametrize("architecture", [80, 90])
def test_marching_kernels_compile(architecture: int) -> None:
    from talkhead_cli.march import guided_triton as kernels

    floats = dict.fromkeys(
        ("origins", "directions", "nears", "fars", "box", "aabb", "worth", "shifts", "t", "width"),
        "*fp32",
    )
    for shifted in (True, False):
        compiled(
            kernels._lay,
            architecture,
            {**floats, "alive": "*i1", "n": "i32"},
            D=128,
            N=48,
            K=8,
            ROOM=8,
            SHIFTED=shifted,
            BLOCK=kernels.BLOCK,
        )
    floats = dict.fromkeys(("density", "channels", "t", "width", "maps"), "*fp32")
    compiled(
        kernels._composite,
        architecture,
        {**floats, "alive": "*i1", "n": "i32"},
        K=8,
        C=8,
        ROOM=8,
        BLOCK=kernels.BLOCK,
    )


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_fields_kernels_compile_and_keep_to_their_registers(architecture: int) -> None:
    from talkhead_cli.avatars.lokitalk import field_triton as kernels

    def kinds(*names: str) -> dict[str, str]:
        others = {"row": "*i64", "n": "i32", "levels": "*i32"} | dict.fromkeys(
            ("matrices", "texels", "read"), "*fp16"
        )
        return {name: others.get(name, "*fp32") for name in names}

    nets = {"W": 64, "BLOCK": kernels.BLOCK, "E": 48}
    deform = kinds("x", "row", "places", "channels", "n", "matrices", "biases", "waves", "affine",
                   "rows", "face", "torso")  # fmt: skip
    read = kinds("places", "row", "read", "n", "texels", "levels") | dict.fromkeys(
        ("read", "texels"),
        "*i32",  # two channels at a time
    )
    shade = kinds(
        "x", "d", "row", "read", "found", "channels", "n", "matrices", "biases", "rows", "density"
    )
    for kernel, told, constants in (
        (kernels._deform, deform, nets),
        (kernels._read, read, {"L": 5, "BLOCK": kernels.READ_BLOCK}),
        (kernels._shade, shade, {**nets, "H": 64, "L": 5}),
    ):
        made = compiled(kernel, architecture, told, **constants)
        assert made.asm["ptx"].count("ld.local") == 0
        assert made.metadata.shared < 48 * 1024


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
