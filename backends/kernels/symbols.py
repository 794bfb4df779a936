"""The public functions, and which kernels of an instruction set each of them calls."""

from collections.abc import Iterable

from hikui.lowering.formats.format import MIXED
from hikui.lowering.formats.kinds import KINDS

FLOATS = ("float16", "float32")

SYMBOLS = (
    *(f"hikui_linear_{form}{kind}" for form in ("a8_", "a8_branch_", "") for kind in (*KINDS, MIXED)),
    *(f"hikui_linear_{kind}" for kind in FLOATS),
    *(f"hikui_embedding_{kind}" for kind in (*KINDS, *FLOATS)),
    "hikui_quantize_activation",
    "hikui_quantize_activation_int4",
    "hikui_quantize_activation_static",
    "hikui_rms_norm",
    "hikui_rms_norm_quantize",
    "hikui_swiglu",
    "hikui_swiglu_quantize",
    "hikui_rotary",
    "hikui_attention",
    "hikui_attention_int8",
    "hikui_attention_int4",
    "hikui_cache_update_int8",
    "hikui_cache_update_int4",
)
"""The public functions; the C symbol has `__tvm_ffi_` before it."""

_CALLS = {
    "quantize_activation": ("quantize_activation_int8",),
    "rms_norm_quantize": ("rms_norm", "quantize_activation_int8"),
    "swiglu_quantize": ("swiglu", "quantize_activation_int8"),
    "attention": ("attention_float32",),
    **{f"attention_{fmt}": (f"attention_{fmt}", f"cache_store_{fmt}") for fmt in ("int8", "int4")},
    **{f"cache_update_{fmt}": (f"cache_store_{fmt}", f"cache_load_{fmt}") for fmt in ("int8", "int4")},
    **{f"linear_a8_branch_{kind}": (f"linear_a8_{kind}", "linear_float16") for kind in (*KINDS, MIXED)},
    **{f"embedding_{kind}": () for kind in (*KINDS, *FLOATS)},
}
"""Where a function calls other kernels than the one of its own name; a look-up calls none."""


def kernels_called(symbols: Iterable[str]) -> frozenset[str]:
    """The kernels that public functions call, without the size classes of products: `linear_a8_int4`, `rms_norm`, …

    Args:
        symbols: of `SYMBOLS`.
    """
    names = (symbol.removeprefix("hikui_") for symbol in symbols)
    return frozenset(kernel for name in names for kernel in _CALLS.get(name, (name,)))


def kept(symbols: Iterable[str]) -> str:
    """The C text that says which public functions there are: HIKUI_KEEP_<name>(text) is the text or nothing."""
    held = set(symbols)
    return "".join(f"#define HIKUI_KEEP_{name}(...){' __VA_ARGS__' if name in held else ''}\n" for name in SYMBOLS)
