"""Kernels beside their torch twins, in a process of its own: Triton decides on import whether it
interprets.

    TRITON_INTERPRET=1 python tests/kernel_twins.py cpu
    python tests/kernel_twins.py cuda [field ...]

prints how far they lie apart, by kernel and by what they say, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from talkhead_cli import march
from talkhead_cli.avatars.lokitalk import LokiTalk, field_triton
from talkhead_cli.blocks import rigid
from talkhead_cli.blocks.light import looking
from talkhead_cli.blocks.planes import TriPlanes
from talkhead_cli.blocks.planes_triton import ReadPlanes
from talkhead_cli.blocks.rigid_triton import Move
from talkhead_cli.contracts import (
    Camera,
    Frame,
    RayBundle,
    Signals,
    repacked,
    unpacked,
)
from talkhead_cli.march import guided, guided_triton
from talkhead_cli.march.dense import quadrature

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
BOX = torch.tensor([-1.0, -1.2, -1.0, 1.0, 1.0, 0.8])


def apart(a: Tensor, b: Tensor) -> float:
    """Their largest difference, as a share of the first one's largest value."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.float() - b.float()).abs().max() / a.float().abs().max()) if a.numel() else 0.0


def planes() -> dict[str, float]:
    worst: dict[str, float] = {}
    for n, n_channels in ((0, 4), (1, 4), (300, 4), (300, 3)):
        made = TriPlanes((5, 16, 9), n_channels)
        x = (torch.rand(n, 3) * 2.6 - 1.3).requires_grad_()  # a third lies outside the box
        value = made(x)
        there = made.to(DEVICE)
        at = x.detach().to(DEVICE).requires_grad_()
        twin = ReadPlanes.apply(at, torch.float32, *there.levels)
        weight = torch.randn(value.shape)
        cpu = TriPlanes((5, 16, 9), n_channels)
        cpu.load_state_dict({k: v.cpu() for k, v in there.state_dict().items()})
        slopes = torch.autograd.grad((cpu(x) * weight).sum(), [x, *cpu.levels])
        theirs = torch.autograd.grad((twin * weight.to(DEVICE)).sum(), [at, *there.levels])
        named = {"value": (value, twin)} | {
            name: pair
            for name, pair in zip(
                ("x", "level 0", "level 1", "level 2"),
                zip(slopes, theirs, strict=True),
                strict=True,
            )
        }
        for name, (a, b) in named.items():
            assert n == 0 or a.abs().max() > 0, name
            worst[name] = max(worst.get(name, 0.0), apart(a.detach(), b.detach().cpu()))
        half = ReadPlanes.apply(at, torch.float16, *there.levels)
        assert half.dtype == torch.float16
        worst["half"] = max(worst.get("half", 0.0), apart(value.detach(), half.detach().cpu()))
    return worst


def motions() -> dict[str, float]:
    """Points under their rows' motions, sorted by row and not; and under one of all."""
    worst: dict[str, float] = {}
    for n_rows, ordered in ((1, True), (3, True), (3, False)):
        row = torch.randint(0, 3, (1500,))
        row = row.sort().values if ordered else row
        x, motion = torch.randn(1500, 3), torch.randn(n_rows, 3, 4)
        weight = torch.randn(1500, 3)
        weight[:100] = 0.0
        found = []
        for device, move in (("cpu", rigid.moved), (DEVICE, Move.apply)):
            at = x.to(device).requires_grad_(), motion.to(device).requires_grad_()
            there = move(*at, row.to(device))
            slopes = torch.autograd.grad((there * weight.to(device)).sum(), at)
            found.append([v.detach().cpu() for v in (there, *slopes)])
            alone = move(x.to(device), at[1], row.to(device)).sum()
            found[-1].append(torch.autograd.grad(alone, at[1])[0].cpu())
        for name, a, b in zip(("place", "x", "motion", "motion alone"), *found, strict=True):
            worst[name] = max(worst.get(name, 0.0), apart(a, b))
    return worst


def marching() -> dict[str, float]:
    """Where samples lie, without and with a shift, and what they add up to."""
    worst: dict[str, float] = {}
    for n_samples in (5, 8):
        sampling = {"n_steps": 24, "n_samples": n_samples, "resolution": 31}
        marcher, _ = march.build(BOX, "cpu", kind="packed", **sampling)
        there, _ = march.build(BOX, DEVICE, kind="packed", kernels=True, **sampling)
        assert isinstance(marcher, march.GuidedMarcher)
        assert isinstance(there, march.FusedMarcher)
        grid = marcher.occupancy
        grid.occupied.copy_(torch.rand(31, 31, 31) < 0.1)
        grid.occupied[:4] = False  # some rays meet nothing
        grid.seen.copy_(torch.rand(31, 31, 31))
        origins = torch.tensor([0.0, 0.0, -4.0]) + 0.1 * torch.randn(700, 3)
        away = torch.nn.functional.normalize(0.7 * torch.randn(700, 3) - origins, dim=1)
        # these pass the occupied cells almost in parallel
        origins[:20] = torch.tensor([-0.95, 0.0, -4.0])
        away[:20] = torch.nn.functional.normalize(torch.tensor([2e-6, 0.0, 1.0]), dim=0)
        near, far = march.intersect_box(origins, away, BOX)
        rays = RayBundle(
            origins, away, near, far, torch.zeros(700, 2), torch.zeros(700, dtype=torch.long)
        )
        there.load_state_dict(marcher.state_dict())
        far_rays = rays.to(DEVICE)
        t, width, crossing = (v.cpu() for v in there.eval()._laid(far_rays))
        shifted, parts, _ = (v.cpu() for v in there.train()._laid(far_rays))
        for laid in (t, shifted):  # what meets nothing is asked as well, at places that are known
            assert bool(((laid >= near - 1e-3) & (laid <= far + 1e-3))[~crossing].all())
        t_twin, width_twin, alive = marcher.eval().lay(rays)
        # A place on the very edge of two cells may be rounded into either.
        twins = torch.zeros(700, 2 * n_samples)
        twins[alive] = torch.cat([t_twin, width_twin], 1)
        here = torch.where(crossing[:, None], torch.cat([t, width], 1), 0.0)
        same = (twins - here).abs().amax(1) < 1e-4
        assert int((~same).sum()) <= 3 and 100 < len(alive) < 650, (same.sum(), len(alive))
        crossing = crossing & same
        kept = same[alive]
        alive, t_twin, width_twin = alive[kept], t_twin[kept], width_twin[kept]
        found = {"t": apart(t_twin, t[alive]), "width": apart(width_twin, width[alive])}
        assert bool((shifted[alive].diff(dim=1) > -1e-5).all()) and bool((parts > -1e-6).all())
        assert float((shifted - t)[alive].abs().max()) > 0.01
        found["shifted widths"] = apart(width_twin.sum(1), parts[alive].sum(1))

        density, channels = 20 * torch.rand(700 * n_samples), torch.rand(700 * n_samples, 7)
        given = (density, channels, t, width, crossing)
        maps = guided_triton.composite(*(v.to(DEVICE) for v in given)).cpu()
        w = torch.where(crossing[:, None], quadrature(density.view(t.shape), width), 0.0)
        opacity = w.sum(1, keepdim=True)
        depth = (w * t).sum(1, keepdim=True)
        mean = depth / opacity.clamp_min(1e-10)
        spread = (w * (t - mean).square()).sum(1, keepdim=True)
        feature = (w[..., None] * channels.view(700, n_samples, 7)).sum(1)
        for name, part, twin in zip(
            ("feature", "opacity", "depth", "spread"),
            maps.split((7, 1, 1, 1), 1),
            (feature, opacity, depth, spread),
            strict=True,
        ):
            found[name] = apart(twin, part)
        worst = {name: max(worst.get(name, 0.0), value) for name, value in found.items()}
    return worst


def someone(size: Any, n_rows: int) -> tuple[LokiTalk, Signals]:
    """An avatar that nobody trained, whose nets all say something, and rows that drive it."""
    avatar = LokiTalk.build(size, n_steps=8, n_features=6, px=64).eval()
    with torch.no_grad():
        for p in avatar.parameters():
            p += (0.15 if p.ndim < 4 else 0.5) * torch.randn_like(p)
        avatar.frame.copy_(torch.tensor([-1.0, -1, -1, 1, 1, 1]))
        avatar.aabb.copy_(avatar.frame)
        person = avatar.people[0]
        person.body_scale.fill_(1.0)
        mouth = person.mouth
        mouth.neutral.copy_(0.3 * torch.randn(68, 3))
        avatar.face.copy_(mouth.neutral + 0.02 * torch.randn(68, 3))
        mouth.basis.copy_(torch.randn_like(mouth.basis))
        for part, value in ((mouth.scale, 0.1), (mouth.extent, 0.2), (mouth.pose_scale, 1.0)):
            part.fill_(value)
        person.views.copy_(torch.tensor([[-0.1, -0.1, 0.9], [0.1, 0.1, 1.0]]))
    c2w = torch.eye(4).repeat(n_rows, 1, 1)
    c2w[:, :3, 3] = torch.tensor([1.5, 0.0, -5.0])  # from further aside than was ever seen
    camera = Camera(c2w, torch.eye(3).repeat(n_rows, 1, 1), 64)
    signals = Signals(
        audio=torch.zeros(n_rows, 8, 6),
        eye=torch.rand(n_rows, 2),
        gaze=0.1 * torch.randn(n_rows, 2),
        brow=0.05 * torch.randn(n_rows, 2),
        landmarks=mouth.neutral + 0.05 * torch.randn(n_rows, 68, 3),
        landmarks_2d=torch.rand(n_rows, 68, 2),
        pose=0.1 * torch.randn(n_rows, 6) + torch.tensor([0, 0, 0, 0, 0, 5.0]),
        body=0.1 * torch.randn(n_rows, 4),
        camera=camera,
        person=torch.zeros(n_rows, dtype=torch.long),
        moment=torch.arange(n_rows),
    )
    return avatar, signals


@torch.no_grad()
def field() -> dict[str, float]:
    """LokiTalk's: the mean of its differences, by what it says, and the largest of places."""
    worst: dict[str, float] = {}
    for size, n_rows, ordered in (
        ("tiny", 1, True),
        ("tiny", 3, False),
        ("full", 1, True),
        ("full", 3, False),
        ("full", 3, True),
    ):
        avatar, signals = someone(size, n_rows)
        x = torch.rand(300, 3) * 2.4 - 1.2
        d = torch.nn.functional.normalize(torch.randn(300, 3), dim=1)
        row = torch.randint(0, n_rows, (300,))
        row = row.sort().values if ordered else row  # as pixels of pictures are
        density, channels = avatar.condition(signals)(x, d, row)
        asked = torch.arange(300) % 7 > 0
        told = Asked(avatar.to(DEVICE).condition(signals.to(DEVICE)))
        row = torch.where(asked, row, -1)
        twin, colours = (v.cpu() for v in told(*(v.to(DEVICE) for v in (x, d, row))))
        assert float(twin[~asked].abs().max()) == 0.0
        assert float(channels.std(0).min()) > 1e-4, "every channel says something"
        density, channels, twin, colours = (v[asked] for v in (density, channels, twin, colours))
        found = {
            "density": float(((twin - density).abs() / (density + 1e-3)).mean()),
            "colour": float((colours - channels)[:, :3].abs().mean()),
            "attention": float((colours - channels)[:, 3:6].abs().max()),
            "shift": float((colours - channels)[:, 6:].abs().max()),
        }
        worst = {name: max(worst.get(name, 0.0), value) for name, value in found.items()}
    return worst


class Asked:
    """LokiTalk's field as its kernel says it, wherever it runs."""

    skips = True

    def __init__(self, plain: Any) -> None:
        self.aabb, self.channels = plain.aabb, plain.channels
        self.n_detached, self.n_rows = plain.n_detached, plain.n_rows
        self._kernel, self._look = field_triton.fused_field(plain), plain._look
        assert self._look is not None and self._look.any()

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        return self._kernel(x, x, row)[0]

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return self._kernel(x, looking(d, row, self._look), row)


@torch.no_grad()
def fused() -> dict[str, float]:
    """Pictures marched without waiting beside those of the twin; and, while it explores, beside
    the lattice's, how far opacities are on average."""
    avatar, signals = someone("tiny", 2)
    sampling = {"n_steps": 24, "n_samples": 6, "resolution": 16}
    marcher, _ = march.build(avatar.aabb, "cpu", kind="packed", early_stop=0.0, **sampling)
    there, _ = march.build(
        avatar.aabb, DEVICE, kind="packed", early_stop=0.0, kernels=True, **sampling
    )
    assert isinstance(marcher, march.GuidedMarcher) and isinstance(there, march.FusedMarcher)
    grid = marcher.occupancy
    grid.occupied.copy_(torch.rand(16, 16, 16) < 0.6)
    grid.occupied[:5] = False
    grid.seen.copy_(torch.rand(16, 16, 16))
    there.load_state_dict(marcher.state_dict())
    origins = torch.tensor([0.0, 0.0, -4.0]) + 0.1 * torch.randn(200, 3)
    away = torch.nn.functional.normalize(0.7 * torch.randn(200, 3) - origins, dim=1)
    near, far = march.intersect_box(origins, away, avatar.aabb)
    rays = RayBundle(origins, away, near, far, torch.zeros(200, 2), torch.arange(200) % 2)
    plain = avatar.condition(signals)
    with mock.patch.object(guided, "SEEN", torch.inf):  # kernels march no ray again
        twin, lattice = marcher.eval().march(plain, rays), marcher.lattice.march(plain, rays)
    asked = Asked(avatar.to(DEVICE).condition(signals.to(DEVICE)))
    made = there.eval().march(asked, rays.to(DEVICE))
    assert twin.opacity.mean() > 0.1, float(twin.opacity.mean())
    assert int(made.n_points) == twin.n_points > 0 and there.samples_per_ray == 6
    found = {
        name: float((getattr(made, name).cpu() - getattr(twin, name)).abs().mean())
        for name in ("feature", "opacity", "depth", "spread")
    }
    there.exploring = there.keeps_misses = True
    even = there.march(asked, rays.to(DEVICE))
    assert there.samples_per_ray == 18 and int(even.n_points) == 3 * int(made.n_points)
    assert len(there.lay(rays.to(DEVICE))[2]) == len(rays), "what meets nothing comes along"
    found["while exploring"] = float((even.opacity.cpu() - lattice.opacity).abs().mean())
    there.keeps_misses = False
    assert 0 < len(there.lay(rays.to(DEVICE))[2]) < len(rays)
    return found


def recording() -> dict[str, float]:
    """A recorded picture beside one that is drawn as it comes; on a CUDA device alone."""
    if DEVICE.type != "cuda":
        return {}
    avatar, signals = someone("full", 2)
    avatar = avatar.to(DEVICE)
    x, row = torch.rand(64, 3, device=DEVICE), torch.arange(64, device=DEVICE) % 2

    @torch.no_grad()
    def work(*tensors: Tensor) -> Frame:
        asked = avatar.condition(repacked(signals, iter(tensors)))
        density, channels = asked(x, x, row)
        return Frame(channels, density, density, {})

    replay = march.Replay(work, DEVICE)
    for _ in range(5):
        other = signals.with_(eye=torch.rand(2, 2))
        found = replay(*unpacked(other))
        twin = work(*(t.to(DEVICE) for t in unpacked(other)))
    return {"channels": apart(twin.rgb, found.rgb), "density": apart(twin.alpha, found.alpha)}


if __name__ == "__main__":
    torch.manual_seed(0)
    all_of_them = (planes, motions, marching, field, fused, recording)
    kernels = {kernel.__name__: kernel for kernel in all_of_them}
    print(json.dumps({name: kernels[name]() for name in sys.argv[2:] or kernels}))
