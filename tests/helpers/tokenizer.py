"""Tiny tokenizers, made without a network."""

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_WORDS = ("the", "and", "ing", "you", "er", "is", "st", "on")


def tiny_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 3 special tokens (ids 0 to 2, EOS is 2), 256 bytes, merges, fillers.

    Has a ChatML chat template. `vocab_size` at least 300; ids past the merges are ordinary added
    tokens, `<filler-N>`, so that every id below it has a text.
    """
    assert vocab_size >= 300
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for char in bytes_to_unicode().values():  # type: ignore[no-untyped-call]
        vocabulary[char] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        built = word[0]
        for char in word[1:]:
            if built + char not in vocabulary:
                merges.append((built, char))
                vocabulary[built + char] = len(vocabulary)
            built += char
        merges.append(("\u0120", word))
        vocabulary["\u0120" + word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([f"<filler-{i}>" for i in range(len(vocabulary), vocab_size)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def tiny_sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces with U+2581 for a space, byte fallback, BOS added when encoding."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for char in "\u2581abcdefghijklmnopqrstuvwxyz.,":
        vocabulary[char] = len(vocabulary)
    merges = [("\u2581", "t"), ("\u2581t", "he"), ("h", "e"), ("\u2581", "\u2581")]
    for left, right in sorted(merges, key=lambda merge: len("".join(merge))):
        vocabulary[left + right] = len(vocabulary)
    merges.sort(key=lambda merge: vocabulary["".join(merge)])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
