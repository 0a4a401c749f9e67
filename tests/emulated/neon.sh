#!/bin/bash
# Runs the kernel tests on an emulated aarch64. See README.md beside this file.
#
#   tests/emulated/neon.sh [FOLDER]      # default: target/emulated; downloads and builds go there
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mkdir -p "${1:-target/emulated}" && cd "${1:-target/emulated}" && pwd)
target=aarch64-unknown-linux-gnu
export CARGO_TARGET_DIR=$work/aarch64
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64-static
export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu

# A compiler with a standard library for aarch64: rustup's, where it has one, else Debian's, unpacked beside it.
if ! rustc --print target-libdir --target $target 2>/dev/null | xargs -I{} test -d {}; then
    dpkg --print-foreign-architectures | grep -q arm64 || { echo "run: dpkg --add-architecture arm64 && apt-get update"; exit 1; }
    cd "$work"
    version=$(apt-cache policy rustc-web | awk '/Candidate/ { print $2 }')
    packages=$(apt-cache depends "rustc-web=$version" "libstd-rust-web-dev=$version" | awk '/Depends: lib(std-rust|llvm)/ { print $2 }' | sort -u)
    llvm=$(apt-cache depends $packages | awk '/Depends: libllvm/ { print $2 }' | sort -u)
    apt-get download "rustc-web=$version" "libstd-rust-web-dev:arm64=$version" $packages $llvm
    for package in ./*.deb; do dpkg -x "$package" debian; done
    libraries=$(find "$work/debian" -name 'libLLVM*.so*' -o -name 'librustc_driver*.so' | xargs -n1 dirname | sort -u | paste -sd:)
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$work/debian/usr/bin/rustc" >rustc
    chmod +x rustc
    export RUSTC=$work/rustc
    cd - >/dev/null
fi

cargo test --release --target $target --lib kernels::
cargo test --release --target $target --test kernels_encode --test metrics_similarity --test metrics_cka
