import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.kernels import plot, quick, report
from benchmarks.kernels.contestant import UnavailableError
from benchmarks.kernels.harness import Row

OURS = Row(
    "int4", True, 4.125, 1, 4096, 4096, 1, True, 500.0, 490.0, 520.0, 33.55, 17.3, "read_8_streams", 0.81, 0.004, None,
    "ort_4bit_acc4", 21.3, 1.57,
)  # fmt: skip
PEER = Row(
    "ort_4bit_acc4", False, 4.25, 1, 4096, 4096, 1, True, 790.0, 780.0, 800.0, 21.3, 11.3, "read_8_streams", 0.53
)
FUSED = replace(OURS, name="int4_branch64_fused", over_plain=1.1, peer=None, peer_gmacs=None, times_peer=None)
ABOUT = {"cpu": "A CPU", "cores": 2, "isa": "avx2", "limits": {"vnni_1t_gmacs": 226.0}, "versions": {"torch": "2.13"}}


def test_markdown_has_a_table_for_each_shape_with_settings_across() -> None:
    cached = replace(OURS, cold=False, gmacs=60.0, share_of_limit=0.26)
    text = report.markdown([OURS, PEER, FUSED, cached, replace(OURS, m=512)], ABOUT)
    assert text.startswith("A CPU, avx2, 2 cores; torch 2.13\n")
    assert text.count("### N=4096 K=4096") == 2
    assert "| | bits | 1 thread, cold | 1 thread, in cache |" in text
    assert "| **int4** | 4.125 | 33.5 (0.81; 1.57×) | 60.0 (0.26; 1.57×) |" in text
    assert "| ort_4bit_acc4 | 4.25 | 21.3 (0.53) | – |" in text
    assert "| int4_branch64_fused | M=1 N=4096 K=4096, 1T, cold | 1.100 |" in text
    assert "| int4 | N=4096 K=4096, cold | 0.40 % |" in text


def test_the_quick_file_has_our_rows_with_the_agreed_fields() -> None:
    (entry,) = quick.entries([OURS, PEER])
    agreed = {"name", "bits", "m", "n", "k", "threads", "cold", "gmacs", "share_of_limit", "peer", "peer_gmacs"}
    assert agreed | {"limit"} <= set(entry)
    assert (entry["peer"], entry["peer_gmacs"], entry["limit"]) == ("ort_4bit_acc4", 21.3, "read_8_streams")


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "quick.json"
    report.write_json(path, quick.entries([OURS]))
    assert json.loads(path.read_text())[0]["name"] == "int4"


def test_the_picture_is_the_same_each_time_or_says_what_it_needs(tmp_path: Path) -> None:
    rows, paths = [OURS, PEER, FUSED, replace(OURS, m=512)], [tmp_path / "one.svg", tmp_path / "two.svg"]
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(UnavailableError, match=r"pip install 'hikui\[plot\]'"):
            plot.draw(rows, paths[0])
        return
    for path in paths:
        plot.draw(rows, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"branch" not in paths[0].read_bytes()
