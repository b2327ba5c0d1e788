"""Which way to multiply with a packed weight on a GPU is the fastest, for how many tokens.

There are three: the small-batch kernel, which reads the packed form as it is; cuSPARSELt, for patterns that
embed in 2:4 (float32: in 1:2); and the dense weight. Which wins depends on the GPU, the shape and above all
on the number of tokens, so it is measured: by `tune` (``nmsparse tune``), by ``convert(policy="auto")``, or
where a weight is packed on a GPU while ``cusparselt.set_search_mode("first-use")`` holds. What was measured
is kept in ``nmsparse_ext/crossovers.json`` in the user's cache folder (``NMSPARSE_CROSSOVERS`` names another
file). The mode ``"off"`` takes no notice of it.

Up to 256 tokens the GPU's time counts (replays of CUDA graphs), not what a call takes on the host. A number
of tokens between two measured ones goes the way that won at the larger. Dense goes where nothing
else is faster than it by more than noise. Where nothing was measured, these are the rules, taken from what
others have published and not from measurements of ours:

- up to `DEFAULT_SMALL_BATCH` tokens: the small-batch kernel, which reads fewer bytes than a dense product;
- from `DEFAULT_LT_TOKENS` tokens, if the product is of `DEFAULT_LT_WORK` multiplications or more: cuSPARSELt;
- else dense;
- where the dense weight is not held, and would be made in every call: the small-batch kernel for as many
  tokens as it takes, then cuSPARSELt, and dense only where neither can.

Weights of 8 bits (int8, float8) multiply inputs of 16. The small-batch kernel reads int8 weights as they are;
cuSPARSELt takes inputs of 8 bits only, so it goes only where `allow_rounded_inputs` says that inputs may be
rounded; the dense weight is made in every call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from . import _lt_layout as lt
from . import cusparselt
from ._build import extension
from ._checks import ceil_div
from ._lt_choice import gpu_and_library
from ._tuned_file import Kind, TunedFile, cache_path
from .pattern import Pattern

__all__ = [
    "BRANCHES",
    "Choices",
    "Measured",
    "Problem",
    "Timer",
    "allow_rounded_inputs",
    "choices_for",
    "measure",
    "reasons",
    "rounded_inputs_allowed",
    "set_table",
    "table_path",
]

SMALL_BATCH, LT, DENSE = BRANCHES = ("small-batch", "cusparselt", "dense")

#: What the small-batch kernel takes at most.
SMALL_BATCH_TOKENS = 32
SMALL_BATCH_M = 32
SMALL_BATCH_DTYPES = (torch.float16, torch.bfloat16)

DEFAULT_SMALL_BATCH = 16
DEFAULT_LT_TOKENS = 256
DEFAULT_LT_WORK = 1 << 34  # 1024 tokens of a 4096x4096 layer

#: What is not faster than dense by this much is no faster.
NOISE = 1.03

#: Numbers of tokens that are measured unless others are asked for.
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

FILE_VERSION = 1


class Problem(NamedTuple):
    """A packed matrix, as far as its speed depends on it.

    Attributes:
        device: Where it is.
        dtype: Its dtype, which inputs have too.
        pattern: Its pattern.
        rows: Outputs.
        k: Inputs.
        inputs: The dtype of inputs where that is another one: of weights of 8 bits.
    """

    device: torch.device
    dtype: torch.dtype
    pattern: Pattern
    rows: int
    k: int
    inputs: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{_dtypes(self)} {self.pattern} {self.rows}x{self.k}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(problem: Problem) -> str:
    weight = _name(problem.dtype)
    return weight if problem.inputs is None else f"{weight} by {_name(problem.inputs)}"


# ----------------------------------------------------------------------------------------------- what can run


def reasons(problem: Problem, *, rounding: bool | None = None) -> dict[str, str | None]:
    """For each of `BRANCHES`: None, or why it cannot run the problem.

    Args:
        problem: The weight.
        rounding: Whether inputs may be rounded to 8 bits; None: what `allow_rounded_inputs` has said.
    """
    may_round = _rounded_inputs if rounding is None else rounding
    return {SMALL_BATCH: _why_no_small_batch(problem), LT: _why_no_lt(problem, may_round), DENSE: None}


def _why_no_small_batch(problem: Problem) -> str | None:
    inputs = problem.dtype if problem.inputs is None else problem.inputs
    if problem.inputs is not None and problem.dtype != torch.int8:
        return f"the small-batch kernel takes 8-bit weights of int8 only, not {_name(problem.dtype)}"
    if inputs not in SMALL_BATCH_DTYPES:
        return f"the small-batch kernel takes float16 and bfloat16, not {_name(inputs)}"
    if problem.pattern.m > SMALL_BATCH_M:
        return f"the small-batch kernel takes groups of at most {SMALL_BATCH_M}, not {problem.pattern}"
    return _why_no_small_batch_on(problem.device)


@functools.cache
def _why_no_small_batch_on(device: torch.device) -> str | None:
    """Tests put another in its place, to have weights on the CPU multiplied as on a GPU."""
    if device.type != "cuda":
        return f"the small-batch kernel runs on NVIDIA GPUs, not on {device.type}"
    if extension is None or not extension.build_info()["cuda"]:
        return "this build has no CUDA kernels"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("nmsparse::small_batch_linear", "CUDA"):
        return "this build has no small-batch kernel"
    return None


def _why_no_lt(problem: Problem, may_round: bool) -> str | None:
    if problem.inputs is not None and problem.inputs not in SMALL_BATCH_DTYPES:
        return f"cuSPARSELt takes float16 and bfloat16 inputs of 8-bit weights, not {_name(problem.inputs)}"
    if problem.dtype not in lt.MULTIPLES or (problem.dtype.itemsize == 1 and problem.inputs is None):
        return f"cuSPARSELt does not multiply {_name(problem.dtype)} in this way"
    wanted, pattern = lt.hardware_pattern(problem.dtype), problem.pattern
    if not lt.embeds(pattern, problem.dtype):
        return f"{pattern} does not embed in {wanted}, which is what sparse tensor cores run"
    multiple = lt.MULTIPLES[problem.dtype].weight
    if problem.rows == 0 or problem.rows % multiple or problem.k == 0 or problem.k % multiple:
        return f"cuSPARSELt needs sizes in multiples of {multiple}, not {problem.rows}x{problem.k}"
    if problem.k % pattern.m:
        return f"cuSPARSELt needs whole groups, {problem.k} is no multiple of {pattern.m}"
    if problem.dtype == torch.float32 and not _tf32():
        return "sparse tensor cores round float32 to TF32, which torch.backends.cuda.matmul does not allow"
    if problem.inputs is not None and not may_round:
        return (
            f"sparse tensor cores would have inputs rounded to {_name(problem.dtype)}, which "
            "crossover.allow_rounded_inputs() allows"
        )
    if problem.dtype == torch.float8_e4m3fn and not _has_float8(problem.device):
        return "sparse tensor cores multiply float8 from compute capability 8.9 on"
    return _why_no_lt_on(problem.device)


_rounded_inputs = False


def allow_rounded_inputs(allow: bool = True) -> None:
    """Says whether inputs may be rounded to 8 bits, which cuSPARSELt needs to multiply 8-bit weights.

    They are not unless this says so: results then depend on whether cuSPARSELt or another way goes. Each
    token is rounded with a scale of its own (``amax / 127`` for int8, ``amax / 448`` for float8). Weights
    that exist already get the library's form from `deploy.refit`.
    """
    global _rounded_inputs
    _rounded_inputs = allow
    forget_choices()


def rounded_inputs_allowed() -> bool:
    """What `allow_rounded_inputs` has said."""
    return _rounded_inputs


@functools.cache
def _has_float8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _why_no_lt_on(device: torch.device) -> str | None:
    """As `_why_no_small_batch_on`."""
    return cusparselt.why_not(device)


# ------------------------------------------------------------------------------------------------ the choice


class Choices(NamedTuple):
    """Which way goes for how many tokens.

    Attributes:
        bounds: ``branches[i]`` goes up to ``bounds[i]`` tokens; the last one has no bound.
        branches: Some of `BRANCHES`.
        measured: Whether it was measured; else it follows the rules of this module.
    """

    bounds: tuple[int, ...]
    branches: tuple[str, ...]
    measured: bool

    def at(self, tokens: int) -> str:
        """The way to go."""
        return self.branches[bisect_left(self.bounds, tokens)]

    def __str__(self) -> str:
        parts, first = [], 1
        for bound, branch in zip((*self.bounds, None), self.branches, strict=True):
            span = (
                f"from {first}" if bound is None else f"{first} to {bound}" if bound > first else f"{first}"
            )
            parts.append(f"{branch} {span}" if len(self.branches) > 1 else f"{branch} always")
            first = (bound or 0) + 1
        return ", ".join(parts) + (" tokens" if len(self.branches) > 1 else "")


def _choices(winners: Sequence[tuple[int, str]], measured: bool) -> Choices:
    """Of the winners up to so many tokens each, the last of which goes on without end."""
    bounds: list[int] = []
    branches: list[str] = []
    for bound, branch in winners:
        if branches and branches[-1] == branch:
            bounds[-1] = bound
        else:
            bounds.append(bound)
            branches.append(branch)
    return Choices(tuple(bounds[:-1]), tuple(branches), measured)


def default_choices(problem: Problem, ways: Collection[str] = BRANCHES) -> Choices:
    """What goes where nothing was measured: the rules of this module."""
    why_not = reasons(problem)
    if DENSE not in ways or problem.inputs is not None:
        few = [(SMALL_BATCH_TOKENS, SMALL_BATCH)] if why_not[SMALL_BATCH] is None else []
        return _choices([*few, (SMALL_BATCH_TOKENS + 1, _many(problem, ways))], measured=False)
    winners = []
    if why_not[SMALL_BATCH] is None and 2 * problem.pattern.n <= problem.pattern.m:
        winners.append((DEFAULT_SMALL_BATCH, SMALL_BATCH))
    if why_not[LT] is None:
        first = max(DEFAULT_LT_TOKENS, ceil_div(DEFAULT_LT_WORK, problem.rows * problem.k))
        return _choices([*winners, (first - 1, DENSE), (first, LT)], measured=False)
    return _choices([*winners, (DEFAULT_SMALL_BATCH + 1, DENSE)], measured=False)


def _many(problem: Problem, ways: Collection[str]) -> str:
    """What many tokens go by where no dense weight is held."""
    return LT if LT in ways and reasons(problem)[LT] is None else DENSE


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times of one shape.

    Attributes:
        rows: Outputs of the weight that was measured.
        k: Its inputs.
        points: ``{tokens: {branch: microseconds}}``, in the order of tokens.
    """

    rows: int
    k: int
    points: Mapping[int, Mapping[str, float]]

    def winner(self, tokens: int, possible: Collection[str] = BRANCHES) -> str:
        """What was the fastest at a measured number of tokens; dense unless another is faster than noise."""
        times = {way: time for way, time in self.points[tokens].items() if way in possible}
        if tokens > SMALL_BATCH_TOKENS:
            times.pop(SMALL_BATCH, None)
        best = min(times, key=times.__getitem__, default=DENSE)
        return best if times.get(best, math.inf) * NOISE <= times.get(DENSE, math.inf) else DENSE

    def choices(self, problem: Problem, ways: Collection[str] = BRANCHES) -> Choices:
        """What goes, for every number of tokens; of ``ways`` and, where none of them can, dense."""
        possible = [way for way, reason in reasons(problem).items() if reason is None and way in ways]
        winners = [(tokens, self.winner(tokens, possible)) for tokens in sorted(self.points)]
        few = [(tokens, branch) for tokens, branch in winners if tokens <= SMALL_BATCH_TOKENS]
        many = winners[len(few) :]
        # The small-batch kernel does not go on without end; and where no dense weight is held, it goes for
        # as many tokens as it takes rather than none that was measured.
        last = few[-1][1] if few else SMALL_BATCH
        if last == SMALL_BATCH and SMALL_BATCH in possible and (DENSE not in ways or not many):
            few.append((SMALL_BATCH_TOKENS, SMALL_BATCH))
        if not many and few[-1][1] == SMALL_BATCH:
            many = [(SMALL_BATCH_TOKENS + 1, DENSE if DENSE in ways else _many(problem, ways))]
        winners = few + many
        return _choices(winners, measured=True)

    def merged(self, other: Measured) -> Measured:
        """With the points of ``other``, where it has some, and its own elsewhere."""
        points = {**self.points, **other.points}
        return Measured(other.rows, other.k, {tokens: points[tokens] for tokens in sorted(points)})

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        points = [[tokens, dict(times)] for tokens, times in self.points.items()]
        return {"rows": self.rows, "k": self.k, "points": points}

    @staticmethod
    def of_json(stored: dict[str, Any]) -> Measured:
        """The reverse of `to_json`; ValueError, TypeError or KeyError where it is not that."""
        points: dict[int, dict[str, float]] = {}
        for tokens, times in stored["points"]:
            if not times or not set(times) <= set(BRANCHES) or not all(float(t) > 0 for t in times.values()):
                raise ValueError(f"{times} are no times")
            points[int(tokens)] = {branch: float(time) for branch, time in times.items()}
        if not points or min(points) < 1:
            raise ValueError("there are no points")
        return Measured(int(stored["rows"]), int(stored["k"]), {t: points[t] for t in sorted(points)})


# ------------------------------------------------------------------------------------------------ the table


class Key(NamedTuple):
    """What a measurement holds for."""

    gpu: str
    library: str  # version of cuSPARSELt, or "none"
    torch: str
    dtype: str
    pattern: str
    shape: str


def key_of(problem: Problem) -> Key:
    """Shapes that differ by less than a fifth each way count as one."""
    gpu, library = _machine(problem.device)
    shape = f"{_bucket(problem.rows)}x{_bucket(problem.k)}"
    return Key(gpu, library, torch.__version__, _dtypes(problem), str(problem.pattern), shape)


def _bucket(size: int) -> int:
    """The nearest power of the square root of 2."""
    return round(2 ** (round(2 * math.log2(size)) / 2)) if size else 0


def _machine(device: torch.device) -> tuple[str, str]:
    """Name of the GPU and version of cuSPARSELt."""
    return gpu_and_library(device)


class Crossovers(TunedFile[Key, Measured]):
    """What was measured."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        super().__init__(
            cache_path("NMSPARSE_CROSSOVERS", "crossovers.json") if path is None else path,
            Kind("crossovers", "measured crossovers", FILE_VERSION),
            Key,
            Measured.to_json,
            Measured.of_json,
        )


_table = Crossovers()
_known: dict[tuple[Any, ...], Choices] = {}
_era = object()  # another one whenever choices may have changed


def table_path() -> str:
    """The file that measurements are kept in."""
    return str(_table.path)


def set_table(path: str | os.PathLike[str] | None) -> None:
    """Keeps measurements in another file; ``None``: in the usual one."""
    global _table
    _table = Crossovers(path)
    forget_choices()


def forget_choices() -> None:
    """Has choices made anew from what has been measured by now."""
    global _era
    _known.clear()
    _era = object()


def measured(problem: Problem) -> Measured | None:
    """What is known of a problem."""
    return None if problem.rows == 0 or problem.k == 0 else _table.get(key_of(problem))


def choices_for(problem: Problem, ways: tuple[str, ...] = BRANCHES) -> Choices:
    """Which way goes for how many tokens.

    Args:
        problem: The weight.
        ways: What it holds the forms for. Without the dense weight, that is made in the calls that no other
            way can take.
    """
    # Whatever else the choice depends on stands beside the problem.
    full = (*problem, ways, cusparselt.search_mode(), problem.dtype == torch.float32 and _tf32())
    found = _known.get(full)
    if found is None:
        found = _known[full] = _choose(problem, ways)
    return found


def era() -> tuple[object, str]:
    """Choices of 16-bit weights may be held on to as long as both of these are the same objects."""
    return _era, cusparselt.search_mode()


def _choose(problem: Problem, ways: tuple[str, ...]) -> Choices:
    if problem.rows == 0 or problem.k == 0:
        return Choices((), (DENSE,), measured=False)
    known = measured(problem) if cusparselt.search_mode() != "off" else None
    return default_choices(problem, ways) if known is None else known.choices(problem, ways)


def why(problem: Problem, ways: tuple[str, ...] = BRANCHES) -> str:
    """Which way goes for how many tokens, and why, in words."""
    choices = choices_for(problem, ways)
    basis = "measured" if choices.measured else "by rule, not measured"
    missing = [reason for reason in reasons(problem).values() if reason is not None]
    return "; ".join([f"{choices} ({basis})", *missing])


# -------------------------------------------------------------------------------------------------- measuring


class Timer(Protocol):
    """One packed matrix, for measuring."""

    def microseconds(self, tokens: int, branches: Sequence[str]) -> dict[str, float]:
        """How long a product takes each way, taken in turns; RuntimeError where memory does not suffice."""


def measure(problem: Problem, timer: Timer, tokens: Sequence[int] = TOKENS) -> Measured:
    """Times all ways that can run a problem, remembers what was found, and uses it from now on.

    Args:
        problem: The weight.
        timer: Runs it.
        tokens: For so many tokens each.

    Raises:
        RuntimeError: The GPU's memory does not suffice for any of them.
    """
    # Timed, too, where inputs may not be rounded now: what is kept is to hold for when they may.
    can = reasons(problem, rounding=True)
    possible = [branch for branch, reason in can.items() if reason is None]
    points: dict[int, dict[str, float]] = {}
    failure: RuntimeError | None = None
    for count in sorted(set(tokens)):
        branches = [b for b in possible if b != SMALL_BATCH or count <= SMALL_BATCH_TOKENS]
        try:
            points[count] = timer.microseconds(count, branches)
        except RuntimeError as error:
            failure = error
            break  # more tokens take more memory still
    if not points:
        raise failure or RuntimeError("there are no numbers of tokens to measure")
    found = Measured(problem.rows, problem.k, points)
    known = measured(problem)
    if known is not None and (known.rows, known.k) == (problem.rows, problem.k):
        found = known.merged(found)
    _table.add(key_of(problem), found)
    forget_choices()
    return found
