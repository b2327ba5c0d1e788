"""The command in this process, and models and files to give it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import nmsparse_ext as nms
from nmsparse_ext.cli import app

MODELS = """
import torch
from torch import nn
import nmsparse_ext as nms

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 30), nn.ReLU(), nn.Linear(30, 8))

def pruned():
    model = net()
    nms.nm_prune_(model[0].weight.data, "2:4")
    nms.nm_prune_(model[2].weight.data, "1:8")
    return model

def example():
    return pruned(), torch.randn(4, 64)

def images():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten())
    return nn.Sequential(body, nn.Linear(16, 8)), torch.randn(1, 8, 5, 5)

def words():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(16, 32), nn.LSTM(32, 32), nn.Linear(32, 16)
            self.unused = nn.Linear(32, 32)
            self.head.weight = self.embed.weight
        def forward(self, ids):
            return self.head(self.body(self.embed(ids))[0])
    return Words(), torch.zeros(2, 3, dtype=torch.long)

def broken():
    raise RuntimeError("this factory is broken")

def wrong_input():
    return net(), torch.randn(4, 3)
"""


class Result(NamedTuple):
    """What a run came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object."""
        record = json.loads(self.out)
        assert isinstance(record, dict)
        return record


def nmsparse(*args: object) -> Result:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    return Result(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def run() -> Callable[..., Result]:
    """``run(*arguments)`` of the command."""
    return nmsparse


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to be in, with a module ``cli_models`` of factories."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("cli_models", None)


@pytest.fixture
def dense_file(here: Path) -> str:
    """Pruned to 2:4 and 1:8 in two of three layers, saved dense."""
    import cli_models

    save_file(cli_models.pruned().state_dict(), "dense.safetensors")
    return "dense.safetensors"


@pytest.fixture
def packed_file(here: Path) -> str:
    """The same, packed."""
    import cli_models

    nms.save_file(cli_models.pruned(), "packed.safetensors")
    return "packed.safetensors"


@pytest.fixture
def sharded_folder(here: Path) -> str:
    """The same dense, in two files with an index, as Hugging Face writes them."""
    import cli_models

    state = cli_models.pruned().state_dict()
    names = list(state)
    folder = here / "shärded"
    folder.mkdir()
    shards = {f"model-0000{i}-of-00002.safetensors": names[2 * i - 2 : 2 * i + 2 * (i - 1)] for i in (1, 2)}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder.name


@pytest.fixture(scope="session")
def transformers_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models as ``save_pretrained`` leaves them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    bert = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    gpt2 = transformers.GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=1, n_head=4)
    models: dict[str, nn.Module] = {
        "llama": transformers.LlamaForCausalLM(llama),
        "bert": transformers.BertForMaskedLM(bert),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}
