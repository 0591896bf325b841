"""How a GPU's compiled program makes the gradients of weights, and what that moves.

The program is that of `weight_gradients.py`: matrices of one shape and its transpose,
which nothing else in the program has.
"""

import collections
import math
import re
from typing import Any

from jaxga._hlo import callees, is_end, read_modules, trip_count


def read(text: str, size: Any) -> dict[str, Any]:
    """How the weights' gradients are made, and what moves arrays of their shapes.

    Args:
        text: the compiled program.
        size: a `weight_gradients.Size`.

    Returns:
        `products`, how many are made in which way in one micro-batch, and
        `bytes_per_parameter`, read and written in one micro-batch.
    """
    (module,) = read_modules(text)
    reader = _Reader(module.computations, size)
    reader.visit(module.entry, 1.0)
    per_parameter = size.parameters * size.accum_steps
    return {
        "products": dict(sorted(reader.products.items())),
        "bytes_per_parameter": reader.bytes / per_parameter,
    }


class _Reader:
    """Goes through what runs, with the number of times that it does.

    Attributes:
        products: how often the weights' gradients are made how, in one micro-batch.
        bytes: of arrays of the weights' shapes, read and written in loops.
    """

    def __init__(self, computations, size):
        self.computations, self.size = computations, size
        self.products, self.bytes = collections.Counter(), 0.0

    def visit(self, name, times, in_loop=False):
        computation = self.computations[name]
        for instruction in computation.values():
            if instruction.opcode == "while":
                for role, callee in callees(instruction, self.computations):
                    if role == "body":
                        inner = times * (trip_count(instruction) or 1)
                        self.visit(callee, inner, True)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                for _, callee in callees(instruction, self.computations):
                    self.visit(callee, times, in_loop)
            elif not in_loop or instruction.opcode in _FREE:
                continue
            elif not is_end(instruction.opcode):
                self._count(instruction, computation, times)

    def _count(self, instruction, computation, times):
        names = re.findall(r"%([\w.\-]+)", instruction.operands)
        shapes = [computation[name].shape for name in names if name in computation]
        inner = [instruction, *self._inside(instruction)]
        opcodes = {each.opcode for each in inner}
        # Of a stack of layers a slice is read, or only written to, or all is.
        read = 1 if "dynamic-slice" in opcodes else None
        written = 1 if "dynamic-update-slice" in opcodes else None
        read = 0 if written and not read else read
        moved = [self._weights(shape, read) for shape in shapes]
        # What begins names its operands again, in front of its result.
        result = re.sub(r"^\(\(.*?\), ", "", instruction.shape)
        self.bytes += times * (sum(moved) + self._weights(result, written))
        if self._makes_gradient(inner):
            how = _how(inner, opcodes)
            self.products[how] += round(times / self.size.accum_steps)

    def _inside(self, instruction):
        """The instructions of what it calls, at any depth."""
        for _, callee in callees(instruction, self.computations):
            for each in self.computations[callee].values():
                yield from (each, *self._inside(each))

    def _weights(self, shape, of_stack):
        """The bytes of the weights' matrices in a shape; `of_stack`: of how many layers
        of a stack, or None for all."""
        total = 0
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
            dims = [int(d) for d in dims.split(",") if d and int(d) > 1]
            one = self.size.width * self.size.hidden
            if sorted(dims[-2:]) != sorted((self.size.width, self.size.hidden)):
                continue
            matrices = math.prod(dims) // one
            if matrices > 1 and of_stack is not None:
                matrices = of_stack
            total += _BYTES[dtype] * one * matrices
        return total

    def _makes_gradient(self, inner):
        """Whether it is a product whose result is a matrix of weights."""
        return any(
            self._weights(each.shape, None)
            for each in inner
            if each.opcode == "dot" or "__cublas" in each.attributes
        )


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "s8": 1, "u8": 1, "pred": 1}


def _how(inner, opcodes):
    for each in inner:
        if "__cublas" in each.attributes:
            beta = re.search(r'"beta":"?([\d.]+)', each.attributes)
            adds = beta is not None and float(beta[1]) == 1
            in_place = adds and "output_to_operand_aliasing" in each.attributes
            dtype = re.search(r"\w+(?=\[)", each.shape)[0]
            place = f"added {'inside' if adds else 'apart'}"
            return f"cuBLAS, {dtype}, {place}{', in place' if in_place else ''}"
    (dtype,) = {
        re.search(r"\w+(?=\[)", each.shape)[0] for each in inner if each.opcode == "dot"
    }
    # An addition in a fused product is that to the sum: there is no other.
    return f"Triton, {dtype}, added {'inside' if 'add' in opcodes else 'apart'}"
