#!/bin/sh
# Run the tests without the GIL: sh tests/free_threads.sh [--tsan] [python]
#
# `python` is a free-threaded interpreter; without one, CPython 3.13 is built from Debian's source
# package into build/free-threads (needs Debian's apt-get and root, and takes some minutes). First
# the whole suite runs in one thread, then tests whose arrays are their own in eight at a time.
# With --tsan interpreter and optcore are built for ThreadSanitizer, which watches storms of calls.
# shellcheck disable=SC2086 # what is not quoted is words: commands and options
set -eu
cd "$(dirname "$0")/.."
root=$PWD
tsan=
[ "${1:-}" = --tsan ] && { tsan=-tsan; shift; }
folder=$root/build/free-threads$tsan
still=${tsan:+setarch -R}    # the sanitizer needs a place that random addresses may take
python=${1:-$folder/python/bin/python3.13t}
version=python3.13
mkdir -p "$folder"

if [ ! -x "$python" ]; then
    apt-get update -q
    apt-get install -q -y --no-install-recommends build-essential pkg-config libssl-dev libffi-dev \
        zlib1g-dev libbz2-dev liblzma-dev libsqlite3-dev
    # From where this machine has its packages, but of the release whose source we want
    site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Suite: stable*' \
        'Origin: Debian' | grep -v security | head -1)
    [ -n "$site" ] || site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' \
        'Origin: Debian' | grep -v security | head -1)
    mkdir -p "$folder/lists/partial" "$folder/source"
    echo "deb-src $site trixie main" > "$folder/sources.list"
    apt="apt-get -q -o Dir::Etc::sourcelist=$folder/sources.list -o Dir::Etc::sourceparts=-
        -o Dir::State::lists=$folder/lists -o APT::Sandbox::User=root"
    cd "$folder/source"
    $apt update
    $apt source --download-only $version
    tar --strip-components=1 -xf $version*.orig.tar.xz
    ./configure -q --disable-gil --prefix="$folder/python" ${tsan:+--with-thread-sanitizer}
    # The library is compiled when it is imported: all of it, three times over, takes longer
    for target in all "COMPILEALL_OPTS=-h install"; do
        $still make -s -j"$(nproc)" $target > "$folder/make.log" 2>&1 ||
            { tail -30 "$folder/make.log"; exit 1; }
    done
    cd "$root"
fi

[ -d "$folder/venv" ] || $still "$python" -m venv "$folder/venv"
run="$still $folder/venv/bin/python"
# The newest that have wheels for it: not every package's latest has. The sanitizer makes compiling
# them slow, so that only what is imported is.
packages="cython>=3.3,<4 setuptools>=77 numpy pytest"
[ -n "$tsan" ] ||
    packages="$packages pytest-timeout pytest-run-parallel hypothesis scikit-learn threadpoolctl"
$run -m pip install -q --no-compile --only-binary=:all: $packages
if [ -n "$tsan" ]; then
    # without OpenMP, whose barriers are unknown to the sanitizer
    printf '#!/bin/sh\ncase " $* " in *" -fopenmp "*) exit 1 ;; esac\nexec gcc "$@"\n' > "$folder/cc"
    chmod +x "$folder/cc"
    export CC="$folder/cc" LDSHARED="$folder/cc -shared" \
        CFLAGS="-g -O1 -fsanitize=thread" LDFLAGS="-fsanitize=thread"
fi
$run -m pip install -q --no-compile --no-build-isolation --force-reinstall --no-deps .
$run -W error -c '
import sys, optcore
assert not sys._is_gil_enabled(), "importing optcore has brought the GIL back"
print("free threads: Python", sys.version.split()[0], "without the GIL, optcore", optcore.__version__)'

if [ -n "$tsan" ]; then
    echo "race:generic_pycdata_new" > "$folder/suppressions"     # a race of CPython 3.13's own
    OPENBLAS_NUM_THREADS=1 \
    TSAN_OPTIONS="exitcode=66 history_size=5 suppressions=$folder/suppressions" \
        $run tests/storms.py
    exit
fi
# Modules of the tests that do not declare that they need no GIL would bring it back.
export PYTHON_GIL=0
$run -m pytest -q -p no:cacheprovider --parallel-threads=1
$run -m pytest -q -p no:cacheprovider --parallel-threads=8 \
    tests/test_identities.py tests/test_sgd.py tests/test_errors.py tests/test_streams.py
$run tests/storms.py
