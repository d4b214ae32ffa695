"""The page: one HTML file beside its images, without scripts, for a phone first."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from lecture.claims import Check, Picture, Story, number

FOLD_ABOVE = 8   # longer tables are folded behind a line that sums them up

_STYLE = """
:root { --ink: #1c1c1c; --soft: #5b5b5b; --rule: #dedede; --blue: #0072B2; --green: #00694d;
        --warn: #8f3f00; --paper: #fff; color-scheme: light; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 70rem; padding: 1.2rem 1rem 4rem; color: var(--ink);
       background: var(--paper);
       font: 1.0625rem/1.6 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; margin: .8rem 0 .6rem;
     letter-spacing: -.015em; text-wrap: balance; }
h2 { font-size: clamp(1.3rem, 4vw, 1.75rem); line-height: 1.25; margin: 0 0 .8rem;
     letter-spacing: -.01em; text-wrap: balance; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p, blockquote, .but { max-width: 44rem; }
a { color: var(--blue); }
code { font-size: .92em; background: #f3f3f3; padding: .1em .3em; border-radius: 3px; }
nav ol { padding-left: 1.3rem; margin: .6rem 0 1.2rem; }
nav li { padding: .12rem 0; }
section { margin-top: 3.2rem; padding-top: 1.8rem; border-top: 2px solid var(--ink); }
blockquote { margin: 0 0 1rem; padding: .1rem 0 .1rem 1rem; border-left: 4px solid var(--blue);
             color: var(--soft); font-style: italic; }
blockquote b { font-style: normal; color: var(--ink); }
.but { margin: 1rem 0; padding: .7rem 1rem; background: #fff6ee; border-left: 4px solid #D55E00; }
.but b { color: var(--warn); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr));
           gap: 1.6rem 2rem; margin: 1.6rem 0; align-items: start; }
figure { margin: 0; }
figure.hero { max-width: 34rem; margin: 1rem 0; }
@media (min-width: 62rem) {
  header { display: grid; grid-template-columns: minmax(0, 1fr) 30rem; column-gap: 2.5rem;
           align-items: start; }
  header h1 { grid-column: 1 / -1; }
  figure.hero { grid-column: 2; grid-row: 2; margin: 0; }
  header div { grid-column: 1; grid-row: 2; }
}
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .93rem; line-height: 1.5; color: var(--soft); padding: .4rem .2rem 0; }
figcaption a { white-space: nowrap; }
.scroll { overflow-x: auto; max-width: 52rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.35;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .5rem; border-bottom: 1px solid var(--rule);
         vertical-align: top; }
th { font-weight: 600; color: var(--soft); border-bottom: 1px solid #999; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.yes { color: var(--green); } td.no { color: #b00020; font-weight: 700; }
table.words th, table.words td { text-align: left; }
td.number { white-space: nowrap; }
details { margin: 1rem 0; } summary { cursor: pointer; padding: .3rem 0; }
.verdict { font-size: 1.15rem; }
@media (max-width: 34rem) {
  body { font-size: 1rem; }
  th, td { padding: .35rem .3rem; } table { font-size: .82rem; }
  th.tolerance, td.tolerance { display: none; }
  table.words, table.words tbody, table.words tr, table.words td { display: block; }
  table.words thead { display: none; }
  table.words td { border: 0; padding: .05rem 0; }
  table.words tr { padding: .55rem 0; border-bottom: 1px solid var(--rule); }
  table.words td:first-child { font-weight: 600; }
  table.words td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); }
}
@media print { details:not([open]) > *:not(summary) { display: block; } }
"""

def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of HTML cells; a words table stacks its cells on a phone."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(
            f'<td data-label="{escape(name)}">{cell}</td>' if kind and i else f"<td>{cell}</td>"
            for i, (name, cell) in enumerate(zip(head, row, strict=True))
        ) + "</tr>"
        for row in rows
    )
    return (f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def _check_row(check: Check) -> str:
    verdict = '<td class="yes">✓</td>' if check.holds else '<td class="no">✗</td>'
    exact = check.at_most and check.theory < 1e-6   # a difference, not a quantity
    measured = number(check.measured, 2 if exact else 5)
    return (f'<tr><td>{check.claim}</td><td class="number">{measured}</td>'
            f'<td class="number">{"≤ " if check.at_most else ""}{number(check.theory)}</td>'
            f'<td class="number tolerance">{check.stated}</td>{verdict}</tr>')


def _check_table(group: str, checks: Sequence[Check]) -> str:
    head = ('<tr><th>Claim</th><th>Measured</th><th>Theory</th>'
            '<th class="tolerance">Tolerance</th><th></th></tr>')
    body = "".join(map(_check_row, checks))
    content = (f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody>'
               "</table></div>")
    if len(checks) <= FOLD_ABOVE:
        return f"<h3>{group}</h3>{content}"
    failing = sum(not check.holds for check in checks)
    worst = max(abs(check.deviation) for check in checks)
    verdict = f"{failing} fail" if failing else "all hold"
    return (f"<details{' open' if failing else ''}><summary><strong>{group}</strong>: "
            f"{len(checks)} claims, {verdict}; the largest deviation is {number(100 * worst, 2)} %"
            f"</summary>{content}</details>")


def _unbroken(text: str) -> str:
    """Keep a number and its unit, a letter and its value, on one line."""
    for apart in (" %", "ρ = ", "α = ", "κ = "):
        text = text.replace(apart, apart.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def _image(picture: Picture, file: str, more: str = "") -> str:
    width, height = (round(100 * side) for side in picture.figure.get_size_inches())
    return (f'<img src="{file}" width="{width}" height="{height}" '
            f'alt="{escape(picture.alt + more)}">')


def animation(picture: Picture) -> str:
    """Return the animation of a picture, or the still one for those who ask for less motion."""
    moving = _image(picture, f"{picture.name}.gif", " Animated, one step a frame.")
    return (f'<picture><source media="(prefers-reduced-motion: reduce)" '
            f'srcset="{picture.name}.svg">{moving}</picture>')


def _figure(picture: Picture) -> str:
    endings = ["svg", "png"] + ["gif"] * picture.animated
    files = " ".join(f'<a href="{picture.name}.{e}">{e.upper()}</a>' for e in endings)
    return (f'<figure>{_image(picture, f"{picture.name}.svg")}'
            f"<figcaption>{picture.caption} {files}</figcaption></figure>")


def section(story: Story, pictures: Sequence[Picture], checks: Sequence[Check],
            extra: str = "") -> str:
    """Return a row: the lecture's words, ours, the figures, the numbers."""
    paragraphs = "".join(f"<p>{p}</p>" for p in story.paragraphs)
    but = f'<p class="but"><b>But.</b> {story.but}</p>' if story.but else ""
    figures = "".join(map(_figure, pictures))
    tables = "".join(_check_table(group, list(members))
                     for group, members in groupby(checks, key=lambda c: c.group))
    return _unbroken(
        f'<section id="{story.anchor}"><h2>{story.title}</h2>'
        f"<blockquote><b>The lecture:</b> {story.lecture}</blockquote>{paragraphs}{but}"
        f'<div class="figures">{figures}</div>{tables}{extra}</section>'
    )


def page(stories: Sequence[Story], sections: Sequence[str], checks: Sequence[Check],
         *, hero: str, version: str) -> str:
    """Return the whole page."""
    holding = sum(check.holds for check in checks)
    contents = "".join(f'<li><a href="#{s.anchor}">{s.title}</a></li>' for s in stories)
    glance = table(
        ("The lecture says", "Measured", "Theory"),
        [tuple(map(escape, line)) for s in stories for line in s.glance], "words",
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="CS231n 2017, lecture 7, reproduced with optcore and checked \
against theory.">
<title>Why momentum, why Nesterov, why Adam: the lecture, reproduced and proven</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>Why momentum, why Nesterov, why Adam</h1>
<figure class="hero">{hero}<figcaption>Row 6, step by step.</figcaption></figure>
<div>
<p>CS231n 2017, lecture 7, “Fancier optimization”, motivates momentum with three troubles of plain
SGD and two pictures, and goes on to AdaGrad, RMSProp and Adam. Here is all of it, run on optcore
{escape(version)} and checked against theory. Every update in every figure is a call of the engine,
in float64 except for the network and the half types; every number on this page was computed when
the page was built.</p>
<p class="verdict"><strong>{holding} of {len(checks)} claims hold</strong>, each within the
tolerance that stands beside it.</p>
<p>SGD is <strong>black</strong>, momentum <strong style="color:#0072B2">blue</strong>, Nesterov
<strong style="color:#00694d">green</strong>, as in the lecture. An orange box says where a claim
needs a “but”.</p>
<nav aria-label="Contents"><ol>{contents}<li><a href="#glance">At a glance</a></li></ol></nav>
</div>
</header>
<main>
{"".join(sections)}
<section id="glance"><h2>At a glance</h2>
{glance}
</section>
</main>
</body>
</html>
"""
