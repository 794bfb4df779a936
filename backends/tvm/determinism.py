"""Makes TVM's output the same each time.

Relax computes the shapes of a call in functions named `shape_func`, which it emits with their assignments in the order
of a hash table of pointers, so their code differs from run to run. Every assignment reads the sizes of the inputs only,
none another's result; here they are put in order.
"""

from typing import Any

import tvm
from tvm import tirx

_NAME = "shape_func"


def _slot(statement: Any) -> int:
    """The constant index that a statement of a shape function stores to."""
    (index,) = statement.indices
    return int(index.value)


@tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
def order_shape_stores(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """Puts the assignments of shape functions in order."""
    for name, function in module.functions_items():
        if name.name_hint.startswith(_NAME) and isinstance(function.body, tirx.SeqStmt):
            module[name] = function.with_body(tirx.SeqStmt(sorted(function.body.seq, key=_slot)))
    return module
