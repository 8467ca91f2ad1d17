"""Write the tables of README.md and benchmarks/README.md from the newest results.

    python benchmarks/tables.py            rewrites the text between the tables' markers
    python benchmarks/tables.py --check    lists outdated files; exits with 1 if there are any

A method's figures are those of the newest file of `bench.py quality --presets METHOD,tiny`, those
at 256 px of `bench.py quality --presets METHOD,small`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = {  # by method; lokitalk is the default of bench.py
    "lokitalk": "*-quality.json",
    "landmark": "*-quality-landmark.json",
    "talk3d": "*-quality-talk3d.json",
}
SMALL = {"lokitalk": "*-quality-small.json"}
FEW_BLINKS = 2  # with fewer in the truth, figures of eyes mean little


def quality(files: str) -> dict[str, dict[str, Any]]:
    """Return the figures of `evaluate` by person, from the newest finished one of the files."""
    records = (json.loads(file.read_text()) for file in sorted(RESULTS.glob(files)))
    whole = [record for record in records if not record.get("unfinished")]
    held = whole[-1] if whole else {}
    people = held.get("quality", held)
    rows = {name: row.get("figures", row) for name, row in people.items() if isinstance(row, dict)}
    return {name: row for name, row in rows.items() if "picture" in row}


def short() -> str:
    """Return README's table: a line per method and person."""
    lines = [
        "| preset | test clip | PSNR | lips | linear predictor | other speech | eyes |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, files in FILES.items():
        for name, row in quality(files).items():
            lips = row["lips"]
            lines.append(
                f"| `{method}` | {name} | {row['picture']['face_box']['psnr_db']:.1f} dB "
                f"| {lips['correlation']['r']:.2f} | {lips['linear_baseline']['r']:.2f} "
                f"| {lips['mismatched_control']['r']:.2f} | {_eyes(row)} |"
            )
    return "\n".join(lines)


def whole(of: dict[str, str]) -> str:
    """Return a table, from the files of each method, with more of the figures of `evaluate`."""
    lines = [
        "| preset | person | PSNR face / full | SSIM face | mouth landmarks off | lips, 90 % "
        "| baseline | other speech, three stretches | spread | eyes | jitter / truth's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, files in of.items():
        for name, row in quality(files).items():
            picture, lips = row["picture"], row["lips"]
            found, (low, high) = lips["correlation"], lips["correlation"]["interval_90"]
            others = ", ".join(f"{c['r']:.2f}" for c in lips["mismatched_control"]["each"])
            lines.append(
                f"| `{method}` | {name} | {picture['face_box']['psnr_db']:.2f} / "
                f"{picture['full']['psnr_db']:.2f} dB | {picture['face_box']['ssim']:.3f} "
                f"| {row['lmd_px_at_512']:.2f} px | {found['r']:.2f} [{low:.2f}, {high:.2f}] "
                f"| {lips['linear_baseline']['r']:.2f} | {others} | {found['spread']:.2f} "
                f"| {_eyes(row)} | {_jitter(row)} |"
            )
    return "\n".join(lines)


def _jitter(row: dict[str, Any]) -> str:
    ratio = row["jitter_px_at_512"]["ratio"]
    return "" if ratio is None else f"{ratio:.2f}"


def _eyes(row: dict[str, Any]) -> str:
    eyes = row["eyes"]
    few = " (one blink)" if eyes["blinks_in_truth"] < FEW_BLINKS else ""
    return f"{eyes['correlation']['r']:.2f}{few}"


def filled(text: str) -> str:
    """Return the text with its tables filled from the results."""
    tables = {"short": short(), "whole": whole(FILES), "small": whole(SMALL)}
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->\n"
        if begin in text:
            head, rest = text.split(begin)
            _, after = rest.split(end, 1)
            text = head + begin + table + "\n" + end + after
    return text


def main() -> int:
    stale = []
    for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        text = path.read_text()
        if (made := filled(text)) != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(made)
    print("\n".join(stale) or "as the results have them")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
