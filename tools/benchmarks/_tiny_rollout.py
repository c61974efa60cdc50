"""A rollout supervisor reduced to what the controller sees: publishes itself, has a detached child in the place of an
engine, which it starts again when it is gone, leaves on TERM.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from megatron_vcppo.run.files import write_text

parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--rendezvous", type=Path)
parser.add_argument("--node", type=int)
parser.add_argument("--stage")
args = parser.parse_args()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
published = args.rendezvous / f"engine_{args.node}.json"
incarnation = json.loads(published.read_text())["incarnation"] + 1 if published.exists() else 0
while True:
    child = subprocess.Popen(["sleep", f"3600.{args.node}"], start_new_session=True)
    engine = {"address": "127.0.0.1", "port": 0, "incarnation": incarnation, "child": child.pid}
    write_text(published, json.dumps(engine))
    print(f"incarnation {incarnation}", flush=True)
    child.wait()
    incarnation += 1
