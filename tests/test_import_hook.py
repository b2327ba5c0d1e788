"""What is done once another library is imported: then, once, and never in its way."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nmsparse_ext._import_hook import import_after, import_before


@pytest.fixture(autouse=True)
def _libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``theirs.part``, and modules of ours that work, do not fit, and are broken."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("")
    (tmp_path / "theirs" / "part.py").write_text("LOADED = []\n")
    (tmp_path / "ours_works.py").write_text("from theirs import part\npart.LOADED.append(__name__)\n")
    (tmp_path / "ours_old.py").write_text("from theirs.part import gone\n")
    (tmp_path / "ours_broken.py").write_text("from theirs import part\npart.gone\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.startswith(("theirs", "ours_"))]:
        del sys.modules[name]


def test_when_it_is_imported() -> None:
    import_after("theirs.part", "ours_works")
    importlib.import_module("theirs")
    assert "ours_works" not in sys.modules
    part = importlib.import_module("theirs.part")
    assert part.LOADED == ["ours_works"]
    # Nothing of ours is left in it.
    assert part.__spec__ is not None
    assert part.__spec__.loader is part.__loader__
    assert type(part.__loader__).__module__ == "_frozen_importlib_external"


def test_when_it_has_been_imported() -> None:
    part = importlib.import_module("theirs.part")
    import_after("theirs.part", "ours_works")
    assert part.LOADED == ["ours_works"]


def test_looking_for_it_is_no_import() -> None:
    import_after("theirs.part", "ours_works")
    spec = importlib.util.find_spec("theirs.part")
    assert spec is not None
    assert spec.loader is not None
    assert "LOADED" in spec.loader.get_source("theirs.part")  # type: ignore[attr-defined]
    assert "ours_works" not in sys.modules
    assert importlib.import_module("theirs.part").LOADED == ["ours_works"]


def test_two_of_ours() -> None:
    import_after("theirs.part", "ours_works")
    import_after("theirs.part", "ours_old")
    assert importlib.import_module("theirs.part").LOADED == ["ours_works"]


def test_once() -> None:
    import_after("theirs.part", "ours_works")
    part = importlib.import_module("theirs.part")
    del sys.modules["ours_works"]
    importlib.reload(part)
    assert "ours_works" not in sys.modules


@pytest.mark.filterwarnings("error")
def test_a_version_that_does_not_fit() -> None:
    import_after("theirs.part", "ours_old")
    importlib.import_module("theirs.part")
    with pytest.raises(ImportError, match="gone"):
        importlib.import_module("ours_old")


def test_errors_of_ours_do_not_stop_theirs() -> None:
    import_after("theirs.part", "ours_broken")
    with pytest.warns(UserWarning, match="ours_broken does not work here: AttributeError"):
        importlib.import_module("theirs.part")


def test_errors_of_theirs_are_theirs() -> None:
    """And it may be tried again."""
    part = importlib.util.find_spec("theirs.part")
    assert part is not None
    assert part.origin is not None
    text = Path(part.origin).read_text()
    Path(part.origin).write_text("raise RuntimeError('theirs')\n")
    import_after("theirs.part", "ours_works")
    with pytest.raises(RuntimeError, match="theirs"):
        importlib.import_module("theirs.part")
    assert "ours_works" not in sys.modules
    Path(part.origin).write_text(text + "# longer, so that no compiled file fits\n")
    importlib.invalidate_caches()
    assert importlib.import_module("theirs.part").LOADED == ["ours_works"]


@pytest.mark.parametrize("name", ["ours_package.user", "ours_package.needed", "ours_package.all"])
def test_before_any_module_of_ours(name: str, tmp_path: Path) -> None:
    """All modules import the other library; one is imported after it, and needs a whole one of ours."""
    (tmp_path / "ours_package").mkdir()
    (tmp_path / "ours_package" / "__init__.py").write_text("")
    (tmp_path / "ours_package" / "plain.py").write_text("")
    (tmp_path / "ours_package" / "needed.py").write_text(
        "from theirs import part\npart.LOADED.append(__name__)\nWHOLE = True\n"
    )
    (tmp_path / "ours_package" / "all.py").write_text(
        "from theirs import part\nfrom ours_package import needed\nassert needed.WHOLE\n"
        "part.LOADED.append(__name__)\n"
    )
    (tmp_path / "ours_package" / "user.py").write_text(
        "from theirs import part\npart.LOADED.append(__name__)\n"
    )
    import_after("theirs.part", "ours_package.all")
    import_before("theirs.part", "ours_package", without=("plain",))
    importlib.import_module("ours_package.plain")
    assert importlib.util.find_spec(name) is not None
    assert "theirs.part" not in sys.modules
    module = importlib.import_module(name)
    assert module is sys.modules[name]
    loaded = sys.modules["theirs.part"].LOADED
    assert loaded == [  # each once
        "ours_package.needed",
        "ours_package.all",
        *(["ours_package.user"] if name == "ours_package.user" else []),
    ]
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert type(module.__loader__).__module__ == "_frozen_importlib_external"
