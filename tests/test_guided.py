"""The guided march: few samples where something was seen, and what reveals the rest."""

from __future__ import annotations

import pytest
import torch
from solids import (
    BOX,
    N_STEPS,
    Solid,
    assert_same,
    camera,
    length,
    packed,
    picture,
    ray,
    smooth,
    trained,
    two_balls,
)
from torch import Tensor

from talkhead_cli.contracts import Rendered
from talkhead_cli.march import (
    DenseMarcher,
    GuidedMarcher,
    OccupancyGrid,
    PackedMarcher,
    guided,
    intersect_box,
    picture_rays,
    step_length,
)


def test_rays_that_meet_boxes_are_looked_at_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided, "SEEN", torch.inf)
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
        finer = marcher.finer(6).march(field, rays)
        assert both.n_points < finer.n_points < many.n_points, "boxes are looked at as closely"
        assert marcher.finer(12).march(field, rays).n_points > many.n_points
        assert marcher.march(field, rays).n_points == both.n_points, "it stays as it was"
    marcher.n_samples = 9
    assert marcher.march(field, rays).n_points == many.n_points, "all have as many"


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


def test_training_samples_all_places_of_an_interval() -> None:
    """Else surfaces would be found at a few depths alone."""
    marcher, rays = GuidedMarcher(packed(), 4, 200).train(), ray((0, 0, -3), (0, 0, 1))
    torch.manual_seed(0)
    found = torch.stack([marcher.lay(rays)[0][0, 1] for _ in range(200)])
    interval = float((rays.far - rays.near) / 4)
    assert 0.9 * interval < float(found.max() - found.min()) < 1.01 * interval


def test_blocks_of_rays_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    field, marcher, rays = Solid(smooth), trained(Solid(smooth), 5), picture(20, 0.2)
    with torch.no_grad():
        whole = marcher.march(field, rays)
        monkeypatch.setattr(guided, "POINTS_AT_ONCE", {"cpu": 5 * 37})
        parts = marcher.march(field, rays)
    assert_same(whole, parts, 1e-6)
    assert whole.n_points == parts.n_points


def test_pictures_do_not_ask_for_what_a_face_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided, "SEEN", torch.inf)
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


def test_rays_that_miss_the_surface_of_a_rare_pose_are_marched_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most poses had it in front, where most samples lie; now it is further back."""
    marcher, rays = GuidedMarcher(packed(), 4, 200).eval(), picture(16)
    grid = marcher.occupancy
    first_half = torch.arange(grid.resolution) < grid.resolution / 2
    grid.seen[:] = torch.where(first_half, 0.5, 0.04)  # along z
    field = Solid(lambda x, row: 400.0 * ((x[:, 2] - 0.4).abs() < 0.15))

    @torch.no_grad()
    def marched() -> Rendered:
        return marcher.march(field, rays)

    slab = torch.tensor([-1.0, -1.2, 0.25, 1.0, 1.2, 0.55])
    enter, leave = intersect_box(rays.origins, rays.directions, slab)
    inside = (leave - enter > 0.29)[:, 0]
    assert int(inside.sum()) > 100
    again = marched()
    assert float(again.opacity[inside].min()) > 0.99
    depth = again.depth[inside, 0] * rays.directions[inside, 2] - 4
    assert float((depth - 0.4).abs().max()) < 0.15, "where it is"
    monkeypatch.setattr(guided, "SEEN", torch.inf)
    once = marched()
    assert float(once.opacity.max()) < 0.01 and once.n_points == 4 * len(rays)
    assert again.n_points == 3 * once.n_points
    monkeypatch.undo()
    grid.seen[:] = 0.001  # nobody saw anything here: rays are as transparent as they seem
    field = Solid(lambda x, row: 0 * x[:, 2])
    assert marched().n_points == once.n_points


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
    marcher.extend_from_views([(new, picture(32, yaw)) for yaw in (0.0, 0.2)])
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
    marcher.extend_from_views([(field, picture(64, yaw)) for yaw in (-0.1, 0.0, 0.1)])
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


def test_a_field_that_nobody_trained_on_is_discovered() -> None:
    """From views alone: the ball's skin is open, its flesh and the air are shut."""

    def ball(x: Tensor, row: Tensor) -> Tensor:
        return 80 * ((0.7 - length(x)) / 0.02).sigmoid()

    field, rays = Solid(ball), picture(48, 0.1)
    lattice = packed()
    lattice.occupancy.seen.fill_(1.0)  # whatever was known before counts for nothing
    marcher = GuidedMarcher(lattice, 6, 256).eval()
    marcher.rebuild_from_views([(field, picture(32, yaw)) for yaw in (-0.2, 0.0, 0.2)])
    true = DenseMarcher(BOX, 512).eval().march(field, rays)
    found = marcher.march(field, rays)
    assert float((found.opacity - true.opacity).abs().mean()) < 0.01
    grid = marcher.occupancy
    places = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -0.69], [0.9, 0.9, -0.9]])
    assert grid.contains(places).tolist() == [False, True, False]
    assert bool(grid.watched) and not marcher.lattice.watching
    assert found.n_points <= 48 * 48 * 6
