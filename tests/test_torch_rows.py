"""Sparse gradients of embedding layers under optcore.torch.SGD, against dense PyTorch."""
import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
import optcore.torch  # noqa: E402

N_WORDS, WIDTH, BATCH, BAG = 60, 8, 6, 4


class Bag(torch.nn.Module):
    """The mean of some words' vectors, then a linear layer."""

    def __init__(self, sparse, kind="embedding"):
        super().__init__()
        self.words = (torch.nn.Embedding if kind == "embedding" else torch.nn.EmbeddingBag)(
            N_WORDS, WIDTH, sparse=sparse
        )
        self.out = torch.nn.Linear(WIDTH, 1)

    def forward(self, words):
        vectors = self.words(words)
        return self.out(vectors.mean(1) if vectors.dim() == 3 else vectors).squeeze(-1)


def models(kind="embedding", dtype=torch.float32):
    torch.manual_seed(0)
    sparse = Bag(True, kind).to(dtype)
    dense = Bag(False, kind).to(dtype)
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


def batches(n, dtype=torch.float32, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        words = np.minimum(rng.zipf(1.3, (BATCH, BAG)) - 1, N_WORDS - 1)
        yield torch.from_numpy(words), torch.from_numpy(rng.standard_normal(BATCH)).to(dtype)


def train(model, opt, some):
    for words, wanted in some:
        opt.zero_grad()
        (model(words) - wanted).square().mean().backward()
        opt.step()


def differences(sparse, dense):
    return max((a - b).abs().max().item() for a, b in zip(
        sparse.parameters(), dense.parameters(), strict=True))


OPTIONS = [
    {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "weight_decay": 0.01}, {"weight_decay": 0.01}, {},
]


@pytest.mark.parametrize(("options", "kind"), [
    *[(options, "embedding") for options in OPTIONS], (OPTIONS[3], "bag"),
], ids=str)
def test_follows_dense_pytorch(options, kind):
    """500 steps, a checkpoint of model and optimizer in the middle, in float32 within 1e-5."""
    sparse, dense = models(kind)
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, **options)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.05, **options)
    train(sparse, ours, batches(250))
    train(dense, theirs, batches(250))
    file = io.BytesIO()
    torch.save({"opt": ours.state_dict(), "model": sparse.state_dict()}, file)
    train(sparse, ours, batches(9, seed=5))     # which the load undoes
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    sparse.load_state_dict(saved["model"])
    ours.load_state_dict(saved["opt"])
    train(sparse, ours, batches(250, seed=2))
    train(dense, theirs, batches(250, seed=2))
    ours.catch_up()
    assert differences(sparse, dense) < 1e-5
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        if options.get("momentum"):
            torch.testing.assert_close(
                ours.state[a]["momentum_buffer"], theirs.state[b]["momentum_buffer"],
                rtol=1e-5, atol=1e-5)


def test_float64_follows_to_the_last_digits():
    sparse, dense = models(dtype=torch.float64)
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    train(sparse, ours, batches(500, torch.float64))
    train(dense, theirs, batches(500, torch.float64))
    ours.catch_up()
    assert differences(sparse, dense) < 1e-13


def test_embedding_reads_rows_that_are_up_to_date():
    """A row's value in the forward pass is the dense run's, however long nobody touched it."""
    sparse, dense = models(dtype=torch.float64)
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    train(sparse, ours, batches(20, torch.float64))
    train(dense, theirs, batches(20, torch.float64))
    before = sparse.words.weight.detach().clone()
    everything = torch.arange(N_WORDS)
    with torch.no_grad():
        torch.testing.assert_close(
            sparse.words(everything), dense.words(everything), rtol=1e-12, atol=1e-14)
    assert not torch.equal(before, sparse.words.weight)     # there was something to catch up
    assert torch.equal(sparse.words(input=everything), sparse.words.weight)


def test_only_the_rows_that_are_read_are_caught_up():
    sparse, _ = models()
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    words = torch.tensor([[1, 2, 3, 4]])
    train(sparse, ours, [(words, torch.ones(1))])
    train(sparse, ours, [(words + 10, torch.ones(1))])
    before = sparse.words.weight.detach().clone()
    sparse.words(torch.tensor([2]))
    changed = (before != sparse.words.weight).any(1).nonzero().ravel().tolist()
    assert changed == [2]


def test_rows_without_a_gradient_stay_with_lazy_rows():
    sparse, _ = models()
    before = sparse.words.weight.detach().clone()
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, momentum=0.9, lazy="rows")
    train(sparse, ours, [(torch.tensor([[1, 2, 3, 4]]), torch.ones(1))] * 2)
    train(sparse, ours, [(torch.tensor([[5, 6, 7, 8]]), torch.ones(1))] * 9)
    once = sparse.words.weight.detach().clone()
    ours.catch_up()
    assert torch.equal(once, sparse.words.weight)
    moved = (before != once).any(1).nonzero().ravel().tolist()
    assert moved == [1, 2, 3, 4, 5, 6, 7, 8]


def test_copies_and_pickles_have_all_rows_up_to_date():
    sparse, _ = models()
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    train(sparse, ours, batches(10))
    twin, twin_opt = copy.deepcopy((sparse, ours))
    train(sparse, ours, batches(10, seed=3))
    train(twin, twin_opt, batches(10, seed=3))
    ours.catch_up()
    twin_opt.catch_up()
    for a, b in zip(sparse.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_replaced_is_gone_on_from_up_to_date():
    """A plan built anew goes on as if it had not been."""
    sparse, dense = models(dtype=torch.float64)
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    for model, opt in ((sparse, ours), (dense, theirs)):
        train(model, opt, batches(10, torch.float64))
        buffer = opt.state[model.out.weight]
        buffer["momentum_buffer"] = buffer["momentum_buffer"].clone()
        train(model, opt, batches(10, torch.float64, seed=4))
    ours.catch_up()
    assert differences(sparse, dense) < 1e-13


def test_steps_in_backward():
    sparse, dense = models(dtype=torch.float64)
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, momentum=0.9, step_in_backward=True)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=0.9)
    train(sparse, ours, batches(50, torch.float64))
    train(dense, theirs, batches(50, torch.float64))
    ours.catch_up()
    assert differences(sparse, dense) < 1e-13


def test_refusals():
    sparse, _ = models()
    ours = optcore.torch.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    train(sparse, ours, batches(3))
    before = [p.detach().clone() for p in sparse.parameters()]
    with pytest.raises(KeyError, match="param must be a parameter of this optimizer"):
        ours.catch_up(torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(IndexError, match=r"rows must be in \[0, 60\).* got 60 at position 1"):
        ours.catch_up(sparse.words.weight, torch.tensor([0, 60]))
    sparse.words.weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 1], [0, 1]]), torch.ones(2), (N_WORDS, WIDTH))
    with pytest.raises(TypeError, match=r"sparse in its first dimension alone"):
        ours.step()
    turned = torch.nn.Parameter(torch.zeros(3, 4).t())
    other = optcore.torch.SGD([turned], lr=0.1)
    turned.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 3), (4, 3))
    with pytest.raises(ValueError, match="must be contiguous to be stepped by a sparse gradient"):
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(before, sparse.parameters(), strict=True))
