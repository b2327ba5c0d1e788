#!/usr/bin/env bash
# Fuzzes the readers of files with the extension under the address and undefined-behaviour sanitizers.
#
#   scripts/fuzz_sanitized.sh --mutations 10000 --json bench/results/fuzz_files.json
#
# The extension is built into build/fuzz, beside a copy of the Python files; arguments go to tests/fuzz/fuzz_files.py.
# PYTHON: an interpreter with torch and this project's test packages; by default the one of .venv, or the first on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
fi
mkdir -p build/fuzz
tar -c --exclude='_C*.so' --exclude=__pycache__ nmsparse_ext csrc tests setup.py sources.py pyproject.toml README.md |
    tar -x -C build/fuzz
# The SIMD loops of convolutions, int8 products and optimizer steps take minutes each to instrument, and no file reaches
# them here: the compiler gets them without. tests/cpp runs them under both sanitizers. What checks, unpacks and
# multiplies what a file holds is instrumented, on every instruction set.
cat >build/fuzz/cxx <<EOF
#!/usr/bin/env bash
arguments=("\$@")
if [[ "\$*" =~ kernels/(conv|linear_int8|optim)_(avx|vnni)[a-z0-9_]*\.cpp ]]; then
    arguments=()
    for argument in "\$@"; do [[ \$argument == -fsanitize=* ]] || arguments+=("\$argument"); done
fi
exec ${CXX:-c++} "\${arguments[@]}"
EOF
chmod +x build/fuzz/cxx
checks=address,undefined
(cd build/fuzz && CXX=$PWD/cxx NMSPARSE_CUDA=0 NMSPARSE_SANITIZE=$checks \
    "$PYTHON" -W ignore setup.py --quiet build_ext --inplace)

# libstdc++ too: the sanitizer looks for its throw at the start, when Python has loaded no C++ yet.
runtime="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so.6)"
# Leaks are Python's own: an interpreter frees little at its end. What torch allocates is checked all the same.
LD_PRELOAD="$runtime" PYTHONPATH=$PWD/build/fuzz PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 NMSPARSE_SANITIZE=$checks \
    "$PYTHON" build/fuzz/tests/fuzz/fuzz_files.py "$@"
