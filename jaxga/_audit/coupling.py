"""Where examples see each other.

Two examples are changed, first one, then the other, then both. What is computed of each
example alone, and every sum over examples, then changes by the sum of the two changes.
What does not was computed from both examples together: the first such equation is where
they met.
"""

import contextlib
import dataclasses
import itertools
import linecache
import pathlib

import jax
import jax.extend.source_info_util as source_info_util
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import partial_eval

from .problem import Problem
from .widen import Widened

# Neither, the one, the other, both.
_SIGNS = np.array([1.0, -1.0, -1.0, 1.0])
_ATTEMPTS = 6
_THRESHOLD = 1e-5


@dataclasses.dataclass(frozen=True)
class Meeting:
    """The first equation that computes something from two examples together.

    Attributes:
        where: the layer, as the model's modules are named; or the line of code.
        is_division: whether it is a division outside any layer: by a weight, mostly.
        text: the place in words.
        size: how much of the change of both examples is not the sum of the two changes.
        terms: the terms of the loss that it reaches.
    """

    where: str
    is_division: bool
    text: str
    size: float
    terms: tuple[str, ...]


def find_meeting(problem: Problem, with_keys: bool = False) -> Meeting | None:
    """Where the first two examples meet, if they do before they are summed.

    Args:
        problem: the loss function.
        with_keys: whether to change the examples' own random keys too.
    """
    if problem.rows < 2:
        return None
    closed, names = _totals_only(problem)
    widened = Widened(closed, watch=_interaction)

    def run(*leaves):
        outputs = widened(*leaves)
        return (
            _interaction(outputs),
            [_interaction([x]) for x in outputs],
            [one.values for one in widened.seen],
        )

    compiled = None
    for pair in _pairs(problem):
        stacked, axes = _versions(problem, pair, with_keys)
        with jax.enable_x64(True):
            if compiled is None:
                compiled = jax.jit(
                    jax.vmap(run, in_axes=axes, out_axes=None, axis_name=_AXIS)
                )
            found = jax.tree.map(np.asarray, compiled(*stacked))
        if found[0] > _THRESHOLD:
            return _first(found, widened.seen, names)
    return None


_AXIS = "jaxga_versions"


def _first(found, seen, names):
    _, of_terms, values = found
    terms = tuple(n for n, x in zip(names, of_terms, strict=True) if x > _THRESHOLD)
    for one, value in _in_order(seen, values):
        if value.max() > _THRESHOLD:
            where, text = describe_place(one.equations)
            if value.ndim:
                iteration = int(np.argmax(value.ravel() > _THRESHOLD))
                text += f", in iteration {iteration} of its scan"
            is_division = one.equations[-1].primitive.name == "div" and not any(
                str(equation.source_info.name_stack) for equation in one.equations
            )
            return Meeting(where, is_division, text, float(value.max()), terms)
    return None


def _in_order(seen, values):
    """As they were computed: inside a scan, one iteration after the other."""

    def when(pair):
        one, value = pair
        outer = places.setdefault(id(one.equations[0]), len(places))
        return outer, int(np.argmax(value.ravel() > _THRESHOLD))

    places: dict[int, int] = {}
    return sorted(zip(seen, values, strict=True), key=when)


def _totals_only(problem):
    """The forward pass without what only metrics and the new model state need."""

    closed, (totals, others) = problem.trace(problem.forward, problem.rows)
    count = len(totals)
    wanted = [True] * count + [False] * len(jax.tree.leaves(others))
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, wanted, instantiate=True)
    return core.ClosedJaxpr(jaxpr, closed.consts), list(totals)


def _interaction(outputs):
    """How much of the change of both examples is not the sum of the two changes."""
    index = lax.axis_index(_AXIS)
    sign = jnp.asarray(_SIGNS)[index]
    parts = [jnp.zeros(())]
    for x in outputs:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or not x.size:
            continue
        eps = 1e-12 if x.dtype in (np.float64, np.complex128) else 1e-5
        x = x if jnp.iscomplexobj(x) else x.astype(jnp.float64)
        x = jnp.where(jnp.isfinite(x), x, 0)
        first = lax.psum(jnp.where(index == 0, x, 0), _AXIS)
        change = lax.psum(jnp.abs(x - first), _AXIS)
        both = jnp.abs(lax.psum(sign * x, _AXIS))
        size = lax.psum(jnp.abs(x), _AXIS).max()
        is_real = both > eps * size
        safe = jnp.where(is_real, change, 1)
        parts.append(jnp.where(is_real, both / safe, 0).max())
    return jnp.stack(parts).max()


def _pairs(problem):
    """Two rows to change, and the rows that each is to become."""
    rows = problem.rows
    partners = itertools.cycle((rows // 2 or 1, 1, rows - 1))
    pairs = (
        ((0, step), (row, row - step))
        for step, row in zip(range(1, rows), partners, strict=False)
    )
    usable = (pair for pair in pairs if all(_differ(problem, *one) for one in pair))
    return itertools.islice(usable, _ATTEMPTS)


def _differ(problem, a, b):
    leaves = [x for x in problem.take(np.array([a, b])) if isinstance(x, np.ndarray)]
    return any(not np.array_equal(x[0], x[1]) for x in leaves)


def _versions(problem, pair, with_keys):
    """The arguments with the four versions of the rows stacked, and where they are."""
    ways = []
    for changes in ((), pair[:1], pair[1:], pair):
        which, ids = np.arange(problem.rows), np.arange(problem.rows)
        for row, source in changes:
            which[row] = source
            ids[row] += problem.rows if with_keys else 0
        ways.append((problem.take(which), ids))
    rows = [jnp.stack(leaves) for leaves in zip(*[way[0] for way in ways], strict=True)]
    arguments = problem.arguments(rows, np.stack([way[1] for way in ways]))
    axes = [jax.tree.map(lambda _, i=i: 0 if i in (1, 2) else None, argument)
            for i, argument in enumerate(arguments)]  # fmt: skip
    flat = jax.tree.leaves(arguments)
    return flat, tuple(jax.tree.leaves(axes, is_leaf=lambda x: x is None))


def describe_place(equations: tuple) -> tuple[str, str]:
    """A name for the place of an equation, and the place in words."""
    stacks = [str(one.source_info.name_stack) for one in equations]
    layer = "/".join(stack for stack in stacks if stack)
    last = equations[-1]
    line, code = _user_line(equations)
    line = line or source_info_util.summarize(last.source_info)
    words = f"{last.primitive.name} at {line}" + (f" `{code}`" if code else "")
    return (layer, f"{words}, in {layer}") if layer else (line, words)


def _user_line(equations) -> tuple[str, str]:
    """The innermost line of code outside the libraries: its place, and the code."""
    for equation in reversed(equations):
        traceback = equation.source_info.traceback
        for frame in traceback.frames if traceback else ():
            if not frame.file_name.startswith(_LIBRARIES):
                name = pathlib.PurePath(frame.file_name).name
                code = linecache.getline(frame.file_name, frame.line_num).strip()
                return f"{name}:{frame.line_num}", code
    return "", ""


# Flax and Optax lie beside JAX; this library may not.
_LIBRARIES = (
    str(pathlib.Path(jax.__file__).parents[1]),
    str(pathlib.Path(contextlib.__file__).parent),
    str(pathlib.Path(__file__).parents[1]),
    "<",
)


def places_of(problem: Problem, primitives: tuple[str, ...]) -> list[str]:
    """Where in the loss function any of these primitives is used."""
    closed, _ = _totals_only(problem)
    places: list[str] = []

    def visit(jaxpr, outer):
        for equation in jaxpr.eqns:
            path = (*outer, equation)
            if equation.primitive.name in primitives:
                places.append(describe_place(path)[0])
            for inner in core.jaxprs_in_params(equation.params):
                visit(inner, path)

    visit(closed.jaxpr, ())
    return places
