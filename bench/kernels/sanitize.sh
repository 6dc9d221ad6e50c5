#!/usr/bin/env bash
# compute-sanitizer's tools on one small case of every tensor-core kernel. Needs a GPU and kernels from compile.py.
#
#   bash bench/kernels/sanitize.sh target/kernels target/kernels-1 [--part 2/8] [SUBSTRING...]
#   TOOLS=racecheck bash bench/kernels/sanitize.sh ... --part 1/8 & TOOLS=racecheck ... --part 2/8 & ...
#
# racecheck sees generic shared-memory accesses, not those of TMA and wgmma, and is the slow one: let
# several processes share the kernels.
# synccheck counts 192 errors on a ping-pong kernel at 300 x 520 x 200: as many as there are arrivals
# at the other CTA's barriers (12 CTAs x 4 warps x 4 k-blocks). It runs on kernels for clusters of
# one, which are the same but for the peer: compile.py --cluster 1.
set -euo pipefail
pairs=$1
single=$2
shift 2
for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
    echo "== $tool"
    kernels=$pairs
    [[ $tool == synccheck ]] && kernels=$single
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
        python3 "$(dirname "$0")/check.py" --kernels "$kernels" --small "$@"
done
