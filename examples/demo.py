"""What `make demo` shows: one model, lowered for every backend and board, telling the same story everywhere.

The reference model is lowered with the recipe `int4`; the interpreter of the lowered graph says what is right. Boards
of another architecture run under qemu-user; where that or a compiler is missing they are left out, with a word. Where
`hikui fetch smollm2` has brought a real chat model, it is lowered too and asked a question.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
import numpy as np

from hikui.lowering.app.lower import BACKENDS, build, prepare
from hikui.lowering.app.request import Request
from hikui.lowering.app.runners import load
from hikui.lowering.artefact import verify
from hikui.lowering.artefact.generate import Runner, generate
from hikui.lowering.artefact.manifest import Reference
from hikui.lowering.artefact.target import machine_triple, resolve
from hikui.lowering.artefact.text import TextCodec
from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.interpreter import ReferenceRunner
from hikui.models.fetched import SMOLLM2

MODEL = "reference"
RECIPE = "int4"
PROMPT = "One day, a girl named"
TOKENS = 64
CHAT_RECIPE = "rtn-4bit"
"""Rounding to nearest takes a minute of a real model; the recipe above, which learns, twenty."""

QUESTION, ANSWER_TOKENS, CHAT_CONTEXT = "What is the capital of France?", 24, 256

BOARDS = ("raspberry-pi-4", "raspberry-pi-5")


def boards() -> Iterator[tuple[str, str | None]]:
    """The targets to show, each with the reason why it cannot be shown here, if there is one."""
    yield "host", None
    for name in BOARDS:
        triple = resolve(name).triple
        machine = triple.partition("-")[0]
        if triple != machine_triple() and shutil.which(f"qemu-{machine}") is None:
            yield name, f"qemu-{machine} is not installed"
        else:
            yield name, None


def compare(told: Reference, got: list[int], runner: Runner, allowed: float) -> tuple[bool, str]:
    """Whether a runner continues a prompt as it should, and that in words.

    Activations are rounded to 8 bits, so a difference in the last bit of a sum can round one of them the other way;
    where the two best logits lie closer than that moves them, either token is right and another story follows. Then
    the runner's logits along the story as it was told decide, by the measure of `hikui verify`, and the token that it
    took must be one that logits so far apart can put first.

    Args:
        told: the prompt with its continuation, and the interpreter's logits of it.
        got: the runner's continuation.
        runner: what gave it.
        allowed: how far logits may be from the interpreter's, relative to the largest.
    """
    expected = told.tokens[told.prompt :].tolist()
    if got == expected:
        return True, "same text"
    same = next((i for i, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]), None)
    if same is None:
        return False, f"DIFFERENT LENGTH: {len(got)} tokens"
    apart = verify.difference(verify.logits(runner, told), told)
    verdict = (
        f"to token {same}, logits of the whole within {apart:.1%} of the interpreter's ({allowed:.1%} is rounding)"
    )
    row = told.logits[same]
    gap = float(row[expected[same]] - row[got[same]]) / float(np.abs(told.logits).max())
    # Written so that a NaN is a difference.
    right = apart <= allowed and gap <= 2 * apart
    return right, f"{'same' if right else 'DIFFERENT: same'} text {verdict}, tokens {gap:.2%} apart there"


def chat(folder: Path) -> None:
    """Lowers the real model for this machine and asks it a question; says how to get it where it is not here."""
    path = SMOLLM2.path()
    if path is None:
        print("\nA real chat model of 135 million parameters: `hikui fetch smollm2`, then `make demo` again.")
        return
    better = f"{RECIPE} is better and takes twenty minutes"
    print(f"\n{SMOLLM2.name}, {CHAT_RECIPE} ({better}): {QUESTION}", flush=True)
    start = time.perf_counter()
    prepared = prepare(Request(path, CHAT_RECIPE, context=CHAT_CONTEXT))
    tokenizer = prepared.program.tokenizer
    assert tokenizer is not None, "the file has a tokenizer"
    template = tokenizer.beside()["chat_template.jinja"].decode()
    messages = [{"role": "user", "content": QUESTION}]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
    prompt = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    artefact = build(prepared, folder / SMOLLM2.name)
    with load(artefact.directory) as model:
        answer, result = model.generate(prompt, max_new_tokens=ANSWER_TOKENS)
    print(
        f"{f'{BACKENDS[0]} on host':<30} {answer.strip()}\n{'':<30} {len(result.tokens)} tokens, "
        f"{artefact.manifest.sizes.total_bytes / 1e6:.1f} MB in all; {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def main(folder: Path) -> int:
    """Runs the demonstration; the exit status is 0 where all tell the same."""
    start = time.perf_counter()
    prepared = prepare(Request(MODEL, RECIPE))
    config = prepared.program.config
    assert prepared.program.tokenizer is not None, "the reference model has its tokenizer"
    codec = TextCodec(prepared.program.tokenizer)
    prompt = codec.encode_prompt(PROMPT)
    reference = ReferenceRunner(prepared.program)
    expected = generate(reference, prompt, max_new_tokens=TOKENS, stop=config.eos_token_ids).tokens
    told = Reference(np.array([*prompt, *expected]), len(prompt), np.empty((0, 0), np.float32))
    told = replace(told, logits=verify.logits(reference, told))
    print(f"{PROMPT}{codec.decode([*prompt, *expected]).removeprefix(PROMPT)}\n")
    print(f"{'interpreter':<30} {len(expected)} tokens, {time.perf_counter() - start:.0f} s", flush=True)
    equal = True
    for target, missing in boards():
        for backend in BACKENDS:
            name = f"{backend} on {target}"
            if missing is not None:
                print(f"{name:<30} left out: {missing}")
                continue
            start = time.perf_counter()
            try:
                artefact = build(prepared, folder / f"{backend}-{target}", target=target, backend=backend)
                with load(artefact.directory, emulate=target != "host") as model:
                    _, result = model.generate(PROMPT, max_new_tokens=TOKENS)
                    allowed = verify.tolerance(model.artefact)
                    right, verdict = compare(told, result.tokens, model.runner, allowed)
            except HikuiError as error:
                if target == "host":
                    raise
                print(f"{name:<30} left out: {error}", flush=True)
                continue
            equal &= right
            sizes = artefact.manifest.sizes
            print(
                f"{name:<30} {len(result.tokens)} tokens, {verdict}; {sizes.true_bpw:.3f} bits/weight, "
                f"{sizes.weight_bytes / 1e6:.1f} MB of weights, {sizes.total_bytes / 1e6:.1f} MB in all; "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    print("\nAll tell the same." if equal else "\nNot all tell the same.")
    chat(folder)
    return 0 if equal else 1


if __name__ == "__main__":
    with TemporaryDirectory() as directory:
        try:
            sys.exit(main(Path(directory)))
        except HikuiError as error:
            sys.exit(f"demo: {error}")
