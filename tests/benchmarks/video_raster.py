"""Masked against raster decoding of a clip's tokens with the same network:   python tests/benchmarks/video_raster.py [batch ...]

4 x 16 x 16 tokens of 1024 codes, 12 layers of 512, random weights: magvit.py's 12 passes, and vqgan_gpt.py's GPT with
its cache, a pass for each token. FLOPs as in masked_raster.py. Ratios are times of GPT / of masked.
"""
import sys
from functools import partial

import torch
from common import compare
from masked_raster import HEADS, LAYERS, STEPS, WIDTH, V, build_gpt, cached_work, masked_work

import magvit
import vqgan_gpt

T, SIDE = 4, 16
N = T * SIDE * SIDE


def main():
    torch.manual_seed(0)
    masked = magvit.build_prior(magvit.Config(
        frames=T, image_size=SIDE, ch_mult=(1,), temporal=(), codebook_size=V, num_classes=1000, tasks="CG", multi_task=False, layers=LAYERS,
        width=WIDTH, heads=HEADS)).eval()
    tokenizer, gpt = build_gpt(N)
    for name, (passes, flops) in {"MAGVIT": masked_work(N), "GPT, cached": cached_work(N)}.items():
        print(f"{name}: {passes} passes, {flops:.0f} GFLOP a clip")
    for batch in [int(word) for word in sys.argv[1:]] or [1, 16]:
        decode = partial(magvit.decode_tokens, masked, torch.full((batch, 1), V, dtype=torch.long), steps=STEPS)
        compare(f"batch {batch}: GPT with its cache against {STEPS} masked passes",
                partial(vqgan_gpt.sample, tokenizer, gpt, torch.zeros(batch, dtype=torch.long)), decode, 3 if batch == 1 else 1)


if __name__ == "__main__":
    main()
