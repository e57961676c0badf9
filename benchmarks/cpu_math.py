"""What MKL_DEBUG_CPU_TYPE and OMP_NUM_THREADS do to Paddle's matrix products on this machine.

    python benchmarks/cpu_math.py

Both are read once a process, so every setting has a process of its own. export_model.set_device
applies the last row on AMD processors with AVX2; elsewhere only the number of threads.
"""

import json
import os
import subprocess
import sys

MEASURE = """
import time, zlib
import paddle
a, b = paddle.randn([1728, 312]), paddle.randn([312, 1248])  # 32 texts of 54 tokens, nano's FFN
best = float("inf")
for _ in range(20):
    start = time.perf_counter()
    for _ in range(5):
        paddle.matmul(a, b)
    best = min(best, (time.perf_counter() - start) / 5)
print(2 * 1728 * 312 * 1248 / best / 1e9)
"""


def main():
    threads = len(os.sched_getaffinity(0))
    first = None
    for mkl, omp in ((None, 1), (None, threads), ("5", 1), ("5", threads)):
        environment = {**os.environ, "OMP_NUM_THREADS": str(omp)}
        environment.pop("MKL_DEBUG_CPU_TYPE", None)
        if mkl:
            environment["MKL_DEBUG_CPU_TYPE"] = mkl
        command = [sys.executable, "-c", MEASURE]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        speed = float(run.stdout.split()[-1])
        first = first or speed
        row = {"MKL_DEBUG_CPU_TYPE": mkl, "OMP_NUM_THREADS": omp, "GFLOP/s": round(speed, 1)}
        print(json.dumps({**row, "times_default": round(speed / first, 2)}), flush=True)


if __name__ == "__main__":
    main()
