#!/usr/bin/env python3
"""Prompts of mixed length for `cargo bench -p cli --bench drafting`: cut_prompts.py DIRECTORY COUNT > FILE

Takes the first user messages of every DIRECTORY/*.jsonl in turn; of three, one is cut anywhere, one is cut and goes
on with a piece of another, one is of random words. Same arguments, same file.
"""
import glob
import json
import random
import sys

directory, count = sys.argv[1], int(sys.argv[2])
files = [open(path) for path in sorted(glob.glob(f"{directory}/*.jsonl"))]
texts = [json.loads(line)["messages"][0]["content"] for file in files for line in file]
words = sorted({word for text in texts for word in text.split()})
dice = random.Random(1)


def piece(limit):
    text = dice.choice(texts)
    start = dice.randrange(max(1, len(text) - 8))
    return text[start:start + dice.randint(1, limit)]


for i in range(count):
    text = [lambda: texts[i * 7 % len(texts)][:dice.randint(1, 120)],
            lambda: piece(60) + " " + piece(60),
            lambda: " ".join(dice.choices(words, k=dice.randint(1, 16)))][i % 3]()
    print(json.dumps({"messages": [{"role": "user", "content": text}]}))
