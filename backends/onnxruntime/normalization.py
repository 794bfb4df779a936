"""onnx-ir passes: RMS norms become ONNX Runtime's own, and take the residual addition before them along."""

import onnx_ir as ir

from hikui.backends.onnxruntime.group_query_attention import CONTRIB
from hikui.backends.onnxruntime.schemas import DOMAIN


def _norm(node: ir.Node) -> ir.Node:
    """`SimplifiedLayerNormalization` with the operands of a `hikui::RmsNorm` or `hikui::RmsNormQuantize`."""
    # ONNX Runtime keeps this operator in the standard domain, although ONNX does not know it.
    created = ir.node(
        "SimplifiedLayerNormalization",
        node.inputs,
        {"axis": -1, "epsilon": node.attributes.get_float("eps"), "stash_type": 1},
        name=node.name,
    )
    created.outputs[0].name = f"{node.outputs[0].name}_norm"
    created.outputs[0].type, created.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    return created


class UseSimplifiedLayerNormalization(ir.passes.InPlacePass):
    """`hikui::RmsNorm` → the norm; `hikui::RmsNormQuantize` → the norm and `hikui::QuantizeActivation`."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in graph:
            if node.domain != DOMAIN or node.op_type not in ("RmsNorm", "RmsNormQuantize"):
                continue
            modified = True
            created = [_norm(node)]
            outputs = [created[0].outputs[0]]
            if node.op_type == "RmsNormQuantize":
                quantise = ir.node(
                    "QuantizeActivation", [outputs[0]], domain=DOMAIN, num_outputs=3, name=f"{node.name}_quantize"
                )
                created.append(quantise)
                outputs += quantise.outputs
            for old, new in zip(node.outputs, outputs, strict=True):
                new.type, new.shape = old.type, old.shape
            ir.convenience.replace_nodes_and_values(graph, node, [node], created, node.outputs, outputs)
        return ir.passes.PassResult(model, modified)


class UseSkipSimplifiedLayerNormalization(ir.passes.InPlacePass):
    """An addition of two equal shapes whose sum a norm reads → `SkipSimplifiedLayerNormalization`, giving both."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        for node in graph:
            if node.domain != "" or node.op_type != "SimplifiedLayerNormalization":
                continue
            total, weight = node.inputs
            addition = total.producer() if total is not None else None
            if total is None or addition is None or addition.domain != "" or addition.op_type != "Add":
                continue
            shapes = [operand.shape for operand in addition.inputs if operand is not None]
            # A bias broadcasts; the fused operator takes a residual of the same shape only.
            if len(shapes) != 2 or shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) != 3:
                continue
            fused = ir.node(
                "SkipSimplifiedLayerNormalization",
                [*addition.inputs, weight],
                {"epsilon": node.attributes.get_float("epsilon")},
                domain=CONTRIB,
                num_outputs=4,
                name=node.name,
            )
            normed, mean, deviation, summed = fused.outputs
            for new, old in ((normed, node.outputs[0]), (summed, total)):
                new.name, new.type, new.shape = old.name, old.type, old.shape
            mean.name = deviation.name = ""
            # The sum may have readers before the norm, so the fused node takes the addition's place.
            ir.convenience.replace_nodes_and_values(
                graph, addition, [addition, node], [fused], [total, node.outputs[0]], [summed, normed]
            )
            model.opset_imports.setdefault(CONTRIB, 1)
            modified = True
        return ir.passes.PassResult(model, modified)
