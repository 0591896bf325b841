"""Runs every benchmark on this machine, then rewrites the tables of the README.

python -m benchmarks      # CPU, about two minutes
"""

import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
# Each in a process of its own: none finds a device that another has filled.
_SCRIPTS = ("cycle.py", "streaming.py", "tables.py")

for script in _SCRIPTS:
    subprocess.run([sys.executable, str(_HERE / script)], check=True)
