"""How much of a trained model is left after one-shot pruning: criterion x pattern x channel permutation.

    python bench/bench_prune.py

A residual network on handwritten digits and a small GPT on the standard library's source, trained dense for
each seed, are pruned without any training after it and tested. Beside `nms.prune_model` stand
``torch.ao.pruning`` and NVIDIA ModelOpt (where it is installed) on the same models, data and weights. All
differences are taken seed by seed: Student's t for pairs.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS as RESULTS
from common import Report, arguments, threads
from prune_models import MODELS, Subject
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.prune.batch_norm import batch_norms, recalibrate_norms

PATTERNS = ("2:4", "4:8", "1:4", "2:8", "1:8")
CRITERIA = ("magnitude", "wanda", "sparsegpt")
START, END = "<!-- results of bench_prune.py -->", "<!-- end of results -->"


class Method(NamedTuple):
    """One way to prune.

    Attributes:
        tool: Whose.
        criterion: Which criterion, and what else there is to say.
        pattern: The pattern.
        permuted: Whether channels are reordered before.
        prune: ``prune(model, subject)``, in place or returned.
    """

    tool: str
    criterion: str
    pattern: str
    permuted: bool
    prune: Callable[[nn.Module, Subject], nn.Module | None]

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """What its rows are told by."""
        return self.tool, self.criterion, self.pattern, self.permuted


# -------------------------------------------------------------------------------------------------- methods


def ours(criterion: str, pattern: str, permuted: bool, **options: Any) -> Method:
    def prune(model: nn.Module, subject: Subject) -> nn.Module:
        scheme = nms.Scheme.uniform(model, pattern, skip=subject.skip)
        if permuted:  # what permute=True does; once for all criteria
            if pattern not in subject.permuted:
                nms.permute_channels(model, scheme, subject.calibration[0])
                subject.permuted[pattern] = model
            model = copy.deepcopy(subject.permuted[pattern])
        nms.prune_model(
            model,
            scheme,
            criterion=criterion,  # type: ignore[arg-type]
            calibration=subject.calibration,
            **options,
        )
        return model

    label = criterion + ("" if options.get("recalibrate", True) else ", no recalibration")
    label += f", dampening {options['dampening']}" if "dampening" in options else ""
    label += ", dense inputs" if "sequential" in options else ""
    return Method("nmsparse_ext", label, pattern, permuted, prune)


def torch_ao(model: nn.Module, subject: Subject) -> None:
    """``torch.ao.pruning``: 2 of every 4 are zeroed, and all blocks of a weight are."""
    from torch.ao.pruning import WeightNormSparsifier

    names = nms.Scheme.uniform(model, "2:4", skip=subject.skip)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in names])
    sparsifier.step()
    sparsifier.squash_mask()


def modelopt(mode: str) -> Callable[[nn.Module, Subject], nn.Module]:
    def prune(model: nn.Module, subject: Subject) -> nn.Module:
        import modelopt.torch.sparsity as mts

        def run(model: nn.Module) -> None:
            for batch in subject.calibration:
                model(batch)

        config: dict[str, Any] = {"verbose": False}
        if mode == "sparsegpt":
            config["forward_loop"] = run
        with redirect_stdout(io.StringIO()):
            return mts.export(mts.sparsify(model, mode, config))

    return prune


def recalibrated(prune: Callable[[nn.Module, Subject], nn.Module | None]) -> Any:
    """A peer's pruning, with our recalibration of batch norms after it."""

    def both(model: nn.Module, subject: Subject) -> nn.Module:
        model = prune(model, subject) or model
        recalibrate_norms(model, batch_norms(model), subject.calibration)
        return model

    return both


def methods(subject: Subject, dry: bool) -> Iterator[Method]:
    has_norms = bool(batch_norms(subject.model))
    for pattern in ("2:4", "1:8") if dry else PATTERNS:
        for criterion in CRITERIA:
            for permuted in (False, True):
                yield ours(criterion, pattern, permuted)
            if has_norms and pattern == "2:4":
                yield ours(criterion, pattern, False, recalibrate=False)
        if pattern in ("2:4", "1:8"):
            yield ours("sparsegpt", pattern, False, sequential=None)
    yield ours("sparsegpt", "2:4", False, dampening=0.1)  # ModelOpt's
    yield ours("sparsegpt", "2:4", False, dampening=0.1, sequential=None)  # and all as it does it
    peers: list[tuple[str, str, Any]] = [("torch.ao.pruning", "WeightNormSparsifier", torch_ao)]
    if importlib.util.find_spec("modelopt") is not None:
        peers += [("ModelOpt", mode, modelopt(mode)) for mode in ("sparse_magnitude", "sparsegpt")]
    for tool, label, prune in peers:
        yield Method(tool, label, "2:4", False, prune)
        if has_norms:
            yield Method(tool, f"{label}, recalibrated by us", "2:4", False, recalibrated(prune))


#: Not pruned at all.
DENSE = Method("none", "dense", "-", False, lambda model, subject: None)

# ------------------------------------------------------------------------------------------------------ runs


def run(subject: Subject, method: Method) -> dict[str, Any]:
    """Prunes a copy of the model; returns its figures, or what went wrong."""
    model = copy.deepcopy(subject.model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    row = {
        "model": subject.name,
        "seed": subject.seed,
        "tool": method.tool,
        "criterion": method.criterion,
        "pattern": method.pattern,
        "permuted": method.permuted,
    }
    begin = time.perf_counter()
    try:
        with quiet():
            model = method.prune(model, subject) or model
    except Exception as error:  # of a peer: it is what there is to report
        if method.tool == "nmsparse_ext":
            raise
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    row["seconds"] = time.perf_counter() - begin
    zeros = {
        name: int((p == 0).sum()) / sizes[name] for name, p in model.named_parameters() if sizes.get(name)
    }
    sparse = [name for name, share in zeros.items() if share > 0.25]
    row["zeros"] = sum(zeros[name] * sizes[name] for name in sparse) / max(1, sum(sizes[n] for n in sparse))
    row["weights"] = len(sparse)
    return row | subject.test(model)


@contextmanager
def quiet() -> Iterator[None]:
    """Peers warn of their own futures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def beside_modelopt(subject: Subject) -> dict[str, Any]:
    """What SparseGPT of both does to the weights: the same dampening, all calibrated with the dense model."""
    dense = dict(subject.model.named_parameters())
    theirs, mine = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    with quiet():
        theirs = modelopt("sparsegpt")(theirs, subject)
        ours("sparsegpt", "2:4", False, dampening=0.1, sequential=None).prune(mine, subject)
    names = nms.Scheme.uniform(subject.model, "2:4", skip=subject.skip)
    found: dict[str, Any] = {"model": subject.name, "seed": subject.seed}
    pairs = [(theirs.get_parameter(n), mine.get_parameter(n)) for n in names]
    same = sum(int(((a == 0) == (b == 0)).sum()) for a, b in pairs)
    found["same in both masks"] = same / sum(a.numel() for a, _ in pairs)
    for label, model in (("theirs", theirs), ("ours", mine)):
        change = kept = 0.0
        for name in names:
            after, before = model.get_parameter(name).detach(), dense[name].detach()
            stays = after != 0
            change += float((after - before)[stays].square().sum())
            kept += float(before[stays].square().sum())
        found[f"kept weights changed by, {label}"] = (change / kept) ** 0.5
    return found


# ---------------------------------------------------------------------------------------------------- tables


def by_seed(rows: Sequence[dict[str, Any]], model: str, key: tuple[str, str, str, bool], figure: str) -> Any:
    return {
        row["seed"]: row[figure]
        for row in rows
        if row["model"] == model and figure in row and _key(row) == key
    }


def compare(rows: Sequence[dict[str, Any]], model: str, first: Any, second: Any) -> dict[str, Any] | None:
    """Mean difference of the losses, first minus second, with the p-value of the paired t test."""
    from scipy import stats

    a, b = (by_seed(rows, model, key, "loss") for key in (first, second))
    seeds = sorted(set(a) & set(b))
    if len(seeds) < 2:
        return None
    differences = [a[seed] - b[seed] for seed in seeds]
    same = max(map(abs, differences)) < 1e-12
    return {
        "model": model,
        "first": list(first),
        "second": list(second),
        "seeds": len(seeds),
        "difference": statistics.mean(differences),
        "p": 1.0 if same else float(stats.ttest_1samp(differences, 0.0).pvalue),
        "first better": sum(d < 0 for d in differences),
        "second better": sum(d > 0 for d in differences),
    }


def comparisons(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    us = "nmsparse_ext"
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        keys = dict.fromkeys(_key(row) for row in rows if row["model"] == model and row["tool"] != "none")
        for pattern in dict.fromkeys(row["pattern"] for row in rows if row["tool"] == us):
            pairs = [("wanda", "magnitude"), ("sparsegpt", "magnitude"), ("sparsegpt", "wanda")]
            found += [
                compare(rows, model, (us, a, pattern, False), (us, b, pattern, False)) for a, b in pairs
            ]
            found += [compare(rows, model, (us, c, pattern, True), (us, c, pattern, False)) for c in CRITERIA]
            found += [
                compare(rows, model, (us, c, pattern, False), (us, f"{c}, no recalibration", pattern, False))
                for c in CRITERIA
            ]
            found.append(
                compare(
                    rows,
                    model,
                    (us, "sparsegpt", pattern, False),
                    (us, "sparsegpt, dense inputs", pattern, False),
                )
            )
        for key in keys:
            if key[0] != us:
                criteria = ["magnitude"]
                if "sparsegpt" in key[1]:
                    criteria = ["sparsegpt", "sparsegpt, dampening 0.1, dense inputs"]
                found += [compare(rows, model, (us, c, "2:4", False), key) for c in criteria]
    return [item for item in found if item is not None]


def figure(values: Sequence[float], percent: bool) -> str:
    if not values:
        return "-"
    scale, digits = (100, 2) if percent else (1, 4)
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}"


def markdown(rows: Sequence[dict[str, Any]], tests: Sequence[dict[str, Any]]) -> str:
    """The tables of the documentation."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        patterns = [p for p in PATTERNS if any(row["pattern"] == p for row in mine)]
        dense = [row for row in mine if row["tool"] == "none"]
        lines += [
            f"**{model}**, {len(dense)} seeds. Dense: accuracy "
            f"{figure([r['accuracy'] for r in dense], True)} %, loss "
            f"{figure([r['loss'] for r in dense], False)}.",
            "",
            f"| accuracy, %<br>loss | channels reordered | {' | '.join(patterns)} |",
            f"|---|---|{'---|' * len(patterns)}",
        ]
        for tool, criterion, permuted in sorted(
            {(r["tool"], r["criterion"], r["permuted"]) for r in mine if r["tool"] != "none"}, key=_rank
        ):
            cells = []
            for pattern in patterns:
                group = [r for r in mine if _key(r) == (tool, criterion, pattern, permuted)]
                good = [r for r in group if "loss" in r]
                accuracy, loss = (
                    figure([r["accuracy"] for r in good], True),
                    figure([r["loss"] for r in good], False),
                )
                failed = "raises an error" if group else ""
                cells.append(f"{accuracy}<br>{loss}" if good else failed)
            lines.append(
                f"| {_label(tool, criterion)} | {'yes' if permuted else 'no'} | {' | '.join(cells)} |"
            )
        lines += [
            "",
            "Differences of the loss, seed by seed, with the p-value and for how many seeds the first / the "
            "second is better:",
            "",
            f"| first minus second | {' | '.join(patterns)} |",
            f"|---|{'---|' * len(patterns)}",
        ]
        about = [test for test in tests if test["model"] == model]
        for label in dict.fromkeys(map(_compared, about)):
            by_pattern = {test["first"][2]: test for test in about if _compared(test) == label}
            cells = [
                f"{t['difference']:+.4f}<br>p {t['p']:.2g}, {t['first better']} / {t['second better']}"
                if (t := by_pattern.get(pattern))
                else ""
                for pattern in patterns
            ]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _key(row: dict[str, Any]) -> tuple[str, str, str, bool]:
    return row["tool"], row["criterion"], row["pattern"], row["permuted"]


def _rank(method: tuple[str, str, bool]) -> tuple[bool, str, bool, int, str, bool]:
    """Ours first, plain criteria before what is special about them."""
    tool, criterion, permuted = method
    plain = criterion in CRITERIA
    return (
        tool != "nmsparse_ext",
        tool,
        not plain,
        CRITERIA.index(criterion) if plain else 0,
        criterion,
        permuted,
    )


def _label(tool: str, criterion: str) -> str:
    return criterion if tool == "nmsparse_ext" else f"{tool} {criterion}"


def _compared(test: dict[str, Any]) -> str:
    first, second = (
        f"{_label(key[0], key[1])}{', reordered' if key[3] else ''}"
        for key in (test["first"], test["second"])
    )
    return f"{first} minus {second}"


def write_docs(page: Path, text: str) -> None:
    """Puts the tables between the marks of a page."""
    content = page.read_text(encoding="utf-8")
    before, rest = content.split(START, 1)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Trains, prunes and tests; returns the exit code."""
    parser = arguments(__doc__ or "", "prune_quality.json")
    parser.add_argument("--only", choices=list(MODELS), help="only this model")
    parser.add_argument("--seeds", type=int, default=5, help="how many models of each kind")
    parser.add_argument("--models", type=Path, help="a folder to keep the trained models in")
    parser.add_argument("--rows", type=Path, help="a file for rows as they are made, to go on from")
    parser.add_argument("--docs", type=Path, help="the page to put the tables into")
    parser.add_argument("--dry-run", action="store_true", help="small models: does everything run?")
    options = parser.parse_args(argv)
    report = Report(
        "One-shot pruning of trained models, no training after it: loss and accuracy on test data. "
        "digits-resnet: all convolutions but the first; its calibration data is the validation images. "
        "stdlib-gpt: all linear layers; calibrated with 8 batches of 32 training sequences"
    )
    tools = ["torch", "scipy", *(["nvidia-modelopt"] if importlib.util.find_spec("modelopt") else [])]
    made = {}
    if options.rows is not None and options.rows.exists():
        lines = map(json.loads, options.rows.read_text(encoding="utf-8").splitlines())
        made = {tuple(row[k] for k in ("model", "seed", *Method._fields[:4])): row for row in lines}
    with threads(options.threads):
        for name, build in MODELS.items():
            if options.only not in (None, name):
                continue
            for seed in range(options.seeds):
                subject = build(seed, options.dry_run, options.models)
                if seed == 0 and name == "stdlib-gpt" and "nvidia-modelopt" in tools:
                    report.others["beside ModelOpt"] = [beside_modelopt(subject)]
                for method in (DENSE, *methods(subject, options.dry_run)):
                    known = made.get((name, seed, *method.key))
                    row = known or run(subject, method)
                    report.rows.append(row)
                    print("  ".join(str(value) for value in row.values()), flush=True)
                    if options.rows is not None and known is None:
                        with options.rows.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
    report.others["versions"] = [{tool: version(tool) for tool in tools}]
    report.others["comparisons"] = comparisons(report.rows)
    if options.docs is not None:
        write_docs(options.docs, markdown(report.rows, report.others["comparisons"]))
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
