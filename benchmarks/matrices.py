"""What each quantiser loses on single real matrices: relative weight and output error.

    python -m benchmarks.matrices TENSORS.safetensors [--formats int3-g64,…] [--json FILE]

For files with GPT-2's attention matrices, [in, out], as `decoder1.att.query.w`. No text goes through part of a
model, so the inputs are made: of query, key and value the layer's own norm (γ∘z + β) of standard normal z; of the
output projection the values that those give, mixed over 16 tokens as attention with random weights mixes them. Half of
the inputs are what the methods see, the error is measured on the others.

`weight` is ‖W−Ŵ‖²/‖W‖² and `output` E‖(W−Ŵ)x‖²/E‖Wx‖², medians over the matrices. In the last two columns the output
projection reads x̂, the values that the same method has rounded: E‖Wx−Ŵx̂‖²/E‖Wx‖², without and with QEP's correction.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hikui.lowering.engine.workers import Workers
from hikui.lowering.formats import Format
from hikui.passes import Qep
from hikui.passes.measure import linalg
from hikui.passes.measure.evidence import OwnEvidence
from hikui.passes.quantise.correction import corrected_rows
from hikui.passes.quantise.gptq import Gptq
from hikui.passes.quantise.hqq import Hqq
from hikui.passes.quantise.quantiser import Quantiser
from hikui.passes.quantise.rounding import dequantise
from hikui.passes.quantise.rtn import Rtn
from hikui.passes.transform import awq
from hikui.passes.transform.hadamard import random_hadamard

TOKENS = 8192
FORMATS = ",".join(f"int{bits}-{group}" for bits in (4, 3, 2) for group in ("g64", "g128", "channel"))

Method = Callable[[Tensor, Tensor], Tensor]
"""What becomes of a matrix float32 [n, k] whose site reads inputs [tokens, k]."""


def plain(step: Quantiser[Any], fmt: Format) -> Method:
    """A quantiser alone."""

    def rounded(weight: Tensor, x: Tensor) -> Tensor:
        gram = x.double().t() @ x.double() / len(x)
        with Workers(1) as workers:
            known = {"mean_square": gram.diagonal().float(), "gram": gram}
            evidence = OwnEvidence(**{name: known[name] for name in step.wants()})
            return dequantise(step.quantise(weight, fmt, step.prepare(evidence, workers, fmt)), fmt)

    return rounded


def scaled(fmt: Format) -> Method:
    """AWQ: the best factor, then clipping by output error."""
    inner = plain(Rtn(format=str(fmt), clip="output"), fmt)

    def rounded(weight: Tensor, x: Tensor) -> Tensor:
        factors = awq.candidates(x.abs().double().mean(0))
        metric = awq.output_metric(x.double().t() @ x.double() / len(x))
        factor = factors[int(awq.output_errors(weight, factors, fmt, metric, "minmax").argmin())]
        return inner(weight * factor, x / factor) / factor

    return rounded


def rotated(fmt: Format) -> Method:
    """A random Hadamard rotation of the columns, then GPTQ."""
    inner = plain(Gptq(format=str(fmt)), fmt)

    def rounded(weight: Tensor, x: Tensor) -> Tensor:
        rotation, _ = random_hadamard(weight.shape[1], torch.Generator().manual_seed(0))
        turned = inner(rotation.apply(weight.double()).float(), rotation.apply(x.double()).float())
        return (turned.double() @ rotation.matrix().t()).float()

    return rounded


def methods(fmt: Format) -> dict[str, Method]:
    """What is compared."""
    name = str(fmt)
    return {
        "rtn, minmax": plain(Rtn(format=name, clip="minmax"), fmt),
        "rtn, mse": plain(Rtn(format=name), fmt),
        "rtn, output": plain(Rtn(format=name, clip="output"), fmt),
        "hqq": plain(Hqq(format=name), fmt),
        "awq": scaled(fmt),
        "gptq": plain(Gptq(format=name, clip="minmax", act_order=False), fmt),
        "gptq, mse, act order": plain(Gptq(format=name), fmt),
        "rotation, gptq": rotated(fmt),
    }


@dataclass(frozen=True)
class Layer:
    """One layer's matrices [n, k], what query, key and value read, and how values become what the projection reads."""

    name: str
    inputs: dict[str, Tensor]
    projection: Tensor
    x: Tensor
    bias: Tensor
    mixing: Tensor

    def mixed(self, value: Tensor) -> Tensor:
        """What the projection reads when the value matrix is this one: [tokens, k]."""
        values = self.x @ value.t() + self.bias
        return torch.bmm(self.mixing, values.view(*self.mixing.shape[:2], -1)).view_as(values)


def layers(path: Path) -> list[Layer]:
    """The layers of a file, with their inputs."""
    tensors, out = load_file(path), []
    generator = torch.Generator().manual_seed(0)
    for layer in sorted({name.split(".")[0] for name in tensors}):
        held = {name.removeprefix(f"{layer}.att."): t for name, t in tensors.items() if name.startswith(f"{layer}.")}
        width = held["value.w"].shape[0]
        x = torch.randn(TOKENS, width, generator=generator) * held["norm.w"] + held["norm.b"]
        mixing = torch.rand(TOKENS // 16, 16, 16, generator=generator).softmax(-1)
        inputs = {name: held[f"{name}.w"].t().contiguous() for name in ("query", "key", "value")}
        out.append(Layer(layer, inputs, held["proj.w"].t().contiguous(), x, held["value.b"], mixing))
    return out


def apart(weight: Tensor, rounded: Tensor, x: Tensor, met: Tensor) -> float:
    """E‖Wx − Ŵx̂‖² / E‖Wx‖² over the tokens that no method has seen."""
    wanted = x[1::2] @ weight.t()
    off = wanted - met[1::2] @ rounded.t()
    return float(off.square().sum(dtype=torch.float64) / wanted.square().sum(dtype=torch.float64))


def corrected(weight: Tensor, x: Tensor, met: Tensor) -> Tensor:
    """W* of QEP with its default options."""
    options, met = Qep(), met.double()
    gram, cross = met.t() @ met / len(met), (x.double() - met).t() @ met / len(met)
    with Workers(1) as workers:
        linalg.factor_upper(gram, options.damping, workers)
    return corrected_rows(weight.double(), options.alpha, gram, cross).float()


def measure(layer: Layer, method: Method) -> list[dict[str, object]]:
    """A row for each matrix of a layer."""
    rows: list[dict[str, object]] = []
    rounded = {name: method(weight, layer.x[::2]) for name, weight in layer.inputs.items()}
    x, met = layer.mixed(layer.inputs["value"]), layer.mixed(rounded["value"])
    weight = layer.projection
    rounded["proj"] = method(weight, x[::2])
    for name, each in {**layer.inputs, "proj": weight}.items():
        reads = x if name == "proj" else layer.x
        difference = (each.double() - rounded[name].double()).square().sum() / each.double().square().sum()
        error = apart(each, rounded[name], reads, reads)
        rows.append({"matrix": f"{layer.name}.{name}", "weight": float(difference), "output": error})
    behind = apart(weight, method(weight, met[::2]), x, met)
    target = corrected(weight, x[::2], met[::2])
    rows.append({"matrix": f"{layer.name}.proj behind value", "output": behind})
    rows.append(
        {"matrix": f"{layer.name}.proj behind value, QEP", "output": apart(weight, method(target, met[::2]), x, met)}
    )
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Medians of what `measure` has given for one format and method, as the cells of a line."""

    def middle(key: str, suffix: str | None) -> str:
        names = {str(row["matrix"]): row for row in rows}
        chosen = [row for name, row in names.items() if (name.endswith(suffix) if suffix else "behind" not in name)]
        return f"{median(float(str(row[key])) for row in chosen):.3g}"

    return " | ".join(
        (middle("weight", None), middle("output", None), middle("output", "behind value"), middle("output", "QEP"))
    )


def main() -> None:
    """Prints a table of medians over the matrices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tensors", type=Path)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    found = layers(options.tensors)
    print("| format | method | weight | output | behind rounded values | with QEP |\n|---|---|---|---|---|---|")
    for fmt in map(Format.parse, options.formats.split(",")):
        for name, method in methods(fmt).items():
            made = [row for layer in found for row in measure(layer, method)]
            rows += [{"format": str(fmt), "method": name, **row} for row in made]
            print(f"| {fmt} | {name} | {table(made)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
