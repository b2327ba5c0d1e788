"""The engines of GPUs on the CPU, for tests and dry runs: every op has a twin in plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from . import crossover, cusparselt, engines_cuda

GPU = "NVIDIA Test 9000"


@contextmanager
def as_on_a_gpu(table: str | os.PathLike[str]) -> Iterator[None]:
    """Has the engines of GPUs take weights on the CPU, as on a GPU that has everything.

    Args:
        table: The file of measured crossovers to use meanwhile.
    """
    patches = (
        mock.patch.object(engines_cuda, "DEVICES", {"cuda", "cpu"}),
        mock.patch.object(crossover, "_why_no_small_batch_on", return_value=None),
        mock.patch.object(crossover, "_why_no_lt_on", return_value=None),
        mock.patch.object(crossover, "_tf32", return_value=True),
        mock.patch.object(crossover, "_machine", return_value=(GPU, "0.8.1")),
    )
    before, rounded = cusparselt.search_mode(), crossover.rounded_inputs_allowed()
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        cusparselt.set_search_mode("file")
        crossover.set_table(table)
        try:
            yield
        finally:
            cusparselt.set_search_mode(before)
            crossover.allow_rounded_inputs(rounded)
            crossover.set_table(None)
