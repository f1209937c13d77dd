"""Masked against raster decoding of the same tokens with the same network:   python tests/benchmarks/masked_raster.py [batch ...]

256 tokens of 1024 codes, 12 layers of 512, random weights, 12 masked passes; vqgan_gpt.py's GPT with its cache, and without (as
gpt_cache.py). FLOPs: two per multiplication, of matrices and attention, counted by formula. Ratios are times of GPT / of masked.
"""
import sys
from functools import partial

import torch
from common import compare
from gpt_cache import EVERY, N, full_passes

import maskgit
import vqgan_gpt

V, LAYERS, WIDTH, HEADS, STEPS = 1024, 12, 512, 8, 12


def gflop(tokens, pairs, logits):
    """Of passes that in sum take so many tokens, attend over so many pairs of tokens and give so many logit vectors."""
    return (LAYERS * (24 * WIDTH ** 2 * tokens + 4 * WIDTH * pairs) + 2 * WIDTH * V * logits) / 1e9


def masked_work(n):
    """Passes, GFLOP of n tokens and a class."""
    return STEPS, gflop(STEPS * (n + 1), STEPS * (n + 1) ** 2, STEPS * n)


def cached_work(n):
    return n, gflop(n, n * (n + 1) / 2, n)


def build_gpt(n):
    """-> tokenizer, GPT over n codes in a square."""
    c = vqgan_gpt.Config(image_size=int(n ** 0.5), ch_mult=(1,), codebook_size=V, num_classes=1000, layers=LAYERS, width=WIDTH, heads=HEADS)
    tokenizer, gpt = vqgan_gpt.build_tokenizer(c).eval(), vqgan_gpt.build_prior(c).eval()
    tokenizer.decode = lambda indices: indices.float()                          # the decoder is no part of the comparison
    return tokenizer, gpt


WORK = {"MaskGIT": masked_work(N), "GPT, cached": cached_work(N),              # an image
        "GPT, uncached": (N, gflop(N * (N + 1) / 2, sum(i * i for i in range(1, N + 1)), N))}


def main():
    torch.manual_seed(0)
    side = int(N ** 0.5)
    c = maskgit.Config(image_size=side, ch_mult=(1,), codebook_size=V, num_classes=1000, layers=LAYERS, width=WIDTH, heads=HEADS,
                       disc_weight=0.0)
    masked = maskgit.build_prior(c).eval()
    tokenizer, gpt = build_gpt(N)
    for name, (passes, flops) in WORK.items():
        print(f"{name}: {passes} passes, {flops:.0f} GFLOP an image")

    def decode(batch):
        maskgit.parallel_decode(masked, torch.full((batch, N), -1), torch.zeros(batch, dtype=torch.long), steps=STEPS)

    def cached(batch):
        vqgan_gpt.sample(tokenizer, gpt, torch.zeros(batch, dtype=torch.long))
    for batch in [int(word) for word in sys.argv[1:]] or [1, 16]:
        pairs = 3 if batch == 1 else 1                                          # a batch of 16 takes minutes
        compare(f"batch {batch}: GPT with its cache against {STEPS} masked passes", partial(cached, batch), partial(decode, batch), pairs)
        compare(f"batch {batch}: GPT without cache against {STEPS} masked passes", partial(full_passes, gpt, batch), partial(decode, batch), pairs,
                scale=1 / EVERY)


if __name__ == "__main__":
    main()
