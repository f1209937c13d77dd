"""PixelSNAIL's incremental sampler against full passes:   python tests/benchmarks/pixelsnail.py

One map of 32 x 32 codes, batch 4, random weights (they do not matter to the time): the `cifar10` preset's top prior (with
attention), its bottom prior without condition, and rosinality's default sizes for the top prior at batch 1. Two plain ways: a pass
over the whole map for each code, and the release's, over the rows up to the code. A part of the 1,024 passes, evenly spread over
the rows, is timed and scaled up.
"""
import sys

import torch
from common import compare

from vqvae2 import PRESETS, PixelSNAIL, incremental

SIDE = 32


def ratio(net, codes, name, batch, passes):
    net.eval()
    drawn = torch.zeros(batch, SIDE, SIDE, dtype=torch.long)
    rows = torch.linspace(0, SIDE - 1, passes).round().int().tolist()

    @torch.no_grad()
    def plain(whole):
        for i in rows:
            torch.multinomial(net(drawn[:, :SIDE if whole else i + 1])[:, :, i, 5].softmax(1), 1)

    @torch.no_grad()
    def ours():
        codes = drawn.clone()
        with incremental(net, batch, SIDE) as at:
            for n in range(SIDE ** 2):
                at[:] = i, j = divmod(n, SIDE)
                codes[:, i, j] = torch.multinomial(net.position(codes, i, j).softmax(1), 1)[:, 0]
    for what, function in (("whole passes", lambda: plain(True)), ("passes over the rows so far (the release)", lambda: plain(False))):
        compare(f"{name}, {SIDE} x {SIDE}, batch {batch}: {what} against incremental", function, ours, scale=passes / SIDE ** 2)


if __name__ == "__main__":
    torch.manual_seed(0)
    c = PRESETS["cifar10"]
    for level, name in enumerate(("cifar10 top", "cifar10 bottom")):
        ratio(PixelSNAIL(SIDE, c.codebook_size, c.width[level], c.kernel, c.blocks[level], c.block_layers[level], c.res_width[level],
                         c.heads[level]), c.codebook_size, name, 4, 16)
    if "large" in sys.argv:
        ratio(PixelSNAIL(SIDE, 512, 256, 5, 4, 4, 256, 8), 512, "rosinality's default top prior", 1, 4)
