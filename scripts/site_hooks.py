"""What mkdocs is told beyond mkdocs.yml: pages from outside of docs/, links out of it, missing pages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Files of the repository that are pages of the site.
BROUGHT_IN = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", flags=re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Leaves out of the navigation what is not there, and puts at its end what it does not name."""
    docs = Path(config.docs_dir)
    config.nav = _existing(config.nav, docs)
    named = set(_pages(config.nav))
    others = [path for path in sorted(docs.rglob("*.md")) if path.relative_to(docs).as_posix() not in named]
    if others:
        config.nav.append({"More": [path.relative_to(docs).as_posix() for path in others]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie outside of docs/."""
    for source, page in BROUGHT_IN.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relinked(text, Path(source), Path(page))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mends links of pages in docs/ that lead out of it."""
    if page.file.generated_by is not None:
        return markdown
    return relinked(markdown, Path("docs") / page.file.src_uri, Path(page.file.src_uri))


def relinked(markdown: str, source: Path, page: Path) -> str:
    """The text of a file of the repository, with its links as they must be on the site.

    Links to files that the site does not have become their plain text.

    Args:
        markdown: The text.
        source: The file, relative to the repository.
        page: The page it becomes, relative to docs/.
    """

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = os.path.normpath(source.parent / target)
        if path in BROUGHT_IN:
            on_site = BROUGHT_IN[path]
        elif path.startswith("docs" + os.sep) and (ROOT / path).suffix in (".md", ".png", ".svg"):
            on_site = os.path.relpath(path, "docs")
        else:
            return f"{text} (`{path}`)" if text != path else f"`{path}`"
        return f"{image}[{text}]({os.path.relpath(on_site, page.parent)}{anchor})"

    parts = _FENCE.split(markdown)  # text and code by turns
    parts[::2] = [_LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def _existing(nav: list[Any], docs: Path) -> list[Any]:
    kept = []
    for entry in nav:
        title, target = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(target, list):
            if inner := _existing(target, docs):
                kept.append({title: inner})
        elif target in BROUGHT_IN.values() or (docs / target).exists():
            kept.append(entry)
    return kept


def _pages(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(target, list):
            yield from _pages(target)
        else:
            yield target
