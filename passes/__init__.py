"""The passes: one file each.

`PASSES` are those that come with hikui; installed packages add theirs through entry points of the group
`hikui.passes`, and `available` gives both.
"""

from importlib.metadata import entry_points

from hikui.lowering.errors import HikuiError
from hikui.lowering.pipeline.contract import Pass
from hikui.passes.measure.calibrate import Calibrate
from hikui.passes.measure.guide import Guide
from hikui.passes.precision.assign import Assign
from hikui.passes.precision.mixed import Mixed
from hikui.passes.precision.override import Override
from hikui.passes.precision.sensitivity import Sensitivity
from hikui.passes.precision.trial import Trial
from hikui.passes.quantise.adopt import Adopt
from hikui.passes.quantise.embedding import Embedding
from hikui.passes.quantise.factorise import Factorise
from hikui.passes.quantise.gptq import Gptq
from hikui.passes.quantise.hqq import Hqq
from hikui.passes.quantise.learned.distil import Distil
from hikui.passes.quantise.learned.learned_clip import LearnedClip
from hikui.passes.quantise.learned.qat import Qat
from hikui.passes.quantise.mxfp4 import Mxfp4
from hikui.passes.quantise.pack import Pack
from hikui.passes.quantise.qep import Qep
from hikui.passes.quantise.rtn import Rtn
from hikui.passes.rewrite.activation import Activation
from hikui.passes.rewrite.canonicalise import Canonicalise
from hikui.passes.rewrite.dead_code import DeadCode
from hikui.passes.rewrite.fuse import Fuse
from hikui.passes.rewrite.kv_cache import KvCache
from hikui.passes.rewrite.sub_branch import SubBranch
from hikui.passes.transform.awq import Awq
from hikui.passes.transform.rotate import Rotate
from hikui.passes.transform.smooth import Smooth

__all__ = [
    "ENTRY_POINTS",
    "PASSES",
    "Activation",
    "Adopt",
    "Assign",
    "Awq",
    "Calibrate",
    "Canonicalise",
    "DeadCode",
    "Distil",
    "Embedding",
    "Factorise",
    "Fuse",
    "Gptq",
    "Guide",
    "Hqq",
    "KvCache",
    "LearnedClip",
    "Mixed",
    "Mxfp4",
    "Override",
    "Pack",
    "Qat",
    "Qep",
    "Rotate",
    "Rtn",
    "Sensitivity",
    "Smooth",
    "SubBranch",
    "Trial",
    "available",
]

PASSES: tuple[type[Pass], ...] = (
    Canonicalise,
    Rotate,
    Guide,
    Calibrate,
    Smooth,
    Awq,
    Sensitivity,
    Trial,
    Override,
    Adopt,
    Assign,
    Mixed,
    Qep,
    Factorise,
    Rtn,
    Hqq,
    Mxfp4,
    Gptq,
    LearnedClip,
    Qat,
    Distil,
    SubBranch,
    Activation,
    KvCache,
    Fuse,
    Pack,
    Embedding,
    DeadCode,
)
"""In the order in which a recipe usually has them."""

ENTRY_POINTS = "hikui.passes"


def available() -> tuple[type[Pass], ...]:
    """The passes of hikui and of installed third parties, by name.

    Raises:
        HikuiError: an entry point is no pass, or takes a name that is taken.
    """
    found = {kind.name: kind for kind in PASSES}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: (entry.name, entry.value)):
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Pass)):
            raise HikuiError(f"Entry point {entry.name} of group {ENTRY_POINTS} ({entry.value}) is no pass.")
        if kind.name in found:
            raise HikuiError(f"Entry point {entry.value} brings a pass '{kind.name}', a name that is taken.")
        found[kind.name] = kind
    return tuple(found.values())
