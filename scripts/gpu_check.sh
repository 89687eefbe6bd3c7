#!/usr/bin/env bash
# One command for a machine with NVIDIA GPUs, nvcc, CMake and Ninja: builds, tests, looks for bad accesses and races,
# and measures. Logs go to build/gpu-check. A short table comes last; it exits with 1 if anything failed.
#
#   MEP_GTEST_SOURCE_DIR   GoogleTest's sources, where it is not installed
#   MEP_CUDA_ARCHITECTURES default: native
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

readonly DIR=$PWD/build/gpu-check
readonly SHAPES=(
    # ranks tokens hidden experts topk type weights
    "2 1 7168 256 8 bf16 dispatch"
    "2 32 7168 256 8 bf16 dispatch"
    "2 128 7168 256 8 fp8 dispatch"
    "2 128 7168 256 8 bf16 dispatch"
    "2 128 7168 256 8 bf16 combine"
    "2 512 7168 256 8 bf16 dispatch"
    "2 2048 7168 16 2 bf16 dispatch"
    "2 2048 7168 16 4 bf16 dispatch"
    "2 4096 7168 256 8 fp8 dispatch"
    "2 4096 7168 256 8 bf16 dispatch"
)
mkdir -p "$DIR"
table=()
failed=0

# step NAME SECONDS_MAX COMMAND...
step() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    # The function, in a shell of its own that the deadline can end.
    if timeout -k 10 "$limit" bash -c "$(declare -p DIR SHAPES; declare -f "$1"); \"\$@\"" bash "$@" \
        >"$DIR/$name.log" 2>&1; then
        table+=("$(printf '%-12s %4d s  ok' "$name" $((SECONDS - start)))")
    else
        failed=1
        tail -n 40 "$DIR/$name.log"
        table+=("$(printf '%-12s %4d s  FAILED, see %s' "$name" $((SECONDS - start)) "$DIR/$name.log")")
    fi
}

build() {
    local options=(-DMEP_CUDA=ON -DMEP_BUILD_BENCHMARKS=ON -DCMAKE_BUILD_TYPE=Release
        "-DCMAKE_CUDA_ARCHITECTURES=${MEP_CUDA_ARCHITECTURES:-native}")
    [ -z "${MEP_GTEST_SOURCE_DIR:-}" ] || options+=("-DMEP_GTEST_SOURCE_DIR=$MEP_GTEST_SOURCE_DIR")
    cmake -S . -B "$DIR/native" -G Ninja "${options[@]}" && cmake --build "$DIR/native"
}

tests() {
    ctest --test-dir "$DIR/native" --output-on-failure -j "$(nproc)" -E '^gpu_test' &&
        "$DIR/native/tests/native/gpu_test" # alone: others would share its GPUs
}

# The Python package over the library just built, beside the sources.
python_tests() {
    rm -rf "$DIR/python" && mkdir -p "$DIR/python" && cp -r python/mooncake_ep "$DIR/python/" &&
        python3 tools/gen_ffi.py include/mooncake_ep.h "$DIR/python/mooncake_ep" &&
        cp -L "$DIR/native/libmooncake_ep.so" "$DIR/python/mooncake_ep/" &&
        PYTHONPATH="$DIR/python${PYTHONPATH:+:$PYTHONPATH}" python3 -m pytest -q tests/python/gpu
}

# One rank: a tool that slows a kernel down a hundred times would make its peers miss their deadlines.
sanitize() {
    compute-sanitizer --tool "$1" --error-exitcode 1 "$DIR/native/tests/native/gpu_test" \
        --gtest_filter='Cuda.PassesUnderASanitizer'
}

bench() {
    local shape
    for shape in "${SHAPES[@]}"; do
        # shellcheck disable=SC2086
        timeout 60 "$DIR/native/benchmarks/gpu_bench" $shape || return
    done
}

nvidia-smi -L || { echo "no NVIDIA GPU here"; exit 1; }
step build 600 build
step tests 600 tests
if python3 -c 'import cffi, pytest, torch' 2>/dev/null; then
    step python_tests 300 python_tests
else
    table+=("python_tests: skipped, python3 has not all of cffi, pytest and torch")
fi
if command -v compute-sanitizer >/dev/null; then
    step memcheck 200 sanitize memcheck
    step racecheck 200 sanitize racecheck
else
    table+=("memcheck, racecheck: skipped, no compute-sanitizer")
fi
step bench 400 bench
echo
[ ! -f "$DIR/bench.log" ] || cat "$DIR/bench.log"
echo
grep -hE 'tests passed|PASSED|SKIPPED' "$DIR/tests.log"
[ ! -f "$DIR/python_tests.log" ] || tail -n 1 "$DIR/python_tests.log"
git log -1 --format='commit %h' 2>/dev/null
printf '%s\n' "${table[@]}"
exit $failed
