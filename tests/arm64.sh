#!/bin/sh
# Build for 64-bit ARM and test there, under emulation: sh tests/arm64.sh [--fused]
#
# For Debian, as root: what is missing is installed from the machine's own sources. The ARM
# system is unpacked and never set up, and nothing of it is entered: every process of the tests,
# children included, is an emulator that looks for files there first. All of it is kept in
# build/arm64, so that a second run only builds and tests. Speed under emulation means nothing.
#
# With --fused the library is built without -ffp-contract=off instead, which lets this compiler
# fuse multiplications and additions; the run succeeds if the listing and the tests both tell.
set -eu
cd "$(dirname "$0")/.."
folder=$PWD/build/arm64
root=$folder/root       # the ARM system
site=$folder/site       # what the tests import besides
mode=${1:-tested}
case $mode in tested | --fused) ;; *) sed -n '2s/^# //p' "$0"; exit 2 ;; esac
built=$folder/built/${mode#--}
host=$folder/venv/bin/python
began=$(date +%s)
since=$began

say() {     # with the seconds that the stage took
    now=$(date +%s)
    echo "arm64: $1 ($((now - since)) s)"
    since=$now
}

install_tools() {
    set --
    command -v aarch64-linux-gnu-gcc >/dev/null ||
        set -- "$@" gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    command -v qemu-aarch64-static >/dev/null || set -- "$@" qemu-user-static
    command -v debootstrap >/dev/null || set -- "$@" debootstrap debian-archive-keyring
    "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || set -- "$@" python3-venv
    [ $# -gt 0 ] || return 0
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "$@" >/dev/null
}

# The suite of this machine, from where this machine has it.
unpack_root() {
    [ ! -e "$root/.unpacked" ] || return 0
    rm -rf "$root"
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    # shellcheck disable=SC2016 # apt's variables
    mirror=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' \
        'Created-By: Packages' | sed -n "s/^$suite main //p" | head -1)
    [ -n "$mirror" ] || { echo "arm64: apt has no list of $suite: apt-get update"; exit 1; }
    debootstrap --foreign --arch=arm64 --variant=minbase \
        --include=python3,libpython3-dev,libgomp1 "$suite" "$root" "$mirror" \
        >"$folder/debootstrap.log" || { tail "$folder/debootstrap.log"; exit 1; }
    for package in "$root"/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --keep-directory-symlink
    done
    # What the emulator finds in there hides the machine's own.
    find "$root" -mindepth 1 -maxdepth 1 ! -name 'lib*' ! -name usr ! -name etc \
        -exec rm -rf {} +
    touch "$root/.unpacked"
}

# Python of the ARM system: $1 is what it runs. Plain ARMv8, as the loops were compiled: newer
# CPUs sign return addresses, which is slow to emulate.
make_python() {
    cat >"$folder/python" <<END
#!/bin/sh
exec qemu-aarch64-static -cpu cortex-a72 -L "$root" -0 "\$0" "$root/usr/bin/$1" "\$@"
END
    chmod +x "$folder/python"
}

install_packages() {    # $1: the ARM system's version of Python
    [ ! -e "$site/.installed" ] || return 0
    rm -rf "$folder/venv" "$site"
    "${PYTHON:-python3}" -m venv "$folder/venv"
    "$host" - <<'END' >"$folder/requires.txt"
import re
requires = re.search(r"^requires = \[(.*)\]$", open("pyproject.toml").read(), re.M)[1]
print(*re.findall('"(.*?)"', requires), sep="\n")
END
    "$host" -m pip install --quiet -r "$folder/requires.txt"
    "$host" -m pip install --quiet --target "$site" --implementation cp --python-version "$1" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --only-binary=:all: numpy 'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
    touch "$site/.installed"
}

# By this machine's Python, told that it is the ARM system's.
build() {       # $1: the ARM system's Python
    cc=aarch64-linux-gnu-gcc
    if [ "$mode" = --fused ]; then
        cc=$folder/fusing-gcc
        printf '#!/bin/sh\nexec aarch64-linux-gnu-gcc "$@" -ffp-contract=fast\n' >"$cc"
        chmod +x "$cc"
    fi
    data=$(cd "$root/usr/lib/$1" && ls _sysconfigdata__*aarch64-linux-gnu.py | head -1)
    rm -rf "$built" "$folder/sysconfig"
    mkdir -p "$built" "$folder/sysconfig"
    cp "$root/usr/lib/$1/$data" "$folder/sysconfig"
    CC=$cc PYTHONPATH=$folder/sysconfig _PYTHON_HOST_PLATFORM=linux-aarch64 \
        _PYTHON_SYSCONFIGDATA_NAME=${data%.py} \
        CFLAGS="-I$site/numpy/_core/include -I$root/usr/include/$1 -idirafter $root/usr/include" \
        "$host" -c "from setuptools.build_meta import build_wheel; build_wheel('$built')" \
        >"$built/build.log" 2>&1 || { tail -30 "$built/build.log"; exit 1; }
    "$host" -m zipfile -e "$built"/*.whl "$built"
}

# How many fused multiply-adds the modules hold: 0, or the bits are not those of other CPUs.
count_fused() {
    fused=0
    for library in "$built"/optcore/*.so; do
        aarch64-linux-gnu-objdump -d --no-show-raw-insn "$library" >"$built/listing"
        found=$(grep -cwE 'fn?m(add|sub)|fml[as]l?2?' "$built/listing" || :)
        fused=$((fused + found))
        case $library in
            */sweep.*)      # it is a listing of arithmetic
                products=$(grep -cw fmul "$built/listing") ||
                    { echo "arm64: $library multiplies nothing"; exit 1; } ;;
        esac
    done
    echo "arm64: $fused fused multiply-adds in the modules, $products products in the sweep"
}

run_tests() {     # threads that wait do not spin, which is dear where cores are few
    PYTHONPATH=$built:$site OMP_WAIT_POLICY=passive \
        "$folder/python" -m pytest -q -p no:cacheprovider --timeout=600 "$@"
}

mkdir -p "$folder"
install_tools
say "tools are here"
unpack_root
version=$(readlink "$root/usr/bin/python3")
make_python "$version"
say "Debian for ARM is unpacked"
install_packages "${version#python}"
"$folder/python" -c 'import platform, sys
print("arm64: Python", platform.python_version(), "on", platform.machine(), "as", sys.executable)'
say "packages are here"
build "$version"
say "optcore is built"
count_fused
if [ "$mode" = --fused ]; then
    [ "$fused" -gt 0 ] || { echo "arm64: nothing is fused without -ffp-contract=off"; exit 1; }
    status=0
    run_tests tests/test_digest.py tests/test_bits.py -k "not offsets and not options" --tb=line \
        >"$built/tests.log" || status=$?
    cat "$built/tests.log"
    [ "$status" -eq 1 ] || { echo "arm64: the tests do not tell"; exit 1; }
    say "tests tell of fused multiply-adds"
    exit 0
fi
[ "$fused" -eq 0 ] || { echo "arm64: the bits are not those of other CPUs"; exit 1; }
# Two halves of about the same length, side by side.
run_tests tests/test_digest.py tests/test_bits.py \
    --deselect tests/test_bits.py::test_offsets >"$built/tests.log" 2>&1 &
half=$!
run_tests tests/test_identities.py tests/test_sgd.py tests/test_errors.py tests/test_plan.py \
    tests/test_bits.py::test_offsets || status=$?
wait "$half" || status=$?
cat "$built/tests.log"
say "tests have run"
echo "arm64: $(($(date +%s) - began)) s in all"
exit "${status:-0}"
