#!/usr/bin/env bash
# What to run on a GPU machine that is there for some minutes at a time (docs/gpu.md):
#     scripts/gpu_session.sh OUT [MINUTES]
# Run it again until it says that all is done; its state is in .gpu/, its results in OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/gpu_session.sh OUT [MINUTES]}
end=$((SECONDS + 60 * ${2:-9}))
python=${PYTHON:-python3}
state=.gpu
mkdir -p "$out" "$state/peers" "$state/done"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/$state/peers:$PWD
export OURO_CACHE_DIR=${OURO_CACHE_DIR:-$PWD/$state/cache}

results() {
    for file in gpu.json tests.txt build.txt; do
        [ -e "$state/$file" ] && cp "$state/$file" "$out/"
    done
    cp "$OURO_CACHE_DIR"/tuning/*.json "$out/" 2>/dev/null # what was tuned
    [ -e "$state/gpu.json" ] && "$python" -m benchmarks.gpu_table "$state/gpu.json" >"$out/gpu.md"
}
trap results EXIT

step() { # step NAME COMMAND...: until it succeeds, within the time that is left
    local name=$1 left=$((end - SECONDS)) status
    shift
    [ -e "$state/done/$name" ] && return
    [ "$left" -gt 20 ] || { echo "time is up before: $name"; exit 0; }
    echo "== $name ($left s left)"
    timeout "$left" "$@"
    status=$?
    [ "$status" -ne 124 ] || { echo "time was up in: $name"; exit 0; }
    echo "== $name ended with $status"
    [ "$status" -ne 0 ] || touch "$state/done/$name"
}

suite() { # suite NAME FILTER BATCHES MODELS [OPTION...]
    local name=$1 filter=$2 batches=$3 models=$4
    shift 4
    step "$name" "$python" -m benchmarks.run --suite gpu --json "$state/gpu.json" \
        --artefacts "$state/artefacts" --filter "$filter" --batches "$batches" --models "$models" "$@"
}

tests() {
    grep -rlE 'mark\.gpu' tests --include='test_*.py' |
        xargs "$python" -m pytest -m gpu -q -n 8 --show-capture=no >"$state/tests.txt" 2>&1
    tail -40 "$state/tests.txt" # failures are read, not repeated
}
export -f tests
export python state

if [ ! -e "$state/peers/causal_conv1d_cuda.so" ]; then
    "$python" -m benchmarks.peers_build build "$state/peers" >"$state/build.txt" 2>&1 &
    build=$!
fi
step tests bash -c tests
[ -z "${build:-}" ] || wait "$build" || tail -5 "$state/build.txt"

small=vim_tiny
others=vmamba_tiny_s1l8,vim_base,mambavision_tiny,vim_small,vmamba_base_s1l20
suite kernels "gpu/kernels/.*(Vim-T|VMamba-T)" 1,32 "$small" --rounds 3
suite vim_tiny "b(1|32)/(eager|ours)" 1,32 "$small"
suite vim_tiny_tuned tuned 1,32 "$small" --tune 60
suite vim_tiny_compile "b(1|32)/torch.compile" 1,32 "$small"
suite others "b(1|32)/(eager|ours)" 1,32 "$others"
suite others_tuned tuned 1,32 "$others" --tune 40
suite vim_tiny_batches "b(8|128)/" 8,128 "$small"
suite others_compile "b(1|32)/torch.compile" 1,32 "$others"
suite rest "" 1,8,32,128 "$small,$others"
if [ -e "$state/done/rest" ]; then echo "all is done"; else echo "not all is done: run it again"; fi
