#!/usr/bin/env bash
# Everything that only a machine with a GPU can tell, in under 8 minutes, with neither cargo nor network. Build for it with
# scripts/gpu_prepare.sh first, which may happen on another machine of the same kind of processor.
#
#   scripts/gpu_check.sh [FOLDER]
#
# Writes FOLDER/<date>-<device>.json and .txt (benches/reports by default), and what the GPU has computed, to which CI then holds the
# emulator: FOLDER/<date>-<device>.bin, to be committed in tests/golden/gpu. A part that fails is told, and the next one runs.
#
# Exit codes: 0 all passed; 1 a part failed; 2 there is no GPU here, or nothing was prepared.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() {
  echo "$*" >&2
  exit 2
}

if [[ ! -e /dev/nvidiactl && ! -e /proc/driver/nvidia && ! -e /dev/dxg ]]; then
  refuse "there is no GPU here: this machine has no NVIDIA driver, so nothing was checked"
fi
tools=$PWD/target/gpu-check
ferrotron=$tools/ferrotron
for packed in "$tools"/*.gz; do
  if [[ -f $packed && ! -x ${packed%.gz} ]]; then
    gunzip -c "$packed" >"${packed%.gz}"
    chmod +x "${packed%.gz}"
  fi
done
[[ -x $ferrotron ]] || refuse "target/gpu-check has no programs: run scripts/gpu_prepare.sh, here or where Rust is, and bring the folder along"
doctor=$("$ferrotron" doctor 2>&1)
gpu=$(printf '%s\n' "$doctor" | sed -n 's/^gpu 0  *//p' | head -n 1)
[[ -n $gpu ]] || refuse "there is no GPU here that can be used: $(printf '%s\n' "$doctor" | grep -E '^(cuda|gpu) ' | head -n 1)"

readonly LIMIT=470
folder=${1:-benches/reports}
mkdir -p "$folder" || exit 1
device=$(printf '%s' "${gpu%%,*}" | tr -cs 'A-Za-z0-9.\n' '-' | tr 'A-Z' 'a-z')
date=$(date -u +%Y-%m-%d)
name=$date-${device%-}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
golden=$scratch/golden.bin
text=$scratch/report.txt
parts=()
failed=0

say() { printf '%s\n' "$*" | tee -a "$text"; }

quote() { # a JSON string
  printf '%s' "$1" | tr -d '\000-\011\013-\037' | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' | awk 'NR > 1 { printf "\\n" } { printf "%s", $0 } BEGIN { printf "\"" } END { printf "\"" }'
}

# part NAME SECONDS COMMAND...: runs it within its time and what is left of all, keeps what it says in $scratch/NAME.log, tells how it went.
part() {
  local name=$1 limit=$2 begin=$SECONDS code verdict
  shift 2
  if ((SECONDS + 5 >= LIMIT)); then
    verdict="not run: the time was over"
    code=1
    : >"$scratch/$name.log"
  else
    ((limit > LIMIT - SECONDS)) && limit=$((LIMIT - SECONDS))
    timeout --kill-after=5 "$limit" "$@" >"$scratch/$name.log" 2>&1
    code=$?
    case $code in
      0) verdict=passed ;;
      77) verdict="left out: $(tail -n 1 "$scratch/$name.log")" ;;
      124 | 137) verdict="FAILED: not done after $limit s" ;;
      *) verdict="FAILED with exit code $code" ;;
    esac
  fi
  ((code == 0 || code == 77)) || failed=1
  say "$(printf '%-14s %4d s  %s' "$name" $((SECONDS - begin)) "$verdict")"
  if ((code != 0 && code != 77)); then
    grep -aE 'panicked at|^error|because:|test result|ERROR SUMMARY|=========' -A 3 "$scratch/$name.log" | tail -n 24 | sed 's/^/    /' | tee -a "$text"
  fi
  parts+=("{\"part\": $(quote "$name"), \"verdict\": $(quote "$verdict"), \"seconds\": $((SECONDS - begin))}")
  return 0
}

# ---- the parts ----

twice_on_one_gpu() { # LAYOUT...: two ranks that share the GPU have the bits of one
  local run=$scratch/$1 common=(train configs/quickstart.toml --set device.kind=cuda --set train.stop_after=6 --set geometry.shards=2 --set geometry.lanes=2)
  local visible=${CUDA_VISIBLE_DEVICES:-0}
  shift
  export CUDA_VISIBLE_DEVICES=${visible%%,*}
  [[ -d $scratch/one/checkpoints ]] || "$ferrotron" "${common[@]}" --set "run.dir=$scratch/one" || return 1
  "$ferrotron" launch --nproc-per-node 2 "${common[@]}" --set "run.dir=$run" "$@" || return 1
  "$ferrotron" checkpoint diff "$scratch/one/checkpoints/step-00000006" "$run/checkpoints/step-00000006" | tee "$run/diff"
  grep -q 'tensors are equal' "$run/diff"
}

all_ranks() {
  twice_on_one_gpu tensor --set parallel.tp=2 && twice_on_one_gpu pipeline --set parallel.pp=2 &&
    twice_on_one_gpu zero --set parallel.dp_shard=2 --set parallel.zero=3
}

quickstart() { # 20 steps on the GPU, and the same on the CPU: losses within a hundredth
  local kind
  for kind in cuda cpu; do
    "$ferrotron" train configs/quickstart.toml --set device.kind=$kind --set train.stop_after=20 --set "run.dir=$scratch/quick-$kind" || return 1
  done
  paste <(losses cuda) <(losses cpu) | tee "$scratch/losses" | awk '
    { d = $1 - $2; d = d < 0 ? -d : d; steps++; if (d > 0.01 * $2) { print "step " NR ": loss " $1 ", on the cpu " $2; bad = 1 } }
    END { if (steps != 20) { print "error: " steps " losses, not 20"; bad = 1 } exit bad }'
}

losses() { grep -o '"loss":[^,}]*' "$scratch/quick-$1/metrics.jsonl" | cut -d: -f2; }

sanitizer() {
  local program
  program=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
  [[ -n $program ]] || { echo "no compute-sanitizer here"; return 77; }
  local tool
  for tool in memcheck racecheck; do
    FERROTRON_GPU=only "$program" --tool $tool --error-exitcode 3 "$tools/parity" --test-threads=1 what_is_not_finite awkward || return 1
    FERROTRON_GPU=only "$program" --tool $tool --error-exitcode 3 "$tools/instructions" --test-threads=1 || return 1
  done
}

beside_torch() {
  python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { echo "no PyTorch that sees the GPU"; return 77; }
  local model
  for model in "gpt2-124m 16 1024" "llama-1b 4 2048"; do
    set -- $model
    local common=(--device cuda --model "$1" --rows "$2" --time "$3" --dtype bf16 --steps 10 --seconds 8)
    "$tools/step" --json "${common[@]}" || return 1
    python3 benches/peers/peers_torch.py "${common[@]}" || return 1
    # The compiler of PyTorch has needs of its own; without it there is one line less.
    python3 benches/peers/peers_torch.py --compile "${common[@]}" || echo "torch.compile did not work"
  done
}

export -f twice_on_one_gpu all_ranks quickstart losses sanitizer beside_torch
export ferrotron tools scratch

say "ferrotron $(cat "$tools/commit" 2>/dev/null), $date, $gpu"
say "driver: $(printf '%s\n' "$doctor" | sed -n 's/^nvidia driver  *//p'); $(printf '%s\n' "$doctor" | sed -n 's/^cuda  *//p'); cuBLASLt $(printf '%s\n' "$doctor" | sed -n 's/^libcublaslt  *//p')"
say ""
part instructions 60 env FERROTRON_GPU=1 FERROTRON_RECORD="$golden" "$tools/instructions" --nocapture
part parity 150 env FERROTRON_GPU=1 FERROTRON_RECORD="$golden" "$tools/parity" --nocapture
part steps 90 env FERROTRON_GPU=1 "$tools/emulated" --nocapture --test-threads=1
part quickstart 60 bash -c quickstart
part ranks 60 bash -c all_ranks
part bench 110 "$ferrotron" bench --device cuda --json
part sanitizer 110 bash -c sanitizer
part torch 120 bash -c beside_torch

# ---- the report ----

lines() { # the JSON objects of a part's log, as the elements of an array
  grep -a '^{' "$scratch/$1.log" 2>/dev/null | paste -sd, -
}

bits() { # HAS: how many results of a part have, or have not, the bits of the emulator
  cat "$scratch/instructions.log" "$scratch/parity.log" 2>/dev/null | grep -ac ": $1 the emulator's bits"
}

say ""
say "results with the emulator's bits: $(bits has), with others: $(bits 'has not')"
if [[ -s $golden ]]; then
  cp "$golden" "$folder/$name.bin"
  say "what the GPU computed: $name.bin, $(wc -c <"$golden") bytes, for tests/golden/gpu"
fi
if [[ -n $(lines bench) ]]; then
  say ""
  say "times by the clock; shares of a copy's bandwidth or of a square product's rate in the same run"
  grep -a '^{' "$scratch/bench.log" | sed -E 's/.*"dtype":"([^"]*)".*"limit_per_second":([^,]*).*"operation":"([^"]*)".*"seconds":([^,]*).*"share":([^,]*).*/\3|\1|\4|\5/' |
    awk -F'|' 'NF == 4 { printf "%-56s %5s %10.1f us  %4.0f %%\n", $1, $2, $3 * 1e6, $4 * 100 }' | tee -a "$text"
fi
if [[ -n $(lines torch) ]]; then
  say ""
  say "whole steps, by the clock"
  grep -a '^{' "$scratch/torch.log" | tr -d ' ' | awk '
    function key(name, s) { s = $0; if (!sub(".*\"" name "\":\"?", "", s)) return ""; sub("[\",}].*", "", s); return s }
    { printf "%-10s %-10s %-5s %s x %s: %s tokens/s%s\n", key("peer"), key("model"), key("dtype"), key("rows"), key("time"), key("tokens_per_s"),
      key("compiled") == "true" ? ", compiled" : "" }' | tee -a "$text"
fi
say ""
say "$( ((failed)) && echo "a part FAILED" || echo "all passed"), $SECONDS s"
{
  printf '{"date": %s, "device": %s, "commit": %s,\n' "$(quote "$date")" "$(quote "$gpu")" "$(quote "$(cat "$tools/commit" 2>/dev/null)")"
  printf ' "doctor": %s,\n "passed": %s,\n' "$(quote "$doctor")" "$( ((failed)) && echo false || echo true)"
  printf ' "parts": [%s],\n' "$(IFS=,; echo "${parts[*]}")"
  printf ' "equal_to_emulator": %s, "other_than_emulator": %s,\n' "$(bits has)" "$(bits 'has not')"
  printf ' "bench": [%s],\n "steps": [%s]}\n' "$(lines bench)" "$(lines torch)"
} >"$folder/$name.json"
cp "$text" "$folder/$name.txt"
exit $failed
