"""``nmsparse explain``: does sparse pay on this machine, and if not, why?"""

from __future__ import annotations

import dataclasses

from nmsparse_ext.cli.examples import BatchOption, TokensOption, example_for, running, unpack
from nmsparse_ext.cli.options import JsonOption, LayersOption, ModelArgument, SkipOption, usage_errors
from nmsparse_ext.cli.output import emit, emit_table, progress, show
from nmsparse_ext.cli.patterns import PatternOption, choice, read_pattern
from nmsparse_ext.cli.sources import load_model


def explain(
    model: ModelArgument,
    pattern: PatternOption = "2:4",
    batch: BatchOption = None,
    tokens: TokensOption = None,
    layers: LayersOption = None,
    skip: SkipOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell for each weight of MODEL whether PATTERN would make it faster on this machine, and if not, why.

    The model runs once; each layer is timed on what reaches it there, packed against the fastest dense
    product (as it stands, or with a weight that oneDNN or MKL packed beforehand). Weights need not be pruned
    for that. Of a file every linear layer is timed on so many rows as --batch times --tokens makes.

    Says: dense faster (with both times), too few or too many tokens, shape not aligned, no engine, layer type
    not supported, and which engines this machine lacks.
    """
    with usage_errors():
        from nmsparse_ext._machine import machine
        from nmsparse_ext.cli.tensor_model import TensorModel
        from nmsparse_ext.deploy.explain import explain as measure
        from nmsparse_ext.weights import weights

        found = load_model(model)
        unpack(found.model)
        scheme = read_pattern(pattern, found.model)
        chosen = choice(found.model, layers, skip)
        example = example_for(found, batch, tokens, model)
        listed = [weight for weight in weights(found.model) if chosen(weight)]
        with running(model), progress("timing", len(listed)) as step:
            found_out = measure(
                found.model, scheme, example, choose=chosen, after=lambda name: step(text=name)
            )
        if isinstance(found.model, TensorModel):
            rows = (
                dataclasses.replace(row, reason="not timed: a file does not say how large its input is")
                if row.code == "not run"
                else row
                for row in found_out
            )
            found_out = dataclasses.replace(found_out, rows=tuple(rows))
    here = machine()
    record = {"model": model, "pattern": pattern, "machine": here, **found_out.to_json()}

    def text() -> None:
        emit_table(found_out.head, found_out.cells(), words=found_out.words)
        emit(f"{found_out.total}: {here['processor']}, {here['engine']}, {here['threads']} thread(s)")
        for note in found_out.notes:
            emit(note)

    show(as_json, record, text)
