"""Each library computes the product that it is timed with."""

import numpy as np
import pytest
from benchmarks.kernels import peers
from benchmarks.kernels.contestant import (
    GROUP,
    Contestant,
    Prepared,
    UnavailableError,
    Workload,
    activations,
    random_bytes,
)
from numpy.typing import NDArray

WORKLOADS = [Workload(1, 64, 512, 1, False), Workload(17, 64, 512, 2, False)]
FOUND, ABSENT = peers.find()


def run(contestant: Contestant, workload: Workload) -> tuple[Prepared, NDArray[np.float64]]:
    try:
        prepared = contestant.prepare(workload)
    except UnavailableError as error:
        pytest.skip(str(error))
    for step in prepared.steps:
        step()
    assert prepared.result is not None
    return prepared, np.asarray(prepared.result(), np.float64)


def correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def codes(bits: int, n: int, k: int) -> NDArray[np.float64]:
    """What `random_bytes` stands for: fields from the lowest bit up, the middle of their range at zero."""
    packed = random_bytes((n, k // GROUP, GROUP * bits // 8), 1)[0]
    fields = (packed[..., np.newaxis] >> np.arange(0, 8, bits, dtype=np.uint8)) & (2**bits - 1)
    out: NDArray[np.float64] = fields.reshape(n, k).astype(np.float64) - 2 ** (bits - 1)
    return out


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
@pytest.mark.parametrize("contestant", FOUND, ids=lambda contestant: contestant.name)
def test_a_peer_multiplies(contestant: Contestant, workload: Workload) -> None:
    prepared, y = run(contestant, workload)
    x = activations(workload).astype(np.float64)
    n, k = workload.n, workload.k
    if contestant.name.startswith("ggml"):
        # What was packed there are these 16 rows, repeated; so few bits keep only part of them. The ternary types
        # round to 0 what is below half of a block's maximum, about 1.45 deviations: a correlation of 0.7 is left.
        values = np.random.default_rng(1).standard_normal((16, k), np.float32).astype(np.float64)
        least = {8: 0.9999, 4: 0.99, 3: 0.97, 2: 0.9, 1: 0.6}[int(prepared.bits)]
        expected = x @ np.tile(values, (n // 16, 1)).T
        assert correlation(y, expected) > (0.5 if "_tq" in contestant.name else least)
        return
    if contestant.name == "torch_int4pack":
        weight = (random_bytes((n, k), 1)[0] & 15).astype(np.float64) - 7
    elif contestant.name in ("torch_int8pack", "openvino_i8"):
        weight = random_bytes((n, k), 1)[0].view(np.int8).astype(np.float64)
    elif contestant.name == "openvino_i4":
        weight = (codes(4, n, k) + 8 + 8) % 16 - 8
    elif contestant.name == "openvino_u2":
        weight = codes(2, n, k) + 0.5
    else:
        weight = codes(int(contestant.name[4]), n, k)
    assert correlation(y, x @ weight.T) > 0.999
    assert prepared.bits == pytest.approx(8 * prepared.nbytes / (n * k))


def test_a_library_that_is_not_installed_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_MODULES", ("onnxruntime", "nobody"))
    found, absent = peers.find()
    assert {contestant.name.partition("_")[0] for contestant in found} == {"ort"}
    assert len(absent) == 1 and absent[0].startswith("nobody is left out: No module named")


def test_cold_steps_cover_every_copy() -> None:
    workload = Workload(1, 4096, 4096, 1, True)
    contestant = next(contestant for contestant in FOUND if contestant.name == "torch_int8pack")
    prepared = contestant.prepare(workload)
    assert len(prepared.steps) * prepared.products * prepared.nbytes >= 150_000_000
