from pathlib import Path

import minisign
import pytest

from hikui.lowering.artefact.manifest import MANIFEST, SIGNATURE, inventory
from hikui.lowering.artefact.signature import signer_comment
from hikui.lowering.errors import HikuiError, UsageError


@pytest.fixture(name="signed")
def _signed(tmp_path: Path) -> tuple[Path, Path]:
    """An artefact's folder, as far as a signature goes, and the key that it is signed with."""
    folder, keys = tmp_path / "artefact", minisign.KeyPair.generate()
    folder.mkdir()
    (folder / MANIFEST).write_text('{"schema": 1}')
    signature = keys.secret_key.sign((folder / MANIFEST).read_bytes(), trusted_comment="release 1")
    (folder / SIGNATURE).write_bytes(bytes(signature))
    (tmp_path / "key.pub").write_bytes(bytes(keys.public_key) + b"\n")
    return folder, tmp_path / "key.pub"


def test_a_signed_manifest_gives_its_comment_and_the_signature_is_no_stranger(signed: tuple[Path, Path]) -> None:
    folder, key = signed
    assert signer_comment(folder, key) == "release 1"
    assert inventory(folder) == {}


def test_a_changed_manifest_another_key_and_a_changed_comment_are_refused(signed: tuple[Path, Path]) -> None:
    folder, key = signed
    whole = (folder / SIGNATURE).read_bytes()
    (folder / SIGNATURE).write_bytes(whole.replace(b"release 1", b"release 2"))
    with pytest.raises(HikuiError, match="no signature of this manifest"):
        signer_comment(folder, key)
    (folder / SIGNATURE).write_bytes(whole)
    other = key.with_name("other.pub")
    other.write_bytes(bytes(minisign.KeyPair.generate().public_key) + b"\n")
    with pytest.raises(HikuiError, match=r"owner of .*other\.pub"):
        signer_comment(folder, other)
    (folder / MANIFEST).write_text('{"schema": 1 }')
    with pytest.raises(HikuiError, match="no signature of this manifest"):
        signer_comment(folder, key)


def test_what_is_missing_or_no_key_is_named(signed: tuple[Path, Path]) -> None:
    folder, key = signed
    with pytest.raises(UsageError, match=r"nowhere\.pub cannot be read: No such file"):
        signer_comment(folder, key.with_name("nowhere.pub"))
    with pytest.raises(UsageError, match="is no public key of minisign"):
        signer_comment(folder, folder / MANIFEST)
    (folder / SIGNATURE).write_bytes(b"\xff" * 40)
    with pytest.raises(HikuiError, match="no signature of this manifest"):
        signer_comment(folder, key)
    (folder / SIGNATURE).unlink()
    with pytest.raises(HikuiError, match=r"is not signed: it has no manifest\.json\.minisig"):
        signer_comment(folder, key)
