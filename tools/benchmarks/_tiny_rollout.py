"""A rollout supervisor reduced to what the controller sees: publishes itself, has a detached child, leaves on TERM."""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--rendezvous", type=Path)
parser.add_argument("--node", type=int)
parser.add_argument("--stage")
args = parser.parse_args()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
child = subprocess.Popen(["sleep", f"3600.{args.node}"], start_new_session=True)
published = args.rendezvous / f"engine_{args.node}.json"
incarnation = json.loads(published.read_text())["incarnation"] + 1 if published.exists() else 0
published.write_text(json.dumps({"address": "127.0.0.1", "port": 0, "incarnation": incarnation, "child": child.pid}))
print(f"incarnation {incarnation}", flush=True)
while True:
    time.sleep(60)
