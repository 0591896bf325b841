"""Devices to compile for, and what is read off a compiled step: memory, collectives."""

import re
from pathlib import Path
from typing import Any

import jaxga
from harness import memory_of
from jax.experimental import topologies


def measure(compiled: Any) -> dict[str, Any]:
    """Memory of one device, and the collectives of one update, by kind and place."""
    memory = compiled.memory_analysis()
    found = {
        f"{name}_bytes": getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp")
    }
    communication = jaxga.collectives(mark_hidden(compiled.as_text()))
    groups = {(each.kind, each.in_loop): None for each in communication}
    return found | {
        "peak_bytes": memory_of(compiled)["total_bytes"],
        "collectives": [
            _summary(communication.select(kind, in_loop=in_loop))
            for kind, in_loop in sorted(groups)
        ],
    }


def _summary(group):
    hidden = [each for each in group if each.op_name == _HIDDEN]
    return {
        "kind": group[0].kind,
        "in_loop": group[0].in_loop,
        "dtypes": sorted({dtype for each in group for dtype in each.dtypes}),
        "in_program": len(group),
        "per_update": sum(each.times for each in group),
        "bytes_per_update": group.bytes_per_call,
        "hidden_in_program": len(hidden),
        "hidden_bytes_per_update": sum(each.bytes_per_call for each in hidden),
    }


_HIDDEN = "behind a matrix product"
_KINDS = "all-[a-z-]+?|reduce-scatter|collective-[a-z-]+?"
_BEGIN = re.compile(rf"%?([\w.\-]+) = .*? (?:{_KINDS})-start\(")
_END = re.compile(rf" (?:{_KINDS})-done\(%?([\w.\-]+)")
_WORK = re.compile(
    r"%?gemm_fusion[\w.\-]* = |calls=%?[\w.\-]*gemm_fusion|"
    r'custom_call_target="__cu(?:blas|dnn)| (?:while|dot|convolution)\('
)


def mark_hidden(text: str) -> str:
    """HLO whose `op_name` says so where a collective has work to hide behind.

    That is one whose start and done have, in the schedule, a matrix product, attention
    or a loop between them. XLA writes instructions in the order of the schedule.
    """
    lines, begun = text.splitlines(), {}
    for number, line in enumerate(lines):
        if begin := _BEGIN.search(line):
            begun[begin[1]] = [number, False]
        elif end := _END.search(line):
            start, is_hidden = begun.pop(end[1])
            if is_hidden:
                bare = re.sub(r'op_name="[^"]*"', "", lines[start])
                lines[start] = f'{bare}, metadata={{op_name="{_HIDDEN}"}}'
        elif _WORK.search(line):
            begun = {name: [start, True] for name, (start, _) in begun.items()}
    return "\n".join(lines)


def devices_of(target: Path, count: int) -> list:
    """GPUs that can be compiled for, and do not exist.

    Args:
        target: XLA's description of one.
        count: how many, in one machine.
    """
    described = {"target_config": target.read_text(), "topology": f"1x1x{count}"}
    try:
        return topologies.get_topology_desc(platform="cuda", **described).devices
    except NotImplementedError as error:
        raise SystemExit(
            "--target needs JAX's CUDA wheels: pip install 'jax[cuda13]'"
        ) from error
