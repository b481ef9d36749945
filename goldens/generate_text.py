"""Chat-template and tokenizer goldens, by Hugging Face's transformers and tokenizers.

    python generate_text.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--tiktoken qwen.tiktoken] --out tokenizer

Owns: tokenizer/*.json (formats: README.md). Rendering is `apply_chat_template(tokenize=False)`.
`qwen.tiktoken` (PyPI dashscope 2.0.2) gives the vocabulary that MiMo's tokenizer shares; only the few
tokens and merges that the golden texts can touch are kept, with their real ids.
"""

import argparse
import base64
import json
import pathlib

import jinja2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from extract_smollm2 import build

# ---- conversations -----------------------------------------------------------------------------

USER = {"role": "user", "content": "Hello"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "  Weather in a city, e.g. \"São Paulo\" <b>& 'more'</b>  ",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City & country, <city>"},
                "unit": {"type": "string", "enum": ["°C", "°F", "K<>&'"], "default": "°C"},
                "days": {"type": "integer", "minimum": 1, "maximum": 1e20, "default": None, "exclusiveMinimum": 0.5},
                "detail": {"type": ["boolean", "null"], "default": True, "description": "line one\nline two\t\\"},
                "where": {"type": "object", "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}}, "required": ["lat", "lon"]},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
PLAIN = {"type": "function", "function": {"name": "now", "description": "Time 時刻 🕒", "parameters": {"type": "object", "properties": {}}}}
BARE = {"type": "function", "function": {"name": "ping"}}


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


AGENT = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Weather in Zürich and 東京?"},
    {"role": "assistant", "content": "", "reasoning_content": "Two calls.\nUse </parameter>?", "tool_calls": [
        call("get_weather", city="Zürich", days=3, detail=True, unit=None),
        call("get_weather", city="東京 <&>\"'", where={"lat": 35.68, "lon": 139.0, "note": "é<>&'\u2028"}, days=[1, 2.5, "x"]),
    ]},
    {"role": "tool", "content": "{\"t\": 7}"},
    {"role": "tool", "content": "{\"t\": 19, \"s\": \"晴れ\"}"},
    {"role": "assistant", "content": "7 and 19 degrees.", "reasoning_content": "Done."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": None, "tool_calls": [call("now")]},
    {"role": "tool", "content": "12:00"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": "two"}]}]
THREE = [
    {"role": "system", "content": "You add."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "  spaces kept  \n\n"},
]
ODD = "tabs\t, CRLF\r\n, NUL-free, quotes \"'`, braces {{ x }} {% raw %} {# c #}, <|im_end|>, emoji \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466, \u202ertl\u202c, \u00a0nbsp, \xe9 vs e\u0301, \\n, </think>, \u2028."

MIMO = [
    ("default system prompt", [USER], None, {"add_generation_prompt": True}),
    ("thinking off", [USER], None, {"add_generation_prompt": True, "enable_thinking": False}),
    ("no generation prompt", [USER], None, {"add_generation_prompt": False}),
    ("empty system prompt", [{"role": "system", "content": ""}, USER], None, {"add_generation_prompt": True}),
    ("history with reasoning", THREE, None, {"add_generation_prompt": True}),
    ("history without old reasoning", THREE, None, {"add_generation_prompt": True, "keep_all_reasoning": False}),
    ("odd characters", [{"role": "user", "content": ODD}], None, {"add_generation_prompt": True}),
    ("one tool with every kind of field", [USER], [WEATHER], {"add_generation_prompt": True}),
    ("three tools and a system prompt", [{"role": "system", "content": "S"}, USER], [PLAIN, WEATHER, BARE], {"add_generation_prompt": True}),
    ("agent turns", AGENT, [WEATHER, PLAIN], {"add_generation_prompt": True}),
    ("agent turns, old reasoning dropped, thinking off", AGENT, [WEATHER], {"add_generation_prompt": True, "keep_all_reasoning": False, "enable_thinking": False}),
    ("content in parts", PARTS, None, {"add_generation_prompt": True}),
    ("empty tools list", [USER], [], {"add_generation_prompt": True}),
    ("assistant last, to be continued by nobody", THREE[:3], None, {"add_generation_prompt": False}),
    ("unknown role", [{"role": "wizard", "content": "x"}], None, {"add_generation_prompt": True}),
]
SMOLLM2 = [
    ("default system prompt", [USER], None, {"add_generation_prompt": True}),
    ("no generation prompt", [USER], None, {"add_generation_prompt": False}),
    ("own system prompt", THREE[:2], None, {"add_generation_prompt": True}),
    ("empty system prompt", [{"role": "system", "content": ""}, USER], None, {"add_generation_prompt": True}),
    ("history", THREE, None, {"add_generation_prompt": True}),
    ("odd characters", [{"role": "user", "content": ODD}], None, {"add_generation_prompt": True}),
    ("empty content", [{"role": "user", "content": ""}], None, {"add_generation_prompt": True}),
    ("newlines at both ends", [{"role": "user", "content": "\n\nx\n"}], None, {"add_generation_prompt": True}),
    ("system in the middle", [USER, {"role": "system", "content": "late"}, USER], None, {"add_generation_prompt": True}),
    ("any role", [{"role": "wizard", "content": "x"}], None, {"add_generation_prompt": True}),
    ("tools ignored", [USER], [WEATHER], {"add_generation_prompt": True}),
    ("HTML", [{"role": "user", "content": "<b>&amp; 'x' \"y\"</b>"}], None, {"add_generation_prompt": True}),
]
JSON = [
    ("tools through tojson", [USER], [WEATHER, PLAIN, BARE], {"add_generation_prompt": True}),
    ("agent turns", [m for m in AGENT if m.get("content") is not None], [WEATHER], {"add_generation_prompt": True}),
    ("parts through tojson", PARTS, None, {"add_generation_prompt": False}),
    ("strip", THREE, None, {"add_generation_prompt": True}),
    ("break", [USER, {"role": "stop", "content": "é<>&'"}, USER], None, {"add_generation_prompt": True}),
    ("odd characters", [{"role": "user", "content": [ODD, 1, 1.0, 1e20, 1e-7, -0.0, True, None, {"b": 1, "a": []}]}], None, {"add_generation_prompt": False}),
]


def render(tokenizer, template: str, cases: list) -> list[dict]:
    out = []
    for name, messages, tools, kwargs in cases:
        record = {"name": name, "messages": messages, "tools": tools, "kwargs": kwargs}
        try:
            record["expected"] = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False, **kwargs)
        except jinja2.TemplateError as error:
            record["expected_error"] = str(error)
        out.append(record)
    return out


# ---- token ids ---------------------------------------------------------------------------------

TEXTS = [
    "", " ", "  ", "\n", "\r\n", "\t", "\n\n\n", "a", " a", "  a", "a  ", "Hello, world!", "Hello  world   x", "don't I'LL we've it's THEY'RE o'clock",
    "0123456789", "3.14159 1,000,000 0x1F 1e-5", "abc123def", "١٢٣ ½ ² Ⅷ", "ünïcödé ÄÖÜ ß ẞ", "日本語 中文 한국어", "🙂👍🏽👩‍👩‍👧‍👦 🇨🇭", "e\u0301 vs é",
    "\u00a0nbsp\u2003em\u200bzero\ufeffbom", "def f(x):\n    return x**2 # ok\n\n\nclass A:\n\tpass\n", "{\"a\": [1, 2, {\"b\": null}]}", "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|> <|im_end|><|endoftext|>", "<|im_start|", "x<|im_end|>y", "<repo_name><file_sep>", "https://example.org/a?b=c&d=%20#e", "C:\\path\\to\\file", "$\\int_0^1 x^2\\,dx = \\frac{1}{3}$",
    "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "ﬁ ﬂ ™ © № ℃", "\u0000\u0001\u007f", "a" * 40, " " * 17 + "x", "-" * 33, "!?!?...,,,;;", "MixedCASE camelCase snake_case kebab-case",
    "\ud7ff\ue000\uffff\U0010fffd", "tail space ", " \n \n", "x\n\n y", "'s't're've'm'll'd 'S",
]
GOLDEN_TEXT = "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|><|im_start|>user\nHello<|im_end|><|im_start|>assistant\n<think></think>"
GOLDEN_IDS = [151644, 8948, 198, 2610, 525, 20740, 25612, 11, 264, 10950, 15235, 17847, 44936, 553, 71449, 13, 151645, 151644, 872, 198, 9707, 151645, 151644, 77091, 198, 151667, 151668]
MIMO_SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<tool_call>": 151657, "</tool_call>": 151658, "<think>": 151667, "</think>": 151668}
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def token_cases(tokenizer: Tokenizer, texts: list[str]) -> list[dict]:
    out = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        out.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False)})
    return out


def byte_alphabet() -> dict[int, str]:
    """The byte-to-character table of byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def split_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The merge that makes `token`: byte-pair encoding of it with only the lower ranks."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        best = min((i for i in range(len(parts) - 1) if ranks.get(parts[i] + parts[i + 1], 1 << 60) < ranks[token]),
                   key=lambda i: ranks[parts[i] + parts[i + 1]])
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def qwen_subset(path: pathlib.Path, texts: list[str]) -> Tokenizer:
    """A tokenizer with the real ids that is exact on `texts` (and their substrings), and small."""
    ranks = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    data = [t.encode("utf-8", "surrogatepass") for t in texts]
    needed = {bytes([b]) for b in range(256)}
    for text in data:
        for length in range(2, 33):
            needed |= {text[i : i + length] for i in range(len(text) - length + 1)} & ranks.keys()
    alphabet = byte_alphabet()
    spell = lambda token: "".join(alphabet[b] for b in token)
    ordered = sorted(needed, key=ranks.__getitem__)
    merges = [tuple(map(spell, split_of(t, ranks))) for t in ordered if len(t) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={spell(t): ranks[t] for t in ordered}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, ordered


def with_special(tokenizer: Tokenizer) -> Tokenizer:
    """Adds MiMo's special tokens under their ids (the vocabulary has holes, so through JSON)."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [
        {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": c.startswith("<|")}
        for c, i in MIMO_SPECIAL.items()
    ]
    for content, index in MIMO_SPECIAL.items():
        data["model"]["vocab"][content] = index
    return Tokenizer.from_str(json.dumps(data))


# ---- main --------------------------------------------------------------------------------------


def write(path: pathlib.Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=True, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--tiktoken", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    out = arguments.out
    smollm2, config = build(arguments.gguf)
    (out / "smollm2_chat_template.jinja").write_text(config["chat_template"])
    fast = PreTrainedTokenizerFast(tokenizer_object=smollm2, **{k: config[k] for k in ("bos_token", "eos_token", "pad_token", "unk_token")})
    for name, cases in (("mimo", MIMO), ("smollm2", SMOLLM2), ("json", JSON)):
        template = (out / f"{name}_chat_template.jinja").read_text()
        write(out / f"{name}_chat_cases.json", render(fast, template, cases))
    write(out / "smollm2_token_cases.json", token_cases(smollm2, TEXTS))
    if arguments.tiktoken:
        texts = [GOLDEN_TEXT, "Hello, world! 2026", "<think>12 + 30 = 42</think>", "日本語 é🙂\n\n x", "<tool_call>\n<function=now>\n</function>\n</tool_call>"]
        tokenizer, kept = qwen_subset(arguments.tiktoken, texts)
        tokenizer = with_special(tokenizer)
        assert tokenizer.encode(GOLDEN_TEXT).ids == GOLDEN_IDS, tokenizer.encode(GOLDEN_TEXT).ids
        (out / "mimo_subset_tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n")
        write(out / "mimo_token_cases.json", token_cases(tokenizer, texts))
        print(f"golden line reproduced; {len(kept)} tokens kept")


if __name__ == "__main__":
    main()
