"""Parameter shapes of whole models, from the definitions of their architectures."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from math import prod

Shape = tuple[int, ...]


def resnet50() -> Iterator[Shape]:
    """He et al. (2015), arXiv:1512.03385, table 1: bottlenecks of 3, 4, 6, 3, batch norms."""

    def convolution(out: int, into: int, width: int) -> Iterator[Shape]:
        yield (out, into, width, width)
        yield from [(out,), (out,)]         # the batch norm's scale and shift

    yield from convolution(64, 3, 7)
    into = 64
    for narrow, blocks in [(64, 3), (128, 4), (256, 6), (512, 3)]:
        for block in range(blocks):
            yield from convolution(narrow, into, 1)
            yield from convolution(narrow, narrow, 3)
            yield from convolution(4 * narrow, narrow, 1)
            if block == 0:                  # the shortcut changes width
                yield from convolution(4 * narrow, into, 1)
            into = 4 * narrow
    yield from [(1000, into), (1000,)]


def gpt2_small() -> Iterator[Shape]:
    """Radford et al. (2019): 12 layers of width 768, output tied to the token embedding."""

    def linear(into: int, out: int) -> list[Shape]:
        return [(into, out), (out,)]

    width, layers = 768, 12
    norm = [(width,), (width,)]
    yield from [(50257, width), (1024, width)]
    for _ in range(layers):
        yield from norm + linear(width, 3 * width) + linear(width, width)
        yield from norm + linear(width, 4 * width) + linear(4 * width, width)
    yield from norm


# Networks that are trained while they are measured: widths of the layers, examples in a batch.
TRAININGS = {
    # The two-layer network of CS231n's assignments on CIFAR-10's pictures
    "two-layer net in training": ((3072, 100, 10), 100),
    # The demo's, on scikit-learn's digits
    "digits net in training": ((64, 1024, 1024, 10), 64),
}


def dense(*sizes: int) -> Iterator[Shape]:
    """Return weights and biases of a perceptron."""
    for into, out in pairwise(sizes):
        yield from [(into, out), (out,)]


def many_small() -> Iterator[Shape]:
    """Return what costs per tensor rather than per element."""
    yield from [(256,)] * 1000


# name: shapes, tensors, parameters. The counts are those the papers' authors publish.
_MODELS = {
    "ResNet-50": (resnet50, 161, 25_557_032),
    "GPT-2 small": (gpt2_small, 148, 124_439_808),
    "MLP": (partial(dense, 784, 1024, 1024, 10), 6, 1_863_690),
    "1000 × 256": (many_small, 1000, 256_000),
}


def checked(name: str) -> list[Shape]:
    """Return a model's shapes, having counted them."""
    generate, tensors, parameters = _MODELS[name]
    shapes = list(generate())
    found = len(shapes), sum(map(prod, shapes))
    if found != (tensors, parameters):
        raise AssertionError(f"{name} should have {tensors, parameters}, its shapes have {found}")
    return shapes


MODELS = {name: checked(name) for name in _MODELS} | {
    name: list(dense(*sizes)) for name, (sizes, _) in TRAININGS.items()
}
