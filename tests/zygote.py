"""Starts a job as a fork of a process that has imported everything, so that killing one many times costs little.

Reads one JSON list a line, [what, settings], forks, and prints the child's process id; the child prints "end" when it is done."""
import json
import os
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore")
    from world import register_tiny
    from xmic.features import ExtractConfig, extract_dataset
    from xmic.files import settings
    from xmic.config import TrainConfig
    from xmic.training import train

    register_tiny()
    for line in sys.stdin:
        what, values = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            extract_dataset(settings(ExtractConfig, values)) if what == "extract" else train(settings(TrainConfig, values))
            print("end", flush=True)
            os._exit(0)
        print(child, flush=True)
        print(f"exit {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
