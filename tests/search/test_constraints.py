"""find_candidates: which patterns each weight may get, and why others stay dense."""

from __future__ import annotations

import pytest
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.search import Constraints, find_candidates
from nmsparse_ext.search.constraints import embedded_in_24, powers_of_two


class Net(nn.Module):
    """One of each: too short, plain, grouped, depthwise, tied to an embedding, plain linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.conv = nn.Conv2d(32, 64, 3)
        self.grouped = nn.Conv2d(64, 64, 3, groups=8)  # 8 channels each
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.embed = nn.Embedding(10, 32)
        self.head = nn.Linear(32, 10, bias=False)
        self.head.weight = self.embed.weight
        self.fc = nn.Linear(48, 10)


def texts(patterns) -> list[str]:
    return [str(pattern) for pattern in patterns]


def test_default_candidates_are_powers_of_two():
    assert texts(powers_of_two(16)) == ["16:16", "8:16", "4:16", "2:16", "1:16"]
    assert texts(powers_of_two(12)) == ["12:12", "8:12", "4:12", "2:12", "1:12"]
    assert texts(powers_of_two(1)) == ["1:1"]


def test_what_stays_dense_and_why():
    found = find_candidates(Net(), m=16)
    assert list(found) == ["conv.weight", "fc.weight"]
    assert texts(found["fc.weight"]) == ["16:16", "8:16", "4:16", "2:16", "1:16"]
    assert "3 weights, fewer than m = 16" in found.dense["first.weight"]
    assert "8 weights" in found.dense["grouped.weight"]
    assert "1 weights" in found.dense["depthwise.weight"]
    assert "embeddings stay dense" in found.dense["embed.weight"]
    assert found.weights["conv.weight"].group_dim == 1


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "1:16"])
@pytest.mark.parametrize("skip", [(), ("fc", "con*")])
def test_agrees_with_uniform(pattern, skip):
    model = Net()
    parsed = nms.Pattern.parse(pattern)
    dense = nms.Pattern(parsed.m, parsed.m)
    uniform = nms.Scheme.uniform(model, pattern, skip=skip)
    if not uniform:
        with pytest.raises(ValueError, match="no weight to search"):
            find_candidates(model, candidates=[pattern, dense], skip=skip)
        return
    found = find_candidates(model, candidates=[pattern, dense], skip=skip)
    assert list(found) == list(uniform)
    assert found.dense == uniform.dense


def test_mixed_m_goes_where_it_fits():
    found = find_candidates(Net(), candidates=["2:4", "1:4", "2:16", "4:4", "16:16"])
    assert texts(found["grouped.weight"]) == ["4:4", "2:4", "1:4"]
    assert texts(found["fc.weight"])[1:] == ["2:4", "1:4", "2:16"]
    assert sum(pattern.is_dense for pattern in found["fc.weight"]) == 1


def test_ints_are_n_of_m():
    assert texts(find_candidates(Net(), m=8, candidates=[1, 3, 8])["fc.weight"]) == ["8:8", "3:8", "1:8"]


def test_named_embedding_is_searched():
    model = Net()
    found = find_candidates(model, constraints=Constraints(include=["*", "embed"]))
    assert "embed.weight" in found
    assert list(find_candidates(model, constraints=Constraints(include=["fc"]))) == ["fc.weight"]


def test_skip_reason():
    assert find_candidates(Net(), skip=["con*"]).dense["conv.weight"] == "skipped by 'con*'"


def test_allowed():
    found = find_candidates(Net(), constraints=Constraints(allowed={"fc": ["2:4", "1:16"], "*": ["4:16"]}))
    assert texts(found["fc.weight"]) == ["2:4", "1:16"]  # dense only where it is listed
    assert texts(found["conv.weight"]) == ["4:16"]
    found = find_candidates(Net(), constraints=Constraints(allowed={"fc": ["4:4"]}))
    assert found.dense["fc.weight"] == "only dense is allowed"


def test_at_least():
    found = find_candidates(Net(), constraints=Constraints(at_least={"fc": 4, "conv": "1:2"}))
    assert texts(found["fc.weight"]) == ["16:16", "8:16", "4:16"]
    assert texts(found["conv.weight"]) == ["16:16", "8:16"]
    found = find_candidates(Net(), constraints=Constraints(at_least={"fc": 9}))
    assert found.dense["fc.weight"] == "at_least allows only 16:16"


def test_embeds_in_24():
    found = find_candidates(Net(), constraints=Constraints(embeds_in_24=True))
    # Not dense either: all run on sparse tensor cores. And not 2:16 at best, which would keep 1/8.
    assert texts(found["fc.weight"]) == ["2:4", "1:4", "2:8", "1:8", "2:16", "1:16"]
    assert texts(found["grouped.weight"]) == ["2:4", "1:4", "2:8", "1:8"]
    assert all(pattern.embeds_in_24 for patterns in found.values() for pattern in patterns)
    given = find_candidates(Net(), candidates=[8, 2, 16], constraints=Constraints(embeds_in_24=True))
    assert texts(given["fc.weight"]) == ["2:16"]


def test_what_embeds_in_24():
    assert texts(embedded_in_24(12)) == ["2:4", "1:4", "2:8", "1:8"]
    assert texts(embedded_in_24(4)) == ["2:4", "1:4"]
    assert embedded_in_24(3) == ()
    with pytest.raises(ValueError, match="none is embedded in 2:4"):
        find_candidates(Net(), m=3, constraints=Constraints(embeds_in_24=True))


def test_without():
    found = find_candidates(Net()).without({"fc.weight": "because"})
    assert list(found) == list(found.weights) == ["conv.weight"]
    assert found.dense["fc.weight"] == "because"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": ["nothing"]}, "skip: 'nothing' matches nothing"),
        ({"skip": ["*"]}, "no weight to search"),
        ({"candidates": []}, "at least one pattern"),
        ({"candidates": ["3:2"]}, "candidates '3:2'"),
        ({"candidates": [17]}, "n must be between 1 and m = 16"),
        ({"constraints": Constraints(allowed={"x": ["2:4"]})}, "allowed: 'x' matches nothing"),
        ({"constraints": Constraints(at_least={"x": 4})}, "at_least: 'x' matches nothing"),
        ({"constraints": Constraints(at_least={"fc": "3:4"}, embeds_in_24=True)}, "no pattern for fc.weight"),
        ({"candidates": ["8:16"], "constraints": Constraints(embeds_in_24=True)}, "embedded in 2:4"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_candidates(Net(), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"candidates": "2:4"},
        {"candidates": [True]},
        {"candidates": 3},
        {"constraints": Constraints(allowed=["fc"])},
        {"constraints": Constraints(allowed={"fc": "2:4"})},
    ],
)
def test_wrong_types(arguments):
    with pytest.raises(TypeError):
        find_candidates(Net(), **arguments)
