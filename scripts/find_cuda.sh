#!/usr/bin/env bash
# Prints the folder of a CUDA toolkit: $CUDA_HOME, else where nvcc really lies, else the usual places.
# A toolkit has its headers beside nvcc; a wrapper script of that name elsewhere on PATH does not count.
set -euo pipefail

is_toolkit() { [[ -x "$1/bin/nvcc" && -f "$1/include/cuda_runtime_api.h" ]]; }

if [[ -n "${CUDA_HOME:-}" ]]; then
    is_toolkit "$CUDA_HOME" && { echo "$CUDA_HOME"; exit 0; }
    echo "CUDA_HOME=$CUDA_HOME holds no CUDA toolkit (bin/nvcc and include/cuda_runtime_api.h)" >&2
    exit 1
fi

candidates=()
if nvcc=$(command -v nvcc); then candidates+=("$(dirname "$(dirname "$(readlink -f "$nvcc")")")"); fi
candidates+=(/usr/local/cuda /opt/cuda)
while read -r folder; do candidates+=("$folder"); done < <(compgen -G '/usr/local/cuda-*' | sort --version-sort --reverse)

for folder in "${candidates[@]}"; do
    is_toolkit "$folder" && { readlink -f "$folder"; exit 0; }
done
echo "no CUDA toolkit found: install one (nvcc and headers; no GPU or driver is needed) or set CUDA_HOME" >&2
exit 1
