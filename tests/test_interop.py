"""Arrays of other libraries at the border: the same memory, the same checks, kept alive."""
from __future__ import annotations

import array
import ctypes
import gc
import mmap
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
from test_errors import good

import optcore
from reference import rounded, same_bits, widened

N = 24


class Lender:
    """An array of a library that NumPy knows nothing of but DLPack."""

    def __init__(self, values, device=(1, 0)):
        self.values, self.device = values, device

    def __dlpack__(self, **keywords):
        return self.values.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.device


class Copier(Lender):
    def __dlpack__(self, **keywords):
        return self.values.copy().__dlpack__(**keywords)


class Breaker(Lender):
    def __dlpack__(self, **keywords):
        raise OSError("the cable is loose")


def as_array(values):
    return array.array("f" if values.dtype == np.float32 else "d", values.tobytes())


def as_bytearray(values):
    return memoryview(bytearray(values.tobytes())).cast("B").cast(
        "f" if values.dtype == np.float32 else "d", values.shape)


def as_ctypes(values):
    kind = ctypes.c_float if values.dtype == np.float32 else ctypes.c_double
    return (kind * values.size)(*values.tolist())


def as_mmap(values):
    memory = mmap.mmap(-1, values.nbytes)
    memory[:] = values.tobytes()
    return memoryview(memory).cast("f" if values.dtype == np.float32 else "d")


def as_tensor(values):
    return pytest.importorskip("torch").from_numpy(values.copy())


def as_parameter(values):
    return pytest.importorskip("torch").nn.Parameter(as_tensor(values))


# Before 2.1 NumPy could not tell that what DLPack lends may be written.
new_numpy = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="DLPack is read-only before NumPy 2.1")
LENDERS = {
    "array": as_array, "bytearray": as_bytearray, "ctypes": as_ctypes, "mmap": as_mmap,
    "dlpack": lambda values: Lender(values.copy()), "tensor": as_tensor, "parameter": as_parameter,
}


def read(lent):
    if isinstance(lent, Lender):
        return lent.values
    return lent.detach().numpy() if hasattr(lent, "detach") else np.array(lent)


@pytest.fixture(params=[pytest.param(name, marks=new_numpy) if name == "dlpack" else name
                        for name in LENDERS])
def lend(request):
    return LENDERS[request.param]


@pytest.fixture(params=["float32", "float64"])
def three(request, rng):
    """Return parameter, gradient and velocity."""
    return [rng.standard_normal(N).astype(request.param) for _ in range(3)]


def test_functions_step_the_lent_memory(lend, three):
    lent = [lend(values) for values in three]
    optcore.nesterov_step(*three, lr=0.1, momentum=0.9)
    optcore.nesterov_step(*lent, lr=0.1, momentum=0.9)
    for ours, theirs in zip(three, lent, strict=True):
        assert same_bits(read(theirs), ours)


@pytest.mark.parametrize("kind", ["single", "sequence", "mapping", "groups", "bound"])
def test_optimizers_step_the_lent_memory(kind, lend, three):
    def run(make):
        x, g = make(three[0]), make(three[1])
        params, grads = {
            "single": (x, g), "bound": (x, g), "sequence": ([x], [g]),
            "mapping": ({"x": x}, {"x": g}), "groups": ([{"params": x}], [g]),
        }[kind]
        opt = optcore.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.5,
                          grads=grads if kind == "bound" else None)
        given = () if kind == "bound" else (grads,)
        for _ in range(3):
            opt.step(*given, zero_grad=False)
        opt.step_replicas([grads, grads], zero_grad=False)
        if kind == "bound":
            opt.accumulate(make(three[2]))
        opt.step(*given, zero_grad=True)
        return read(x), read(g), opt

    (x, g, ours), (y, h, theirs) = run(np.copy), run(lend)
    assert same_bits(x, y)
    assert same_bits(g, h)
    assert not h.any()
    assert all(type(p) is np.ndarray for p in theirs.param_groups[0]["params"])
    theirs.load_state_dict(ours.state_dict())


@new_numpy
def test_a_mixed_list(three):
    x, g, _ = three
    params = [x, as_array(x), Lender(x.copy()), as_bytearray(x)]
    opt = optcore.SGD(params, lr=0.1)
    opt.step([as_array(g), g, None, Lender(g)])
    expected = x - x.dtype.type(0.1) * g
    optcore.sgd_step(expected, np.zeros_like(g), lr=0.1)
    assert same_bits(read(params[1]), x)
    assert same_bits(read(params[3]), x)
    assert not same_bits(read(params[2]), x)


def test_read_only_memory_is_for_gradients(three):
    x, g, _ = three
    lent = memoryview(g.tobytes()).cast("f" if g.dtype == np.float32 else "d")
    expected = x.copy()
    optcore.sgd_step(expected, g, lr=0.1)
    optcore.sgd_step(x, lent, lr=0.1)
    assert same_bits(x, expected)
    with pytest.raises(ValueError, match="param must be writeable"):
        optcore.sgd_step(lent, g, lr=0.1)
    with pytest.raises(ValueError, match="grads must be writeable"):
        optcore.SGD(x, lr=0.1).step(lent, zero_grad=True)


# Lifetime

@new_numpy
def test_memory_lives_as_long_as_the_optimizer():
    x, g = np.ones(N, np.float32), np.ones(N, np.float32)
    watched = [weakref.ref(x), weakref.ref(g)]
    opt = optcore.SGD([Lender(x)], lr=0.1, grads=[Lender(g)])
    del x, g
    gc.collect()
    assert all(ref() is not None for ref in watched)
    opt.step()
    assert (opt.param_groups[0]["params"][0] == np.float32(0.9)).all()
    del opt
    gc.collect()
    assert all(ref() is None for ref in watched)


def test_gradients_are_let_go_after_the_step():
    x, g = np.ones(N, np.float32), np.ones(N, np.float32)
    watched = weakref.ref(g)
    opt = optcore.SGD([x], lr=0.1)
    opt.step([Lender(g)])
    del g
    gc.collect()
    assert watched() is None


@new_numpy
@pytest.mark.parametrize("n", [1000, 1 << 20])      # malloc's own, and pages given back at once
@pytest.mark.parametrize("kind", ["generator", "mapping", "lender"])
def test_gradients_that_nobody_else_holds_live_through_the_step(kind, n):
    class Lazy(Mapping):
        def __getitem__(self, name):
            return np.full(n, ord(name), np.float32)

        def __iter__(self):
            return iter("abc")

        def __len__(self):
            return 3

    params = {name: np.zeros(n, np.float32) for name in "abc"}
    made = (np.full(n, ord(name), np.float32) for name in "abc")
    lenders = [Copier(np.full(n, ord(name), np.float32)) for name in "abc"]
    grads = {"generator": made, "mapping": Lazy(), "lender": lenders}[kind]
    opt = optcore.SGD(params if kind == "mapping" else list(params.values()), lr=1.0)
    opt.step(grads)
    for name, p in params.items():
        assert (p == -ord(name)).all()


def test_a_list_that_tells_another_length_is_counted():
    class Short(list):
        def __iter__(self):
            return iter(())

    opt = optcore.SGD([np.ones(3), np.ones(3)], lr=1.0)
    with pytest.raises(ValueError, match="one entry for each of 2 parameters, got 0"):
        opt.step(Short([np.ones(3), np.ones(3)]))


def test_a_buffer_in_use_cannot_move():
    x = array.array("f", [1] * N)
    opt = optcore.SGD(x, lr=0.1)
    with pytest.raises(BufferError):
        x.append(1)
    del opt
    gc.collect()
    x.append(1)


# Refusals

SHAPE = (4, 6)
BAD = [
    ("device", lambda: Lender(good(), device=(2, 0)), TypeError, "in CPU memory"),
    ("breaks", lambda: Breaker(good()), TypeError, "Breaker: the cable is loose"),
    ("class", lambda: Lender, TypeError, "must be a NumPy array, got type"),
    ("str", lambda: "abc", TypeError, "must be a NumPy array, got str"),
    ("bytes", lambda: b"abcd", TypeError, "bfloat16 or float16, got uint8"),
    ("int", lambda: array.array("i", [1] * N), TypeError, "bfloat16 or float16, got int32"),
    ("integers", lambda: Lender(np.ones(SHAPE, np.int64)), TypeError, "got int64"),
    ("bits", lambda: Lender(good().astype(np.uint16)), TypeError, "view(optcore.bfloat16)"),
    ("complex", lambda: Lender(good().astype(np.complex64)), TypeError, "got complex64"),
    ("reversed", lambda: Lender(good()[::-1]), ValueError, "must be contiguous"),
    ("strided", lambda: memoryview(as_array(np.ones(2 * N)))[::2], ValueError, "contiguous"),
    ("swapped", lambda: memoryview((ctypes.c_float.__ctype_be__ * N)()), TypeError,
     "native byte order"),
    ("misaligned", lambda: Lender(misaligned().reshape(SHAPE)), ValueError, "must be aligned"),
]
# A gradient is told what its parameter has; one that only lies otherwise is taken.
AS_GRADIENT = {
    "bytes": "has dtype uint8; its parameter", "int": "has dtype int32; its parameter",
    "integers": "has dtype int64; its", "bits": "has dtype uint16; its",
    "complex": "has dtype complex64; its", "swapped": "has dtype >f4; its",
}
TAKEN = ("reversed", "strided")

BAD_GRADIENTS = [
    ("short", lambda: as_array(good().ravel()[:7]), ValueError, "has shape (7,)"),
    ("double", lambda: Lender(good(dtype=np.float64)), TypeError, "has dtype float64; its par"),
]
BAD_PARAMS = [
    ("copy", lambda: Copier(good()), ValueError, "must lend its memory, got a copy from Copier"),
]


def misaligned():
    return np.zeros(4 * N + 1, np.uint8)[1:].view(np.float32)


def cases_of(rows):
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


@pytest.mark.parametrize(("make", "error", "words"), cases_of([
    (*row[:3], AS_GRADIENT.get(row[0], row[3])) for row in BAD + BAD_GRADIENTS
    if row[0] not in TAKEN
]))
def test_gradient_refused(make, error, words):
    params, grads = [good(), good(1)], [good(2), make()]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9)
    before = [p.copy() for p in params]
    with pytest.raises(error, match=r"grads\[1\]") as raised:
        opt.step(grads)
    assert words in str(raised.value)
    with pytest.raises(error) as raised:
        optcore.sgd_step(params[1], grads[1], lr=0.1)
    assert words in str(raised.value)
    assert str(raised.value).startswith("grad ")
    for p, q in zip(params, before, strict=True):
        assert same_bits(p, q)


@pytest.mark.parametrize(("make", "error", "words"), cases_of(BAD + BAD_PARAMS))
@new_numpy
def test_param_refused(make, error, words):
    with pytest.raises(error, match=r"params\[1\]") as raised:
        optcore.SGD([good(), make()], lr=0.1)
    assert words in str(raised.value)


@new_numpy
def test_shared_memory_is_seen_through_lenders():
    x = np.ones(N, np.float32)
    with pytest.raises(ValueError, match=r"params\[1\] shares memory with params\[0\]"):
        optcore.SGD([Lender(x), memoryview(x)], lr=0.1)
    with pytest.raises(ValueError, match="grad must not share memory with param"):
        optcore.sgd_step(Lender(x), memoryview(x), lr=0.1)
    g = np.ones(2 * N, np.float32)
    opt = optcore.SGD([x, np.ones(N, np.float32)], lr=0.1)
    with pytest.raises(ValueError, match=r"grads\[1\] must not share memory with grads\[0\]"):
        opt.step([memoryview(g[:N]), Lender(g[1 : N + 1])], zero_grad=True)
    opt = optcore.SGD([x], lr=0.1, grads=[Lender(g[:N])])
    with pytest.raises(ValueError, match="must not share memory with the gradient bound"):
        opt.accumulate([memoryview(g[1 : N + 1])])


def test_one_array_is_no_list_of_gradients():
    opt = optcore.SGD([np.ones(1, np.float32), np.ones(1, np.float32)], lr=0.1)
    with pytest.raises(TypeError, match="must be a sequence of 2 arrays, got array"):
        opt.step(array.array("f", [1, 2]))


def test_tensors_that_cannot_be_viewed():
    torch = pytest.importorskip("torch")
    for bad, words in [
        (torch.ones(4, 6).to_sparse(), "[Ss]parse"),
        (torch.ones(4, 6, device="meta"), "meta"),
        (torch.ones(4, 6).to(torch.float8_e5m2), "Float8"),
        (torch.ones(4, 6, dtype=torch.complex64), "complex64"),
        (torch.ones(4, 6, dtype=torch.int16), "int16"),
    ]:
        with pytest.raises(TypeError, match=rf"grad (must|has) .*{words}"):
            optcore.sgd_step(good(), bad, lr=0.1)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("lend", [lambda tensor: tensor, pytest.param(Lender, marks=new_numpy)],
                         ids=["tensor", "dlpack"])
def test_half_types(name, lend):
    torch = pytest.importorskip("torch")
    tensor = torch.linspace(-1, 1, N).to(getattr(torch, name))
    x = rounded(tensor.float().numpy(), name)
    g = rounded(np.linspace(3, 5, N, dtype=np.float32), name)
    for param in (x, lend(tensor)):
        opt = optcore.SGD([param], lr=0.1, momentum=0.9, master=None)
        for _ in range(3):
            opt.step([lend(torch.from_numpy(widened(g).copy()).to(tensor.dtype))])
    assert same_bits(tensor.float().numpy(), widened(x))
