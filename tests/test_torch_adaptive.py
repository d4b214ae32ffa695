"""``optcore.torch.Adagrad``, ``RMSprop``, ``Adam`` and ``AdamW`` beside PyTorch's own."""
from __future__ import annotations

import copy
import inspect
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_torch import one_thread  # noqa: E402, F401 - for all tests here

import optcore  # noqa: E402 - after the skip
import optcore.torch  # noqa: E402
from reference import RULES_BY_ID, Options, same_bits  # noqa: E402

STEPS = 200
NAMES = ["Adagrad", "RMSprop", "Adam", "AdamW"]
DECAY = {"weight_decay": [0, 0.1], "maximize": [False, True]}
MOMENTS = {"betas": [(0.9, 0.999), (0.5, 0.75)], "amsgrad": [False, True], "eps": [1e-8, 1e-3]}
GRID = {
    "Adagrad": {**DECAY, "lr_decay": [0, 0.1], "initial_accumulator_value": [0, 0.5],
                "eps": [1e-10, 1e-3]},
    "RMSprop": {**DECAY, "momentum": [0, 0.9], "centered": [False, True], "alpha": [0.99, 0.5],
                "eps": [1e-8, 1e-3]},
    "Adam": {**DECAY, **MOMENTS, "decoupled_weight_decay": [False, True]},
    "AdamW": {**DECAY, **MOMENTS},
}
COMBINATIONS = [
    (name, dict(zip(GRID[name], values, strict=True)))
    for name in NAMES for values in itertools.product(*GRID[name].values())
]
SHAPES = [(5, 3), (7,), (), (2, 3, 4)]
by_name = pytest.mark.parametrize("name", NAMES)


def parameters(rng, dtype=np.float64):
    return [torch.nn.Parameter(torch.tensor(rng.standard_normal(shape).astype(dtype)))
            for shape in SHAPES]


def copied(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def set_gradients(rng, step, *models):
    """The same for each model; the second parameter has its first one late, and misses some."""
    for i, each in enumerate(zip(*models, strict=True)):
        g = torch.tensor(rng.standard_normal(tuple(each[0].shape)), dtype=each[0].dtype)
        for p in each:
            p.grad = None if i == 1 and (step < 3 or step % 7 == 0) else g.clone()


def assert_close(a, b, rel=1e-6):
    for p, q in zip(a, b, strict=True):
        p, q = p.detach().numpy(), q.detach().numpy()
        np.testing.assert_allclose(p, q, rtol=rel, atol=0)


def kinds(name):
    return getattr(optcore.torch, name), getattr(torch.optim, name)


@pytest.mark.apart
@pytest.mark.parametrize(("name", "options"), COMBINATIONS,
                         ids=[f"{name}-{i}" for i, (name, _) in enumerate(COMBINATIONS)])
def test_equals_pytorch(name, options, rng):
    """Over 200 steps, and where either goes on from the other's state in the middle of them."""
    ours, theirs = kinds(name)
    mine, its = parameters(rng), None
    its, from_mine, from_its = copied(mine), copied(mine), copied(mine)
    a, b = ours(mine, lr=0.01, **options), theirs(its, lr=0.01, foreach=False, **options)
    for k in range(STEPS // 2):
        set_gradients(rng, k, mine, its)
        a.step()
        b.step()
    for params, source in [(from_mine, mine), (from_its, its)]:
        for p, q in zip(params, source, strict=True):
            p.data.copy_(q.data)
    c = theirs(from_mine, lr=7.0, foreach=False)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    d = ours(from_its, lr=7.0)
    d.load_state_dict(copy.deepcopy(b.state_dict()))
    for k in range(STEPS // 2, STEPS):
        set_gradients(rng, k, mine, its, from_mine, from_its)
        for opt in (a, b, c, d):
            opt.step()
    assert_close(mine, its)
    assert_close(from_mine, its)
    assert_close(from_its, its)
    for p, q in zip(mine, its, strict=True):
        theirs_of_p = {key: a.state[p][key] for key in b.state[q]}
        assert a.state[p].keys() == theirs_of_p.keys()
        for key, value in theirs_of_p.items():
            np.testing.assert_allclose(value.numpy(), b.state[q][key].numpy(), rtol=1e-6, atol=0)


@by_name
def test_pytorch_goes_on_before_every_parameter_had_a_gradient(name):
    """Its Adagrad has states from the beginning, and wants them."""
    ours, theirs = kinds(name)
    params, others = ([torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
                      for _ in range(2))
    opts = [ours(params), theirs(others)]
    for k in range(4):
        if k == 2:
            state = copy.deepcopy(opts[0].state_dict())
            opts[0] = theirs(params)
            opts[0].load_state_dict(state)
        for model in (params, others):
            model[0].grad = torch.full((2,), 0.5, dtype=torch.float64)
            model[1].grad = None if k < 2 else torch.ones(2, dtype=torch.float64)
        for opt in opts:
            opt.step()
        assert_close(params, others)


@by_name
def test_float32_too(name, rng):
    """Beside PyTorch in float64, no further from it than PyTorch in float32, or hardly."""
    ours, theirs = kinds(name)
    exact = parameters(rng)
    mine, its = ([torch.nn.Parameter(p.detach().float()) for p in exact] for _ in range(2))
    for p, q in zip(exact, mine, strict=True):
        p.data.copy_(q.data)
    opts = [ours(mine, lr=0.01), theirs(its, lr=0.01), theirs(exact, lr=0.01)]
    for k in range(STEPS):
        set_gradients(rng, k, exact)
        for p, q, r in zip(exact, mine, its, strict=True):
            q.grad = r.grad = None
            if p.grad is not None:
                q.grad, r.grad = p.grad.float(), p.grad.float()
                p.grad = q.grad.double()
        for opt in opts:
            opt.step()
    off, their_off = (max(float((p - q).abs().max()) for p, q in zip(params, exact, strict=True))
                      for params in (mine, its))
    assert off <= 1.5 * their_off + 1e-7


@by_name
def test_signature_and_groups_are_pytorchs(name):
    ours, theirs = kinds(name)
    own, its = (inspect.signature(kind.__init__).parameters for kind in (ours, theirs))
    for key, parameter in its.items():
        assert own[key].default == parameter.default, key
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert list(own).index(key) == list(its).index(key), key
    p = torch.nn.Parameter(torch.ones(2))
    assert ours([p]).param_groups[0].keys() >= theirs([p]).param_groups[0].keys()
    for key in ("foreach", "fused", "differentiable", "capturable"):
        if key in its:
            with pytest.raises(ValueError, match=f"{key} must be None or False"):
                ours([p], **{key: True})


@by_name
def test_state_is_live(name):
    """What stands in `state` is what is stepped, the count too."""
    ours, _ = kinds(name)
    p = torch.nn.Parameter(torch.ones(3))
    opt = ours([p])
    p.grad = torch.ones(3)
    opt.step()
    state = opt.state[p]
    step, before = state["step"], {key: value.clone() for key, value in state.items()}
    opt.step()
    assert opt.state[p]["step"] is step
    assert float(step) == 2
    assert all(not torch.equal(value, before[key]) for key, value in state.items())
    state["step"].fill_(9)
    opt.step()
    assert float(opt.state[p]["step"]) == 10


def test_the_reference_of_one_step():
    """As the functions have it, which tests compare with NumPy."""
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal(100).astype(np.float32) for _ in range(2))
    p = torch.nn.Parameter(torch.tensor(x))
    opt = optcore.torch.AdamW([p], lr=0.1, betas=(0.75, 0.875))
    states = [np.zeros_like(x) for _ in range(2)]
    for step in range(1, 4):
        p.grad = torch.tensor(g)
        opt.step()
        x, states = RULES_BY_ID["adamw"].reference(x, g, states, Options(
            lr=0.1, beta1=0.75, beta2=0.875, weight_decay=0.01, step=step))
        assert same_bits(p.detach().numpy(), x)


@by_name
def test_copies_and_new_groups_go_on(name, rng):
    ours, _ = kinds(name)
    params = parameters(rng)
    opt = ours(params, lr=0.01)
    for k in range(5):
        set_gradients(rng, k, params)
        opt.step()
    other = copy.deepcopy(opt)
    others = other.param_groups[0]["params"]
    added = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt.add_param_group({"params": [added], "lr": 1.0})
    for k in range(5, 9):
        set_gradients(rng, k, params, others)
        added.grad = torch.ones(2, dtype=torch.float64)
        opt.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        assert same_bits(p.detach().numpy(), q.detach().numpy())
    assert float(opt.state[added]["step"]) == 4
    assert [float(opt.state[p]["step"]) for p in params] == [9, 5, 9, 9]


def test_betas():
    p = torch.nn.Parameter(torch.ones(2))
    opt = optcore.torch.Adam([p], betas=(torch.tensor(0.5), 0.75))
    p.grad = torch.ones(2)
    opt.step()
    opt.betas = (0.25, 0.5)
    opt.step()
    for betas, error in [((0.5,), TypeError), (0.5, TypeError), ((0.5, 1.0), ValueError)]:
        with pytest.raises(error, match="beta"):
            opt.betas = betas
        assert opt.betas == (0.25, 0.5)
    opt.param_groups[0]["beta1"] = 0.5
    with pytest.raises(TypeError, match="unknown option 'beta1'"):
        opt.step()


@pytest.mark.parametrize(("key", "bad"), [
    ("step", -1.0), ("step", 0.5), ("step", "1"), ("step", torch.ones(2)), ("exp_avg", None),
    ("exp_avg_sq", None),
])
def test_bad_counts_are_refused(key, bad):
    p = torch.nn.Parameter(torch.ones(2))
    opt = optcore.torch.Adam([p])
    p.grad = torch.ones(2)
    opt.step()
    state = copy.deepcopy(opt.state_dict())
    state["state"][0][key] = bad if not isinstance(bad, float) else torch.tensor(bad)
    before = p.detach().clone(), copy.deepcopy(opt.state_dict())
    with pytest.raises((KeyError, TypeError, ValueError), match=rf"state\[0\].*'{key}'"):
        opt.load_state_dict(state)
    del state["state"][0][key]
    with pytest.raises(KeyError, match=rf"state\[0\] must have.*'{key}'"):
        opt.load_state_dict(state)
    assert torch.equal(p, before[0])
    assert opt.state_dict()["state"][0].keys() == before[1]["state"][0].keys()
    opt.step()


def test_how_states_are_stored_stays():
    p = torch.nn.Parameter(torch.ones(2))
    opt = optcore.torch.Adam([p])
    p.grad = torch.ones(2)
    opt.step()
    opt.param_groups[0]["state_dtype"] = "bfloat16"
    for _ in range(2):
        with pytest.raises(ValueError, match="state_dtype"):
            opt.step()
        opt.param_groups[0]["amsgrad"] = True
    opt.param_groups[0]["state_dtype"] = None
    opt.step()
    narrow = optcore.torch.Adam([torch.nn.Parameter(torch.ones(2))], state_dtype="bfloat16")
    q = narrow.param_groups[0]["params"][0]
    narrow.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert narrow.param_groups[0]["state_dtype"] == "bfloat16"
    assert narrow.state[q]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("change", ["betas", "step", "OneCycleLR", "there and back"])
def test_counts_and_betas_may_change_as_pytorchs(name, change, rng):
    """Edited counts, betas that a scheduler cycles, and a state that PyTorch's went on from."""
    ours, theirs = kinds(name)
    mine = parameters(rng)
    its = copied(mine)
    a, b = ours(mine, lr=0.01), theirs(its, lr=0.01)
    schedulers = []
    if change == "OneCycleLR":
        schedulers = [torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=30)
                      for opt in (a, b)]
    for k in range(20):
        if k == 10 and change == "betas":
            a.param_groups[0]["betas"] = b.param_groups[0]["betas"] = (0.5, 0.75)
        if k == 10 and change == "step":
            for opt in (a, b):
                for i, entry in enumerate(opt.state.values()):
                    entry["step"].fill_(3 + i)
        if k in (5, 10) and change == "there and back":
            other = (theirs if k == 5 else ours)(mine, lr=0.01)
            other.load_state_dict(copy.deepcopy(a.state_dict()))
            a = other
        set_gradients(rng, k, mine, its)
        for opt in (a, b):
            opt.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_close(mine, its)
    if change == "step":
        a.state[mine[0]]["step"].fill_(-1)
        before = [p.detach().clone() for p in mine]
        with pytest.raises(ValueError, match=r"state\[0\]\['step'\]"):
            a.step()
        assert all(map(torch.equal, before, mine))


def test_adamw_stays_decoupled():
    p = torch.nn.Parameter(torch.ones(2))
    opt = optcore.torch.AdamW([p])
    opt.load_state_dict(torch.optim.Adam([p], weight_decay=0.5).state_dict())
    assert opt.param_groups[0]["decoupled_weight_decay"] is True
    assert opt.param_groups[0]["weight_decay"] == 0.5


@by_name
def test_foreign_states_are_refused(name):
    p = torch.nn.Parameter(torch.ones(2))
    for other in NAMES:
        if {name, other} <= {"Adam", "AdamW"} or name == other:
            continue
        with pytest.raises((KeyError, TypeError, ValueError)):
            getattr(optcore.torch, name)([p]).load_state_dict(
                getattr(torch.optim, other)([p]).state_dict())


@by_name
@pytest.mark.parametrize("master", ["auto", None])
def test_halves(name, master, rng):
    """bfloat16 parameters with narrow states are stepped as NumPy's are."""
    x = torch.tensor(rng.standard_normal(300)).bfloat16()
    p = torch.nn.Parameter(x.clone())
    y = x.view(torch.int16).numpy().view(np.uint16).copy().view(optcore.bfloat16)
    options = {"lr": 0.01, "master": master, "state_dtype": "bfloat16", "seed": 3}
    opt = getattr(optcore.torch, name)([p], **options)
    twin = {"Adagrad": optcore.AdaGrad, "RMSprop": optcore.RMSProp}.get(
        name, getattr(optcore, name, None))(y, **options)
    for _ in range(4):
        g = torch.tensor(rng.standard_normal(300), dtype=torch.float32)
        p.grad = g.bfloat16()
        opt.step()
        twin.step(p.grad)
    assert np.array_equal(p.detach().view(torch.int16).numpy().view(np.uint16), y.view(np.uint16))
    again = copy.deepcopy(opt)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(torch.equal(value, again.state[q][key])
               for q in again.param_groups[0]["params"] for key, value in opt.state[p].items())


@by_name
def test_steps_in_backward(name, rng):
    ours, _ = kinds(name)
    one, other = (torch.nn.Linear(4, 3) for _ in range(2))
    other.load_state_dict(one.state_dict())
    opts = [ours(one.parameters(), lr=0.1), ours(other.parameters(), lr=0.1, step_in_backward=True)]
    for _ in range(3):
        batch = torch.tensor(rng.standard_normal((5, 4)), dtype=torch.float32)
        for model, opt in zip((one, other), opts, strict=True):
            opt.zero_grad()
            model(batch).square().sum().backward()
            opt.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
