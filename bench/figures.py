"""What a row gives, what is hoped of it, and what several rounds of it come to."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a figure of the gateway's, or on its ratio to sshd's in the same round."""

    bound: float
    at_least: bool = False
    of_sshd: bool = False

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{sign} {self.bound:g}{' of sshd' if self.of_sshd else ''}"

    def reached(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a row."""

    name: str
    unit: str
    target: Target | None = None


@dataclass(slots=True)
class Measurement:
    """What one row gave on one road in one round."""

    values: dict[str, float] = field(default_factory=dict)
    """By the figure's name."""
    cpu: dict[str, float] = field(default_factory=dict)
    """CPU seconds per GB, by the process's role."""
    memory: dict[int, dict[str, float]] = field(default_factory=dict)
    """MB by the process's role, by the number of idle shells."""


Results = dict[tuple[str, str], dict[int, Measurement]]
"""(row, road) -> round -> measurement. A round that failed is not there."""


def median(results: Results, row: str, road: str, figure: str) -> float | None:
    """The median over the rounds."""
    rounds = results.get((row, road), {}).values()
    values = [it.values[figure] for it in rounds if figure in it.values]
    return statistics.median(values) if values else None


def ratio(results: Results, row: str, road: str, figure: str) -> float | None:
    """The median of each round's ratio to sshd: what disturbs a round disturbs both."""
    ours, theirs = results.get((row, road), {}), results.get((row, "sshd"), {})
    ratios = [
        ours[number].values[figure] / theirs[number].values[figure]
        for number in ours.keys() & theirs.keys()
        if figure in ours[number].values and theirs[number].values.get(figure)
    ]
    return statistics.median(ratios) if ratios else None


def cpu(results: Results, row: str, road: str) -> dict[str, float]:
    """Medians of CPU seconds per GB, by role."""
    rounds = list(results.get((row, road), {}).values())
    roles = dict.fromkeys(role for it in rounds for role in it.cpu)
    return {role: statistics.median(it.cpu[role] for it in rounds if role in it.cpu)
            for role in roles}
