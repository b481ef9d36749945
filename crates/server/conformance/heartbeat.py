#!/usr/bin/env python3
"""Gate 4: the longest silence of a server's engine while it computes long prompts: heartbeat.py URL SECONDS

Two lanes ask for completions of prompts as long as the context allows; meanwhile `/health` and the gauge
`kilotok_engine_heartbeat_age_seconds` are read as fast as they answer. Exit 1: not ready at any time.
"""
import json
import random
import sys
import threading
import time
import urllib.error
import urllib.request

URL, SECONDS = sys.argv[1].rstrip("/"), float(sys.argv[2])
MODEL = json.load(urllib.request.urlopen(f"{URL}/v1/models"))["data"][0]
CONTEXT = MODEL["max_model_len"]
END = time.monotonic() + SECONDS
done, tokens = [0], [0]


def lane(number):
    dice = random.Random(number)
    while time.monotonic() < END:
        prompt = [dice.randrange(100, 400) for _ in range(CONTEXT - 32)]
        body = json.dumps({"model": MODEL["id"], "prompt": prompt, "max_tokens": 16}).encode()
        request = urllib.request.Request(f"{URL}/v1/completions", body, {"content-type": "application/json"})
        json.load(urllib.request.urlopen(request))
        done[0] += 1
        tokens[0] += len(prompt)


lanes = [threading.Thread(target=lane, args=(i,)) for i in range(2)]
for one in lanes:
    one.start()
ages, unready = [], 0
while any(one.is_alive() for one in lanes):
    page = urllib.request.urlopen(f"{URL}/metrics").read().decode()
    line = next(l for l in page.splitlines() if l.startswith("kilotok_engine_heartbeat_age_seconds"))
    ages.append(float(line.rsplit(" ", 1)[1]))
    try:
        urllib.request.urlopen(f"{URL}/health").read()
    except urllib.error.HTTPError:
        unready += 1
ages.sort()
print(f"{done[0]} prompts of {CONTEXT - 32} tokens ({tokens[0] / SECONDS:.0f} tokens/s), {len(ages)} looks: age of the heartbeat "
      f"median {ages[len(ages) // 2] * 1e3:.2f}, p99 {ages[len(ages) * 99 // 100] * 1e3:.1f}, most {ages[-1] * 1e3:.1f} ms; "
      f"not ready {unready} times")
sys.exit(1 if unready else 0)
