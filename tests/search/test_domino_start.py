"""DominoSearch that starts from a scheme instead of the dense model."""

from __future__ import annotations

import pytest
from search.test_domino import FAST, cnn, data, stepper

import nmsparse_ext as nms

BUDGET = nms.Budget(params=0.4)


def test_goes_on_from_a_looser_allocation() -> None:
    model = cnn()
    start = nms.allocate(model, nms.Budget(params=0.6)).scheme
    result = nms.domino_search(model, stepper(*data()), budget=BUDGET, start=start, **FAST)
    assert result.reached
    first: dict[str, int] = {}
    for _, name, n in result.moves:
        first.setdefault(name, n)
    assert first
    for name, pattern in result.scheme.items():
        assert pattern.n <= start.get(name, nms.Pattern(16, 16)).n
    for name, n in first.items():  # the first level that a weight comes to is the one below its start
        assert n == start.get(name, nms.Pattern(16, 16)).n - 1


def test_a_start_within_the_budget_is_the_result() -> None:
    model = cnn()
    start = nms.allocate(model, BUDGET).scheme
    result = nms.domino_search(model, stepper(*data()), budget=BUDGET, start=start, **FAST)
    assert (dict(result.scheme), result.steps) == (dict(start), 0)


def test_a_start_must_be_of_candidates() -> None:
    with pytest.raises(
        ValueError, match=r"start must be candidates, got 3:16 for 3\.weight, which has 16:16"
    ):
        nms.domino_search(cnn(), stepper(*data()), budget=BUDGET, start={"3": "3:16"}, **FAST)
    with pytest.raises(ValueError, match="which has none, it is not searched"):
        nms.domino_search(cnn(), stepper(*data()), budget=BUDGET, start={"9": "4:16"}, skip=["9"], **FAST)
    with pytest.raises(ValueError, match="nowhere"):
        nms.domino_search(cnn(), stepper(*data()), budget=BUDGET, start={"nowhere": "4:16"}, **FAST)


def test_a_checkpoint_of_another_start_is_refused(tmp_path) -> None:
    file = tmp_path / "domino.pt"
    settings = {**FAST, "max_steps": 4, "checkpoint": file, "checkpoint_every": 2}
    with pytest.warns(RuntimeWarning, match="is not reached"):
        nms.domino_search(cnn(), stepper(*data()), budget=BUDGET, start={"3": "8:16"}, **settings)
    with pytest.raises(ValueError, match="start was"):
        nms.domino_search(cnn(), stepper(*data()), budget=BUDGET, **settings)
