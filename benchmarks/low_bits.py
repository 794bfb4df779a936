"""What each step on the way below two bits is worth: which columns or sites get more bits, stages, inputs, training.

    python -m benchmarks.low_bits MODEL --text VALID --calibration TRAIN --work DIR [--group 64] [--share 0.15]
        [--bits 2] [--documents 60] [--seeds 0,1,2] [--training 256] [--only REGULAR_EXPRESSION] [--jobs 2]

Every variant is a recipe that differs from its neighbour in one thing; `hikui compare` lowers and measures them in the
interpreter, once for each seed of the calibration windows, keeps every finished run under --work, and draws the table
and the picture. The head is int4 in groups of 32 by GPTQ in all of them, and activations are 8 bits.

Columns: of each site's columns a share is int4 and all others are signs, in groups. Sites: each site has one format,
the one that costs least for the same bits as the columns have (--bits says them, as the table of the first run does).
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hikui.lowering.formats import MOST_FACTORS

Passes = Sequence[str | Mapping[str, Mapping[str, object]]]

HEAD = r"(^|\.)lm_head$"
CHANNELS = "sign-channel|int2-channel|int3-channel|int4-channel"
GPTQ: Mapping[str, Mapping[str, object]] = {"gptq": {"sweeps": 1}}
STAGED: Mapping[str, Mapping[str, object]] = {"gptq": {"sweeps": 1, "staged": True}}
FLOAT: Mapping[str, Mapping[str, object]] = {"gptq": {"sweeps": 1, "inputs": "float"}}
STAGED_FLOAT: Mapping[str, Mapping[str, object]] = {"gptq": {"sweeps": 1, "staged": True, "inputs": "float"}}
QAT: Mapping[str, Mapping[str, object]] = {
    "qat": {"activation_bits": 8, "batch": 2, "lr": 0.004, "scale_lr": 0.002, "epochs": 1}
}
ROTATE: Mapping[str, Mapping[str, object]] = {"rotate": {"heads": True, "ends": "float16"}}
AWQ: Mapping[str, Mapping[str, object]] = {"awq": {"bits": 2, "group": 0, "activation_bits": 8, "skip": HEAD}}
QEP: Mapping[str, Mapping[str, object]] = {"qep": {"skip": HEAD}}
WHOLE_QEP: Mapping[str, Mapping[str, object]] = {"qep": {"alpha": 1.0, "skip": HEAD}}
RESIDUAL: Mapping[str, Mapping[str, object]] = {"qep": {"alpha": 1.0, "residual": 1.0, "skip": HEAD}}
DISTIL: Mapping[str, Mapping[str, object]] = {"distil": {"activation_bits": 8, "batch": 2}}


def variants(options: argparse.Namespace) -> dict[str, Passes]:
    """The passes of each variant between `calibrate` and `pack`, with a rotation before both."""

    def mixed(by: str) -> Mapping[str, Mapping[str, object]]:
        return {"mixed": {"group": options.group, "share": options.share, "by": by, "skip": HEAD}}

    def assigned(how: str, formats: str = CHANNELS) -> Passes:
        own: dict[str, object] = {"texts": 2, "skip": HEAD} if how == "trial" else {}
        return [
            {how: {"formats": formats} | own},
            {"assign": {"formats": formats, "target_bpw": options.bits, "over": "blocks"}},
        ]

    def factorised(**others: object) -> Mapping[str, Mapping[str, object]]:
        return {"factorise": {"bits": options.bits, "skip": HEAD} | others}

    shares = (0.6, 0.8, 1.0, 1.3, 1.7, 2.2)
    rates = "|".join(f"factors-{min(MOST_FACTORS, share * options.bits):.3g}" for share in shares)

    uniform: dict[str, Passes] = {
        f"{name}-{how}": [correction, {"gptq": {"sweeps": 1, "format": name}}]
        for name in ("int4-g128", "int3-g128", "int2-g128", "int2-channel", "sign-g128")
        for how, correction in (("qep", QEP), ("whole-qep", WHOLE_QEP), ("residual", RESIDUAL))
    }
    channels: dict[str, Passes] = {}
    for name in ("int2-channel", "ternary-channel"):
        rounds: Mapping[str, Mapping[str, object]] = {"gptq": {"sweeps": 1, "format": name}}
        channels |= {
            name: [rounds],
            f"{name}-qat": [rounds, QAT],
            f"{name}-qep-qat": [QEP, rounds, QAT],
        }
    columns: dict[str, Passes] = {
        f"columns-{by}": [mixed(by), GPTQ] for by in ("output", "pbar", "obs", "activation", "weight", "random")
    }
    factors: dict[str, Passes] = {
        "factors": [factorised(), GPTQ],
        "factors-no-rounds": [factorised(rounds=0), GPTQ],
        "factors-50": [factorised(iterations=50), GPTQ],
        "factors-200": [factorised(iterations=200), GPTQ],
        "factors-quantised": [factorised(inputs="quantised"), GPTQ],
        "factors-qep": [QEP, factorised(), GPTQ],
        "factors-whole-qep": [WHOLE_QEP, factorised(), GPTQ],
        "factors-residual": [RESIDUAL, factorised(), GPTQ],
        "factors-qat": [factorised(), GPTQ, QAT],
        "factors-residual-qat": [RESIDUAL, factorised(), GPTQ, QAT],
        "factors-no-rounds-qat": [factorised(rounds=0), GPTQ, QAT],
        "factors-distil": [factorised(), GPTQ, DISTIL],
        "factors-trial": [*assigned("trial", rates), factorised(), GPTQ],
        "factors-trial-qat": [*assigned("trial", rates), factorised(), GPTQ, QAT],
        "factors-trial-residual-qat": [*assigned("trial", rates), RESIDUAL, factorised(), GPTQ, QAT],
    }
    return {
        **uniform,
        **factors,
        **columns,
        **channels,
        "columns-pbar-staged": [mixed("pbar"), STAGED],
        "columns-random-staged": [mixed("random"), STAGED],
        "columns-pbar-float": [mixed("pbar"), FLOAT],
        "columns-pbar-staged-float": [mixed("pbar"), STAGED_FLOAT],
        "columns-pbar-qep": [mixed("pbar"), QEP, GPTQ],
        "columns-pbar-qep-float": [mixed("pbar"), QEP, FLOAT],
        "columns-pbar-rtn": [mixed("pbar"), {"rtn": {"weighted": True}}],
        "sites-output": [*assigned("sensitivity"), GPTQ],
        "sites-trial": [*assigned("trial"), GPTQ],
        "sites-trial-qep": [*assigned("trial"), QEP, GPTQ],
        "columns-pbar-distil": [mixed("pbar"), GPTQ, DISTIL],
        "columns-pbar-qat": [mixed("pbar"), GPTQ, QAT],
        "rotated-int2-channel": [ROTATE, *channels["int2-channel"]],
        "rotated-int2-channel-qat": [ROTATE, *channels["int2-channel-qat"]],
        "rotated-sites-trial": [ROTATE, *assigned("trial"), GPTQ],
        "rotated-sites-trial-qat": [ROTATE, *assigned("trial"), GPTQ, QAT],
        "awq-sites-trial": [*assigned("trial"), AWQ, GPTQ],
        "awq-sites-trial-qat": [*assigned("trial"), AWQ, GPTQ, QAT],
        "columns-pbar-staged-qat": [mixed("pbar"), STAGED, QAT],
        "columns-random-qat": [mixed("random"), GPTQ, QAT],
        "sites-trial-distil": [*assigned("trial"), GPTQ, DISTIL],
        "sites-trial-qat": [*assigned("trial"), GPTQ, QAT],
        "sites-trial-qep-qat": [*assigned("trial"), QEP, GPTQ, QAT],
    }


def recipe(name: str, passes: Passes, training: int) -> dict[str, Any]:
    """The whole recipe of a variant."""
    learns = any(isinstance(each, Mapping) and each.keys() & {"qat", "distil"} for each in passes)
    return {
        "schema": 1,
        "name": name,
        "description": "a variant of benchmarks.low_bits",
        "calibration": {"samples": 64, "tokens": 256} | ({"training": training} if learns else {}),
        "passes": [
            "canonicalise",
            {"override": {"sites": HEAD, "format": "int4-g32", "required": False}},
            *(each for each in passes if each is ROTATE),
            {"calibrate": {"gram": True}},
            *(each for each in passes if each is not ROTATE),
            {"pack": {"format": "float32"}},
            {"embedding": {"format": "int4-g32"}},
            {"activation": {"bits": 8}},
            "fuse",
            "dead_code",
        ],
    }


def main() -> None:
    """Writes the recipes and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--context", type=int)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--training", type=int, default=256)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    chosen = {name: passes for name, passes in variants(options).items() if re.search(options.only, name)}
    files = []
    for name, passes in chosen.items():
        files.append(options.work / f"{name}.yaml")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text(yaml.safe_dump(recipe(name, passes, options.training), sort_keys=False), "utf-8")
    context = () if options.context is None else ("--context", str(options.context))
    command = (
        sys.executable, "-m", "hikui.lowering.app.cli", "compare", options.model,
        "--recipes", ",".join(map(str, files)), "--seeds", options.seeds, "--text", str(options.text),
        "--calibration", str(options.calibration), "--documents", str(options.documents), "--jobs", str(options.jobs),
        *context, "-o", str(options.work / "runs"),
    )  # fmt: skip
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
