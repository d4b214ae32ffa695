"""Each idiom of docs/numpy.md: the plain trainer and the one with optcore end in the same place.

Both, "Before" and "After", are run as the page shows them, each in a namespace of its own that
begins with the page's network and with what else the section has before them. Its verdict,
**Same bits** or **To rounding**, says how the names that follow it are compared.
"""
from __future__ import annotations

import re

import numpy as np
import pytest
from test_docs import ROOT

import optcore
from reference import same_bits

PAGE = (ROOT / "docs" / "numpy.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^##+ (.+)\n((?:(?!##).*\n?)*)", re.MULTILINE)
SNIPPET = re.compile(r"^(?:(Before|After):\n\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VERDICT = re.compile(r"^\*\*(Same bits|To rounding)\*\* in ((?:`[^`]+`(?:, )?)+)", re.MULTILINE)
SECTIONS = dict(SECTION.findall(PAGE))
NETWORK = SNIPPET.search(SECTIONS["The network of this page"])[2]
IDIOMS = [title for title, text in SECTIONS.items() if "\nAfter:\n" in text]
ROWS = re.findall(r"^\| `(.+)` \| `(.+)` \| (same|to rounding) \|$", PAGE, re.MULTILINE)


def test_the_page_is_read_in_full():
    assert len(IDIOMS) == PAGE.count("\nAfter:\n") > 12
    table = SECTIONS["Your update in optcore's arguments"]
    assert len(ROWS) == len(re.findall(r"^\|", table, re.MULTILINE)) - 2


def arrays_in(value):
    """Return the arrays of a nest in their order; a number is one, too."""
    if isinstance(value, dict):
        return [array for key in sorted(value) for array in arrays_in(value[key])]
    if isinstance(value, (list, tuple)):
        return [array for entry in value for array in arrays_in(entry)]
    return [np.asarray(value)]


def trained(code, what):
    namespace = {}
    exec(NETWORK + code, namespace)
    assert namespace["loss"] < 0.5, "it has not learned"       # all begin above 1
    return arrays_in([eval(name, namespace) for name in what])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("title", IDIOMS)
def test_idiom(title, cases):
    verdict = VERDICT.search(SECTIONS[title])
    what = re.findall("`([^`]+)`", verdict[2])
    snippets = SNIPPET.findall(SECTIONS[title][: verdict.start()])
    assert [label for label, _ in snippets if label] == ["Before", "After"]
    both, before, after = (
        "".join(code for label, code in snippets if label == one) for one in ("", "Before", "After")
    )
    assert "optcore" not in before
    assert "optcore" in after
    plain, ours = (trained(both + code, what) for code in (before, after))
    assert len(plain) == len(ours) > 0
    same = all(map(same_bits, plain, ours))
    cases(same == (verdict[1] == "Same bits"), f"{title}: it says {verdict[1]}")
    for one, other in zip(plain, ours, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("update", "arguments", "bits"), ROWS)
def test_row_of_the_table(update, arguments, bits, rng, cases):
    start = rng.standard_normal(1000, dtype=np.float32)
    plain = {"np": np, "W": start.copy(), "v": np.zeros_like(start),
             "lr": 0.1, "mu": 0.9, "reg": 0.01}
    W = start.copy()  # noqa: N806
    opt = eval(f"optcore.SGD(W, {arguments})", {**plain, "optcore": optcore, "W": W})
    for _ in range(10):
        gradient = 2 * rng.standard_normal(1000, dtype=np.float32)
        plain["dW"] = gradient.copy()
        exec(update, plain)
        opt.step(gradient)
    assert not np.array_equal(W, start)
    cases(same_bits(W, plain["W"]) == (bits == "same"), f"{update}: it says {bits}")
    np.testing.assert_allclose(W, plain["W"], rtol=1e-4, atol=1e-5)
