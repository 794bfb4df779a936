"""How fast a machine multiplies each kind of weights, as `hikui bench --json` has written it there."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hikui.lowering.errors import HikuiError
from hikui.lowering.formats import KINDS, Format
from hikui.lowering.json_text import parse_json
from hikui.passes.precision.latency import Speeds


class _Product(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    format: str
    m: int
    gmacs: float = Field(gt=0)


class _Bench(BaseModel):
    model_config = ConfigDict(extra="ignore")

    products: list[_Product] = Field(min_length=1)


def read_speeds(path: str | Path) -> Speeds:
    """The speeds with one row of activations, by kind; what is timed of mixed formats is that of their kinds.

    Raises:
        HikuiError: the file cannot be read, or is none that `hikui bench --json` writes.
    """
    try:
        found = _Bench.model_validate(parse_json(Path(path).read_text("utf-8-sig")))
        named = [(Format.parse(product.format).kind, product) for product in found.products if product.m == 1]
        speeds = {kind: product.gmacs for kind, product in named if kind in KINDS}
        if not speeds:
            raise ValueError("it has no product with one row of activations")
    except OSError as error:
        raise HikuiError(
            f"{path} cannot be read: {error.strerror or error}; name what a machine has written."
        ) from None
    except (ValidationError, ValueError, HikuiError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise HikuiError(
            f"{path} is not what `hikui bench --json` writes ({what.rstrip('.')}); run that on the machine it is for."
        ) from None
    return Speeds(speeds)
