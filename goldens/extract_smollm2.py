"""Rebuilds SmolLM2's tokenizer.json, tokenizer_config.json and chat template from its GGUF file.

    python extract_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf OUT_DIR

The GGUF holds vocabulary, token types and merges; the pre-tokenizer (`smollm`: single digits, then
the GPT-2 byte-level pattern) is named in `tokenizer.ggml.pre`. Nothing is fetched.
"""

import json
import pathlib
import sys

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3  # gguf TokenType.CONTROL


def read_array(reader: GGUFReader, key: str) -> list:
    return reader.fields[key].contents()


def build(path: str) -> tuple[Tokenizer, dict]:
    reader = GGUFReader(path)
    tokens = read_array(reader, "tokenizer.ggml.tokens")
    types = read_array(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in read_array(reader, "tokenizer.ggml.merges")]
    assert reader.fields["tokenizer.ggml.pre"].contents() == "smollm"
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=None, ignore_merges=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    special = [t for t, kind in zip(tokens, types) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    assert tokenizer.get_vocab_size() == len(tokens)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[reader.fields["tokenizer.ggml.bos_token_id"].contents()],
        "eos_token": tokens[reader.fields["tokenizer.ggml.eos_token_id"].contents()],
        "pad_token": tokens[reader.fields["tokenizer.ggml.padding_token_id"].contents()],
        "unk_token": tokens[reader.fields["tokenizer.ggml.unknown_token_id"].contents()],
        "clean_up_tokenization_spaces": False,
        "model_max_length": reader.fields["llama.context_length"].contents(),
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }
    return tokenizer, config


def main() -> None:
    source, out = sys.argv[1], pathlib.Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, config = build(source)
    tokenizer.save(str(out / "smollm2-tokenizer.json"), pretty=False)
    (out / "smollm2-tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
