"""The library's own exception. Everything else raises ``ValueError`` or ``TypeError``."""

from __future__ import annotations


class FormatError(ValueError):
    """A file that is not what it claims to be: of another format, of an unknown version, or damaged."""
