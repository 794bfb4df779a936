#!/usr/bin/env bash
# Makes an arm64 userland for qemu-user: Debian's Python and C libraries, and the aarch64 wheels of the numpy and
# onnxruntime that are installed here. Packages come from wherever this machine's own apt and pip take theirs.
#
#   scripts/sysroot.sh [DIR]        DIR defaults to build/sysroot-aarch64
#
# DIR/root is the userland; DIR/<cpu> shows the same userland with that CPU's /proc/cpuinfo, because qemu passes the
# host's file through and ONNX Runtime reads it. Run a program with
#   qemu-aarch64 -cpu <cpu> -L DIR/<cpu> DIR/<cpu>/usr/bin/python3 …
# A second call finds DIR/stamp and does nothing. PYTHON names the interpreter whose packages are mirrored.
# Exit status 3: this machine lacks what it takes (no apt, no network); nothing is left half-made.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
destination=${1:-$here/build/sysroot-aarch64}
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || command -v python3)}

give_up() { echo "sysroot: $1" >&2; exit 3; }

for tool in apt-get apt-cache dpkg-deb; do
    command -v "$tool" >/dev/null || give_up "needs $tool, which this machine does not have"
done
wheels=$("$python" -c '
from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")))') ||
    give_up "needs numpy and onnxruntime installed for $python"
stamp="$wheels $(sha256sum <"${BASH_SOURCE[0]}" | cut -c1-16)"
[ -f "$destination/stamp" ] && [ "$(cat "$destination/stamp")" = "$stamp" ] && exit 0

mkdir -p "$(dirname "$destination")"
work=$(mktemp -d "$destination.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/apt/{lists/partial,cache/archives/partial} "$work"/debs "$work"/root/usr
: >"$work/apt/status"

# The machine's own sources, but private lists and another architecture: nothing outside DIR is touched.
cat >"$work/apt/conf" <<EOF
APT::Architecture "arm64";
#clear APT::Architectures;
APT::Architectures { "arm64"; };
Acquire::Languages "none";
APT::Sandbox::User "";
Dir::State::lists "$work/apt/lists/";
Dir::State::status "$work/apt/status";
Dir::Cache "$work/apt/cache";
EOF
export APT_CONFIG="$work/apt/conf"
apt-get -qq update >&2 || give_up "apt cannot fetch the arm64 package lists"

interpreter=$(apt-cache depends python3-minimal | sed -n 's/^ *|*[A-Za-z]*: \(python3\.[0-9]*\)-minimal$/\1/p' | head -1)
[ -n "$interpreter" ] || give_up "apt offers no arm64 python3-minimal"
(cd "$work/debs" && apt-get -qq download \
    libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 \
    "$interpreter-minimal" "lib$interpreter-minimal" "lib$interpreter-stdlib" >&2) ||
    give_up "apt cannot fetch the arm64 packages"
# usr-merged, as Debian's own root is: /lib leads to /usr/lib whatever path a package carries.
mkdir -p "$work"/root/usr/{lib,bin,sbin}
for folder in lib bin sbin; do ln -s "usr/$folder" "$work/root/$folder"; done
for package in "$work"/debs/*.deb; do dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/root" --keep-directory-symlink; done
ln -sf "$interpreter" "$work/root/usr/bin/python3"

version=${interpreter#python}
# shellcheck disable=SC2086  # a list of requirements
"$python" -m pip -q download --dest "$work/wheels" --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --implementation cp \
    --python-version "$version" --abi "cp${version/./}" $wheels >&2 || give_up "pip cannot fetch $wheels for aarch64"
for wheel in "$work"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$work/root/usr/lib/python3/dist-packages"
done

# What Linux prints on a Cortex-A72 and on a Cortex-A76, four cores; the part number must be that of qemu's -cpu.
cpuinfo() { # name, part, variant, revision, features
    mkdir -p "$work/$1/proc"
    for folder in usr lib bin; do ln -s "../root/$folder" "$work/$1/$folder"; done
    for core in 0 1 2 3; do
        printf 'processor\t: %d\nBogoMIPS\t: 108.00\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\n' "$core" "$5"
        printf 'CPU variant\t: %s\nCPU part\t: %s\nCPU revision\t: %s\n\n' "$3" "$2" "$4"
    done >"$work/$1/proc/cpuinfo"
}
cpuinfo cortex-a72 0xd08 0x0 3 'fp asimd evtstrm crc32 cpuid'
cpuinfo cortex-a76 0xd0b 0x4 1 \
    'fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp'

rm -rf "$work/apt" "$work/debs" "$work/wheels"
echo "$stamp" >"$work/stamp"
chmod 755 "$work"
rm -rf "$destination"
mv "$work" "$destination"
trap - EXIT
