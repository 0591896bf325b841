"""How figures are written in Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header, with its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def setting(environment: Mapping[str, Any]) -> str:
    """On what a result was found: device, versions, commit."""
    # The first digits of the hash, and "-dirty" where that is said.
    commit = re.sub("(?<=^.{12})[0-9a-f]+", "", environment["commit"] or "unknown")
    return f"{machine(environment)}, commit {commit}"


def machine(environment: Mapping[str, Any]) -> str:
    """The device and the versions."""
    names = ("jax", "jaxlib", "optax", "jaxga")
    versions = ", ".join(f"{name} {environment[name]}" for name in names)
    cores = environment["cpu_count"] if environment["backend"] == "cpu" else None
    return (
        f"**{environment['device_kind']}**{f' ({cores} cores)' if cores else ''}: "
        f"Python {environment['python']}, {versions}"
    )


def error(value: float | None) -> str:
    """A relative error, to one digit."""
    return "" if value is None else f"{value:.0e}" if value else "0"


def spread(ratio: Mapping[str, float]) -> str:
    """The least and the greatest of paired ratios."""
    return f"{ratio['min']:.3f} to {ratio['max']:.3f}"


def join(*parts: str | Iterable[str]) -> str:
    """Paragraphs and tables, with an empty line between them."""
    flat = [[part] if isinstance(part, str) else part for part in parts]
    return "\n\n".join(part for each in flat for part in each)
