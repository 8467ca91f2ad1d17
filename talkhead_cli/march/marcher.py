"""What every ray marcher offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from talkhead_cli.contracts import Field, RayBundle, Rendered


class Marcher(nn.Module, ABC):
    """Turns rays into composited channels; sees points, directions and row numbers only.

    All but `march` has a default, which suits a marcher that samples everything everywhere.

    `exploring`: surfaces are not located yet, so samples must cover all occupied space instead of
    following the weights observed so far.
    """

    exploring = False

    @abstractmethod
    def march(self, field: Field, rays: RayBundle) -> Rendered:
        """Integrate `field` along `rays`."""

    # -- the occupancy grid ------------------------------------------------------------------

    @property
    def resolution(self) -> int:
        """Cells of the occupancy grid along each axis; 0: there is no grid."""
        return 0

    def refresh(self, field: Field, step: int) -> None:
        """Update the grid from the field; `step` of training seeds where it looks."""

    def rebuild_from_views(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """Rebuild the grid from views of an untrained person; fields of one row."""

    def extend_from_views(self, views: Sequence[tuple[Field, RayBundle]]) -> None:
        """Add poses and views that training did not cover to the grid; fields of one row."""

    # -- how many samples a ray takes --------------------------------------------------------

    @property
    def sampling(self) -> tuple[int, ...]:
        """The numbers on which, besides the number of rays, the shapes of a march depend."""
        return ()

    def look_closely(self, boxes: Tensor, n_samples: int) -> None:
        """Without gradients, let rays that hit one of the boxes (B, 6) take `n_samples` samples, if
        that is more than the others take."""

    def sample_more(self, n_samples: int) -> None:
        """Let every ray take `n_samples` samples, if that is more than it takes."""

    def finer(self, n_samples: int) -> Marcher:
        """Return a marcher over the same grid with `n_samples` samples on every ray, if that is
        more than these take; itself if it samples everything anyway."""
        return self

    # -- CUDA graphs -------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether marches without gradients wait for the device, so that none can be recorded."""
        return True

    def fix_shapes(self, on: bool) -> int:
        """Switch between marches with gradients that can be recorded, since their shapes do not
        depend on what rays hit, and those that skip rays that hit nothing.

        Returns the samples that each ray takes in marches that can be recorded; 0 if none can be.
        """
        return 0
