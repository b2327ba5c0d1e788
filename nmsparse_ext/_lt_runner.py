"""One product on a GPU, as the search for algorithms runs and times it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _lt_layout as lt
from ._build import extension
from ._checks import ceil_div
from ._cuda_timing import alternate, medians
from ._lt_search import Choice

if TYPE_CHECKING:
    from .cusparselt import LtWeight


class CudaRunner:
    """See `_lt_search.Runner`. Inputs are random, and their seed is fixed."""

    def __init__(
        self,
        weight: LtWeight,
        tokens: int,
        bias: bool,
        scales: bool,
        activation: str,
        out_dtype: torch.dtype,
    ) -> None:
        multiple = lt.MULTIPLES[weight.dtype].tokens
        self.weight, self.tokens = weight, ceil_div(tokens, multiple) * multiple
        self.activation, self.out_dtype = activation, out_dtype
        device = weight.blob.device
        random = torch.Generator(device).manual_seed(0)
        batch = (weight.batches,) if weight.batches else ()
        shape = (*batch, self.tokens, weight.k)
        if weight.dtype == torch.int8:
            xs = [torch.randint(-127, 128, shape, generator=random, device=device) for _ in range(2)]
        else:
            xs = [torch.randn(shape, generator=random, device=device) for _ in range(2)]
        self.xs = [x.to(weight.dtype) for x in xs]
        rows = (weight.rows,)
        bias_dtype = lt.bias_dtype(weight.dtype, out_dtype)
        self.bias = torch.randn(rows, generator=random, device=device).to(bias_dtype) if bias else None
        self.scales = torch.rand(rows, generator=random, device=device) if scales else None

    def algorithms(self) -> int:
        """How many ids there are."""
        assert extension is not None
        w = self.weight
        names = (str(dtype).removeprefix("torch.") for dtype in (w.dtype, self.out_dtype))
        return extension.cusparselt_algorithms(
            w.blob.device.index, w.rows, w.k, max(w.batches, 1), self.tokens, *names
        )

    def run(self, choice: Choice, which: int) -> Tensor:
        """The product of one of the two inputs."""
        return torch.ops.nmsparse.lt_matmul(
            self.xs[which], self.weight.blob, self.bias, self.scales, 1.0, self.weight.rows, self.activation,
            self.out_dtype, choice.algorithm, choice.split_k, choice.split_k_mode,
        )  # fmt: skip

    def microseconds(self, choice: Choice) -> float:
        """The median of several rounds."""
        times = alternate({"": lambda i: self.run(choice, 0)})
        return medians(times)[""]
