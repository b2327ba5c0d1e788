"""The build itself: what was compiled, what it links to, and how it is chosen and reported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nmsparse_ext as nms
from nmsparse_ext import _build

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("scalar", "avx2", "avx512")  # slowest first

needs_extension = pytest.mark.skipif(
    _build.extension is None, reason=f"reference mode: {_build.reference_reason}"
)


def run_python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter that imports the same nmsparse_ext as this one."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in {"NMSPARSE_REFERENCE", "NMSPARSE_CPU_ISA", "ATEN_CPU_CAPABILITY"}
    }
    env |= {"PYTHONPATH": str(Path(nms.__file__).resolve().parent.parent), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py in a fresh interpreter, from the source tree."""
    names = ("NMSPARSE_REFERENCE", "NMSPARSE_CUDA", "FORCE_CUDA", "CXX", "TORCH_CUDA_ARCH_LIST")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        env=env | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


# ---- build_info ----


def test_build_info_names_the_running_versions() -> None:
    info = nms.build_info()
    assert info.torch == torch.__version__
    assert info.python == ".".join(map(str, sys.version_info[:3]))
    assert info.reference == bool(info.reference_reason)


@needs_extension
def test_build_info_of_a_compiled_build() -> None:
    info = nms.build_info()
    assert not info.reference
    assert info.torch_target == "2.11"
    assert re.match(r"\d+\.\d+\.\d+", info.torch_built_with or "")
    assert re.match(r"(gcc|clang|msvc) ", info.compiler or "")
    assert info.cpu_isas == ISAS[: len(info.cpu_isas)]
    assert info.cpu_isa in info.cpu_isas
    if info.cuda:
        assert re.fullmatch(r"\d+\.\d+", info.cuda_version or "")
        assert info.cuda_archs
        assert all(arch >= 50 for arch in info.cuda_archs)
    else:
        assert info.cuda_version is None
        assert info.cuda_archs == ()
        assert "CPU build" in info.cuda_reason


def test_build_info_is_readable_and_storable() -> None:
    info = nms.build_info()
    text = str(info)
    for fact in (info.version, info.torch, "CPU ops", "CUDA ops", "cuSPARSELt"):
        assert fact in text
    stored = info.as_dict()
    assert json.loads(json.dumps(stored)) == stored


def test_cuda_and_cusparselt_are_there_or_the_reason_is() -> None:
    info = nms.build_info()
    assert bool(info.cuda_reason) != (info.cuda and bool(info.cuda_devices))
    assert bool(info.cusparselt_reason) != bool(info.cusparselt_version)


@pytest.mark.needs_cuda
def test_gpu_machine_runs_compiled_kernels() -> None:
    info = nms.build_info()
    assert info.cuda
    assert info.cuda_reason == ""
    assert info.cuda_devices == tuple(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )


# ---- Reference mode ----


def test_reference_mode_is_chosen_by_the_environment() -> None:
    output = run_python(
        "import torch, nmsparse_ext as nms; info = nms.build_info();"
        "print(info.reference, info.cpu_isa, info.reference_reason);"
        "print(nms.nm_mask(torch.tensor([[1., -3., 2., 0.]]), '2:4').tolist())",
        NMSPARSE_REFERENCE="1",
    )
    assert output.splitlines() == [
        "True None NMSPARSE_REFERENCE is set",
        "[[False, True, True, False]]",
    ]


def test_reference_mode_says_that_nothing_was_built() -> None:
    output = run_python(
        "import sys; sys.modules['nmsparse_ext._C'] = None;"  # makes importing it fail
        "import nmsparse_ext as nms; info = nms.build_info();"
        "print(info.reference, info.reference_reason)"
    )
    assert output.startswith("True the extension was not built: ")


def test_a_binary_that_cannot_be_loaded_is_named_and_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol: xyz")

    monkeypatch.delenv("NMSPARSE_REFERENCE", raising=False)
    monkeypatch.setattr(_build.importlib, "import_module", fail)
    with pytest.warns(RuntimeWarning, match=r"pure PyTorch.*undefined symbol: xyz"):
        extension, reason = _build._load()
    assert extension is None
    assert reason == "the extension was built but cannot be loaded: nmsparse_ext._C: undefined symbol: xyz"


# ---- CPU instruction sets ----


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
def test_environment_limits_the_instruction_set(isa: str) -> None:
    output = run_python("import nmsparse_ext as nms; print(nms.build_info().cpu_isa)", NMSPARSE_CPU_ISA=isa)
    supported = nms.build_info().cpu_isas
    assert output == (isa if isa in supported else supported[-1])


@needs_extension
@pytest.mark.parametrize(
    ("capability", "isa"), [("default", "scalar"), ("avx2", "avx2"), ("avx512", "avx512")]
)
def test_torchs_own_switch_is_honoured(capability: str, isa: str) -> None:
    code = "import nmsparse_ext as nms; print(nms.build_info().cpu_isa)"
    supported = nms.build_info().cpu_isas
    expected = isa if isa in supported else supported[-1]
    assert run_python(code, ATEN_CPU_CAPABILITY=capability) == expected


@needs_extension
def test_our_own_switch_wins_over_torchs() -> None:
    code = "import nmsparse_ext as nms; print(nms.build_info().cpu_isa)"
    assert run_python(code, ATEN_CPU_CAPABILITY="avx512", NMSPARSE_CPU_ISA="scalar") == "scalar"


@needs_extension
def test_set_cpu_isa() -> None:
    extension = _build.extension
    assert extension is not None
    before = extension.cpu_isa()
    try:
        for isa in extension.cpu_isas():
            extension.set_cpu_isa(isa)
            assert nms.build_info().cpu_isa == isa
    finally:
        extension.set_cpu_isa(before)


@needs_extension
@pytest.mark.parametrize("isa", ["", "AVX2", "sse9"])
def test_set_cpu_isa_names_what_is_allowed(isa: str) -> None:
    extension = _build.extension
    assert extension is not None
    before = extension.cpu_isa()
    with pytest.raises(ValueError, match=rf'"scalar".*got "{isa}"'):
        extension.set_cpu_isa(isa)
    assert extension.cpu_isa() == before


# ---- The binary ----


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_binary_needs_only_the_stable_abi() -> None:
    assert _build.extension is not None
    done = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", str(_build.extension.__file__)],
        capture_output=True,
        text=True,
        check=True,
    )
    unstable = [line for line in done.stdout.splitlines() if re.search(r"\b(at|c10|torch|caffe2)::", line)]
    assert unstable == []


# ---- setup.py ----


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NMSPARSE_REFERENCE": "1"}, "no extension, pure Python: NMSPARSE_REFERENCE=1"),
        ({"CXX": "/nonexistent/c++"}, "no extension, pure Python: no C++ compiler found"),
        ({"NMSPARSE_CUDA": "0", "CXX": sys.executable}, "CPU extension: NMSPARSE_CUDA=0"),
    ],
)
def test_setup_says_what_it_builds_and_why(environment: dict[str, str], said: str) -> None:
    done = run_setup("--version", **environment)
    assert done.returncode == 0, done.stderr
    assert f"nmsparse_ext: building {said}" in done.stdout


@pytest.mark.parametrize("switch", ["NMSPARSE_CUDA", "FORCE_CUDA"])
def test_setup_refuses_a_cuda_build_that_cannot_be(switch: str, tmp_path: Path) -> None:
    # An empty folder as CUDA_HOME: whatever torch is installed, there is no toolkit.
    done = run_setup("--version", **{switch: "1", "CUDA_HOME": str(tmp_path), "CXX": sys.executable})
    assert done.returncode != 0
    assert "a CUDA build was asked for, but" in done.stderr


def test_sources_are_listed_once_and_exist() -> None:
    listed = {}
    for kind in ("cpu", "cuda", "tests"):
        done = subprocess.run(
            [sys.executable, "sources.py", kind], cwd=ROOT, capture_output=True, text=True, check=True
        )
        listed[kind] = [name for name in done.stdout.strip().split(";") if name]
    on_disk = {
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.c*") if path.suffix != ".cuh"
    }
    assert set(listed["cpu"]) | set(listed["cuda"]) == on_disk
    assert len(listed["cpu"]) == len(set(listed["cpu"]))
    assert all((ROOT / name).is_file() for names in listed.values() for name in names)
