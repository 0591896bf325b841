"""What an audit hands back."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LeafError:
    """How far one leaf is from the truth.

    Attributes:
        path: where it stands, as `params['w']`.
        difference: norm of the difference from the truth.
        norm: norm of the truth.
        allowed: the largest difference that passes.
    """

    path: str
    difference: float
    norm: float
    allowed: float

    @property
    def error(self) -> float:
        """The difference over the norm; infinite beside a zero."""
        if self.norm:
            return self.difference / self.norm
        return float("inf") if self.difference else 0.0

    @property
    def excess(self) -> float:
        """The difference over what is allowed: more than 1 fails, and NaN does."""
        return self.difference / self.allowed if self.allowed else float("inf")

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.allowed)

    @property
    def words(self) -> str:
        """The leaf, and how far out it is."""
        if self.error < 1e6:
            return f"{self.path}, off by {self.error:.2g} of its norm"
        return f"{self.path}, off by {self.difference:.2g}, its norm is {self.norm:.2g}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One comparison with the truth: one line of the table.

    Attributes:
        name: what was compared.
        accum_steps: micro-batches; 0 if that is the trainer's own business.
        num_devices: devices; 0 likewise.
        precision: what it was computed in.
        error: norm of the whole gradient's difference over the norm of the truth.
        leaves: the error of each leaf, of the gradient and of the model state, and of
            the whole gradient along what faults are made of.
        passed: whether every leaf is within what is allowed.
    """

    name: str
    accum_steps: int
    num_devices: int
    precision: str
    error: float
    leaves: tuple[LeafError, ...]

    @property
    def passed(self) -> bool:
        return bool(self.leaves) and all(leaf.passed for leaf in self.leaves)

    @property
    def worst(self) -> LeafError | None:
        """The leaf that is furthest out, relative to what it is allowed."""
        bad = [leaf for leaf in self.leaves if not np.isfinite(leaf.difference)]
        if bad:
            return bad[0]
        # Of a leaf that is nothing but rounding the relative error says nothing.
        kept = [leaf for leaf in self.leaves if leaf.allowed < leaf.norm]
        kept = [*kept, *(leaf for leaf in self.leaves if not leaf.passed)]
        return max(kept or self.leaves, key=lambda leaf: leaf.excess, default=None)


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why the accumulated gradient differs, or why nothing was proved.

    Attributes:
        kind: one of `refused`, `nothing`, `nan`, `unchanged`, `coupling`,
            `randomness`, `position`, `weight`, `mean`, `factor`, `denominator`,
            `means`, `missing`, `devices`, `model_state`, `penalty`, `precision`,
            `unknown`.
        where: the layer, term or parameter that it is about.
        text: it in plain words, with the numbers.
        size: the number that it is about: a relative error, or a factor.
    """

    kind: str
    where: str
    text: str
    size: float


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """What `jaxga.audit` found. Prints as a table.

    Attributes:
        passed: whether everything agreed, and there was something to agree on.
        entries: the comparisons, one per line.
        causes: why it failed; empty if it passed.
        notes: what was not examined, and why.
        truth: a line about what everything was compared with.
    """

    entries: tuple[Entry, ...]
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]
    truth: str

    @property
    def passed(self) -> bool:
        is_proof = bool(self.entries) and all(entry.passed for entry in self.entries)
        return is_proof and not self.causes

    def __str__(self):
        lines = [f"jaxga.audit: {'passed' if self.passed else 'FAILED'}"]
        lines += [f"truth: {self.truth}"] if self.truth else []
        lines += _table(self.entries)
        lines += [f"cause ({one.kind}, {one.where}): {one.text}" for one in self.causes]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def _table(entries):
    if not entries:
        return []
    rows = [("", "micro-batches", "devices", "in", "error", "", "furthest leaf")]
    for one in entries:
        worst = one.worst
        words = f"{worst.path} {_short(worst.error)} of its norm" if worst else ""
        rows.append(
            (
                one.name,
                str(one.accum_steps or ""),
                str(one.num_devices or ""),
                one.precision,
                _short(one.error),
                "" if one.passed else "FAILED",
                words,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    kept = [i for i, width in enumerate(widths) if width]
    return ["  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows]


def _short(number):
    return f"{number:.1e}"
