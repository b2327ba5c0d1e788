"""The questions to a GPU are asked without one as far as that goes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nmsparse_ext import reference


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "scripts" / "probe_cusparselt.py"
    spec = importlib.util.spec_from_file_location("probe_cusparselt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layout", ["cutlass", "sm80", "sm90"])
def test_layouts_are_told_apart(probe: ModuleType, layout: str) -> None:
    w = probe.weight(256, 256)
    blob = reference.lt_pack(w.values, w.indices, 256, layout)
    padded = torch.cat([blob, blob.new_zeros(64)])
    assert probe.layouts_of(padded, w) == [layout, "values first"]
    blob[-1] ^= 1
    assert probe.layouts_of(blob, w) == ["values first"]
    assert probe.layouts_of(blob.flip(0), w) == []


def test_a_probe_that_fails_does_not_stop_the_others(probe: ModuleType) -> None:
    def fails(quick: bool) -> dict[str, Any]:
        """x. Does it?"""
        raise RuntimeError("no")

    def works(quick: bool) -> dict[str, Any]:
        """y. And this?"""
        return {"yes": quick}

    kept: list[set[str]] = []
    answers = probe.ask((fails, works), True, lambda so_far: kept.append(set(so_far)))
    assert kept == [{"fails"}, {"fails", "works"}]
    assert answers["fails"] == {"question": "x. Does it?", "answer": {"failed": "RuntimeError: no"}}
    assert answers["works"]["answer"] == {"yes": True}
    assert [p.__name__ for p in probe.PROBES] == [
        "layouts", "kernels", "bias_pointer", "capture", "plans", "devices", "algorithms",
    ]  # fmt: skip


def test_without_a_gpu(probe: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        probe.main(["--json", str(tmp_path / "answers.json")])
    assert end.value.code == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
