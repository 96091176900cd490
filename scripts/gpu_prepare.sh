#!/usr/bin/env bash
# Builds what scripts/gpu_check.sh runs, and puts it into target/gpu-check: stripped and packed, at most 40 MiB. Needs Rust and no GPU.
#
#   scripts/gpu_prepare.sh                     here
#   scripts/gpu_check.sh                       on the machine with the GPU, in a copy of this folder that has target/gpu-check
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

to=target/gpu-check
programs=(ferrotron parity emulated instructions step)
# One build, in which the tests bring the program along; each file is where cargo says.
built=$(cargo test --release --locked --no-run --message-format=json-render-diagnostics --test parity --test emulated --test instructions \
  --test cli --bench step)
rm -rf "$to"
mkdir -p "$to"
for program in "${programs[@]}"; do
  file=$(printf '%s\n' "$built" | python3 -c '
import json, sys
lines = [json.loads(line) for line in sys.stdin if line.startswith("{")]
files = [line["executable"] for line in lines if line.get("executable") and line["target"]["name"] == sys.argv[1] and (
    line["target"]["kind"] == ["bin"] or not sys.argv[1] == "ferrotron")]
print(files[-1] if files else sys.exit(f"cargo has built no {sys.argv[1]}"))' "$program")
  cp "$file" "$to/$program"
done
for program in "${programs[@]}"; do
  strip "$to/$program"
  gzip -9 "$to/$program"
done
git rev-parse --short HEAD >"$to/commit" 2>/dev/null || echo unknown >"$to/commit"
size=$(du -sm "$to" | cut -f1)
if ((size > 40)); then
  echo "$to takes $size MiB, more than the 40 that it may" >&2
  exit 1
fi
echo "$to: $size MiB"
