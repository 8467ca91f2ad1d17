"""Result of a check: findings with verdicts, figures, curves and scored segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

# Thresholds (warn, fail) by criterion.  Checked on a handful of clips that track well, and on
# the synthetic speaker blurred, darkened and shaken; not fitted to outcomes of training.
LIMITS = {
    "seconds": (12.0, 3.0), "head": (150.0, 48.0), "found": (0.95, 0.5), "sharp": (0.045, 0.02),
    "dark": (55.0, 30.0), "burnt": (0.05, 0.25), "turn": (25.0, 45.0), "lips": (0.03, 0.008),
    "level": (-40.0, -60.0), "snr": (15.0, 6.0), "clipped": (0.001, 0.02), "late": (0.06, 1.0),
    "dead": (0.1, 0.6), "moving": (6.0, 25.0),
}  # fmt: skip
# How a limit is written beside the value it is for.
SHOWN = {
    "seconds": "{:.0f} s", "head": "{:.0f} px", "found": "{:.0%}", "sharp": "{:.3f}",
    "dark": "{:.0f}", "burnt": "{:.0%}", "turn": "{:.0f} degrees", "lips": "{:.2f}",
    "level": "{:.0f} dBFS", "snr": "{:.0f} dB", "clipped": "{:.1%}", "late": "{:.2f} s",
    "dead": "{:.0%}", "moving": "{:.0f}",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One criterion: verdict is pass, warn, fail or unknown; cure says what to do about it."""

    name: str
    verdict: str
    found: str
    cure: str = ""


@dataclass(frozen=True)
class Curve:
    """A quantity over time: seconds (n,), values (n,), NaN where it was not seen, and the limits
    at which it becomes doubtful."""

    name: str
    unit: str
    seconds: Array
    values: Array
    limits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Segment:
    """An analysed piece: lips, range of mouth opening (face heights); speech, standard deviation
    of log-mel; views, range of head rotation (degrees); found, share of frames with a face; score,
    0 to 1, relative to the best piece by each criterion."""

    start_s: float
    end_s: float
    lips: float
    speech: float
    views: float
    found: float
    score: float = 0.0


@dataclass
class Report:
    """All findings, the figures that they rest on, and what the page shows.

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
        """Return the report for JSON, without curves and pictures."""
        return {
            "verdict": self.verdict,
            "findings": [asdict(f) for f in self.findings],
            "figures": self.figures,
            "segments": [asdict(s) for s in self.segments],
        }

    def more(self, name: str, key: str, value: float, found: str, cure: str) -> None:
        """Add a finding on a value that should be high; `key` names its limits."""
        self._add(name, key, value, found, cure, "at least", lambda limit: value < limit)

    def less(self, name: str, key: str, value: float, found: str, cure: str) -> None:
        """Add a finding on a value that should be low; `key` names its limits."""
        self._add(name, key, value, found, cure, "at most", lambda limit: value > limit)

    def _add(
        self,
        name: str,
        key: str,
        value: float,
        found: str,
        cure: str,
        bound: str,
        misses: Callable[[float], bool],
    ) -> None:
        warn, fail = LIMITS[key]
        verdict = "fail" if misses(fail) else "warn" if misses(warn) else "pass"
        self.figures[key] = round(float(value), 4)
        found += f" (good: {bound} {SHOWN[key].format(warn)})"
        self.findings.append(Finding(name, verdict, found, "" if verdict == "pass" else cure))
