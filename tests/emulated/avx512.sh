#!/bin/bash
# Runs the kernel tests on the paths of AVX-512 and AMX, on a processor without AVX-512, or on that of AMX, on one that lacks nothing
# else. See README.md beside this file.
#
#   tests/emulated/avx512.sh [FOLDER]      # default: target/emulated; builds go there
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mkdir -p "${1:-target/emulated}" && cd "${1:-target/emulated}" && pwd)
target=x86_64-unknown-linux-gnu
export CARGO_TARGET_DIR=$work/avx512

flags=$(grep -m1 ^flags /proc/cpuinfo || true)
[[ $flags == *avx2* ]] || { echo "the emulator needs a Linux on x86-64 with AVX2"; exit 1; }
[[ $flags == *avx512_vnni* && $flags == *avx512_bf16* && $flags != *amx_bf16* ]] && only_amx=yes || only_amx=
[[ $flags != *avx512f* || $only_amx ]] || { echo "this processor has AVX-512: cargo test runs the paths that it has"; exit 1; }

# The emulator may use what the processor has; the kernels are compiled as always.
emulator() { RUSTFLAGS=-Ctarget-cpu=x86-64-v3 cargo "$@" --release --package emulated-avx512 --target $target; }
[[ $only_amx ]] || emulator test --quiet --tests
emulator build --quiet --lib

export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$work/avx512/$target/release/libemulated_avx512.so"
export MICROTOME_EMULATED_COUNTS=1
passed=()

# Paths that the processor is to have, the one to choose, and what to test.
check() {
    echo; echo "== $3 on $2, of $1"
    local start=$SECONDS
    MICROTOME_EMULATED=$1 MICROTOME_ISA=$2 cargo test --quiet --release --features emulated "${@:4}"
    passed+=("$3 on $2, of $1: $((SECONDS - start)) s")
}

all=avx512,avx512bf16,avx512vnni,amx
# These go through all paths by themselves.
check $all amx "kernels" --lib kernels::
check $all amx "kernels_encode" --test kernels_encode
if [[ $only_amx ]]; then
    check $all amx "metrics_similarity" --test metrics_similarity
else
    # The first processors with VNNI had no bf16.
    check avx512,avx512vnni avx512vnni "metrics_similarity" --test metrics_similarity
    for path in ${all//,/ }; do
        check $all "$path" "metrics_similarity" --test metrics_similarity
    done
    # The paths share the kernels of CKA.
    check $all avx512 "metrics_cka" --test metrics_cka
fi

echo; echo "passed:"; printf '  %s\n' "${passed[@]}"
