"""The code in docs/ must run as it stands, and its links must lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch._inductor.config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def test_there_is_code() -> None:
    assert any(BLOCK.search(path.read_text(encoding="utf-8")) for path in PAGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other as a reader runs them."""
    monkeypatch.chdir(tmp_path)  # it may write files
    names = {"__name__": "__main__"}
    quickly = {"compile_wrapper_opt_level": "O0", "precompile_headers": False}
    with torch._inductor.config.patch({f"aot_inductor.{name}": value for name, value in quickly.items()}):
        for number, block in enumerate(BLOCK.findall(path.read_text(encoding="utf-8"))):
            exec(compile(block, f"{path}, block {number}", "exec"), names)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
