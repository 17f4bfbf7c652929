#!/usr/bin/env bash
# Checks the runtime on a machine with an NVIDIA GPU and prints a short summary.
#   scripts/gpu_check.sh [SUMMARY.md]
# SMOLLM2=PATH names another copy of the default model (a folder or a .gguf file) where there is no network.
# JOBS=N runs the tests of N files at a time (default 8); LOGS=FOLDER keeps what each file's tests printed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export python=${PYTHON:-python3}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: no CUDA device that torch can use; nothing was checked" >&2
  exit 2
fi

# Most of a test's time is compiling kernels, which one process does one after the other.
LOGS=${LOGS:-$(mktemp -d)}
export LOGS
mkdir -p "$LOGS"
run_file() {
  log=$LOGS/$(tr / _ <<<"${1#tests/}").log
  if ! "$python" -m pytest -q -m gpu -p no:cacheprovider "$1" >"$log" 2>&1; then
    echo "$1" >>"$LOGS/failed"
  fi
  echo "$1: $(tail -n 1 "$log")"
}
export -f run_file
rm -f "$LOGS/failed"
grep -rlE 'mark\.gpu' --include='test_*.py' tests | sort | xargs -P "${JOBS:-8}" -I{} bash -c 'run_file {}'
if [[ -s $LOGS/failed ]]; then
  while read -r file; do
    echo "==> $file"
    grep -E '^(E  |FAILED|ERROR)' "$LOGS/$(tr / _ <<<"${file#tests/}").log" | head -n 20
  done <"$LOGS/failed"
  exit 1
fi
"$python" scripts/gpu_check.py --smollm2 "${SMOLLM2:-smollm2-135m}" ${1:+--summary "$1"}
