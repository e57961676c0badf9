"""What two settings and subnormal numbers do to Paddle's matrix products on this machine.

    python benchmarks/cpu_math.py

The settings, MKL_DEBUG_CPU_TYPE and OMP_NUM_THREADS, are read once a process, so each combination
has a process of its own. model.set_device applies the last one on AMD processors with AVX2;
elsewhere only the number of threads. The last row is a product of the attention's backward pass:
masked keys leave numbers of 1e-39 in it, with which Intel processors compute many times more slowly
than with zeros, so model.scaled_backward keeps the gradients away from there.
"""

import os
import timeit

import common
import numpy as np

import utils

model, paddle = utils.LazyModule("model"), utils.LazyModule("paddle")


def main():
    print(f"Processor: {utils.processor()}", flush=True)
    os.environ.pop("MKL_DEBUG_CPU_TYPE", None)
    default = None
    for mkl in ({}, {"MKL_DEBUG_CPU_TYPE": "5"}):
        for threads in (1, utils.num_cores()):
            settings = {**mkl, "OMP_NUM_THREADS": str(threads)}
            speed = common.in_new_process(feed_forward, settings)
            default = default or speed
            common.print_row(**settings, gflops=speed, times_default=speed / default)
    subnormals, zeros = common.in_new_process(backward_of_attention)
    row = {"product": "dS @ K", "ms_with_subnormals": subnormals, "ms_with_zeros": zeros}
    common.print_row(**row, ratio=subnormals / zeros)


def feed_forward(settings):
    """GFLOP/s of nano's feed-forward layer on 32 texts of 54 tokens."""
    os.environ.update(settings)  # Paddle is imported after it
    a, b = paddle.randn([1728, 312]), paddle.randn([312, 1248])
    return 2 * 1728 * 312 * 1248 / seconds(a, b) / 1e9


def backward_of_attention():
    """Milliseconds of nano's dS @ K on 32 texts of 128 tokens, half of them padding.

    dS: gradients of the attention scores, those of masked keys 1e-39 or 0; K: keys.
    """
    model.set_device("cpu")
    rng, result = np.random.default_rng(3), []
    gradients = rng.normal(size=(32, 12, 128, 128)).astype(np.float32)
    keys = paddle.to_tensor(rng.normal(size=(32, 12, 128, 26)).astype(np.float32))
    for masked in (1e-39, 0):
        gradients[..., 64:] = masked
        result.append(1000 * seconds(paddle.to_tensor(gradients), keys))
    return result


def seconds(a, b):
    """Of one product of two tensors: the best mean of five."""
    return min(timeit.repeat(lambda: paddle.matmul(a, b), number=5, repeat=20)) / 5


if __name__ == "__main__":
    utils.cli(main)
