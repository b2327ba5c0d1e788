"""Checked search for cuSPARSELt's fastest algorithm, and the file that remembers what was found.

Some of the library's algorithms give wrong results on some GPUs (pytorch#155333), and its own search does not
look at results. Here every candidate is compared with algorithm 0, on two inputs in turn, before its time
counts, and the winner once more at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._tuned_file import Kind, TunedFile, cache_path

FILE_VERSION = 1
#: A candidate must be this much faster than algorithm 0 to be chosen instead: less is noise.
MARGIN = 0.98


class Choice(NamedTuple):
    """Which of the library's kernels runs.

    Attributes:
        algorithm: Its id; below 0: the library's own choice.
        split_k: Into how many parts sums are split; -1 for segments, on GPUs that have them.
        split_k_mode: How the parts are added up, in the library's numbers; 0: not set.
    """

    algorithm: int = -1
    split_k: int = 1
    split_k_mode: int = 0


DEFAULT = Choice()
ALGORITHM_0 = Choice(0)


def choices(algorithms: int, capability: tuple[int, int], k: int) -> list[Choice]:
    """Every choice worth trying: each id with every way of splitting sums on the GPU, algorithm 0 first.

    Ways that a GPU does not have are left out, and not left to the library to refuse: some versions then plan
    forever.
    """
    major = capability[0]
    splits = [(1, 0)]
    if major == 8:  # mode 1: one kernel, 2: two kernels
        splits += [(parts, mode) for parts in (2, 4, 8) if k // parts >= 128 for mode in (1, 2)]
    elif major in (9, 10):
        splits.append((-1, 0))
    if major >= 10:  # heuristic, data-parallel, split-k, stream-k
        splits += [(1, mode) for mode in (3, 4, 5, 6)]
    return [Choice(id, *split) for split in splits for id in range(algorithms)]


class Runner(Protocol):
    """One product, for the search: two inputs, any choice of kernel."""

    def algorithms(self) -> int:
        """How many ids there are."""

    def run(self, choice: Choice, which: int) -> Tensor:
        """The product of input 0 or 1; RuntimeError where the library refuses the choice."""

    def microseconds(self, choice: Choice) -> float:
        """How long one product takes."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        choice: The fastest right one.
        microseconds: What it takes.
        default_microseconds: What algorithm 0 takes.
        tried: How many choices were tried.
        wrong: Those that gave other results than algorithm 0.
        refused: How many the library refused.
    """

    choice: Choice
    microseconds: float
    default_microseconds: float
    tried: int
    wrong: tuple[Choice, ...]
    refused: int


#: Relative differences that another order of summation explains.
_TOLERANCE = {
    torch.float32: 2e-3,  # products are tf32
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
    torch.float8_e4m3fn: 0.13,
}


def same_results(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one product are equal but for the order of summation; integers: equal."""
    if a.dtype not in _TOLERANCE:
        return torch.equal(a, b)
    a, b, tolerance = a.float(), b.float(), _TOLERANCE[a.dtype]
    magnitude = b.abs()
    close = (a - b).abs() <= tolerance * (magnitude + magnitude.mean())
    return bool(close.all())  # a NaN is close to nothing


def search(runner: Runner, capability: tuple[int, int], k: int) -> Found:
    """Tries every choice; see the module.

    Args:
        runner: The product.
        capability: Compute capability of the GPU.
        k: Inputs of the weight.

    Returns:
        The fastest choice whose results are those of algorithm 0; algorithm 0 where none is faster.
    """
    expected = runner.run(ALGORITHM_0, 0), runner.run(ALGORITHM_0, 1)

    def is_right(choice: Choice, rounds: int) -> bool:
        # In turn: a kernel that does not write everything leaves the other input's results in what memory it
        # is given again.
        return all(
            same_results(runner.run(choice, which), expected[which])
            for _ in range(rounds)
            for which in (0, 1)
        )

    if not is_right(ALGORITHM_0, 1):
        raise RuntimeError(
            "algorithm 0 does not give the same results twice, so nothing can be checked by it"
        )
    default = runner.microseconds(ALGORITHM_0)
    times: dict[Choice, float] = {ALGORITHM_0: default}
    wrong: list[Choice] = []
    refused = 0
    candidates = choices(runner.algorithms(), capability, k)
    for choice in candidates:
        if choice == ALGORITHM_0:
            continue
        try:
            if is_right(choice, 1):
                times[choice] = runner.microseconds(choice)
            else:
                wrong.append(choice)
        except RuntimeError:
            refused += 1
    for choice in sorted(times, key=times.__getitem__):
        if choice == ALGORITHM_0 or times[choice] > MARGIN * default:
            break
        if is_right(choice, 3):
            return Found(choice, times[choice], default, len(candidates), tuple(wrong), refused)
        wrong.append(choice)
    return Found(ALGORITHM_0, default, default, len(candidates), tuple(wrong), refused)


# ------------------------------------------------------------------------------------------------- the file


class Key(NamedTuple):
    """What a result holds for. Ids of algorithms mean something in one version of the library only."""

    gpu: str
    library: str
    problem: str


@functools.lru_cache(maxsize=4096)  # asked for at every product
def problem_text(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    rows: int,
    k: int,
    tokens: int,
    *,
    batches: int = 1,
    bias: bool = False,
    scales: bool = False,
    activation: str = "none",
) -> str:
    """One product, in words: ``"float16 4096x11008, 64 tokens, bias"``."""
    parts = [str(dtype).removeprefix("torch.")]
    if out_dtype != dtype:
        parts[0] += f" to {str(out_dtype).removeprefix('torch.')}"
    parts[0] += f" {'' if batches == 1 else f'{batches}x'}{rows}x{k}"
    parts.append(f"{tokens} tokens")
    parts += [name for name, used in (("bias", bias), ("scales", scales)) if used]
    if activation != "none":
        parts.append(activation)
    return ", ".join(parts)


def default_path() -> Path:
    """``$NMSPARSE_CUSPARSELT_ALGORITHMS``, or ``nmsparse_ext/cusparselt.json`` in the user's cache folder."""
    return cache_path("NMSPARSE_CUSPARSELT_ALGORITHMS", "cusparselt.json")


class Algorithms(TunedFile[Key, Found]):
    """What searches have found: ``{"version": 1, "algorithms": {gpu: {library: {problem: result}}}}``."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        kind = Kind("algorithms", "cuSPARSELt's algorithms", FILE_VERSION)
        super().__init__(default_path() if path is None else path, kind, Key, dataclasses.asdict, _found)


def _found(stored: dict[str, Any]) -> Found:
    return Found(
        Choice(*map(int, stored["choice"])),
        float(stored["microseconds"]),
        float(stored["default_microseconds"]),
        int(stored["tried"]),
        tuple(Choice(*map(int, choice)) for choice in stored["wrong"]),
        int(stored["refused"]),
    )
