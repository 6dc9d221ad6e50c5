#!/usr/bin/env bash
# compute-sanitizer's tools on one small case of every tensor-core kernel. Needs a GPU and kernels from compile.py.
#
#   bash bench/kernels/sanitize.sh target/kernels target/kernels-1 [--part 2/8] [SUBSTRING...]
#   TOOLS=racecheck bash bench/kernels/sanitize.sh ... --part 1/8 & TOOLS=racecheck ... --part 2/8 & ...
#
# racecheck sees generic shared-memory accesses, not those of TMA and wgmma, and is the slow one: let
# several processes share the kernels.
# synccheck counts an error for each arrival at the other CTA's barriers: it runs on kernels for
# clusters of one, which are the same but for the peer (compile.py --cluster 1). And it takes a barrier
# for its instruction: warps of a warpgroup that wait for the same named barrier in two bodies of an
# epilogue, one with a target in its rows and one without, are "divergent thread(s) in block". The
# hardware counts by the barrier's number. So --uniform: no targets.
set -euo pipefail
pairs=$1
single=$2
shift 2
for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
    echo "== $tool"
    kernels=$pairs uniform=()
    [[ $tool == synccheck ]] && kernels=$single uniform=(--uniform)
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
        python3 "$(dirname "$0")/check.py" --kernels "$kernels" --small "${uniform[@]}" "$@"
done
