"""optcore.torch.SGD over half-precision models, to the bit as optcore.SGD over NumPy arrays."""
from __future__ import annotations

import copy
import io
import itertools
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_torch import (  # noqa: E402 - after the skip
    distributed,
    fully_sharded,
    needs_processes,
    one_thread,  # noqa: F401 - a fixture of every test
)

import optcore  # noqa: E402
import optcore.torch  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]
by_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
# Shapes of parameters; the first lies in channels_last, longer than a run of noise.
SHAPES = [(4, 5, 6, 7), (300,), (3, 2)]


def bits(tensor):
    """The bits of a tensor as it lies in memory, or of an array."""
    return as_array(tensor).tobytes()


def as_array(tensor):
    """A copy of a tensor, as it lies in memory, as NumPy has it."""
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach()
    tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).clone()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(optcore.bfloat16)
    return tensor.numpy()


def master_of(param, held):
    """What is stepped of a parameter that has a master; else None."""
    if "low_bits" in held:
        assert held["low_bits"].dtype == torch.int16
        return (param.view(torch.int16).int() << 16).add(held["low_bits"]).view(torch.float32)
    assert "master" not in held or held["master"].dtype == torch.float32
    return held.get("master")


class Run:
    """Two optimizers over equal parameters, ours of PyTorch's tensors and the core's of arrays."""

    def __init__(self, dtype, seed=0, **options):
        self.generator = torch.Generator().manual_seed(seed)
        self.params = [torch.nn.Parameter(self.draw(shape, dtype)) for shape in SHAPES]
        self.params[0].data = self.params[0].to(memory_format=torch.channels_last)
        self.params.append(torch.nn.Parameter(self.draw((9,), torch.float32)))  # a norm layer's
        self.arrays = [as_array(p) for p in self.params]
        self.options = options
        self.opt = optcore.torch.SGD(self.params, **options)
        self.core = optcore.SGD(self.arrays, **options)

    def draw(self, shape, dtype):
        return torch.randn(shape, generator=self.generator).to(dtype)

    def step(self, n=1):
        for _ in range(n):
            for p in self.params:
                p.grad = self.draw(p.shape, p.dtype)
            first = self.params[0]
            lies = first.grad.to(memory_format=torch.channels_last)
            if self.core.step_count % 2:
                first.grad = lies
            self.opt.step()
            self.core.step([as_array(g) for g in (lies, *(p.grad for p in self.params[1:]))])

    def agree(self, shown=True):
        """Compare all; `shown` is False where masters have two forms, which show ties otherwise."""
        state = self.core.state_dict()["state"]
        assert self.opt.state_dict()["param_groups"][0]["step_count"] == self.core.step_count
        for p, array, entry in zip(self.params, self.arrays, state.values(), strict=True):
            held, master = self.opt.state[p], master_of(p, self.opt.state[p])
            assert bits(p) == bits(array) or not shown
            if self.options.get("momentum"):
                assert bits(held["momentum_buffer"]) == bits(entry["velocity"])
            if self.options.get("ema_decay"):
                assert bits(held["ema"]) == bits(entry["ema"])
            assert (master is None) == ("master" not in entry)
            if master is not None:
                assert bits(master) == bits(entry["master"])


def anew(run):
    run.opt = optcore.torch.SGD(run.params, lr=7.0, **{
        key: run.options[key] for key in run.options if key in {
            "master", "velocity_dtype", "ema_decay", "max_norm", "skip_nonfinite"}})


def moved(run):
    for p in run.params:
        p.data = p.data.clone()


def copied(run):
    run.params, run.opt = copy.deepcopy((run.params, run.opt))


def pickled(run):
    run.params, run.opt = pickle.loads(pickle.dumps((run.params, run.opt)))


def reloaded(run):
    run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))


def saved(run):
    buffer = io.BytesIO()
    torch.save(run.opt.state_dict(), buffer)
    buffer.seek(0)
    anew(run)
    run.opt.load_state_dict(torch.load(buffer, weights_only=True))


BREAKS = [moved, copied, pickled, reloaded, saved]
MODES = [
    (dtype, {"master": master, "velocity_dtype": velocity, "rounding": rounding})
    for dtype in HALVES
    for master, velocity, rounding in [
        ("auto", None, "stochastic"), ("float32", "bfloat16", "stochastic"),
        (None, torch.bfloat16, "stochastic"), (None, "float32", "nearest"),
    ]
]


@pytest.mark.parametrize(("dtype", "mode"), MODES, ids=str)
def test_bits_of_the_core_through_every_break(dtype, mode):
    """Whatever is built anew, copied or loaded goes on as if nothing had been."""
    run = Run(dtype, lr=0.01, momentum=0.9, dampening=0.1, weight_decay=0.01, seed=5, **mode)
    for break_ in BREAKS:
        run.step(2)
        run.agree()
        break_(run)
    run.step()
    run.agree()


@by_half
@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9, "nesterov": True, "ema_decay": 0.75, "max_norm": 1.0},
    {"momentum": 0.9, "decoupled_weight_decay": True, "weight_decay": 0.1, "clip_value": 0.5,
     "maximize": True, "dampen_first": True, "dampening": 0.5},
], ids=str)
def test_options(dtype, options):
    for master in ("auto", None):
        run = Run(dtype, lr=0.01, master=master, **options)
        for break_ in (moved, pickled):
            run.step()
            run.agree()
            break_(run)
        run.step()
        run.agree()


def test_noise_follows_the_seed():
    runs = [Run(torch.bfloat16, lr=0.01, master=None) for _ in range(3)]
    runs[1].opt.seed = runs[1].core.seed = 2**64 - 1
    runs[2].opt.seed = np.int64(0)
    for run in runs:
        run.step()
        run.agree()
    ends = [bits(run.params[0]) for run in runs]
    assert ends[0] == ends[2] != ends[1]
    for seed, error in [(-1, ValueError), (2**64, ValueError), (0.5, TypeError)]:
        with pytest.raises(error, match="seed must be an integer"):
            runs[0].opt.seed = seed
    assert runs[0].opt.seed == 0


def test_a_state_without_noise_goes_on_by_its_own():
    run = Run(torch.bfloat16, lr=0.01, master=None, seed=3)
    run.step(2)
    state = copy.deepcopy(run.opt.state_dict())
    for key, value, error in [("step_count", -1, ValueError), ("step_count", "1", ValueError),
                              ("seed", -1, ValueError), ("seed", None, TypeError)]:
        wrong = copy.deepcopy(state)
        wrong["param_groups"][0].update(step_count=9, lr=7.0)
        wrong["param_groups"][0][key] = value
        with pytest.raises(error, match=key):
            run.opt.load_state_dict(wrong)
    assert str(run.opt.state_dict()) == str(state)
    del state["param_groups"][0]["seed"], state["param_groups"][0]["step_count"]
    run.opt.load_state_dict(state)
    run.step()
    run.agree()


# With PyTorch's own optimizer. Numbers are such that nothing is ever rounded.

def parameter(dtype, grad=1.0):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
    p.grad = torch.full_like(p, grad)
    return p


@by_half
@pytest.mark.parametrize("master", ["auto", "float32", None])
def test_states_go_to_torch_and_back(dtype, master):
    """Which casts all of it to the parameter's dtype."""
    p = parameter(dtype)
    q = parameter(dtype)
    opt = optcore.torch.SGD([p], lr=0.5, momentum=0.5, master=master)
    whole = torch.optim.SGD([q], lr=0.5, momentum=0.5, foreach=False)
    theirs = torch.optim.SGD([p], lr=7.0, foreach=False)
    for k in range(3):
        opt.step()
        if k == 0:
            assert opt.state[p]["momentum_buffer"].dtype == torch.float32
        theirs.load_state_dict(opt.state_dict())
        assert theirs.state[p]["momentum_buffer"].dtype == dtype
        theirs.step()
        opt.load_state_dict(theirs.state_dict())
        assert opt.state[p]["momentum_buffer"].dtype == torch.float32
        whole.step()
        whole.step()
        assert p.tolist() == q.tolist()
        assert opt.state[p]["momentum_buffer"].tolist() == (
            whole.state[q]["momentum_buffer"].tolist())
    state = theirs.state_dict()
    opt = optcore.torch.SGD([p], lr=7.0, master=master)     # one that has no state yet
    opt.load_state_dict(state)
    opt.step()
    whole.step()
    assert p.tolist() == q.tolist()


def test_loading_casts_no_velocity_down():
    """As PyTorch does: a float32 velocity keeps its bits, one of another dtype is widened."""
    p = parameter(torch.bfloat16)
    opt = optcore.torch.SGD([p], lr=0.5, momentum=0.5)
    opt.step()
    exact = torch.tensor([1 + 2**-20, 3e38])
    buffer = opt.state[p]["momentum_buffer"].copy_(exact)
    opt.load_state_dict(opt.state_dict())
    assert opt.state[p]["momentum_buffer"] is buffer
    assert torch.equal(buffer, exact)
    for other in (exact.double(), exact.bfloat16(), torch.tensor([0.5, 1 + 2**-10]).half()):
        state = opt.state_dict()
        state["state"] = {0: {"momentum_buffer": other}}
        opt.load_state_dict(state)
        assert opt.state[p]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(opt.state[p]["momentum_buffer"], other.float())
    narrow = optcore.torch.SGD([parameter(torch.float32)], lr=0.5, momentum=0.5,
                               velocity_dtype="bfloat16")
    narrow.load_state_dict(opt.state_dict())
    assert narrow.param_groups[0]["velocity_dtype"] == "bfloat16"   # as it was built
    assert next(iter(narrow.state.values()))["momentum_buffer"].dtype == torch.bfloat16
    narrow.step()


def test_loading_brings_a_master_into_the_other_form():
    """Without a loss, but for ties, and drops what has no place."""
    for forms in itertools.permutations(["split", "float32"]):
        run = Run(torch.bfloat16, lr=0.01, momentum=0.5, master=forms[0])
        run.step(3)
        state = copy.deepcopy(run.opt.state_dict())
        run.opt = optcore.torch.SGD(run.params, lr=7.0, master=forms[1], ema_decay=0.5)
        run.opt.load_state_dict(state)
        assert run.opt.master == forms[1]
        masters = [entry.get("master") for entry in run.core.state_dict()["state"].values()]
        for p, array in zip(run.params, masters, strict=True):
            if array is not None:
                assert bits(run.opt.state[p]["ema"]) == bits(array)     # begins at the master
        moved(run)
        run.step(2)
        run.agree(shown=False)
        for dtype, master in [(torch.bfloat16, None), (torch.float16, "auto"),
                              (torch.float32, "auto")]:
            others = [torch.nn.Parameter(torch.ones_like(p, dtype=dtype)) for p in run.params]
            opt = optcore.torch.SGD(others, lr=7.0, master=master)
            opt.load_state_dict(state)
            kept = {key for entry in opt.state.values() for key in entry}
            assert kept == {"momentum_buffer"} | (
                {"master"} if dtype == torch.float16 and forms[0] == "float32" else set())


def test_what_is_put_into_the_state_is_stepped_itself_or_refused():
    p = parameter(torch.bfloat16)
    opt = optcore.torch.SGD([p], lr=2.0**-10, momentum=0.5)
    low = opt.state[p]["low_bits"] = torch.tensor([1, -1], dtype=torch.int16)
    opt.step()
    assert opt.state[p]["low_bits"] is low
    assert master_of(p, opt.state[p]).tolist() == [
        np.float32(1 + 2**-23) - np.float32(2**-10), np.float32(2 - 2**-23) - np.float32(2**-10)]
    before = bits(p)
    for key, value, error in [
        ("low_bits", torch.ones(2), TypeError), ("low_bits", torch.ones(2).bfloat16(), TypeError),
        ("low_bits", torch.ones(2, dtype=torch.int32), TypeError),
        ("low_bits", torch.ones(3, dtype=torch.int16), ValueError), ("low_bits", 1, TypeError),
        ("low_bits", p.data.view(torch.int16), ValueError),
        ("master", torch.ones(2), ValueError), ("master", torch.ones(2).int(), TypeError),
        ("momentum_buffer", torch.ones(2).int(), TypeError),
    ]:
        kept = dict(opt.state[p])
        opt.state[p][key] = value
        with pytest.raises(error, match=rf"state\[0\]\['{key}'\]|own memory"):
            opt.step()
        opt.state[p] = kept
        assert bits(p) == before
    for wrong, error in [([1, -1], TypeError), (low.long(), TypeError), (low[:1], ValueError)]:
        state = opt.state_dict()
        state["state"] = {0: {"low_bits": wrong}}
        with pytest.raises(error, match=r"state\[0\]\['low_bits'\]"):
            opt.load_state_dict(state)
        assert opt.state[p]["low_bits"] is low
    del opt.state[p]["low_bits"]        # from the parameter as it is
    p.data.fill_(1)
    p.grad.fill_(0)
    opt.state[p]["momentum_buffer"].zero_()
    opt.step()
    assert opt.state[p]["low_bits"].tolist() == [0, 0]


def test_shared_masters_stay_shared():
    p = parameter(torch.bfloat16)
    opt = optcore.torch.SGD([p], lr=2.0**-10, momentum=0.5)
    opt.step()
    shared = [p.share_memory_(), *(tensor.share_memory_() for tensor in opt.state[p].values())]
    opt.step()
    assert {id(p), *map(id, opt.state[p].values())} == set(map(id, shared))
    assert torch.stack([t.float() for t in opt.state[p].values()]).any()
    opt.state[p]["momentum_buffer"] = torch.ones(2).bfloat16().share_memory_()
    with pytest.raises(ValueError, match=r"shared .*dtype=torch\.float32"):
        opt.step()


def test_nothing_is_in_the_state_before_the_first_gradient():
    """A checkpoint's template is made by a step, where the state is empty."""
    p, q = parameter(torch.bfloat16), parameter(torch.float16)
    q.grad = None
    opt = optcore.torch.SGD([p, q], lr=0.5, momentum=0.5)
    assert not opt.state
    opt.step()
    assert set(opt.state) == {p}
    q.grad = torch.ones_like(q)
    opt.step()
    assert set(opt.state[p]) == {"momentum_buffer", "low_bits"}
    assert set(opt.state[q]) == {"momentum_buffer", "master"}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, *HALVES], ids=str)
def test_gradients_of_another_dtype(dtype, kind):
    p = parameter(dtype)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this PyTorch has no grad_dtype")
    array, p.grad = as_array(p), None
    p.grad_dtype = kind
    p.grad = torch.tensor([0.3, -0.7], dtype=kind)
    opt = optcore.torch.SGD([p], lr=0.1, momentum=0.5)
    core = optcore.SGD(array, lr=0.1, momentum=0.5)
    for _ in range(2):
        opt.step()
        core.step(as_array(p.grad))
    assert bits(p) == bits(array)


def test_refusals():
    half, both = parameter(torch.float16), [parameter(torch.bfloat16), parameter(torch.float16)]
    for params, options, words in [
        ([half], {"master": "split"}, "float16: master='float32' is for those"),
        (both, {"master": "split"}, "float16: master='float32' is for those"),
        ([parameter(torch.float32)], {"master": "float32"}, "must have bfloat16 or float16"),
        ([half], {"master": "half"}, "master must be"),
        ([half], {"rounding": "up"}, "rounding must be"),
        ([half], {"velocity_dtype": torch.float16}, "velocity_dtype must be"),
        ([half], {"seed": -1}, "seed must be"),
        ([parameter(torch.float64)], {"velocity_dtype": "bfloat16"}, "None for float64"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            optcore.torch.SGD(params, lr=0.5, **options)
    p = parameter(torch.bfloat16)
    opt = optcore.torch.SGD([p], lr=0.5, momentum=0.5)
    for _ in range(2):
        before = p.tolist()
        for name, value in [("master", None), ("master", "float32"), ("master", "split"),
                            ("velocity_dtype", "bfloat16")]:
            with pytest.raises(ValueError, match=f"{name} must stay as the optimizer was built"):
                setattr(opt, name, value)
            opt.step()
            was, opt.param_groups[0][name] = opt.param_groups[0][name], value
            after = p.tolist()
            with pytest.raises(ValueError, match=f"{name} must stay as the optimizer was built"):
                opt.step()
            assert p.tolist() == after != before
            opt.param_groups[0][name] = was
        opt.rounding = "nearest"        # may change
        opt.step()


def test_model_in_another_precision_mid_run():
    """Its low bits have no place then, and are not lost unsaid."""
    run = Run(torch.bfloat16, lr=0.01, momentum=0.5)
    run.step()
    for p in run.params:
        p.data, p.grad = p.data.float(), torch.ones(p.shape)
    with pytest.raises(ValueError, match=r"del opt\.state\[p\]\['low_bits'\]"):
        run.opt.step()
    for p in run.params:
        run.opt.state[p].pop("low_bits", None)
    run.opt.step()


# Whole models

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(1, 3, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.out = torch.nn.Linear(3, 2)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).mean((2, 3))
        return self.out(self.norm(x.to(self.norm.weight.dtype)).to(self.out.weight.dtype))


def trained(model, *, scaled, autocast=False, unscale=False, **options):
    """Train with a GradScaler or without; NumPy's twin takes the same gradients."""
    params = list(model.parameters())
    opt = optcore.torch.SGD(params, lr=0.05, momentum=0.9, dampening=0.5, **options)
    arrays = [as_array(p) for p in params]
    core = optcore.SGD(arrays, lr=0.05, momentum=0.9, dampening=0.5, **options)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**6, growth_interval=3)
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])
    for k in range(8):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(x.to(model.conv.weight.dtype))
        loss = torch.nn.functional.cross_entropy(out.float(), y)
        overflows = scaled and k in (0, 5)
        scaler.scale(loss * (float("inf") if overflows else 1)).backward()
        if unscale:
            scaler.unscale_(opt)
        if not overflows:
            scale = 1.0 if unscale else scaler.get_scale()      # which is 1 where not enabled
            core.step([as_array(p.grad) for p in params], grad_scale=1 / scale)
        scaler.step(opt)
        scaler.update()
    assert opt.skipped == (2 if scaled else 0)
    for p, array, entry in zip(params, arrays, core.state_dict()["state"].values(), strict=True):
        assert bits(p) == bits(array)
        assert bits(opt.state[p]["momentum_buffer"]) == bits(entry["velocity"])
    return model


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_models_by_grad_scaler_and_autocast(dtype, scaled):
    """Steps with an overflow are skipped whole; norm layers are float32; float32 is autocast."""
    model = Net().to(dtype)
    model.norm.float()
    trained(model, scaled=scaled, autocast=dtype == torch.float32)
    if dtype != torch.float32:
        trained(model, scaled=scaled, master=None, velocity_dtype="bfloat16", max_norm=0.1)
    if dtype == torch.bfloat16:         # PyTorch does not unscale float16
        trained(model, scaled=scaled, unscale=scaled)


@needs_processes
@by_half
def test_distributed_halves(dtype, tmp_path):
    def target(mesh):
        from torch.distributed.checkpoint.state_dict import (
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        model = fully_sharded(mesh).to(dtype)
        opt = optcore.torch.SGD(model.parameters(), lr=0.01, momentum=0.5, ema_decay=0.5)
        locals_ = [p.to_local().detach() for p in model.parameters()]
        arrays = [as_array(p) for p in locals_]
        core = optcore.SGD(arrays, lr=0.01, momentum=0.5, ema_decay=0.5)
        key = "low_bits" if dtype == torch.bfloat16 else "master"
        for k in range(3):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.3 * k)
            core.step([as_array(p.grad.to_local()) for p in model.parameters()])
            opt.step()
            if k == 1:
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                set_optimizer_state_dict(model, opt, get_optimizer_state_dict(model, opt))
        for p, array in zip(model.parameters(), arrays, strict=True):
            assert opt.state[p][key].placements == p.placements
            assert bits(p.to_local()) == bits(array)

    distributed(1, tmp_path, target)
