#!/bin/sh
# Everything to be done with a GPU, in parts that are interrupted when they take too long:
#
#     bench/gpu.sh all [FOLDER]     smoke, tests, model, ops, attention: 9 minutes at most
#     bench/gpu.sh more [FOLDER]    profile, sanitize: 3 minutes at most
#     bench/gpu.sh PART [FOLDER]    one of them: smoke, tests, model, ops, attention, profile, sanitize
#
# smoke: does anything run? tests: every check of tests/gpu_checks.py. model: the released model's size with random
# weights. ops, attention: operations beside their best rivals. profile: what bounds the kernels that are most of a step,
# by ncu. sanitize: small cases under compute-sanitizer.
#
# All that is printed and measured goes into FOLDER/gpu.tar.gz, which is written anew after every part, so that an
# interruption loses one part at most. FOLDER: $OUT if that is set, else build/gpu. Nothing else is written into the tree
# but what is compiled. PYTHON (default python3) holds torch for CUDA, triton, cuda-core, pybind11, ninja and rich. No
# network is needed. The exit code says how many parts failed.
set -u
cd "$(dirname "$0")/.."
wanted="${1:?expected all, more or a part}"
folder="${2:-${OUT:-build/gpu}}"
python="${PYTHON:-python3}"
jobs="${JOBS:-$(nproc)}"
work="$(mktemp -d)"
failed=0
export PYTHONUNBUFFERED=1
mkdir -p "$folder"

# limited SECONDS COMMAND...: interrupted after so long, as by Ctrl-C, and killed if that does not help.
limited() {
    seconds="$1"
    shift
    timeout --signal INT --kill-after 10 "$seconds" "$@"
}

# part NAME: runs the function of this name, keeps what it prints, and packs everything that there is until then.
part() {
    begun="$(date +%s)"
    { "$1" 2>&1; echo "$?" >"$work/.code"; } | tee "$work/$1.log"
    code="$(cat "$work/.code")"
    [ "$code" = 0 ] || failed=$((failed + 1))
    echo "$1: exit code $code after $(($(date +%s) - begun)) s" | tee -a "$work/summary.txt"
    tar -C "$work" --exclude .code -czf "$folder/.gpu.tar.gz" . && mv "$folder/.gpu.tar.gz" "$folder/gpu.tar.gz"
}

# The CPU's kernels are compiled meanwhile: some checks ask them. Without them the rest goes on.
smoke() {
    limited 70 "$python" setup.py -q build_ext --inplace >"$work/setup.log" 2>&1 &
    build=$!
    limited 60 "$python" -m bench.gpu_smoke
    code=$?
    wait "$build" || echo "setup.py: exit code $?, see setup.log"
    return "$code"
}

tests() {
    limited 170 "$python" -m tests.gpu_checks --jobs "$jobs"
}

model() {
    limited 100 "$python" -m bench.gpu_model --save "$work" --size 1,4096 --size 1,131072
}

ops() {
    limited 125 "$python" -m bench --device cuda --op moe --op remask --op mamba2 --op adaln --op linear \
        --rivals best --save "$work" --name ops
}

attention() {
    limited 60 "$python" -m bench --device cuda --op attention --batch 1 --context 4096 --context 131072 \
        --rivals best --save "$work" --name attention
}

# The clocks stay as they are. Behind a graph's replays a profiler would see nothing: the calls of the smoke test.
profile() {
    if ! command -v ncu >/dev/null; then
        echo "ncu: not found, not run"
        return 0
    fi
    limited 80 ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis \
        --section WarpStateStats --kernel-name 'regex:^(up|down|attention)' --launch-count 12 \
        "$python" -m bench.gpu_smoke --only moe_experts --only block_attention
}

# Without PyTorch's cache of memory, in which a write beyond an array is a write into another; graphs need that cache.
# The slowest comes last. racecheck says RACECHECK SUMMARY, the others ERROR SUMMARY.
sanitize() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer: not found, not run"
        return 0
    fi
    code=0
    for tool in memcheck synccheck racecheck; do
        echo "compute-sanitizer, $tool:"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 30 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" \
            -m tests.gpu_checks --eager --only 'odd]' --only 'grouped]' --only 'sampled_filtered]' >"$work/$tool.log" 2>&1
        tail -n 15 "$work/$tool.log"
        grep -Eq '(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)' "$work/$tool.log" || code=1
    done
    return "$code"
}

case "$wanted" in
all) parts="smoke tests model ops attention" ;;
more) parts="profile sanitize" ;;
smoke | tests | model | ops | attention | profile | sanitize) parts="$wanted" ;;
*)
    echo "expected all, more, smoke, tests, model, ops, attention, profile or sanitize, got $wanted" >&2
    exit 64
    ;;
esac
for one in $parts; do
    part "$one"
done
rm -rf "$work"
exit "$failed"
