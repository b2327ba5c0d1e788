#!/usr/bin/env bash
# Installs HEAD with pip where no compiler is to be found, into an environment of its own, and tries it: everything has
# to run in pure PyTorch then. Needs .venv (make build), whose torch is borrowed.
set -euo pipefail
cd "$(dirname "$0")/.."

env=$PWD/build/no_compiler
rm -rf "$env" && .venv/bin/python -m venv "$env"
# torch and its like are borrowed from .venv; what is tested is our own install.
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
.venv/bin/python -c "$purelib" >"$("$env/bin/python" -c "$purelib")/borrowed.pth"
mkdir "$env/source" && git archive HEAD | tar -x -C "$env/source"
CXX=/nonexistent/c++ "$env/bin/python" -m pip install -qq --disable-pip-version-check \
    --no-build-isolation --no-deps --ignore-installed "$env/source"
cd "$env" && bin/python -c '
import torch, nmsparse_ext as nms
info = nms.build_info()
print(info)
assert info.reference and "no_compiler" in nms.__file__, nms.__file__
assert nms.nm_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), "2:4").tolist() == [[False, True, True, False]]'
