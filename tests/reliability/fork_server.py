"""Imports once, then runs self-play in a process of its own for each line.

A line of the input is a run's folder; a line of the output the number of the
process, the next one how it ended.
"""

import os
import sys
from pathlib import Path

from self_play_helpers import make_self_play

print("ready", flush=True)
for line in sys.stdin:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(2, 1)
            make_self_play(Path(line.strip())).run()
            status = 0
        finally:
            os._exit(status)
    print(process, flush=True)
    _, end = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(end), flush=True)
