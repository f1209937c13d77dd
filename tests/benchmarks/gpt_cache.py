"""Cached against uncached sampling of vqgan_gpt.py's GPT:   python tests/benchmarks/gpt_cache.py

12 layers, width 512, 256 codes of 1024, random weights. Uncached is what the official release's sample() does: a full pass
over the sequence so far for every code, of which the last logits are used; every 32nd pass is timed and the time scaled up.
"""
import torch
from common import compare

from vqgan_gpt import Config, build_prior, build_tokenizer, draw, sample

N, EVERY = 256, 32


@torch.no_grad()
def full_passes(gpt, batch):
    """One in EVERY of the passes that draw N codes without a cache: each over the whole sequence so far."""
    for i in range(EVERY // 2, N, EVERY):                                       # lengths 17, 49 ... 241: their mean is that of all
        draw(gpt.transformer(torch.zeros(batch, i + 1, dtype=torch.long))[:, -1])


def ratio(batch, **sizes):
    torch.manual_seed(0)
    config = Config(image_size=16, ch_mult=(1,), codebook_size=1024, num_classes=1000, **sizes)
    tokenizer, prior = build_tokenizer(config).eval(), build_prior(config).eval()
    tokenizer.decode = lambda indices: indices.float()                          # the decoder is no part of the comparison
    labels = torch.zeros(batch, dtype=torch.long)
    return compare(f"{config.layers} layers of {config.width}, {N} codes, batch {batch}: full passes against the cache", lambda: full_passes(prior, batch),
                   lambda: sample(tokenizer, prior, labels, generator=torch.Generator().manual_seed(0)), scale=1 / EVERY)


if __name__ == "__main__":
    for batch in (1, 16):
        ratio(batch, layers=12, heads=8, width=512)
