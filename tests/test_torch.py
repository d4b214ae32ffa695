"""optcore.torch.SGD against torch.optim.SGD: losses, states, and what it refuses."""
from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import optcore  # noqa: E402 - after the skip
import optcore.torch  # noqa: E402

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


def test_autograd_learns_of_the_step():
    p = torch.nn.Parameter(torch.ones(3))
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
        ("half", x.half(), "float16"),
        ("bfloat16", x.bfloat16(), "BFloat16"),
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


def test_sparse_gradient():
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    opt = optcore.torch.SGD(embedding.named_parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(TypeError, match=r"grads\[0\] \('weight'\) .*[Ss]parse"):
        opt.step()
    assert torch.equal(before, embedding.weight.detach())


def test_no_torch_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; import optcore; import optcore.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'optcore[torch]'" in done.stderr
