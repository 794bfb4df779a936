"""What each format costs a real model: every format in every group, rounded to nearest, on real text.

    python -m benchmarks.formats MODEL --text FILE [--text FILE …] [--pieces 1] [--tokens 512]
        [--kinds sign,…] [--groups 64,128,32,96,192,channel] [--out benchmarks/results/formats]

The matrices inside the blocks are rounded as `rtn{clip=mse}` does; embedding and head stay float. The first documents
of each text are read as the tokenizer gives them, and all tokens but the first are predicted. With int8 activations,
whatever a matrix in a block reads is quantised a token as on the board. Rows are written as they are finished, and a
second start with the same texts goes on.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hikui.lowering.artefact.text import read_text, split_documents
from hikui.lowering.formats import KINDS, Format, quantize_activation
from hikui.passes.quantise.rounding import dequantise, round_matrix

GROUPS = "64,128,32,96,192,channel"


@dataclass(frozen=True)
class Row:
    """One format.

    Attributes:
        true_bits: of the rounded matrices, scales and padding counted.
        weight_error: ‖W − Ŵ‖ / ‖W‖ over all of them.
        bits_per_char: with float activations.
        bits_per_char_a8: with int8 activations.
        divergence: KL from the float model with float activations, nats a token.
        divergence_a8: with int8 activations.
    """

    format: str
    true_bits: float
    weight_error: float
    bits_per_char: float
    bits_per_char_a8: float
    divergence: float
    divergence_a8: float


class Bench:
    """A model, its pieces of text, and what the float model says of them.

    Args:
        model: a Hugging Face folder.
        texts: files of documents.
        pieces: documents of each file.
        tokens: of a document, at most.

    Attributes:
        linears: the matrices inside the blocks.
        names: theirs, without the path of the blocks.
        tokens: predicted ones.
    """

    def __init__(self, model: Path, texts: Sequence[Path], pieces: int, tokens: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
        self._ids: list[Tensor] = []
        self._characters = 0
        for path in texts:
            for document in split_documents(read_text(path))[:pieces]:
                ids = tokenizer(document)["input_ids"][:tokens]
                self._ids.append(torch.tensor([ids]))
                self._characters += len(tokenizer.decode(ids)) - len(tokenizer.decode(ids[:1]))
        self.names: list[str] = []
        self.linears: list[nn.Linear] = []
        for name, module in self._blocks().named_modules():
            if isinstance(module, nn.Linear):
                self.names.append(name)
                self.linears.append(module)
        self._weights = [linear.weight.detach().clone() for linear in self.linears]
        with torch.no_grad():
            self._float = [self._logs(ids) for ids in self._ids]
        self.tokens = sum(ids.shape[1] - 1 for ids in self._ids)

    def _blocks(self) -> nn.ModuleList:
        lists = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    def _logs(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(ids).logits[0, :-1]
        return logits.log_softmax(-1)

    @torch.no_grad()
    def figures(self, *, int8: bool = False) -> tuple[float, float]:
        """Bits per character, and nats a token from the float model, of the model as it stands."""
        hooks = [linear.register_forward_pre_hook(_to_int8) for linear in self.linears] if int8 else []
        nats = divergence = 0.0
        try:
            for ids, known in zip(self._ids, self._float, strict=True):
                logs = self._logs(ids)
                nats -= float(logs.gather(1, ids[0, 1:, None]).double().sum())
                divergence += float((known.exp() * (known - logs)).sum(-1).double().sum())
        finally:
            for hook in hooks:
                hook.remove()
        return nats / math.log(2) / self._characters, divergence / self.tokens

    @torch.no_grad()
    def measure(self, fmt: Format) -> Row:
        """Rounds every matrix and runs the texts; the matrices are float again afterwards."""
        lost = whole = 0.0
        stored = count = 0
        for linear, weight in zip(self.linears, self._weights, strict=True):
            rounded = dequantise(round_matrix(weight, fmt), fmt)
            lost += float((rounded - weight).double().square().sum())
            whole += float(weight.double().square().sum())
            stored, count = stored + fmt.nbytes(*weight.shape), count + weight.numel()
            linear.weight.copy_(rounded)
        plain, quantised = self.figures(), self.figures(int8=True)
        for linear, weight in zip(self.linears, self._weights, strict=True):
            linear.weight.copy_(weight)
        return Row(
            str(fmt), 8 * stored / count, math.sqrt(lost / whole), plain[0], quantised[0], plain[1], quantised[1]
        )


def _to_int8(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    q, scale, _ = quantize_activation(x)
    return (q[..., : x.shape[-1]] * scale.unsqueeze(-1),)


def formats(kinds: str, groups: str) -> Iterator[Format]:
    """The rows of the table, group after group."""
    for group in groups.split(","):
        for kind in kinds.split(","):
            yield Format.parse(f"{kind}-channel" if group == "channel" else f"{kind}-g{group}")


def table(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown, kind after kind, under what they were measured on."""
    order = {kind: index for index, kind in enumerate(KINDS)}

    def place(row: dict[str, Any]) -> tuple[int, float]:
        fmt = Format.parse(str(row["format"]))
        return order[fmt.kind], math.inf if fmt.group is None else fmt.group

    lines = [
        f"{head['model']}: {head['tokens']} tokens of {head['pieces']} documents; float {head['float']:.4f} bits per "
        f"character, with int8 activations {head['float_a8']:.4f}.",
        "",
        "| format | true bits | weight error | bits/char | with int8 activations | KL to float, nats a token |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        "| {format} | {true_bits:.3f} | {weight_error:.4f} | {bits_per_char:.4f} | {bits_per_char_a8:.4f} | "
        "{divergence:.4f} |".format(**row)
        for row in sorted(rows, key=place)
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures what is not in the JSON file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--pieces", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--groups", default=GROUPS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "formats")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.model, options.text, options.pieces, options.tokens)
    head: dict[str, Any] = {
        "model": options.model.name,
        "texts": [path.name for path in options.text],
        "pieces": options.pieces * len(options.text),
        "tokens": bench.tokens,
        "float": bench.figures()[0],
        "float_a8": bench.figures(int8=True)[0],
    }
    kept = options.out.with_suffix(".json")
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {"head": head, "rows": []}
    if found["head"] != head:
        parser.error(f"{kept} was measured on something else; remove it, or choose another --out.")
    done = {row["format"] for row in found["rows"]}
    wanted = [fmt for fmt in formats(options.kinds, options.groups) if str(fmt) not in done]
    for number, fmt in enumerate(wanted, 1):
        start = time.perf_counter()
        row = asdict(bench.measure(fmt))
        found["rows"].append(row)
        kept.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        options.out.with_suffix(".md").write_text(table(head, found["rows"]), "utf-8")
        seconds = time.perf_counter() - start
        print(f"{number}/{len(wanted)} {fmt}: {row['bits_per_char']:.4f} bits/char, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
