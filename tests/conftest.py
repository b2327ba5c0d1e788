"""What every test can ask for: a device, an engine, and that no test changes another one's random numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import CPU_ISAS, CUDA, Engine, use_engine

from nmsparse_ext._as_on_a_gpu import as_on_a_gpu

try:
    import hypothesis
except ModuleNotFoundError:
    pass  # properties.py does without
else:
    hypothesis.settings.register_profile(
        "nmsparse",
        deadline=None,
        max_examples=40,
        derandomize=True,
        # The engine fixture is set up once a test, not once an example, and is meant to be.
        suppress_health_check=[
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.too_slow,
        ],
    )
    hypothesis.settings.load_profile("nmsparse")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="what every test draws its numbers from; a test has to pass with any",
    )

    parser.addoption("--after", default="", metavar="TEST", help="only the tests that come after this one")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what has run before, see ``scripts/gpu_tests.py``."""
    after = config.getoption("--after")
    names = [item.nodeid for item in items]
    if after in names:
        items[:] = items[names.index(after) + 1 :]


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a test file draws when it is imported does not depend on what was imported before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(collector.config.getoption("--seed"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a GPU where there is none, but fails where there was meant to be one."""
    if item.get_closest_marker("needs_cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail("FAIL_WITHOUT_CUDA=1, but torch sees no CUDA device")
    pytest.skip("needs an NVIDIA GPU")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Ends the process where a test has left the GPU unusable: all tests behind it would fail, too."""
    if item.get_closest_marker("needs_cuda") is None or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        told = os.environ.get("NMSPARSE_BROKEN_GPU")
        if told:
            Path(told).write_text(item.nodeid, encoding="utf-8")
        first = str(error).strip().splitlines()[0]
        pytest.exit(f"the GPU cannot be used after {item.nodeid}: {first}", returncode=9)


@pytest.fixture(autouse=True)
def _own_random_numbers(pytestconfig: pytest.Config) -> Iterator[None]:
    """Every test starts from the same seed and leaves the generator as it found it."""
    state = torch.random.get_rng_state()
    torch.manual_seed(pytestconfig.getoption("--seed"))
    yield
    torch.random.set_rng_state(state)


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[None]:
    """The CPU, as if it were a GPU, with a table of crossovers of its own."""
    with as_on_a_gpu(tmp_path / "crossovers.json"):
        yield


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that the ops have kernels for."""
    return request.param


@pytest.fixture(params=["reference", *CPU_ISAS, CUDA])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Every engine of this host in turn; the public functions run on it too."""
    yield from use_engine(request.param, monkeypatch)


@pytest.fixture(params=[*CPU_ISAS, CUDA])
def compiled_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Every engine but the reference, to be compared with it."""
    yield from use_engine(request.param, monkeypatch)


@pytest.fixture(params=CPU_ISAS or ["reference"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set of this host in turn; the reference where nothing is compiled."""
    for engine in use_engine(request.param, monkeypatch):
        yield engine.name
