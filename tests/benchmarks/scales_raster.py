"""Next-scale against raster and masked decoding on one 16 x 16 map with the same network:   python tests/benchmarks/scales_raster.py [batch ...]

12 layers of 512, 1024 codes, random weights: VAR's ten scales (680 tokens), GPT with its cache (256 passes) and without, MaskGIT
(12 passes). Without guidance; decoders are left out, VAR's maps (area, bicubic, phi) are not. FLOPs: two per multiplication, of
matrices and attention, counted by formula (VAR's AdaLN matrices once an image). Ratios are times of the other / of VAR.
"""
import sys
from functools import partial

import torch
from common import compare
from gpt_cache import EVERY, full_passes
from masked_raster import HEADS, LAYERS, STEPS, WIDTH, WORK, V, gflop

import maskgit
import var
import vqgan_gpt


def main():
    torch.manual_seed(0)
    scales = var.SCALES[256]
    N, L = scales[-1] ** 2, sum(p * p for p in scales)
    same = dict(image_size=scales[-1], ch_mult=(1,), codebook_size=V, num_classes=1000, width=WIDTH, heads=HEADS, disc_weight=0.0)
    c = var.Config(**same, depth=LAYERS, scales=scales, code_dim=32)
    tokenizer, prior = var.build_tokenizer(c).eval(), var.build_prior(c).eval()
    tokenizer.decode_latents = lambda f_hat: f_hat                              # the decoder is no part of the comparison
    masked = maskgit.build_prior(maskgit.Config(**same, layers=LAYERS)).eval()
    c = vqgan_gpt.Config(**same, layers=LAYERS)
    codes, gpt = vqgan_gpt.build_tokenizer(c).eval(), vqgan_gpt.build_prior(c).eval()
    codes.decode = lambda indices: indices.float()
    pairs = sum(p * p * sum(q * q for q in scales[:k + 1]) for k, p in enumerate(scales))
    print(f"parameters: VAR {sum(p.numel() for p in prior.parameters()):,} (AdaLN {sum(p.numel() for b in prior.blocks for p in b.ada_lin.parameters()):,}), "
          f"GPT {sum(p.numel() for p in gpt.parameters()):,}, MaskGIT {sum(p.numel() for p in masked.parameters()):,}")
    work = {"VAR": (len(scales), gflop(L, pairs, L) + LAYERS * 12 * WIDTH ** 2 / 1e9)} | WORK
    for name, (passes, flops) in work.items():
        print(f"{name}: {passes} passes, {flops:.0f} GFLOP an image")
    labels = partial(torch.zeros, dtype=torch.long)
    ways = {"VAR": lambda batch: var.sample(tokenizer, prior, labels(batch)), "GPT, cached": lambda batch: vqgan_gpt.sample(codes, gpt, labels(batch)),
            "MaskGIT": lambda batch: maskgit.parallel_decode(masked, torch.full((batch, N), -1), labels(batch), steps=STEPS)}
    for batch in [int(word) for word in sys.argv[1:]] or [1, 16]:
        times = 3 if batch == 1 else 1                                          # a batch of 16 takes minutes
        for name in ("GPT, cached", "MaskGIT"):
            compare(f"batch {batch}: {name} against VAR", partial(ways[name], batch), partial(ways["VAR"], batch), times)
        compare(f"batch {batch}: GPT, uncached against VAR", partial(full_passes, gpt, batch), partial(ways["VAR"], batch), times, scale=1 / EVERY)


if __name__ == "__main__":
    main()
