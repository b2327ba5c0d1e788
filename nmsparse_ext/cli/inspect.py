"""``nmsparse inspect``: what a file or a model holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmsparse_ext.cli.options import JsonOption, LayersOption, ModelArgument, SkipOption, usage_errors
from nmsparse_ext.cli.output import emit, emit_table, progress, show
from nmsparse_ext.cli.sources import chosen, load_model

if TYPE_CHECKING:
    from torch import Tensor


def inspect(
    model: ModelArgument, layers: LayersOption = None, skip: SkipOption = None, as_json: JsonOption = False
) -> None:
    """List what MODEL holds: shapes, dtypes, bytes, how sparse each weight is, and which pattern it holds."""
    from nmsparse_ext.weights import canonical_name, weights

    with usage_errors():
        loaded = load_model(model).model
        dims = {name: weight for weight in weights(loaded) for name in weight.names}
        state = {canonical_name(name): t for name, t in loaded.state_dict(keep_vars=True).items()}
        state = {name: tensor for name, tensor in state.items() if chosen(name, layers, skip)}
        rows: list[dict[str, Any]] = []
        first: dict[int, str] = {}
        with progress("reading", len(state)) as step:
            for name, tensor in state.items():
                weight = dims.get(name)
                row = {"name": name, **_describe(tensor, None if weight is None else weight.group_dim)}
                row["tied_to"] = first.setdefault(id(tensor), name) if id(tensor) in first else None
                first.setdefault(id(tensor), name)
                rows.append(row)
                step(text=name)
    counted = [row for row in rows if row["tied_to"] is None]
    total, dense = (sum(row[what] for row in counted) for what in ("bytes", "dense_bytes"))

    def text() -> None:
        cells = [
            [
                row["name"],
                "x".join(map(str, row["shape"])) or "scalar",
                row["dtype"],
                f"{row['bytes']:,}",
                _form(row),
            ]
            for row in rows
        ]
        emit_table(("tensor", "shape", "dtype", "bytes", "form"), cells, words=(0, 1, 2, 4))
        emit(f"{len(rows)} tensors, {total:,} bytes; {dense:,} if all were dense")

    show(as_json, {"file": model, "tensors": rows, "bytes": total, "dense_bytes": dense}, text)


def _form(row: dict[str, Any]) -> str:
    if row["tied_to"] is not None:
        return f"tied to {row['tied_to']}"
    if row["packed"]:
        return f"packed {row['pattern']} along dim {row['group_dim']} ({row['encoding']})"
    if row["nonzero"] is None:
        return "dense"
    holds = f", holds {row['pattern']} along dim {row['group_dim']}" if row["pattern"] else ""
    return f"dense, {row['nonzero']:.1%} nonzero{holds}"


def _describe(tensor: Tensor, group_dim: int | None) -> dict[str, Any]:
    import nmsparse_ext as nms
    from nmsparse_ext.deploy import detect_pattern

    row: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": tensor.nbytes,
        "dense_bytes": tensor.numel() * tensor.element_size(),
        "packed": False,
        "pattern": None,
        "encoding": None,
        "group_dim": None,
        "nonzero": None,
    }
    tensor = tensor.detach()
    if isinstance(tensor, nms.NMTensor):
        kind = {"pattern": str(tensor.pattern), "encoding": tensor.encoding, "group_dim": tensor.group_dim}
        return row | {"packed": True, **kind}
    if tensor.dim() < 2 or not tensor.numel():  # how sparse a bias is says nothing
        return row
    nonzero = tensor.count_nonzero().item() / tensor.numel()
    row["nonzero"] = nonzero
    if group_dim is not None and 0 < nonzero <= 0.5:  # more than every usual pattern keeps
        found = detect_pattern(tensor, dim=group_dim)
        if found is not None:
            row |= {"pattern": str(found), "group_dim": group_dim}
    return row
