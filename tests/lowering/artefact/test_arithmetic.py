from pathlib import Path

import pytest

from hikui.lowering.artefact.arithmetic import arithmetic, blas, cpu_make


@pytest.mark.parametrize(
    ("configuration", "name"),
    [
        (
            "PyTorch built with:\n  - GCC 13.3\n  - Intel(R) oneAPI Math Kernel Library Version 2024.2\n"
            "  - Build settings: BLAS_INFO=mkl, BUILD_TYPE=Release\n",
            "Intel(R) oneAPI Math Kernel Library Version 2024.2",
        ),
        ("PyTorch built with:\n  - Build settings: BLAS_INFO=open, BUILD_TYPE=Release\n", "open"),
        ("", "unknown"),
    ],
)
def test_the_blas_is_read_from_torchs_description(configuration: str, name: str) -> None:
    assert blas(configuration) == name


@pytest.mark.parametrize(
    ("cpuinfo", "make"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\n"
            "processor\t: 1\nvendor_id\t: SomethingElse\n",
            "vendor_id AuthenticAMD cpu family 25 model 1",
        ),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n", "CPU implementer 0x41 CPU part 0xd0b"),
    ],
)
def test_the_make_of_cpu_is_the_first_processors(tmp_path: Path, cpuinfo: str, make: str) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu_make(tmp_path / "cpuinfo").partition(" ")[2] == make


def test_switches_are_named_where_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    assert set(arithmetic()) >= {"blas", "cpu", "cpu_capability"}
    assert "MKL_CBWR" not in arithmetic()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert arithmetic()["MKL_CBWR"] == "COMPATIBLE"
