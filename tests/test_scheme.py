"""``Scheme``: made from a model and by hand, matched against models, written to files and read back."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from nmsparse_ext.errors import FormatError
from nmsparse_ext.pattern import MAX_M, Pattern
from nmsparse_ext.scheme import Scheme, as_scheme
from nmsparse_ext.weights import canonical_name


class Net(nn.Module):
    """A stem that is too narrow, a block, a depthwise convolution, and a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1))
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 32)
        self.embedding = nn.Embedding(10, 32)
        self.head = nn.Linear(32, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.position = nn.Parameter(torch.zeros(1, 32))


@pytest.fixture
def net() -> Net:
    return Net()


names = st.from_regex(r"[a-z_0-9]{1,8}(\.[a-z_0-9]{1,8}){0,3}", fullmatch=True)
patterns = st.integers(1, MAX_M).flatmap(lambda m: st.builds(Pattern, st.integers(1, m), st.just(m)))


class TestMapping:
    def test_shorthand_and_wrapper_parts(self) -> None:
        scheme = Scheme({"module.fc1": "2:4", "fc2.weight": Pattern(1, 4), "attn.in_proj_weight": "4:8"})
        assert list(scheme) == ["fc1", "fc2.weight", "attn.in_proj_weight"]
        for name in ("fc1", "fc1.weight", "_orig_mod.module.fc1.weight"):
            assert scheme[name] == Pattern(2, 4)
        for name in ("fc2", "fc2.weight", "module.fc2"):
            assert scheme[name] == Pattern(1, 4)
        assert "attn" not in scheme
        assert "fc" not in scheme
        assert 3 not in scheme
        assert len(scheme) == 3
        assert scheme == {
            "fc1": Pattern(2, 4),
            "fc2.weight": Pattern(1, 4),
            "attn.in_proj_weight": Pattern(4, 8),
        }

    def test_a_bare_module_has_an_empty_name(self) -> None:
        assert Scheme({"weight": "2:4"})[""] == Pattern(2, 4)
        assert Scheme({"module": "2:4"})["weight"] == Pattern(2, 4)

    def test_it_does_not_change(self) -> None:
        given_patterns, given_dense = {"a": "2:4"}, {"b": "because"}
        scheme = Scheme(given_patterns, dense=given_dense)
        given_patterns["c"], given_dense["c"] = "1:4", "because"
        assert (dict(scheme), dict(scheme.dense)) == ({"a": Pattern(2, 4)}, {"b": "because"})
        with pytest.raises(TypeError):
            scheme["a"] = Pattern(1, 4)  # type: ignore[index]
        with pytest.raises(TypeError):
            scheme.dense["a"] = "because"  # type: ignore[index]

    def test_copies(self) -> None:
        scheme = Scheme({"a": "2:4"}, dense={"b": "because"}, complete=True)
        for other in (copy.deepcopy(scheme), pickle.loads(pickle.dumps(scheme)), eval(repr(scheme))):
            assert (other, other.dense, other.complete) == (scheme, scheme.dense, True)

    def test_text(self) -> None:
        scheme = Scheme({"a": "2:4", "b": "2:4", "c": "1:4"}, dense={"d": "because"})
        assert str(scheme) == "1 x 1:4, 2 x 2:4, 1 dense"

    def test_or(self) -> None:
        scheme = Scheme({"a.weight": "2:4", "b": "2:4"}, dense={"c.weight": "skipped"}, complete=True)
        changed = scheme | {"a": "1:4", "module.c": "2:8"}
        assert changed == {"b": Pattern(2, 4), "a": Pattern(1, 4), "c": Pattern(2, 8)}
        assert not changed.dense
        assert changed.complete
        assert scheme["a"] == Pattern(2, 4)
        left_out = scheme | Scheme({}, dense={"b.weight": "too small"})
        assert left_out == {"a.weight": Pattern(2, 4)}
        assert dict(left_out.dense) == {"c.weight": "skipped", "b.weight": "too small"}
        with pytest.raises(TypeError):
            scheme | 3  # type: ignore[operator]

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: Scheme(["a"]), TypeError, "patterns must be a mapping"),
            (lambda: Scheme({}, dense=["a"]), TypeError, "dense must be a mapping"),
            (lambda: Scheme({1: "2:4"}), TypeError, "scheme keys must be parameter names, got 1"),
            (lambda: Scheme({"a": 2}), TypeError, "pattern of 'a' must be a Pattern or text"),
            (lambda: Scheme({"a": "5:4"}), ValueError, "pattern of 'a' '5:4': n must be between"),
            (lambda: Scheme({}, dense={"a": 1}), TypeError, r"dense\['a'\] must be text, got 1"),
            (
                lambda: Scheme({"a": "2:4", "module.a": "2:4"}),
                ValueError,
                "'a' and 'module.a', which name the s",
            ),
            (
                lambda: Scheme({"a": "2:4", "a.weight": "2:4"}),
                ValueError,
                "'a' and 'a.weight', which name the s",
            ),
            (lambda: Scheme({"a": "2:4"}, dense={"a.weight": ""}), ValueError, "which name the same weight"),
        ],
    )
    def test_bad_arguments(self, call: Callable[[], Scheme], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call()


class TestUniform:
    def test_all_that_can_be(self, net: Net) -> None:
        scheme = Scheme.uniform(net, "2:4")
        assert scheme == dict.fromkeys(
            ["block.0.weight", "block.2.weight", "fc1.weight", "fc2.weight"], Pattern(2, 4)
        )
        assert dict(scheme.dense) == {
            "position": "Net.position is not in the registry (register_module)",
            "stem.weight": "group dim 1 has 3 weights, fewer than m = 4",
            "depthwise.weight": "group dim 1 has 1 weights, fewer than m = 4",
            "embedding.weight": "tied to embedding.weight: embeddings stay dense unless named",
        }
        assert scheme.complete

    @pytest.mark.parametrize(
        ("skip", "left"),
        [
            ((), ["block.0", "block.2", "fc1", "fc2"]),
            (("stem", "fc2"), ["block.0", "block.2", "fc1"]),
            (("fc2.weight",), ["block.0", "block.2", "fc1"]),
            (["block"], ["fc1", "fc2"]),
            (("module.block.0",), ["block.2", "fc1", "fc2"]),
            (("fc*",), ["block.0", "block.2"]),
            (("*.0",), ["block.2", "fc1", "fc2"]),
            (("block.[12]", "fc1"), ["block.0", "fc2"]),
            (("*",), []),
        ],
    )
    def test_skip(self, net: Net, skip: tuple[str, ...], left: list[str]) -> None:
        scheme = Scheme.uniform(net, "2:4", skip=skip)
        assert [name.removesuffix(".weight") for name in scheme] == left

    def test_the_reason_names_the_glob(self, net: Net) -> None:
        assert Scheme.uniform(net, "2:4", skip=("fc*",)).dense["fc1.weight"] == "skipped by 'fc*'"

    def test_include(self, net: Net) -> None:
        scheme = Scheme.uniform(net, "2:4", include=("block", "fc1"), skip=("*.2",))
        assert list(scheme) == ["block.0.weight", "fc1.weight"]
        assert scheme.dense["fc2.weight"] == "not included"
        assert scheme.dense["block.2.weight"] == "skipped by '*.2'"

    @pytest.mark.parametrize("name", ["embedding", "head", "head.weight", "embedding.weight"])
    def test_embeddings_are_pruned_if_named(self, net: Net, name: str) -> None:
        assert "embedding" in Scheme.uniform(net, "2:4", include=("*", name))
        assert "embedding" not in Scheme.uniform(net, "2:4", include=("*", "fc1"))
        assert "embedding" not in Scheme.uniform(net, "2:4", include=("*", name[:-1] + "*"))

    def test_a_wrapped_model_has_the_same_scheme(self, net: Net) -> None:
        wrapped = nn.DataParallel(torch.compile(net))
        assert Scheme.uniform(wrapped, "2:4", skip=("fc1",)) == Scheme.uniform(net, "2:4", skip=("fc1",))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"pattern": "5:4"}, ValueError, "pattern '5:4'"),
            ({"pattern": 2}, TypeError, "pattern must be a Pattern or text"),
            ({"skip": "fc1"}, TypeError, "skip must be a list or tuple of names, got 'fc1'"),
            ({"skip": 3}, TypeError, "skip must be a list or tuple of names, got 3"),
            ({"skip": [3]}, TypeError, "skip must hold names, got 3"),
            ({"include": "fc1"}, TypeError, "include must be a list or tuple of names"),
            ({"skip": ["fc3"]}, ValueError, r"skip: 'fc3' matches nothing in the model \(did you mean fc"),
            ({"include": ["xyz*"]}, ValueError, r"include: 'xyz\*' matches nothing in the model$"),
            ({"model": None}, TypeError, "model must be an nn.Module, got NoneType"),
        ],
    )
    def test_bad_arguments(self, net: Net, arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Scheme.uniform(**{"model": net, "pattern": "2:4"} | arguments)


class TestResolve:
    def test_what_it_finds(self, net: Net) -> None:
        found = Scheme({"fc2": "2:4", "block.0.weight": "4:16"}).resolve(net)
        assert list(found) == ["block.0.weight", "fc2.weight"]  # in the model's order
        weight = found["block.0.weight"]
        assert weight.parameter is net.block[0].weight
        assert (weight.module, weight.attr, weight.group_dim) == (net.block[0], "weight", 1)
        assert weight.places == ((net.block[0], "weight"),)
        assert (weight.name, weight.pattern) == ("block.0.weight", Pattern(4, 16))

    def test_in_wrapped_models(self, net: Net) -> None:
        scheme = Scheme.uniform(net, "2:4")
        assert list(scheme.resolve(nn.DataParallel(torch.compile(net)))) == list(scheme)

    def test_dense_patterns_need_nothing(self, net: Net) -> None:
        assert list(Scheme({"stem": "16:16", "fc1": "2:4"}).resolve(net)) == ["fc1.weight"]

    @pytest.mark.parametrize("name", ["head", "embedding.weight"])
    def test_tied_weights_go_by_any_of_their_names(self, net: Net, name: str) -> None:
        (weight,) = Scheme({name: "2:4"}).resolve(net).values()
        assert weight.name == "embedding.weight"
        assert weight.places == ((net.embedding, "weight"), (net.head, "weight"))
        assert weight.module is net.head

    def test_tied_weights_have_one_pattern(self, net: Net) -> None:
        assert len(Scheme({"head": "2:4", "embedding": "2:4"}).resolve(net)) == 1
        with pytest.raises(ValueError, match=r"head \(2:4\) and embedding \(1:4\) are one tied weight"):
            Scheme({"head": "2:4", "embedding": "1:4"}).resolve(net)

    def test_all_problems_are_named(self, net: Net) -> None:
        scheme = Scheme(
            {
                "fc3": "2:4",
                "zzz": "2:4",
                "block": "2:4",
                "block.1": "2:4",
                "fc1.bias": "2:4",
                "stem": "2:4",
                "position": "2:4",
                "fc2.weight.weight": "2:4",
            },
            dense={"fc4": "because"},
        )
        with pytest.raises(ValueError, match="the scheme does not match the model") as error:
            scheme.resolve(net)
        assert str(error.value).split("\n  ")[1:] == [
            "the model has no fc3 (did you mean fc2 or fc1?)",
            "the model has no zzz",
            "block is a module without a weight of its own; below it are block.0.weight, block.2.weight",
            "block.1 cannot be pruned: its shape is (16,)",
            "fc1.bias cannot be pruned: its shape is (32,)",
            "stem cannot be 2:4: group dim 1 has 3 weights, fewer than m = 4",
            "position cannot be 2:4: Net.position is not in the registry (register_module)",
            "the model has no fc2.weight.weight (did you mean fc2.weight or fc1.weight?)",
            "the model has no fc4 (did you mean fc2 or fc1?)",
        ]

    def test_missing_weights(self, net: Net) -> None:
        partial = Scheme({"fc1": "2:4"})
        assert list(partial.resolve(net)) == ["fc1.weight"]
        missing = "does not name stem.weight, block.0.weight, block.2.weight, depthwise.weight, fc2.weight$"
        with pytest.raises(ValueError, match=missing):
            partial.resolve(net, strict=True)
        with pytest.raises(ValueError, match=missing):
            Scheme({"fc1": "2:4"}, complete=True).resolve(net)
        complete = Scheme.uniform(net, "2:4")
        net.fc3 = nn.Linear(32, 32)
        with pytest.raises(ValueError, match=r"does not name fc3\.weight$"):
            complete.resolve(net)
        assert len(complete.resolve(net, strict=False)) == 4

    def test_as_scheme(self, net: Net) -> None:
        scheme = Scheme.uniform(net, "2:4")
        assert as_scheme(scheme, net) is scheme
        assert as_scheme("2:4", net) == as_scheme(Pattern(2, 4), net) == scheme
        assert as_scheme({"fc1": "2:4"}, net) == Scheme({"fc1": "2:4"})
        with pytest.raises(TypeError, match=r"scheme must be a Scheme, a mapping .* or a pattern, got 3"):
            as_scheme(3, net)  # type: ignore[arg-type]


class TestFile:
    def test_content(self, tmp_path: Path) -> None:
        path = tmp_path / "scheme.json"
        Scheme({"a.weight": "2:4"}, dense={"b.weight": "because"}, complete=True).save(path)
        assert json.loads(path.read_text()) == {
            "format": "nmsparse_ext.scheme",
            "version": 1,
            "complete": True,
            "patterns": {"a.weight": "2:4"},
            "dense": {"b.weight": "because"},
        }

    @given(st.dictionaries(names, patterns), st.dictionaries(names, st.text()), st.booleans())
    def test_round_trip(
        self, tmp_path_factory: pytest.TempPathFactory, table: dict, dense: dict, complete: bool
    ) -> None:
        # Only one name of a weight may be in it, whatever follows from shorthand and wrapper parts.
        stems = [canonical_name(name).removesuffix(".weight") for name in (*table, *dense)]
        assume(len(set(stems)) == len(stems) and "weight" not in stems)
        scheme = Scheme(table, dense=dense, complete=complete)
        path = tmp_path_factory.getbasetemp() / "round_trip.json"
        scheme.save(path)
        loaded = Scheme.load(path)
        assert (loaded, loaded.dense, loaded.complete) == (scheme, scheme.dense, complete)
        assert list(loaded) == list(scheme)

    def test_checked_against_a_model(self, net: Net, tmp_path: Path) -> None:
        path = tmp_path / "scheme.json"
        Scheme.uniform(net, "2:4").save(path)
        assert Scheme.load(path, net) == Scheme.uniform(net, "2:4")
        del net.fc1
        net.fc3 = nn.Linear(32, 32)
        with pytest.raises(ValueError, match=r"the model has no fc1\.weight(.|\n)*does not name fc3\.weight"):
            Scheme.load(path, net)

    def test_a_failed_save_changes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "scheme.json"
        Scheme({"a": "2:4"}).save(path)

        def full_disk(descriptor: int) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space left"):
            Scheme({"b": "2:4"}).save(path)
        monkeypatch.undo()
        assert Scheme.load(path) == Scheme({"a": "2:4"})
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.skipif(os.name != "posix", reason="permissions and links are POSIX's")
    def test_permissions_and_links_are_those_of_an_ordinary_write(self, tmp_path: Path) -> None:
        (tmp_path / "plain").write_text("")
        real, link = tmp_path / "real.json", tmp_path / "link.json"
        link.symlink_to(real)
        Scheme({"a": "2:4"}).save(link)
        assert link.is_symlink()
        assert Scheme.load(real) == Scheme.load(str(link))
        assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def good(self, **changes: object) -> str:
        content: dict[str, object] = {"format": "nmsparse_ext.scheme", "version": 1, "complete": False}
        content |= {"patterns": {"a": "2:4"}, "dense": {}}
        return json.dumps({key: value for key, value in (content | changes).items() if value is not None})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": "safetensors"}, 'is JSON, but no object with "format": "nmsparse_ext.scheme"'),
            ({"format": None}, "is JSON, but no object"),
            ({"version": 2}, "has version 2, and this release reads version 1"),
            ({"version": None}, "has version None"),
            ({"version": True}, "'version' must be of type int, got True"),
            ({"patterns": None}, "'patterns' must be of type dict, got None"),
            ({"patterns": ["a"]}, "'patterns' must be of type dict"),
            ({"patterns": {"a": [2, 4]}}, "pattern of 'a' must be a Pattern or text"),
            ({"patterns": {"a": "5:4"}}, "pattern of 'a' '5:4': n must be between"),
            ({"patterns": {"a": "2:4", "a.weight": "2:4"}}, "which name the same weight"),
            ({"dense": {"b": 1}}, r"dense\['b'\] must be text"),
            ({"dense": {"a": ""}}, "which name the same weight"),
            ({"complete": 1}, "'complete' must be of type bool, got 1"),
            ({"extra": 1, "more": 2}, "unknown fields 'extra', 'more'"),
        ],
    )
    def test_damaged_json(self, tmp_path: Path, changes: dict, message: str) -> None:
        path = tmp_path / "scheme.json"
        path.write_text(self.good(**changes))
        with pytest.raises(FormatError, match=rf"scheme\.json is not a scheme: (.*){message}"):
            Scheme.load(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "neither JSON nor a DominoSearch dict"),
            (b"\x93NUMPY\x01\x00", "can't decode byte"),
            (b"[1, 2]", "it is JSON, but no object"),
            (b"3", "it is JSON, but no object"),
            (b"{'a': __import__('os')}", "neither JSON nor a DominoSearch dict"),
            (b"{1: [2, 4]}", "1 is no layer as DominoSearch names them"),
            (b"{'a': [2, 4]}", "'a' is no layer as DominoSearch names them"),
            (b"{'Linear0_8-4-(3, 3)': [2, 4]}", "is no layer"),
            (b"{'SparseConv0_8-4': [2, 4]}", "is no layer"),
            (b"{'Linear0_8-4': 2}", r"must have \[N, M\], got 2"),
            (b"{'Linear0_8-4': [4, 2]}", "'Linear0_8-4': n must be between 1 and m = 2"),
            (b"{'Linear0_8-4': ['2', 4]}", "'Linear0_8-4': n must be an int"),
            (b"{}", "it is JSON, but no object"),
            (b"{'Linear0_8-4'}", "first line must be a dict of layers"),
            (b'{"patterns": {}, "patterns": {}}', "it has 'patterns' twice"),
            (b"[" * 200_000, "nested too deeply"),
            (b"(" * 200_000, "neither JSON nor a DominoSearch dict"),
            (b"9" * 5_000, "Exceeds the limit"),
            (b" " * (64 << 20) + b"{}", "larger than 64 MiB"),
        ],
    )
    def test_other_files(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "other"
        path.write_bytes(content)
        with pytest.raises(FormatError, match=f"other is not a scheme: .*{message}"):
            Scheme.load(path)

    @given(st.binary(max_size=200))
    def test_noise(self, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "noise"
        path.write_bytes(content)
        with pytest.raises(FormatError):
            Scheme.load(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Scheme.load(tmp_path / "none.json")
