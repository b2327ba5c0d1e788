"""An HTML page about a model or a file: what is sparse, what that saves, and what it is worth here."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._atomic import atomic_write
from ._machine import machine
from .report import STYLE, inline_svg, page_environment
from .scheme_chart import draw_chart

if TYPE_CHECKING:
    from .deploy.explain import Explanation
    from .deploy.summary import Summary

#: A picture of more weights than this cannot be read.
_MOST_BARS = 400
_TOTALS = ("params", "kept", "bytes", "dense_bytes", "macs", "kept_macs")


def write_model_report(
    rows: Summary,
    path: str | os.PathLike[str],
    *,
    title: str,
    assumed: bool = False,
    times: Explanation | None = None,
) -> Path:
    """Writes the page, which holds its picture and refers to nothing outside of itself.

    Args:
        rows: The weights, from `summary`.
        path: The file; replaced in one step.
        title: What the model is called.
        assumed: Whether the patterns are those of a scheme, which the weights need not hold.
        times: Whether packing pays, from `deploy.explain`.

    Raises:
        OSError: If the file cannot be written.
    """
    page = render_model_report(rows, title=title, assumed=assumed, times=times)
    with atomic_write(path) as file:
        file.write(page.encode())
    return Path(path)


def render_model_report(
    rows: Summary, *, title: str, assumed: bool = False, times: Explanation | None = None
) -> str:
    """The page as text; see `write_model_report`."""
    from jinja2.utils import markupsafe

    patterns = Counter(row.pattern for row in rows if row.pattern is not None)
    return (
        page_environment()
        .get_template("model_report_template.html")
        .render(
            title=title,
            assumed=assumed,
            rows=rows.rows,
            sparse=sum(patterns.values()),
            patterns=patterns.most_common(),
            total={column: rows.total(column) or 0 for column in _TOTALS},
            figure=markupsafe.Markup(_picture(rows)),
            times=times,
            machine=machine(),
        )
    )


def _picture(rows: Summary) -> str:
    import matplotlib

    drawn: Any = [row for row in rows if row.params]
    if not drawn or len(drawn) > _MOST_BARS:
        return ""
    with matplotlib.rc_context(STYLE):
        return inline_svg(draw_chart(rows), "chart")
