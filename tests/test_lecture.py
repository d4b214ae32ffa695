"""The lecture's claims, what a wrong rule does to them, and the gallery that shows them."""
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from pages import Page, broken_links, in_chromium, needs_chromium

for needed in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(needed, reason="needs the extra 'gallery'")

from lecture import (  # noqa: E402
    adaptive,
    build,
    comparison,
    conditioning,
    fewer_bytes,
    mlp,
    momentum,
    nesterov,
    network,
    noise,
    saddles,
)
from lecture.claims import absolute, at_most, number, relative, within_errors  # noqa: E402
from lecture.rules import ADAPTIVE, RULES  # noqa: E402

# The tolerances that the claims are held to, by table; a looser one is no proof.
STATED = {
    conditioning.RATES: r"1 %",
    conditioning.COUNTS: r"±0\.05",
    conditioning.EDGES: r"0\.1 %",
    conditioning.SIZE: r"3 s\.e\..*",
    saddles.ESCAPE: r"1 %",
    saddles.SHARE: r"3 s\.e\..*",
    noise.STATIONARY: r"3 s\.e\..*",
    noise.EQUAL: r"3 s\.e\..*",
    noise.DIRECTION: r"3 s\.e\..*",
    noise.BATCH: r"3 s\.e\..*|±0\.02",
    momentum.FRICTION: r"0\.1 %",
    nesterov.CYCLE: r"0\.1 %|±10⁻⁶|±1·10⁻⁶",
    adaptive.BITS: r"±0",
    adaptive.GROWTH: r"±0\.05|±1·10⁻⁹|at most",
    adaptive.END: r"0\.1 %",
    adaptive.WAY: r"0\.0001 %|±1·10⁻⁶",
    adaptive.FIRST: r"0\.0001 %|0\.1 %|±0\.5",
    fewer_bytes.VARIANCE: r"3 s\.e\..*",
    fewer_bytes.MEAN: r"3 s\.e\..*",
    fewer_bytes.STALL: r"3 s\.e\..*|±0",
    fewer_bytes.DECAY: r"3 s\.e\..*|±0",
}


@pytest.fixture(scope="module")
def page(gallery):
    return (gallery[0] / "index.html").read_text(encoding="utf-8")


def spoiled(*, momentum=1.0, lr=1.0):
    """Rules that are wrong by a factor in a hyper-parameter."""
    return {
        name: replace(rule, step=lambda x, g, v, a, rho, step=rule.step: step(
            x, g, v, a * lr, rho * momentum))
        for name, rule in RULES.items()
    }


def spoiled_adaptive(change):
    """Adaptive rules whose constants are changed on the way to the engine."""
    return {
        name: replace(rule, step=lambda x, g, states, t, c, step=rule.step: step(
            x, g, states, t, replace(c, **change(c))))
        for name, rule in ADAPTIVE.items()
    }


def test_every_claim_holds(gallery):
    failing = [(c.group, c.claim, c.measured, c.theory) for c in gallery[2] if not c.holds]
    assert not failing


def test_claims_are_held_to_the_tolerances_stated(gallery):
    for group, stated in STATED.items():
        mine = [c for c in gallery[2] if c.group == group]
        assert mine, group
        for check in mine:
            assert re.fullmatch(stated, check.stated), check


def test_contraction_covers_the_condition_numbers(gallery):
    claims = [c.claim for c in gallery[2] if c.group == conditioning.RATES]
    for rule in RULES.values():
        for power in "¹²³⁴⁵⁶":
            mine = [c for c in claims if c.startswith(f"{rule.label}, κ = 10{power},")]
            assert any("textbook" in c for c in mine)
            assert any("α = 0.1" in c for c in mine)


@pytest.mark.parametrize("row", build.ROWS, ids=lambda row: row.__name__.rpartition(".")[2])
def test_a_wrong_momentum_is_found_out(row):
    """ρ off by 1 %: every claim that rests on ρ must fail."""
    claims = [c for c in row.checks(row.measured(spoiled(momentum=0.99))) if c.rests_on_momentum]
    assert claims
    assert not [(c.group, c.claim, c.measured, c.theory) for c in claims if c.holds]


@pytest.mark.parametrize(("row", "groups"), [
    (conditioning, (conditioning.RATES, conditioning.EDGES)), (saddles, (saddles.ESCAPE,)),
], ids=["conditioning", "saddles"])
def test_a_wrong_learning_rate_is_found_out(row, groups):
    """α off by 2 %: what SGD's claims rest on."""
    claims = [c for c in row.checks(row.measured(spoiled(lr=1.02)))
              if c.group in groups and c.claim.startswith("SGD")]
    assert claims
    assert not [(c.group, c.claim, c.measured, c.theory) for c in claims if c.holds]


# The claims that rest on a constant of the adaptive rules. With its correction Adam's steps under a
# constant gradient rest on no β: that is what it is for.
RESTS_ON = {
    "lr": {adaptive.STEP: ".*", adaptive.WAY: ".*distance.*", adaptive.END: "Distance.*",
           adaptive.FIRST: ".*over α.*", adaptive.LINES: "(AdaGrad|RMSProp|Adam):.*"},
    "decay": {adaptive.STEP: "RMSProp.*", adaptive.WAY: "RMSProp.*", adaptive.END: "Rate.*",
              adaptive.LINES: "RMSProp:.*"},
    "beta1": {adaptive.STEP: "Adam without.*", adaptive.FIRST: ".*", adaptive.LINES: "Adam:.*"},
    "beta2": {adaptive.STEP: "Adam without.*", adaptive.FIRST: ".*", adaptive.LINES: "Adam:.*"},
    "eps": {adaptive.STEP: ".*", adaptive.LINES: "(AdaGrad|RMSProp|Adam):.*"},
}


@pytest.fixture
def adaptive_claims(monkeypatch):
    """The claims of rules whose constants are changed, without the longest of the runs."""
    monkeypatch.setattr(adaptive, "FEWER", adaptive.FEWER[:3])
    monkeypatch.setattr(adaptive, "STEPS", 2000)

    def claims(change):
        return adaptive.checks(adaptive.measured(adaptive=spoiled_adaptive(change)))

    return claims


def test_the_shorter_runs_hold_as_well(adaptive_claims):
    assert all(c.holds for c in adaptive_claims(lambda c: {}))


@pytest.mark.parametrize("constant", RESTS_ON)
def test_a_wrong_adaptive_constant_is_found_out(adaptive_claims, constant):
    """Off by 1 %: the claims that rest on it fail, and they alone. How steps grow rests on none."""
    claims = [c for c in adaptive_claims(lambda c: {constant: 0.99 * getattr(c, constant)})
              if c.group != adaptive.GROWTH]
    resting = [(c.group, c.claim) for c in claims
               if re.fullmatch(RESTS_ON[constant].get(c.group, ""), c.claim)]
    assert {group for group, _ in resting} == {*RESTS_ON[constant]}
    assert [(c.group, c.claim) for c in claims if not c.holds] == resting


def test_steps_that_depend_on_the_scale_are_found_out(adaptive_claims):
    claims = [c for c in adaptive_claims(lambda c: {"eps": c.eps or 1e-5})
              if c.group == adaptive.BITS or "along the axes: exponent" in c.claim]
    assert [c.claim for c in claims if c.holds] == ["SGD, along the axes: exponent of κ"]
    assert len(claims) == 2 * len(ADAPTIVE) + 1


def test_a_missing_correction_is_found_out(adaptive_claims):
    failing = [c.claim for c in adaptive_claims(lambda c: {"corrected": False})
               if c.group in (adaptive.STEP, adaptive.LINES) and not c.holds]
    assert failing == ["Adam, α/(1 + ε/|g|): relative difference",
                       f"Adam: largest difference in {comparison.STEPS} steps"]


def test_a_wrong_rounding_is_found_out():
    """To the nearest: what rests on stochastic rounding, and moves by less than a unit, fails."""
    claims = [c for c in fewer_bytes.noise_checks(fewer_bytes.noise_measured("nearest"))
              if "stochastic" in c.claim
              or (c.group == fewer_bytes.VARIANCE and "α = 0.003" in c.claim)]
    assert sorted(c.claim for c in claims if c.holds) == [
        "bfloat16, split master, α = 0.003", "float32, α = 0.003"]
    assert len(claims) == len(fewer_bytes.KEPT) + len(fewer_bytes.STALLS) + len(fewer_bytes.DECAYED)


@pytest.mark.parametrize("of", ["loss", "accuracy"])
def test_every_recommended_storage_is_held_to_float32(gallery, of):
    claims = [c.claim for c in gallery[2] if c.group == fewer_bytes.BAND]
    for mode in fewer_bytes.MODES.values():
        expected = mode.recommended and mode.label != "float32"
        assert (f"{mode.label}: mean {of}, α = {fewer_bytes.USUAL}" in claims) is expected


def test_networks_of_several_seeds_are_those_of_each():
    images, labels = (part[:60].reshape(3, 20, *part.shape[1:]) for part in mlp.digits())
    several = mlp.Network(range(3), hidden=7)
    several.backward(images, labels)
    for seed in range(3):
        one = mlp.Network(seed, hidden=7)
        one.backward(images[seed], labels[seed])
        for name, grad in one.grads.items():
            assert several.grads[name][seed] == pytest.approx(grad, rel=1e-5, abs=1e-7)
        for of in ("loss", "accuracy"):
            assert getattr(several, of)(images, labels)[seed] == pytest.approx(
                getattr(one, of)(images[seed], labels[seed]))


@pytest.mark.parametrize(("check", "holds"), [
    (relative("", "", 1.009, 1.0, 0.01), True),
    (relative("", "", -0.989, -1.0, 0.01), False),
    (relative("", "", math.nan, 1.0, 0.01), False),
    (absolute("", "", 0.0, 0.0, 0.0), True),
    (absolute("", "", -2.0, 0.0, 1.0), False),
    (within_errors("", "", 1.29, 1.0, 0.1), True),
    (within_errors("", "", 0.69, 1.0, 0.1), False),
    (at_most("", "", 1.0, 1.0), True),
    (at_most("", "", -5.0, 1.0), True),
    (at_most("", "", 1.1, 1.0), False),
    (at_most("", "", math.nan, 1.0), False),
])
def test_checks_decide(check, holds):
    assert check.holds is holds


@pytest.mark.parametrize(("value", "text"), [
    (0.25, "0.25"), (-1.5, "−1.5"), (1.3e-6, "1.3·10⁻⁶"), (2e12, "2·10¹²"), (math.inf, "∞"),
    (math.nan, "not a number"),
])
def test_numbers_read_well(value, text):
    assert number(value) == text


def test_minibatches_cover_an_epoch_without_repeating():
    batches = list(network.batches(seed=0, examples=5 * network.BATCH, steps=10))
    for epoch in (batches[:5], batches[5:]):
        assert sorted(np.concatenate(epoch)) == list(range(5 * network.BATCH))
    assert not np.array_equal(batches[0], batches[5])


def test_the_networks_gradient_is_that_of_its_loss():
    images, labels = (part[:20] for part in mlp.digits("float64"))
    net = mlp.Network(seed=1, hidden=7, dtype="float64")
    net.backward(images, labels)
    rng = np.random.default_rng(0)
    for name, param in net.params.items():
        direction = rng.standard_normal(param.shape)
        expected = np.sum(net.grads[name] * direction)
        param += 1e-6 * direction
        above = net.loss(images, labels)
        param -= 2e-6 * direction
        slope = (above - net.loss(images, labels)) / 2e-6
        param += 1e-6 * direction
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_the_page_is_whole_and_stands_alone(gallery, page):
    out, stories, _ = gallery
    found = Page(page)
    assert len(found.images) >= 30
    assert all(len(image["alt"]) > 40 for image in found.images)
    assert "script" not in found.tags
    assert not broken_links(out / "index.html")
    assert not [link for link in found.links if "/" in link and not link.startswith("data:")]
    for row in range(1, 8):
        assert f'id="row-{row}"' in page
        for kind in ("svg", "png"):
            assert list(out.glob(f"row{row}-*.{kind}"))
    assert 'id="fewer-bytes"' in page
    assert (out / "row6-race.gif").read_bytes().startswith(b"GIF89a")
    assert all(story.lecture and story.paragraphs and story.glance for story in stories)
    assert not re.search(r"\bnan\b|not a number|\{|</?td>None", page.partition("</style>")[2])


def test_the_numbers_are_written_beside_the_page(gallery):
    out, _, checks = gallery
    results = json.loads((out / "numbers.json").read_text(encoding="utf-8"))
    assert len(results) == len(checks)
    assert all(result["holds"] for result in results)


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_with_no_image_missing(gallery, page, tmp_path, width):
    """The page in a frame as wide as a phone or a desktop: images drawn, nothing sticks out."""
    probe = """<script>addEventListener("load", () => {
        const images = [...document.images];
        const broken = images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src);
        const wide = document.documentElement.scrollWidth;
        document.body.innerHTML = `<p id="probe">images ${images.length} broken ${broken.length} `
            + `width ${wide} ${broken}</p>`;
        parent.postMessage(document.getElementById("probe").textContent, "*"); })</script>"""
    out = gallery[0]
    probed = out / f"probe-{width}.html"
    probed.write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    frame = out / f"frame-{width}.html"
    frame.write_text(
        f'<script>onmessage = e => document.title = e.data</script><iframe src="{probed.name}" '
        f'style="width:{width}px;height:800px;border:0"></iframe>', encoding="utf-8")
    result = in_chromium(frame.as_uri(), tmp_path)
    report = re.search(r"images (\d+) broken (\d+) width (\d+)(.*)</title>", result)
    assert report, result[-500:]
    assert int(report[1]) >= 30
    assert int(report[2]) == 0, report[4]
    assert int(report[3]) <= width


def test_the_documentation_has_the_same_table(gallery):
    """Claims and theory word for word; measured numbers may differ in their last digits."""
    documented = build.DOCS.read_text(encoding="utf-8").partition(build.BEGIN)[2]
    rows = [line.strip("| ").split(" | ") for line in documented.partition(build.END)[0].split("\n")
            if line.startswith("|")][2:]
    expected = [line for story in gallery[1] for line in story.glance]
    assert [(row[0], row[2]) for row in rows] == [(line[0], line[2]) for line in expected]


def test_the_command_fails_where_a_claim_does(monkeypatch, tmp_path, capsys):
    failing = relative("Group", "a claim", 2.0, 1.0, 0.01)
    monkeypatch.setattr(build, "build", lambda *_, **__: ([], [failing]))
    monkeypatch.setattr("sys.argv", ["build.py", "--out", str(tmp_path)])
    assert build.main() == 1
    assert "a claim: measured 2, theory 1 (1 %)" in capsys.readouterr().out
