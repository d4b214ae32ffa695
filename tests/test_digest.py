"""The bits of a fixed list of operations, the same on every platform and in every release.

`digest.txt` keeps a SHA-256 for each section of the list, of the bits of every result, and one
over all sections. Inputs are made by integer arithmetic, and no expected value is computed: what
NumPy's or libm's next version does has no part in it. The list is on its own, beside the tables
of the other tests: a release may add sections, and never changes one.

    python tests/test_digest.py > tests/digest.txt      writes the file anew
"""
from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

import optcore
from optcore import kernels
from optcore.runtime import always_threaded

EXPECTED = Path(__file__).with_name("digest.txt")

# Of a dtype: its bits as integers, bits of the mantissa, bias of the exponent, the one NaN
LAYOUTS = {
    "float32": (np.uint32, 23, 127, 0x7FC0_0000),
    "float64": (np.uint64, 52, 1023, 0x7FF8_0000_0000_0000),
}
DTYPES = list(LAYOUTS)
LINE = 64           # bytes of a cache line

LENGTHS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129,
           257, 1000]
LONG = [4097, 65_537]
SMALL = [1, 255, 0, 700, 3, 64]
LARGE = [1, 255, 8192, 8193, 3, 12_289]     # around 8192, where threads and sums are cut

SGD, LEFT, RIGHT = {}, {"momentum": 0.9}, {"momentum": 0.9, "lr_in_velocity": True}
DAMPED = {"momentum": 0.9, "dampening": 0.25}
STEPS = {
    "sgd": [SGD],
    "momentum": [LEFT, RIGHT, {**DAMPED, "first_step": False}, {**DAMPED, "first_step": True},
                 {**DAMPED, "dampen_first": True}],
    "nesterov": [LEFT, RIGHT],
}
OPTIMIZERS = [
    SGD, LEFT, RIGHT, DAMPED, {**DAMPED, "dampen_first": True}, {**LEFT, "nesterov": True},
    {**RIGHT, "nesterov": True},
]
DECAYS = [{}, {"weight_decay": 0.01}, {"weight_decay": 0.01, "decoupled_weight_decay": True}]
CLIPS = [{}, {"clip_value": 0.5}, {"max_norm": 1.0}]
# Functions with the states that choose among their variants
ADAPTIVE = [
    ("adagrad", ["square_sum"], {}), ("rmsprop", ["square_avg"], {}),
    ("rmsprop", ["square_avg", "velocity"], {"momentum": 0.9}),
    ("rmsprop", ["square_avg", "velocity"], {**RIGHT, "nesterov": True}),
    ("rmsprop", ["square_avg", "grad_avg"], {"alpha": 0.75}),
    ("rmsprop", ["square_avg", "velocity", "grad_avg"], RIGHT),
    ("rmsprop", ["square_avg", "velocity", "grad_avg"], {**LEFT, "nesterov": True}),
    ("adam", ["exp_avg", "exp_avg_sq"], {"step": 1}),
    ("adam", ["exp_avg", "exp_avg_sq"], {"step": None, "beta2": 0.75}),
    ("adam", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"], {"step": 1000}),
]
ADAPTIVE_OPTIMIZERS = [
    ("AdaGrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("RMSProp", {"momentum": 0.5, "centered": True}), ("RMSProp", {"alpha": 0.5}),
    ("Adam", {"amsgrad": True}), ("Adam", {"eps_in_sqrt": True}), ("AdamW", {"beta1": 0.5}),
]
TABLES = [(60, 4), (300,), (9, 257), (1, 3), (2, 8193), (5, 2, 3)]
LAZY = ["exact", "rows"]


# Inputs

def bits_of(first, n):
    """The words of splitmix64 after `first` of them."""
    z = np.arange(first + 1, first + n + 1, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return z ^ (z >> np.uint64(31))


class Numbers:
    """Signed numbers below 4, some of them around the smallest normal one, in fixed order."""

    def __init__(self, dtype, tiny=True):
        unsigned, mantissa, bias, _ = LAYOUTS[dtype]
        self.dtype, self.at = np.dtype(dtype), 0
        words = bits_of(0, 200_003)
        field = words >> np.uint64(60) & np.uint64(7)
        exponent = field + np.uint64(bias - 6)
        if tiny:
            near = words >> np.uint64(57) & np.uint64(7) == 0
            exponent = np.where(near, field >> np.uint64(1), exponent)
        sign = words >> np.uint64(63) << np.uint64(8 * self.dtype.itemsize - 1)
        fraction = words & np.uint64((1 << mantissa) - 1)
        bits = sign | exponent << np.uint64(mantissa) | fraction
        self.values = bits.astype(unsigned).view(dtype)

    def take(self, n):
        """Return the next n of them, a view."""
        if self.at + n > self.values.size:
            self.at = (self.at + n) % 101       # another phase than before
        self.at += n
        return self.values[self.at - n : self.at]

    def model(self, sizes):
        return [self.take(n).copy() for n in sizes]


class Places:
    """Arrays at offsets within a cache line that differ from call to call."""

    def __init__(self, dtype, count, most):
        itemsize = np.dtype(dtype).itemsize
        self.memory = []
        for _ in range(count):
            memory = np.zeros(most * itemsize + 2 * LINE, np.uint8)
            start = -memory.ctypes.data % LINE
            self.memory.append(memory[start : start + most * itemsize + LINE].view(dtype))
        self.offsets = LINE // itemsize
        self.calls = 0

    def put(self, arrays):
        """Return copies of the arrays, in their places."""
        self.calls += 1
        placed = []
        for i, (memory, values) in enumerate(zip(self.memory, arrays, strict=False)):
            offset = self.calls * (2 * i + 1) % self.offsets
            view = memory[offset : offset + values.size]
            view[...] = values
            placed.append(view)
        return placed


def options_of_steps(rule, variants):
    """Every combination of the options of one step, under every variant of its rule."""
    for variant, decay, maximize, scale, clip, flush in itertools.product(
        variants, DECAYS, [False, True], [1.0, 0.3], CLIPS[:2],
        [False, True] if rule != "sgd" else [None],
    ):
        options = {"lr": 0.1, **variant, **decay, **clip, "maximize": maximize, "grad_scale": scale}
        yield options if flush is None else {**options, "flush_subnormals": flush}


# The sections: each yields the arrays, and first the numbers, that an operation leaves

def functions(dtype, rule):
    step = getattr(optcore, f"{rule}_step")
    count = 2 if rule == "sgd" else 3
    numbers, places = Numbers(dtype), Places(dtype, 3, max(LONG))
    for n in LENGTHS:
        for options in options_of_steps(rule, STEPS[rule]):
            x, g, *states = places.put([numbers.take(n) for _ in range(count)])
            step(x, g, *states, **options)
            yield x, *states
    optcore.set_num_threads(3)
    for n, variant, decay, clip in itertools.product(LONG, STEPS[rule], DECAYS, CLIPS[:2]):
        x, g, *states = places.put([numbers.take(n) for _ in range(count)])
        step(x, g, *states, lr=0.1, **variant, **decay, **clip)
        yield x, *states


def specials(dtype, rule):
    """Every pairing of NaN, infinities, signed zeros, subnormals and extremes."""
    unsigned, mantissa, bias, nan = LAYOUTS[dtype]
    top = 8 * np.dtype(dtype).itemsize - 1
    positive = [
        0, 1, (1 << mantissa) - 1, 1 << mantissa,               # zero, subnormals, normal
        (2 * bias + 1 << mantissa) - 1, 2 * bias + 1 << mantissa,   # largest, infinity
        bias << mantissa, bias - 4 << mantissa | 0x9999,        # 1 and about a sixteenth
    ]
    values = np.array([*positive, *(bits | 1 << top for bits in positive), nan], unsigned)
    columns = np.meshgrid(*[values.view(dtype)] * (2 if rule == "sgd" else 3), indexing="ij")
    step = getattr(optcore, f"{rule}_step")
    for options in options_of_steps(rule, STEPS[rule]):
        x, g, *states = (column.flatten() for column in columns)
        step(x, g, *states, **options)
        yield x, *states


def entries(dtype):
    """The functions for embedders."""
    numbers, places = Numbers(dtype), Places(dtype, 3, 1000)
    for rule, variants in STEPS.items():
        step = kernels.functions()[f"optcore_{rule}_f{dtype[-2:]}"]
        variants = [options for options in variants if "dampen_first" not in options]
        for n in (0, 1, 5, 37, 1000):
            for options in options_of_steps(rule, variants):
                arrays = places.put([numbers.take(n) for _ in range(2 if rule == "sgd" else 3)])
                struct = kernels.make_options(**options)
                step(*(array.ctypes.data_as(kind)
                       for array, kind in zip(arrays, step.argtypes, strict=False)),
                     n, struct.ctypes.data)
                x, _, *states = arrays
                yield x, *states


def many_steps(dtype):
    """Into the subnormals that a velocity decays to under zero gradients."""
    numbers = Numbers(dtype, tiny=False)
    start = math.ldexp(1, -80 if dtype == "float32" else -960)
    for rule, variants in STEPS.items():
        step = getattr(optcore, f"{rule}_step")
        for variant, flush in itertools.product(variants, [False, True]):
            if rule == "sgd" or variant.get("first_step"):
                continue
            x, g, v = (start * array for array in numbers.model([37] * 3))
            for k in range(250):
                step(x, g, v, **{**variant, "lr": 0.1, "momentum": 0.75, "flush_subnormals": flush})
                yield x, v
                if k == 2:
                    g[:] = 0


def adaptive_functions(dtype):
    numbers = Numbers(dtype)
    for (name, states, options), n, decay, clip, inside, flush in itertools.product(
        ADAPTIVE, [1, 7, 33, 257, 1000], DECAYS, CLIPS[:2], [False, True], [False, True]
    ):
        x, g, *arrays = numbers.model([n] * (2 + len(states)))
        arrays = [np.abs(a) if "sq" in state else a
                  for a, state in zip(arrays, states, strict=True)]
        getattr(optcore, f"{name}_step")(
            x, g, **dict(zip(states, arrays, strict=True)), lr=0.1, grad_scale=0.3,
            eps_in_sqrt=inside, flush_subnormals=flush, **options, **decay, **clip)
        yield x, *arrays


def adaptive_models(dtype):
    """Whole models, on threads, towards replicas and by themselves."""
    numbers = Numbers(dtype)
    for count, (name, options), clip, ema in itertools.product(
        [1, 3], ADAPTIVE_OPTIMIZERS, CLIPS, [None, 0.9]
    ):
        optcore.set_num_threads(count)
        opt = getattr(optcore, name)(numbers.model(LARGE), lr=0.1, track_grad_norm=True,
                                     ema_decay=ema, weight_decay=0.001, **options, **clip)
        for k in range(3):
            opt.step([None if i == k else g for i, g in enumerate(numbers.model(LARGE))])
            yield *numbers_of(opt), *params_of(opt)
        opt.outer_step([numbers.model(LARGE) for _ in range(6)], weights=range(1, 7))
        yield *params_of(opt), *(
            a for entry in opt.state_dict()["state"].values() for a in entry.values()
            if isinstance(a, np.ndarray))


def params_of(opt):
    return opt.param_groups[0]["params"]


def states_of(opt):
    for entry in opt.state_dict()["state"].values():
        yield from (entry[name] for name in ("velocity", "ema") if entry[name] is not None)


def numbers_of(opt):
    norm = math.nan if opt.grad_norm is None else opt.grad_norm
    return norm, opt.step_count, *opt.nonfinite_params


def models(dtype):
    """Whole small models under every pair of stages, with a NaN or an infinity at times."""
    numbers = Numbers(dtype)
    for k, (threads, rule, maximize, decay, clip, ema) in enumerate(itertools.product(
        [1, 3], OPTIMIZERS, [False, True], DECAYS, CLIPS, [None, 0.9]
    )):
        optcore.set_num_threads(threads)
        opt = optcore.SGD(
            numbers.model(SMALL), lr=lambda step: 0.1 / (1 + step), ema_decay=ema,
            maximize=maximize, skip_nonfinite=k % 2 == 0, flush_subnormals=k % 5 < 2,
            track_grad_norm=k % 3 == 0, **rule, **decay, **clip,
        )
        for step in range(4):
            grads = numbers.model(SMALL)
            if step == 2:
                grads[3][k % 700] = [math.nan, math.inf, -math.inf][k % 3]
            given = [None if i == step else grad for i, grad in enumerate(grads)]
            done = opt.step(given, grad_scale=0.5 if step else 1.0, zero_grad=step == 3)
            states = states_of(opt) if step == 3 else ()
            yield done, *numbers_of(opt), *params_of(opt), *grads, *states


def replicas(dtype):
    numbers = Numbers(dtype)
    for threads, rule, clip, workers, weighted, ema in itertools.product(
        [1, 3], OPTIMIZERS, CLIPS, [1, 2, 3, 5], [False, True], [None, 0.99]
    ):
        optcore.set_num_threads(threads)
        opt = optcore.SGD(numbers.model(SMALL), lr=0.1, track_grad_norm=True, ema_decay=ema,
                          weight_decay=0.001, **rule, **clip)
        sets = [numbers.model(SMALL) for _ in range(workers)]
        weights = [1.0, 3.0, 0.1, 7.0, 0.0][:workers] if weighted else None
        opt.step_replicas(sets, weights=weights, grad_scale=0.7, zero_grad=weighted)
        yield *numbers_of(opt), *params_of(opt), *itertools.chain(*sets), *states_of(opt)


def outer_steps(dtype):
    """Towards one to nine replicas, at once and one by one, and back into them."""
    numbers = Numbers(dtype)
    for threads, rule, clip, workers, weighted in itertools.product(
        [1, 3], OPTIMIZERS, CLIPS, [1, 2, 3, 4, 5, 9], [False, True]
    ):
        optcore.set_num_threads(threads)
        opt = optcore.SGD(numbers.model(SMALL), lr=0.7, track_grad_norm=True, weight_decay=0.001,
                          **rule, **clip)
        weights = [1.0, 3.0, 0.1, 7.0, 0.0, 2.0, 5.0, 0.3, 4.0][:workers] if weighted else None
        sets = [numbers.model(SMALL) for _ in range(workers)]
        opt.outer_step(sets, weights=weights, grad_scale=0.7, write_back=weighted)
        yield *numbers_of(opt), *params_of(opt), *itertools.chain(*sets), *states_of(opt)
        with opt.collecting(grad_scale=0.7) as mean:
            for k in range(workers):
                mean.add(numbers.model(SMALL), weights and weights[k])
        yield *numbers_of(opt), *params_of(opt), *states_of(opt)


def pieces(dtype):
    """Micro-batches folded into the velocities, and steps parameter by parameter."""
    numbers = Numbers(dtype)
    for threads, right, decay, clip in itertools.product(
        [1, 3], [False, True], [0.0, 0.001], [False, True]
    ):
        optcore.set_num_threads(threads)
        opt = optcore.SGD(numbers.model(LARGE), lr=0.1, momentum=0.9, lr_in_velocity=right,
                          weight_decay=decay, decoupled_weight_decay=True)
        with opt.accumulating(grad_scale=0.3) as micro:
            for _ in range(3):
                micro.add(numbers.model(LARGE))
        yield *params_of(opt), *states_of(opt)
        opt.clip_value = 0.1 if clip else None
        with opt.stepping(grad_scale=0.3) as part:
            for i, grad in enumerate(numbers.model(LARGE)):
                part.step(i, grad)
        yield *params_of(opt), *states_of(opt)


def threads(dtype):
    """Models large enough to be cut for threads."""
    numbers = Numbers(dtype)
    for count, rule, clip, ema in itertools.product([1, 3], OPTIMIZERS, CLIPS, [None, 0.9]):
        optcore.set_num_threads(count)
        opt = optcore.SGD(numbers.model(LARGE), lr=0.1, track_grad_norm=True, ema_decay=ema,
                          weight_decay=0.001, **rule, **clip)
        for _ in range(2):
            opt.step(numbers.model(LARGE))
            yield *numbers_of(opt), *params_of(opt)
        opt.step_replicas([numbers.model(LARGE) for _ in range(2)])
        yield *numbers_of(opt), *params_of(opt), *states_of(opt)


def norms(dtype):
    """Of every length around lanes and chunks, up to the ends of the range of squares."""
    numbers = Numbers(dtype, tiny=False)
    powers = [0, -60, -130, 60, 120] if dtype == "float32" else [0, -530, -1030, 530, 1010]
    lengths = [*range(1, 18), 31, 32, 33, 63, 64, 65, 255, 256, 257, 8191, 8192, 8193, 16_385]
    for threads, n, power, scale in itertools.product([1, 3], lengths, powers, [1.0, 0.3]):
        optcore.set_num_threads(threads)
        opt = optcore.SGD(np.zeros(n, dtype), lr=0.0, track_grad_norm=True)
        opt.step(numbers.take(n) * np.dtype(dtype).type(math.ldexp(1, power)), grad_scale=scale)
        yield numbers_of(opt)


def accumulation(dtype):
    numbers = Numbers(dtype)
    for threads in (1, 3):
        optcore.set_num_threads(threads)
        grads = [np.zeros(n, dtype) for n in SMALL]
        opt = optcore.SGD(numbers.model(SMALL), lr=0.1, momentum=0.9, grads=grads)
        for _ in range(40):
            for _ in range(2):
                opt.accumulate(numbers.model(SMALL))
                yield grads
            opt.step(grad_scale=0.5, zero_grad=True)
            yield *params_of(opt), *grads


def conversions(dtype):
    """Velocities between the two conventions."""
    numbers = Numbers(dtype, tiny=False)
    for to_right, nesterov, lr in itertools.product(
        [False, True], [False, True], [0.1, 0.3, 1e-3, 2.0]
    ):
        kinds = [{"momentum": 0.9, "nesterov": nesterov, "lr_in_velocity": right}
                 for right in (not to_right, to_right)]
        before, after = (optcore.SGD(numbers.model(SMALL), lr=lr, **kind) for kind in kinds)
        before.step(numbers.model(SMALL))
        after.load_state_dict(before.state_dict())
        yield states_of(after)


def halved(dtype, arrays):
    """Numbers of half types, of magnitudes from an eighth to two, made of the bits of float32."""
    for array in arrays:
        bits = array.view(np.uint32)
        if dtype == "bfloat16":
            yield (bits >> np.uint32(16)).astype(np.uint16).view(optcore.bfloat16)
        else:
            sign, exponent = bits >> 16 & 0x8000, 12 + (bits >> 23 & 3)
            yield (sign | exponent << 10 | bits >> 13 & 0x3FF).astype(np.uint16).view(np.float16)


def half_models(dtype):
    """Models of half types: every master, velocity and rounding, gradients of each type."""
    numbers = Numbers("float32", tiny=False)
    masters = [None, "split", "float32"] if dtype == "bfloat16" else [None, "float32"]
    for count, rule, master, narrow, rounding, clip in itertools.product(
        [1, 3], OPTIMIZERS, masters, [None, "bfloat16"], ["nearest", "stochastic"], CLIPS
    ):
        optcore.set_num_threads(count)
        opt = optcore.SGD(
            list(halved(dtype, numbers.model(LARGE))), lr=0.1, weight_decay=0.001, seed=2017,
            master=master, velocity_dtype=narrow, rounding=rounding, **rule, **clip,
        )
        for kind in ("bfloat16", "float16", "float32"):
            grads = numbers.model(LARGE)
            opt.step(grads if kind == "float32" else list(halved(kind, grads)))
        results = [*params_of(opt), *states_of(opt), *(
            entry["master"] for entry in opt.state_dict()["state"].values() if "master" in entry)]
        yield opt.step_count, *(
            a if a.dtype == np.float32 else a.view(np.uint16) for a in results)


def tables(numbers):
    return [numbers.take(math.prod(shape)).reshape(shape).copy() for shape in TABLES]


def rows_of(numbers, step):
    """Gradients of up to seven rows of each table, some of them several times."""
    for k, (n, *shape) in enumerate(TABLES):
        count = (step + 3 * k) % 8
        indices = bits_of(1000 * step + 10 * k, count) % np.uint64(n)
        values = numbers.take(count * math.prod(shape)).reshape(count, *shape).copy()
        yield optcore.Rows(indices.astype([np.int32, np.int64][step % 2]), values)


def flat_params_of(opt):
    return [p.ravel() for p in params_of(opt)]


def flat_states_of(opt):
    return [state.ravel() for state in states_of(opt)]


def rows(dtype):
    """Steps of some rows, and what becomes of the others, now and later."""
    numbers = Numbers(dtype)
    for k, (threads, lazy, rule, decay) in enumerate(itertools.product(
        [1, 3], LAZY, OPTIMIZERS, DECAYS
    )):
        clip = CLIPS[k // 2 % 3]
        optcore.set_num_threads(threads)
        opt = optcore.SGD(
            tables(numbers), lr=lambda step: 0.1 / (1 + step // 4), lazy=lazy, maximize=k % 2 == 0,
            flush_subnormals=k % 5 < 2, skip_nonfinite=k % 3 == 0, track_grad_norm=k % 7 == 0,
            ema_decay=0.9 if lazy == "rows" and k % 2 else None, **rule, **decay, **clip,
        )
        for step in range(8):
            grads = list(rows_of(numbers, step))
            if step == 2 and len(grads[4]):
                grads[4].values[0, k] = math.inf
            if step == 5:
                grads[1:4] = None, tables(numbers)[2], None
            opt.step(grads, grad_scale=0.7)
            yield *numbers_of(opt), *flat_params_of(opt)
        replicas = [list(rows_of(numbers, step)) for step in (9, 10, 11)]
        opt.step_replicas(replicas, weights=[3.0, 0.1, 7.0] if k % 2 else None)
        opt.catch_up(0, [[3, 59], [0, 3]])
        yield *numbers_of(opt), *flat_params_of(opt)
        opt.catch_up()
        yield *flat_params_of(opt), *flat_states_of(opt)


def sleeping_rows(dtype):
    """Rows that miss up to 1200 steps, alike or under a schedule that is never the same."""
    numbers = Numbers(dtype, tiny=False)
    for hold, rule, decay in itertools.product([1, 100, 10_000], OPTIMIZERS, DECAYS):
        x = numbers.take(120).reshape(30, 4).copy()
        opt = optcore.SGD(x, lr=lambda step, hold=hold: 0.1 / (1 + step // hold), **rule, **decay)
        for step in range(1200):
            row = step**3 % 997
            opt.step(optcore.Rows([row if row < 29 else 0], numbers.take(4).reshape(1, 4)))
            if step % 300 == 0:
                yield flat_params_of(opt)
        opt.catch_up(0, [29])
        yield *flat_params_of(opt), *flat_states_of(opt)


SECTIONS = {
    f"{section.__name__} {' '.join(arguments)}": (section, arguments)
    for section, table in [
        (functions, [DTYPES, STEPS]), (specials, [DTYPES, STEPS]), (entries, [DTYPES]),
        (many_steps, [DTYPES]), (models, [DTYPES]), (replicas, [DTYPES]), (threads, [DTYPES]),
        (outer_steps, [DTYPES]), (pieces, [DTYPES]),
        (norms, [DTYPES]), (accumulation, [DTYPES]), (conversions, [DTYPES]),
        (half_models, [["bfloat16", "float16"]]), (rows, [DTYPES]), (sleeping_rows, [DTYPES]),
        (adaptive_functions, [DTYPES]), (adaptive_models, [DTYPES]),
    ]
    for arguments in itertools.product(*table)
}


# Their digests

def as_bytes(array):
    """Return the bits, little end first; a NaN's sign and payload, which IEEE leaves open, are one.
    """
    if array.dtype == np.uint16:        # of finite numbers
        return array.astype("<u2").tobytes()
    unsigned, _, _, nan = LAYOUTS[array.dtype.name]
    bits, missing = array.view(unsigned), np.isnan(array)
    if missing.any():
        bits = np.where(missing, unsigned(nan), bits)
    return bits.astype(bits.dtype.newbyteorder("<"), copy=False).tobytes()


def digest_of(section, arguments):
    """Run a section at the SIMD level in use; return its digest and how many operations it has.

    Sections that say nothing else run on one thread.
    """
    sha, operations = hashlib.sha256(), 0
    optcore.set_num_threads(1)
    for results in section(*arguments):
        operations += 1
        results = list(results)
        arrays = [result for result in results if isinstance(result, np.ndarray)]
        numbers = results[: len(results) - len(arrays)]
        sha.update(as_bytes(np.array(numbers, np.float64)))
        for _, alike in itertools.groupby(arrays, key=lambda array: array.dtype):
            sha.update(as_bytes(np.concatenate(list(alike))))
    return sha.hexdigest(), operations


def run():
    """Return the digest and the number of operations of every section, and of all of them."""
    try:
        with always_threaded(), np.errstate(all="ignore"):
            table = {name: digest_of(*section) for name, section in SECTIONS.items()}
    finally:
        optcore.set_num_threads(None)
    return {**table, "all": total_of(table)}


def total_of(table):
    sha = hashlib.sha256("".join(digest for digest, _ in table.values()).encode())
    return sha.hexdigest(), sum(operations for _, operations in table.values())


def recorded():
    lines = [line.split(maxsplit=2) for line in EXPECTED.read_text().splitlines()]
    return {name: (digest, int(operations)) for digest, operations, name in lines}


@pytest.fixture(scope="module")
def seen(request):
    """Keep what every level computed, for the end of the report."""
    totals = {}

    class Report:
        @staticmethod
        def pytest_terminal_summary(terminalreporter):
            for (digest, operations), levels in totals.items():
                terminalreporter.write_line(
                    f"digest: {operations} operations at {', '.join(levels)}: {digest}"
                )

    request.config.pluginmanager.register(Report(), "optcore-digest")
    return totals


def test_the_file_is_whole():
    table = recorded()
    total = table.pop("all")
    assert total == total_of(table)
    assert total[1] > 37_000


def test_digest(simd_level, seen):
    table, expected = run(), recorded()
    seen.setdefault(table["all"], []).append(simd_level)
    assert list(table) == list(expected)
    differing = [name for name in table if table[name] != expected[name]]
    assert not differing, f"not the bits that {EXPECTED.name} has: {', '.join(differing)}"


if __name__ == "__main__":
    for name, (digest, operations) in run().items():
        print(digest, operations, name)
