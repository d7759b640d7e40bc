#!/usr/bin/env bash
# What `make arm64` needs, into the folder $1: root/, a Python for 64-bit Arm with its libraries and headers, from Debian's
# packages, nothing of which is installed on this machine. The emulator and the cross compiler are, if they are missing.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
python=python$(apt-cache show python3 | sed -n 's/^Version: \(3\.[0-9]*\).*/\1/p' | head -n 1)
wanted=(libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8
    "$python-minimal" "lib$python-minimal" "lib$python-stdlib" "lib$python-dev")

if ! command -v qemu-aarch64-static aarch64-linux-gnu-g++ >/dev/null || ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    root=$([ "$(id -u)" = 0 ] || echo sudo)
    $root apt-get update -qq
    $root apt-get install -qq --no-install-recommends qemu-user-static g++-aarch64-linux-gnu
fi

# apt with an index, a cache and an architecture of its own; where packages come from is the machine's.
mkdir -p "$folder"/apt/{state/lists/partial,cache/archives/partial} "$folder/packages"
arm64=(-o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder/apt/state"
    -o Dir::Cache="$folder/apt/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root)
apt-get "${arm64[@]}" -qq update
(cd "$folder/packages" && apt-get "${arm64[@]}" -qq download "${wanted[@]}")
rm -rf "$folder/root"
for package in "$folder"/packages/*.deb; do
    dpkg-deb -x "$package" "$folder/root"
done
ln -s "$python" "$folder/root/usr/bin/python"
ln -s "$python" "$folder/root/usr/include/python"
