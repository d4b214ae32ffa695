"""Arrays stored in another type than they are stepped in: opened block by block, closed again."""
from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_embedding import number_of

from reference import LINEAR, RULES_BY_ID, Options, averaged, same_bits

# Around the sweep's blocks of 256 and chunks of 8192
LENGTHS = [0, 1, 15, 16, 17, 255, 256, 257, 1000, 8193]
TYPES = ["float32", "float64"]
# A variant is chosen by options, not by how an array is stored
PLAIN = [rule for rule in LINEAR if not rule.lr_in_velocity]


@pytest.fixture
def streams(probes):
    return pytest.importorskip("probe_streams", reason="the sources are not here")


OF_ADAPTIVE = ["alpha", "alpha_weight", "beta1", "beta1_weight", "beta2", "beta2_weight",
               "step_size", "unbias", "eps_inside", "eps_outside"]


def scalars(o, decay=0.0):
    return {
        "lr": o.lr, "momentum": o.momentum, "undamped": 1.0, "weight_decay": o.weight_decay,
        "shrink": 1.0, "scale": -o.grad_scale if o.maximize else o.grad_scale,
        "clip_value": np.inf if o.clip_value is None else o.clip_value,
        "ema_decay": decay, "ema_weight": 1 - decay, "flushes": o.flush_subnormals,
        **dict.fromkeys(OF_ADAPTIVE, 0.0),
    }


@pytest.mark.parametrize("types", list(itertools.product(TYPES, repeat=3)), ids="-".join)
@pytest.mark.parametrize("rule", PLAIN, ids=lambda rule: rule.id)
def test_any_mix_of_storages(rule, types, streams, rng, simd_level, cases):
    """Gradients and states are widened exactly or rounded once; so are states on their way back."""
    stored, of_grads, of_states = types
    base = Options(lr=0.1, momentum=0.9 if rule.has_momentum else 0.0)
    variants = [
        (base, 1), (replace(base, weight_decay=0.01, maximize=True), 1),
        (replace(base, clip_value=0.5, grad_scale=0.3), 1), (base, 3),
    ]
    for (o, n_grads), n, offset, full in itertools.product(
        variants, LENGTHS, [0, 3], [False, True]
    ):
        x = rng.standard_normal(n + offset).astype(stored)[offset:]
        grads = [rng.standard_normal(n).astype(of_grads) for _ in range(n_grads)]
        grads[-1] = grads[-1].astype(stored)        # one of several may be stored otherwise
        states = [rng.standard_normal(n).astype(of_states) for _ in rule.states]
        d = grads[0].astype(stored)
        for g in grads[1:]:
            d = d + g.astype(stored)
        new_x, new_states = rule.reference(x, d, [s.astype(stored) for s in states], o)
        ema = x.copy() if full else None
        expected = [new_x, *[s.astype(of_states) for s in new_states]]
        if full:
            expected.append(averaged(ema, new_x, 0.5))
        streams.step(number_of(rule), x, grads, states, scalars(o, 0.5), ema, full, 0)
        results = [x, *states] + ([ema] if full else [])
        cases(all(map(same_bits, results, expected)), (types, n, offset, o, full))
        assert not full or not any(g.any() for g in grads)


@pytest.mark.parametrize("types", list(itertools.product(TYPES, repeat=2)), ids="-".join)
def test_a_share_begins_anywhere(types, streams, rng):
    rule = RULES_BY_ID["momentum"]
    o = Options(lr=0.1, momentum=0.9)
    x = rng.standard_normal(1000).astype(types[0])
    g, v = (rng.standard_normal(1000).astype(types[1]) for _ in range(2))
    new_x, (new_v,) = rule.reference(x, g.astype(types[0]), [v.astype(types[0])], o)
    new_v = new_v.astype(types[1])
    new_x[:300], new_v[:300] = x[:300], v[:300]
    streams.step(number_of(rule), x, [g], [v], scalars(o), None, False, 300)
    assert same_bits(x, new_x)
    assert same_bits(v, new_v)


@pytest.mark.parametrize("types", list(itertools.product(TYPES, repeat=2)), ids="-".join)
def test_the_norm_opens_gradients_too(types, streams, rng):
    x = np.zeros(1003, types[0])
    for n_grads in (1, 3):
        grads = [rng.standard_normal(1003).astype(types[1]) for _ in range(n_grads)]
        alike = [g.astype(types[0]) for g in grads]
        assert streams.squares(x, grads) == streams.squares(x, alike)
        grads[0][[5, 700]] = np.nan, np.inf
        assert streams.squares(x, grads)[1] == 2
