"""Vectors become loops over their lanes: TIR that TVM's generator of C takes, which knows no vector types.

A C compiler makes vectors of such loops again, for whatever machine it is told of.
"""

import struct
from typing import Any

from tvm import tirx
from tvm.ir.expr import Call, TensorLoad
from tvm.tirx import (
    AllocBuffer,
    BufferStore,
    DeclBuffer,
    Evaluate,
    For,
    ForKind,
    IfThenElse,
    PrimFunc,
    SeqStmt,
)

Node = Any
"""A TIR expression or statement."""

_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max,
    tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
    tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor, tirx.LShift, tirx.RShift,
)  # fmt: skip


def scalarise(function: PrimFunc) -> PrimFunc:
    """The same function without vectors, its local buffers on the C function's stack.

    Raises:
        TypeError: it holds a kind of node that the kernels' TIR does not use.
    """
    return PrimFunc(function.params, _Scalariser().statement(function.body), function.ret_type, function.attrs)


def _lanes(expression: Node) -> int:
    text = str(expression.ty.dtype)
    return int(text.rpartition("x")[2]) if "x" in text else 1


def _element(expression: Node) -> str:
    return str(expression.ty.dtype).partition("x")[0]


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _called(name: str, element: str, arguments: list[Node]) -> Node:
    """An intrinsic as C has it."""
    functions = {
        "tirx.fabs": "__builtin_fabsf",
        "tirx.nearbyint": "hikui_nearest",
        "tirx.sqrt": "__builtin_sqrtf",
        "tirx.reinterpret": f"hikui_{element}_bits",
    }
    if name not in functions:
        raise TypeError(f"TIR's {name} cannot be written for the C generator.")
    return tirx.call_pure_extern(element, functions[name], *arguments)


class _Scalariser:
    def __init__(self) -> None:
        self._buffers: dict[Node, Node] = {}
        self._loops = 0

    def statement(self, node: Node) -> Node:
        match node:
            case SeqStmt():
                return SeqStmt([self.statement(child) for child in node.seq])
            case AllocBuffer():
                return AllocBuffer(self._again(node.buffer, node.buffer.shape))
            case DeclBuffer():
                # A size says nothing here, and may be made of values that are rewritten themselves.
                return DeclBuffer(self._again(node.buffer, (1,)), data=node.data)
            case For():
                return For(
                    node.loop_var,
                    self.value(node.min),
                    self.value(node.extent),
                    node.kind,
                    self.statement(node.body),
                )
            case IfThenElse():
                otherwise = None if node.else_case is None else self.statement(node.else_case)
                return IfThenElse(self.value(node.condition), self.statement(node.then_case), otherwise)
            case Evaluate():
                # Only prefetches are evaluated for their effect, and a C compiler has no use for LLVM's.
                return Evaluate(tirx.const(0, "int32"))
            case BufferStore():
                return self._store(node)
        raise TypeError(f"TIR's {type(node).__name__} cannot be written for the C generator.")

    def _again(self, buffer: Node, shape: Any) -> Node:
        """The buffer in the one kind of memory that C has."""
        new = tirx.decl_buffer(shape, str(buffer.dtype), buffer.name, scope="global")
        self._buffers[buffer] = new
        return new

    def _store(self, node: Node) -> Node:
        (index,) = node.indices
        buffer = self._buffers[node.buffer]
        if _lanes(index) == 1:
            return BufferStore(buffer, self.value(node.value), [self.value(index)])
        self._loops += 1
        lane = tirx.Var(f"lane{self._loops}", "int64")
        store = BufferStore(buffer, self.lane(node.value, lane), [self.lane(index, lane)])
        return For(lane, tirx.const(0, "int64"), tirx.const(_lanes(index), "int64"), ForKind.SERIAL, store)

    def value(self, node: Node) -> Node:
        """A scalar expression, rewritten; it may look into vectors."""
        return self.lane(node, None)

    def lane(self, node: Node, lane: Node) -> Node:
        """One lane of an expression; every lane of a scalar is the scalar."""
        match node:
            case tirx.IntImm() | tirx.Var():
                return node
            case tirx.FloatImm():
                # The generator writes seven digits, which is not enough to read the same number back.
                return _called("tirx.reinterpret", "float32", [tirx.const(_bits(float(node.value)), "int32")])
            case tirx.Broadcast():
                return self.value(node.value)
            case tirx.Ramp():
                return self.value(node.base) + tirx.Cast("int64", lane) * self.value(node.stride)
            case tirx.Shuffle():
                return self._shuffled(node, lane)
            case tirx.Cast():
                return tirx.Cast(_element(node), self.lane(node.value, lane))
            case tirx.Select():
                return tirx.Select(
                    self.lane(node.condition, lane),
                    self.lane(node.true_value, lane),
                    self.lane(node.false_value, lane),
                )
            case tirx.Let():
                return tirx.Let(node.var, self.lane(node.value, lane), self.lane(node.body, lane))
            case TensorLoad():
                (index,) = node.indices
                buffer = self._buffers[node.source]
                return tirx.BufferLoad(buffer, [self.lane(index, lane)])
            case Call():
                return _called(node.op.name, _element(node), [self.lane(argument, lane) for argument in node.args])
        if isinstance(node, _BINARY):
            return type(node)(self.lane(node.a, lane), self.lane(node.b, lane))
        raise TypeError(f"TIR's {type(node).__name__} cannot be written for the C generator.")

    def _shuffled(self, node: Node, lane: Node) -> Node:
        """Neighbouring lanes of one vector, which is all that sums and maxima of lanes take."""
        indices = [int(index) for index in node.indices]
        neighbours = list(range(indices[0], indices[0] + len(indices)))
        if len(node.vectors) != 1 or indices != neighbours:
            raise TypeError("A shuffle that is no part of a vector cannot be written for the C generator.")
        first = tirx.const(indices[0], "int64")
        return self.lane(node.vectors[0], first if lane is None else first + lane)
