#!/bin/sh
# Watch optcore with a sanitizer: sh tests/sanitize.sh address|thread|memory [pytest's arguments]
#
#   address   AddressSanitizer and UndefinedBehaviorSanitizer of GCC, over the tests (half an hour)
#   thread    ThreadSanitizer of clang, over threaded steps: needs libarcher, which tells it of
#             OpenMP's barriers (libgomp has no such thing), and libpython to embed, for its
#             runtime cannot be preloaded into a foreign interpreter
#   memory    valgrind's memcheck, over the same steps
#
# Debian's packages: build-essential python3-venv python3-dev, for threads also clang
# libclang-rt-dev libomp-dev, for memory valgrind. PYTHON names another interpreter; with KEEP=1
# what an earlier run has built and installed is watched once more.
#
# A finding in optcore ends it with a status that is not 0, whatever process of a test it was in;
# so does a fault planted elsewhere, in the same way, that was not found.
set -eu
cd "$(dirname "$0")/.."
mode=${1:?address, thread or memory}
shift
python=${PYTHON:-python3}
keep=${KEEP:-}
folder=$PWD/build/sanitize-$mode
run=$folder/bin/python
[ -x "$run" ] || "$python" -m venv "$folder"
reports=$folder/reports
rm -rf "$reports"
mkdir -p "$reports" "$folder/optcore"

needs() {
    echo "sanitize.sh $mode: needs $*"
    exit 2
}

# In a folder of optcore's name, for memcheck's findings are told apart by it
cat > "$folder/optcore/planted.c" <<'END'
#include <stdlib.h>
int planted(int n)
{
    int i, sum = 1 << n;                /* undefined, n being 40 */
    volatile char *p = malloc(n);
#pragma omp parallel for num_threads(2)
    for (i = 0; i < n; i++) sum++;      /* a race */
    p[n] = 1;                           /* past the end */
    return sum;
}
END
call_planted="import ctypes; ctypes.CDLL('$folder/planted.so').planted(40)"

# Every process writes its reports to a file of its own. Each report ends in a line of summary;
# what has none is a warning, as of a huge array that could not be had.
count() {
    cat "$reports"/* 2>/dev/null | grep -c '^SUMMARY: ' || true
}

planted_are() {
    [ "$(count)" = "$1" ] || {
        cat "$reports"/* 2>/dev/null
        echo "sanitize.sh $mode: $(count) of $1 planted faults were found"
        exit 3
    }
    rm -f "$reports"/*
}

finish() {      # with the status of what was watched
    for file in "$reports"/*; do
        ! grep -q '^SUMMARY: ' "$file" 2>/dev/null || cat "$file"
    done
    echo "$mode: $(count) reports"
    [ "$(count)" = 0 ] || exit 1
    exit "$1"
}

case $mode in
address)
    sanitized="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined"
    # Python's own allocator would hide small objects' ends; what it never frees is no leak of
    # ours. An array too large for the machine is refused, as tests expect. Of undefined behaviour
    # the file has the summary alone, and only where both libraries name the same one.
    watched() {
        LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:allocator_may_return_null=1:\
log_path=$reports/report \
        UBSAN_OPTIONS=print_stacktrace=1:print_summary=1:report_error_type=1:\
log_path=$reports/report \
        PYTHONMALLOC=malloc "$run" "$@"
    }
    # shellcheck disable=SC2086 # the flags are words
    gcc $sanitized -shared -fPIC "$folder/optcore/planted.c" -o "$folder/planted.so" ||
        needs "GCC with its sanitizers' runtimes (Debian: build-essential)"
    watched -c "$call_planted" 2>/dev/null || true
    planted_are 2
    # More tests run with Cython and scikit-learn. PyTorch, Numba and MPI bring what is not ours.
    if [ -z "$keep" ]; then
        "$run" -m pip install --quiet pytest pytest-timeout hypothesis threadpoolctl safetensors \
            'cython>=3.3,<4' 'setuptools>=77' scikit-learn 'numpy>=2'
        CC=gcc LDSHARED="gcc -shared" LDFLAGS="-fsanitize=address,undefined" CFLAGS="$sanitized" \
            "$run" -m pip install --quiet --force-reinstall --no-deps .
    fi
    # Deselected: without -O3 there is no vector arithmetic to be listed; and the sanitizer's maps
    # of memory are larger than any limit of the address space.
    status=0
    watched -m pytest -q -p no:cacheprovider -o timeout=1200 \
        --deselect tests/test_binary.py::test_no_fused_multiply_add_in_the_kernels \
        --deselect tests/test_checkpoint.py::test_too_little_memory "$@" || status=$?
    finish $status
    ;;
thread)
    archer=$(find /usr/lib/llvm-* /usr/local/lib -name libarcher.so 2>/dev/null | head -1)
    config=$("$python" -c 'import sysconfig
print(sysconfig.get_config_var("BINDIR") + "/python3-config")')
    printf '#include <Python.h>\nint main(int c, char **v) { return Py_BytesMain(c, v); }\n' \
        > "$folder/launcher.c"
    # shellcheck disable=SC2046 # the flags are words
    [ -n "$archer" ] && [ -x "$config" ] &&
        clang -fsanitize=thread "$folder/launcher.c" $("$config" --includes) \
            $("$config" --ldflags --embed) -rdynamic -o "$folder/launcher" &&
        clang -g -O1 -fsanitize=thread -fopenmp -shared -fPIC "$folder/optcore/planted.c" \
            -o "$folder/planted.so" ||
        needs "clang, its sanitizers' runtimes, libarcher and a Python to embed (Debian: clang" \
            "libclang-rt-dev libomp-dev python3-dev)"
    watched() {
        PYTHONHOME=$("$python" -c 'import sys; print(sys.base_prefix)') \
        PYTHONPATH=$("$run" -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
        OMP_TOOL_LIBRARIES=$archer OPENBLAS_NUM_THREADS=1 \
        TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66 log_path=$reports/report" \
            setarch -R "$folder/launcher" "$@"
    }
    watched -c "$call_planted" || true
    planted_are 1
    [ -n "$keep" ] || CC=clang LDSHARED="clang -shared" CFLAGS="-g -O1 -fsanitize=thread" \
        "$run" -m pip install --quiet --force-reinstall .
    status=0
    watched tests/steps.py || status=$?
    finish $status
    ;;
memory)
    command -v valgrind >/dev/null || needs "valgrind (Debian: valgrind)"
    # With debug information a frame is named by its source, and the whole path says whose that is
    watched() {
        PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1 valgrind --num-callers=30 --fullpath-after= \
            --log-file="$folder/findings.txt" "$run" "$@"
        grep -q "ERROR SUMMARY" "$folder/findings.txt"      # it came to its end
    }
    # The interpreter has findings of its own; what counts is where optcore is in the stack.
    judge() {
        "$python" - "$folder/findings.txt" "$reports/report" <<'END'
import re
import sys

# A finding is a paragraph that has frames: a complaint with its stack, and whose memory it was
found, to = sys.argv[1:]
with open(found) as file:
    text = re.sub(r"(?m)^(==\d+==|\*\*\d+\*\*) ?", "", file.read())
findings = [part for part in re.split(r"\n\s*\n", text) if re.search(r"\b(at|by) 0x", part)]
ours = [part for part in findings if re.search(r"\boptcore/[\w.-]+\.(c|h|so)\b", part)]
with open(to, "w") as file:
    file.writelines(f"{part}\nSUMMARY: memcheck\n\n" for part in ours)
print(f"memory: {len(findings) - len(ours)} findings elsewhere")
END
    }
    gcc -g -O1 -shared -fPIC "$folder/optcore/planted.c" -o "$folder/planted.so" ||
        needs "GCC (Debian: build-essential)"
    watched -c "$call_planted"
    judge
    planted_are 1
    [ -n "$keep" ] || CC=gcc LDSHARED="gcc -shared" CFLAGS="-g -O1" \
        "$run" -m pip install --quiet --force-reinstall .
    watched tests/steps.py
    judge
    finish 0
    ;;
*)
    echo "sanitize.sh: address, thread or memory, not $mode"
    exit 2
    ;;
esac
