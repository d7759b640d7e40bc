#!/bin/sh
# Everything to be done with a GPU, in parts that are interrupted when they take too long:
#
#     bench/gpu.sh tests            every check of tests/gpu_checks.py, then some under compute-sanitizer; 6 minutes at most
#     bench/gpu.sh ops [FOLDER]     every operation beside its rivals, family by family; 8 minutes at most
#     bench/gpu.sh model [FOLDER]   the released model's size with random weights; 4 minutes at most
#
# Results go to FOLDER, bench/results/<the card's name> by default; what was measured before an interruption is saved.
# PYTHON (default python3) holds torch for CUDA, triton, cuda-core, pybind11, ninja and rich. No network is needed.
set -u
cd "$(dirname "$0")/.."
part="${1:?expected tests, ops or model}"
python="${PYTHON:-python3}"
status=0

# limited SECONDS COMMAND...: interrupted after so long, as by Ctrl-C, and killed if that does not help.
limited() {
    seconds="$1"
    shift
    timeout --signal INT --kill-after 10 "$seconds" "$@" || {
        echo "exit code $?: $*"
        status=1
    }
}

name='import torch; print(torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "-"))'
card="$("$python" -c "$name")" || exit 1
folder="${2:-bench/results/$card}"
"$python" setup.py -q build_ext --inplace || exit 1
case "$part" in
tests)
    limited 210 "$python" -m tests.gpu_checks --jobs "$(nproc)"
    # Small cases under the checkers of memory, races and barriers, side by side, where the machine has them.
    if command -v compute-sanitizer >/dev/null; then
        logs="$(mktemp -d)"
        for tool in memcheck racecheck synccheck; do
            limited 140 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m tests.gpu_checks \
                --only 'odd]' --only 'grouped]' --only 'sampled_filtered]' >"$logs/$tool" 2>&1 &
        done
        wait
        for tool in memcheck racecheck synccheck; do
            echo "compute-sanitizer, $tool:"
            tail -n 15 "$logs/$tool"
            grep -q 'ERROR SUMMARY: 0 errors' "$logs/$tool" || status=1
        done
    else
        echo "compute-sanitizer: not found, not run"
    fi
    ;;
ops)
    for family in moe attention remask mamba2 adaln linear; do
        case "$family" in
        attention) seconds=140 ;; # rivals are compiled for every shape
        remask) seconds=100 ;;
        *) seconds=50 ;;
        esac
        limited "$seconds" "$python" -m bench --device cuda --op "$family" --save "$folder" --name "$family"
    done
    ;;
model) limited 230 "$python" -m bench.gpu_model --save "$folder" ;;
*)
    echo "expected tests, ops or model, got $part" >&2
    exit 2
    ;;
esac
exit "$status"
