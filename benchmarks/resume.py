"""Kills `hikui lower` at random moments, goes on, and compares the artefact with that of an undisturbed run.

    python -m benchmarks.resume --calibration TEXT [--model reference] [--recipe gptq-qep-3bit] [--kills 10] [--seed 0]

Each round starts `lower`, kills it with SIGKILL after a time drawn between nothing and what an undisturbed run takes,
and starts it again. Prints what each round took; exit status 1 where any file of any artefact differs.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, by its path in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main() -> None:
    """Prints a line a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--recipe", default="gptq-qep-3bit")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "artefact"
        lower = [
            sys.executable, "-m", "hikui.lowering.app.cli", "lower", options.model, "--recipe", options.recipe,
            "--calibration", str(options.calibration), "-o", str(output),
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run([*lower, "--no-resume"], check=True, stdout=subprocess.DEVNULL)
        whole, want = time.perf_counter() - start, digest(output)
        print(f"undisturbed: {whole:.1f} s, {len(want)} files")
        differing = 0
        for number in range(1, options.kills + 1):
            shutil.rmtree(output)
            moment = generator.uniform(0, whole)
            process = subprocess.Popen(lower, stdout=subprocess.DEVNULL)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            killed = process.wait() == -signal.SIGKILL
            kept = sum(1 for path in Path(folder).glob(".*.resume/**/*.safetensors") if path.is_file())
            left = ", and the artefact was there already" if output.exists() or not killed else ""
            start = time.perf_counter()
            subprocess.run(lower, check=True, stdout=subprocess.DEVNULL)
            seconds, same = time.perf_counter() - start, digest(output) == want
            differing += not same
            print(
                f"{number}: killed after {moment:.1f} s ({kept} files of finished work{left}), "
                f"then {seconds:.1f} s, {'the same bytes' if same else 'DIFFERENT'}",
                flush=True,
            )
    if differing:
        raise SystemExit(f"{differing} of {options.kills} artefacts differ.")


if __name__ == "__main__":
    main()
