"""A process that is killed while it saves leaves the old model or the new one, at any moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Forks after the imports, which take longer than everything else; nothing has started threads by then.
PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
import nmsparse_ext as nms

folder, limits, tries = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
path = folder / "model.safetensors"
rng = random.Random(0)

def model(number):
    w = nms.nm_prune(torch.full((64, 64), float(number)), "2:4")
    return {"a": nms.compress(w, "2:4"), "b": torch.full((5000,), float(number)), "c": torch.tensor(number)}

def which(loaded):
    values = {int(t.max()) for t in (loaded["a"].to_dense(), loaded["b"], loaded["c"])}
    assert len(values) == 1, values
    return values.pop()

nms.save_file(model(1), path, max_shard_size=limits[0])
old, moments = 1, set()
for attempt in range(tries):
    new = old + 1
    limit = limits[(attempt + 1) % len(limits)]
    begin, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        tensors = model(new)
        os.write(end, b"x")
        nms.save_file(tensors, path, max_shard_size=limit)
        os._exit(0)
    os.close(end)
    os.read(begin, 1)
    os.close(begin)
    time.sleep(rng.random() ** 2 * 0.03)
    os.kill(pid, signal.SIGKILL)
    done = os.waitpid(pid, 0)[1] == 0
    found = which(nms.load_file(path))
    assert found == which(nms.load_file(folder)), "two models"
    assert found == new if done else found in (old, new), (found, old, new, done)
    moments.add("done" if done else "new" if found == new else "old")
    old = found
nms.save_file(model(old), path, max_shard_size=limits[0])
print(json.dumps({"moments": sorted(moments), "left": sorted(entry.name for entry in folder.iterdir())}))
"""


def killed(folder: Path, limits: list[int | None], tries: int) -> dict[str, list[str]]:
    arguments = [str(folder), json.dumps(limits), str(tries)]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_one_file(tmp_path: Path) -> None:
    result = killed(tmp_path, [None], 40)
    assert "old" in result["moments"]
    assert [name for name in result["left"] if not name.startswith(".")] == ["model.safetensors"]


def test_shards_and_files_in_turn(tmp_path: Path) -> None:
    result = killed(tmp_path, [6000, None, 6000], 60)
    assert "old" in result["moments"]
    # The last save has cleaned up: an index, its shards, and hidden what killed writes of the one file left.
    visible = [name for name in result["left"] if not name.startswith(".")]
    assert [name for name in visible if "-of-" not in name] == ["model.safetensors.index.json"]
    assert len(visible) == 4
    assert not any("-of-" in name for name in result["left"] if name not in visible)
