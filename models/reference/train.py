"""How the reference model was trained: `python models/reference/train.py MINUTES CORPUS_DIR OUT_DIR`.

It ran on a CPU in bf16 autocast with two threads. The learning rate follows the clock, so the result depends on the
machine's speed: the weights beside this file are the reference, this script is its record.
"""

import lzma
import math
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEQUENCE, BATCH, VOCABULARY = 256, 4, 2048
PEAK_LR, WARMUP_STEPS, STORY_SHARE = 2e-3, 200, 0.6
END = "<|endoftext|>"


def read(corpus: Path, name: str) -> str:
    """A text of the corpus, which may be packed."""
    packed = corpus / f"{name}.txt.xz"
    if not packed.exists():
        return (corpus / f"{name}.txt").read_text("utf-8")
    with lzma.open(packed, "rt", encoding="utf-8") as file:
        return file.read()


def make_tokenizer(stories: str, kids: str) -> Tokenizer:
    """Byte-level BPE, trained on all stories and the start of the books."""
    tok = Tokenizer(models.BPE(byte_fallback=False))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(stories.split(END) + kids[:6_000_000].split(END), trainer)
    return tok


def encode(tok: Tokenizer, text: str) -> tuple[npt.NDArray[np.uint16], int]:
    """Token ids (uint16) of all documents, each as <s> … </s>, and the number of characters in them."""
    docs = [d.strip() for d in text.split(END) if d.strip()]
    ids = [i for e in tok.encode_batch(docs, add_special_tokens=False) for i in (0, *e.ids, 1)]
    return np.array(ids, dtype=np.uint16), sum(map(len, docs))


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, ids: npt.NDArray[np.uint16], windows: int = 60) -> float:
    """Mean loss, in nats a token, over the first windows."""
    model.eval()
    n = min((len(ids) - 1) // SEQUENCE, windows)
    chunks = (torch.from_numpy(ids[i * SEQUENCE : (i + 1) * SEQUENCE].astype(np.int64))[None] for i in range(n))
    loss = sum(float(model(input_ids=x, labels=x).loss) for x in chunks) / n
    model.train()
    return loss


def main(minutes: float, corpus: Path, out: Path) -> None:
    """Trains for so many minutes and saves the model with its tokenizer."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    stories, kids = read(corpus, "train.stories"), read(corpus, "train.kids")
    tok = make_tokenizer(stories, kids)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tok, **special).save_pretrained(out)
    story_ids, _ = encode(tok, stories)
    kid_ids, _ = encode(tok, kids[:30_000_000])
    valid_ids, valid_chars = encode(tok, read(corpus, "valid.stories"))
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            num_hidden_layers=6,
            intermediate_size=768,
            vocab_size=VOCABULARY,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        lr = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) * (0.475 * (1 + math.cos(math.pi * progress)) + 0.05)
        for group in optimiser.param_groups:
            group["lr"] = lr
        rows = []
        for _ in range(BATCH):
            source = story_ids if rng.random() < STORY_SHARE else kid_ids
            at = rng.integers(0, len(source) - SEQUENCE)
            rows.append(source[at : at + SEQUENCE].astype(np.int64))
        x = torch.from_numpy(np.stack(rows))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % 500 == 0:
            bits = validation_loss(model, valid_ids) / math.log(2) * len(valid_ids) / valid_chars
            print(f"{step} {progress:.3f} loss {loss.item():.3f} bits/char {bits:.4f}", flush=True)
    model.save_pretrained(out)


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
