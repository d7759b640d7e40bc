#!/bin/sh
# Everything to be done with a GPU, each part in one call of at most 8 minutes: bench/gpu.sh {tests|ops|model} [FOLDER]
# PYTHON (default python3) holds torch for CUDA, triton, pybind11, ninja and rich. No network is needed.
set -eu
cd "$(dirname "$0")/.."
part="${1:?expected tests, ops or model}"
python="${PYTHON:-python3}"
card="$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower())')"
folder="${2:-bench/results/$card}"
"$python" setup.py -q build_ext --inplace
case "$part" in
tests)
    "$python" -m tests.gpu_checks
    # Small cases under the checkers of memory, races and barriers, where the machine has them.
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck; do
            compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m tests.gpu_checks \
                --only 'odd]' --only 'grouped]' --only 'sampled_filtered]'
        done
    else
        echo "compute-sanitizer: not found, not run"
    fi
    ;;
ops) "$python" -m bench --device cuda --save "$folder" ;;
model) "$python" -m bench.gpu_model --save "$folder" ;;
*)
    echo "expected tests, ops or model, got $part" >&2
    exit 2
    ;;
esac
