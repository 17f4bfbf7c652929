#!/usr/bin/env bash
# Runs the benchmarks of docs/benchmarks.md on a machine with an NVIDIA GPU, 125 GiB of RAM and 80 GB of GPU memory.
#   scripts/benchmarks.sh FOLDER [NAME...]
# Each benchmark leaves FOLDER/NAME.json; without names all run. The tables are printed as they come.
# TEXT=FILE and SMOLLM2=PATH add the default model's own weights over a text of 8,000 tokens.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
folder=${1:?"the first argument is the folder for the results"}
shift
mkdir -p "$folder"
wanted=" $* "

bench() {
  local name=$1
  shift
  if [[ $wanted != "  " && $wanted != *" $name "* ]]; then
    return
  fi
  echo "==> $name: ds-offload bench $*"
  if "$python" -m ds_offload bench "$@" --json >"$folder/$name.json" 2>"$folder/$name.log"; then
    "$python" scripts/benchmarks.py "$folder/$name.json"
  else
    echo "failed: $(grep -E '^ds-offload: (error|failed)' "$folder/$name.log" || tail -n 1 "$folder/$name.log")"
  fi
}

long=(--warm-ups 60 --steps 20 --hot-set 4)
short=(--warm-ups 40 --steps 16 --hot-set 4)
bench decode-7b-128k decode --model llama-2-7b --ctx 131000 "${long[@]}" \
  --variants ours,prefetch-exact,compute-only,no-hot-set,paper,unsorted,prefetch-speculative,no-graph
bench decode-8b-512k decode --model llama-3.1-8b --ctx 524000 --token-budget 2048 "${long[@]}" \
  --variants ours,prefetch-exact,compute-only
for tokens in 16k 32k 64k 128k 256k; do
  bench "context-8b-$tokens" decode --model llama-3.1-8b --ctx "$tokens" --token-budget 2048 "${short[@]}" \
    --variants compute-only
done
bench batch-8 decode --model llama-3.1-8b --ctx 32k --batch 8 "${short[@]}" --variants ours
bench batch-1 decode --model llama-3.1-8b --ctx 32k "${short[@]}" --variants ours
bench gpu-sparse decode --model llama-2-7b --ctx 16k --batch 4 --kv-location gpu --warm-ups 4 --steps 16 --variants ours
bench gpu-dense decode --model llama-2-7b --ctx 16k --batch 4 --kv-location gpu --warm-ups 4 --steps 16 --variants ours \
  --token-budget 1/1
bench int4-7b-256k decode --model llama-2-7b --ctx 256k --kv-dtype int4 --hot-set 2 --warm-ups 40 --steps 16 \
  --variants ours,compute-only
bench attention attention --batch 1,8,32 --ctx 4k,8k,16k,64k --samples 10
bench select select --samples 10
bench gather gather --samples 10
bench prefill prefill --model llama-2-7b --ctx 64k --repeats 1
bench transformers decode --model llama-2-7b --ctx 16k "${short[@]}" --variants ours --with-transformers
if [[ -n ${TEXT:-} ]]; then
  bench text decode --model "${SMOLLM2:-smollm2-135m}" --ctx 8000 --text "$TEXT" --warm-ups 60 --steps 60 \
    --variants ours,prefetch-exact,compute-only,paper
fi
