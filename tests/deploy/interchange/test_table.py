"""The page, the table and the package agree."""

from __future__ import annotations

import re
from pathlib import Path

from nmsparse_ext.deploy import FORMATS

PAGE = Path(__file__).resolve().parents[3] / "docs/interchange.md"


def test_the_page_lists_every_format() -> None:
    rows = dict(
        re.findall(r"^\| `([a-z-]+)` \|.*?\| (yes) \| (?:yes|no|24 only) \|", PAGE.read_text(), re.MULTILINE)
    )
    assert rows.keys() == FORMATS.keys()
    written = re.findall(r"^\| `([a-z-]+)` \|.*?\| yes \| (?:yes|24 only) \|", PAGE.read_text(), re.MULTILINE)
    assert set(written) == {name for name, peer in FORMATS.items() if peer.write is not None}
    assert all(peer.title and peer.verified for peer in FORMATS.values())
