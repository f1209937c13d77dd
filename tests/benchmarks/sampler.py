"""Incremental sampling against full passes:   python tests/benchmarks/sampler.py

The `mnist` preset's model with random weights (they do not matter to the time), batch 16, at 16, 28 and 32 pixels; then the
demo's, with three colours. Full passes all cost the same, so a part of the N passes is timed and scaled up.
"""
import dataclasses

import torch
from common import compare

from pixelcnn import PRESETS, build_prior, build_tokenizer, sample

BATCH, PASSES = 16, 20


def ratio(config, name):
    torch.manual_seed(0)
    tokenizer, prior = build_tokenizer(config), build_prior(config).eval()
    labels = torch.zeros(BATCH, dtype=torch.long)
    N = config.image_size ** 2 * config.colours
    tokens = torch.zeros(BATCH, N, dtype=torch.long)

    @torch.no_grad()
    def full_passes():
        for i in range(PASSES):
            prior.draw(prior(tokens, labels)[:, i])
    compare(f"{name}, {config.image_size} x {config.image_size}: {N} full passes against one incremental sample, batch {BATCH}",
            full_passes, lambda: sample(tokenizer, prior, labels, generator=torch.Generator().manual_seed(0)), scale=PASSES / N)


if __name__ == "__main__":
    for size in (16, 28, 32):
        ratio(dataclasses.replace(PRESETS["mnist"], image_size=size), "mnist")
        ratio(dataclasses.replace(PRESETS["mnist"], image_size=size, model="pixelcnn", layers=15), "mnist, plain PixelCNN of 15 blocks")
    ratio(PRESETS["demo"], "demo")
