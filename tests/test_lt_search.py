"""The checked search, on made-up algorithms: wrong, unsteady, refused, lazy. And the file of results."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import nmsparse_ext as nms
from nmsparse_ext import _lt_choice as lt_choice
from nmsparse_ext import _lt_search as lt_search
from nmsparse_ext import cusparselt
from nmsparse_ext._lt_search import ALGORITHM_0, DEFAULT, Algorithms, Choice, Found, Key, choices, search

A100, H100, B200, GEFORCE = (8, 0), (9, 0), (10, 0), (12, 0)


class Made:
    """A product whose algorithms are what a test says; others take 100 us and are right."""

    def __init__(
        self,
        count: int,
        times: dict[Choice, float],
        results: dict[Choice, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.count, self.times, self.results = count, times, results or {}
        self.right = [torch.linspace(-1, 1, 64), torch.linspace(5, -3, 64)]
        self.timed: list[Choice] = []
        self.memory = torch.zeros(64)  # what the allocator gives again and again

    def algorithms(self) -> int:
        return self.count

    def run(self, choice: Choice, which: int) -> Tensor:
        result = self.results.get(choice, lambda y: y)(self.right[which].clone())
        self.memory = torch.where(result.isinf(), self.memory, result)  # infinity: not written
        return self.memory.clone()

    def microseconds(self, choice: Choice) -> float:
        self.timed.append(choice)
        return self.times.get(choice, 100.0)


def refuse(y: Tensor) -> Tensor:
    raise RuntimeError("not supported")


def test_the_fastest_wins() -> None:
    found = search(Made(4, {Choice(2): 50, Choice(3): 60}), GEFORCE, 4096)
    assert (found.choice, found.microseconds, found.default_microseconds) == (Choice(2), 50, 100)
    assert found.tried == 4 + 4 * 4
    assert found.wrong == ()


def test_wrong_and_refused_ones_do_not_win() -> None:
    made = Made(
        4,
        {Choice(1): 10, Choice(2): 20, Choice(3): 70},
        {Choice(1): lambda y: y * 1.01, Choice(2): refuse},
    )
    found = search(made, H100, 4096)
    assert found.choice == Choice(3)
    assert found.wrong == (Choice(1),)
    assert found.refused == 1
    assert Choice(1) not in made.timed


def test_one_wrong_number_is_enough() -> None:
    def one_off(y: Tensor) -> Tensor:
        y[17] += 0.5
        return y

    def one_nan(y: Tensor) -> Tensor:
        y[63] = torch.nan
        return y

    made = Made(3, {Choice(1): 10, Choice(2): 10}, {Choice(1): one_off, Choice(2): one_nan})
    found = search(made, H100, 4096)
    assert found.choice == ALGORITHM_0
    assert found.wrong == (Choice(1), Choice(2))


def test_an_algorithm_that_writes_nothing_is_caught() -> None:
    made = Made(2, {Choice(1): 1}, {Choice(1): lambda y: torch.full_like(y, torch.inf)})
    assert search(made, H100, 4096).wrong == (Choice(1),)


def test_an_unsteady_winner_is_caught_at_the_end() -> None:
    calls = iter(range(100))

    def unsteady(y: Tensor) -> Tensor:
        return y + (next(calls) == 5)

    found = search(Made(3, {Choice(1): 10, Choice(2): 40}, {Choice(1): unsteady}), H100, 4096)
    assert found.choice == Choice(2)
    assert found.wrong == (Choice(1),)


def test_noise_does_not_win() -> None:
    assert search(Made(2, {Choice(1): 98.5}), H100, 4096).choice == ALGORITHM_0


def test_algorithm_0_must_be_steady_itself() -> None:
    calls = iter(range(100))
    with pytest.raises(RuntimeError, match="algorithm 0 does not give the same results twice"):
        search(Made(2, {}, {ALGORITHM_0: lambda y: y + next(calls)}), H100, 4096)


def test_choices_are_those_that_the_gpu_has() -> None:
    for capability in (A100, (8, 9), H100, B200, GEFORCE):
        tried = choices(3, capability, 4096)
        assert tried[0] == ALGORITHM_0
        assert len(set(tried)) == len(tried)
        assert {choice.algorithm for choice in tried} == {0, 1, 2}
        # Segments elsewhere make some versions plan forever.
        assert any(choice.split_k == -1 for choice in tried) == (capability in (H100, B200))
    assert {choice[1:] for choice in choices(1, A100, 4096)} == {
        (1, 0), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)
    }  # fmt: skip
    assert {choice[1:] for choice in choices(1, A100, 256)} == {(1, 0), (2, 1), (2, 2)}
    assert {choice[1:] for choice in choices(1, H100, 4096)} == {(1, 0), (-1, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_order_of_summation_is_no_error(dtype: torch.dtype) -> None:
    a, b = torch.randn(64, 4096, dtype=torch.float64), torch.randn(4096, 64, dtype=torch.float64)
    exact, halves = (a @ b).to(dtype), (a[:, :2048].to(dtype) @ b[:2048].to(dtype)) + (
        a[:, 2048:].to(dtype) @ b[2048:].to(dtype)
    )  # fmt: skip
    assert lt_search.same_results(exact, halves)
    halves[3, 4] += exact.abs().max() / 4
    assert not lt_search.same_results(exact, halves)


def test_integers_must_be_equal() -> None:
    a = torch.arange(8, dtype=torch.int8)
    assert lt_search.same_results(a, a.clone())
    assert not lt_search.same_results(a, a + 1)


# ------------------------------------------------------------------------------------------------- the file

FOUND = Found(Choice(3, 2, 1), 12.5, 20.0, 28, (Choice(20),), 2)
KEY = Key("NVIDIA H100 PCIe", "0.8.0", "float16 4096x4096, 64 tokens")


def test_what_was_found_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "algorithms.json"
    table = Algorithms(path)
    assert table.get(KEY) is None
    table.add(KEY, FOUND)
    for one in (table, Algorithms(path)):
        assert one.get(KEY) == FOUND
        assert len(one) == 1
        for field in Key._fields:  # another GPU, library or problem is another result
            assert one.get(KEY._replace(**{field: "another"})) is None
    stored = json.loads(path.read_text())
    assert stored["version"] == 1
    assert stored["algorithms"][KEY.gpu][KEY.library][KEY.problem]["choice"] == [3, 2, 1]


def test_what_others_write_meanwhile_is_kept(tmp_path: Path) -> None:
    first, second = Algorithms(tmp_path / "a.json"), Algorithms(tmp_path / "a.json")
    assert len(first) == len(second) == 0
    keys = [KEY._replace(problem=str(i)) for i in range(4)]
    first.add(keys[0], FOUND)
    second.add(keys[1], FOUND)
    first.add(keys[2], FOUND)
    first.add(keys[0], dataclasses.replace(FOUND, tried=1))
    assert len(first) == 3
    assert len(Algorithms(tmp_path / "a.json")) == 3


def test_threads_add_and_look_up(tmp_path: Path) -> None:
    table = Algorithms(tmp_path / "a.json")

    def work(thread: int) -> None:
        for i in range(5):
            key = KEY._replace(problem=f"{thread} {i}")
            table.add(key, FOUND)
            assert table.get(key) == FOUND

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Algorithms(tmp_path / "a.json")) == 20


def test_another_version_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"version": 2, "something": "else"}')
    table = Algorithms(path)
    assert len(table) == 0
    table.add(KEY, FOUND)
    assert Algorithms(path).get(KEY) == FOUND


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "algorithms": {"a": {"b": {"c": {}}}}}', "\xff"]
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    table = Algorithms(path)
    with pytest.warns(RuntimeWarning, match="is no table of cuSPARSELt's algorithms"):
        assert len(table) == 0
    table.add(KEY, FOUND)
    assert table.get(KEY) == FOUND
    assert path.read_text(encoding="latin-1") == text


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = Algorithms(tmp_path / "file" / "a.json")
    with pytest.warns(RuntimeWarning):
        table.add(KEY, FOUND)
    assert table.get(KEY) == FOUND


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.delenv("NMSPARSE_CUSPARSELT_ALGORITHMS", raising=False)
    assert lt_search.default_path() == Path("/cache/nmsparse_ext/cusparselt.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert lt_search.default_path() == Path("/home/somebody/.cache/nmsparse_ext/cusparselt.json")
    monkeypatch.setenv("NMSPARSE_CUSPARSELT_ALGORITHMS", "/here.json")
    assert lt_search.default_path() == Path("/here.json")


def test_problems_in_words() -> None:
    text = lt_search.problem_text
    assert text(torch.float16, torch.float16, 4096, 11008, 64) == "float16 4096x11008, 64 tokens"
    assert (
        text(torch.int8, torch.int32, 32, 64, 16, batches=2, bias=True, scales=True, activation="relu")
        == "int8 to int32 2x32x64, 16 tokens, bias, scales, relu"
    )


# ------------------------------------------------------------------------------------------------- the modes


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[cusparselt.LtWeight]:
    """A weight on a GPU that is none, whose searches find the same result."""
    before, path = cusparselt.search_mode(), cusparselt.algorithms_path()
    cusparselt.set_search_mode("file", path=tmp_path / "a.json")
    monkeypatch.setattr(lt_choice, "gpu_and_library", lambda device: ("Some GPU", "0.8.0"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        yield cusparselt.LtWeight(
            torch.empty(576, dtype=torch.uint8, device="cuda"), rows=16, k=32, dtype=torch.float16
        )
    cusparselt.set_search_mode(before, path=path)


def chosen(packed: cusparselt.LtWeight, tokens: int = 5) -> Choice:
    """What `linear` would run."""
    x = torch.empty(tokens, 32, dtype=torch.float16, device="cuda")
    return lt_choice.chosen(x, packed, torch.float16, None, None, "none")


def test_the_file_decides(packed: cusparselt.LtWeight) -> None:
    assert chosen(packed) == DEFAULT
    key = Key("Some GPU", "0.8.0", "float16 16x32, 8 tokens")
    lt_choice._algorithms.add(key, FOUND)
    assert chosen(packed, 5) == chosen(packed, 8) == FOUND.choice  # both are 8 tokens to the library
    assert chosen(packed, 9) == chosen(packed, 0) == DEFAULT
    cusparselt.set_search_mode("off")
    assert chosen(packed) == DEFAULT


def test_first_use_searches_once(packed: cusparselt.LtWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []

    def fake_search(weight: cusparselt.LtWeight, tokens: int, **options: object) -> Found:
        searched.append((tokens, options["out_dtype"]))
        lt_choice._algorithms.add(lt_choice._key(weight, tokens, False, False, "none", torch.float16), FOUND)
        return FOUND

    monkeypatch.setattr(lt_choice, "search", fake_search)
    assert chosen(packed) == DEFAULT
    cusparselt.set_search_mode("first-use")
    assert [chosen(packed, tokens) for tokens in (5, 5, 8, 12)] == [FOUND.choice] * 4
    assert searched == [(5, torch.float16), (12, torch.float16)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(packed, 100) == DEFAULT


def test_modes_that_are_none() -> None:
    with pytest.raises(ValueError, match="mode must be 'off' or 'file' or 'first-use', got 'always'"):
        cusparselt.set_search_mode("always")  # type: ignore[arg-type]


def test_a_search_needs_a_gpu() -> None:
    w = cusparselt.pack(nms.compress(torch.zeros(16, 16).half(), "2:4"))
    with pytest.raises(ValueError, match="a search measures on a GPU; the weight is on cpu"):
        cusparselt.search(w, 8)
