"""Draws the README's figure from a stored result of the demo.

python docs/make_figure.py                              # docs/demo_result.json -> docs/images/demo.png
python docs/make_figure.py demo_out/result.json         # store that result first, then draw it
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from nmsparse_ext import report

DOCS = Path(__file__).resolve().parent
RESULT = DOCS / "demo_result.json"
PICTURE = DOCS / "images" / "demo.png"


def main(arguments: list[str]) -> None:
    """Store a new result if one is named, then draw."""
    if arguments:
        shutil.copyfile(arguments[0], RESULT)
    PICTURE.parent.mkdir(exist_ok=True)
    report.save_picture(json.loads(RESULT.read_text(encoding="utf-8")), PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
