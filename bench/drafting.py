#!/usr/bin/env python3
"""Speed of `kilotok generate` with drafting over without, prompt by prompt, alternating.

drafting.py KILOTOK PROMPTS.jsonl COUNT WIDTH...   first user messages, temperature 0, at most 160 tokens
"""
import json
import statistics
import subprocess
import sys

kilotok, prompts, count, widths = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
texts = [json.loads(line)["messages"][0]["content"] for line in open(prompts)][:count]


def run(text, *flags):
    command = [kilotok, "generate", text, "-n", "160", "--temperature", "0", "--json", *flags]
    stats = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)["stats"]
    return stats["generated_tokens"], stats["decode_ms"]


total = {width: [0.0, 0.0, []] for width in widths}
for text in texts:
    for width in widths:
        tokens, plain = run(text, "--no-draft")
        same, drafted = run(text, "--draft-width", width)
        assert tokens == same, text
        entry = total[width]
        entry[0] += plain
        entry[1] += drafted
        entry[2].append(plain / drafted)
for width, (plain, drafted, ratios) in total.items():
    print(f"width {width}: {plain / drafted:.2f} x plain in all, median {statistics.median(ratios):.2f}, "
          f"worst {min(ratios):.2f}, {len(ratios)} prompts")
