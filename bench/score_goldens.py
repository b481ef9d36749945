#!/usr/bin/env python3
"""Log-probabilities of a device against transformers', on the golden checkpoints: score_goldens.py KILOTOK DEVICE[,OPTION..]..

Scores every sequence of goldens/mimo/*/expected.json with `KILOTOK score --device DEVICE OPTION..`; prints the mean absolute
difference of a sequence's log-probabilities, the largest of a case, and how many positions have another argmax though
the oracle's two best are more than 0.1 apart. The CPU backend's bound is 2e-2 and none (crates/cli/tests/contract.rs).
"""
import glob
import json
import os
import subprocess
import sys

kilotok, devices = sys.argv[1], sys.argv[2:]
root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "goldens", "mimo")
for device in devices:
    for path in sorted(glob.glob(f"{root}/*/expected.json")):
        model, worst, wrong, positions = os.path.dirname(path), 0.0, 0, 0
        for sequence in json.load(open(path))["sequences"]:
            ids = ",".join(map(str, sequence["token_ids"]))
            asked = [kilotok, "score", "--model", model, "--token-ids", ids, "--device", *device.split(","), "--json"]
            done = subprocess.run(asked, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{device} {os.path.basename(model)}: {done.stderr.strip()}")
            found = json.loads(done.stdout)
            apart = [abs(a - b) for a, b in zip(found["next_token_logprobs"], sequence["next_token_logprobs"])]
            worst = max(worst, sum(apart) / len(apart))
            best = zip(found["argmax"], sequence["argmax"], sequence["top2_gap"])
            wrong += sum(a != b and gap > 0.1 for a, b, gap in best)
            positions += len(apart)
        print(f"{device} {os.path.basename(model)}: {worst:.1e} on average, {wrong} of {positions} other argmax")
