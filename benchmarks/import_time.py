"""How long `import lavis` and `python train.py --help` take, and what they import: python benchmarks/import_time.py"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"import lavis": (["-c", "import lavis"], 0.3), "train.py --help": (["train.py", "--help"], 1.0)}
"""What is measured: the interpreter's arguments and the most seconds it may take."""
REPEATS = 5


def seconds(arguments: list[str]) -> float:
    """Median wall time of a fresh interpreter, in seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def heaviest_imports(arguments: list[str], most: int = 5) -> list[tuple[float, str]]:
    """(seconds in itself, module), largest first, from -X importtime."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr)
    return sorted(((int(us) / 1e6, module) for us, module in rows), reverse=True)[:most]


def main() -> int:
    """Print the figures; 1 if a limit is passed."""
    slow = False
    for name, (arguments, limit) in LIMITS.items():
        median = seconds(arguments)
        slow |= median > limit
        print(f"{name}: {median:.3f} s, median of {REPEATS} (limit {limit} s)")
        for own, module in heaviest_imports(arguments):
            print(f"    {own * 1e3:6.1f} ms  {module}")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
