#!/usr/bin/env python3
"""Greedy texts of the CPU backend, for `resident_check greedy`: cpu_texts.py KILOTOK MODEL DIRECTORY COUNT > FILE

Asks `KILOTOK serve --device cpu --no-draft` for 48 tokens at temperature 0 after the first user messages of every
DIRECTORY/*.jsonl in turn; writes `prompt ids;token ids` a line. Port 18290.
"""
import glob
import json
import subprocess
import sys
import time
import urllib.request
from itertools import chain, zip_longest

kilotok, model, directory, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
files = [[json.loads(line) for line in open(path)] for path in sorted(glob.glob(f"{directory}/*.jsonl"))]
prompts = [prompt for prompt in chain(*zip_longest(*files)) if prompt][:count]
base = "http://127.0.0.1:18290"


def post(path, body):
    asked = urllib.request.Request(base + path, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(asked, timeout=300))


server = subprocess.Popen([kilotok, "serve", "-m", model, "--device", "cpu", "--no-draft", "--port", "18290"])
try:
    while True:
        try:
            urllib.request.urlopen(base + "/health")
            break
        except OSError:
            if server.poll() is not None:
                sys.exit(f"{kilotok} serve ended with {server.returncode}")
            time.sleep(0.2)
    name = json.load(urllib.request.urlopen(base + "/v1/models"))["data"][0]["id"]
    for prompt in prompts:
        messages = prompt["messages"][:1]
        ids = post("/tokenize", {"model": name, "messages": messages})["tokens"]
        answer = post("/v1/chat/completions", {"model": name, "messages": messages, "max_tokens": 48,
                                               "temperature": 0, "return_token_ids": True})
        chosen = answer["choices"][0]["token_ids"]
        print(",".join(map(str, ids)) + ";" + ",".join(map(str, chosen)))
finally:
    server.terminate()
