"""The page, the table and the package agree."""

from __future__ import annotations

import re
from pathlib import Path

from nmsparse_ext.deploy import FORMATS

PAGE = Path(__file__).resolve().parents[3] / "docs/interchange.md"


def test_the_page_lists_every_format() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|.*?\| yes \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(FORMATS)
    # "yes", or the one of the format's kinds that is written
    assert {name for name, writes in rows if writes != "no"} == {
        name for name, peer in FORMATS.items() if peer.write is not None
    }
    assert all(peer.title and peer.verified for peer in FORMATS.values())
