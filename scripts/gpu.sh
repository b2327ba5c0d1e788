#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without network: builds for this machine's GPU with the Python that
# already has a CUDA torch, pytest and (better) ninja; runs the GPU tests, where a missing GPU is a failure and not a
# skip; runs the GPU benchmarks; leaves JSON and the test report in $OUT (default bench/results).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results}
limit=${GPU_LIMIT:-520}  # seconds for everything; what has not begun by then is left out and makes the run fail
steps=${GPU_STEPS:-.}    # a regular expression: only the steps of such names, for a second run with little time
mkdir -p "$out"

section() { echo; echo "==== $1 (${SECONDS} s)"; }
remaining() { echo $((limit > SECONDS ? limit - SECONDS : 1)); }
failed=()
# step NAME SHARE COMMAND...: at most SHARE percent of all the time, so that what comes after has its turn. An interrupt,
# not a kill, ends it: pytest and the benches then still write what they have.
step() {
    local name=$1 most=$((limit * $2 / 100)) left code=0
    shift 2
    [[ $name =~ $steps ]] || { echo "$name: not among GPU_STEPS"; return; }
    left=$(remaining)
    if ((left < 10)); then  # it takes as long to import torch
        failed+=("$name (no time left)")
        return
    fi
    most=$((most < left ? most : left))
    timeout --signal=INT --kill-after=10 $most "$@" || code=$?
    case $code in
        0) ;;
        124 | 137) failed+=("$name (not done after $most s)") ;;
        *) failed+=("$name") ;;
    esac
}

"$python" - <<'PYTHON_CODE'
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"make gpu: torch {torch.__version__} of {sys.executable} sees no GPU (PYTHON=... chooses another Python)")
PYTHON_CODE

section "build"
export CUDA_HOME=${CUDA_HOME:-$(scripts/find_cuda.sh)}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
export NMSPARSE_CUDA=1
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
PATH="$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH"  # its ninja, for parallel compiles
export PATH
# One architecture, this machine's, is the quickest build.
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
export TORCH_CUDA_ARCH_LIST
"$python" -W ignore setup.py --quiet build_ext --inplace |
    sed -E 's/^(\[[0-9]+\/[0-9]+\]) .* -c ([^ ]+) .*/\1 \2/'  # the name of the file instead of ninja's command line
"$python" -c 'import nmsparse_ext; print(nmsparse_ext.build_info())'
"$python" -c 'import json, nmsparse_ext; print(json.dumps(nmsparse_ext.build_info().as_dict(), indent=1))' >"$out/build_info.json"

section "GPU tests"
# A package that this Python lacks fails the run by name, but not before everything else has run.
FAIL_WITHOUT_CUDA=1 step "GPU tests" 45 "$python" scripts/gpu_tests.py --reports "$out" --durations=10 \
    --continue-on-collection-errors

# GPU_FULL=1 measures everything: an hour of products, so with GPU_LIMIT=14400.
quick=(--quick)
[[ -n ${GPU_FULL:-} ]] && quick=()

section "bench_gpu_linear"  # which keeps what it has when its time is up
step bench_gpu_linear 25 "$python" bench/bench_gpu_linear.py "${quick[@]}" --seconds $((limit * 20 / 100)) \
    --json "$out/bench_gpu_linear.json"

section "what cuSPARSELt does here"
step probe_cusparselt 15 "$python" scripts/probe_cusparselt.py --quick --json "$out/probe_cusparselt.json"

for name in bench_gpu_train_linear bench_gpu_select; do
    section "$name"
    step "$name" 15 "$python" "bench/$name.py" "${quick[@]}" --json "$out/$name.json"
done

# A subset that takes every kernel's edges. Without torch's cache of memory, an access behind a tensor's end is one
# behind its allocation.
section "compute-sanitizer"
sanitizer=$(PATH="$PATH:$CUDA_HOME/bin:$CUDA_HOME/compute-sanitizer" command -v compute-sanitizer || true)
if [[ -n $sanitizer ]]; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 FAIL_WITHOUT_CUDA=1 step "compute-sanitizer $tool" 30 \
            "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes application-only \
            "$python" -m pytest -q -p no:cacheprovider -m needs_cuda tests/gpu/test_cuda_products.py \
            -k "damaged or bias_and_activation or strides or blobs or transposable"
    done
else
    echo "not on this machine"
fi

section "CPU engines on this machine"
step "CPU engine tests" 100 "$python" -m pytest -q -m "not needs_cuda" tests/test_engines.py tests/test_build.py \
    --junitxml "$out/cpu_engine_tests.xml"

section "done"
if ((${#failed[@]})); then
    (IFS=, && echo "failed: ${failed[*]}" >&2)
    exit 1
fi
echo "results in $out: $(ls "$out" | tr '\n' ' ')"
