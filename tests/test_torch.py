"""optcore.torch.SGD against torch.optim.SGD: losses, states, and what it refuses."""
from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import optcore  # noqa: E402 - after the skip
import optcore.torch  # noqa: E402
from reference import SGD_OPTIONS  # noqa: E402

STEPS = 200


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CNN(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 3, 3, stride=2)
        self.conv2 = torch.nn.Conv2d(3, 4, 3)
        self.out = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).mean((2, 3)))


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(4, 8)
        self.block = torch.nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.out = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.block(self.embed(x)).mean(1))


MODELS = {"cnn": (CNN, (8, 1, 8, 8)), "transformer": (Transformer, (8, 5, 4))}


def make(kind="cnn", dtype=torch.float32):
    torch.manual_seed(1)
    model, shape = MODELS[kind]
    return model().to(dtype), torch.randn(4, *shape, dtype=dtype), torch.randint(0, 3, (4, 8))


def train(model, opt, data, steps, start=0, scheduler=None):
    _, x, y = data
    losses = []
    for k in range(start, start + steps):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[k % 4]), y[k % 4])
        loss.backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def agree(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol)


def pair(kind="cnn", dtype=torch.float32, **options):
    """Return two equal models with their optimizers, PyTorch's first."""
    data = make(kind, dtype)
    models = [data[0], copy.deepcopy(data[0])]
    classes = [torch.optim.SGD, optcore.torch.SGD]
    return data, [(m, c(m.parameters(), **options))
                  for m, c in zip(models, classes, strict=True)]


COMBINATIONS = [
    {"momentum": momentum, "nesterov": nesterov, "dampening": dampening, "weight_decay": decay,
     "maximize": maximize}
    for momentum, nesterov, dampening, decay, maximize in itertools.product(
        [0, 0.8], [False, True], [0, 0.3], [0, 0.01], [False, True])
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(("dtype", "lr", "rtol"), [
    # PyTorch fuses a multiply with an add where it can, so last bits differ, and training
    # amplifies them: long strides are for float64, which has bits to lose.
    (torch.float32, 0.01, 1e-5), (torch.float64, 0.05, 1e-9),
], ids=["float32", "float64"])
def test_losses_equal_those_of_torch(kind, options, dtype, lr, rtol):
    if options["maximize"]:
        lr /= 50    # ascent leaves every bound
    data, runs = pair(kind, dtype, lr=lr, **options)
    agree(*[train(*run, data, STEPS) for run in runs], rtol)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("options", [
    {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "dampening": 0.5}, {},
], ids=str)
def test_state_dict_interchanges_mid_run(options, first):
    """From PyTorch's to ours and from ours to PyTorch's, against PyTorch all along."""
    data, runs = pair(lr=0.05, **options)
    model, opt = runs[first]
    losses = train(model, opt, data, 100)
    other = runs[1 - first][1]
    other = type(other)(model.parameters(), lr=1.0)
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    losses += train(model, other, data, 100, 100)
    _, (expected, _) = pair(lr=0.05, **options)
    agree(losses, train(*expected, data, 200))
    theirs, ours = (o.state_dict()["param_groups"][0] for o in (runs[0][1], runs[1][1]))
    assert set(theirs) <= set(ours)


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}], ids=str)
def test_state_of_another_way_to_run(how):
    data = make()
    theirs = torch.optim.SGD(data[0].parameters(), lr=0.05, momentum=0.9, **how)
    train(data[0], theirs, data, 3)
    ours = optcore.torch.SGD(data[0].parameters())
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["fused"] is ours.param_groups[0]["foreach"] is None
    train(data[0], ours, data, 3)


def test_state_that_does_not_fit_changes_nothing():
    data = make()
    opt = optcore.torch.SGD(data[0].parameters(), lr=0.05, momentum=0.9)
    train(data[0], opt, data, 3)
    before = copy.deepcopy(opt.state_dict())
    for key, value, error in [
        ("momentum_buffer", torch.ones(2), ValueError), ("momentum_buffer", 3, TypeError),
        ("velocity", torch.ones(3, 1, 3, 3), ValueError),
    ]:
        bad = copy.deepcopy(before)
        bad["state"][0][key] = value
        bad["param_groups"][0]["lr"] = 7.0
        with pytest.raises(error, match=r"state\[0\]"):
            opt.load_state_dict(bad)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, entry in before["state"].items():
            assert torch.equal(after["state"][i]["momentum_buffer"], entry["momentum_buffer"])
    train(data[0], opt, data, 1)


def test_momentum_buffer_is_the_velocity_itself():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5)
    assert opt.state_dict()["state"] == {}
    p.grad = torch.ones(3)
    opt.step()
    buffer = opt.state[p]["momentum_buffer"]
    assert buffer.tolist() == [1, 1, 1]
    buffer.fill_(4)
    opt.step()
    assert buffer.tolist() == [3, 3, 3]
    assert opt.state[p]["momentum_buffer"] is buffer
    assert p.tolist() == [-4, -4, -4]
    opt.state[p]["momentum_buffer"] = torch.zeros(3)     # replaced
    opt.step()
    assert p.tolist() == [-5, -5, -5]
    opt.state.clear()                                   # a first step again
    opt.step()
    assert opt.state[p]["momentum_buffer"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
], ids=["step", "cosine", "cycle"])
def test_schedulers(schedule):
    data, runs = pair(lr=0.05, momentum=0.9)
    agree(*[train(*run, data, 40, scheduler=schedule(run[1])) for run in runs])


def test_tensors_as_options_of_the_whole_optimizer():
    """Changed in their place, they are followed, as a learning rate is."""
    p = torch.nn.Parameter(torch.zeros(4))
    bound = torch.tensor(1.0)
    opt = optcore.torch.SGD([p], lr=1.0, max_norm=bound)
    p.grad = torch.full((4,), 8.0)
    opt.step()
    bound.fill_(0.5)
    opt.step()
    agree(p.detach().numpy(), [-0.75] * 4)
    with pytest.raises(TypeError, match="max_norm must be a finite number"):
        opt.max_norm = torch.ones(2)
    with pytest.raises(TypeError, match=r"use torch\.optim\.lr_scheduler"):
        optcore.torch.SGD([p], lr=lambda step: 0.1)


def test_tensor_as_learning_rate():
    data, runs = pair(momentum=0.9)
    losses = []
    for model, opt in runs:
        opt.param_groups[0]["lr"] = torch.tensor(0.05)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        losses.append(train(model, opt, data, 20, scheduler=scheduler))
    agree(*losses)


def test_parameter_groups():
    losses = []
    data = make()
    for kind in (torch.optim.SGD, optcore.torch.SGD):
        model = copy.deepcopy(data[0])
        opt = kind([{"params": model.conv1.parameters(), "lr": 0.01},
                    {"params": model.conv2.parameters(), "weight_decay": 0.1}],
                   lr=0.05, momentum=0.9)
        losses.append(train(model, opt, data, 20))
        opt.add_param_group({"params": model.out.parameters(), "nesterov": True, "lr": 0.02})
        losses[-1] += train(model, opt, data, 20)
        opt.param_groups[0]["momentum"] = 0
        losses[-1] += train(model, opt, data, 20)
        opt.param_groups[0].update(momentum=0.5, dampening=0.5)
        losses[-1] += train(model, opt, data, 20)
    agree(*losses)


def test_group_that_is_refused_is_not_added():
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    opt = optcore.torch.SGD([p], lr=1.0)
    with pytest.raises(ValueError, match="momentum"):
        opt.add_param_group({"params": [q], "momentum": 2.0})
    assert len(opt.param_groups) == 1
    p.grad = torch.ones(3)
    opt.step()


def test_velocity_outlives_a_pause_of_momentum():
    results = []
    for kind in (torch.optim.SGD, optcore.torch.SGD):
        p = torch.nn.Parameter(torch.zeros(3))
        opt = kind([p], lr=1.0, momentum=0.5)
        for k, momentum in enumerate([0.5, 0.5, 0.0, 0.0, 0.5, 0.5]):
            opt.param_groups[0]["momentum"] = momentum
            if k == 3:
                p.data = p.data.clone()
                opt.step()
                opt.state[p]["momentum_buffer"].mul_(2)
            p.grad = torch.full((3,), float(k))
            opt.step()
            results.append((p.tolist(), opt.state[p]["momentum_buffer"].tolist()))
    assert results[:6] == results[6:]


def test_hooks_and_closure():
    data, runs = pair(lr=0.05, momentum=0.9)
    returned = []
    for model, opt in runs:
        calls = []
        opt.register_step_pre_hook(lambda *a, calls=calls: calls.append("pre"))
        opt.register_step_post_hook(lambda *a, calls=calls: calls.append("post"))

        def closure(model=model, opt=opt):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(data[1][0]), data[2][0])
            loss.backward()
            return loss

        with torch.no_grad():
            returned.append([opt.step(closure).item() for _ in range(5)])
        assert calls == ["pre", "post"] * 5
    agree(*returned)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale):
    """The first step, too, may be skipped; the velocity starts undampened after it."""
    data, runs = pair(lr=0.05, momentum=0.9, dampening=0.5)
    losses = []
    for model, opt in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=3)
        losses.append([])
        for k in range(12):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(data[1][k % 4]), data[2][k % 4])
            scaler.scale(loss * (float("inf") if k in (0, 5) else 1)).backward()
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            losses[-1].append(loss.item())
    agree(*losses)
    assert runs[1][1].skipped == 2


def test_found_inf_may_be_any_count():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    opt = optcore.torch.SGD([p], lr=1.0)
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(2.0)
    opt.step()
    assert p.tolist() == [0, 0, 0]
    opt.found_inf.zero_()
    opt.step()
    assert p.tolist() == [-0.25] * 3


def test_parameter_unfrozen_late():
    data, runs = pair(lr=0.05, momentum=0.9, dampening=0.5)
    losses = []
    for model, opt in runs:
        model.conv1.requires_grad_(False)
        losses.append(train(model, opt, data, 10))
        assert model.conv1.weight not in opt.state
        model.conv1.requires_grad_(True)
        losses[-1] += train(model, opt, data, 10)
        model.conv1.requires_grad_(False)
        losses[-1] += train(model, opt, data, 10)
    agree(*losses)


def test_no_gradient_at_all_is_no_step():
    opt = optcore.torch.SGD([torch.nn.Parameter(torch.ones(3))], lr=1.0)
    assert opt.step() is None
    assert opt.param_groups[0]["params"][0].tolist() == [1, 1, 1]


def test_zero_grad():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    opt = optcore.torch.SGD([p], lr=1.0)
    opt.step()
    opt.zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0, 0, 0]
    opt.zero_grad()
    assert p.grad is None


@pytest.mark.parametrize("duplicate", [
    copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(duplicate):
    data, (expected, (model, opt)) = pair(lr=0.05, momentum=0.9, nesterov=True)
    train(model, opt, data, 10)
    other, its = duplicate((model, opt))
    train(*expected, data, 10)
    more = train(*expected, data, 10, 10)
    agree(train(other, its, data, 10, 10), more)
    agree(train(model, opt, data, 10, 10), more)


def test_options_survive_a_copy():
    p = torch.nn.Parameter(torch.ones(3))
    opt = optcore.torch.SGD([p], lr=1.0, max_norm=2.0, skip_nonfinite=True, ema_decay=0.5)
    p.grad = torch.full((3,), torch.nan)
    opt.step()
    q, its = copy.deepcopy((p, opt))
    q.grad = torch.ones(3)
    its.step()
    assert (its.max_norm, its.skip_nonfinite, its.ema_decay, its.skipped) == (2.0, True, 0.5, 1)
    assert its.state[q]["ema"].tolist() == [0.5] * 3
    assert its.grad_norm == pytest.approx(3**0.5)
    assert opt.state[p]["ema"].tolist() == [1] * 3


def replace_data(model):
    for p in model.parameters():
        p.data = p.data.clone()


@pytest.mark.parametrize("replace", [
    replace_data,
    lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    lambda m: m.to(memory_format=torch.channels_last),
    lambda m: m.share_memory(),
], ids=["data", "load_state_dict", "channels_last", "share_memory"])
def test_replaced_data_is_noticed(replace):
    data, runs = pair(lr=0.05, momentum=0.9, dampening=0.5)
    losses = []
    for model, opt in runs:
        losses.append(train(model, opt, data, 10))
        replace(model)
        losses[-1] += train(model, opt, data, 10)
    agree(*losses)


def test_data_in_other_strides_of_the_same_memory():
    results = []
    for kind in (torch.optim.SGD, optcore.torch.SGD):
        p = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        opt = kind([p], lr=0.5, momentum=0.5)
        p.grad = torch.arange(6.0).reshape(2, 3)
        opt.step()
        # the same numbers, with the gradient in another layout
        p.data, p.grad = p.data.t().contiguous().t(), p.grad.clone()
        opt.step()
        results.append((p.tolist(), opt.state[p]["momentum_buffer"].tolist()))
    assert results[0] == results[1]


def test_gradients_in_another_layout():
    p = torch.nn.Parameter(torch.zeros(2, 3))
    opt = optcore.torch.SGD([p], lr=1.0)
    p.grad = torch.arange(6.0).reshape(3, 2).t()
    opt.step()
    assert torch.equal(p.detach(), -p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autograd_learns_of_the_step(dtype):
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    opt = optcore.torch.SGD([p], lr=1.0)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_extras():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    q = p.detach().clone().numpy()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True,
               "lr_in_velocity": True, "clip_value": 0.5}
    ours, core = optcore.torch.SGD([p], **options), optcore.SGD(q, **options)
    for k in range(3):
        p.grad = torch.arange(4, dtype=torch.float64) * k
        ours.step()
        core.step(p.grad.numpy())
    assert p.detach().numpy().tobytes() == q.tobytes()
    assert set(ours.state[p]) == {"velocity"}


def refusals():
    def parameter(tensor):
        return [("w", torch.nn.Parameter(tensor))]

    x = torch.ones(4)
    for name, tensor, words in [
        ("float8", x.to(torch.float8_e4m3fn), "float8"),
        ("complex", x.to(torch.complex64), "complex64"),
        ("sparse", x.to_sparse(), "[Ss]parse"),
        ("meta", x.to("meta"), "meta"),
        ("strided", torch.ones(4, 4)[:, ::2], "contiguous"),
        ("expanded", torch.ones(1).expand(4), "contiguous"),
    ]:
        yield name, parameter(tensor), {}, rf"params\[0\] \('w'\) .*{words}"
    for key in ("foreach", "fused", "differentiable"):
        yield key, parameter(x), {key: True}, f"{key} must be None or False"
    yield "capturable", [{"params": [x], "capturable": True}], {}, "capturable must be None"
    yield "lr", parameter(x), {"lr": torch.tensor(0.1, requires_grad=True)}, "not require grad"
    yield "nan", parameter(x), {"lr": float("nan")}, "lr must be a finite number"
    yield "nesterov", parameter(x), {"nesterov": True}, "nesterov must have momentum > 0"


@pytest.mark.parametrize(
    ("params", "options", "words"), [pytest.param(*row[1:], id=row[0]) for row in refusals()])
def test_refusals(params, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        optcore.torch.SGD(params, **options)


def test_no_torch_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; import optcore; import optcore.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'optcore[torch]'" in done.stderr


# What must be noticed between two steps. Numbers are such that nothing is ever rounded, so that
# both optimizers have the same bits.

def same(script):
    """Run a script with PyTorch's optimizer and with ours, and compare what it yields."""
    theirs, ours = ([
        item.tolist() if isinstance(item, torch.Tensor) else item for item in script(kind)
    ] for kind in (torch.optim.SGD, optcore.torch.SGD))
    assert theirs == ours
    assert theirs


def parameter(*values, grad=1.0):
    p = torch.nn.Parameter(torch.tensor(values or (1.0, 2.0)))
    p.grad = torch.full_like(p, grad)
    return p


EDITS = {
    "append": lambda params, new: params.append(new),
    "insert": lambda params, new: params.insert(0, new),
    "replace": lambda params, new: params.__setitem__(0, new),
    "delete": lambda params, new: params.__delitem__(0),
    "swap": lambda params, new: params.reverse(),
    "empty": lambda params, new: params.clear(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("named", [False, True])
def test_edited_list_of_parameters(edit, named):
    def script(kind):
        p, q, new = parameter(grad=1.0), parameter(grad=2.0), parameter(3.0, grad=4.0)
        opt = kind([("p", p), ("q", q)] if named else [p, q], lr=0.5, momentum=0.5)
        opt.step()
        EDITS[edit](opt.param_groups[0]["params"], new)
        for _ in range(2):
            opt.step()
        for each in (p, q, new):
            yield each
            yield opt.state[each].get("momentum_buffer", 0)

    same(script)


@pytest.mark.parametrize("momentum", [0, 0.5])
@pytest.mark.parametrize("moved", [False, True])
def test_new_parameter_over_the_same_memory(momentum, moved):
    def script(kind):
        p = parameter()
        opt = kind([p], lr=0.5, momentum=momentum)
        opt.step()
        new = torch.nn.Parameter(p.data)
        new.grad = torch.full((2,), 4.0)
        opt.param_groups[0]["params"] = [new]
        if moved and momentum:
            opt.state[new] = opt.state.pop(p)
        opt.step()
        yield from (p, new, p.grad, new.grad)
        yield opt.state[new].get("momentum_buffer", 0)

    same(script)


def test_groups_added_and_removed_by_hand():
    def script(kind):
        p, q = parameter(), parameter(3.0)
        opt = kind([{"params": [p]}, {"params": [q], "lr": 0.25}], lr=0.5, momentum=0.5)
        opt.step()
        first, second = opt.param_groups
        opt.param_groups = [second]
        opt.step()
        opt.param_groups.append(first)
        opt.step()
        yield from (p, q)

    same(script)


def test_frozen_parameter_steps_by_the_gradient_it_has():
    def script(kind):
        p, q = parameter(), parameter()
        opt = kind([p, q], lr=0.5, momentum=0.5)
        opt.step()
        p.requires_grad_(False)
        opt.step()
        p.grad = None
        opt.step()
        p.requires_grad_(True).sum().backward()
        opt.step()
        yield from (p, q)

    same(script)


@pytest.mark.parametrize("swap", [False, True])
def test_model_in_another_precision_mid_run(swap):
    """The velocity follows its parameter's dtype, as in load_state_dict."""
    data, runs = pair(lr=0.05, momentum=0.9, dampening=0.5)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    losses = []
    try:
        for model, opt in runs:
            losses.append(train(model, opt, data, 10))
            model.double()
            double = (*data[:1], data[1].double(), data[2])
            losses[-1] += train(model, opt, double, 10)
            if model is runs[1][0]:
                for p in model.parameters():
                    assert opt.state[p]["momentum_buffer"].dtype == torch.float64
            model.float()
            losses[-1] += train(model, opt, data, 10)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    agree(*losses)


def test_what_is_put_into_the_state_is_taken_or_refused():
    p = parameter()
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5, ema_decay=0.5)
    opt.step()
    opt.state[p]["ema"] = torch.tensor([8.0, 8.0])
    opt.step()
    assert p.tolist() == [-1.5, -0.5]
    assert opt.state[p]["ema"].tolist() == [3.25, 3.75]
    before = p.tolist()
    for key, value, error in [
        ("velocity", torch.ones(2), ValueError), ("exp_avg", torch.ones(2), ValueError),
        ("step", 3, ValueError), ("momentum_buffer", p.data, ValueError),
        ("momentum_buffer", torch.ones(2).to_sparse(), ValueError),
        ("momentum_buffer", torch.ones(2, dtype=torch.int32), TypeError),
    ]:
        kept = dict(opt.state[p])
        opt.state[p][key] = value
        with pytest.raises(error, match=rf"state\[0\].*{key}|memory with state\[0\]|params\[0\]"):
            opt.step()
        opt.state[p] = kept
        assert p.tolist() == before
    opt.step()


def test_velocity_of_zeros_has_started():
    def script(kind):
        p = parameter(grad=0.0)
        opt = kind([p], lr=0.5, momentum=0.5, dampening=0.5)
        opt.step()
        p.grad = torch.ones(2)
        p.data = p.data.clone()
        opt.step()
        yield p

    same(script)


def test_convention_changes_before_the_first_step_only():
    p = parameter()
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5)
    opt.lr_in_velocity = True
    opt.step()
    assert opt.state[p]["velocity"].tolist() == [-1, -1]
    with pytest.raises(ValueError, match=r"state\[0\]\['velocity'\]"):
        opt.lr_in_velocity = False
    opt.step()
    assert p.tolist() == [-1.5, -0.5]


def test_buffer_in_another_layout():
    def script(kind):
        p = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        p.grad = torch.ones(2, 3)
        opt = kind([p], lr=0.5, momentum=0.5)
        opt.state[p]["momentum_buffer"] = torch.arange(6.0).reshape(3, 2).t()
        opt.step()
        yield p
        opt.state[p]["momentum_buffer"] = torch._neg_view(torch.ones(2, 3))
        opt.step()
        yield from (p, opt.state[p]["momentum_buffer"])

    same(script)


# Sharing

def step_alone(opt, p):
    p.grad = torch.full_like(p, 2.0)
    opt.step()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("early", [False, True], ids=["mid-run", "before"])
def test_shared_buffers_stay_shared(early):
    """Hogwild: another process steps the same parameter by the same velocity."""
    p = parameter(0.0, 0.0)
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5)
    if early:
        opt.state[p]["momentum_buffer"] = torch.full((2,), 2.0).share_memory_()
    opt.step()
    p.share_memory_()
    buffer = opt.state[p]["momentum_buffer"].share_memory_()
    opt.step()
    assert opt.state[p]["momentum_buffer"] is buffer
    assert buffer.is_shared()
    mine = (p.detach().clone(), buffer.clone())
    child = torch.multiprocessing.get_context("fork").Process(target=step_alone, args=(opt, p))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(buffer, mine[1] * 0.5 + 2)
    assert torch.equal(p.detach(), mine[0] - buffer)
    opt.step()
    assert opt.state[p]["momentum_buffer"] is buffer


def test_sharing_that_would_be_undone_is_refused():
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5)
    for wrong in (torch.ones(3, 2).t(), torch.ones(2, 3, dtype=torch.float64)):
        opt.state[p]["momentum_buffer"] = wrong.share_memory_()
        with pytest.raises(ValueError, match=r"state\[0\]\['momentum_buffer'\] .*shared"):
            opt.step()
    assert p.tolist() == [[1] * 3] * 2
    averaging = optcore.torch.SGD([p], lr=1.0, ema_decay=0.5)
    averaging.state[p]["ema"].share_memory_()
    with pytest.raises(ValueError, match=r"state\[0\]\['ema'\] .*shared"):
        averaging.step()


# Nothing is accepted and ignored

def test_unknown_group_keys_are_refused():
    p, q = parameter(), parameter()
    for key in ("max_norm", "skip_nonfinite", "ema_decay", "betas", "lr_scale"):
        with pytest.raises(TypeError, match=key):
            optcore.torch.SGD([{"params": [p], key: 1.0}], lr=1.0)
        opt = optcore.torch.SGD([p], lr=1.0)
        group = {"params": iter([q]), key: 1.0}
        with pytest.raises(TypeError, match=key):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1
        assert group == {"params": [q], key: 1.0}
        opt.param_groups[0][key] = 1.0
        with pytest.raises(TypeError, match=key):
            opt.step()
        del opt.param_groups[0][key]
        del opt.param_groups[0]["momentum"]
        with pytest.raises(KeyError, match="momentum"):
            opt.step()
    assert p.tolist() == [1, 2]


SCHEDULES = {
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=0.001),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(o, [
        torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
        torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [4]),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_schedulers_write_is_no_option(schedule):
    def script(kind):
        p = parameter(1.0)
        opt = kind([p], lr=0.05, momentum=0.5)
        scheduler = SCHEDULES[schedule](opt)
        for _ in range(10):
            opt.step()
            scheduler.step(*[1.0] * (schedule == "plateau"))
            yield opt.param_groups[0]["lr"]
            yield opt.param_groups[0]["momentum"]
        copy.deepcopy(opt).step()
        opt.load_state_dict(opt.state_dict())

    same(script)


def test_attributes():
    p, q = parameter(), parameter()
    opt = optcore.torch.SGD([{"params": [p]}, {"params": [q], "lr": 2.0}], lr=1.0)
    opt.lr = 0.5
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5]
    assert opt.lr == 0.5
    opt.step()
    assert p.tolist() == q.tolist() == [0.5, 1.5]
    for name in ("lrr", "fused", "param_group", "track_grad_norm", "skipped", "grad_norm",
                 "nonfinite_params"):
        with pytest.raises(AttributeError, match=name):
            setattr(opt, name, 1)
    for name, value, error in [
        ("max_norm", -1.0, ValueError), ("skip_nonfinite", 1, TypeError),
        ("ema_decay", 1.0, ValueError), ("ema_decay", lambda step: 0.5, TypeError),
        ("lr", -1.0, ValueError), ("momentum", 1.0, ValueError), ("nesterov", True, ValueError),
    ]:
        before = getattr(opt, name)
        with pytest.raises(error, match=name):
            setattr(opt, name, value)
        assert getattr(opt, name) == before
    opt.momentum, opt.dampening = 0.5, 0.5
    opt.momentum = 0.0      # as where groups are edited, dampening stays, without effect
    opt.step()
    assert p.tolist() == [0, 1]
    names = {name for kind in optcore.torch.SGD.__mro__ for name in vars(kind)}
    assert names > {*SGD_OPTIONS, *optcore.torch.OWN_OPTIONS}
    opt._note = 1       # private names are PyTorch's and its friends' to use


def test_decay_of_the_average_changes_between_steps():
    p = parameter(0.0)
    with pytest.raises(TypeError, match="ema_decay must be a number"):
        optcore.torch.SGD([p], lr=1.0, ema_decay=lambda step: 0.5)
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5)
    opt.step()
    opt.ema_decay = 0.5             # begins with the parameters as they are
    opt.step()
    average = opt.state[p]["ema"]
    assert average.tolist() == [-1.75]
    opt.ema_decay = 0.75
    opt.step()
    assert opt.state[p]["ema"] is average
    assert average.tolist() == [-2.375]
    with pytest.raises(ValueError, match="ema_decay"):
        opt.ema_decay = None
    its = copy.deepcopy(opt)
    assert its.ema_decay == 0.75


def test_nonfinite_gradients_are_named():
    p, q = parameter(), parameter()
    opt = optcore.torch.SGD([p, q], lr=1.0, skip_nonfinite=True)
    assert opt.nonfinite_params == []
    q.grad[1] = torch.nan
    opt.step()
    assert (opt.nonfinite_params, opt.skipped) == ([1], 1)
    its = optcore.torch.SGD([("p", p), ("q", q)], lr=1.0, skip_nonfinite=True)
    its.step()
    assert its.nonfinite_params == ["q"]
    q.grad = None
    opt.step()
    assert (opt.nonfinite_params, opt.skipped) == ([], 1)
    opt.max_norm = 100.0
    for forget in (lambda: opt.load_state_dict(opt.state_dict()), opt.zero_grad):
        p.grad = torch.full((2,), torch.inf)
        opt.step()
        assert (opt.nonfinite_params, opt.grad_norm) == ([0], float("inf"))
        p.grad = p.detach()         # which no step may write and read
        with pytest.raises(ValueError, match="grads"):
            opt.step()
        assert opt.nonfinite_params == [0]
        forget()
        if forget == opt.zero_grad:
            opt.step()
        assert (opt.nonfinite_params, opt.grad_norm) == ([], None)


def test_networks_with_equal_names():
    def script(kind):
        p, q = parameter(grad=1.0), parameter(grad=2.0)
        opt = kind([("weight", p), ("weight", q)], lr=0.5, momentum=0.5)
        opt.add_param_group({"params": [("weight", parameter())]})
        opt.step()
        yield from (p, q)
        yield [group["param_names"] for group in opt.param_groups]

    same(script)
    p, q = parameter(), parameter()
    opt = optcore.torch.SGD([("weight", p), ("weight", q)], lr=1.0)
    q.grad = q.detach()
    with pytest.raises(ValueError, match=r"grads\[1\]"):
        opt.step()


# States

def foreign_states():
    def of(kind, **options):
        p = parameter()
        opt = kind([p], **options)
        opt.step()
        return opt.state_dict()

    yield "adam", of(torch.optim.Adam)
    yield "adamw", of(torch.optim.AdamW)
    yield "rmsprop", of(torch.optim.RMSprop, momentum=0.9)
    yield "adagrad", of(torch.optim.Adagrad)
    yield "asgd", of(torch.optim.ASGD)
    yield "muon-like", {"state": {}, "param_groups": [{"lr": 7.0, "params": [0]}]}
    good = of(torch.optim.SGD, lr=7.0, momentum=0.5)
    for key in ("exp_avg", "step", "velocity"):
        yield f"state-{key}", {**good, "state": {0: {**good["state"][0], key: torch.ones(2)}}}
    for name, buffer in [
        ("int", torch.ones(2, dtype=torch.int32)), ("bool", torch.ones(2).bool()),
        ("complex", torch.ones(2, dtype=torch.complex64)), ("shape", torch.ones(3)),
        ("scalar", torch.ones(())), ("list", [1.0, 2.0]), ("sparse", torch.ones(2).to_sparse()),
    ]:
        yield name, {**good, "state": {0: {"momentum_buffer": buffer}}}
    yield "entry", {**good, "state": {0: torch.ones(2)}}
    yield "stray", {**good, "state": {**good["state"], 1: {}}}
    group = good["param_groups"][0]
    yield "no groups", {**good, "param_groups": []}
    yield "two groups", {**good, "param_groups": [group, {**group, "params": [1]}]}
    yield "two params", {**good, "param_groups": [{**group, "params": [0, 1]}]}
    for key, value in [("betas", (0.9, 0.999)), ("eps", 1e-8), ("momentum", 1.5), ("lr", None),
                       ("nesterov", 1)]:
        yield f"group-{key}", {**good, "param_groups": [{**group, key: value}]}
    yield "no momentum", {**good, "param_groups": [
        {key: value for key, value in group.items() if key != "momentum"}]}


@pytest.mark.parametrize("state", [pytest.param(s, id=name) for name, s in foreign_states()])
def test_foreign_states_are_refused(state):
    p = parameter()
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    buffer = opt.state[p]["momentum_buffer"]
    called = []
    opt.register_load_state_dict_post_hook(called.append)
    with pytest.raises((KeyError, TypeError, ValueError)):
        opt.load_state_dict(state)
    assert not called
    assert str(opt.state_dict()) == str(before)
    assert opt.state[p]["momentum_buffer"] is buffer
    opt.step()
    assert p.tolist() == [-1.5, -0.5]


def test_a_hook_may_adapt_a_foreign_state():
    p = parameter()
    theirs = torch.optim.Adam([p])
    theirs.step()
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5)

    def adapt(opt, state):
        return {"state": {}, "param_groups": opt.state_dict()["param_groups"]}

    opt.register_load_state_dict_pre_hook(adapt)
    opt.load_state_dict(theirs.state_dict())
    assert opt.lr == 1.0


def test_options_that_torch_knows_not_stay_with_their_groups():
    p, q = parameter(), parameter()
    groups = [{"params": [p], "clip_value": 0.25}, {"params": [q], "decoupled_weight_decay": True}]
    opt = optcore.torch.SGD(groups, lr=1.0)
    theirs = torch.optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.5)
    opt.load_state_dict(theirs.state_dict())
    assert [group["clip_value"] for group in opt.param_groups] == [0.25, None]
    assert [group["decoupled_weight_decay"] for group in opt.param_groups] == [False, True]
    opt.step()
    assert p.tolist() == [0.875, 1.875]


def test_loaded_tensors_are_stepped_themselves():
    """As in PyTorch, whose states refer to the live buffers."""
    def script(kind):
        p = parameter()
        opt = kind([p], lr=1.0, momentum=0.5)
        opt.step()
        buffer = opt.state_dict()["state"][0]["momentum_buffer"]
        opt.load_state_dict(opt.state_dict())
        opt.step()
        yield opt.state[p]["momentum_buffer"] is buffer
        yield buffer

    same(script)


# Negated views, lazy and distributed parameters

def test_negated_views():
    def script(kind):
        p = parameter()
        opt = kind([p], lr=0.5, momentum=0.5)
        for grad in (torch._neg_view(torch.ones(2)),
                     torch.full((2,), 1 - 2j, dtype=torch.complex64).conj().imag):
            p.grad = grad
            opt.step()
            yield p

    same(script)
    p = torch.nn.Parameter(torch._neg_view(torch.ones(2)))
    with pytest.raises(ValueError, match=r"params\[0\] \('w'\) .*resolve_neg\(\)"):
        optcore.torch.SGD([("w", p)], lr=1.0)


def test_lazy_parameters_join_when_they_are_there():
    def script(kind):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.LazyLinear(3, bias=False), torch.nn.Linear(3, 2), torch.nn.LazyLinear(1))
        opt = kind(model.parameters(), lr=0.25, momentum=0.5)
        opt.step()
        yield len(opt.state)
        opt.load_state_dict(opt.state_dict())
        x = torch.ones(2, 4)
        model(x)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        for _ in range(3):
            opt.zero_grad()
            model(x).sum().backward()
            opt.step()
        yield from model.parameters()
        yield len(opt.state)

    same(script)


def test_averages_of_lazy_parameters_begin_with_them():
    model = torch.nn.LazyLinear(1, bias=False)
    opt = optcore.torch.SGD(model.parameters(), lr=1.0, momentum=0.5, ema_decay=0.5)
    assert not opt.state
    model(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        model.weight.fill_(2)
    opt.step()
    assert opt.state[model.weight]["ema"].tolist() == [[1.5, 1.5]]


def test_options_are_checked_before_lazy_parameters_are_there():
    model = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match="lr must be"):
        optcore.torch.SGD(model.parameters(), lr=-1.0)
    lazy = torch.nn.parameter.UninitializedParameter(dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"params\[0\] .*complex64"):
        optcore.torch.SGD([lazy], lr=1.0)


def in_a_group(rank, size, folder, target):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        target(torch.distributed.init_device_mesh("cpu", (size,)))
    finally:
        torch.distributed.destroy_process_group()


def distributed(size, folder, target):
    """Run a target in so many processes of a group; in this one where it is alone."""
    if size == 1:
        in_a_group(0, 1, folder, target)
        return
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=in_a_group, args=(rank, size, folder, target), daemon=True)
             for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * size


def linear_layers():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).reshape(p.shape) % 5 - 2)
    return model


def fully_sharded(mesh):
    model = linear_layers()
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    return model


def tensor_parallel(mesh):
    parallel = torch.distributed.tensor.parallel
    return parallel.parallelize_module(linear_layers(), mesh, {
        "0": parallel.ColwiseParallel(), "1": parallel.RowwiseParallel()})


def steps_on_local_tensors(mesh):
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.tensor import DTensor, Partial

    for shard in (fully_sharded, tensor_parallel):
        def script(kind, shard=shard):
            model = shard(mesh)
            opt = kind(model.parameters(), lr=0.5, momentum=0.5, dampening=0.5)
            for k in range(4):
                opt.zero_grad()
                model(torch.ones(2, 4) / 2).sum().backward()
                if k == 2:
                    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                elif k == 3:    # by names, as a checkpoint holds it
                    set_optimizer_state_dict(model, opt, get_optimizer_state_dict(model, opt))
                    for p in model.parameters():
                        p.grad = torch.ones_like(p)
                    opt.param_groups[0]["momentum"] = 0.25
                opt.step()
            for p in model.parameters():
                yield p.full_tensor()
                buffer = opt.state[p]["momentum_buffer"]
                yield type(buffer)
                yield buffer.placements == p.placements
                yield buffer.full_tensor()

        same(script)

    def summed(kind):
        p = torch.nn.Parameter(DTensor.from_local(torch.ones(2), mesh))
        p.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
        opt = kind([p], lr=1.0, momentum=0.5)
        opt.step()
        yield p.to_local()
        yield opt.state[p]["momentum_buffer"].full_tensor()

    same(summed)

    model = tensor_parallel(mesh)
    opt = optcore.torch.SGD(model.named_parameters(), lr=0.5, ema_decay=0.5)
    model(torch.ones(2, 4)).sum().backward()
    before = [p.full_tensor().clone() for p in model.parameters()]
    opt.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(opt.state[p]["ema"].full_tensor(), (old + p.full_tensor()) / 2)
    other, its = copy.deepcopy((model, opt))
    its.step()
    opt.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())
        assert torch.equal(opt.state[p]["ema"].full_tensor(), its.state[q]["ema"].full_tensor())
    for option in ({"max_norm": 0.0}, {"skip_nonfinite": True}):
        with pytest.raises(ValueError, match=rf"{next(iter(option))} .*clip_grad_norm_"):
            optcore.torch.SGD(model.named_parameters(), lr=0.5, **option)
    p = model[0].weight
    opt = optcore.torch.SGD([p], lr=0.5, momentum=0.5)
    p.grad = None
    for wrong in (torch.ones(6, 4), p.full_tensor().detach(), DTensor.from_local(
            torch.ones(6, 4), mesh)):
        opt.state[p]["momentum_buffer"] = wrong
        with pytest.raises((TypeError, ValueError), match=r"state\[0\]\['momentum_buffer'\]"):
            opt.step()


needs_processes = pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available()
         and torch.distributed.is_gloo_available()),
    reason="no fork, or PyTorch without gloo",
)


@needs_processes
@pytest.mark.parametrize("size", [1, 2])
def test_distributed_tensors(size, tmp_path):
    distributed(size, tmp_path, steps_on_local_tensors)


@needs_processes
def test_scaled_distributed_gradients(tmp_path):
    def target(mesh):
        losses = []
        for kind in (torch.optim.SGD, optcore.torch.SGD):
            model = fully_sharded(mesh)
            opt = kind(model.parameters(), lr=0.125, momentum=0.5)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            for k in range(3):
                opt.zero_grad()
                overflows = k == 1 and torch.distributed.get_rank() == 0
                loss = model(torch.ones(2, 4)).sum() * (float("inf") if overflows else 1)
                scaler.scale(loss).backward()
                scaler.step(opt)
                scaler.update()
            losses.append([p.full_tensor().tolist() for p in model.parameters()])
        assert losses[0] == losses[1]

    distributed(2, tmp_path, target)
