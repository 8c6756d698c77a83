"""A sentence encoder small enough to train in a test: a BERT of random weights over a list of words."""

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

CLASSES, WORDS = 6, 5


def sentences(n: int, generator: torch.Generator) -> tuple[list[str], list[int]]:
    """n sentences of three of the five words of a class, and their classes, which take turns."""
    classes = [i % CLASSES for i in range(n)]
    words = torch.randint(WORDS, (n, 3), generator=generator).tolist()
    return [" ".join(f"w{c}x{k}" for k in row) for c, row in zip(classes, words, strict=True)], classes


def encoder(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """16 dimensions, two layers, no dropout: two calls give the same."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{c}x{k}" for c in range(CLASSES) for k in range(WORDS))]
    folder.mkdir(exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return load(folder).to(dtype)


def load(folder: Path) -> Any:
    """The same again, in another process."""
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
