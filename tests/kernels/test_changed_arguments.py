"""Calls of every kernel with arguments of changed shapes, types and values, under the sanitisers: done or refused."""

import random

import torch
from torch import Tensor

from hikui.backends.kernels import SYMBOLS
from hikui.backends.kernels.replay import Machine, Recorded
from hikui.backends.kernels.standalone import DTYPES, Argument
from hikui.lowering.formats import KINDS

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 256)
LINES = {"sign": 4, "int2": 8, "ternary": 7, "int3": 12, "int4": 16, "nf4": 16, "fp4": 16, "int8": 32, "mixed": 7}


def _product(symbol: str) -> tuple[Argument, ...]:
    x, bias, y = torch.ones(2, 128), torch.zeros(17), torch.zeros(2, 17)
    kind = symbol.rsplit("_", 1)[1]
    if kind in ("float16", "float32"):
        return x, torch.ones(2, 128, 16, dtype=getattr(torch, kind)), bias, y
    dtype = torch.int8 if kind == "int8" else torch.uint8
    packed = torch.ones(2, LINES[kind], 16, 4, dtype=dtype), torch.ones(2, 1 if kind != "mixed" else 4, 16).half(), bias
    if "a8" not in symbol:
        return x, *packed, y
    quantised = torch.ones(2, 128, dtype=torch.int8), torch.ones(2), torch.ones(2, 4, dtype=torch.int32)
    branch = (x, torch.ones(1, 128, 16).half(), torch.ones(2, 4, 16).half()) if "branch" in symbol else ()
    return *quantised, *packed, *branch, y


def _arguments(symbol: str) -> tuple[Argument, ...]:
    """A call that is close to a right one."""
    x = torch.ones(2, 128)
    quantised = torch.zeros(2, 128, dtype=torch.int8), torch.zeros(2), torch.zeros(2, 4, dtype=torch.int32)
    heads, past, cache = torch.ones(1, 2, 3, 8), torch.tensor([1]), torch.zeros(1, 2, 5, 8)
    codes = torch.zeros(1, 2, 5, 4, dtype=torch.uint8) if "int4" in symbol else cache.to(torch.int8)
    scale = torch.zeros(1, 2, 5).half()
    known: dict[str, tuple[Argument, ...]] = {
        "hikui_quantize_activation": (x, *quantised),
        "hikui_quantize_activation_int4": (x, *quantised),
        "hikui_quantize_activation_static": (x, torch.ones(1), *quantised),
        "hikui_rms_norm": (x, torch.ones(128), 1e-5, x),
        "hikui_rms_norm_quantize": (x, torch.ones(128), 1e-5, x, *quantised),
        "hikui_swiglu": (x, x, x),
        "hikui_swiglu_quantize": (x, x, x, *quantised),
        "hikui_rotary": (heads, heads[0, 0], heads[0, 0], heads),
        "hikui_attention": (heads, heads, heads, cache, cache, past, 1.0, heads),
    }
    if symbol in known:
        return known[symbol]
    if "embedding" in symbol:
        ids, y = torch.tensor([0, 16]), torch.ones(2, 128)
        return (ids, *_product(symbol.replace("embedding", "linear"))[1:-2], 17, y)
    if "attention" in symbol:
        return heads, heads, heads, codes, codes, scale, scale, past, 1.0, heads
    return (codes, scale, heads, past, cache) if "cache" in symbol else _product(symbol)


def _changed(argument: Argument, draw: random.Random) -> Argument:
    if not isinstance(argument, Tensor):
        others: list[Argument] = [0.0, -1.0, float("nan"), float("inf"), 3, torch.ones(1)]
        return draw.choice(others)
    shape = list(argument.shape)
    how = draw.randrange(5)
    if how == 0 and shape:
        shape[draw.randrange(len(shape))] = draw.choice(SIZES)
    elif how == 1 and shape:
        del shape[draw.randrange(len(shape))]
    elif how == 2 and len(shape) < 6:
        shape.insert(draw.randrange(len(shape) + 1), draw.choice((0, 1, 2)))
    elif how == 3:
        return argument.to(draw.choice(list(DTYPES)))
    elif argument.dtype == torch.int64:
        return torch.tensor([draw.choice([-1, 0, 3, 4, 2**62, -(2**63)])])
    return torch.ones(shape, dtype=argument.dtype)


def test_calls_with_changed_arguments_are_done_or_refused(sanitised: Machine) -> None:
    draw = random.Random(1)
    assert set(LINES) == {*KINDS, "mixed"}
    calls = []
    for symbol in SYMBOLS:
        for _ in range(120):
            arguments = list(_arguments(symbol))
            for _ in range(draw.randrange(3)):
                at = draw.randrange(len(arguments))
                arguments[at] = _changed(arguments[at], draw)
            calls.append(Recorded(symbol, tuple(arguments)))
    results = sanitised.run(calls)
    assert all(result.whole for result in results)
    refused = [result.error for result in results if result.error]
    assert len(results) - len(refused) > len(SYMBOLS) * 30
    assert len(refused) > len(SYMBOLS) * 30
    assert all(error.startswith("hikui_") and error.endswith(".") for error in refused)
