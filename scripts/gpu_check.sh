#!/usr/bin/env bash
# One command for a machine with NVIDIA GPUs, nvcc, CMake and Ninja: builds, tests, looks for bad accesses and races,
# and measures. Logs go to build/gpu-check. A short table comes last; it exits with 1 if anything failed.
#
#   --ranks N              measure so many ranks, with a GPU each, and use only these GPUs; default: 2 ranks, and all GPUs
#                          that there are. The tests have 1 to 8 ranks in any case, which share GPUs where there are fewer
#
#   MEP_GTEST_SOURCE_DIR   GoogleTest's sources, where it is not installed
#   MEP_CUDA_ARCHITECTURES default: native
#   MEP_GPU_CHECK_STEPS    which steps to run, after the build; default: native gpu python api faults far memcheck
#                          racecheck bench link peers far_peers; far: the API where no memory of a peer is reached; far_peers: beside NCCL so;
#                          maca: MACA's kernels, by its shim over CUDA (tests/maca), against the CPU bit for bit; soak: rounds
#                          for a long time, with kills
#   MEP_FAULTS             how many schedules of faults; default: 20
#   MEP_SOAK_ROUNDS        default: 100000
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

RANKS=2
if [ "${1:-}" = --ranks ] && [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] && [ $# -eq 2 ]; then
    RANKS=$2
elif [ $# -ne 0 ]; then
    echo "usage: $0 [--ranks N]"
    exit 2
fi
readonly DIR=$PWD/build/gpu-check RANKS
readonly SHAPES=(
    # tokens hidden experts topk type weights multiprocessors
    "1 7168 256 8 bf16 dispatch"
    "32 7168 256 8 bf16 dispatch"
    "128 7168 256 8 fp8 dispatch"
    "128 7168 256 8 fp8_column dispatch"
    "128 7168 256 8 bf16 dispatch"
    "128 7168 256 8 bf16 combine"
    "512 7168 256 8 bf16 dispatch"
    "2048 7168 16 2 bf16 dispatch"
    "2048 7168 16 4 bf16 dispatch"
    "256 7168 256 8 bf16 dispatch"
    "1024 7168 256 8 bf16 dispatch"
    "2048 7168 256 8 bf16 dispatch"
    "1024 7168 256 8 fp8 dispatch"
    "1024 7168 256 8 fp8_column dispatch"
    "4096 7168 256 8 fp8 dispatch"
    "4096 7168 256 8 fp8_column dispatch"
    "4096 7168 256 8 bf16 dispatch"
    "4096 7168 256 8 bf16 dispatch 32"
)
mkdir -p "$DIR"
rm -f "$DIR"/*.log
table=()
failed=0

# step NAME SECONDS_MAX COMMAND...
step() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    # The function, in a shell of its own that the deadline can end.
    if timeout -k 10 "$limit" bash -c "$(declare -p DIR RANKS SHAPES; declare -f); \"\$@\"" bash "$@" \
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

native() { ctest --test-dir "$DIR/native" --output-on-failure -j "$(nproc)" -E '^(gpu|[a-z]*_cuda)_test'; }
# Alone: others would share its GPUs.
gpu() { "$DIR/native/tests/native/gpu_test" && "$DIR/native/tests/native/api_cuda_test"; }
# Ranks that are killed, stopped and replaced, on GPUs.
faults() {
    "$DIR/native/tests/native/update_cuda_test" &&
        MEP_FAULTS=${MEP_FAULTS:-20} "$DIR/native/tests/native/faults_cuda_test"
}

# The Python package over the library just built, beside the sources; and what it needs to be found.
use_python_package() {
    rm -rf "$DIR/python" && mkdir -p "$DIR/python" && cp -r python/mooncake_ep "$DIR/python/" &&
        python3 tools/gen_ffi.py include/mooncake_ep.h "$DIR/python/mooncake_ep" &&
        cp -L "$DIR/native/libmooncake_ep.so" "$DIR/python/mooncake_ep/" &&
        export PYTHONPATH="$DIR/python${PYTHONPATH:+:$PYTHONPATH}"
}

python() { use_python_package && python3 -m pytest -q tests/python/gpu; }

# The tests of the API, which otherwise run on the CPU.
api() {
    use_python_package && python3 -m pytest -q --backend cuda tests/python/test_dispatch.py \
        tests/python/test_rounds.py tests/python/test_quant.py tests/python/test_buffer.py
}

# torch's NCCL, where the system has none.
find_nccl() {
    local found
    found=$(python3 -c 'import glob, nvidia
print(*(f for p in nvidia.__path__ for f in glob.glob(p + "/nccl/lib/libnccl.so*")))') || return 0
    [ -z "$found" ] || export MOONCAKE_EP_NCCL_LIBRARY="${MOONCAKE_EP_NCCL_LIBRARY:-${found%% *}}"
}

# The same where no memory of a peer is reached, by NCCL, or of more ranks than GPUs through host memory; and where only
# pairs of ranks reach each other's.
far() {
    use_python_package && find_nccl && MOONCAKE_EP_ISLAND_RANKS=2 "$DIR/native/tests/native/api_cuda_test" &&
        "$DIR/native/tests/native/gpu_test" --gtest_filter='*ByNccl' &&
        export MOONCAKE_EP_DISABLE_P2P=1 && "$DIR/native/tests/native/api_cuda_test" &&
        python3 -m pytest -q --backend cuda tests/python/test_dispatch.py tests/python/test_rounds.py
}
far_peers() {
    use_python_package && MOONCAKE_EP_DISABLE_P2P=1 timeout 100 python3 benchmarks/peers/compare.py --peers nccl \
        --tokens 2048 --hidden 7168 --experts 16 --topk 2
}

# One rank: a tool that slows a kernel down a hundred times would make its peers miss their deadlines.
# Messages by line, where they may go so; by flag, by bulk copies and by the lanes.
sanitize() {
    local way
    for way in "1 1" "0 1" "0 0"; do
        MOONCAKE_EP_LINES=${way% *} MOONCAKE_EP_BULK_COPIES=${way#* } \
            compute-sanitizer --tool "$1" --error-exitcode 1 \
            "${@:3}" "$DIR/native/tests/native/gpu_test" --gtest_filter="$2" || return
    done
}
# Ranks that are threads ask for peer access more than once, which is no error.
memcheck() {
    sanitize memcheck Cuda.PassesUnderASanitizer &&
        sanitize memcheck Cuda.SurvivesGarbageInALiveWindow --report-api-errors no
}
racecheck() { sanitize racecheck Cuda.PassesUnderASanitizer; }

# Not MACA: its kernels and its host code, over CUDA's runtime and pairs of warps. These GPUs are none of MetaX's, so that
# no pair of them is near.
maca() {
    export MOONCAKE_EP_MACA_ALLOW_NODE_P2P=1
    local options=(-DMEP_CUDA=ON -DMEP_MACA_SHIM=ON -DMEP_MACA_FP8=ON -DCMAKE_BUILD_TYPE=Release
        "-DCMAKE_CUDA_ARCHITECTURES=${MEP_CUDA_ARCHITECTURES:-native}")
    [ -z "${MEP_GTEST_SOURCE_DIR:-}" ] || options+=("-DMEP_GTEST_SOURCE_DIR=$MEP_GTEST_SOURCE_DIR")
    cmake -S . -B "$DIR/maca" -G Ninja "${options[@]}" &&
        cmake --build "$DIR/maca" --target gpu_maca_test api_maca_test &&
        "$DIR/maca/tests/native/gpu_maca_test" &&
        "$DIR/maca/tests/native/api_maca_test"
}

peers() {
    use_python_package || return
    local shape
    for shape in "--tokens 128 --experts 256 --topk 8 --payload fp8" "--tokens 128 --experts 256 --topk 8" \
        "--tokens 2048 --experts 16 --topk 2"; do
        # shellcheck disable=SC2086
        timeout 100 python3 benchmarks/peers/compare.py --ranks "$RANKS" --hidden 7168 $shape || return
    done
}

bench() {
    local shape
    for shape in "${SHAPES[@]}"; do
        # shellcheck disable=SC2086
        timeout 60 "$DIR/native/benchmarks/gpu_bench" "$RANKS" $shape || return
    done
}

# How much of what a peer copy carries the links carry.
link() {
    use_python_package || return
    local payload
    for payload in bf16 fp8; do
        timeout 100 python3 -m mooncake_ep bench --device cuda --world-size "$RANKS" --tokens 4096 --hidden 7168 \
            --experts 256 --topk 8 --payload $payload --rounds 100 || return
    done
}

soak() {
    use_python_package && PYTHONPATH=$PYTHONPATH:$PWD/tests/python python3 tests/python/soak.py --backend cuda \
        --ranks $((RANKS < 3 ? RANKS : 3)) --rounds "${MEP_SOAK_ROUNDS:-100000}"
}

nvidia-smi -L || { echo "no NVIDIA GPU here"; exit 1; }
if [ $# -ne 0 ]; then
    [ "$(nvidia-smi -L | grep -c ^GPU)" -ge "$RANKS" ] || { echo "$RANKS ranks were asked for, with a GPU each"; exit 1; }
    export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((RANKS - 1)))}"
fi
step build 600 build
for name in ${MEP_GPU_CHECK_STEPS-native gpu python api faults far memcheck racecheck bench link peers far_peers}; do
    case $name in
        python | api | far | link | soak | peers | far_peers)
            python3 -c 'import cffi, pytest, torch' 2>/dev/null ||
                { table+=("$name: skipped, python3 has not all of cffi, pytest and torch"); continue; }
            ;;
        memcheck | racecheck)
            command -v compute-sanitizer >/dev/null ||
                { table+=("$name: skipped, no compute-sanitizer"); continue; }
            ;;
    esac
    step "$name" 900 "$name"
done
echo
for name in bench link soak peers far_peers; do
    [ ! -f "$DIR/$name.log" ] || cat "$DIR/$name.log"
done
echo
for name in native gpu maca faults far; do
    [ ! -f "$DIR/$name.log" ] || grep -hE 'tests passed|PASSED|SKIPPED|FAILED' "$DIR/$name.log"
done
for name in python api far; do
    [ ! -f "$DIR/$name.log" ] || tail -n 1 "$DIR/$name.log"
done
git log -1 --format='commit %h' 2>/dev/null
printf '%s\n' "${table[@]}"
exit $failed
