#!/usr/bin/env bash
# Fails if the extension needs a C++ symbol of torch: it may use libtorch's stable C ABI only, so that one binary loads
# into every torch from the target version on.   scripts/check_abi.sh nmsparse_ext/_C*.so
set -euo pipefail

for library in "$@"; do
    symbols=$(nm --dynamic --undefined-only --demangle "$library")
    if unstable=$(grep -E '\b(at|c10|torch|caffe2)::' <<<"$symbols"); then
        echo "$library needs unstable symbols of torch:" >&2
        echo "$unstable" >&2
        exit 1
    fi
    echo "$library: $(grep -cE '\b(aoti_torch|torch)_' <<<"$symbols") symbols of libtorch's stable C ABI, no C++ ones"
done
