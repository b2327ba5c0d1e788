"""`import nmsparse_ext` brings names at first use, so that `nmsparse --help` is fast; nobody else notices."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nmsparse_ext as nms

SOURCE = Path(nms.__file__)
ROOMS = {"compat", "deploy", "integrations", "optim", "prune", "search", "train"}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE.parents[1])},
        capture_output=True,
        text=True,
    )


def test_every_name_is_there() -> None:
    for name in nms.__all__:
        assert getattr(nms, name).__module__.startswith("nmsparse_ext"), name
    assert {*nms.__all__, *ROOMS, "__version__"} <= set(dir(nms))
    assert nms.ops.unpack is __import__("nmsparse_ext.ops", fromlist=["unpack"]).unpack


def test_what_type_checkers_see_is_what_there_is() -> None:
    """The names stand twice, once for them and once for the program."""
    guard = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(guard.test) == "TYPE_CHECKING"
    seen = {alias.asname or alias.name for node in guard.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == {*nms.__all__, *ROOMS}
    assert sorted(nms._LAZY) == sorted(nms.__all__)


@pytest.mark.parametrize("name", ["nm_maks", "_hidden", "recipes_", "ops.x", "nothing.x"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'nmsparse_ext' has no attribute '{re.escape(name)}'"):
        getattr(nms, name)


def test_importing_it_imports_no_torch() -> None:
    found = run(
        "import sys, nmsparse_ext as nms; nms.__version__; dir(nms); assert 'torch' not in sys.modules"
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "nmsparse_ext, torch",
        "torch, nmsparse_ext",
        "nmsparse_ext.cli, torch",
        "nmsparse_ext.tensor",
        "nmsparse_ext.ops",
        "nmsparse_ext.reference",
        "nmsparse_ext as nms; nms.nm_mask; import torch",
        "nmsparse_ext as nms; nms.build_info(); import torch",
    ],
)
def test_torch_knows_packed_tensors_and_ops_at_once(imports: str, tmp_path: Path) -> None:
    weight = nms.compress(nms.nm_prune(torch.randn(4, 8), "2:4"), "2:4")
    torch.save({"w": weight}, tmp_path / "w.pt")
    code = (
        f"import sys, {imports}\n"
        "torch = sys.modules['torch']\n"
        "print(torch.load(sys.argv[1])['w'].pattern, torch.ops.nmsparse.sgd_)"
    )
    found = run(code, str(tmp_path / "w.pt"))
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("2:4 nmsparse.sgd_")
    assert found.stderr == ""


def test_threads_that_use_it_at_once() -> None:
    """None holds what another one waits for, whoever of them imports torch."""
    found = run(
        "import threading, nmsparse_ext as nms\n"
        "names = ['nm_mask', 'compress', 'linear', 'Sparsifier', 'save_file']\n"
        "barrier = threading.Barrier(len(names) + 1)\n"
        "def use(name):\n"
        "    barrier.wait()\n"
        "    getattr(nms, name) if name else __import__('torch').zeros(1)\n"
        "    done.append(name)\n"
        "done = []\n"
        "threads = [threading.Thread(target=use, args=(name,)) for name in ('', *names)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert sorted(done) == sorted(['', *names]), done\n"
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""


def test_errors_of_the_library_are_seen_by_who_imports_it() -> None:
    """Not by who imports torch, and not swallowed either."""
    broken = "import sys; sys.modules['nmsparse_ext.ops'] = None\n"
    found = run(broken + "import torch, nmsparse_ext")
    assert "nmsparse_ext.ops" in found.stderr
    assert found.returncode == 1
    found = run(broken + "import nmsparse_ext as nms, torch; torch.zeros(1); nms.nm_mask")
    assert "nmsparse_ext.ops" in found.stderr
    assert "nms.nm_mask" in found.stderr or "__getattr__" in found.stderr
    assert found.returncode == 1
