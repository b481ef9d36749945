#!/usr/bin/env python3
"""Gate 10: what a grammar costs: grammar_speed.py SERVER_COMMAND... (it is started here, on port 18650).

Each prompt is answered greedily without and with a grammar that lets every text through, one after the other,
so that both say the same; their times for a token are compared, with drafting and without.
"""
import json
import statistics
import subprocess
import sys
import time
import urllib.request

URL = "http://127.0.0.1:18650"
PROMPTS = ["Write a haiku about the sea.", "Explain what a prime number is.", "Write a Python function that adds two numbers.",
           "List three fruits.", "What is the capital of France?", "Tell me a short story about a bird."]


def ask(body):
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=120))


server = subprocess.Popen([*sys.argv[1:], "--port", "18650"], stderr=subprocess.DEVNULL)
try:
    for _ in range(300):
        try:
            model = json.load(urllib.request.urlopen(f"{URL}/v1/models"))["data"][0]["id"]
            break
        except OSError:
            time.sleep(0.1)
    for drafts in (0, 3):
        ratios, steps = [], []
        for turn in range(3):
            for prompt in PROMPTS:
                times = {}
                for grammar in (False, True) if turn % 2 else (True, False):
                    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 64,
                            "temperature": 0, "ignore_eos": True, "draft_tokens": drafts, "include_metrics": True}
                    if grammar:
                        body["structured_outputs"] = {"regex": "(?s:.*)"}
                    answer = ask(body)
                    metrics = answer["metrics"]
                    times[grammar] = metrics["generation_time_ms"] / answer["usage"]["completion_tokens"]
                ratios.append(times[True] / times[False])
                steps.append(times[False])
        print(f"drafts {drafts}: {statistics.median(steps):.2f} ms a token without a grammar; with one "
              f"{100 * (statistics.median(ratios) - 1):+.1f} % (median of {len(ratios)} pairs; "
              f"{100 * (min(ratios) - 1):+.1f} to {100 * (max(ratios) - 1):+.1f})")
finally:
    server.kill()
