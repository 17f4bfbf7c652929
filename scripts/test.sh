#!/usr/bin/env bash
# Runs all tests, as many at a time as there are cores, at most 4. Needs Python 3.11 or newer; makes .venv first.
# Arguments go to pytest; `-n 0` runs one test after the other, in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
install_project test
# Each process would start as many threads as there are cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$VENV/bin/python" -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
