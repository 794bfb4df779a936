"""The kernels of an instruction set: which there are, by symbol, and the C table that the dispatcher finds them in."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from hikui.backends.kernels import activation, attention, cache, linear, weight_only
from hikui.backends.kernels.fields import SEGMENTS
from hikui.backends.kernels.isa.base import SIZES, Isa, Tile
from hikui.backends.kernels.symbols import FLOATS, SYMBOLS, kept, kernels_called
from hikui.lowering.formats import KINDS

GENERIC = "generic"
ACTIVATIONS = ("int8", "int8 static", "int4", "float32", "float16")
"""What activations products take: quantised a token, by a step known beforehand, or not at all."""

_OVER_CACHES: dict[Callable[[str, str], Any], tuple[str, ...]] = {
    attention.attention: cache.FORMATS,
    cache.cache_store: cache.QUANTISED,
    cache.cache_load: cache.QUANTISED,
}
"""Kernels with a form for each way to store a cache."""

_WEIGHT_ONLY_ROWS = {"single": 1, "many": 4}


class Kernel(NamedTuple):
    """A TIR function to come: its C symbol, its C type, and who makes it."""

    symbol: str
    ctype: str
    build: Callable[[], Any]


def kernel_symbol(kernel: str, isa: Isa) -> str:
    """The C symbol of a kernel of an instruction set."""
    return f"hikui_{kernel}__{isa.name}"


def _float_tiles(isa: Isa) -> dict[str, tuple[Tile, int]]:
    """Tiles and chains of the products with float weights, in the order of the table."""
    return {
        "single": (isa.float_single, 1),
        "many": (isa.float_many, 1),
        "few_single": (Tile(rows=1, blocks=1), 4),
        "few_many": (Tile(rows=4, blocks=1), 1),
    }


def _integer_kernels(isa: Isa) -> Iterator[Kernel]:
    """The products of integers, and what prepares activations for them."""
    prepared = set()
    for size in dict.fromkeys(isa.classes.get(size, size) for size in SIZES):
        for kind in SEGMENTS:
            name = kernel_symbol(f"linear_a8_{kind}_{size}", isa)
            special = isa.special.get((kind, size))
            yield Kernel(
                name, "integer_kernel", partial(special.build if special else linear.integer, isa, kind, size, name)
            )
            if special and special.prepare and special.prepare_build and special.prepare not in prepared:
                prepared.add(special.prepare)
                name = kernel_symbol(special.prepare, isa)
                yield Kernel(name, "prepare_kernel", partial(special.prepare_build, isa, name))


def kernels(isa: Isa) -> Iterator[Kernel]:
    """Every kernel of an instruction set."""

    def symbol(kernel: str) -> str:
        return kernel_symbol(kernel, isa)

    yield from _integer_kernels(isa)
    for kind in SEGMENTS:
        for size, rows in _WEIGHT_ONLY_ROWS.items():
            name = symbol(f"linear_{kind}_{size}")
            yield Kernel(name, "weight_only_kernel", partial(weight_only.weight_only, kind, rows, name))
    for kind in FLOATS:
        for size, (tile, chains) in _float_tiles(isa).items():
            name = symbol(f"linear_{kind}_{size}")
            yield Kernel(name, "floating_kernel", partial(linear.floating, kind, tile, chains, name))
    for mode in activation.MODES:
        name = symbol(f"quantize_activation_{mode}")
        yield Kernel(name, "quantize_kernel", partial(activation.quantize_activation, mode, name))
    for make in (activation.rms_norm, activation.swiglu, attention.rotary):
        name = symbol(make.__name__)
        yield Kernel(name, f"{make.__name__}_kernel", partial(make, name))
    for kernel, formats in _OVER_CACHES.items():
        for fmt in formats:
            name = symbol(f"{kernel.__name__}_{fmt}")
            yield Kernel(name, f"{kernel.__name__}_kernel", partial(kernel, fmt, name))


def kernel_name(isa: Isa, kind: str, size: str) -> str:
    """What serves products of a kind, for people: `vnni in place`, `tbl look-up`, `generic`, …"""
    size = isa.classes.get(size, size)
    special = isa.special.get((kind, size))
    if special:
        return special.name
    names = [isa.scheme(segment, size).name for segment in SEGMENTS[kind]]
    return " + ".join(dict.fromkeys(names))


def served(isa: Isa, kind: str, activations: str) -> tuple[str, ...]:
    """The kernels for 1, for 2…15 and for 16 and more rows of activations; a fallback says so.

    Args:
        isa: the instruction set.
        kind: a format, as in `fields.SEGMENTS`.
        activations: one of `ACTIVATIONS`.
    """
    if activations == "float32":
        return (GENERIC,) * len(SIZES)
    if activations == "float16":
        return (f"{GENERIC}, widened to float32",) * len(SIZES)
    return tuple(kernel_name(isa, kind, size) for size in SIZES)


def is_fallback(name: str) -> bool:
    """Whether a kernel is the one of plain code that serves where an instruction set has no sequence of its own."""
    return name.startswith(GENERIC)


def objects(isa: Isa, symbols: Sequence[str]) -> list[str]:
    """C symbols of the kernels that public functions need of an instruction set, which are its objects' names too."""
    called = kernels_called(symbols)
    chosen = []
    for kernel in kernels(isa):
        name = kernel.symbol.removeprefix("hikui_").removesuffix(f"__{isa.name}")
        if name in called or _belongs(isa, name, called):
            chosen.append(kernel.symbol)
    return chosen


def _belongs(isa: Isa, name: str, called: frozenset[str]) -> bool:
    """Whether a kernel is one of several sizes of a product that is called, or prepares activations for it."""
    sizes = {*SIZES, *_WEIGHT_ONLY_ROWS, *_float_tiles(isa)}
    if any(name == f"{kernel}_{size}" for kernel in called if kernel.startswith("linear_") for size in sizes):
        return True
    return any(special.prepare == name and f"linear_a8_{kind}" in called for (kind, _), special in isa.special.items())


def _entry(isa: Isa, kind: str, size: str) -> str:
    size = isa.classes.get(size, size)
    special = isa.special.get((kind, size))
    symbol = kernel_symbol(f"linear_a8_{kind}_{size}", isa)
    blocks = special.blocks if special else isa.tile(kind, size).blocks
    prepare = kernel_symbol(special.prepare, isa) if special and special.prepare else "0"
    prepared_bytes = special.prepared_bytes if special else 0
    return f'{{{symbol}, "{kernel_name(isa, kind, size)}", {blocks}, {prepare}, {prepared_bytes}}}'


def _c_table(isa: Isa, symbols: Sequence[str]) -> str:
    """The table of an instruction set; what no public function calls stays null."""
    called = kernels_called(symbols)
    held = set(objects(isa, symbols))

    def symbol(kernel: str) -> str:
        return kernel_symbol(kernel, isa)

    def entry(name: str) -> str:
        return symbol(name) if symbol(name) in held else "0"

    lines = [f"extern {kernel.ctype} {kernel.symbol};" for kernel in kernels(isa) if kernel.symbol in held]
    lines.append(f"static const struct kernel_table table_{isa.name} = {{")
    lines.append(f'  .isa = "{isa.name}", .supported = supports_{isa.name},')
    integer = [kind for kind in SEGMENTS if f"linear_a8_{kind}" in called]
    served = [f"{kind} {size} {kernel_name(isa, kind, size)}" for kind in integer for size in SIZES]
    lines.append('  .description = ""')
    lines += [f'    "{line}\\n"' for line in served]
    lines[-1] += ","
    for kind in integer:
        entries = ", ".join(_entry(isa, kind, size) for size in SIZES)
        lines.append(f"  .integer[{kind.upper()}] = {{{entries}}},")
    for kind in SEGMENTS:
        if f"linear_{kind}" in called:
            pair = ", ".join(symbol(f"linear_{kind}_{size}") for size in _WEIGHT_ONLY_ROWS)
            lines.append(f"  .weight_only[{kind.upper()}] = {{{pair}}},")
    tiles = _float_tiles(isa)
    lines.append(f"  .floating_blocks = {{{', '.join(str(tile.blocks) for tile, _ in tiles.values())}}},")
    for kind in FLOATS:
        lines.append(
            f"  .floating[{kind.upper()}] = {{{', '.join(entry(f'linear_{kind}_{size}') for size in tiles)}}},"
        )
    quantisers = ", ".join(entry(f"quantize_activation_{mode}") for mode in activation.MODES)
    lines.append(f"  .quantize = {{{quantisers}}},")
    for name in ("rms_norm", "swiglu", "rotary"):
        lines.append(f"  .{name} = {entry(name)},")
    for kernel, formats in _OVER_CACHES.items():
        name = kernel.__name__
        lines.append(f"  .{name} = {{{', '.join(entry(f'{name}_{fmt}') for fmt in formats)}}},")
    lines.append("};")
    return "\n".join(lines) + "\n"


def _stored_kinds() -> str:
    """How each kind is stored, for the look-ups."""
    lines = ["static const struct stored_kind stored_kinds[KINDS] = {"]
    for name, kind in KINDS.items():
        codes = ", ".join(map(str, kind.codes or (0,)))
        lines.append(f"  [{name.upper()}] = {{{kind.bits}, {kind.lines or 0}, {{{codes}}}}},")
    return "\n".join([*lines, "};"]) + "\n"


def c_includes(isas: Sequence[Isa], symbols: Sequence[str] = SYMBOLS) -> dict[str, str]:
    """The C text that the dispatcher includes, by the names of its files.

    Args:
        isas: the instruction sets, best last.
        symbols: the public functions that it is to have.
    """
    names = [isa.name for isa in isas]
    tables = "".join(_c_table(isa, symbols) for isa in isas)
    order = ", ".join(f"&table_{name}" for name in names)
    tables += f"static const struct kernel_table* const tables[] = {{{order}}};\n"
    tables += f'#define TABLE_NAMES "{", ".join(names)}"\n'
    return {"isas.inc": tables, "kinds.inc": _stored_kinds(), "symbols.inc": kept(symbols)}
