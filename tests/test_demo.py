"""The digits recipe, the demo and its report."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo extra is not installed")

from rich.console import Console

import nmsparse_ext as nms
from nmsparse_ext import report
from nmsparse_ext.recipes import digits, timing
from nmsparse_ext.recipes.demo import Settings, argsort_scatter, run_demo

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The networks are tiny: a second thread would mostly wait, above all where something else runs."""
    with timing.threads(1):
        yield


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One quick demo for all tests that look at what it leaves behind."""
    text = io.StringIO()
    console = Console(file=text, width=120)
    settings = Settings(out=tmp_path_factory.mktemp("demo"), epochs=2, seeds=2, quick=True)
    outcome = run_demo(settings, console)
    return outcome, text.getvalue()


# ----------------------------------------------------------------------------------------------------- demo


def test_checks_hold(outcome):
    result = outcome[0].result
    assert outcome[0].ok
    assert len(result["layers"]) == 8
    assert all(
        layer["violation"] is None and layer["nonzero"] <= layer["weights"] / 2 for layer in result["layers"]
    )
    assert result["packed"]["within_tolerance"]
    assert result["packed"]["same_labels"] == result["packed"]["images"] == 359
    assert result["selection"]["equal"]


def test_packed_takes_the_bytes_it_must(outcome):
    sizes = outcome[0].result["bytes"]
    weights = sum(layer["weights"] for layer in outcome[0].result["layers"])
    assert sizes["layers_dense"] == 4 * weights
    assert sizes["layers_packed"] == 4 * weights // 2 + weights // 8  # half the values, one bit a position
    assert sizes["file_packed"] < 0.65 * sizes["file_dense"]


def test_every_method_and_seed_ran(outcome):
    runs = outcome[0].result["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [(m, s) for m in digits.METHODS for s in (0, 1)]
    for run in runs:
        assert len(run["accuracy"]) == len(run["loss"]) == 2
        assert len(run["sad"]) == 2 * (1438 // 128)
        assert sum(run["sad"]) > 0


def test_files(outcome):
    files = outcome[0].files
    assert set(files) == {"report", "picture", "result", "dense", "packed"}
    assert files["picture"].read_bytes().startswith(PNG)
    assert json.loads(files["result"].read_text()) == json.loads(json.dumps(outcome[0].result))
    packed = nms.load_file(files["packed"])
    assert sum(isinstance(tensor, nms.NMTensor) for tensor in packed.values()) == 8


def test_terminal(outcome):
    text = outcome[1]
    for expected in ("SR-STE", "8 of 8", "five seeds", "report.html", "overview.png"):
        assert expected in text
    assert "\x1b[" not in text  # no progress bars, no colours: this is no terminal


# --------------------------------------------------------------------------------------------------- report


class Outside(HTMLParser):
    """Collects what a page would fetch, and all ids."""

    def __init__(self):
        super().__init__()
        self.fetched, self.ids, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)


def test_page_is_self_contained(outcome):
    page = outcome[0].files["report"].read_text(encoding="utf-8")
    parser = Outside()
    parser.feed(page)
    assert parser.fetched == []
    assert parser.tags.count("svg") == 6
    assert len(parser.ids) == len(set(parser.ids))
    references = set(re.findall(r'xlink:href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert references <= set(parser.ids)
    assert "{{" not in page
    assert "{%" not in page


def test_page_names_what_was_measured(outcome):
    page = outcome[0].files["report"].read_text(encoding="utf-8")
    machine = outcome[0].result["machine"]
    for fact in (
        machine["processor"],
        machine["torch"],
        machine["date"],
        machine["engine"],
        "at least five seeds",
    ):
        assert fact in page


def test_page_says_where_packed_is_slower(outcome):
    result = json.loads(json.dumps(outcome[0].result))
    for group in result["forward"]:
        group["entries"][1].update({key: 2 * group["entries"][0][key] for key in ("median", "low", "high")})
    assert "Packed is slower here" in report.render_html(result)
    for group in result["forward"]:
        group["entries"][1].update({key: 0.5 * group["entries"][0][key] for key in ("median", "low", "high")})
    assert "Packed is slower here" not in report.render_html(result)


def test_page_of_a_broken_model(outcome):
    result = json.loads(json.dumps(outcome[0].result))
    result["layers"][3]["violation"] = {"at": [1, 2, 0, 0], "kept": 3}
    page = report.render_html(result)
    assert "7 of 8" in page
    assert "no: the group at 1, 2, 0, 0 keeps 3" in page


def test_page_of_one_seed_and_one_epoch(outcome):
    result = json.loads(json.dumps(outcome[0].result))
    result["runs"] = [run for run in result["runs"] if run["seed"] == 0]
    result["settings"]["seeds"] = [0]
    for run in result["runs"]:
        run["accuracy"], run["loss"] = run["accuracy"][:1], run["loss"][:1]
    assert "<svg" in report.render_html(result)


def test_numbers_in_words():
    assert report.byte_size(812) == "812 B"
    assert report.byte_size(59_310) == "59.3 kB"
    assert report.byte_size(1_234_567) == "1.23 MB"
    assert report.duration(8.5e-5) == "85 µs"
    assert report.duration(0.0123) == "12.3 ms"
    assert report.duration(1.25) == "1.25 s"
    assert report.mean_and_spread([0.5]) == (0.5, 0.0)
    assert report.mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


@pytest.mark.parametrize(
    ("median", "expected"),
    [(0.5, "2.0x faster"), (2.0, "2.0x slower"), (0.01, "100x faster"), (1.05, "no clear difference")],
)
def test_ratio_in_words(median, expected):
    def entry(m):
        return {"median": m, "low": 0.9 * m, "high": 1.1 * m}

    assert report.ratio_text(entry(1.0), entry(median)) == expected


# --------------------------------------------------------------------------------------------------- digits


@pytest.mark.parametrize("method", digits.METHODS)
def test_training_is_deterministic(method):
    first, second = (digits.train_digits(method, seed=3, epochs=1, width=16) for _ in range(2))
    assert first.accuracy == second.accuracy
    assert first.loss == second.loss
    assert first.sad == second.sad
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digits.train_digits("ste", epochs=1, width=16)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", ["ste", "sr-ste"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:16"])
def test_trained_weights_hold_the_pattern(method, pattern):
    model = digits.train_digits(method, pattern, epochs=1, width=16).model
    weights = dict(model.named_parameters())
    scheme = nms.Scheme.uniform(model, pattern, skip=digits.DENSE_LAYERS)
    assert len(scheme) == 8
    assert all(nms.find_violation(weights[name], pattern, dim=1) is None for name in scheme)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sr_ste_settles_sooner_than_ste():
    sad = {
        method: sum(digits.train_digits(method, seed=0, epochs=4, width=16).sad[-20:])
        for method in ("ste", "sr-ste")
    }
    assert sad["sr-ste"] < sad["ste"]


def test_training_learns():
    assert digits.train_digits("sr-ste", epochs=8, width=16).accuracy[-1] > 0.9


def test_unknown_method():
    with pytest.raises(ValueError, match="dense, ste, sr-ste"):
        digits.train_digits("magic")


@pytest.mark.parametrize("width", [0, 8, 24])
def test_width_is_a_multiple_of_16(width):
    with pytest.raises(ValueError, match=str(width)):
        digits.DigitsNet(width)


def test_split_is_a_partition():
    split = digits.load_split(0)
    assert (len(split.train_x), len(split.test_x)) == (1438, 359)
    rows = torch.cat([split.train_x, split.test_x]).flatten(1)
    again = digits.load_split(1)
    other = torch.cat([again.train_x, again.test_x]).flatten(1)
    assert torch.equal(rows.sum(0), other.sum(0))  # the same images ...
    assert not torch.equal(rows, other)  # ... in another order


def test_shifts_move_by_at_most_one_pixel():
    x = torch.full((200, 1, 8, 8), -1.0)
    x[:, 0, 4, 4] = 1.0
    shifted = digits.shift_images(x, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in (shifted[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert shifted.sum() == x.sum()


def test_settings_are_checked():
    for arguments in ({"epochs": 0}, {"seeds": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Settings(**arguments)


# --------------------------------------------------------------------------------------------------- timing


def test_alternate_runs_everything_in_turn():
    order = []
    timings = timing.alternate(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, repeats={"b": 2}
    )
    assert order == ["a", "b", "a", "b", "b", "a", "b", "b"]
    assert all(0 <= t.low <= t.median <= t.high for t in timings.values())


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_composition_is_what_we_replace():
    weight = torch.randn(8, 16)
    assert torch.equal(argsort_scatter(weight, 2, 4), nms.nm_prune(weight, "2:4"))
