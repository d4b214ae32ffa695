"""The kernels called from C, C++, Cython, Numba and ctypes: built against what is installed."""
from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import CXX, EXAMPLES, HAS_CXX

import optcore
from optcore import kernels
from reference import RULES, RULES_BY_ID, Options, nonnegative, product, rounded, same_bits, widened
from test_bits import all_options, by_dtype, draw_tiny, some

HEADER = Path(optcore.get_include(), "optcore.h")

C = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
needs_cxx = pytest.mark.skipif(not HAS_CXX, reason=f"the C++ compiler ({CXX}) is missing")
CPP = pytest.param("cpp", marks=needs_cxx)


every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
RULE_NAMES = re.findall(r"^    RULE_\d\((\w+)", HEADER.read_text(), re.MULTILINE)


def number_of(rule):
    """The rule's number: its place in the header's list."""
    return RULE_NAMES.index(rule.name)


def options_array(rule, o):
    fields = {**vars(o), "lr_in_velocity": rule.lr_in_velocity,
              "clip_value": np.inf if o.clip_value is None else o.clip_value}
    if fields.pop("dampen_first"):
        fields["first_step"] = False
    step = fields.pop("step")
    if "step" in rule.scalars and step is not None:
        for beta in ("beta1", "beta2"):
            fields[f"{beta}_power"] = product(fields[beta], step)
    return kernels.make_options(**fields)


def from_probe(module, any_rule=False):
    def step(name, rule, x, g, states, o):
        places = [a.ctypes.data for a in (x, g, *states)]
        places += [0] * (5 - len(places))
        options = options_array(rule, o)
        which = f"any{name[-4:]}" if any_rule else name
        module.step(which, number_of(rule), *places, x.size, options.ctypes.data)

    return step


def from_ctypes(name, rule, x, g, states, o):
    function = kernels.functions()[f"optcore_{name}"]
    pointers = [
        a.ctypes.data_as(kind) for a, kind in zip((x, g, *states), function.argtypes, strict=False)
    ]
    options = options_array(rule, o)    # must outlive the call: an address keeps nothing alive
    function(*pointers, x.size, options.ctypes.data)


def numba_steps():
    numba = pytest.importorskip("numba", reason="numba is missing")

    def compiled(function):
        names = [f"a{i}" for i in range(len(function.argtypes) - 2)]
        pointers = ", ".join(f"{name}.ctypes" for name in names)
        # written out: Numba cannot hand on any number of arguments
        code = f"lambda {', '.join(names)}, o: function({pointers}, a0.size, o.ctypes)"
        return numba.njit(nogil=True)(eval(code, {"function": function}))

    return {name: compiled(function) for name, function in kernels.functions().items()
            if name != "optcore_step"}


@pytest.fixture(scope="module")
def from_numba():
    steps = numba_steps()

    def step(name, rule, x, g, states, o):
        steps[f"optcore_{name}"](x, g, *states, options_array(rule, o))

    return step


@pytest.fixture
def call(request, embedding):
    if embedding == "ctypes":
        return from_ctypes
    if embedding == "numba":
        return request.getfixturevalue("from_numba")
    request.getfixturevalue("probes")
    module, *any_rule = embedding.split(", ")
    return from_probe(importlib.import_module(f"probe_{module}"), bool(any_rule))


@by_dtype
@every_rule
@pytest.mark.parametrize("embedding", ["c", "c, by number", CPP, "cython", "cython, by number",
                                       "ctypes", "numba"])
def test_same_bits_as_the_python_api(call, rule, dtype, rng, cases):
    name = f"{rule.name}_f{np.dtype(dtype).itemsize * 8}"
    for n in (37, 1000) if rule.is_adaptive else (0, 1, 37, 1000):
        for options in some(rule, all_options(rule)):
            x, g, *states = draw_tiny(rule, rng, n, dtype)
            expected = [a.copy() for a in (x, g, *states)]
            rule.step(*expected[:2], expected[2:], options)
            call(name, rule, x, g, states, options)
            cases(all(map(same_bits, (x, g, *states), expected)), options)


@pytest.fixture
def step_stored(request, embedding):
    """The generic entry, on what `make_arrays` and `make_options` returned."""
    function = kernels.functions()["optcore_step"]
    if embedding == "numba":
        numba = pytest.importorskip("numba", reason="numba is missing")
        return numba.njit(nogil=True)(
            lambda rule, arrays, n, options: function(rule, arrays.ctypes, n, options.ctypes))
    if embedding != "ctypes":
        request.getfixturevalue("probes")
        function = importlib.import_module(f"probe_{embedding}").step_stored
    return lambda rule, arrays, n, options: function(
        rule, arrays.ctypes.data, n, options.ctypes.data)


by_generic_entry = pytest.mark.parametrize("embedding", ["c", CPP, "cython", "ctypes", "numba"])


@every_rule
@by_generic_entry
def test_any_storage(step_stored, rule, rng, cases):
    """In two parts, whose noise is that of the whole."""
    for param, grad, state in [
        ("bfloat16", "bfloat16", "float32"), ("float32", "float16", "bfloat16"),
        ("float16", "float32", "float16"), ("float32",) * 3,
    ]:
        for o in some(rule, all_options(rule)):
            names = [param, grad, *[state] * len(rule.states)]
            x, g, *states = (rounded(rng.standard_normal(700).astype(np.float32), name)
                             for name in names)
            if rule.is_adaptive:
                states = [rounded(a, names[2]) for a in nonnegative(rule, map(widened, states))]
            new_x, new_states = rule.reference(x, g, states, o, "stochastic", 99)
            for part in (slice(0, 512), slice(512, 700)):
                arrays = [a[part] for a in (x, g, *states)]
                options = options_array(rule, o)
                options["stochastic"], options["noise_key"] = True, 99
                options["first_element"] = part.start
                step_stored(number_of(rule), kernels.make_arrays(*arrays), arrays[0].size, options)
            cases(all(map(same_bits, (x, *states), (new_x, *new_states))), (names, o))


@by_generic_entry
@pytest.mark.parametrize(("name", "rest"), [
    ("bfloat16", np.uint16), ("bfloat16", np.float32), ("float16", np.float32)])
def test_masters(step_stored, name, rest, rng):
    x = rounded(rng.standard_normal(700).astype(np.float32), name)
    plain, rest = widened(x).copy(), np.zeros(700, rest)
    options = kernels.make_options(lr=0.001)
    for _ in range(20):
        g = rng.standard_normal(700).astype(np.float32)
        step_stored(0, kernels.make_arrays(x, g, rest=rest), 700, options)
        optcore.sgd_step(plain, g, lr=0.001)
    low = rest.astype(np.int64) if rest.dtype == np.uint16 else None
    if low is None:
        assert same_bits(rest, plain)
        assert same_bits(x, rounded(plain, name))
    else:
        high = x.view(np.uint16).astype(np.int64) - (low >= 0x8000)
        assert same_bits((high << 16 | low).astype(np.uint32).view(np.float32), plain)


def test_make_arrays_refuses_other_types():
    x, half = np.zeros(3, np.float32), np.zeros(3, np.float16)
    with pytest.raises(TypeError, match="bfloat16 or float16, got int64"):
        kernels.make_arrays(x, np.zeros(3, np.int64))
    for param, grad in [(x.astype(float), half), (half, x.astype(float))]:
        with pytest.raises(TypeError, match="arrays must all be float64 or none, got float"):
            kernels.make_arrays(param, grad)
    for param, rest in [(half, np.zeros(3, np.uint16)), (x, x)]:
        with pytest.raises(TypeError, match="rest must be uint16 beside bfloat16, or float32"):
            kernels.make_arrays(param, half, rest=rest)


def test_every_rule_has_its_functions():
    names = {f"optcore_{rule.name}_{kind}" for rule in RULES for kind in ("f32", "f64")}
    names.add("optcore_step")
    assert set(kernels.addresses()) == names == set(kernels.functions())
    assert list(dict.fromkeys(rule.name for rule in RULES)) == RULE_NAMES
    assert list(kernels.RULES) == RULE_NAMES
    assert list(kernels.RULES.values()) == list(range(len(RULE_NAMES)))


@pytest.mark.parametrize("embedding", ["c", CPP, "cython"])
def test_defaults(probes, embedding):
    module = importlib.import_module(f"probe_{embedding}")
    filled = np.frombuffer(module.defaults(), kernels.options_dtype)
    defaults = kernels.make_options()[0]
    assert filled[0].item() == defaults.item()      # but for the padding
    assert [float(defaults[name]) for name in kernels.options_dtype.names] == (
        [kernels.options_dtype.itemsize, 0, 0, 0, 0, 1, np.inf, *[0] * 8,
         0.99, 0.9, 0.999, 1e-8, 0, 0, 0]
    )


def test_make_options_refuses_what_is_no_field():
    with pytest.raises(TypeError, match=r"lr, momentum, .* got 'learning_rate'"):
        kernels.make_options(learning_rate=0.1)


def test_numba_checks_dtypes():
    numba = pytest.importorskip("numba", reason="numba is missing")
    x = np.zeros(3)
    with pytest.raises(numba.TypingError):
        numba_steps()["optcore_sgd_f32"](x, x.copy(), kernels.make_options())


def test_any_thread_may_call():
    """Threads that let go of the GIL, as ctypes does, each with arrays of its own."""
    rule = RULES_BY_ID["momentum"]
    options = Options(lr=0.1, momentum=0.9)
    results = []

    def work():
        x, g = np.ones(10_001, np.float32), np.full(10_001, 0.3, np.float32)
        v = np.zeros_like(x)
        for _ in range(100):
            from_ctypes("momentum_f32", rule, x, g, [v], options)
        results.append(x.tobytes())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(results)) == 1


def test_one_table_for_several_files(probes):
    import shared

    assert shared.scale() == 1.0


# Versions

@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("other_abi", r"compiled for optcore's ABI 3 .* installed optcore \S+ has ABI 2 "),
        ("other_options", r"ABI 2 \(options of 168 bytes.* has ABI 2 \(160, "),
        ("other_table", r"ABI 2 \(options of 160 bytes, table of 80, .* \(160, 72, .* build it"),
        ("other_rules", r"ABI 2 .* \d+ rules\); .* has ABI 2 \(160, 72, \d+\): build it again"),
        ("other_cython", r"does not export expected C variable optcore_abi_3"),
    ],
)
def test_another_version_is_an_import_error(probes, module, message):
    with pytest.raises(ImportError, match=message):
        importlib.import_module(module)


def test_defaults_fill_no_more_than_the_caller_has():
    """A caller compiled with fewer options has a smaller struct, whose size says so."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = (ctypes.c_void_p * 6).from_address(
        get_pointer(kernels._C_API, b"optcore.kernels._C_API"))
    defaults = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)(table[5])
    options = np.full(kernels.options_dtype.itemsize, 0xA5, np.uint8)
    defaults(options.ctypes.data, 40)
    whole = kernels.make_options().view(np.uint8)
    assert options[:8].view(np.uint64)[0] == 40
    assert same_bits(options[8:40], whole[8:40])
    assert (options[40:] == 0xA5).all()


def test_a_caller_compiled_before_an_option_has_its_default():
    """What lies behind a smaller struct belongs to the caller, and is not read."""
    rule, x, g = RULES_BY_ID["momentum"], np.ones(3, np.float32), np.zeros(3, np.float32)
    v = np.full(3, 1e-40, np.float32)
    expected = rule.reference(x, g, [v], Options(momentum=0.9))
    options = kernels.make_options(lr=0.1, momentum=0.9, flush_subnormals=True)
    options["size"] = 72
    pointers = [a.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) for a in (x, g, v)]
    kernels.functions()["optcore_momentum_f32"](*pointers, 3, options.ctypes.data)
    assert same_bits(x, expected[0])
    assert same_bits(v, expected[1][0])
    assert v.all()


@pytest.mark.parametrize("spoil", ["options['size'] = 0", "options['size'] = 4096"])
def test_options_that_nobody_made_stop_the_process(spoil):
    """A step has no way to raise, and must not take wrong ones."""
    code = (
        "import ctypes, numpy as np\nfrom optcore import kernels\nx = np.ones(3)\n"
        f"options = kernels.make_options(lr=0.1); {spoil}\n"
        "f = kernels.functions()['optcore_sgd_f64']\n"
        "p = [x.ctypes.data_as(kind) for kind in f.argtypes[:2]]\n"
        "f(*p, 3, options.ctypes.data)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "options must be made by optcore_defaults() or make_options()" in done.stderr


@pytest.mark.parametrize("change", ["del kernels._C_API", "kernels._C_API = 1"])
def test_a_version_without_table_is_an_import_error(probes, change):
    code = f"from optcore import kernels; {change}\nimport probe_c"
    done = subprocess.run([sys.executable, "-c", code], cwd=probes, capture_output=True, text=True,
                          check=False)
    assert "ImportError: this module was compiled for optcore's ABI 2;" in done.stderr


def test_a_changed_layout_has_a_new_number():
    """Whoever changes a struct raises OPTCORE_ABI_VERSION and records the new layout here.

    What is appended to the end of one keeps the number, but is recorded too.
    """
    layouts = {1: "ff9ec8cf42b1e8bd", 2: "f605a88761ce8f1b"}
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    structs = " ".join(re.findall(r"typedef struct.*?} \w+;", text, flags=re.DOTALL))
    digest = hashlib.sha256(" ".join(structs.split()).encode()).hexdigest()[:16]
    assert layouts[kernels.ABI_VERSION] == digest
    assert f"cdef const optcore_api *optcore_abi_{kernels.ABI_VERSION}\n" in (
        HEADER.parent.with_name("kernels.pxd").read_text()
    )


def test_options_dtype_is_the_struct():
    struct = re.search(r"typedef struct optcore_options {(.*?)}", HEADER.read_text(), re.DOTALL)
    fields = re.findall(r"(size_t|double|int|uint64_t) (\w+);", struct.group(1))
    c_types = {"size_t": ctypes.c_size_t, "double": ctypes.c_double, "int": ctypes.c_int,
               "uint64_t": ctypes.c_uint64}

    class Struct(ctypes.Structure):
        _fields_ = [(name, c_types[kind]) for kind, name in fields]

    assert kernels.options_dtype == np.dtype(Struct)
    assert kernels.options_dtype.itemsize == ctypes.sizeof(Struct)


# What a user compiles

@pytest.mark.parametrize(
    ("compiler", "suffix", "standard"),
    [
        pytest.param(C, ".c", "c99", id="c99"),
        pytest.param(C, ".c", "c17", id="c17"),
        pytest.param(CXX, ".cpp", "c++11", marks=needs_cxx, id="c++11"),
        pytest.param(CXX, ".cpp", "c++17", marks=needs_cxx, id="c++17"),
    ],
)
def test_header_compiles_without_a_warning(compiler, suffix, standard, tmp_path):
    if os.name == "nt" or shutil.which(compiler) is None:
        pytest.skip(f"no compiler with GCC's options ({compiler})")
    source = tmp_path / f"use{suffix}"
    source.write_text("#include <optcore.h>\nint use(void);\n"
                      "int use(void) { return import_optcore(); }\n")
    done = subprocess.run(
        [compiler, f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-pedantic",
         "-fsyntax-only", "-isystem", sysconfig.get_paths()["include"],
         f"-I{optcore.get_include()}", str(source)],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("example", ["embed_c", pytest.param("embed_cpp", marks=needs_cxx),
                                     "embed_cython"])
def test_example(build, example):
    folder = build(EXAMPLES / example)
    check_example([sys.executable, "train.py"], folder)


def test_example_numba():
    pytest.importorskip("numba", reason="numba is missing")
    check_example([sys.executable, str(EXAMPLES / "embed_numba.py")], EXAMPLES.parent)


def check_example(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the last bit" in done.stdout
