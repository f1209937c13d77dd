"""The frame of all benchmarks: two ways of doing the same thing, timed in turn in one run; only their ratio is printed.

A ratio of times measured minutes apart, or on another machine, says little; A B A B in one process says what it says.
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def compare(name, slow, fast, pairs=3, scale=1.0):
    """Run slow() and fast() in turn after one warm-up each; print how many times as long slow takes (min, median, max of pairs).

    scale: slow() does this share of the work (a tenth of the passes, say), and its time is divided by it.
    """
    import torch
    seconds = []
    for pair in range(pairs + 1):
        times = []
        for function in (slow, fast):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        if pair:                                                        # the first pair is the warm-up
            seconds.append((times[0] / scale, times[1]))
    ratios = sorted(a / b for a, b in seconds)
    print(f"{name}: {statistics.median(ratios):.1f} times  ({ratios[0]:.1f} to {ratios[-1]:.1f} in {pairs} pairs, "
          f"{torch.get_num_threads()} threads)", flush=True)
    return statistics.median(ratios)
