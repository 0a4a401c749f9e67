#!/bin/bash
# Runs the kernel tests on an emulated Sapphire Rapids (AVX-512 F, VNNI, BF16). See README.md beside this file.
#
#   tests/emulated/avx512.sh [FOLDER]    # default: target/emulated; needs Bochs 3.0 or newer
#   CPU=tigerlake tests/emulated/avx512.sh    # VNNI without BF16
set -euo pipefail
cd "$(dirname "$0")/../.."
here=$PWD/tests/emulated
work=$(mkdir -p "${1:-target/emulated}" && cd "${1:-target/emulated}" && pwd)
target=x86_64-unknown-linux-gnu
kernel=${KERNEL:-$(ls /boot/vmlinuz-*-cloud-amd64 | tail -1)}

# Statically linked tests: the guest has nothing but a shell.
export CARGO_TARGET_DIR=$work/static RUSTFLAGS="-C target-feature=+crt-static"
root=$work/root
rm -rf "$root" && mkdir -p "$root"/{bin,dev,proc,tests}
cp "$(command -v busybox)" "$root/bin/busybox"
cp "$here/guest" "$root/init"
cargo test --release --target $target --no-run --lib --test kernels_encode --message-format json |
    sed -n 's/.*"name":"\(microtome_core\|kernels_encode\)".*"executable":"\([^"]*\)".*/\1 \2/p' |
    while read -r name path; do strip -o "$root/tests/$name" "$path"; done

# A disc that boots the kernel into the tests. Bochs fails where the kernel's own use of SMM meets five-level paging.
disc=$work/disc/boot
mkdir -p "$disc/grub"
cp "$kernel" "$disc/vmlinuz"
(cd "$root" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$disc/initrd.gz"
cp "$here/grub.cfg" "$disc/grub/"
grub-mkrescue -o "$work/disc.iso" "$work/disc" 2>/dev/null

# The kernel masks AMX tile data before it enables the rest, which Bochs refuses: without AMX there is nothing to mask.
sed -e "s|@cpu@|${CPU:-sapphire_rapids}|; s|@work@|$work|" "$here/bochsrc" >"$work/bochsrc"
rm -f "$work/serial.txt"
bochs -q -unlock -f "$work/bochsrc" >"$work/bochs.txt" 2>&1 </dev/null || true
sed -n '/^model name/,$p' "$work/serial.txt"
grep -q 'EMULATION ENDS: 0 failed' "$work/serial.txt"
