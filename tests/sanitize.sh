#!/bin/sh
# Watch optcore with a sanitizer: sh tests/sanitize.sh address|thread|memory [pytest's arguments]
#
#   address   AddressSanitizer and UndefinedBehaviorSanitizer of GCC, over the tests
#   thread    ThreadSanitizer of clang, over threaded steps: needs libarcher, which tells it of
#             OpenMP's barriers (libgomp has no such thing), and libpython to embed, for its
#             runtime cannot be preloaded into a foreign interpreter
#   memory    valgrind's memcheck, over the same steps
#
# A finding in optcore ends it with a status that is not 0. PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
mode=${1:?address, thread or memory}
shift
python=${PYTHON:-python3}
folder=$PWD/build/sanitize-$mode
run=$folder/bin/python
[ -d "$folder" ] || "$python" -m venv "$folder"

case $mode in
address)
    "$run" -m pip install --quiet pytest pytest-timeout hypothesis threadpoolctl safetensors
    CC=gcc LDSHARED="gcc -shared" LDFLAGS="-fsanitize=address,undefined" \
    CFLAGS="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined" \
        "$run" -m pip install --quiet --force-reinstall .
    # Python's own allocator would hide small objects' ends; what it never frees is no leak of ours
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 PYTHONMALLOC=malloc \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
        "$run" -m pytest -q -p no:cacheprovider "$@"
    ;;
thread)
    archer=$(find /usr/lib/llvm-* /usr/local/lib -name libarcher.so 2>/dev/null | head -1)
    command -v clang >/dev/null && [ -n "$archer" ] || {
        echo "sanitize.sh thread: needs clang and libarcher (Debian: clang libomp-dev)"; exit 2; }
    CC=clang LDSHARED="clang -shared" CFLAGS="-g -fsanitize=thread" \
        "$run" -m pip install --quiet --force-reinstall .
    config=$("$python" -c 'import sysconfig
print(sysconfig.get_config_var("BINDIR") + "/python3-config")')
    printf '#include <Python.h>\nint main(int c, char **v) { return Py_BytesMain(c, v); }\n' \
        > "$folder/launcher.c"
    # shellcheck disable=SC2046 # the flags are words
    clang -fsanitize=thread "$folder/launcher.c" $("$config" --includes) \
        $("$config" --ldflags --embed) -rdynamic -o "$folder/launcher"
    PYTHONHOME=$("$python" -c 'import sys; print(sys.base_prefix)') \
    PYTHONPATH=$("$run" -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
    OMP_TOOL_LIBRARIES=$archer OPENBLAS_NUM_THREADS=1 \
    TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66" \
        setarch -R "$folder/launcher" tests/steps.py
    ;;
memory)
    CFLAGS="-g -O1" "$run" -m pip install --quiet --force-reinstall .
    # The interpreter has findings of its own; what counts is where optcore is in the stack.
    PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1 valgrind --quiet --num-callers=30 \
        --log-file="$folder/findings.txt" "$run" tests/steps.py
    if grep -q "site-packages/optcore" "$folder/findings.txt"; then
        grep -B12 -A12 "site-packages/optcore" "$folder/findings.txt"
        exit 1
    fi
    echo "memory: $(grep -c 'at 0x' "$folder/findings.txt" || true) findings elsewhere, 0 in optcore"
    ;;
*)
    echo "sanitize.sh: address, thread or memory, not $mode"
    exit 2
    ;;
esac
