#!/usr/bin/env bash
# Installs what only Debian can supply: compilers for this machine and for aarch64, and qemu-user to run aarch64 programs.
# Does nothing where all of it is there, and says so and goes on where there is no apt or no right to use it: hikui then
# does without (PyPI's ziglang compiles too; what needs qemu is skipped).
set -euo pipefail

declare -A commands=([g++]=g++ [make]=make [qemu-user]=qemu-aarch64)
[ "$(uname -m)" = aarch64 ] || commands[g++-aarch64-linux-gnu]=aarch64-linux-gnu-g++

missing=()
for package in "${!commands[@]}"; do
    command -v "${commands[$package]}" >/dev/null || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort)

if ! command -v apt-get >/dev/null; then
    echo "debian.sh: no apt-get here; going on without ${missing[*]}" >&2
    exit 0
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null; then
        echo "debian.sh: not root; going on without ${missing[*]} (apt-get install ${missing[*]} brings them)" >&2
        exit 0
    fi
    as_root=(sudo -n)
fi
if ! { "${as_root[@]}" apt-get -qq update &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y "${missing[@]}"; } >&2; then
    echo "debian.sh: apt-get failed; going on without ${missing[*]}" >&2
fi
