#!/usr/bin/env bash
# Runs the benchmarks of docs/benchmarks.md on a machine with an NVIDIA GPU, 125 GiB of RAM and 80 GB of GPU memory.
#   scripts/benchmarks.sh FOLDER [PART|NAME...]
# The parts are headline, long, contexts, batches, quantised, attention, kernels, prefill, runs, transformers, text,
# sessions and sanitizer; without any all run. Each benchmark leaves FOLDER/NAME.json; the tables are printed as they come.
# TEXT=FILE is what the default model reads (default: these docs), SMOLLM2=PATH another copy of it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
folder=${1:?"the first argument is the folder for the results"}
shift
mkdir -p "$folder"
wanted=" $* "

is_wanted() {
  [[ $wanted == "  " || $wanted == *" $part "* || $wanted == *" $1 "* ]]
}

# measure NAME COMMAND...: its output is NAME.json.
measure() {
  local name=$1
  shift
  if "$@" >"$folder/$name.json" 2>"$folder/$name.log"; then
    return
  fi
  echo "failed: $(grep -E '^ds-offload: (error|failed)' "$folder/$name.log" || tail -n 1 "$folder/$name.log")"
  return 1
}

bench() {
  local name=$1
  shift
  is_wanted "$name" || return 0
  echo "==> $name: ds-offload bench $*"
  if measure "$name" "$python" -m ds_offload bench "$@" --json; then
    "$python" scripts/benchmarks.py "$folder/$name.json"
  fi
}

long=(--warm-ups 60 --steps 20 --hot-set 4)
short=(--warm-ups 40 --steps 16 --hot-set 4)

part=headline
bench decode-7b-128k decode --model llama-2-7b --ctx 131000 "${long[@]}" \
  --variants ours,prefetch-exact,compute-only,no-hot-set,paper,unsorted,prefetch-speculative,no-graph

part=long
bench decode-8b-512k decode --model llama-3.1-8b --ctx 524000 --token-budget 2048 "${long[@]}" \
  --variants ours,prefetch-exact,compute-only

part=contexts
for tokens in 16k 32k 64k 128k 256k; do
  bench "context-8b-$tokens" decode --model llama-3.1-8b --ctx "$tokens" --token-budget 2048 "${short[@]}" \
    --variants compute-only
done

part=batches
bench batch-8 decode --model llama-3.1-8b --ctx 32k --batch 8 "${short[@]}" --variants ours
bench batch-1 decode --model llama-3.1-8b --ctx 32k "${short[@]}" --variants ours
resident=(--model llama-2-7b --ctx 16k --batch 4 --kv-location gpu --warm-ups 4 --steps 16 --variants ours)
bench gpu-sparse decode "${resident[@]}"
bench gpu-dense decode "${resident[@]}" --token-budget 1/1

part=quantised
bench int4-7b-256k decode --model llama-2-7b --ctx 256k --kv-dtype int4 --hot-set 2 --gpu-memory 24GiB --warm-ups 40 \
  --steps 16 --variants ours,compute-only
bench int8-7b-256k decode --model llama-2-7b --ctx 256k --kv-dtype int8 --gpu-memory 40GiB "${short[@]}" \
  --variants ours,compute-only
bench int4-8b-1m decode --model llama-3.1-8b --ctx 1000000 --kv-dtype int4 --token-budget 2048 "${short[@]}" \
  --variants ours,compute-only

part=attention
bench attention-short attention --batch 1,8,32 --ctx 4k,8k --samples 10
bench attention-long attention --batch 1,8,32 --ctx 16k,64k --samples 10
for share in 32 64; do
  bench "attention-1-$share" attention --batch 32 --ctx 64k --token-budget "1/$share" --samples 5
done

part=kernels
bench select select --samples 10
bench select-128k select --ctx 128k --samples 10
bench select-512k select --rows 8 --ctx 512k --token-budget 2048 --samples 10
bench gather gather --samples 10

part=prefill
bench prefill-64k prefill --model llama-2-7b --ctx 64k --repeats 1
bench prefill-128k prefill --model llama-2-7b --ctx 128k --repeats 1
bench prefill-64k-int4 prefill --model llama-2-7b --ctx 64k --kv-dtype int4 --repeats 1

# run NAME TOKENS OPTION...: a prompt of so many bytes, which are tokens where weights are random, and 32 new tokens.
run() {
  local name=$1 tokens=$2
  shift 2
  is_wanted "$name" || return 0
  echo "==> $name: ds-offload run, $tokens tokens, $*"
  yes "A line of a prompt that means nothing." | head -c "$tokens" >"$folder/$name.txt" || true
  if measure "$name" "$python" -m ds_offload run --load-format dummy --prompt-file "$folder/$name.txt" \
    --max-new-tokens 32 --json "$@"; then
    "$python" scripts/benchmarks.py "$folder/$name.json"
  fi
  rm -f "$folder/$name.txt"
}

part=runs
run run-7b-256k 262000 --model llama-2-7b --ctx 256k --gpu-memory 24GiB
run run-7b-16k 16000 --model llama-2-7b --ctx 16k
run run-7b-128k 131000 --model llama-2-7b --ctx 128k
run run-8b-256k 262000 --model llama-3.1-8b --ctx 256k
run run-8b-512k 524000 --model llama-3.1-8b --ctx 512k --token-budget 2048
run run-8b-512k-int8 524000 --model llama-3.1-8b --ctx 512k --token-budget 2048 --kv-dtype int8
run run-8b-512k-int4 524000 --model llama-3.1-8b --ctx 512k --token-budget 2048 --kv-dtype int4

part=transformers
bench transformers decode --model llama-2-7b --ctx 16k "${short[@]}" --variants ours --with-transformers
bench transformers-prefill prefill --model llama-2-7b --ctx 64k --repeats 1 --with-transformers

part=text
text=${TEXT:-$folder/text.txt}
if [[ -z ${TEXT:-} ]]; then
  cat README.md docs/*.md >"$text"
fi
bench text-8k decode --model "${SMOLLM2:-smollm2-135m}" --ctx 8000 --text "$text" --warm-ups 60 --steps 60 \
  --variants ours,prefetch-exact,compute-only,paper
# What a hot set finds in a long text: TEXT must have 64,000 tokens, which these docs have not.
for hot_set in 1.25 2 4; do
  bench "text-64k-$hot_set" decode --model smollm2-135m-64k --dtype bf16 --ctx 64000 --text "$text" --hot-set "$hot_set" \
    --warm-ups 60 --steps 60 --variants ours
done

part=sessions
sessions() {
  local name=$1
  shift
  is_wanted "$name" || return 0
  echo "==> $name: scripts/bench_sessions.py $*"
  if measure "$name" "$python" scripts/bench_sessions.py --model llama-2-7b --load-format dummy --folder "$folder" "$@"; then
    cat "$folder/$name.json"
  fi
}
sessions sessions-16k --ctx 16k
sessions sessions-128k --ctx 128k --no-disk
sessions sessions-128k-int4 --ctx 128k --kv-dtype int4

# Every kernel of a step, whose reads and writes are checked one by one: many minutes at a large size.
part=sanitizer
if is_wanted memcheck; then
  sanitizer=$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer || true)
  if [[ -z $sanitizer ]]; then
    echo "==> memcheck: left out, compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
  else
    echo "==> memcheck: ds-offload bench decode under compute-sanitizer"
    if measure memcheck "$sanitizer" --tool memcheck --error-exitcode 1 --log-file "$folder/memcheck.txt" \
      "$python" -m ds_offload bench decode --model smollm2-135m --ctx 18k --batch 2 --warm-ups 3 --steps 1 \
      --variants ours,prefetch-exact --json; then
      echo "no errors: $(tail -n 1 "$folder/memcheck.txt")"
    else
      tail -n 3 "$folder/memcheck.txt"
    fi
  fi
fi
