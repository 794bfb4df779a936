import re

from hikui.lowering.artefact.manifest import sha256
from hikui.models import reference


def test_the_checkpoint_is_the_one_of_the_card_and_small_enough_for_git() -> None:
    folder = reference.path()
    card = (folder / "CARD.md").read_text("utf-8")
    digests = re.findall(r"`([0-9a-f]{64})`", card)
    assert digests == [sha256(folder / "model.safetensors")]
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "train.py").is_file()
