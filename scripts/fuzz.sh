#!/usr/bin/env bash
# Runs the fuzzers (tests/fuzz) for so many seconds each: scripts/fuzz.sh [SECONDS [NAME...]]. Needs clang-19 with its
# libFuzzer (Debian: clang-19 libclang-rt-19-dev). What they learn stays in build/fuzz/corpus; a finding, also a run
# that takes 30 s, stops it, and its input is in build/fuzz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly SECONDS_EACH=${1:-60}
shift || true
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(topology facts calls join gather)

cmake --preset fuzz >/dev/null && cmake --build --preset fuzz
for name in "${names[@]}"; do
    mkdir -p "build/fuzz/corpus/$name"
    seeds=()
    [ "$name" != topology ] || seeds=(tests/data/topology)
    "build/fuzz/tests/fuzz/${name}_fuzz" -max_total_time="$SECONDS_EACH" -timeout=30 -print_final_stats=1 -max_len=4096 \
        -artifact_prefix="build/fuzz/$name-" "build/fuzz/corpus/$name" "${seeds[@]}" 2>&1 | tail -n 12
done
