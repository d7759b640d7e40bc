#!/bin/sh
# Everything to be done with a GPU, in parts that are interrupted when they take too long:
#
#     bench/gpu.sh all [FOLDER]     smoke, tests, model, ops, attention, switches: 9 minutes at most
#     bench/gpu.sh more [FOLDER]    profile, sanitize: 3 minutes at most
#     bench/gpu.sh PART [FOLDER]    one of them
#
# smoke: does anything run? tests: every check of bench/checks. model: the released model's size with random
# weights. ops, attention: operations beside their best baselines. switches: what only measurement can decide, both ways.
# profile: what bounds the kernels that are most of a step, by ncu. sanitize: small cases under compute-sanitizer.
#
# All that is printed and measured goes into FOLDER/gpu.tar.gz, which is written anew every 15 seconds, after every part,
# and when the script is interrupted. FOLDER: $OUT if that is set, else build/gpu. Nothing else is written into the tree
# but what is compiled. PYTHON (default python3) holds torch for CUDA, triton, cuda-core, pybind11, ninja and rich. No
# network is needed. The exit code says how many parts failed; 130 or 143, that the script was interrupted.
set -u
cd "$(dirname "$0")/.."
wanted="${1:?expected all, more or a part}"
folder="${2:-${OUT:-build/gpu}}"
python="${PYTHON:-python3}"
jobs="${JOBS:-$(nproc)}"
work="$(mktemp -d)"
state="$(mktemp -d)" # what this script needs for itself
failed=0
export PYTHONUNBUFFERED=1
mkdir -p "$folder"
# A command in the background would ignore SIGINT; with it, a benchmark writes what it has.
interruptible=""
if env --default-signal=INT true 2>/dev/null; then interruptible="env --default-signal=INT"; fi

# limited SECONDS COMMAND...: interrupted after so long, as by Ctrl-C, and killed if that does not help.
limited() {
    if [ -e "$state/stop" ]; then return 130; fi
    seconds="$1"
    shift
    $interruptible timeout --signal INT --kill-after 10 "$seconds" "$@" &
    limited="$!" # and the number of its group
    echo "$limited" >>"$state/running"
    wait "$limited"
    ended="$?"
    kill -s KILL -- "-$limited" 2>/dev/null # what it left behind, which is in its group
    return "$ended"
}

# pack NAME: the archive as of now. It is made beside and renamed, so that there is a whole one at any time.
pack() {
    tar -C "$work" -czf "$folder/.$1" . 2>/dev/null
    mv "$folder/.$1" "$folder/gpu.tar.gz"
}

# part NAME: runs the function of this name, keeps what it prints, and packs everything that there is until then.
part() {
    begun="$(date +%s)"
    : >"$state/running"
    echo 143 >"$state/code"
    { # a signal is for this script to hand on, in good order
        trap '' INT TERM HUP
        "$1" 2>&1
        echo "$?" >"$state/code"
    } | (trap '' INT TERM HUP && exec tee "$work/$1.log") &
    running="$!"
    while sleep 15; do pack meanwhile; done >/dev/null 2>&1 &
    packing="$!"
    wait "$running" # unlike a command in the foreground, interrupted by a signal
    stop_packing
    finished "$1"
}

# finished NAME: a line in the summary, and the archive.
finished() {
    code="$(cat "$state/code")"
    [ "$code" = 0 ] || failed=$((failed + 1))
    echo "$1: exit code $code after $(($(date +%s) - begun)) s" | tee -a "$work/summary.txt"
    pack now
}

stop_packing() {
    kill -s KILL "$packing" 2>/dev/null
    wait "$packing" 2>/dev/null
    rm -f "$folder/.meanwhile"
}

# interrupted CODE: hands the signal on as SIGINT, waits while what runs writes what it has, and packs that.
interrupted() {
    trap '' INT TERM HUP
    if [ -n "${running:-}" ]; then
        : >"$state/stop"
        xargs kill -INT <"$state/running" 2>/dev/null
        wait "$running" 2>/dev/null # 10 seconds at most: those of --kill-after
        stop_packing
        echo "interrupted" >>"$work/summary.txt"
        finished "$one"
    fi
    rm -rf "$work" "$state"
    exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP

# The CPU's kernels are compiled meanwhile: some checks ask them. Without them the rest goes on.
smoke() {
    (limited 60 "$python" setup.py -q build_ext --inplace >"$work/setup.log" 2>&1) &
    build=$!
    limited 50 "$python" -m bench.gpu_smoke
    code=$?
    wait "$build" || echo "setup.py: exit code $?, see setup.log"
    return "$code"
}

tests() {
    limited 160 "$python" -m bench.checks --device cuda --jobs "$jobs" --save "$work"
}

model() {
    limited 95 "$python" -m bench.gpu_model --save "$work" --size 1,4096 --size 1,131072
}

ops() {
    limited 125 "$python" -m bench --device cuda --op moe --op remask --op mamba2 --op adaln --op linear \
        --baselines best --save "$work" --name ops
}

attention() {
    limited 55 "$python" -m bench --device cuda --op attention --batch 1 --context 4096 --context 131072 \
        --baselines best --save "$work" --name attention
}

switches() {
    limited 45 "$python" -m bench.gpu_switches --save "$work"
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
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck synccheck racecheck; do
        echo "compute-sanitizer, $tool:"
        limited 30 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m bench.checks --device cuda --eager \
            --share 0 1 --only 'odd]' --only 'grouped]' --only 'sampled_filtered]' >"$work/$tool.log" 2>&1
        tail -n 15 "$work/$tool.log"
        grep -Eq '(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)' "$work/$tool.log" || code=1
    done
    return "$code"
}

case "$wanted" in
all) parts="smoke tests model ops attention switches" ;;
more) parts="profile sanitize" ;;
smoke | tests | model | ops | attention | switches | profile | sanitize) parts="$wanted" ;;
*)
    echo "expected all, more, smoke, tests, model, ops, attention, switches, profile or sanitize, got $wanted" >&2
    exit 64
    ;;
esac
for one in $parts; do
    part "$one"
done
rm -rf "$work" "$state"
exit "$failed"
