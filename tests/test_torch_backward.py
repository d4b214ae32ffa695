"""optcore.torch.SGD(step_in_backward=True) against its own step after backward, to the bit."""
from __future__ import annotations

import copy
import functools
import gc
import io
import weakref

import pytest

torch = pytest.importorskip("torch")

from test_torch import (  # noqa: E402 - after the skip
    distributed,
    fully_sharded,
    make,
    needs_processes,
    one_thread,  # noqa: F401 - a fixture for every test here
    train,
)
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import optcore.torch  # noqa: E402


def bits(model, opt):
    """All that a step writes."""
    states = [(key, held) for p in model.parameters()
              for key, held in sorted(opt.state.get(p, {}).items())]
    kept = [*model.named_parameters(), *states]
    return [(key, t.detach().contiguous().view(torch.uint8).tolist()) for key, t in kept]


def same_as_after(run, model, part=torch.nn.Module.named_parameters, **options):
    """Run with a step after backward and with steps in it: the same bits."""
    results = []
    for how in (False, True):
        own = copy.deepcopy(model)
        opt = optcore.torch.SGD(part(own), step_in_backward=how, **options)
        results.append((run(own, opt), bits(own, opt), opt.state_dict()["param_groups"]))
        assert not how or all(p.grad is None for g in opt.param_groups for p in g["params"])
    assert results[1] == results[0]
    assert results[0][2][0]["step_count"] > 0


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_bits(kind, nesterov):
    data = make(kind)
    same_as_after(lambda model, opt: train(model, opt, data, 50), data[0], lr=0.02, momentum=0.9,
                  nesterov=nesterov)


@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.01, "ema_decay": 0.9},
    {"momentum": 0.9, "lr_in_velocity": True, "clip_value": 0.01},
], ids=lambda options: "-".join(options) or "plain")
def test_bits_of_options(options):
    data = make()
    same_as_after(lambda model, opt: train(model, opt, data, 5), data[0], lr=0.02, **options)


@pytest.mark.parametrize("options", [{}, {"master": None, "velocity_dtype": "bfloat16"}], ids=str)
def test_bits_of_half_precision(options):
    """Noise is that of the step, whatever the order in which gradients come."""
    data = make("transformer", torch.bfloat16)
    same_as_after(lambda m, opt: train(m, opt, data, 5), data[0], lr=0.02, momentum=0.9, **options)


def test_schedulers_and_groups():
    data = make()

    def run(model, opt):
        opt.add_param_group(
            {"params": model.out.named_parameters("out"), "lr": 0.2, "momentum": 0.0})
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=5)
        return train(model, opt, data, 6, scheduler=scheduler)

    same_as_after(run, data[0], lambda model: model.conv1.named_parameters("conv1"), lr=0.1,
                  momentum=0.9)


def test_closure():
    data = make()

    def run(model, opt):
        def closure():
            opt.zero_grad()
            loss = model(data[1][0]).square().mean()
            loss.backward()
            return loss

        return [opt.step(closure).item() for _ in range(3)]

    same_as_after(run, data[0], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("how", [False, True])
def test_memory_of_gradients(how):
    """All that lives of them at any hook: the one of that parameter, or all so far."""
    model, x, _ = make("transformer")
    born, live = [], []

    def look(p):
        born.append((StorageWeakRef(p.grad.untyped_storage()), p.nbytes))
        live.append(sum(n for storage, n in born if not storage.expired()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    opt = optcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9, step_in_backward=how)
    for _ in range(2):
        opt.zero_grad()
        model(x[0]).sum().backward()
        opt.step()
    sizes = [p.nbytes for p in model.parameters()]
    assert max(live) == (max(sizes) if how else sum(sizes))
    assert len(live) == 2 * len(sizes)


class Tied(torch.nn.Module):
    """One matrix three times, in two checkpoints and outside."""

    def __init__(self, how, tied=True):
        super().__init__()
        self.how = how
        self.first = torch.nn.Linear(4, 4)
        self.second = self.first if tied else torch.nn.Linear(4, 4)
        self.out = torch.nn.Linear(4, 4)
        if tied:
            self.out.weight = self.first.weight

    def forward(self, x):
        for layer in (self.first, self.second):
            block = functools.partial(lambda layer, x: torch.tanh(layer(x)), layer)
            x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
        return self.out(x)


@pytest.mark.parametrize(("how", "tied"), [(None, True), (False, True), (True, False)])
def test_checkpoints_and_tied_weights(how, tied):
    torch.manual_seed(0)
    x = torch.randn(5, 4, requires_grad=True)

    def run(model, opt):
        losses = []
        for _ in range(10):
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses

    same_as_after(run, Tied(how, tied), lr=0.1, momentum=0.9, nesterov=True)


def test_tied_weights_in_reentrant_checkpoints_are_refused():
    model = Tied(True)
    opt = optcore.torch.SGD(model.named_parameters(), lr=0.1, step_in_backward=True)
    with pytest.raises(RuntimeError, match=r"first\.weight.*use_reentrant=False"):
        model(torch.ones(5, 4, requires_grad=True)).sum().backward()
    assert opt.step_in_backward


def test_a_second_gradient_is_refused():
    data = make()
    model, x = data[0], data[1][0]
    opt = optcore.torch.SGD(model.named_parameters(), lr=0.1, momentum=0.9, step_in_backward=True)
    model(x).sum().backward()
    before = bits(model, opt)
    with pytest.raises(RuntimeError, match=r"out\.bias.*call opt\.step\(\) after each backward"):
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"out\.bias.*opt\.zero_grad\(\) drops"):
        opt.step()
    assert bits(model, opt) == before
    opt.zero_grad()
    opt.step()
    model(x).sum().backward()
    opt.step()
    assert opt.state_dict()["param_groups"][0]["step_count"] == 2


def test_backward_over_several_losses():
    """Each has its own parameters: one step."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = optcore.torch.SGD([a, b], lr=0.5, step_in_backward=True)
    a.sum().backward()
    opt.param_groups[0]["lr"] = 0.25        # of the next step
    b.sum().backward()
    opt.step()
    a.sum().backward()
    opt.step()
    opt.step()      # over no gradient at all: none
    assert (a.tolist(), b.tolist()) == ([0.25] * 2, [0.5] * 2)
    assert opt.state_dict()["param_groups"][0]["step_count"] == 2


def test_gradients_that_no_hook_is_called_for():
    """Of parameters that were lazy or frozen, which have hooks from then on; set by hand."""
    x = torch.linspace(-1, 1, 12).reshape(3, 4)

    def run(model, opt):
        torch.manual_seed(0)
        model[0].requires_grad_(False)
        opt.step()
        losses = []
        for k in range(4):
            opt.zero_grad()
            model[0].requires_grad_(k > 0)
            loss = model(x).square().mean()
            loss.backward()
            freed = all(p.grad is None for p in model.parameters())
            assert freed == (opt.step_in_backward and k > 0)
            opt.step()
            losses.append(loss.item())
        opt.zero_grad()
        model[1].bias.grad = torch.ones(2)
        opt.step()
        opt.zero_grad()
        return losses

    same_as_after(run, torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LazyLinear(2)),
                  lr=0.1, momentum=0.9)


def through_a_file(pair):
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["deepcopy", "save"])
def test_copies_go_on(duplicate):
    data = make()
    model = data[0]
    opt = optcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9, step_in_backward=True)
    train(model, opt, data, 3)
    other, its = duplicate((model, opt))
    for own, stepper in ((model, opt), (other, its)):
        own(data[1][0]).sum().backward()
        assert all(p.grad is None for p in own.parameters())
        stepper.step()
    assert train(other, its, data, 3) == train(model, opt, data, 3)
    assert bits(other, its) == bits(model, opt)


def test_state_dicts_go_both_ways():
    data = make()
    model, twin = data[0], copy.deepcopy(data[0])
    opt = optcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, opt, data, 3)
    twin.load_state_dict(model.state_dict())
    other = optcore.torch.SGD(twin.parameters(), lr=1.0, step_in_backward=True)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert train(twin, other, data, 3) == train(model, opt, data, 3)
    assert bits(twin, other) == bits(model, opt)
    assert other.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


@pytest.mark.parametrize("call", [
    lambda opt: opt.state_dict(), copy.deepcopy, lambda opt: setattr(opt, "lr", 0.25),
    lambda opt: opt.load_state_dict({}), lambda opt: setattr(opt, "seed", 1),
    lambda opt: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}),
], ids=["state_dict", "copy", "lr", "load_state_dict", "seed", "add_param_group"])
def test_nothing_is_done_in_the_middle_of_a_step(call):
    p = torch.nn.Parameter(torch.ones(2))
    opt = optcore.torch.SGD([p], lr=0.5, step_in_backward=True)
    p.sum().backward()
    with pytest.raises(RuntimeError, match=r"a step is under way.*call opt\.step\(\) first"):
        call(opt)
    opt.step()
    assert opt.state_dict()["param_groups"][0]["step_count"] == 1
    assert (p.tolist(), opt.lr, len(opt.param_groups)) == ([0.5] * 2, 0.5, 1)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_options_that_need_all_gradients_are_refused(options):
    p = torch.nn.Parameter(torch.ones(2))
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name} must be left out with step_in_backward"):
        optcore.torch.SGD([p], step_in_backward=True, **options)
    opt = optcore.torch.SGD([p], step_in_backward=True)
    with pytest.raises(ValueError, match=f"{name} must be left out with step_in_backward"):
        setattr(opt, name, value)
    assert getattr(opt, name) in (None, False)


def test_other_refusals():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="True, False or a DistributedDataParallel model, got Lin"):
        optcore.torch.SGD([p], step_in_backward=torch.nn.Linear(1, 1))
    opt = optcore.torch.SGD([p], lr=0.5, step_in_backward=True)
    with pytest.raises(AttributeError):
        opt.step_in_backward = False
    opt.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be"):
        p.sum().backward()
    assert p.tolist() == [1.0, 1.0]
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert p.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_is_refused(unscaled):
    p = torch.nn.Parameter(torch.ones(2))
    opt = optcore.torch.SGD([p], lr=0.5, step_in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    if unscaled:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="a GradScaler needs an optimizer without"):
        scaler.step(opt)


def test_a_first_step_that_fails_begins_none():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = optcore.torch.SGD([a, b], lr=0.5, step_in_backward=True)
    a.grad = a.data     # which shares its memory
    with pytest.raises(ValueError, match=r"grads\[0\] must not share memory"):
        opt.step()
    assert opt.state_dict()["param_groups"][0]["step_count"] == 0       # between steps
    opt.lr = 0.25
    b.sum().backward()
    with pytest.raises(ValueError, match=r"grads\[0\] must not share memory"):
        opt.step()
    opt.zero_grad()
    opt.step()
    assert (a.tolist(), b.tolist()) == ([1.0] * 2, [0.75] * 2)
    assert opt.state_dict()["param_groups"][0]["step_count"] == 1


def test_the_rest_is_stepped_together_or_not_at_all():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = optcore.torch.SGD([a, b], lr=0.5, step_in_backward=True)
    a.grad, b.grad = torch.ones(2), b.data
    with pytest.raises(ValueError, match=r"grads\[1\] must not share memory"):
        opt.step()
    b.grad = None
    assert (a.tolist(), a.grad.tolist()) == ([1.0] * 2, [1.0] * 2)
    opt.step()
    assert (a.tolist(), a.grad) == ([0.5] * 2, None)


def test_parameters_that_leave_keep_their_gradients():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = optcore.torch.SGD([a, b], lr=0.5, step_in_backward=True)
    del opt.param_groups[0]["params"][0]
    (a + b).sum().backward()
    opt.step()
    assert (a.tolist(), a.grad.tolist()) == ([1.0] * 2, [1.0] * 2)
    assert (b.tolist(), b.grad) == ([0.5] * 2, None)


def test_velocities_put_into_the_state_meanwhile():
    """What is put there during a step is gone on from at the next one, as it says."""
    p = torch.nn.Parameter(torch.zeros(2))
    opt = optcore.torch.SGD([p], lr=1.0, momentum=0.5, step_in_backward=True)
    p.sum().backward()
    opt.state[p]["momentum_buffer"] = torch.full((2,), 4.0)
    opt.step()
    p.sum().backward()
    opt.step()
    assert p.tolist() == [-1.0 - 3.0] * 2
    assert opt.state[p]["momentum_buffer"].tolist() == [3.0] * 2


def test_replaced_data_is_noticed():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = optcore.torch.SGD([a, b], lr=0.5, momentum=0.5, step_in_backward=True)
    a.sum().backward()
    b.data = torch.zeros(2)
    with pytest.raises(RuntimeError, match=r"params\[1\] was replaced while a step was under way"):
        b.sum().backward()
    opt.zero_grad()
    opt.step()
    b.sum().backward()
    opt.step()
    assert (a.tolist(), b.tolist()) == ([0.5] * 2, [-0.5] * 2)


def test_what_backward_needs_again_is_noticed():
    p = torch.nn.Parameter(torch.ones(2))
    opt = optcore.torch.SGD([p], lr=0.5, step_in_backward=True)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    opt.step()


def test_hooks_keep_no_optimizer_alive():
    p = torch.nn.Parameter(torch.ones(2))
    opt = weakref.ref(optcore.torch.SGD([p], lr=0.5, step_in_backward=True))
    gc.collect()
    assert opt() is None
    p.sum().backward()
    assert (p.tolist(), p.grad.tolist()) == ([1.0, 1.0], [1.0, 1.0])


def steps_of_replicas(_):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    parallel = torch.nn.parallel.DistributedDataParallel
    rank = torch.distributed.get_rank()
    data = make("transformer")
    x = data[1] + rank
    runs = []
    for how in (False, True):
        # so small that there are several
        model = parallel(copy.deepcopy(data[0]), bucket_cap_mb=1e-3, gradient_as_bucket_view=how)
        if not how:
            model.register_comm_hook(None, allreduce_hook)
        opt = optcore.torch.SGD(model.parameters(), lr=0.05, momentum=0.9,
                                step_in_backward=model if how else False)
        losses = train(model, opt, (model, x, data[2]), 5)
        opt.zero_grad()
        with model.no_sync():
            model(x[0]).sum().backward()
        model(x[1]).sum().backward()
        assert not how or all(p.grad is None for p in model.parameters())
        opt.step()
        runs.append((losses, bits(model, opt)))
    assert runs[0] == runs[1]
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(opt)
    with pytest.raises(ValueError, match="False with find_unused_parameters"):
        optcore.torch.SGD(model.parameters(), step_in_backward=parallel(
            copy.deepcopy(data[0]), find_unused_parameters=True))
    model(x[0]).sum().backward()
    with pytest.raises(RuntimeError, match=r"call opt\.step\(\) after each backward"):
        model(x[0]).sum().backward()
    opt.zero_grad()
    opt.step()

    class Bucket:
        """A bucket of one parameter that is averaged, or not yet."""

        def __init__(self, param):
            self.parameters, self.gradients = lambda: [param], lambda: [torch.ones_like(param)]
            self.index, self.is_last = lambda: int(param is not first), lambda: False

    first, second = list(model.parameters())[:2]
    before, average = copy.deepcopy((first, second)), torch.futures.Future()
    average.set_result(None)
    opt._take_averaged(average, Bucket(first))
    opt._take_averaged(torch.futures.Future(), Bucket(second))
    assert not torch.equal(first, before[0])
    assert torch.equal(second, before[1])

    model = parallel(copy.deepcopy(data[0]))
    opt = optcore.torch.SGD(model.parameters(), step_in_backward=model)
    with pytest.raises(RuntimeError, match=r"False within join\(\)"), model.join():
        model(x[0]).sum().backward()
    model = parallel(copy.deepcopy(data[0]))
    opt = optcore.torch.SGD(model.parameters(), step_in_backward=True)
    model(x[0]).sum().backward()
    with pytest.raises(RuntimeError, match="needs step_in_backward=model"):
        opt.step()


@needs_processes
def test_replicas(tmp_path):
    distributed(2, tmp_path, steps_of_replicas)


@needs_processes
def test_fully_sharded(tmp_path):
    def target(mesh):
        runs = []
        for how in (False, True):
            model = fully_sharded(mesh)
            opt = optcore.torch.SGD(
                model.parameters(), lr=0.125, momentum=0.5, step_in_backward=how)
            for _ in range(3):
                opt.zero_grad()
                model(torch.ones(2, 4)).square().sum().backward()
                opt.step()
            runs.append([p.full_tensor().tolist() for p in model.parameters()])
        assert runs[0] == runs[1]

    distributed(2, tmp_path, target)
