"""Others' formats, with everything counted: the sums that papers and code give for known shapes."""

import pytest

from hikui.lowering.formats.rivals import RIVALS, rival_bits


@pytest.mark.parametrize(
    ("name", "shape", "bits"),
    [
        # NanoQuant, appendix F, Llama-2-7B's square matrices.
        ("BiLLM", (4096, 4096), 2.88),
        ("ARB-LLM, RC", (4096, 4096), 2.51),
        ("HBLLM, row", (4096, 4096), 3.25),
        ("PT²-LLM", (4096, 4096), 1.85),
        ("PTQ1.61", (4096, 4096), 1.61),
        ("CAT-Q, as released", (4096, 4096), 2.125),
        ("GPTQ 2 bits, g64", (4096, 4096), 2.28),
        ("llama.cpp IQ1_S", (576, 1536), 1.5625),
        # Its blocks of 256 columns do not cut 576.
        ("llama.cpp IQ1_S", (576, 576), 4.5),
    ],
)
def test_known_sums(name: str, shape: tuple[int, int], bits: float) -> None:
    assert rival_bits([shape])[name] == pytest.approx(bits, abs=0.006)


def test_matrices_count_by_their_weights() -> None:
    both = rival_bits([(576, 576), (576, 1536)])["llama.cpp TQ1_0"]
    assert both == pytest.approx((576 * 4.5 + 1536 * 1.6875) / (576 + 1536))
    assert list(rival_bits([(64, 64)])) == [rival.name for rival in RIVALS]
    assert rival_bits([]) == {}
