# ruff: noqa: E501 - tables
"""Damages files of every kind and loads them: a FormatError, or what another reader makes of them.

    python tests/fuzz/fuzz_files.py --mutations 12000 --seed 0 --json totals.json

Mutation number i of a seed is always the same; ``--only i`` repeats one. Under the address sanitizer:
``scripts/fuzz_sanitized.sh`` with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import format_reader
import numpy as np
import onnx
import torch
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor

#: What is damaged, the first ones most often.
KINDS = (
    "file", "shards", "bitmask", "torch", "asp", "modelopt", "onnx", "cusparselt", "pruning", "nm-sparsity", "domino",
    "scheme",
)  # fmt: skip
SECONDS = 60  # after which a load counts as hung


# --------------------------------------------------------------------------------------------------- corpus


def sample_tensors() -> dict[str, Tensor]:
    """Packed weights of many kinds, small."""
    tensors: dict[str, Tensor] = {"bias": torch.randn(3), "step": torch.tensor(7)}
    kinds = [
        ("2:4", (8, 16), 1, torch.float32),
        ("1:4", (4, 16), 1, torch.bfloat16),
        ("4:8", (4, 16), 1, torch.float16),
        ("3:5", (2, 13), 1, torch.float64),  # a short last group
        ("1:16", (4, 32), 1, torch.int8),
        ("2:32", (2, 64), 1, torch.float32),
        ("2:4", (6, 8, 3, 3), 1, torch.float32),
        ("2:4", (8, 4), 0, torch.float8_e4m3fn),
        ("2:4", (2, 8, 4), 1, torch.float32),
    ]
    for number, (pattern, shape, dim, dtype) in enumerate(kinds):
        w = torch.randn(shape).mul(9).to(dtype)
        pruned = nms.nm_prune(w, pattern, dim=dim, remainder="pad")
        remainder = "error" if shape[dim] % nms.Pattern.parse(pattern).m == 0 else "pad"
        tensors[f"w{number}"] = nms.compress(pruned, pattern, dim=dim, remainder=remainder)
    tensors["tied"] = tensors["w0"]
    return tensors


def sample_onnx() -> bytes:
    """A graph with one product, whose weight is 2:4 along its inputs."""
    w = nms.nm_prune(torch.randn(16, 4), "2:4", dim=0).numpy()
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(w, "w")])
    return onnx.helper.make_model(graph).SerializeToString()


def make_corpus(folder: Path) -> dict[str, Path]:
    """Good models, each in a folder of its own: ``{kind: folder}``."""
    torch.manual_seed(0)
    tensors = sample_tensors()
    kinds = {name: folder / name for name in KINDS}
    for path in kinds.values():
        path.mkdir(parents=True)
    nms.save_file(tensors, kinds["file"] / "model.safetensors")
    nms.save_file(tensors, kinds["shards"] / "model.safetensors", max_shard_size=300)
    weights = {f"{name}.weight": nms.compress(nms.nm_prune(torch.randn(4, k), "2:4"), "2:4") for name, k in (("a", 16), ("b", 12))}  # fmt: skip
    nms.deploy.to_peer({**weights, "a.bias": torch.zeros(4)}, kinds["bitmask"], format="compressed-tensors")
    half = nms.compress(nms.nm_prune(torch.randn(32, 64).half(), "2:4"), "2:4")
    nms.deploy.to_peer({"w": half, "b": torch.zeros(2)}, kinds["torch"] / "m.pt", format="pytorch-cutlass")
    nms.deploy.to_peer(weights, kinds["asp"] / "m.pt", format="apex-asp")
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    nms.nm_prune_(model[0].weight.data, "2:4")
    nms.deploy.to_peer(
        nms.deploy.from_peer(model), kinds["modelopt"] / "m.pt", format="modelopt", model=model
    )
    (kinds["onnx"] / "m.onnx").write_bytes(sample_onnx())
    nms.deploy.to_peer({"w": half}, kinds["cusparselt"] / "m.pt", format="cusparselt", layout="sm90")
    nms.deploy.to_peer(weights, kinds["pruning"] / "m.pt", format="torch-pruning")
    nms.deploy.to_peer(weights, kinds["nm-sparsity"] / "m.pt", format="nm-sparsity")
    net = sample_net()
    nms.deploy.to_peer(nms.deploy.from_peer(net), kinds["domino"] / "m.txt", format="dominosearch", model=net)
    nms.Scheme({"0": "2:4", "2.weight": "1:4"}).save(kinds["scheme"] / "m.json")
    return kinds


def sample_net() -> nn.Module:
    """What a scheme is for: the same layers in every call."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4))
    for layer in (net[0], net[2]):
        nms.nm_prune_(layer.weight.data, "2:4")
    return net


# ------------------------------------------------------------------------------------------------ mutations


def header_of(raw: bytes) -> tuple[dict[str, Any], int]:
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), end


def with_header(header: Any, raw: bytes, end: int) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + raw[end:]


HOSTILE = (
    0, 1, -1, 2, 3, 7, 8, 255, 256, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 40) + 1, 1 << 62, 1 << 63,
    (1 << 64) - 1, 1 << 64, 10**30, 1.5, -0.0, 1e308, True, None, "", "2:4", "64:64", "0:4", "error", "pad", [],
    {}, [0], [1 << 40, 1 << 40], [1 << 31, 1 << 33], [1 << 20] * 5, "float32", "F64", "U8", "F8_E5M2", "index",
    "bitmask", "w0", "w1.values", "../x.safetensors", "/etc/passwd", "model.safetensors", "\0", "é" * 100,
)  # fmt: skip


def mutate_json(value: Any, rng: random.Random) -> Any:
    """One change somewhere in a JSON value: another value, an entry more, less, renamed, or from elsewhere."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places:
        return rng.choice(HOSTILE)
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        node[key] = rng.choice(HOSTILE)
    elif kind == 1 and isinstance(node[key], int):
        node[key] += rng.choice((-8, -4, -1, 1, 4, 8))
    elif kind == 2:
        del node[key]
    elif kind == 3 and isinstance(node, dict):
        node[rng.choice(list(node))] = node[key]
    elif kind == 4 and isinstance(node, dict):
        node[str(rng.choice(HOSTILE))] = node[key]
    else:
        other, other_key = rng.choice(places)
        node[key] = json.loads(json.dumps(other[other_key]))
    return value


def in_header(raw: bytes, rng: random.Random) -> bytes:
    """Offsets that overlap, shapes, dtypes, names of the safetensors header."""
    header, end = header_of(raw)
    metadata = header.pop("__metadata__", None)
    header = mutate_json(header, rng)
    if metadata is not None and isinstance(header, dict):
        header["__metadata__"] = metadata
    return with_header(header, raw, end)


def offsets(raw: bytes, rng: random.Random) -> bytes:
    """Tensors that lie over one another, behind the end, or the wrong way round."""
    header, end = header_of(raw)
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    begin, stop = header[b]["data_offsets"]
    header[a]["data_offsets"] = rng.choice(
        ([begin, stop], [stop, begin], [begin, stop + rng.randrange(1 << rng.randrange(1, 63))], [0, stop])
    )
    return with_header(header, raw, end)


def in_metadata(raw: bytes, rng: random.Random) -> bytes:
    """Patterns, shapes, dims, dtypes, encodings, aliases of our own description."""
    header, end = header_of(raw)
    metadata = header.setdefault("__metadata__", {"nmsparse": "{}"})
    content = mutate_json(json.loads(metadata.get("nmsparse", "{}")), rng)
    metadata["nmsparse"] = json.dumps(content)
    return with_header(header, raw, end)


def consistent_shape(raw: bytes, rng: random.Random) -> bytes:
    """A weight that claims another pattern, shape or remainder, in metadata that is whole otherwise."""
    header, end = header_of(raw)
    metadata = header.get("__metadata__", {})
    content = json.loads(metadata.get("nmsparse", "{}"))
    if not content.get("weights"):
        return in_header(raw, rng)
    entry = content["weights"][rng.choice(list(content["weights"]))]
    pattern = nms.Pattern(rng.choice((1, 2, 4)), rng.choice((4, 8, 16, 64)))
    entry |= rng.choice(
        (
            {"pattern": str(pattern), "encoding": pattern.encoding},
            {"shape": [rng.choice((0, 1, 8, 1 << 20, 1 << 40)) for _ in entry["shape"]]},
            {
                "shape": [
                    entry["shape"][0],
                    *entry["shape"][1:-1],
                    entry["shape"][-1] + rng.choice((-1, 1, 4)),
                ]
            },
            {"shape": list(reversed(entry["shape"])), "group_dim": rng.randrange(len(entry["shape"]))},
            {"remainder": "pad", "shape": [max(0, size - rng.randrange(2)) for size in entry["shape"]]},
        )
    )
    metadata["nmsparse"] = json.dumps(content)
    return with_header(header, raw, end)


def twice(raw: bytes, rng: random.Random) -> bytes:
    """A key of the header that occurs twice."""
    header, end = header_of(raw)
    name = rng.choice(list(header))
    text = json.dumps(header)
    return with_header(
        text[:-1] + f", {json.dumps(name)}: {json.dumps(rng.choice(list(header.values())))}}}", raw, end
    )


def indices(raw: bytes, rng: random.Random) -> bytes:
    """Indices out of range, equal, descending; bits too many or too few."""
    header, end = header_of(raw)
    names = [n for n in header if n.endswith((".indices", ".bitmask", ".shape"))]
    if not names:
        return noise(raw, rng)
    begin, stop = header[rng.choice(names)]["data_offsets"]
    damaged = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if stop > begin:
            damaged[end + rng.randrange(begin, stop)] = rng.choice((0, 0xFF, 0x44, 0x11, rng.randrange(256)))
    return bytes(damaged)


def length_field(raw: bytes, rng: random.Random) -> bytes:
    (size,) = struct.unpack("<Q", raw[:8])
    other = rng.choice((0, 1, size - 1, size + 1, size * 2, len(raw), 1 << 31, (1 << 63) + 5, (1 << 64) - 1))
    return struct.pack("<Q", other % (1 << 64)) + raw[8:]


def header_bit(raw: bytes, rng: random.Random) -> bytes:
    return flip(raw, rng, 0, min(header_of(raw)[1], len(raw)))


def header_digit(raw: bytes, rng: random.Random) -> bytes:
    digits = [i for i in range(8, header_of(raw)[1]) if chr(raw[i]).isdigit()]
    damaged = bytearray(raw)
    damaged[rng.choice(digits)] = ord(rng.choice("0123456789"))
    return bytes(damaged)


def data_bit(raw: bytes, rng: random.Random) -> bytes:
    return flip(raw, rng, header_of(raw)[1], len(raw))


def flip(raw: bytes, rng: random.Random, begin: int, end: int) -> bytes:
    damaged = bytearray(raw)
    damaged[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def any_bit(raw: bytes, rng: random.Random) -> bytes:
    return flip(raw, rng, 0, len(raw))


def truncated(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def longer(raw: bytes, rng: random.Random) -> bytes:
    return raw + rng.randbytes(rng.choice((1, 8, 1000)))


def noise(raw: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(raw)
    start, size = rng.randrange(len(raw)), rng.choice((2, 8, 64))
    damaged[start : start + size] = rng.randbytes(size)
    return bytes(damaged)


def pasted(raw: bytes, rng: random.Random) -> bytes:
    """A piece of the file over another place of it."""
    a, b, size = rng.randrange(len(raw)), rng.randrange(len(raw)), rng.choice((4, 16, 100))
    damaged = bytearray(raw)
    damaged[a : a + size] = raw[b : b + size]
    return bytes(damaged)


IN_SAFETENSORS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    in_header, offsets, in_metadata, in_metadata, consistent_shape, twice, indices, indices, length_field, header_bit,
    header_digit, data_bit, truncated, longer, noise, pasted,
)  # fmt: skip
IN_ANY: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    any_bit,
    any_bit,
    truncated,
    longer,
    noise,
    pasted,
)


def mutate(folder: Path, rng: random.Random) -> str:
    """Damages one file of a model, and returns how."""
    files = sorted(folder.iterdir())
    path = rng.choice(files)
    if path.suffix == ".json":
        return mutate_index(folder, path, rng)
    if len(files) > 2 and rng.random() < 0.1:
        other = rng.choice([file for file in files if file.suffix == path.suffix])
        kind = rng.choice(("gone", "swapped", "copied", "folder"))
        a, b = path.read_bytes(), other.read_bytes()
        if kind == "gone":
            path.unlink()
        elif kind == "folder":
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(b)
            if kind == "swapped":
                other.write_bytes(a)
        return f"shard {kind}"
    choice = rng.choice(IN_SAFETENSORS if path.suffix == ".safetensors" else IN_ANY)
    path.write_bytes(choice(path.read_bytes(), rng))
    return choice.__name__


def mutate_index(folder: Path, path: Path, rng: random.Random) -> str:
    raw = path.read_bytes()
    if rng.random() < 0.25:
        choice = rng.choice(IN_ANY)
        path.write_bytes(choice(raw, rng))
        return f"{'index' if 'index' in path.name else 'config'}: {choice.__name__}"
    content = json.loads(raw)
    if "weight_map" in content and rng.random() < 0.5:
        name = rng.choice(list(content["weight_map"]))
        shard = rng.choice(list(content["weight_map"].values()))
        content["weight_map"][rng.choice((name, name, name + "x", "w0"))] = rng.choice(
            (
                "../file/model.safetensors", f"../{folder.name}/{shard}", f"./{shard}", f"sub/{shard}", "..", "",
                str(folder / shard), "gone.safetensors", shard, f"{shard}\0", f"..\\{shard}", "/dev/zero", path.name,
            )
        )  # fmt: skip
        path.write_text(json.dumps(content))
        return "index: places"
    path.write_text(json.dumps(mutate_json(content, rng)))
    return f"{'index' if 'index' in path.name else 'config'}: values"


# ----------------------------------------------------------------------------------------------------- check


def bits(tensor: Tensor) -> np.ndarray:
    dense = (tensor.to_dense() if isinstance(tensor, NMTensor) else tensor).contiguous()
    raw = dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.frombuffer(raw, f"<u{dense.itemsize}").reshape(tuple(dense.shape))


def load(kind: str, folder: Path) -> dict[str, Tensor]:
    if kind in ("file", "shards"):
        return nms.load_file(folder)
    file = min(folder.iterdir())
    if kind == "domino":
        return nms.deploy.from_peer(file, format="dominosearch", model=sample_net())
    if kind == "scheme":  # for each weight that it names and the model has, that pattern
        found = nms.Scheme.load(file).resolve(sample_net())
        return {name: nms.compress(w.parameter.detach(), w.pattern, dim=w.group_dim, prune=True) for name, w in found.items()}  # fmt: skip
    if kind == "cusparselt":
        return nms.deploy.from_peer(file, format="cusparselt", layout="sm90")
    if kind == "nm-sparsity":
        return nms.deploy.from_peer(file, format="nm-sparsity", pattern="2:4", counts="kept")
    return nms.deploy.from_peer(file if kind == "onnx" else folder)


def check(kind: str, folder: Path) -> str:
    """``"refused"`` or ``"loaded"``; anything else raises."""
    try:
        loaded = load(kind, folder)
    except nms.FormatError:
        return "refused"
    except ValueError:
        if kind not in ("scheme", "domino"):  # which may be whole, and of another model
            raise
        return "refused"
    except FileNotFoundError:
        # The file to begin with may itself be gone.
        assert not any(folder.glob("*.safetensors")) or kind == "shards", list(folder.iterdir())
        return "refused"
    for name, tensor in loaded.items():
        if not isinstance(tensor, NMTensor):
            continue
        dense = tensor.to_dense()
        assert dense.shape == tensor.shape, name
        pattern, dim = tensor.pattern, tensor.group_dim
        found = nms.find_violation(dense, pattern, dim=dim, remainder=tensor.remainder)
        assert found is None, (name, found)
        if (
            tensor.dim() == 2
            and dim == 1
            and tensor.numel()
            and tensor.dtype in (torch.float32, torch.float64)
        ):
            x = torch.randn(3, tensor.shape[1], dtype=tensor.dtype)
            torch.testing.assert_close(
                nn.functional.linear(x, tensor), nn.functional.linear(x, dense), equal_nan=True, rtol=1e-3, atol=1e-3
            )  # fmt: skip
    if kind in ("file", "shards"):
        start = next(iter(folder.glob("*.index.json")), folder / "model.safetensors")
        expected = format_reader.read(start)
        assert expected.keys() == loaded.keys(), expected.keys() ^ loaded.keys()
        for name, tensor in loaded.items():
            assert np.array_equal(bits(tensor), expected[name]), name
    return "loaded"


def _hung(*_: object) -> None:
    raise TimeoutError(f"still loading after {SECONDS} s")


def run(mutations: int, seed: int, folder: Path, only: int | None = None) -> dict[str, Any]:
    """Damages and checks; what went wrong is in the result's ``"failures"``."""
    corpus = make_corpus(folder / "good")
    for kind, good in corpus.items():
        assert check(kind, good) == "loaded", kind
    outcomes: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    signal.signal(signal.SIGALRM, _hung)
    begin = time.monotonic()
    damaged = folder / "damaged"
    for number in [only] if only is not None else range(mutations):
        rng = random.Random(seed * 1_000_003 + number)
        kind = rng.choice(("file", "file", "shards", *KINDS))
        shutil.copytree(corpus[kind], damaged)
        how = f"{kind}: {mutate(damaged, rng)}"
        try:
            signal.alarm(SECONDS)
            outcome = check(kind, damaged)
        except Exception as error:
            outcome = "failed"
            failures.append(f"{number} ({how}): {type(error).__name__}: {str(error)[:500]}")
        finally:
            signal.alarm(0)
        counts = outcomes.setdefault(how, {"refused": 0, "loaded": 0, "failed": 0})
        counts[outcome] += 1
        shutil.rmtree(damaged)
    total = {key: sum(counts[key] for counts in outcomes.values()) for key in ("refused", "loaded", "failed")}
    return {
        "mutations": sum(total.values()),
        "seed": seed,
        **total,
        "by_kind": dict(sorted(outcomes.items())),
        "failures": failures,
        "seconds": round(time.monotonic() - begin, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this one")
    parser.add_argument("--json", type=Path, help="where the totals go")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.mutations, arguments.seed, Path(folder), arguments.only)
    info = nms.build_info()
    # Set by the script that builds with them and preloads their runtime.
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")
    result["sanitizer"] = os.environ.get("NMSPARSE_SANITIZE") if sanitized else None
    result["build"] = {"torch": torch.__version__, "reference": info.reference, "isa": info.cpu_isa}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
