#!/usr/bin/env bash
# Runs all tests. Needs Python 3.11 or newer; makes .venv first. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
install_project test
exec "$VENV/bin/python" -m pytest "$@"
