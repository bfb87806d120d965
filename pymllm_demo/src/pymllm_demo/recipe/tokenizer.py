"""The demo's byte-level BPE: bytes, merges inside one character, and whole words of the phrasings.

Copying, reversing and counting need a word's letters, so a word that is no fixed part of the
phrasings must be spelled out. BPE alone would cut it into arbitrary pieces; here merges are learnt
only inside single characters (Chinese, emoji), and `ignore_merges` lets a whole word be a token
without the pieces that would lead to it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pymllm_demo.recipe import chat, data, lexicon

CONTROL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
# Kept by `skip_special_tokens`, as in Qwen: parsers read them from the text.
TEXT_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
VOCAB_SIZE = 2304
_PIECES = r" ?[A-Za-z]+|\n+|[^A-Za-z\n]"


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Words with the space before them, runs of newlines, and every other character alone."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _phrasings(count: int) -> Counter[str]:
    """The pieces of dialogues without their open content."""
    pieces: Counter[str] = Counter()
    for dialogue in itertools.islice(data.dialogues(seed=0, split="blank"), count):
        text = chat.prompt(dialogue) + dialogue.completion()
        for tag in (*CONTROL_TOKENS, *TEXT_TOKENS):
            text = text.replace(tag, "\n")
        pieces.update(re.findall(_PIECES, text))
    return pieces


def _character_merges(characters: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that turn each character's bytes into one token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(characters, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def train(dialogues: int = 40_000) -> Tokenizer:
    """Learn the vocabulary; the same one on every machine."""
    pieces = _phrasings(dialogues)
    characters = {piece for piece in pieces if len(piece) == 1 and not piece.isascii()}
    characters |= set(lexicon.COMMON_HAN) | set("".join(lexicon.ZH_PHRASES)) | set(lexicon.EMOJI)
    characters |= set(lexicon.ZH_SURNAMES + lexicon.ZH_GIVEN)
    spelt = {word for piece in pieces if len(word := piece.strip().lower()) > 1 and word.isascii()}
    if strange := spelt - set(lexicon.PHRASE_WORDS) - {"true", "false"}:
        raise ValueError(f"words of the phrasings that lexicon.PHRASE_WORDS lacks: {sorted(strange)}")
    vocab, merges = _character_merges(sorted(characters))
    room = VOCAB_SIZE - len(vocab) - len(CONTROL_TOKENS) - len(TEXT_TOKENS)
    words = [piece for piece, _ in sorted(pieces.items(), key=lambda item: (-item[1], item[0]))]
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    for word in [piece for piece in words if len(piece) > 1][:room]:
        vocab[encode(word)[0][0]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tag, normalized=False) for tag in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TEXT_TOKENS])
    return tokenizer


def token_id(tokenizer: Tokenizer, tag: str) -> int:
    """The id of a token that must exist."""
    found: int | None = tokenizer.token_to_id(tag)
    if found is None:
        raise ValueError(f"the vocabulary has no {tag}")
    return found


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer, its settings and the chat template as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": CONTROL_TOKENS[1:],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = chat.TEMPLATE.read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
