"""Marching against closed forms, and the packed marcher against the plain one."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from solids import (
    BOX,
    N_STEPS,
    STEP,
    Solid,
    assert_same,
    ball,
    camera,
    length,
    marchers,
    packed,
    picture,
    ray,
    slab,
    smooth,
)
from torch import Tensor

from talkhead_cli.contracts import Field, MisuseError, RayBundle, TalkheadError
from talkhead_cli.march import (
    DenseMarcher,
    FusedMarcher,
    GuidedMarcher,
    NerfaccMarcher,
    PackedMarcher,
    build,
    check,
    cuda,
    device_of,
    picture_rays,
    pixel_rays,
)

# Rays


def test_the_centre_pixel_looks_along_the_optical_axis() -> None:
    view = camera(yaw=0.4)
    rays = pixel_rays(view, torch.tensor([0]), torch.tensor([[6.0, 6.0]]), BOX)
    torch.testing.assert_close(rays.directions[0], view.c2w[0, :3, 2])
    torch.testing.assert_close(rays.origins[0], view.c2w[0, :3, 3])


def test_points_on_rays_project_back_to_their_pixels() -> None:
    view = camera(yaw=-0.7, rows=2)
    view.k[1, 0, 1] = 1.5  # skew
    rays = picture_rays(view, torch.tensor([1, 0]), BOX)
    assert rays.layout == (2, 12, 12)
    assert rays.row.tolist() == [1] * 144 + [0] * 144
    assert rays.pixel[:2].tolist() == [[0.5, 0.5], [1.5, 0.5]], "raster order, centres at +0.5"
    torch.testing.assert_close(length(rays.directions), torch.ones(288))
    x = rays.origins + 3.3 * rays.directions
    w2c = torch.linalg.inv(view.c2w[rays.row])
    seen = (w2c[:, :3, :3] @ x[..., None]).squeeze(-1) + w2c[:, :3, 3]
    image = (view.k[rays.row] @ seen[..., None]).squeeze(-1)
    torch.testing.assert_close(image[:, :2] / image[:, 2:], rays.pixel, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("origin", "direction", "expected"),
    [
        ((0, 0, -3), (0, 0, 1), (2.2, 3.8)),  # from outside, parallel to two slabs
        ((0, 0, 0), (1, 0, 0), (0.01, 1.0)),  # from inside
        ((0, 0, 0), (0, -1, 0), (0.01, 1.2)),
        ((0, 0, 3), (0, 0, 1), None),  # behind
        ((2, 0, -3), (0, 0, 1), None),  # parallel and beside
        ((-2, 0, 0), (1, -0.0, 0), (1.0, 3.0)),  # a zero with a sign
    ],
)
def test_intersect_box(
    origin: tuple[float, float, float],
    direction: tuple[float, float, float],
    expected: tuple[float, float] | None,
) -> None:
    rays = ray(origin, direction)
    if expected is None:
        assert torch.equal(rays.near, rays.far)
    else:
        assert (rays.near.item(), rays.far.item()) == pytest.approx(expected, abs=1e-6)


# Closed forms


@pytest.mark.parametrize("towards", [(0.0, 0.0, 1.0), (0.2, 0.15, 1.0)])
def test_a_slab_obeys_beer_and_lambert(towards: tuple[float, float, float]) -> None:
    strength, slope = 3.0, 1 / math.sqrt(sum(v * v for v in towards))
    length, begin = 0.8 / slope, 2.6 / slope  # the slab spans z = -0.4 ... 0.4, the eye z = -3
    for marcher in marchers(256):
        out = marcher.march(Solid(slab(strength, -0.4, 0.4)), ray((0, 0, -3), towards))
        opacity = 1 - math.exp(-strength * length)
        # mean of t under the density of stopping, not normalised
        depth = begin * opacity + (1 - (1 + strength * length) * math.exp(-strength * length)) / 3
        assert out.opacity.item() == pytest.approx(opacity, abs=3e-3)
        assert out.depth.item() == pytest.approx(depth, abs=1e-2)
        assert out.feature[0, 3].item() == pytest.approx(out.opacity.item(), abs=1e-6)


def test_a_ball_stops_light_along_its_chords_and_looks_round() -> None:
    rays = picture(16)
    for marcher in marchers(256):
        opacity = marcher.march(Solid(ball(2.0, 0.6)), rays).opacity
        miss = length(torch.linalg.cross(rays.origins, rays.directions))
        chord = 2 * (0.36 - miss**2).clamp_min(0).sqrt()
        expected = 1 - torch.exp(-2.0 * chord)
        assert (opacity[:, 0] - expected).abs().max() < 2 * 2.0 * 1.6 / 256
        image = opacity.view(16, 16)
        for twin in (image.flip(0), image.flip(1), image.T):
            torch.testing.assert_close(image, twin, atol=2e-2, rtol=0)


def test_a_thin_opaque_shell_has_a_depth_and_no_spread() -> None:
    for marcher in marchers():
        rays = ray((0, 0, -3), (0, 0, 1))
        out = marcher.march(
            Solid(lambda x, row: 1e5 * ((length(x) - 0.5).abs() < 0.03).float()), rays
        )
        assert out.opacity.item() == pytest.approx(1.0)
        assert out.depth.item() == pytest.approx(3 - 0.53, abs=STEP)
        assert 0 <= out.spread.item() < 1e-6
        two = marcher.march(Solid(slab(1e5, -0.4, 0.4)), rays)
        assert two.spread.item() < 1e-6, "only the first surface counts"


def test_the_nearer_of_two_slabs_hides_the_further() -> None:
    def shape(x: Tensor, row: Tensor) -> Tensor:
        return slab(20.0, -0.5, -0.3)(x, row) + slab(20.0, 0.3, 0.5)(x, row)

    for marcher in marchers():
        out = marcher.march(Solid(shape), ray((0, 0, -3), (0, 0, 1)))
        front = 1 - math.exp(-20 * 8 * STEP)
        back = (1 - front) * front
        assert out.opacity.item() == pytest.approx(front + back, abs=1e-5)
        assert out.feature[0, 2].item() == pytest.approx(-0.4 * front + 0.4 * back, abs=0.06)
        assert out.spread.item() > 1e-3


# One marcher against another


@pytest.mark.parametrize("training", [False, True])
def test_packed_equals_dense_on_a_full_grid(training: bool) -> None:
    field, rays = Solid(smooth, n_rows=2, n_detached=1), picture(yaw=0.5, rows=2)
    found = []
    for marcher in (packed(), DenseMarcher(BOX, N_STEPS)):
        marcher.train(training)
        torch.manual_seed(3)
        found.append(marcher.march(field, rays))
    assert_same(found[0], found[1])
    assert 0 < found[0].n_points < found[1].n_points


def test_a_grid_that_has_learnt_costs_less_and_shows_the_same() -> None:
    field, rays, marcher = Solid(ball(40.0, 0.5)), picture(), packed()
    full = marcher.march(field, rays)
    marcher.refresh(field, 16)
    lean = marcher.march(field, rays)
    assert_same(lean, full)
    assert lean.n_points < 0.4 * full.n_points


def test_rounds_without_gradients_equal_one_shot() -> None:
    field, rays, marcher = Solid(smooth), picture(), packed(early_stop=1e-4)
    marcher.occupancy.update(field, 0)
    one_shot = marcher.march(field, rays)
    with torch.no_grad():
        rounds = marcher.march(field, rays)
        assert_same(rounds, one_shot, 5e-4)
        marcher.early_stop = 0.0
        assert_same(marcher.march(field, rays), one_shot, 1e-6)


def test_hidden_samples_are_never_evaluated() -> None:
    field, rays, marcher = Solid(slab(1e4, -0.7, 0.7)), picture(), packed(early_stop=1e-4)
    with torch.no_grad():
        rounds = marcher.march(field, rays)
    one_shot = marcher.march(field, rays)
    assert_same(rounds, one_shot)
    assert rounds.n_points < 0.2 * one_shot.n_points


def test_training_shifts_each_ray_by_a_part_of_a_step_and_seeds_repeat() -> None:
    field, rays, marcher = Solid(smooth), picture(), packed().train()
    torch.manual_seed(1)
    first, other = marcher.march(field, rays), marcher.march(field, rays)
    torch.manual_seed(1)
    assert_same(marcher.march(field, rays), first, 0.0)
    assert not torch.equal(first.depth, other.depth)
    assert_same(first, other, 0.1)


# Gradients


def test_the_gradient_of_opacity_has_a_closed_form() -> None:
    for marcher in marchers():
        strength = torch.tensor(2.0, requires_grad=True)
        out = marcher.march(Solid(slab(strength, -0.4, 0.4)), ray((0, 0, -3), (0, 0, 1)))
        (slope,) = torch.autograd.grad(out.opacity.sum(), strength)
        length = 32 * STEP
        assert slope.item() == pytest.approx(length * math.exp(-2.0 * length), rel=1e-4)


@pytest.mark.parametrize("what", ["feature", "depth", "spread"])
def test_gradients_equal_finite_differences(what: str) -> None:
    rays, marcher = picture(6), packed(16)

    def value(strength: Tensor) -> Tensor:
        field = Solid(lambda x, row: (x * strength).sum(-1).exp())
        out: Tensor = getattr(marcher.march(field, rays), what)
        return out.double().sum()

    point = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    (slope,) = torch.autograd.grad(value(point), point)
    for axis in range(3):
        h = torch.zeros(3)
        h[axis] = 1e-2
        numeric = (value(point.detach() + h) - value(point.detach() - h)) / 2e-2
        assert slope[axis].item() == pytest.approx(numeric.item(), rel=5e-3, abs=5e-3)


def test_detached_channels_do_not_move_the_density() -> None:
    for marcher in marchers():
        strength = torch.tensor(2.0, requires_grad=True)
        field = Solid(slab(strength, -0.4, 0.4), n_detached=2)
        out = marcher.march(field, ray((0.2, 0.1, -3), (0, 0, 1)))
        kept, detached = out.feature[0, :2], out.feature[0, 2:]
        assert not detached.requires_grad or torch.autograd.grad(
            detached.sum(), strength, retain_graph=True, allow_unused=True
        )[0] in (None, 0)
        assert torch.autograd.grad(kept.sum(), strength)[0] != 0


def test_misses_are_transparent_and_cost_nothing() -> None:
    field = Solid(smooth)
    for marcher in (packed(), GuidedMarcher(packed(), 4, 16).eval()):
        for context in (torch.enable_grad(), torch.no_grad()):
            with context:
                out = marcher.march(field, ray((5, 0, -3), (0, 0, 1)))
                assert out.n_points == 0 and not out.feature.any() and not out.opacity.any()
                assert not out.depth.any() and not out.spread.any()
        marcher.occupancy.occupied.zero_()
        assert marcher.march(field, picture()).n_points == 0
        assert marcher.march(field, picture()[:0]).feature.shape == (0, 4)


def test_rays_that_miss_do_not_break_the_graph() -> None:
    strength = torch.tensor(2.0, requires_grad=True)
    field = Solid(lambda x, row: strength * smooth(x, row))
    guided, exploring = (GuidedMarcher(packed(), 4, 16).train() for _ in range(2))
    exploring.exploring = True
    for marcher in (packed().train(), guided, exploring):
        out = marcher.march(field, ray((5, 0, -3), (0, 0, 1)))
        assert out.n_points == 0
        for loss in (out.feature.sum(), out.opacity.sum()):
            (slope,) = torch.autograd.grad(loss, strength, retain_graph=True)
            assert slope == 0


# The door


def test_build_says_what_it_chose() -> None:
    marcher, why = build(BOX, "cpu", n_steps=8, resolution=8)
    assert type(marcher) is PackedMarcher and "nerfacc" in why and "\n" not in why
    assert marcher.step == pytest.approx(1.6 / 8)
    few, why = build(BOX, "cpu", n_samples=4, resolution=8)
    assert isinstance(few, GuidedMarcher) and few.n_samples == 4
    assert why.startswith("4 samples a ray; ") and "packed in plain torch: nerfacc" in why
    dense, _ = build(BOX, "cpu", kind="dense")
    assert isinstance(dense, DenseMarcher)
    assert isinstance(Solid(smooth), Field)
    with pytest.raises(MisuseError, match="march.kind"):
        build(BOX, "cpu", kind="fast")  # type: ignore[arg-type]
    assert all(not need.required and (need.ok or need.fix) for need in check())


def test_what_is_asked_for_and_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TalkheadError, match="nerfacc cannot be used.*march.kind=packed"):
        build(BOX, "cpu", kind="nerfacc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TalkheadError, match="no CUDA device is found; use --device cpu"):
        device_of("cuda")
    with pytest.raises(MisuseError, match="auto, cpu or cuda, not 'tpu'"):
        device_of("tpu")
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    few, _ = build(BOX, "cpu", kernels=True, n_samples=4, resolution=8)
    assert isinstance(few, FusedMarcher) and not few.waits
    assert (few.fix_shapes(True), few.keeps_misses) == (4, True)
    few.exploring = True
    assert few.fix_shapes(True) == 3 * 4 and few.waits, "evenly in occupied cells"
    assert (few.fix_shapes(False), few.keeps_misses) == (0, False)
    assert all(marcher.waits and not marcher.fix_shapes(True) for marcher in marchers())
    few.look_closely(BOX[None], 9)
    few.look_closely(BOX[None], 6)
    assert few.n_samples == 9, "of every ray, since kernels take as many of all"


@pytest.mark.parametrize(("free", "cores", "jobs"), [(1, 8, 1), (10, 8, 3), (64, 4, 4)])
def test_compilers_are_bounded_by_free_memory(free: float, cores: int, jobs: int) -> None:
    assert cuda.compilers(free, cores) == jobs
    assert cuda.free_gb() > 0


def test_headers_are_taken_from_pip_where_the_toolkit_lacks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, whole = tmp_path / "toolkit", tmp_path / "whole"
    for home in (bare, whole):
        (home / "include").mkdir(parents=True)
    for name in ("curand.h", "cublas_v2.h", "cusparse.h"):
        (whole / "include" / name).touch()
    monkeypatch.setattr(cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(bare))
    assert cuda._headers() is None
    monkeypatch.setenv("CUDA_HOME", str(whole))
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")
    monkeypatch.setenv("MAX_JOBS", "7")
    cuda._make_way()
    cuda._make_way()
    assert os.environ["CPLUS_INCLUDE_PATH"] == os.pathsep.join(["/mine", str(whole / "include")])
    assert os.environ["MAX_JOBS"] == "7", "what the user set stays"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [False, True])
def test_nerfacc_equals_packed(training: bool) -> None:
    marcher, why = build(BOX, "cuda", early_stop=0.0)
    if not isinstance(marcher, NerfaccMarcher):
        pytest.skip(why)
    plain = PackedMarcher(marcher.occupancy, marcher.step, early_stop=0.0).cuda()
    rays = picture(yaw=0.5)
    on_gpu = RayBundle(
        *(getattr(rays, n).cuda() for n in ("origins", "directions", "near", "far", "pixel", "row"))
    )
    field = Solid(smooth, n_detached=1)
    field.aabb = BOX.cuda()
    found, slopes = [], []
    for m in (marcher, plain):
        m.train(training)
        strength = torch.tensor(1.0, device="cuda", requires_grad=True)
        field.shape = lambda x, row, s=strength: s * smooth(x, row)  # type: ignore[misc]
        torch.manual_seed(0)
        found.append(m.march(field, on_gpu))
        (slope,) = torch.autograd.grad(found[-1].feature.sum() + found[-1].depth.sum(), strength)
        slopes.append(slope)
        with torch.no_grad():
            torch.manual_seed(0)
            assert_same(m.march(field, on_gpu), found[-1], 2e-3)
    assert_same(found[0], found[1], 2e-3)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=2e-2, atol=1e-2)
