#!/usr/bin/env bash
# What `make arm64` needs, on Debian: into the folder $1 a Python for 64-bit Arm with its libraries and headers, from
# Debian's packages, none of which is installed; and on this machine an emulator and a cross compiler, where missing.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)

if ! command -v qemu-aarch64-static >/dev/null || ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    root=$([ "$(id -u)" = 0 ] || echo sudo)
    $root apt-get -qq update
    $root apt-get -qq install --no-install-recommends qemu-user-static g++-aarch64-linux-gnu
fi

# apt with an architecture, an index and a cache of its own; where packages come from is the machine's.
mkdir -p "$folder"/apt/{state/lists/partial,cache/archives/partial}
arm64=(-o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root -o Dir::State="$folder/apt/state"
    -o Dir::State::status=/dev/null -o Dir::Cache="$folder/apt/cache")
apt-get "${arm64[@]}" -qq update
python=$(apt-cache "${arm64[@]}" depends python3-minimal | sed -n 's/.*Depends: \(python3\.[0-9]*\)-minimal.*/\1/p')
wanted=(libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8
    "$python-minimal" "lib$python-minimal" "lib$python-stdlib" "lib$python-dev")
rm -rf "$folder/packages" "$folder/sysroot"
mkdir "$folder/packages"
(cd "$folder/packages" && apt-get "${arm64[@]}" -qq download "${wanted[@]}")
for package in "$folder"/packages/*.deb; do
    dpkg-deb -x "$package" "$folder/sysroot"
done
ln -s "$python" "$folder/sysroot/usr/bin/python"
ln -s "$python" "$folder/sysroot/usr/include/python"
