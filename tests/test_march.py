"""Marching against closed forms, and the packed marcher against the plain one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from talkhead_cli.contracts import Camera, Field, MisuseError, RayBundle, RayMarcher, Rendered
from talkhead_cli.march import (
    DenseMarcher,
    GuidedMarcher,
    MarchOptions,
    NerfaccMarcher,
    OccupancyGrid,
    PackedMarcher,
    build,
    check,
    cuda,
    guided,
    intersect_box,
    picture_rays,
    pixel_rays,
    step_length,
)

BOX = torch.tensor([-1.0, -1.2, -0.8, 1.0, 1.2, 0.8])
N_STEPS = 64
STEP = step_length(BOX, N_STEPS)

Shape = Callable[[Tensor, Tensor], Tensor]


def length(x: Tensor) -> Tensor:
    return x.square().sum(-1).sqrt()


class Solid:
    """Analytic density(x, row); its channels are x, y, z and 1."""

    def __init__(self, shape: Shape, n_rows: int = 1, n_detached: int = 0) -> None:
        self.aabb, self.channels = BOX, 4
        self.shape, self.n_rows, self.n_detached = shape, n_rows, n_detached

    def density(self, x: Tensor, row: Tensor) -> Tensor:
        assert x.shape == (len(row), 3) and row.dtype == torch.long
        return self.shape(x, row)

    def __call__(self, x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        assert d.shape == x.shape
        return self.density(x, row), torch.cat((x, torch.ones_like(x[:, :1])), 1)


def slab(strength: float | Tensor, z0: float, z1: float) -> Shape:
    return lambda x, row: strength * ((x[:, 2] > z0) & (x[:, 2] < z1)).float()


def ball(strength: float, radius: float, centre: tuple[float, float, float] = (0, 0, 0)) -> Shape:
    def shape(x: Tensor, row: Tensor) -> Tensor:
        return strength * (length(x - torch.tensor(centre)) < radius).float()

    return shape


def smooth(x: Tensor, row: Tensor) -> Tensor:
    return 30 * torch.exp(-8 * (x**2).sum(-1)) * (1.5 + torch.sin(9 * x[:, 0] + row))


def camera(size: int = 12, yaw: float = 0.0, rows: int = 1) -> Camera:
    """On a circle of radius 4 around the origin, looking at it, z forward."""
    s, c = math.sin(yaw), math.cos(yaw)
    c2w = torch.eye(4)
    c2w[:3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    c2w[:3, 3] = -4 * c2w[:3, 2]
    k = torch.tensor([[1.7 * size, 0, size / 2], [0, 1.7 * size, size / 2], [0, 0, 1]])
    return Camera(c2w.repeat(rows, 1, 1), k.repeat(rows, 1, 1), size)


def picture(size: int = 12, yaw: float = 0.0, rows: int = 1) -> RayBundle:
    return picture_rays(camera(size, yaw, rows), torch.arange(rows), BOX)


def ray(origin: tuple[float, float, float], towards: tuple[float, float, float]) -> RayBundle:
    o = torch.tensor([origin], dtype=torch.float32)
    d = torch.nn.functional.normalize(torch.tensor([towards], dtype=torch.float32), dim=-1)
    row = torch.zeros(1, dtype=torch.long)
    return RayBundle(o, d, *intersect_box(o, d, BOX), torch.zeros(1, 2), row)


def packed(n_steps: int = N_STEPS, early_stop: float = 0.0) -> PackedMarcher:
    step = step_length(BOX, n_steps)
    return PackedMarcher(OccupancyGrid(BOX, step, 16), step, early_stop=early_stop).eval()


def marchers(n_steps: int = N_STEPS) -> list[RayMarcher]:
    few = GuidedMarcher(packed(n_steps), n_steps, n_steps).eval()
    return [packed(n_steps), DenseMarcher(BOX, n_steps).eval(), few]


def assert_same(a: Rendered, b: Rendered, tolerance: float = 1e-4) -> None:
    for name in ("feature", "opacity", "depth", "spread"):
        difference = (getattr(a, name) - getattr(b, name)).abs().max()
        assert difference <= tolerance, f"{name} differs by {difference}"


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
    marcher.refresh(field, 1)
    assert marcher.occupancy.occupied.all(), "only every 16th step"
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


# Occupancy


def two_balls(x: Tensor, row: Tensor) -> Tensor:
    """Row 0 fills one side, row 1 the other."""
    side = torch.where(row == 0, -0.5, 0.5)[:, None] * torch.tensor([1.0, 0.0, 0.0])
    return 50.0 * (length(x - side) < 0.25).float()


LEFT, RIGHT = torch.tensor([[-0.5, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0]])


def grid(resolution: int = 20) -> OccupancyGrid:
    return OccupancyGrid(BOX, STEP, resolution)


def test_it_starts_full_and_knows_its_box() -> None:
    cells = grid()
    x = torch.rand(50, 3) * (BOX[3:] - BOX[:3]) + BOX[:3]
    assert cells.contains(x).all()
    assert not cells.contains(x + torch.tensor([2.0, 0.0, 0.0])).any()
    torch.testing.assert_close(cells.tight_box(), BOX)


def test_it_holds_the_union_over_rows_dilated_by_a_cell() -> None:
    cells, field = grid(), Solid(two_balls, n_rows=2)
    for step in range(0, 64, 16):
        cells.update(field, step)
    assert cells.contains(LEFT).item() and cells.contains(RIGHT).item()
    size = (BOX[3:] - BOX[:3]) / 20
    directions = torch.nn.functional.normalize(torch.randn(200, 3), dim=-1)
    assert cells.contains(RIGHT + directions * 0.25).all(), "the whole rim"
    assert not cells.contains(torch.tensor([[0.0, 1.0, 0.6], [0.0, -1.0, -0.6]])).any()
    box = cells.tight_box()
    half = torch.tensor([0.75, 0.25, 0.25])
    assert (box[3:] >= half).all() and (box[3:] <= half + 2 * size + 1e-5).all()
    assert (box[:3] <= -half).all() and (box[:3] >= -half - 2 * size - 1e-5).all()


def test_it_forgets_slowly_and_still_looks_everywhere() -> None:
    cells = grid()
    cells.update(Solid(ball(50.0, 0.3, (-0.5, 0, 0))), 0)
    assert not cells.contains(RIGHT).item()
    moved = Solid(ball(50.0, 0.3, (0.5, 0, 0)))
    for step in range(1000, 1012):
        cells.update(moved, step)
    assert cells.contains(RIGHT).item(), "found by the random quarter"
    assert cells.contains(LEFT).item(), "0.95^12 of the old density is still dense"
    for step in range(2000, 2200):
        cells.update(moved, step)
    assert not cells.contains(LEFT).item()


def test_a_field_that_is_nowhere_leaves_the_grid_open() -> None:
    cells = grid()
    cells.update(Solid(ball(0.0, 0.3)), 0)
    assert cells.occupied.all()
    cells.update(Solid(ball(1e-4, 0.3)), 0)
    assert cells.contains(torch.zeros(1, 3)).item(), "thin everywhere: the mean is the limit"
    assert not cells.occupied.all()


def test_updates_repeat_by_step_and_survive_saving() -> None:
    field = Solid(two_balls, n_rows=2)
    one, two = packed(), packed()
    for marcher in (one, two):
        torch.rand(7)  # the global generator plays no part
        marcher.occupancy.update(field, 0)
        marcher.occupancy.update(field, 1000)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key
    new = packed()
    new.load_state_dict(one.state_dict(), strict=True)
    assert set(one.state_dict()) == {
        f"occupancy.{k}" for k in ("aabb", "density", "seen", "watched", "occupied")
    }
    assert torch.equal(new.occupancy.tight_box(), one.occupancy.tight_box())
    other = packed()
    other.occupancy.update(field, 16)
    assert not torch.equal(other.occupancy.density, new.occupancy.density)


def test_rays_that_meet_boxes_are_looked_at_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Solid(two_balls)
    marcher = trained(field, 4).eval()
    rays = picture_rays(camera(32), torch.arange(1), BOX)
    boxes = torch.tensor([[-0.5, -0.1, -0.3, -0.2, 0.2, 0.3], [0.2, -0.1, -0.3, 0.3, 0.1, 0.3]])
    meets = torch.zeros(len(rays), dtype=torch.bool)
    for box in boxes:
        near, far = intersect_box(rays.origins, rays.directions, box)
        meets |= (far > near).squeeze(1)
    assert 8 < int(meets.sum()) < 100
    with torch.no_grad():
        few = marcher.march(field, rays)
        marcher.n_samples = 9
        many = marcher.march(field, rays)
        marcher.n_samples = 4
        marcher.look_closely(boxes, 9)
        for at_once in (10**6, 100):
            monkeypatch.setattr(guided, "POINTS_AT_ONCE", {"cpu": at_once})
            both = marcher.march(field, rays)
            for name in ("feature", "opacity", "depth", "spread"):
                expected = torch.where(meets[:, None], getattr(many, name), getattr(few, name))
                torch.testing.assert_close(getattr(both, name), expected)
            assert few.n_points < both.n_points < many.n_points
    marcher.n_samples = 9
    assert marcher.march(field, rays).n_points == many.n_points, "all have as many"


def test_extend_opens_what_a_new_row_fills_and_closes_nothing() -> None:
    cells, field = grid(), Solid(two_balls, n_rows=2)
    cells.extend(field, [0])
    assert cells.occupied.all()
    cells.update(Solid(lambda x, row: two_balls(x, torch.zeros_like(row))), 0)
    before = cells.occupied.clone()
    assert not cells.contains(RIGHT).item()
    cells.extend(field, torch.tensor([0, 1]))
    assert cells.contains(RIGHT).item() and cells.contains(LEFT).item()
    assert (cells.occupied | ~before).all()


def test_looks_that_follow_each_other_try_other_points_of_a_cell() -> None:
    """A surface much thinner than a cell passes between the points of any one look."""
    thin = Solid(slab(1e4, 0.105, 0.11))
    cells = OccupancyGrid(BOX, STEP, 16)
    opened = []
    for look in range(6):
        cells.forget()
        cells.extend(thin, [0], look=look)
        opened.append(cells.density > 0)
    assert all(0 < int(one.sum()) < 60 for one in opened), "of 256 cells that it passes through"
    assert int(torch.stack(opened).any(0).sum()) > 1.5 * int(opened[0].sum())


def test_cells_that_add_nothing_to_any_pixel_are_closed_while_training() -> None:
    """Under the first opaque layers of a thick slab nothing is seen, and nothing is kept."""
    field = Solid(slab(200.0, -0.4, 0.8))
    grid = OccupancyGrid(BOX, STEP, 32)
    marcher = PackedMarcher(grid, STEP).train()
    rays = picture_rays(camera(16), torch.tensor([0]), BOX)
    for step in range(30):
        marcher.march(field, rays)
        grid.update(field, step)
    middle = grid.occupied[16, 16]
    depth = torch.linspace(-0.8, 0.8, 33)[:-1]
    assert bool(middle[(depth > -0.4) & (depth < -0.3)].all())
    assert not bool(middle[depth > 0.0].any())
    marcher.eval()
    shown = marcher.march(field, rays)
    full = PackedMarcher(OccupancyGrid(BOX, STEP, 32), STEP).eval().march(field, rays)
    assert torch.allclose(shown.opacity, full.opacity, atol=1e-3)
    # a grid that no marcher reports to closes nothing but the empty
    silent = OccupancyGrid(BOX, STEP, 32)
    for step in range(30):
        silent.update(field, step)
    assert bool(silent.occupied[16, 16][depth > 0.0].all())


# Few samples, where something was seen


def trained(field: Field, n_samples: int, *, steps: int = 40) -> GuidedMarcher:
    """A guided marcher whose grid has watched `field` from several sides."""
    marcher = GuidedMarcher(packed(), n_samples, N_STEPS).train()
    views = [picture(16, yaw) for yaw in (-0.3, 0.0, 0.3)]
    for step in range(steps):
        marcher.exploring = step < steps // 2
        marcher.march(field, views[step % 3])
        marcher.occupancy.update(field, step)
    return marcher.eval()


def test_a_few_guided_samples_see_what_many_see() -> None:
    """Two soft-edged balls, one half before the other: five samples against five hundred."""

    def soft(x: Tensor, row: Tensor) -> Tensor:
        small = length(x - torch.tensor([0.2, 0.1, -0.5]))
        return 60 * (((0.45 - length(x)) / 0.03).sigmoid() + ((0.15 - small) / 0.03).sigmoid())

    field = Solid(soft)
    few, rays = trained(field, 5), picture(16, 0.1)
    true = DenseMarcher(BOX, 512).eval().march(field, rays)
    seen = few.march(field, rays)
    assert seen.n_points <= 5 * len(rays)
    blind = GuidedMarcher(packed(), 5, N_STEPS).eval().march(field, rays)  # nothing was seen yet

    def error(found: Rendered) -> float:
        """Of the distance to what is hit, face heights."""
        hit = true.opacity > 0.99
        assert int(hit.sum()) > 20
        return float((found.depth - true.depth)[hit].abs().mean())

    assert float((seen.opacity - true.opacity).abs().mean()) < 0.01
    assert error(seen) < 0.05 and error(seen) < 0.3 * error(blind), (error(seen), error(blind))


@pytest.mark.parametrize("training", [False, True])
def test_widths_add_up_to_the_way_through_occupied_cells(training: bool) -> None:
    """So that a homogeneous medium is integrated exactly, however samples fall."""
    marcher = GuidedMarcher(packed(), 7, 200).train(training)
    grid, rays = marcher.occupancy, picture(9, 0.2)
    torch.manual_seed(0)
    grid.seen.copy_(torch.rand_like(grid.seen) ** 4)
    grid.occupied[:, :, 5:9] = False
    t, width, alive = marcher.lay(rays)
    assert len(alive) == int((rays.far > rays.near).sum())
    assert bool((width >= 0).all()) and bool((t[:, 1:] > t[:, :-1]).all())
    inside = (t > rays.near[alive]) & (t < rays.far[alive])
    assert bool(inside.all())
    fine = torch.linspace(0, 1, 4001)[None, :-1] + 1 / 8000
    way = (rays.far - rays.near)[alive]
    share = grid.along(rays.origins[alive], rays.directions[alive], rays.near[alive] + way * fine)
    torch.testing.assert_close(
        width.sum(1), share.float().mean(1) * way[:, 0], atol=0.02, rtol=0.01
    )
    found = marcher.march(Solid(lambda x, row: torch.full_like(x[:, 0], 2.0)), rays)
    torch.testing.assert_close(
        found.opacity[alive, 0], 1 - torch.exp(-2.0 * width.sum(1)), atol=1e-5, rtol=1e-5
    )


def test_blocks_of_rays_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    field, marcher, rays = Solid(smooth), trained(Solid(smooth), 5), picture(20, 0.2)
    with torch.no_grad():
        whole = marcher.march(field, rays)
        monkeypatch.setattr(guided, "POINTS_AT_ONCE", {"cpu": 5 * 37})
        parts = marcher.march(field, rays)
    assert_same(whole, parts, 1e-6)
    assert whole.n_points == parts.n_points


def test_pictures_do_not_ask_for_what_a_face_hides() -> None:
    field, marcher, rays = Solid(smooth), trained(Solid(smooth), 5), picture(20, 0.2)
    at_once = marcher.march(field, rays)  # gradients want every sample
    with torch.no_grad():
        marcher.lattice.early_stop = 0.0
        all_of_them = marcher.march(field, rays)
        assert_same(at_once, all_of_them, 1e-5)
        marcher.lattice.early_stop = 0.05
        fewer = marcher.march(field, rays)
    assert all_of_them.n_points * 0.8 <= fewer.n_points < all_of_them.n_points
    assert float((fewer.opacity - all_of_them.opacity).abs().max()) <= 0.05
    assert float((fewer.feature - all_of_them.feature).abs().max()) <= 0.05


def test_samples_gather_where_weights_were_seen() -> None:
    marcher = GuidedMarcher(packed(), 4, 256).eval()
    marcher.occupancy.seen.zero_()
    marcher.occupancy.seen[:, :, 10] = 1.0  # z from 0.2 to 0.3
    t, _, _ = marcher.lay(ray((0.01, 0.01, -3), (0, 0, 1)))
    z = t[0] - 3
    assert int(((z > 0.2) & (z < 0.3)).sum()) >= 2, z


def test_a_new_pose_is_seen_once_it_is_revealed() -> None:
    """Row 1 holds the ball where training never saw it; what lies inside it stays closed."""

    def shape(x: Tensor, row: Tensor) -> Tensor:
        centre = torch.tensor([[-0.4, 0.0, 0.3], [0.4, 0.0, -0.3]])[row]
        return 80 * ((0.35 - length(x - centre)) / 0.02).sigmoid()

    class OneRow(Solid):
        def __init__(self, row: int) -> None:
            super().__init__(lambda x, own: shape(x, torch.full_like(own, row)))

    marcher, rays, new = trained(OneRow(0), 5), picture(48, 0.1), OneRow(1)
    known = marcher.occupancy.occupied.clone()
    true = DenseMarcher(BOX, 512).eval().march(new, rays)

    def error() -> float:
        return float((marcher.march(new, rays).opacity - true.opacity).abs().mean())

    before = error()
    marcher.reveal([(new, picture(32, yaw)) for yaw in (0.0, 0.2)])
    assert error() < 0.1 * before and error() < 0.02, (before, error())
    occupied = marcher.occupancy.occupied
    assert bool((occupied | ~known).all()), "what was known stays open"
    middle = marcher.occupancy.contains(torch.tensor([[0.4, 0.0, -0.2]]))
    assert not bool(middle.any()), "flesh"
    assert not marcher.lattice.watching


def test_a_thin_sheet_that_a_march_leaps_over_is_seen_once_it_is_revealed() -> None:
    """Thinner than a step of the march, aslant; the look at new poses takes shorter steps."""

    def sheet(x: Tensor, row: Tensor) -> Tensor:
        off = (x[:, 2] - 0.5 * x[:, 0] - 0.2).abs()
        return 400 * (off < 0.25 * coarse).float() * (x.abs().amax(1) < 0.75)

    coarse = step_length(BOX, 16)
    lattice = PackedMarcher(OccupancyGrid(BOX, coarse, 32), coarse, early_stop=0.0)
    marcher = GuidedMarcher(lattice, 5, N_STEPS).eval()
    marcher.occupancy.forget()
    field, rays = Solid(sheet), picture(48, 0.1)
    marcher.reveal([(field, picture(64, yaw)) for yaw in (-0.1, 0.0, 0.1)])
    true = DenseMarcher(BOX, 512).eval().march(field, rays).opacity
    holes = (marcher.march(field, rays).opacity < 0.5) & (true > 0.9)
    assert float(holes.sum() / (true > 0.9).sum()) < 0.05
    assert lattice.step == coarse


def test_guided_gradients_reach_density_and_spare_it_where_detached() -> None:
    rays = picture(6)
    strength = torch.tensor(2.0, requires_grad=True)
    field = Solid(lambda x, row: strength * smooth(x, row), n_detached=1)
    out = trained(Solid(smooth), 6).march(field, rays)
    (slope,) = torch.autograd.grad(out.feature[:, :3].sum(), strength, retain_graph=True)
    assert slope.abs() > 0
    (slope,) = torch.autograd.grad(out.feature[:, 3].sum(), strength, allow_unused=True)
    assert slope is None or slope == 0
    torch.testing.assert_close(out.feature[:, 3:], out.opacity.detach())


def test_exploring_takes_the_whole_lattice() -> None:
    field, rays, lattice = Solid(smooth), picture(6), packed()
    marcher = GuidedMarcher(lattice, 3, N_STEPS).eval()
    marcher.exploring = True
    assert_same(marcher.march(field, rays), lattice.march(field, rays), 0.0)


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


# The door


def test_build_says_what_it_chose() -> None:
    marcher, why = build(MarchOptions(n_steps=8, resolution=8), BOX, "cpu")
    assert type(marcher) is PackedMarcher and "nerfacc" in why and "\n" not in why
    assert marcher.step == pytest.approx(1.6 / 8)
    few, _ = build(MarchOptions(n_samples=4, resolution=8), BOX, "cpu")
    assert isinstance(few, GuidedMarcher) and isinstance(few, RayMarcher) and few.n_samples == 4
    dense, _ = build(MarchOptions(kind="dense"), BOX, "cpu")
    assert isinstance(dense, DenseMarcher) and isinstance(dense, RayMarcher)
    assert isinstance(Solid(smooth), Field)
    with pytest.raises(MisuseError, match="march.kind"):
        build(MarchOptions(kind="fast"), BOX, "cpu")  # type: ignore[arg-type]
    assert all(not need.required and (need.ok or need.fix) for need in check())


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
    marcher, why = build(MarchOptions(early_stop=0.0), BOX, "cuda")
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


def test_a_field_that_nobody_trained_on_is_discovered() -> None:
    """From views alone: the ball's skin is open, its flesh and the air are shut."""

    def ball(x: Tensor, row: Tensor) -> Tensor:
        return 80 * ((0.7 - length(x)) / 0.02).sigmoid()

    field, rays = Solid(ball), picture(48, 0.1)
    lattice = packed()
    lattice.occupancy.seen.fill_(1.0)  # whatever was known before counts for nothing
    marcher = GuidedMarcher(lattice, 6, 256).eval()
    marcher.discover([(field, picture(32, yaw)) for yaw in (-0.2, 0.0, 0.2)])
    true = DenseMarcher(BOX, 512).eval().march(field, rays)
    found = marcher.march(field, rays)
    assert float((found.opacity - true.opacity).abs().mean()) < 0.01
    grid = marcher.occupancy
    places = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -0.69], [0.9, 0.9, -0.9]])
    assert grid.contains(places).tolist() == [False, True, False]
    assert bool(grid.watched) and not marcher.lattice.watching
    assert found.n_points <= 48 * 48 * 6
