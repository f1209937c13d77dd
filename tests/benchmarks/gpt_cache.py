"""Cached against uncached sampling of vqgan_gpt.py's GPT:   python tests/benchmarks/gpt_cache.py

12 layers, width 512, 256 codes of 1024, random weights. Uncached is what the official release's sample() does: a full pass
over the sequence so far for every code, of which the last logits are used; every 32nd pass is timed and the time scaled up.
"""
import torch
from common import compare

from vqgan_gpt import Config, build_prior, build_tokenizer, draw, sample

N, EVERY = 256, 32


def ratio(batch, **sizes):
    torch.manual_seed(0)
    config = Config(image_size=16, ch_mult=(1,), codebook_size=1024, num_classes=1000, **sizes)
    tokenizer, prior = build_tokenizer(config).eval(), build_prior(config).eval()
    tokenizer.decode = lambda indices: indices.float()                          # the decoder is no part of the comparison
    labels, codes = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, N, dtype=torch.long)

    @torch.no_grad()
    def uncached():
        for i in range(EVERY // 2, N, EVERY):                                   # lengths 17, 49 ... 241: their mean is that of all
            x = torch.cat([labels[:, None], codes[:, :i]], 1)
            draw(prior.transformer(x)[:, -1])
    return compare(f"{config.layers} layers of {config.width}, {N} codes, batch {batch}: full passes against the cache", uncached,
                   lambda: sample(tokenizer, prior, labels, generator=torch.Generator().manual_seed(0)), scale=1 / EVERY)


if __name__ == "__main__":
    for batch in (1, 16):
        ratio(batch, layers=12, heads=8, width=512)
