"""Pictures of a report for docs/: ``python tests/report/screenshots.py [RUN…]``; else the newest distillation.

Each page is checked as the tests do it; nothing is written where one overflows, complains or asks for something.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from chromium import Chromium

from latentforge.evidence.reading import evidence_folder
from latentforge.report.making import make_report

DOCS = Path(__file__).resolve().parents[2] / "docs" / "pictures"
SHOTS = [
    ("report-phone-light.png", 390, False, 2600),
    ("report-phone-dark.png", 390, True, 2600),
    ("report-desk-light.png", 1280, False, 2750),
    ("report-desk-dark.png", 1280, True, 2750),
]
"""File, width and height in CSS pixels, and whether the reader's system is dark."""


def main(runs: list[str]) -> None:
    """Write the pictures into docs/pictures."""
    from PIL import Image  # matplotlib brings it

    found = sorted(evidence_folder().glob("distill-*/events.jsonl"), key=lambda file: file.stat().st_mtime)
    if not runs and not found:
        sys.exit(f"there is no distillation in {evidence_folder()}/: make smoke")
    DOCS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, Chromium(Path(scratch) / "profile") as browser:
        page = make_report(runs or [str(found[-1].parent)], Path(scratch) / "report.html").page
        assert page is not None
        for name, width, dark, height in SHOTS:
            seen = browser.show(page, width=width, dark=dark, scale=1.5 if width < 600 else 1)
            if seen.overflow or seen.console or seen.asked:
                sys.exit(f"{name}: {seen}")
            browser.picture(DOCS / name, height=min(height, seen.height))
            # Few colours are in it: a palette halves the file.
            Image.open(DOCS / name).convert("RGB").quantize(220).save(DOCS / name, optimize=True)
            print(DOCS / name)


if __name__ == "__main__":
    main(sys.argv[1:])
