"""From a program to a Relax module whose `main` takes tokens, past, the caches and one tuple of weights."""

import operator
import traceback

import torch
from torch import Tag, Tensor, fx
from torch._ops import OpOverload
from tvm import IRModule, relax
from tvm.relax.frontend.torch import from_exported_program

from hikui.backends.kernels import SYMBOLS
from hikui.backends.tvm.convert import CONVERTERS, attention_arguments
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import SOURCE, Program

_UNSUPPORTED = "Unsupported function types "


_INTEGERS = (torch.int64, torch.int32)
_CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)

_OPS = torch.ops.hikui
_WRITTEN: dict[object, dict[int, int]] = {
    _OPS.attention.default: {1: 3, 2: 4},
    _OPS.attention_quantized.default: {1: 3, 2: 4, 3: 5, 4: 6},
    _OPS.cache_update_quantized.default: {1: 0, 2: 1},
}
"""Of operators that write caches and have several results: which result is which argument, written."""


def _written_cache(value: fx.Node) -> fx.Node | None:
    """The cache that a new cache was written into."""
    if value.target is _OPS.cache_update.default:
        return value.args[0] if isinstance(value.args[0], fx.Node) else None
    source, at = value.args[:2] if value.target is operator.getitem else (None, 0)
    if not isinstance(source, fx.Node) or not isinstance(at, int):
        return None
    argument = _WRITTEN.get(source.target, {}).get(at)
    cache = None if argument is None else source.args[argument]
    return cache if isinstance(cache, fx.Node) else None


def _check_caches(node: fx.Node) -> None:
    """A cache is overwritten, so nothing else may read what it held before."""
    for at in _WRITTEN.get(node.target, {0: 0}).values():
        cache = node.args[at]
        if not isinstance(cache, fx.Node) or cache.op != "placeholder" or len(cache.users) != 1:
            raise HikuiError(
                f"Node '{node.name}' writes cache '{cache}', which other nodes read too; the tvm backend writes caches "
                "in place and needs each read by one node only."
            )


def _check_attention(node: fx.Node) -> None:
    arguments = attention_arguments(node)
    if arguments.get("is_causal") or arguments.get("attn_mask") is None:
        raise HikuiError(f"Node '{node.name}' attends without a mask; the tvm backend takes hikui::causal_mask only.")


_CHECKS = {
    _OPS.cache_update.default: _check_caches,
    **dict.fromkeys(_WRITTEN, _check_caches),
    torch.ops.aten.scaled_dot_product_attention.default: _check_attention,
}


def check(program: Program) -> None:
    """Checks what the converters take for granted.

    Raises:
        HikuiError: the program does something that this backend cannot express.
    """
    for node in program.graph.nodes:
        if node.target in _CHECKS:
            _CHECKS[node.target](node)


def _logits_only(program: Program) -> Program:
    """A copy that returns the logits alone; the caches are written in place, so nobody needs them back.

    Raises:
        HikuiError: a new cache is not the old one with rows written by `cache_update` or `attention`.
    """
    clone = program.clone()
    logits, *caches = clone.outputs()
    for old, new in zip(clone.input_nodes()[2:], caches, strict=True):
        if _written_cache(new) is not old:
            raise HikuiError(
                f"Node '{new.name}' returns cache '{old.name}' without writing it by hikui::cache_update, "
                "hikui::attention or their quantised forms; the tvm backend writes caches in place and cannot express "
                "that."
            )
    clone.output_node.args = ((logits,),)
    clone.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return clone


def _promote_integers(program: Program) -> None:
    """Makes floats of integers where torch computes with floats: TVM rounds the other operand, or refuses.

    Args:
        program: a copy, which is changed.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload) or Tag.pointwise not in node.target.tags or node.target in _CASTS:
            continue
        result = node.meta["val"]
        with_float = isinstance(result, Tensor) and result.is_floating_point()
        if not with_float and not any(isinstance(argument, float) for argument in node.args):
            continue
        for operand in node.all_input_nodes:
            value = operand.meta["val"]
            if isinstance(value, Tensor) and value.dtype in _INTEGERS:
                with graph.inserting_before(node):
                    made = graph.call_function(torch.ops.aten._to_copy.default, (operand,), {"dtype": torch.float32})
                node.replace_input_with(operand, made)
    program.propagate()


def _place(error: BaseException) -> str:
    """The node that TVM's importer was at when it failed, and where the model's code made it."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        found = node if isinstance(node, fx.Node) else found
    if found is None:
        return "the program"
    line = f" ({found.meta[SOURCE]})" if SOURCE in found.meta else ""
    return f"node '{found.name}', {found.target}{line}"


def refusal(error: Exception) -> HikuiError:
    """A sentence for an error that TVM raises on a program that this backend thought it could express."""
    lines = str(error).strip().splitlines() or ["no message"]
    return HikuiError(
        f"The tvm backend cannot translate {_place(error)}: {type(error).__name__}: {lines[-1].strip().rstrip('.')}; "
        "lower with --backend onnxruntime, or report it."
    )


def relax_module(program: Program) -> IRModule:
    """Imports a program.

    Returns:
        A module whose function `main(tokens, past, key_cache_0, value_cache_0, …, weights)` returns the logits and
        writes the caches in place; `weights` is a tuple in the order of `program.weight_nodes()`.

    Raises:
        HikuiError: an operator of the program has no counterpart in Relax.
    """
    check(program)
    clone = _logits_only(program)
    _promote_integers(clone)
    exported = clone.to_exported_program()
    try:
        module = from_exported_program(
            exported, unwrap_unit_return_tuple=True, custom_convert_map=CONVERTERS, run_ep_decomposition=False
        )
    except HikuiError:
        raise
    except Exception as error:
        if _UNSUPPORTED not in str(error):
            raise refusal(error) from error
        names = str(error).split(_UNSUPPORTED, 1)[1].strip("[]")
        raise HikuiError(
            f"The tvm backend has no translation for the operators {names}; lower with --backend onnxruntime."
        ) from None
    return _bundle_weights(module, len(program.weight_nodes()))


def kernels_called(module: IRModule) -> tuple[str, ...]:
    """The public functions of the kernels that a module calls, sorted."""
    found: set[str] = set()

    def visit(expression: object) -> None:
        if isinstance(expression, relax.ExternFunc):
            found.add(str(expression.global_symbol))

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return tuple(sorted(found & set(SYMBOLS)))


def _bundle_weights(module: IRModule, weights: int) -> IRModule:
    main = module["main"]
    inputs = [*main.params[weights:]]
    function = relax.Function([*inputs, *main.params[:weights]], main.body, main.ret_ty, main.is_pure)
    # Bounds on T are left out: with them the memory plan reserves every buffer for a full context.
    module["main"] = function.with_attr({"global_symbol": "main", "num_input": len(inputs)})
    return relax.transform.BundleModelParams("weights")(module)
