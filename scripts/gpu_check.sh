#!/usr/bin/env bash
# Checks the runtime on a machine with an NVIDIA GPU and prints a short summary.
#   scripts/gpu_check.sh [SUMMARY.md]
# SMOLLM2=PATH names another copy of the default model (a folder or a .gguf file) where there is no network.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: no CUDA device that torch can use; nothing was checked" >&2
  exit 2
fi
"$python" -m pytest -q -m gpu -p no:cacheprovider tests
"$python" scripts/gpu_check.py --smollm2 "${SMOLLM2:-smollm2-135m}" ${1:+--summary "$1"}
