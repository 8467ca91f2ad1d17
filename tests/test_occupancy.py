"""What the occupancy grid holds open: unions, what was seen, what is revealed."""

from __future__ import annotations

import torch
from solids import (
    BOX,
    STEP,
    Solid,
    ball,
    camera,
    packed,
    slab,
    two_balls,
)

from talkhead_cli.march import (
    OccupancyGrid,
    PackedMarcher,
    picture_rays,
)

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
