"""Small checkpoints on disk, written by transformers and tokenizers: what a real one looks like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pymllm_core.testing import toy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
THINK = "<think>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>{% endif %}{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog. the end of the story is near, the end.",
    "héllo wörld, 你好世界，你好吗？ Привет мир. 🚀🚀 émoji 👩‍🚀",
)
"""What the tokenizer's merges are learnt from; some merges end inside of a character."""


def randomise(model: PreTrainedModel, *, std: float, seed: int) -> PreTrainedModel:
    """Weights with which every part matters: matrices of spread `std`, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(noise * std)
    model.train(False)
    return model


def save(model: PreTrainedModel, folder: Path, **config: Any) -> None:
    """Write weights and config.json, with the fields `config` on top (a field that is None is removed)."""
    with _without_bars():
        model.save_pretrained(folder, max_shard_size=config.pop("max_shard_size", "1GB"))
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]


def toy_model(*, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """transformers' model of the toy architecture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 0,
        "bos_token_id": None,
        **fields,
    }
    return randomise(LlamaForCausalLM(LlamaConfig(**config)), std=0.15, seed=seed)


def write_toy(folder: Path, *, tokenizer: bool = False, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Write a toy checkpoint; its transformers model is the reference."""
    if tokenizer:
        fields.setdefault("vocab_size", len(write_tokenizer(folder)))
    model = toy_model(seed=seed, **fields)
    save(model, folder, architectures=[toy.ARCHITECTURE], model_type="toy")
    (folder / "generation_config.json").unlink()
    return model


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; id 0 ends an answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(THINK, special=False, normalized=False)])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    fast.chat_template = CHAT_TEMPLATE
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))
    return fast
