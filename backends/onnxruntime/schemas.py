"""The ONNX operators of the domain `hikui`: what the graph holds between translation and the passes, and afterwards.

`libhikui_ops.so` implements all of them; passes exchange some for operators that ONNX Runtime has itself.
"""

import re

import onnx
from onnx.defs import OpSchema

from hikui.lowering.formats import KINDS, MIXED

DOMAIN = "hikui"
VERSION = 1

_QUANTIZED = (("q", "T8"), ("scale", "T"), ("sums", "T32"))
_PACKED_A8 = (
    ("q", "T8"),
    ("q_scale", "T"),
    ("q_sums", "T32"),
    ("weight", "W"),
    ("scale", "T16"),
    ("bias", "T", "optional"),
)
_BRANCH = (("x", "T"), ("a", "T16"), ("b", "T16"))
_PACKED = (("x", "T"), ("weight", "W"), ("scale", "T16"), ("bias", "T", "optional"))
_OUT_FEATURES = {"out_features": "INT"}
_TABLE = {"rows": "INT", "out_features": "INT"}
_CACHES = (("key_cache", "T"), ("value_cache", "T"))

_Operand = tuple[str, ...]


def product(form: str, kind: str) -> str:
    """The operator of a product or look-up with one kind of weights: `LinearA8` and `nf4` make `LinearA8Nf4`."""
    return form + kind.capitalize()


_OPERATORS: dict[str, tuple[tuple[_Operand, ...], tuple[_Operand, ...], dict[str, str]]] = {
    "Attention": (
        (("q", "T"), ("k", "T"), ("v", "T"), *_CACHES, ("past", "T64")),
        (("out", "T"), ("new_key_cache", "T"), ("new_value_cache", "T")),
        {"scale": "FLOAT"},
    ),
    "LinearFloat16": ((("x", "T"), ("weight", "T16"), ("bias", "T", "optional")), (("y", "T"),), _OUT_FEATURES),
    "LinearFloat32": ((("x", "T"), ("weight", "T"), ("bias", "T", "optional")), (("y", "T"),), _OUT_FEATURES),
    "QuantizeActivation": ((("x", "T"),), _QUANTIZED, {}),
    "QuantizeActivationInt4": ((("x", "T"),), _QUANTIZED, {}),
    "QuantizeActivationStatic": ((("x", "T"), ("step", "T")), _QUANTIZED, {}),
    "RmsNorm": ((("x", "T"), ("weight", "T")), (("y", "T"),), {"eps": "FLOAT"}),
    "RmsNormQuantize": ((("x", "T"), ("weight", "T")), (("y", "T"), *_QUANTIZED), {"eps": "FLOAT"}),
    "Rotary": ((("x", "T"), ("cos", "T"), ("sin", "T")), (("y", "T"),), {}),
    "SwiGlu": ((("gate", "T"), ("up", "T")), (("y", "T"),), {}),
    "SwiGluQuantize": ((("gate", "T"), ("up", "T")), (("y", "T"), *_QUANTIZED), {}),
}

for _format, _codes in (("Int8", "T8"), ("Int4", "U8")):
    _stored = (("key_cache", _codes), ("value_cache", _codes), ("key_scale", "T16"), ("value_scale", "T16"))
    _OPERATORS[f"Attention{_format}"] = (
        (("q", "T"), ("k", "T"), ("v", "T"), *_stored, ("past", "T64")),
        (("out", "T"), *((f"new_{name}", kind) for name, kind in _stored)),
        {"scale": "FLOAT"},
    )
    _OPERATORS[f"CacheUpdate{_format}"] = (
        (("codes", _codes), ("scale", "T16"), ("new", "T"), ("past", "T64")),
        (("values", "T"), ("new_codes", _codes), ("new_scale", "T16")),
        {},
    )

for _kind in KINDS:
    _OPERATORS[product("Embedding", _kind)] = (
        (("ids", "T64"), ("weight", "W"), ("scale", "T16")),
        (("y", "T"),),
        _TABLE,
    )
for _kind, _values in (("float16", "T16"), ("float32", "T")):
    _OPERATORS[product("Embedding", _kind)] = ((("ids", "T64"), ("weight", _values)), (("y", "T"),), _TABLE)

for _kind in (*KINDS, MIXED):
    _OPERATORS[product("Linear", _kind)] = (_PACKED, (("y", "T"),), _OUT_FEATURES)
    _OPERATORS[product("LinearA8", _kind)] = (_PACKED_A8, (("y", "T"),), _OUT_FEATURES)
    _OPERATORS[product("LinearA8Branch", _kind)] = ((*_PACKED_A8, *_BRANCH), (("y", "T"),), _OUT_FEATURES)

_TYPES = [
    ("T", ["tensor(float)"], "activations"),
    ("T8", ["tensor(int8)"], "quantised activations and caches"),
    ("T16", ["tensor(float16)"], "scales and branches"),
    ("T32", ["tensor(int32)"], "sums"),
    ("U8", ["tensor(uint8)"], "pairs of codes"),
    ("T64", ["tensor(int64)"], "positions and ids"),
    ("W", ["tensor(uint8)", "tensor(int8)"], "packed integer weights"),
]


def _parameter(operand: _Operand) -> OpSchema.FormalParameter:
    name, type_name, *presence = operand
    option = OpSchema.FormalParameterOption.Optional if presence else OpSchema.FormalParameterOption.Single
    return OpSchema.FormalParameter(name, type_name, param_option=option)


def _schema(name: str) -> OpSchema:
    inputs, outputs, attributes = _OPERATORS[name]
    used = {operand[1] for operand in (*inputs, *outputs)}
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[_parameter(operand) for operand in inputs],
        outputs=[_parameter(operand) for operand in outputs],
        attributes=[OpSchema.Attribute(key, getattr(OpSchema.AttrType, kind)) for key, kind in attributes.items()],
        type_constraints=[constraint for constraint in _TYPES if constraint[0] in used],
    )


def kernel_of(operator: str) -> str:
    """The public function of the kernels that an operator of the domain runs: of `LinearA8Nf4` hikui_linear_a8_nf4."""
    words = re.sub(r"(?<=.)([A-Z])", r"_\1", operator.replace("SwiGlu", "Swiglu")).lower()
    return f"hikui_{words}"


def register() -> None:
    """Makes the operators known to onnx, which the exporter asks; a second call does nothing."""
    for name in _OPERATORS:
        if not onnx.defs.has(name, VERSION, DOMAIN):
            onnx.defs.register_schema(_schema(name))
