#!/bin/sh
# Run threaded steps under ThreadSanitizer: sh tests/tsan.sh [python]
#
# Needs clang with its sanitizer runtime, libpython to embed, and libomp with libarcher, which
# tells the sanitizer of OpenMP's barriers (libgomp has no such thing). The interpreter is linked
# into a program of our own: the runtime cannot be preloaded into a foreign one.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}
folder=$PWD/build/tsan
archer=$(find /usr/lib/llvm-* /usr/local/lib -name libarcher.so 2>/dev/null | head -1)
command -v clang >/dev/null && [ -n "$archer" ] || { echo "tsan: needs clang and libarcher"; exit 2; }

"$python" -m venv "$folder"
CC=clang LDSHARED="clang -shared" CFLAGS="-g -fsanitize=thread" \
    "$folder/bin/python" -m pip install --quiet --force-reinstall .
config=$("$python" -c 'import sys, sysconfig as s
print(s.get_config_var("BINDIR") + "/python3-config")')
printf '#include <Python.h>\nint main(int c, char **v) { return Py_BytesMain(c, v); }\n' \
    > "$folder/launcher.c"
# shellcheck disable=SC2046 # the flags are words
clang -fsanitize=thread "$folder/launcher.c" $("$config" --includes) $("$config" --ldflags --embed) \
    -rdynamic -o "$folder/launcher"

PYTHONHOME=$("$python" -c 'import sys; print(sys.base_prefix)') \
PYTHONPATH=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
OMP_TOOL_LIBRARIES=$archer OPENBLAS_NUM_THREADS=1 \
TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" \
    setarch -R "$folder/launcher" tests/tsan_steps.py
