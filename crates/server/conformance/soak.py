#!/usr/bin/env python3
"""Gate 6: mixed load on a server for a while, and what it holds meanwhile: soak.py URL PID SECONDS [LANES]

Requests: chats and completions whole, streamed and left amid the stream, JSON schemas, forced tools, parallel
samples, log-probabilities, prompts longer than the context, bodies that are no JSON. Every 5 s it reads the
process's resident memory, file descriptors and threads. Once a minute the lanes pause for 5 s: memory at rest
is what the server keeps, without what a request of the moment needs, and its least-squares line over the
second half of the run, with its standard error, is the figure of the gate. Exit 1: an answer that is neither served nor refused properly, or anything still held at the end.
"""
import http.client
import json
import random
import sys
import threading
import time
import urllib.request
from urllib.parse import urlparse

URL, PID, SECONDS = sys.argv[1].rstrip("/"), sys.argv[2], float(sys.argv[3])
LANES = int(sys.argv[4]) if len(sys.argv) > 4 else 4
END = time.monotonic() + SECONDS
MODEL = json.load(urllib.request.urlopen(f"{URL}/v1/models"))["data"][0]["id"]
counts, wrong, lock = {}, [], threading.Lock()
go, busy = threading.Event(), [0]
go.set()
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
          "required": ["a", "n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def words(dice, most):
    return " ".join(dice.choice("sun moon river stone wind leaf bird code".split()) for _ in range(dice.randint(1, most)))


def request(dice):
    """Path, body, bytes to read before leaving (None: all), statuses that are right."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": words(dice, 60)}],
            "max_tokens": dice.randint(1, 48), "temperature": dice.choice([0, 1]), "seed": dice.randint(0, 9)}
    kind = dice.randrange(10)
    leave = None
    if kind == 0:
        body["stream"] = True
    elif kind in (1, 2):
        body.update(stream=True, max_tokens=400)
        leave = dice.randint(0, 4000)
    elif kind == 3:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    elif kind == 4:
        body.update(tools=[TOOL], tool_choice="required")
    elif kind == 5:
        body.update(n=2, logprobs=True, top_logprobs=3)
    elif kind == 6:
        body["messages"][0]["content"] = "word " * 200000
        return "/v1/chat/completions", body, None, (400,)
    elif kind == 7:
        return "/v1/chat/completions", "{\"model\": " + "[" * dice.randint(1, 300), None, (400,)
    elif kind == 8:
        return "/v1/completions", {"model": MODEL, "prompt": words(dice, 400), "max_tokens": 4, "echo": True,
                                   "logprobs": 1}, None, (200, 429)
    return "/v1/chat/completions", body, leave, (200, 429)


def lane(number):
    dice, address = random.Random(number), urlparse(URL)
    while go.wait() and time.monotonic() < END:
        with lock:
            busy[0] += 1
        path, body, leave, right = request(dice)
        line = http.client.HTTPConnection(address.hostname, address.port, timeout=300)
        try:
            text = body if isinstance(body, str) else json.dumps(body)
            line.request("POST", path, text, {"content-type": "application/json"})
            answer = line.getresponse()
            data = answer.read() if leave is None else answer.read(leave)
            good = answer.status in right
            if leave is None and answer.status == 200 and isinstance(body, dict) and body.get("stream"):
                good = data.endswith(b"data: [DONE]\n\n")
            name = "left" if leave is not None else str(answer.status)
            note = data[:200]
        except (OSError, http.client.HTTPException) as error:
            good, name, note = False, "failed", repr(error)
        line.close()
        with lock:
            busy[0] -= 1
            counts[name] = counts.get(name, 0) + 1
            if not good:
                wrong.append((name, path, note))


def held():
    status = open(f"/proc/{PID}/status").read().split("\n")
    value = lambda key: int(next(l for l in status if l.startswith(key)).split()[1])
    import os
    return value("VmRSS:") / 1024, len(os.listdir(f"/proc/{PID}/fd")), value("Threads:")


def gauge(name):
    text = urllib.request.urlopen(f"{URL}/metrics").read().decode()
    return sum(float(l.rsplit(" ", 1)[1]) for l in text.splitlines() if l.startswith(name))


def at_rest():
    """Resident memory with nothing asked of the server for 5 s."""
    go.clear()
    while busy[0]:
        time.sleep(0.05)
    time.sleep(5)
    value = held()[0]
    go.set()
    return value


def line(points):
    """Slope of the least-squares line in MiB/h, and its standard error."""
    n = len(points)
    mean_t, mean_r = sum(t for t, _ in points) / n, sum(r for _, r in points) / n
    width = sum((t - mean_t) ** 2 for t, _ in points)
    slope = sum((t - mean_t) * (r - mean_r) for t, r in points) / width
    rest = sum((r - mean_r - slope * (t - mean_t)) ** 2 for t, r in points)
    return slope * 3600, (rest / max(1, n - 2) / width) ** 0.5 * 3600


lanes = [threading.Thread(target=lane, args=(i,)) for i in range(LANES)]
for one in lanes:
    one.start()
begin, samples, rests = time.monotonic(), [], []
while time.monotonic() < END:
    samples.append((time.monotonic() - begin, *held()))
    if len(samples) % 12 == 0:
        rests.append((time.monotonic() - begin, at_rest()))
        print(f"{rests[-1][0]:.0f} s: {rests[-1][1]:.1f} MiB at rest, {sum(counts.values())} requests", file=sys.stderr, flush=True)
    time.sleep(5)
for one in lanes:
    one.join()
time.sleep(3)
late = [s for s in samples if s[0] >= SECONDS / 5]
left = {name: gauge(name) for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "kilotok_streams_open",
                                       "vllm:num_preemptions_total")}
preempted = left.pop("vllm:num_preemptions_total")
end = held()
print(f"{SECONDS:.0f} s, {LANES} lanes: {sum(counts.values())} requests {counts}, {preempted:.0f} preemptions, "
      f"{len(wrong)} wrong")
print(f"resident memory {late[0][1]:.1f} MiB after a fifth, {end[0]:.1f} at the end, most {max(s[1] for s in samples):.1f}; "
      f"descriptors {late[0][2]} then {end[1]}, most {max(s[2] for s in samples)}; "
      f"threads {late[0][3]} then {end[2]}; still held: {left}")
print("memory at rest, MiB, once a minute:", " ".join(f"{r:.1f}" for _, r in rests))
half = [one for one in rests if one[0] >= SECONDS / 2]
if len(half) > 2:
    slope, error = line(half)
    print(f"slope of the second half at rest: {slope:+.2f} MiB/h, standard error {error:.2f}")
for one in wrong[:5]:
    print("WRONG", one)
sys.exit(1 if wrong or any(left.values()) else 0)
