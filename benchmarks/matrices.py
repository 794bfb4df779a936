"""What each quantiser loses on single real matrices: relative weight and output error.

    python -m benchmarks.matrices TENSORS.safetensors [--json FILE]

For files with GPT-2's attention matrices, [in, out], as `decoder1.att.query.w`. No text goes through part of a
model, so the inputs are made: of query, key and value the layer's own norm (γ∘z + β) of standard normal z; of the
output projection the values that those give, mixed over 16 tokens as attention with random weights mixes them. Half of
the inputs are what the methods see, the error is measured on the others.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file
from torch import Tensor

from hikui.lowering.formats import Format
from hikui.lowering.workers import Workers
from hikui.passes.blockwise import Quantiser
from hikui.passes.evidence import Evidence
from hikui.passes.gptq import Gptq
from hikui.passes.hqq import Hqq
from hikui.passes.rounding import dequantise
from hikui.passes.rtn import Rtn

TOKENS = 8192


def methods(fmt: str) -> dict[str, Quantiser]:
    """The quantisers that are compared."""
    return {
        "rtn, minmax": Rtn(format=fmt, clip="minmax"),
        "rtn, mse": Rtn(format=fmt),
        "rtn, output": Rtn(format=fmt, clip="output"),
        "hqq": Hqq(format=fmt),
        "gptq": Gptq(format=fmt, clip="minmax", act_order=False),
        "gptq, mse, act order": Gptq(format=fmt),
    }


def cases(path: Path) -> list[tuple[str, Tensor, Tensor]]:
    """(name, matrix [n, k], inputs [tokens, k])."""
    tensors, out = load_file(path), []
    generator = torch.Generator().manual_seed(0)
    for layer in sorted({name.split(".")[0] for name in tensors}):
        held = {
            name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")
        }
        z = torch.randn(TOKENS, 768, generator=generator)
        x = z * held["att.norm.w"] + held["att.norm.b"]
        values = x @ held["att.value.w"] + held["att.value.b"]
        mixing = torch.rand(TOKENS // 16, 16, 16, generator=generator).softmax(-1)
        mixed = torch.bmm(mixing, values.view(-1, 16, 768)).view(TOKENS, 768)
        out += [(f"{layer}.{name}", held[f"att.{name}.w"].t().contiguous(), x) for name in ("query", "key", "value")]
        out.append((f"{layer}.proj", held["att.proj.w"].t().contiguous(), mixed))
    return out


def measure(weight: Tensor, x: Tensor, step: Quantiser, fmt: Format) -> tuple[float, float]:
    """(‖W−Ŵ‖²/‖W‖², E‖(W−Ŵ)x‖²/E‖Wx‖²)."""
    seen, held_out = x[::2].double(), x[1::2].double()
    gram = seen.t() @ seen / len(seen)
    with Workers(1) as workers:
        evidence = Evidence(mean_square=gram.diagonal().float(), gram=gram) if step.wants() else None
        prepared = step.prepare(evidence, workers) if evidence is not None else None
        difference = weight.double() - dequantise(step.quantise(weight, fmt, evidence, prepared), fmt).double()
    output = (held_out @ difference.t()).square().sum() / (held_out @ weight.double().t()).square().sum()
    return float(difference.square().sum() / weight.double().square().sum()), float(output)


def main() -> None:
    """Prints a table of medians over the matrices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tensors", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, found = [], cases(options.tensors)
    print("| format | method | weight error | output error |\n|---|---|---|---|")
    for kind in ("int4", "int3", "int2"):
        for group in ("g64", "g128", "channel"):
            fmt = Format.parse(f"{kind}-{group}")
            errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for name, weight, x in found:
                for method, step in methods(str(fmt)).items():
                    pair = measure(weight, x, step, fmt)
                    errors[method].append(pair)
                    rows.append(
                        {"matrix": name, "format": str(fmt), "method": method, "weight": pair[0], "output": pair[1]}
                    )
            for method, pairs in errors.items():
                of_weights, of_outputs = (median(column) for column in zip(*pairs, strict=True))
                print(f"| {fmt} | {method} | {of_weights:.3g} | {of_outputs:.3g} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
