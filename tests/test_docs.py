"""The code in docs/ must run as it stands, and its links must lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch._inductor.config
from console import run_page

import nmsparse_ext as nms

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def test_there_is_code() -> None:
    assert any(BLOCK.search(path.read_text(encoding="utf-8")) for path in PAGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, Python and commands, one after the other as a reader runs them."""
    monkeypatch.chdir(tmp_path)  # it may write files
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    quickly = {"compile_wrapper_opt_level": "O0", "precompile_headers": False}
    with torch._inductor.config.patch({f"aot_inductor.{name}": value for name, value in quickly.items()}):
        run_page(path)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]  # another page may have a file of that name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_api_pages_have_all_public_names() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE)}
    assert set(nms.__all__) <= documented


def test_the_navigation_has_all_pages() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"\S+\.md$", text[text.index("nav:") :], flags=re.MULTILINE))
    assert {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} <= named
