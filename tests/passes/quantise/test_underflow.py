"""Matrices whose scales float16 cannot hold are refused, and no others."""

import pytest
import torch
from torch import Tensor

from hikui.lowering.errors import HikuiError
from hikui.lowering.ir.program import Program
from tests.passes.helpers import SMALL_VOCABULARY, calibration, canonical, lower, program_of, random

EMBEDDING = random(SMALL_VOCABULARY, 40)


def one_site(weight: Tensor) -> Program:
    def body(x: Tensor, a__weight: Tensor, b__weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, a__weight), b__weight)

    after = random(SMALL_VOCABULARY, weight.shape[0], seed=3)
    return lower(program_of(body, embedding=EMBEDDING, a__weight=weight, b__weight=after), "canonicalise")


ROUNDERS = [
    "rtn{bits=8,group=32}",
    "rtn{bits=4,clip=minmax}",
    "rtn{format=sign-g32}",
    "hqq{bits=4}",
    "mxfp4",
    "rtn{bits=16}",
    "pack{format=float16}",
]


@pytest.mark.parametrize("pipeline", ROUNDERS)
def test_a_matrix_below_float16_is_refused(pipeline: str) -> None:
    weight = random(70, 40, seed=1)
    lower(one_site(weight * 2.0**-4), pipeline)
    with pytest.raises(HikuiError, match=r"Site a: its weights are so small .* float16 (holds no scale|does not hold)"):
        lower(one_site(weight * 2.0**-30), pipeline)


def test_a_row_that_was_never_trained_is_no_reason() -> None:
    weight = random(70, 40, seed=1)
    weight[5] *= 2.0**-40
    weight[6] = 0
    lower(one_site(weight), "rtn{bits=8}")


def test_one_lost_group_of_a_hundred_weights_is_no_reason_and_half_of_the_matrix_is() -> None:
    weight = random(70, 64, seed=1)[:, :40]
    weight[:35] *= 2.0**-30
    lower(one_site(weight), "rtn{bits=8}")
    weight[35:] *= 2.0**-30
    with pytest.raises(HikuiError, match="for 100 % of it"):
        lower(one_site(weight), "rtn{bits=8}")


def test_a_matrix_of_zeros_is_packed() -> None:
    lower(one_site(torch.zeros(70, 40)), "rtn{bits=8}")
    lower(one_site(torch.zeros(70, 40)), "pack{format=float16}")


def test_factors_that_read_permuted_columns_are_held_against_themselves() -> None:
    program = canonical("llama")
    pipeline = "calibrate{gram=true},mixed{group=32},rtn,sub_branch{rank=2},pack{format=float16}"
    lower(program, pipeline, calibration(program, 8, 40))
