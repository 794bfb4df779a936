"""Who has made an artefact: a minisign signature of its manifest, which holds the hash of every other file.

`minisign -Sm DIR/manifest.json` (https://jedisct1.github.io/minisign) writes it beside the manifest.
"""

import importlib.util
from pathlib import Path

from hikui.lowering.artefact.manifest import MANIFEST, SIGNATURE
from hikui.lowering.errors import HikuiError, UsageError


def signer_comment(directory: Path, public_key: Path) -> str:
    """The comment that the owner of a key has signed together with an artefact's manifest.

    Args:
        directory: the artefact.
        public_key: a minisign public key file.

    Raises:
        UsageError: the key cannot be read, or the library is not installed.
        HikuiError: the manifest is not signed, or not with this key.
    """
    if importlib.util.find_spec("minisign") is None:
        raise UsageError("Signatures are read by py-minisign, which is not installed; pip install 'hikui[sign]'.")
    import minisign

    try:
        key = minisign.PublicKey.from_file(public_key)
    except OSError as error:
        raise UsageError(f"The public key {public_key} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"{public_key} is no public key of minisign: {error}.") from None
    path = directory / SIGNATURE
    try:
        signature = minisign.Signature.from_file(path)
        key.verify((directory / MANIFEST).read_bytes(), signature)
    except FileNotFoundError:
        raise HikuiError(f"{directory} is not signed: it has no {SIGNATURE}.") from None
    except OSError as error:
        raise HikuiError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise HikuiError(
            f"{path} is no signature of this manifest by the owner of {public_key} ({error}); get the artefact again "
            "from its maker."
        ) from None
    return str(signature.trusted_comment)
