"""What a check found: points with a verdict, figures, curves, and the parts that show most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

# What counts, and from where on: (warn, fail).  Looked at on a handful of clips that track well,
# and on the synthetic speaker blurred, darkened and shaken; not fitted to outcomes of training.
LIMITS = {
    "seconds": (12.0, 3.0), "head": (150.0, 48.0), "found": (0.95, 0.5), "sharp": (0.045, 0.02),
    "dark": (55.0, 30.0), "burnt": (0.05, 0.25), "turn": (25.0, 45.0), "lips": (0.03, 0.008),
    "level": (-40.0, -60.0), "snr": (15.0, 6.0), "clipped": (0.001, 0.02), "late": (0.06, 1.0),
    "dead": (0.1, 0.6), "moving": (6.0, 25.0),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One point: verdict is pass, warn, fail or unknown; cure says what to do about it."""

    name: str
    verdict: str
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Curve:
    """Something in the course of time: seconds (n,), values (n,), NaN where it was not seen; the
    lines (value each) at which it becomes doubtful."""

    name: str
    unit: str
    seconds: Array
    values: Array
    limits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A piece that was looked at: how far the mouth opens (face heights), how much sounds differ
    (deviations of log-mel), how far the head turns (degrees), share of frames with a face; score
    from 0 to 1, against the best of each."""

    start_s: float
    end_s: float
    lips: float
    speech: float
    views: float
    found: float
    score: float = 0.0


@dataclass
class Report:
    """What was found, the figures it rests on, and what a page shows of it.

    segments: best first · curves over time · pictures: (second, picture (H, W, 3)) of each piece
    """

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    pictures: list[tuple[float, NDArray[np.uint8]]] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        said = {finding.verdict for finding in self.findings}
        return next((v for v in ("fail", "warn") if v in said), "pass")

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"verdict": self.verdict, "findings": [asdict(f) for f in self.findings],
                "figures": self.figures,
                "segments": [asdict(s) for s in self.segments]}  # fmt: skip

    def more(self, name: str, key: str, value: float, found: str, cure: str) -> None:
        """More is better."""
        self._add(name, key, value, found, cure, lambda limit: value < limit)

    def less(self, name: str, key: str, value: float, found: str, cure: str) -> None:
        """Less is better."""
        self._add(name, key, value, found, cure, lambda limit: value > limit)

    def _add(
        self, name: str, key: str, value: float, found: str, cure: str,
        misses: Callable[[float], bool],
    ) -> None:  # fmt: skip
        warn, fail = LIMITS[key]
        verdict = "fail" if misses(fail) else "warn" if misses(warn) else "pass"
        self.figures[key] = round(float(value), 4)
        self.findings.append(Finding(name, verdict, found, "" if verdict == "pass" else cure))
