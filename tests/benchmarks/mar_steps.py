"""MAR-B at 256 px, random weights: where the time goes as iterations and denoising steps change, and against the release's way:

    python tests/benchmarks/mar_steps.py [batch]

The release's way of the same step: time and z are embedded anew in every denoising step, and the "no class" half of the tokens
is carried along and overwritten before each (models/diffloss.py, gaussian_diffusion.py); mar.py embeds both once and keeps one
half. Outputs are equal up to rounding. With guidance, as the release's table.
"""
import sys
import time

import torch
from common import compare

import mar


def official(self, z, z_null=None, guidance=1.0, temperature=1.0, chain=None, draw=None, clip_x0=0.0):
    """DiffLoss.sample as the release does it."""
    net, both = self.net, torch.cat([z, z_null])
    x = draw(len(z), self.channels).repeat(2, 1)
    for i in reversed(range(len(chain.times))):
        x = torch.cat([x[:len(z)], x[:len(z)]])
        t = torch.full((len(x),), int(chain.times[i]))
        eps, v = net(x, net.time_embed(t) + net.cond_embed(both))
        eps, null = eps.chunk(2)
        eps = (null + guidance * (eps - null)).repeat(2, 1)
        x = chain.step(x, i, eps, v, draw(len(z), self.channels).repeat(2, 1), temperature)
    return x[:len(z)]


def main():
    batch, config = int(sys.argv[1]) if len(sys.argv) > 1 else 1, mar.PRESETS["imagenet256-base"]
    torch.manual_seed(0)
    tokenizer, prior = mar.build_tokenizer(config).eval(), mar.build_prior(config).eval()
    for p in prior.diffloss.net.final_layer.parameters():                       # a head that says something, of little weight
        p.data = 1e-4 * torch.randn(p.shape)
    labels, spent = torch.zeros(batch, dtype=torch.long), {}

    def timed(name, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            out = function(*args, **kwargs)
            spent[name] = spent.get(name, 0) + time.perf_counter() - start
            return out
        return call

    def draw(N, S):
        return mar.sample(tokenizer, prior, labels, sample_steps=N, denoise_steps=S, guidance=2.9, generator=torch.Generator().manual_seed(0))
    plain = prior.forward, prior.diffloss.sample, tokenizer.decode
    prior.forward, prior.diffloss.sample, tokenizer.decode = (timed(name, f) for name, f in zip(("transformer", "head", "decoder"), plain))
    for N, S in ((8, 25), (8, 100), (64, 25), (64, 100)):
        spent.clear()
        start = time.perf_counter()
        draw(N, S)
        whole = time.perf_counter() - start
        print(f"batch {batch}, {N:2} iterations of {S:3} steps: {whole:6.1f} s, of which transformer {spent['transformer'] / whole:4.0%}, head "
              f"{spent['head'] / whole:4.0%}, decoder {spent['decoder'] / whole:4.0%}", flush=True)
    print(f"peak memory {mar.peak_memory():,} MiB, {torch.get_num_threads()} threads")
    prior.forward, prior.diffloss.sample, tokenizer.decode = plain
    tokenizer.decode = lambda latents: latents
    ours = mar.DiffLoss.sample

    def released():
        mar.DiffLoss.sample = official
        out = draw(4, 100)
        mar.DiffLoss.sample = ours
        return out
    torch.testing.assert_close(released(), draw(4, 100), rtol=1e-3, atol=1e-3)
    compare(f"batch {batch}, 4 iterations of 100 steps: the release's way against mar.py's, decoder left out", released, lambda: draw(4, 100))


if __name__ == "__main__":
    main()
