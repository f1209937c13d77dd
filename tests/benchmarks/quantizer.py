"""The quantizer against the package vector-quantize-pytorch:   pip install vector-quantize-pytorch; python tests/benchmarks/quantizer.py

Forward and backward of one batch of 16 x 256 latents (16 images of 256 px at f = 16) to 16,384 codes of width 256, both codebooks
trained by gradient; then the memory each takes at its peak, in a process of its own.
"""
import re
import subprocess
import sys
from pathlib import Path

import torch
from common import compare

from vqgan_gpt import VectorQuantizer

V, E, B, SIDE = 16384, 256, 16, 16


def ours():
    return VectorQuantizer(V, E), lambda q, z: q(z)[::2]


def package():
    from vector_quantize_pytorch import VectorQuantize
    q = VectorQuantize(dim=E, codebook_size=V, learnable_codebook=True, ema_update=False, accept_image_fmap=True)
    return q, lambda q, z: q(z)[::2]


def step(make):
    torch.manual_seed(0)
    q, call = make()
    z = torch.randn(B, E, SIDE, SIDE, requires_grad=True)

    def run():
        z_q, loss = call(q, z)
        (z_q.square().mean() + loss.sum()).backward()
    return run


def peak():
    """Largest resident memory of this process in MiB (getrusage would inherit the parent's)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) >> 10


if __name__ == "__main__":
    if len(sys.argv) > 1:                                                       # the peak of one of the two
        run, before = step({"ours": ours, "package": package}[sys.argv[1]]), peak()
        run()
        print(peak() - before)
    else:
        compare(f"{B * SIDE * SIDE} latents, {V:,} codes of {E}, forward and backward: vector-quantize-pytorch against ours",
                step(package), step(ours))
        for name in ("package", "ours"):
            more = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout.strip()
            print(f"{name}: {more} MiB more at the peak of a step than before it")
