"""What a row hands over: checks, figures and words."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 5) -> str:
    """Return a number as a reader writes it: 1.3·10⁻⁶ and not 1.3e-06."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    mantissa, e, power = f"{value:.{digits}g}".partition("e")
    if e:
        mantissa += f"·10{str(int(power)).translate(_SUPERSCRIPT)}"
    return mantissa.replace("-", "−")


@dataclass(frozen=True)
class Check:
    """One claim: a measured number beside the one that theory gives.

    Attributes
    ----------
    group : str
        The table that it stands in.
    claim : str
        What is claimed, in HTML.
    measured, theory : float
        The two numbers; with `at_most`, theory is the bound.
    tolerance : float
        Largest difference allowed, in the numbers' unit.
    stated : str
        The tolerance as a reader states it.
    at_most : bool
        The claim is ``measured <= theory + tolerance``.
    rests_on_momentum : bool
        A rule with a wrong ρ must make it fail; the tests hold every such check to that.
    """

    group: str
    claim: str
    measured: float
    theory: float
    tolerance: float
    stated: str
    at_most: bool = False
    rests_on_momentum: bool = False

    @property
    def deviation(self) -> float:
        """Measured minus theory, as a share of theory where that is not zero."""
        difference = self.measured - self.theory
        return difference / abs(self.theory) if self.theory else difference

    @property
    def holds(self) -> bool:
        """Whether the claim is true; NaN is not."""
        difference = self.measured - self.theory
        if not self.at_most:
            difference = abs(difference)
        return bool(difference <= self.tolerance)


def relative(group: str, claim: str, measured: float, theory: float, share: float,
             *, rests_on_momentum: bool = False) -> Check:
    """Claim agreement to a share of the theoretical value."""
    return Check(group, claim, float(measured), float(theory), share * abs(float(theory)),
                 f"{100 * share:g} %", rests_on_momentum=rests_on_momentum)


def absolute(group: str, claim: str, measured: float, theory: float, tolerance: float,
             *, rests_on_momentum: bool = False) -> Check:
    """Claim agreement to a fixed difference."""
    return Check(group, claim, float(measured), float(theory), tolerance, f"±{number(tolerance)}",
                 rests_on_momentum=rests_on_momentum)


def within_errors(group: str, claim: str, measured: float, theory: float, error: float,
                  *, errors: float = 3.0, rests_on_momentum: bool = False) -> Check:
    """Claim agreement to a number of standard errors of the measurement."""
    allowed = errors * float(error)
    return Check(group, claim, float(measured), float(theory), allowed,
                 f"{errors:g} s.e. = {number(allowed, 2)}", rests_on_momentum=rests_on_momentum)


def at_most(group: str, claim: str, measured: float, bound: float,
            *, rests_on_momentum: bool = False) -> Check:
    """Claim a bound."""
    return Check(group, claim, float(measured), float(bound), 0.0, "at most",
                 at_most=True, rests_on_momentum=rests_on_momentum)


@dataclass(frozen=True)
class Picture:
    """A figure with the words that stand under it, and those that stand in for it.

    With `animated` there is a GIF of the same name.
    """

    name: str
    figure: Figure
    caption: str
    alt: str
    animated: bool = False


@dataclass(frozen=True)
class Story:
    """A row in words: HTML throughout.

    Attributes
    ----------
    lecture : str
        What the lecture says.
    paragraphs : tuple of str
        The story, with the measured numbers in it.
    but : str
        Where the claim does not hold, or not as it stands; measured as well.
    glance : tuple of (says, measured, theory)
        Its lines in the table at the top, and in the documentation. Plain text.
    """

    anchor: str
    title: str
    lecture: str
    paragraphs: tuple[str, ...]
    but: str
    glance: tuple[tuple[str, str, str], ...]
