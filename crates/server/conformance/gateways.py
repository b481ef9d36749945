#!/usr/bin/env python3
"""A gateway before two local nodes, one of which is killed: gateways.py NAME SCRIPTED PORT ORDER...

Starts two scripted servers (their speed is simulated) and the gateway by `ORDER... URL URL` with PORT in its
environment. Wanted: turns of a conversation stay on a node; after kill -9 of one node only its own streams
end early, the others whole, and within 5 s every new request is answered.
"""
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

NAME, SCRIPTED, PORT, ORDER = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
NODES = [PORT + 1, PORT + 2]
STREAMS, SESSIONS, TURNS = 8, 8, 4
TOKENS = 4500  # of a stream: at about 3.6 a step of 4 ms or more, all of them run for some seconds together


def until(what, holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            sys.exit(f"FAIL {NAME}: {what} did not come within {seconds} s")
        time.sleep(0.1)


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return answer.read().decode()


def answers(port, path):
    try:
        get(port, path)
        return True
    except OSError:
        return False


def chat(port, messages, tokens, session, stream=False):
    """A response that has begun; the caller reads it."""
    body = {"model": "scripted", "messages": messages, "max_tokens": tokens, "stream": stream}
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"content-type": "application/json", "x-session-id": session, "x-smg-routing-key": session}
    line.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return line.getresponse()


def whole(port, messages, tokens=8, session="s"):
    answer = chat(port, messages, tokens, session)
    return answer.status, answer.read()


def count(port, name):
    lines = [line for line in get(port, "/metrics").splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def ask(text):
    return [{"role": "user", "content": text}]


def first_byte_ms(port):
    times = []
    for i in range(30):
        begin = time.monotonic()
        answer = chat(port, ask(f"number {i}"), 4, f"t{i}", stream=True)
        answer.read(1)
        times.append(1e3 * (time.monotonic() - begin))
        answer.read()
    return statistics.median(times)


def affinity():
    """Share of second and later turns on the node of the first, and the conversations of the first node."""
    kept, first_node = 0, 0
    for session in range(SESSIONS):
        messages = ask(f"Conversation {session}: " + f"tell me of topic {session * 7919}. " * 30)
        home = None
        for turn in range(TURNS):
            before = count(NODES[0], "vllm:request_success_total")
            status, body = whole(PORT, messages, 24, f"session-{session}")
            if status != 200:
                sys.exit(f"FAIL {NAME}: {status} {body[:200]}")
            node = 0 if count(NODES[0], "vllm:request_success_total") > before else 1
            home = node if home is None else home
            kept += turn > 0 and node == home
            reply = json.loads(body)["choices"][0]["message"]["content"]
            messages = messages + [{"role": "assistant", "content": reply}, *ask(f"And turn {turn}?")]
        first_node += home == 0
    return kept / (SESSIONS * (TURNS - 1)), first_node


def read_stream(number, ends):
    try:
        answer = chat(PORT, ask(f"stream {number}"), TOKENS, f"stream-{number}", stream=True)
        text = answer.read().decode()
        ends[number] = "whole" if '"finish_reason":"length"' in text else "error event" if "error" in text else "cut"
    except (OSError, http.client.HTTPException) as error:
        ends[number] = f"closed ({type(error).__name__})"


def kill(processes):
    """kill -9 amid streams: how they ended, and when new requests were all answered again."""
    ends = {}
    threads = [threading.Thread(target=read_stream, args=(i, ends)) for i in range(STREAMS)]
    for thread in threads:
        thread.start()
    running = lambda port: count(port, "vllm:num_requests_running")
    until("8 running streams", lambda: sum(map(running, NODES)) == STREAMS, 30)
    lost, node = max((int(running(port)), i) for i, port in enumerate(NODES))
    processes[node].kill()
    begin = time.monotonic()
    wrong_at, slowest, asked, failed = 0.0, 0.0, 0, 0
    while time.monotonic() - begin < 8:
        asked += 1
        sent = time.monotonic()
        try:
            status, _ = whole(PORT, ask(f"after {asked}"), 4, f"after-{asked}")
        except OSError:
            status = 0
        if status != 200:
            failed += 1
            wrong_at = time.monotonic() - begin
        slowest = max(slowest, time.monotonic() - sent)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    return lost, list(ends.values()), asked, failed, wrong_at, slowest


def main():
    processes = []
    try:
        for port in NODES:
            processes.append(subprocess.Popen([SCRIPTED, str(port), "4000"], stderr=subprocess.DEVNULL))
        for port in NODES:
            until("a node", lambda port=port: answers(port, "/health"))
        urls = [f"http://127.0.0.1:{port}" for port in NODES]
        log = open(os.environ.get("GATEWAY_LOG", f"/tmp/gateway-{PORT}.log"), "w")
        for _ in range(3):  # a start fails now and then while the metrics port of one before is still taken
            gateway = subprocess.Popen([*ORDER, *urls], stdout=log, stderr=log, env={**os.environ, "PORT": str(PORT)})
            processes.append(gateway)
            until("the gateway's start", lambda: gateway.poll() is not None or answers(PORT, "/health"))
            if gateway.poll() is None:
                break
        until(f"the gateway (its log: {log.name})", lambda: answers(PORT, "/health"), 1)
        until("an answer", lambda: whole(PORT, ask("hello"))[0] == 200)
        direct, through = first_byte_ms(NODES[0]), first_byte_ms(PORT)
        print(f"{NAME}: first byte {direct:.2f} ms direct, {through:.2f} ms through it (medians of 30)")
        kept, first = affinity()
        print(f"{NAME}: {100 * kept:.0f} % of later turns on the node of the first; "
              f"{first} of {SESSIONS} conversations on one node, {SESSIONS - first} on the other")
        lost, ends, asked, failed, wrong_at, slowest = kill(processes)
        kinds = {kind: ends.count(kind) for kind in sorted(set(ends))}
        print(f"{NAME}: killed with {lost} of {STREAMS} streams on it: {kinds}; then {asked - failed} of {asked} "
              f"requests answered in 8 s, the last failure after {wrong_at:.1f} s, the slowest answer took {slowest:.1f} s")
        good = ends.count("whole") >= STREAMS - lost and wrong_at <= 5.0 and kept >= 0.9
        print(f"{'ok  ' if good else 'FAIL'} {NAME}")
        return 0 if good else 1
    finally:
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


sys.exit(main())
