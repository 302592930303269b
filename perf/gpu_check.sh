#!/usr/bin/env bash
# The one command for a machine with a GPU: tests first, then the table of the CUDA path, in under 10 minutes.
# Writes gpu_tests.log, gpu_table.json and gpu_trace.json into $OUT (default: gpu-check); fails where a test does.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-gpu-check}
mkdir -p "$OUT"
workers=()
python3 -c 'import xdist' 2> /dev/null && workers=(-n 10)  # most of the time is compilation
# Interrupted, it still says what failed by then; by -k, no worker outlives its time and slows what is measured next.
timeout -s INT -k 15 "${TESTS:-245}" python3 -m pytest -q -m gpu --require-gpu -p no:cacheprovider --tb=short \
    --durations=10 "${workers[@]}" \
    tests/test_kernels.py tests/test_gpu.py > "$OUT/gpu_tests.log" 2>&1
tests=$?
grep -E '^(FAILED|ERROR)|^E  ' "$OUT/gpu_tests.log" | head -60
# No row begins after the budget; one that hangs is cut off, and what was measured by then is kept.
timeout -k 10 $((585 - SECONDS)) python3 -m perf.gpu_table --budget "${BUDGET:-230}" \
    --json "$OUT/gpu_table.json" --trace "$OUT/gpu_trace.json"
table=$?
echo "tests: $(tail -n 1 "$OUT/gpu_tests.log")"
exit $((tests ? tests : table))
