"""Train the tests' model: a Llama of 1M parameters with a word-level vocabulary, on sentences of movie reviews.

Writes an ordinary Hugging Face folder (bf16, 2 MB) and a file of prompts made from templates.

    python scripts/make_fixture.py tests/fixtures --seconds 90
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import time
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.batches.data import movie_reviews
from runtime.batches.tokenizer import Tokenizer

SPECIAL = ("<pad>", "<eos>", "<unk>")
PAD, EOS, IGNORE = 0, 1, -100
VOCAB, MIN_WORDS, MAX_WORDS = 2048, 4, 20
WORD = r"[a-z0-9']+|[.,!?]"
BATCH, LEARNING_RATE, WARMUP_STEPS = 64, 4e-3, 50
PROMPT_SUBJECTS = (
    "the movie", "this film", "the story", "the acting", "the plot", "the ending", "the cast", "the script",
    "the music", "the director", "the first scene", "this show", "the main character", "every scene",
)  # fmt: skip
PROMPT_STARTS = (
    "{} was", "{} is", "i thought {} was", "i think {} is", "in my opinion {} is", "{} is so", "{} was not",
    "for me {} was", "{} looks", "{} is very", "i know that {} is", "{} could have been", "to be honest {} is",
    "some people say {} is", "i loved that {} was",
)  # fmt: skip


def read_sentences() -> list[list[str]]:
    """Sentences of MIN_WORDS to MAX_WORDS words, lower case, in the order of the data set."""
    texts = (text.lower() for text, _ in movie_reviews())
    sentences = (re.findall(WORD, sentence) for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text))
    return [words for words in sentences if MIN_WORDS <= len(words) <= MAX_WORDS]


def make_tokenizer(sentences: list[list[str]]) -> Tokenizer:
    """The most frequent words, one id each."""
    counts = collections.Counter(itertools.chain.from_iterable(sentences))
    words = [*SPECIAL, *(word for word, _ in counts.most_common(VOCAB - len(SPECIAL)))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.add_special_tokens(list(SPECIAL))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    return Tokenizer(backend, eos_ids=(EOS,), pad_id=PAD)


def make_rows(sentences: list[list[str]], tokenizer: Tokenizer) -> Tensor:
    """Token rows [n, MAX_WORDS + 1] of the sentences without unknown words: words, end, padding."""
    unknown = SPECIAL.index("<unk>")
    encoded = [ids for ids in tokenizer.encode_batch([" ".join(words) for words in sentences]) if unknown not in ids]
    rows = torch.full((len(encoded), MAX_WORDS + 1), PAD)
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids) + 1] = torch.tensor([*ids, EOS])
    return rows


def make_model() -> LlamaForCausalLM:
    """An untrained model: 4 layers of width 128, 4 heads, 2 KV heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            nn.init.normal_(weight, std=0.7 * weight.shape[1] ** -0.5)
    return model


def train(model: LlamaForCausalLM, rows: Tensor, cpu_seconds: float) -> None:
    """AdamW on random batches for a budget of CPU seconds, the learning rate falling linearly to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    start = time.process_time()
    for step in itertools.count():
        spent = (time.process_time() - start) / cpu_seconds
        if spent >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, 1 - spent)
        batch = rows[torch.randint(len(rows), (BATCH,))]
        batch = batch[:, : int((batch != PAD).sum(1).max())]
        loss = model(batch, labels=batch.masked_fill(batch == PAD, IGNORE)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def template_prompts() -> list[str]:
    """210 short prompts."""
    return [start.format(subject) for start in PROMPT_STARTS for subject in PROMPT_SUBJECTS]


def write_prompts(path: Path, tokenizer: Tokenizer) -> None:
    """One JSON object per line; every word is in the vocabulary."""
    prompts = template_prompts()
    unknown = {
        word for prompt in prompts for word in prompt.split() if SPECIAL.index("<unk>") in tokenizer.encode(word)
    }
    assert not unknown, unknown
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0, help="CPU seconds of training")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = options.folder / "tiny-llama"
    sentences = read_sentences()
    tokenizer = make_tokenizer(sentences)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    write_prompts(options.folder / "prompts.jsonl", tokenizer)
    rows = make_rows(sentences, tokenizer)
    model = make_model()
    print(f"{len(rows)} sentences, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    train(model, rows, options.seconds)
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
