"""The tables, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import figures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.figures import Figure, Results
    from bench.rows import Row

_RATIO = "/sshd"


def render(results: Results, rows: Sequence[Row], roads: Sequence[str]) -> str:
    """All of it."""
    parts = [_figures(results, rows, roads), _cpu(results, rows, roads)]
    parts.append(_memory(results, rows, roads))
    return "\n\n".join(part for part in parts if part)


def _figures(results: Results, rows: Sequence[Row], roads: Sequence[str]) -> str:
    head = ["", ""]
    for road in roads:
        head.append(road)
        if road != "sshd" and "sshd" in roads:
            head.append(_RATIO)
    table = [[*head, "target of gateway", ""]]
    for row in rows:
        for place, figure in enumerate(row.figures):
            cells = ["" if place else row.title, f"{figure.name} {figure.unit}".strip()]
            if figure.name == figure.unit:
                cells[1] = figure.unit
            for road in roads:
                cells.append(number(figures.median(results, row.name, road, figure.name)))
                if road != "sshd" and "sshd" in roads:
                    cells.append(number(figures.ratio(results, row.name, road, figure.name)))
            target = "" if figure.target is None else str(figure.target)
            table.append([*cells, target, _mark(results, row.name, figure)])
    return aligned(table, left=2)


def _mark(results: Results, row: str, figure: Figure) -> str:
    if figure.target is None:
        return ""
    compare = figures.ratio if figure.target.of_sshd else figures.median
    value = compare(results, row, "gateway", figure.name)
    if value is None:
        return "not measured"
    return "reached" if figure.target.reached(value) else "NOT REACHED"


def _cpu(results: Results, rows: Sequence[Row], roads: Sequence[str]) -> str:
    found = {
        (row.title, road): costs
        for row in rows
        for road in roads
        if (costs := figures.cpu(results, row.name, road))
    }
    roles = list(dict.fromkeys(role for costs in found.values() for role in costs if role != "ssh"))
    if not found:
        return ""
    roles.append("ssh")
    table = [["CPU seconds per GB", "", *roles]]
    for (title, road), costs in found.items():
        table.append([title, road, *(number(costs.get(role)) for role in roles)])
    return aligned(table, left=2)


def _memory(results: Results, rows: Sequence[Row], roads: Sequence[str]) -> str:
    found = {
        (road, shells): roles
        for row in rows
        for road in roads
        for measured in results.get((row.name, road), {}).values()
        for shells, roles in measured.memory.items()
    }
    roles = list(dict.fromkeys(role for it in found.values() for role in it))
    if not found:
        return ""
    table = [["PSS in MB", "shells", *roles]]
    for (road, shells), costs in found.items():
        table.append([road, str(shells), *(number(costs.get(role)) for role in roles)])
    return aligned(table, left=1)


def number(value: float | None) -> str:
    """With three digits or so."""
    if value is None:
        return "-"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{value:.{digits}f}"


def aligned(table: list[list[str]], *, left: int) -> str:
    """A table with its head underlined; the first ``left`` columns are text."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
