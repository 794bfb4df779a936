"""What every registered pass promises: its input stays, and `modified` says whether another program comes out."""

from pathlib import Path

import pytest

from hikui.lowering.ir.printer import to_text
from hikui.lowering.pipeline.contract import Pass, PassContext
from hikui.lowering.pipeline.run import InputUnchanged, Pipeline
from hikui.lowering.pipeline.text import parse_pipeline
from hikui.lowering.trace import trace
from hikui.passes import PASSES
from tests.lowering.checkpoint.quantised_folders import write_model
from tests.passes.helpers import calibration, lower, traced

AFTER = {
    "canonicalise": "",
    "rotate": "canonicalise",
    "guide": "canonicalise",
    "calibrate{gram=true}": "canonicalise",
    "smooth": "canonicalise,calibrate",
    "awq": "canonicalise,calibrate{gram=true}",
    "sensitivity": "canonicalise,calibrate",
    "trial{texts=2}": "canonicalise",
    "override{sites=q_proj}": "canonicalise",
    "adopt": "canonicalise",
    "assign{target_bpw=7.5}": "canonicalise,calibrate,sensitivity",
    "mixed{group=32,share=0.7}": "canonicalise,calibrate",
    "qep": "canonicalise",
    "factorise{bits=3,iterations=9}": "canonicalise,qep{alpha=1,residual=1}",
    "rtn": "canonicalise",
    "hqq": "canonicalise",
    "mxfp4": "canonicalise",
    "gptq": "canonicalise,qep",
    "learned_clip{epochs=1}": "canonicalise",
    "qat{lr=0.05}": "canonicalise,rtn{bits=2,group=32}",
    "distil{lr=0.02}": "canonicalise,rtn{bits=2,group=32}",
    "sub_branch{rank=2}": "canonicalise,calibrate,rtn",
    "activation": "canonicalise,rtn",
    "kv_cache": "canonicalise",
    "fuse": "canonicalise,rtn,activation",
    "pack": "canonicalise",
    "embedding": "canonicalise,pack",
    "dead_code": "canonicalise,rtn",
}
"""Each pass, and what makes a program that it has something to do on."""


def test_none_is_left_out() -> None:
    assert [parse_pipeline(text, PASSES)[0].name for text in AFTER] == [kind.name for kind in PASSES]


@pytest.mark.parametrize("text", AFTER)
def test_the_input_stays_and_modified_tells_the_truth(text: str, tmp_path: Path) -> None:
    if text == "adopt":
        write_model(tmp_path, act_order=True)
    program = trace(tmp_path) if text == "adopt" else traced("llama")
    data = calibration(program)
    program = lower(program, AFTER[text], data) if AFTER[text] else program
    (step,) = parse_pipeline(text, PASSES)
    before, keys = to_text(program), program.store.keys()
    first = step.run(program, PassContext(data))
    assert first.modified, "the program gives it something to do"
    assert first.program is not program
    assert to_text(first.program) != before or first.program.store.keys() != keys
    assert to_text(program) == before
    assert program.store.keys() == keys
    again = step.run(first.program, PassContext(data))
    assert again.modified == (again.program is not first.program)


def test_a_pass_without_run_cannot_be_made() -> None:
    class Idle(Pass):
        name = "idle"

    with pytest.raises(TypeError, match="abstract method"):
        Idle()  # type: ignore[abstract]


def test_the_check_of_debug_runs_over_a_whole_recipe() -> None:
    program = traced("llama")
    pipeline = Pipeline(parse_pipeline("canonicalise,calibrate,rtn,sub_branch,activation,fuse,dead_code", PASSES))
    pipeline.callbacks = (InputUnchanged(),)
    pipeline.run(program, PassContext(calibration(program)))
