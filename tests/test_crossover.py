"""Which way a product on a GPU goes: rules, measured tables that are made up, and the file of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import nmsparse_ext as nms
from nmsparse_ext import crossover, cusparselt
from nmsparse_ext.crossover import DENSE, LT, SMALL_BATCH, Choices, Measured, Problem
from nmsparse_ext.pattern import Pattern

GPU = "NVIDIA Test 9000"


def problem(
    pattern: str = "2:4", rows: int = 4096, k: int = 4096, dtype: torch.dtype = torch.bfloat16
) -> Problem:
    return Problem(torch.device("cuda", 0), dtype, Pattern.parse(pattern), rows, k)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU with cuSPARSELt that is none, and a table of its own."""
    monkeypatch.setattr(crossover, "_why_no_small_batch_on", lambda device: None)
    monkeypatch.setattr(crossover, "_why_no_lt_on", lambda device: None)
    monkeypatch.setattr(crossover, "_machine", lambda device: (GPU, "0.8.1"))
    before = cusparselt.search_mode()
    cusparselt.set_search_mode("file")
    path = tmp_path / "crossovers.json"
    crossover.set_table(path)
    yield path
    cusparselt.set_search_mode(before)
    crossover.set_table(None)


class Made:
    """Times as a test says: ``{branch: (fixed, per token)}``."""

    def __init__(self, times: dict[str, tuple[float, float]], most: int = 1 << 20) -> None:
        self.times, self.most = times, most
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def microseconds(self, tokens: int, branches: Sequence[str]) -> dict[str, float]:
        self.asked.append((tokens, tuple(branches)))
        if tokens > self.most:
            raise torch.cuda.OutOfMemoryError("no memory")
        return {branch: self.times[branch][0] + self.times[branch][1] * tokens for branch in branches}


USUAL = {SMALL_BATCH: (5.0, 0.3), LT: (12.0, 0.01), DENSE: (8.0, 0.02)}


# ---------------------------------------------------------------------------------------- the rules


def test_rules_where_nothing_was_measured() -> None:
    choices = crossover.choices_for(problem())
    assert not choices.measured
    assert [choices.at(tokens) for tokens in (0, 1, 16, 17, 1023, 1024, 10**9)] == [
        SMALL_BATCH, SMALL_BATCH, SMALL_BATCH, DENSE, DENSE, LT, LT,
    ]  # fmt: skip
    assert str(choices) == "small-batch 1 to 16, dense 17 to 1023, cusparselt from 1024 tokens"


def test_rules_look_at_the_work() -> None:
    assert crossover.choices_for(problem(rows=16384, k=16384)).bounds == (16, 255)
    assert crossover.choices_for(problem(rows=1024, k=1024)).at(4096) == DENSE


@pytest.mark.parametrize(
    ("problem", "ways", "words"),
    [
        (problem("4:8"), {SMALL_BATCH, DENSE}, "4:8 does not embed in 2:4"),
        (problem("1:16"), {SMALL_BATCH, LT, DENSE}, ""),
        (problem("3:4"), {DENSE}, "3:4 does not embed in 2:4"),
        (problem("1:64"), {LT, DENSE}, "groups of at most 32, not 1:64"),
        (problem("8:64"), {DENSE}, "8:64 does not embed"),
        (problem(rows=4100), {SMALL_BATCH, DENSE}, "multiples of 16, not 4100x4096"),
        (problem(k=4102), {SMALL_BATCH, DENSE}, "multiples of 16"),
        (problem("1:2", dtype=torch.float32), {DENSE}, "TF32"),
        (problem("2:4", dtype=torch.float32), {DENSE}, "2:4 does not embed in 1:2"),
        (problem("2:4", dtype=torch.float64), {DENSE}, "does not multiply float64"),
        (problem(rows=0), {DENSE}, ""),
        (problem(k=0), {DENSE}, ""),
    ],
)
def test_what_can_run(problem: Problem, ways: set[str], words: str) -> None:
    assert set(crossover.choices_for(problem).branches) == ways
    assert words in crossover.why(problem)
    assert "by rule, not measured" in crossover.why(problem)


def test_float32_runs_where_tf32_is_allowed() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert LT in crossover.choices_for(problem("1:2", dtype=torch.float32)).branches
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert LT not in crossover.choices_for(problem("1:2", dtype=torch.float32)).branches


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "_why_no_lt_on", lambda device: "no usable cuSPARSELt (nowhere)")
    crossover.forget_choices()
    assert set(crossover.choices_for(problem()).branches) == {SMALL_BATCH, DENSE}
    assert "no usable cuSPARSELt (nowhere)" in crossover.why(problem())


# ---------------------------------------------------------------------------------------- measuring


def test_what_is_measured_decides() -> None:
    timer = Made(USUAL)
    found = crossover.measure(problem(), timer, (1, 4, 16, 64, 256, 1024))
    # The small-batch kernel is asked for what it takes only.
    assert [SMALL_BATCH in ways for _, ways in timer.asked] == [True, True, True, False, False, False]
    choices = crossover.choices_for(problem())
    assert choices == found.choices(problem())
    assert choices.measured
    assert [choices.at(tokens) for tokens in (1, 4, 5, 16, 64, 256, 1024, 99999)] == [
        SMALL_BATCH, SMALL_BATCH, DENSE, DENSE, DENSE, DENSE, LT, LT,
    ]  # fmt: skip
    assert crossover.why(problem()).endswith("(measured)")


def test_dense_wins_ties_and_noise() -> None:
    close = {SMALL_BATCH: (9.8, 0.0), LT: (9.8, 0.0), DENSE: (10.0, 0.0)}
    crossover.measure(problem(), Made(close))
    assert crossover.choices_for(problem()) == Choices((), (DENSE,), measured=True)
    assert str(crossover.choices_for(problem())) == "dense always"


def test_the_small_batch_kernel_does_not_go_on_without_end() -> None:
    crossover.measure(problem(), Made({SMALL_BATCH: (1.0, 0.0), LT: (9.0, 0.0), DENSE: (9.0, 0.0)}), (1, 8))
    choices = crossover.choices_for(problem())
    assert [choices.at(tokens) for tokens in (8, 32, 33)] == [SMALL_BATCH, SMALL_BATCH, DENSE]


def test_a_way_that_cannot_run_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    crossover.measure(problem(), Made({**USUAL, LT: (0.1, 0.0)}))
    assert crossover.choices_for(problem()).branches == (LT,)
    monkeypatch.setattr(crossover, "_why_no_lt_on", lambda device: "gone")
    crossover.forget_choices()
    assert crossover.choices_for(problem()).branches == (SMALL_BATCH, DENSE)  # the best of what is left


def test_memory_that_does_not_suffice_ends_it() -> None:
    found = crossover.measure(problem(), Made(USUAL, most=100), (1, 64, 256, 1024))
    assert list(found.points) == [1, 64]
    with pytest.raises(RuntimeError, match="no memory"):
        crossover.measure(problem(rows=64), Made(USUAL, most=0), (1,))


def test_points_are_added_to_those_that_there_are() -> None:
    crossover.measure(problem(), Made(USUAL), (1, 64))
    crossover.measure(problem(), Made({**USUAL, DENSE: (1.0, 0.0)}), (64, 128))
    found = crossover.measured(problem())
    assert found is not None
    assert list(found.points) == [1, 64, 128]
    assert found.points[64][DENSE] == 1.0
    # A shape of the same bucket takes what was measured, until it is measured itself.
    other = problem(rows=4000)
    assert crossover.measured(other) == found
    crossover.measure(other, Made(USUAL), (4,))
    again = crossover.measured(problem())
    assert again is not None
    assert (again.rows, list(again.points)) == (4000, [4])


def test_shapes_dtypes_and_patterns_have_results_of_their_own() -> None:
    crossover.measure(problem(), Made(USUAL))
    for other in (
        problem(rows=8192), problem(k=1024), problem("1:4"), problem(dtype=torch.float16),
    ):  # fmt: skip
        assert crossover.measured(other) is None
    assert crossover.measured(problem(rows=0)) is None


# ---------------------------------------------------------------------------------------- the file


def test_the_file(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crossover.measure(problem(rows=11008), Made(USUAL), (1, 64))
    stored = json.loads(machine.read_text())
    assert stored["version"] == crossover.FILE_VERSION
    entry = stored["crossovers"][GPU]["0.8.1"][torch.__version__]["bfloat16"]["2:4"]["11585x4096"]
    assert entry["rows"] == 11008
    assert entry["points"][0] == [1, {"small-batch": 5.3, "cusparselt": 12.01, "dense": 8.02}]
    crossover.set_table(machine)
    assert crossover.table_path() == str(machine)
    assert crossover.choices_for(problem(rows=11008)).measured
    monkeypatch.setattr(crossover, "_machine", lambda device: (GPU, "0.9.0"))
    crossover.forget_choices()
    assert not crossover.choices_for(problem(rows=11008)).measured
    assert list(machine.parent.iterdir()) == [machine]  # nothing of the writing is left


def test_mode_off_takes_no_notice(machine: Path) -> None:
    crossover.measure(problem(), Made({**USUAL, DENSE: (0.1, 0.0)}))
    assert crossover.choices_for(problem()).branches == (DENSE,)
    cusparselt.set_search_mode("off")
    assert not crossover.choices_for(problem()).measured
    cusparselt.set_search_mode("file")
    assert crossover.choices_for(problem()).measured


@pytest.mark.parametrize(
    "section",
    [
        "",
        "[]",
        '{"version": 1}',
        '{"version": 1, "crossovers": {"gpu": {"0.8.1": 5}}}',
        '{"version": 1, "crossovers": {"g": {"l": {"t": {"d": {"p": {"s": '
        '{"rows": 1, "k": 1, "points": []}}}}}}}}',
        '{"version": 1, "crossovers": {"g": {"l": {"t": {"d": {"p": {"s": '
        '{"rows": 1, "k": 1, "points": [[1, {"magic": 2.0}]]}}}}}}}}',
        '{"version": 1, "crossovers": {"g": {"l": {"t": {"d": {"p": {"s": '
        '{"rows": 1, "k": 1, "points": [[1, {"dense": -2.0}]]}}}}}}}}',
    ],
)
def test_a_damaged_file_is_left_alone(machine: Path, section: str, recwarn: pytest.WarningsRecorder) -> None:
    machine.write_text(section)
    crossover.set_table(machine)
    for tokens in range(3):
        assert crossover.choices_for(problem(rows=64 << tokens)).measured is False
    assert ["is no table of measured crossovers" in str(warning.message) for warning in recwarn] == [True]
    crossover.measure(problem(), Made(USUAL))  # is used, but not written
    assert crossover.choices_for(problem()).measured
    assert machine.read_text() == section


def test_a_file_of_another_version_is_written_anew(machine: Path) -> None:
    machine.write_text('{"version": 99, "crossovers": 5}')
    crossover.set_table(machine)
    assert not crossover.choices_for(problem()).measured
    crossover.measure(problem(), Made(USUAL))
    assert json.loads(machine.read_text())["version"] == crossover.FILE_VERSION


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NMSPARSE_CROSSOVERS", "/here.json")
    assert str(crossover.Crossovers().path) == "/here.json"
    monkeypatch.delenv("NMSPARSE_CROSSOVERS")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(crossover.Crossovers().path) == "/cache/nmsparse_ext/crossovers.json"


def test_measured_times_must_be_times() -> None:
    with pytest.raises(ValueError, match="no points"):
        Measured.of_json({"rows": 1, "k": 1, "points": [[0, {"dense": 1.0}]]})


@pytest.mark.parametrize("capturable", [True, False])
def test_few_tokens_are_timed_as_graphs_if_they_can_be(
    monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    from nmsparse_ext import _crossover_timer as timer

    def graphed(call: Callable[[int], object], calls: int) -> Callable[[int], object]:
        if not capturable:
            raise RuntimeError("no")
        return lambda _: [call(i) for i in range(calls)]

    def alternate(calls: dict[str, Callable[[int], Any]]) -> dict[str, list[float]]:
        results = {name: call(0) for name, call in calls.items()}
        return {name: [6.0 * len(y) if isinstance(y, list) else 7.0] for name, y in results.items()}

    monkeypatch.setattr(timer, "graphed", graphed)
    monkeypatch.setattr(timer, "alternate", alternate)
    monkeypatch.setattr(timer, "MAX_COPIES", 3)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    one = timer.CudaTimer(nms.compress(torch.randn(32, 64).half(), "2:4", prune=True))
    ways = (SMALL_BATCH, LT, DENSE)
    assert one.microseconds(4, ways) == dict.fromkeys(ways, 6.0 if capturable else 7.0)
    assert one.microseconds(300, (LT, DENSE)) == dict.fromkeys((LT, DENSE), 7.0)

    def refuses(*args: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(cusparselt, "multiply", refuses)
    with pytest.warns(UserWarning, match="left out at 300 tokens: no such kernel"):
        assert one.microseconds(300, (LT, DENSE)) == {DENSE: 7.0}


def test_a_batch_as_a_graph_runs_once_before_and_once_while_it_is_captured() -> None:
    from unittest import mock

    from nmsparse_ext import _cuda_timing

    log: list[Any] = []

    class Graph:
        def capture_begin(self, capture_error_mode: str) -> None:
            log.append("begin")

        def capture_end(self) -> None:
            log.append("end")

        def replay(self) -> None:
            log.append("replay")

    with (
        mock.patch.multiple(
            torch.cuda,
            CUDAGraph=Graph,
            current_device=lambda: 0,
            stream=lambda stream: contextlib.nullcontext(),
            synchronize=lambda: None,
        ),
        mock.patch.object(_cuda_timing, "_capture_stream", return_value=None),
    ):
        replay = _cuda_timing.graphed(log.append, 2)
    replay(5)
    assert log == [0, 1, "begin", 0, 1, "end", "replay"]
