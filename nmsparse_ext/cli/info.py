"""``nmsparse info``: what was built, and what runs here."""

from __future__ import annotations

from nmsparse_ext.cli.options import JsonOption
from nmsparse_ext.cli.output import emit, show


def info(as_json: JsonOption = False) -> None:
    """Say what was compiled in, what runs on this machine, and why."""
    import nmsparse_ext as nms

    build = nms.build_info()
    show(as_json, build.as_dict(), lambda: emit(str(build)))
