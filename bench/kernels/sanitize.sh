#!/usr/bin/env bash
# The four compute-sanitizer tools on one small case of every tensor-core kernel. Needs a GPU and kernels from compile.py.
#
#   bash bench/kernels/sanitize.sh target/kernels [SUBSTRING...]
#
# racecheck sees generic shared-memory accesses, not those of TMA and wgmma.
set -euo pipefail
kernels=$1
shift
for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
        python3 "$(dirname "$0")/check.py" --kernels "$kernels" --small "$@"
done
