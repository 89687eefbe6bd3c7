#!/usr/bin/env bash
# Builds and tests everything, on a fresh Debian or Ubuntu with Python >= 3.10 too: what is missing
# is installed by apt (as root or by sudo) and into build/venv by pip. Logs go to build/logs.
#
#   MEP_TEST_STAGES      which stages to run; default: default asan tsan wheel python cuda maca lint
#   MEP_TEST_FRAMEWORKS  what pip installs for the Python tests, which skip what is not there;
#                        default: torch==2.13.0 transformers==5.24.0 jax mpi4py mpich
#   PYTHON               the interpreter of build/venv; default: python3
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

readonly STAGES=${MEP_TEST_STAGES-default asan tsan wheel python cuda maca lint}
readonly FRAMEWORKS=${MEP_TEST_FRAMEWORKS-torch==2.13.0 transformers==5.24.0 jax mpi4py mpich}
readonly PYTHON=${PYTHON:-python3}
readonly LOGS=$PWD/build/logs VENV=$PWD/build/venv
readonly CMAKE_VERSION_MIN=3.25
readonly SKIPPED=77
readonly FRAMEWORK_SECONDS_MAX=300 TESTS_SECONDS_MAX=1200
JOBS=$(nproc)
readonly JOBS

have() { command -v "$1" >/dev/null 2>&1; }

skip() {
    echo "skipped: $1"
    return $SKIPPED
}

# ---- Set-up ---------------------------------------------------------------------------------------

# Prints the Debian packages that are not there.
missing_packages() {
    have "${CXX:-g++}" || echo g++
    have cmake || echo cmake
    have ninja || echo ninja-build
    have pkg-config || echo pkg-config
    have "$PYTHON" || echo python3
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    compgen -G '/usr/*/lib/cmake/GTest/GTestConfig.cmake' >/dev/null ||
        compgen -G '/usr/lib/*/cmake/GTest/GTestConfig.cmake' >/dev/null || echo libgtest-dev
    have ip || echo iproute2
    have spin || echo spin
    have ccache || echo ccache
}

# install PACKAGE...
install() {
    local as_root=()
    [ $# -eq 0 ] && return
    echo "installing $*"
    if [ "$(id -u)" -ne 0 ]; then
        have sudo || { echo "no root and no sudo: install $* first"; return 1; }
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "$@"
}

cmake_is_new_enough() {
    local version
    version=$(cmake --version | sed -n 's/^cmake version //p')
    printf '%s\n' "$CMAKE_VERSION_MIN" "$version" | sort -V -C
}

stage_setup() {
    local packages
    mapfile -t packages < <(missing_packages)
    install "${packages[@]}" || return
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "$PYTHON is older than 3.10; set PYTHON to a newer one"; return 1; }
    "$VENV/bin/python" -c '' 2>/dev/null || "$PYTHON" -m venv --clear "$VENV" || return
    cmake_is_new_enough || "$VENV/bin/pip" install "cmake>=$CMAKE_VERSION_MIN"
}

# ---- Native ---------------------------------------------------------------------------------------

# Several stages compile the same sources in the same way, which is done once.
use_ccache() {
    have ccache || return 0
    export CCACHE_DIR=$PWD/build/ccache
    export CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache
}

# native PRESET [ARGUMENT OF CMAKE...]. Tests wait a part of their time.
native() {
    local preset=$1 launcher=() exclude=()
    shift
    # That stage runs them, with a compiler for all.
    [[ $preset != default || " $STAGES " != *" maca "* ]] || exclude=(-E '^maca\.')
    # gcc 12's ThreadSanitizer cannot live with as much address randomisation as new kernels do.
    if [ "$preset" = tsan ] && setarch "$(uname -m)" -R true 2>/dev/null; then
        launcher=(setarch "$(uname -m)" -R)
    fi
    cmake --fresh --preset "$preset" "$@" &&
        cmake --build --preset "$preset" -j "$JOBS" &&
        "${launcher[@]}" ctest --preset "$preset" -j $((JOBS + 1)) --output-junit "$LOGS/$preset.xml" \
            "${exclude[@]}"
}

stage_default() { native default -DMEP_CUDA=OFF; } # the cuda stage compiles that
stage_asan() { native asan; }
stage_tsan() { native tsan; }

# Prints nvcc's path, if it is there.
nvcc_path() {
    command -v nvcc || compgen -G /usr/local/cuda/bin/nvcc
}

# Nothing here runs the kernels: where nvcc can, it leaves out to optimise them, which takes most of
# its time. scripts/gpu_check.sh builds them as they ship.
configure_cuda() {
    local fast=()
    ! "$(nvcc_path)" --help | grep -q -e --Ofast-compile ||
        fast=(-DCMAKE_CUDA_FLAGS_RELEASE="--Ofast-compile=max -DNDEBUG")
    cmake --fresh --preset cuda "${fast[@]}" "$@"
}

stage_cuda() {
    nvcc_path >/dev/null || skip "no nvcc" || return
    configure_cuda && cmake --build --preset cuda -j "$JOBS"
}

# What can be said of the MACA backend without its SDK: tests/maca, and that its shim over CUDA
# compiles. Where no clang is to be had, the tests that need it skip.
stage_maca() {
    have clang++-19 || install clang-19 || echo "clang-19 is not to be had"
    cmake --fresh --preset maca && cmake --build --preset maca -j "$JOBS" &&
        ctest --preset maca -j "$JOBS" --output-junit "$LOGS/maca.xml" || return
    nvcc_path >/dev/null || return 0
    configure_cuda -B build/maca-shim -DMEP_MACA_SHIM=ON -DMEP_MACA_FP8=ON \
        -DCMAKE_CUDA_ARCHITECTURES=90 && cmake --build build/maca-shim --target mooncake_ep_maca
}

# ---- Python ---------------------------------------------------------------------------------------

stage_wheel() {
    rm -rf build/wheel
    "$VENV/bin/pip" wheel --no-deps --wheel-dir build/wheel . || return
    local wheel
    wheel=$(compgen -G "$PWD/build/wheel/*.whl") || return
    "$VENV/bin/pip" install --force-reinstall --no-deps "$wheel" &&
        "$VENV/bin/pip" install "$wheel[cli,test]" &&
        (cd / && "$VENV/bin/python" -c 'import mooncake_ep')
}

install_frameworks() {
    local framework
    for framework in $FRAMEWORKS; do
        timeout "$FRAMEWORK_SECONDS_MAX" "$VENV/bin/pip" install "$framework" ||
            echo "note: $framework could not be installed, its tests skip"
    done
}

# Tests that ask for nothing to be done in time, which may run beside others.
readonly PATIENT=(tests/python/test_models.py tests/python/test_autograd.py tests/python/test_frameworks.py)

# test_python NAME ARGUMENT...
test_python() {
    timeout -k 10 "$TESTS_SECONDS_MAX" "$VENV/bin/python" -m pytest --junit-xml="$LOGS/$1.xml" "${@:2}"
}

# And the API once more, by the engines of ranks that reach no memory of each other.
test_python_patiently() {
    test_python python_patient "${PATIENT[@]}" &&
        test_python python_tcp --backend tcp tests/python/test_dispatch.py tests/python/test_rounds.py || return
    "$VENV/bin/python" -c 'import torch' || return 0
    test_python python_gloo --backend gloo tests/python/test_dispatch.py \
        -k "round_trip or choices or named_twice or counted"
}

stage_python() {
    (renice -n 19 $BASHPID >/dev/null; test_python_patiently >"$LOGS/python_patient.log" 2>&1) &
    local beside=$! failed=0
    test_python python tests/python "${PATIENT[@]/#/--ignore=}" || failed=1
    wait $beside || { failed=1; tail -n 40 "$LOGS/python_patient.log"; }
    return $failed
}

# ---- Lint -----------------------------------------------------------------------------------------

stage_lint() {
    local complaining=""
    "$VENV/bin/pip" install -q -r tools/lint-requirements.txt || return
    PATH=$VENV/bin:$PATH
    find include libep tests/native -regex '.*\.\(h\|inl\|c\|cc\|cu\)' -print0 |
        xargs -0 clang-format --dry-run -Werror || complaining+=" clang-format"
    ruff check . || complaining+=" ruff-check"
    ruff format --check . || complaining+=" ruff-format"
    python tools/gen_ffi.py include/mooncake_ep.h python/mooncake_ep && mypy || complaining+=" mypy"
    python tests/check_includes.py || complaining+=" check_includes"
    [ -z "$complaining" ] || { echo "complaints from:$complaining"; return 1; }
}

# ---- Run and sum up -------------------------------------------------------------------------------

# Its line of the table goes to a file, so that it may run in the background.
run_stage() {
    local name=$1 log=$LOGS/$1.log start=$SECONDS result
    echo "== $name"
    ("stage_$name") >"$log" 2>&1 </dev/null
    case $? in
        0) result=ok ;;
        "$SKIPPED") result=$(tail -n 1 "$log") ;;
        *)
            result="FAILED, see build/logs/$name.log"
            tail -n 80 "$log"
            ;;
    esac
    printf '%-8s %4d s  %s\n' "$name" $((SECONDS - start)) "$result" >"$LOGS/$name.row"
}

# Python's tests wait more than they compute: kernels compile beside them. What they need is
# installed beside what comes before.
run_stages() {
    local stage beside="" frameworks=""
    if [[ " $STAGES " == *" python "* ]]; then
        for stage in $STAGES; do
            [[ $stage != cuda && $stage != maca ]] || beside+=" $stage"
        done
        (renice -n 19 $BASHPID >/dev/null; install_frameworks >"$LOGS/frameworks.log" 2>&1 </dev/null) &
        frameworks=$!
    fi
    for stage in $STAGES; do
        [[ " $beside " != *" $stage "* ]] || continue
        # Both use pip in the same place.
        [[ $stage != wheel && $stage != python && $stage != lint ]] || wait $frameworks
        if [ "$stage" = python ]; then
            (renice -n 19 $BASHPID >/dev/null; for stage in $beside; do run_stage "$stage"; done) &
        fi
        run_stage "$stage"
    done
    wait
}

# Prints "N passed, N failed[, N skipped]" over the JUnit files of all test runs.
count_tests() {
    "$VENV/bin/python" - "$LOGS"/*.xml <<'PYTHON'
import sys
from pathlib import Path
from xml.etree import ElementTree

total = failed = skipped = 0
for path in filter(Path.exists, map(Path, sys.argv[1:])):
    for suite in ElementTree.parse(path).iter("testsuite"):
        number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        total += number["tests"]
        failed += number["failures"] + number["errors"]
        skipped += number["skipped"] + int(suite.get("disabled", 0))
print(f"{total - failed - skipped} passed, {failed} failed" + f", {skipped} skipped" * (skipped > 0))
PYTHON
}

all_went_well() {
    local stage
    for stage in setup $STAGES; do
        grep -q . "$LOGS/$stage.row" && ! grep -q FAILED "$LOGS/$stage.row" || return
    done
}

mkdir -p "$LOGS"
rm -f "$LOGS"/*.xml "$LOGS"/*.log "$LOGS"/*.row
run_stage setup
if ! grep -q FAILED "$LOGS/setup.row"; then
    PATH=$PATH:$VENV/bin # for a CMake that pip installed; the system's own comes first
    cmake_is_new_enough || PATH=$VENV/bin:$PATH
    use_ccache
    run_stages
fi

echo
for stage in setup $STAGES; do
    cat "$LOGS/$stage.row" 2>/dev/null
done
printf '%-8s %4d s\n\n' total $SECONDS
grep -h '^note: ' "$LOGS/frameworks.log" 2>/dev/null
for stage in $STAGES; do
    case $stage in
        default | asan | tsan | maca) grep -h '^[0-9]*% tests passed' "$LOGS/$stage.log" ;;
        python) grep -hE '^=+ .*(passed|failed|skipped|error|no tests ran).* =+$' "$LOGS/python.log" | tail -n 1 ;;
    esac
done
[ -x "$VENV/bin/python" ] && count_tests
all_went_well
