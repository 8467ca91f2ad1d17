"""What `preprocess` does to a film, a file per stage.

`order.py` runs them: mesh, sound, film (cropped, with maps), tracks, labels.
"""

from __future__ import annotations

from talkhead_cli.jobs.stages.material import MIN_SECONDS, Material
from talkhead_cli.jobs.stages.order import VERSIONS, Stages

__all__ = ["MIN_SECONDS", "VERSIONS", "Material", "Stages"]
