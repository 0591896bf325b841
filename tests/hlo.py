"""Collectives of a compiled program: kind, bytes, and whether they sit in a loop."""

import math
import re
from typing import NamedTuple

KINDS = "all-reduce|reduce-scatter|all-gather|collective-permute|all-to-all"
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|"
    r"false_computation|called_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
BITS = {"pred": 8, "bf16": 16, "f16": 16}


class Collective(NamedTuple):
    kind: str
    bytes: int
    in_loop: bool


def collectives(compiled) -> list[Collective]:
    """All of them; each counted once, wherever in the program it stands."""
    computations = _computations(compiled.as_text())
    in_loop = _inside_loops(computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
            if match:
                size = sum(
                    _bytes(*s) for s in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
                )
                found.append(Collective(match[2], size, name in in_loop))
    return found


def _computations(text):
    computations, lines = {}, None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith(" "):
            lines = computations.setdefault(header[1], [])
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations


def _inside_loops(computations):
    called = {
        name: {
            callee.strip().lstrip("%")
            for line in lines
            for group in CALLED.findall(line)
            for callee in (group[0] or group[1]).split(",")
        }
        for name, lines in computations.items()
    }
    bodies = re.findall(
        r" while\(.*?body=%?([\w.\-]+)", "\n".join(sum(computations.values(), []))
    )
    inside, waiting = set(), list(bodies)
    while waiting:
        name = waiting.pop()
        if name in computations and name not in inside:
            inside.add(name)
            waiting.extend(called[name])
    return inside


def _bytes(dtype, dims):
    bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8
