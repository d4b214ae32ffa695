"""The lecture's theory against itself and textbooks, and the measurements against the theory."""
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lecture import measure, theory
from lecture.rules import ADAPTIVE, RULES, Constants
from reference import RULES_BY_ID, Options, same_bits

VELOCITY = ["momentum", "nesterov"]
KAPPAS = [10.0**e for e in range(1, 7)]

rates = st.floats(0.01, 2.5)
momenta = st.floats(0.05, 0.98)
names = st.sampled_from(list(RULES))


@pytest.mark.parametrize("name", RULES)
def test_the_gallery_steps_with_the_engine(name):
    rng = np.random.default_rng(0)
    x, g, v = rng.standard_normal((3, 33))
    rule = RULES_BY_ID[name]
    states = [v][: len(rule.states)]
    expected_x, expected = rule.reference(x, g, states, Options(lr=0.3, momentum=0.7))
    RULES[name].step(x, g, v, 0.3, 0.7)
    assert same_bits(x, expected_x)
    assert all(map(same_bits, states, expected))


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_gallery_steps_the_adaptive_rules_with_the_engine(name, corrected):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 33))
    states = rng.random((2, 33))
    rule, n = RULES_BY_ID[name], len(RULES_BY_ID[name].states)
    options = Options(lr=0.3, alpha=0.8, beta1=0.7, beta2=0.95, eps=0.01,
                      step=3 if corrected else None)
    expected_x, expected = rule.reference(x, g, [*states[:n]], options)
    ADAPTIVE[name].step(x, g, states, 3, Constants(
        0.3, decay=0.8, beta1=0.7, beta2=0.95, eps=0.01, corrected=corrected))
    assert same_bits(x, expected_x)
    assert all(map(same_bits, states, expected))


@pytest.mark.parametrize("kappa", KAPPAS)
def test_textbook_settings_contract_as_textbooks_say(kappa):
    spectrum, root = measure.spectrum(kappa), np.sqrt(kappa)
    for name, expected in [("sgd", (kappa - 1) / (kappa + 1)),
                           ("momentum", (root - 1) / (root + 1)),
                           ("nesterov", 1 - 1 / root)]:
        found = theory.contraction(name, *theory.textbook(name, kappa), spectrum).max()
        assert -np.log(found) == pytest.approx(-np.log(expected), rel=1e-4)
    best = theory.contraction("nesterov", *theory.nesterov_on_quadratics(kappa), spectrum).max()
    assert -np.log(best) == pytest.approx(-np.log(1 - 2 / np.sqrt(3 * kappa + 1)), rel=1e-4)


@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_spectral_radius_is_that_of_the_eigenvalues(entries):
    matrix = np.array(entries).reshape(2, 2)
    expected = np.abs(np.linalg.eigvals(matrix)).max()
    assert theory.spectral_radius(matrix) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", RULES)
def test_the_radius_is_one_at_the_edge(name, momentum):
    edge = theory.stability_edge(name, momentum, 3.0)
    assert theory.contraction(name, edge, momentum, 3.0) == pytest.approx(1, abs=1e-9)
    assert theory.contraction(name, 1.001 * edge, momentum, 3.0) > 1
    assert theory.contraction(name, 0.999 * edge, momentum, 3.0) < 1


@given(rates, momenta)
def test_closed_form_variances_solve_the_covariance_equation(lr, momentum):
    for name in ("sgd", "momentum"):
        assume(lr < 0.99 * theory.stability_edge(name, momentum, 1.0))
        exact = theory.stationary_covariance(name, lr, momentum, 1.0, 1.0)[0, 0]
        assert theory.stationary_variance(name, lr, momentum, 1.0, 1.0) == pytest.approx(exact)


@given(names, rates, momenta)
def test_the_characteristic_recursion_is_the_matrix_power(name, lr, momentum):
    matrix = theory.block(name, lr, momentum, 1.0)
    expected = [np.linalg.matrix_power(matrix, k)[0, 0] for k in range(9)]
    assert theory.modes(name, lr, momentum, 1.0, 8) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_cycle_is_the_published_one():
    # Lessard, Recht and Packard (2016), section 4.6
    expected = np.array([-2208, 792, 2592]) / 1225
    assert np.sort(theory.heavy_ball_cycle()) == pytest.approx(expected, rel=1e-12)


def chain_of_roundings(lr, noise, unit, reach=80):
    """The variance of stochastically rounded SGD, from the chances of going from place to place.

    With a triangle around place j for the chance of x to be rounded to j, that of a normal x is
    the second difference of E max(x − j, 0).
    """
    normal = NormalDist()
    places = np.arange(-reach, reach + 1)
    mean, spread = places * (1 - lr), lr * noise / unit
    q = (mean[:, None] - np.arange(-reach - 1, reach + 2)) / spread
    beyond = spread * (np.vectorize(normal.pdf)(q) + q * np.vectorize(normal.cdf)(q))
    chances = np.diff(beyond, 2, axis=1)
    system = np.vstack([chances.T - np.eye(places.size), np.ones(places.size)])
    share = np.linalg.lstsq(system, np.r_[np.zeros(places.size), 1], rcond=None)[0]
    return unit**2 * share @ places**2


@pytest.mark.parametrize("lr", [0.005, 0.03, 0.1, 0.3])
@pytest.mark.parametrize("unit", [2.0**-5, 2.0**-7])
def test_the_variance_of_rounding_is_that_of_the_chain(lr, unit):
    exact = chain_of_roundings(lr, 0.2, unit)
    assert theory.rounded_variance(lr, 1.0, 0.2, unit) == pytest.approx(exact, rel=2e-3)


def test_the_variance_of_rounding_has_its_limits():
    unit, noise = 2.0**-7, 0.1
    assert theory.rounding_variance(unit**2, unit) == pytest.approx(unit**2 / 6)
    assert theory.rounding_variance((unit / 50) ** 2, unit) == pytest.approx(
        unit * unit / 50 * np.sqrt(2 / np.pi) - (unit / 50) ** 2, rel=1e-6)
    assert theory.rounded_variance(1e-4, 1.0, noise, unit) == pytest.approx(
        theory.rounding_floor(1.0, noise, unit), rel=0.02)
    assert theory.rounded_variance(0.1, 2.0, noise, 0.0) == pytest.approx(
        theory.stationary_variance("sgd", 0.1, 0.0, 2.0, noise))


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.5, 0.99), (0.95, 0.9999)])
def test_the_peak_without_correction_is_that_of_the_steps(beta1, beta2):
    t = np.arange(1, 1000) / 10
    steps = (1 - beta1**t) / np.sqrt(1 - beta2**t)
    at, height = theory.uncorrected_peak(beta1, beta2)
    assert at == pytest.approx(t[np.argmax(steps)], abs=0.1)
    assert height == pytest.approx(steps.max(), rel=1e-3)
    # What the docstring says of β₂ close to 1
    at, height = theory.uncorrected_peak(beta1, 1 - 1e-9)
    assert at * -np.log(beta1) == pytest.approx(1.2564, abs=1e-4)
    assert height / np.sqrt(np.log(beta1) / np.log1p(-1e-9)) == pytest.approx(0.6382, abs=1e-4)


def test_the_distance_of_dying_steps_is_their_sum():
    for steps in (10, 1000):
        rest = np.sum(1 / np.sqrt(np.arange(1, steps + 1))) - theory.adagrad_distance(steps)
        assert abs(rest) < steps**-1.5 / 24


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("lr", [0.003, 0.03])
def test_tilted_rmsprop_comes_down_at_the_rate(decay, lr):
    (hessian,), start = measure.valleys(np.pi / 4, np.array([1e4]))
    path = measure.adaptive_trajectory(
        ADAPTIVE["rmsprop"], lambda x: hessian @ x, start, Constants(lr, decay=decay, eps=0.0),
        steps=6000) @ [1, 1]
    rate = np.log(path[4000] / path[6000]) / 2000
    assert rate == pytest.approx(theory.tilted_rmsprop_rate(decay, 1e4), rel=2e-3)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule must be sgd, momentum or nesterov, got 'adam'"):
        theory.block("adam", 0.1, 0.9, 1.0)


@settings(max_examples=30, deadline=None)
@given(names, rates, momenta)
def test_contraction_is_measured_anywhere(name, lr, momentum):
    assume(lr < 0.99 * theory.stability_edge(name, momentum, 1.0))
    curvatures = np.array([1e-4, 0.01, 0.3, 1.0])
    expected = theory.contraction(name, lr, momentum, curvatures)
    assume(np.all(expected > 1e-3))
    found = measure.contraction(RULES[name], curvatures, lr=lr, momentum=momentum, steps=500)
    assert np.log(found) == pytest.approx(np.log(expected), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.0), ("momentum", 0.9),
                                                ("nesterov", 0.9)])
def test_the_error_itself_decays_at_the_rate(name, momentum):
    """What a reader would measure: the slope of ln|x| over a long window."""
    path = measure.trajectory(RULES[name], lambda x: 0.02 * x, np.ones(1), lr=0.05,
                              momentum=momentum, steps=6000)[:, 0]
    slope = -np.log(path[6000] / path[1000]) / 5000
    expected = -np.log(theory.contraction(name, 0.05, momentum, 0.02))
    assert slope == pytest.approx(expected, rel=0.01)


def test_the_first_overshoot_ends_where_the_path_returns():
    path = np.array([[1, 1, 1], [-0.2, 0.5, -0.1], [-0.4, 0.2, 0.3], [0.1, 0.1, -0.9]])
    assert measure.first_overshoot(path).tolist() == [0.4, 0.0, 0.1]


def test_sign_changes_of_an_alternating_path():
    found = measure.sign_changes(RULES["sgd"], np.array([0.5, 1.5]), lr=1.0, momentum=0.0,
                                 steps=200)
    assert found.tolist() == [0.0, 1.0]


def test_a_run_that_blows_up_reaches_no_accuracy():
    steps = measure.steps_to(RULES["sgd"], np.ones(2), lr=2.1, momentum=0.0, accuracy=1e-6)
    assert steps == np.inf
    assert np.isnan(measure.exponent(np.array([1.0, 2.0]), np.array([1.0, steps])))
