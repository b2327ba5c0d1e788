#!/usr/bin/env bash
# Builds a wheel with CUDA kernels, installs it into $VENV (which has a CUDA torch), and checks it without a GPU:
# it imports, the CPU tests pass on it, and it holds machine code for every architecture of TORCH_CUDA_ARCH_LIST.
# `make cuda-build` makes the environment and calls this.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${VENV:?folder of a virtual environment with a CUDA torch}"
export CUDA_HOME=${CUDA_HOME:-$(scripts/find_cuda.sh)}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0;9.0}
export NMSPARSE_CUDA=1
PATH="$(realpath "$VENV")/bin:$PATH"
export PATH

# A build folder of its own: the in-place CPU build keeps its objects, and this one stays incremental too.
rm -rf build/cuda/dist build/cuda/lib*
mkdir -p build/cuda
printf '[build]\nbuild_base = build/cuda\n' >build/cuda/setup.cfg
DIST_EXTRA_CONFIG=build/cuda/setup.cfg python -W ignore setup.py --quiet bdist_wheel --dist-dir build/cuda/dist |
    sed -E 's/^(\[[0-9]+\/[0-9]+\]) .* -c ([^ ]+) .*/\1 \2/'  # the name of the file instead of ninja's command line
python -m pip install -qq --disable-pip-version-check --force-reinstall --no-deps build/cuda/dist/*.whl

# From another folder, so that what is imported is the installed wheel and not the source tree.
installed=$(cd / && python -c 'import nmsparse_ext._C; print(nmsparse_ext._C.__file__)')
(cd / && python -c 'import nmsparse_ext; print(nmsparse_ext.build_info())')
python scripts/list_archs.py "$installed" --expect "$TORCH_CUDA_ARCH_LIST"

# `pytest`, not `python -m pytest`: the latter would put the source tree first on the path.
read -r -a arguments <<<"${PYTEST_ARGS:-}"
pytest -m "not needs_cuda" "${arguments[@]}"
