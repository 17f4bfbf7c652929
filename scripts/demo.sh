#!/usr/bin/env bash
# Asks the default model a question over a document that comes with the project, its KV cache in host memory.
# Needs Python 3.11 or newer; makes .venv first. Arguments go to `ds-offload run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh
install_project ""
set -- --prompt-file ds_offload/data/jargon_file.txt --question "In which year was the Jargon File begun?" \
    --max-new-tokens 64 "$@"
command="ds-offload run"
for word in "$@"; do
    case $word in
        *[!A-Za-z0-9_./:=-]*) command+=" ${word@Q}" ;;
        *) command+=" $word" ;;
    esac
done
say "==> $command"
exec "$VENV/bin/python" -m ds_offload run "$@"
