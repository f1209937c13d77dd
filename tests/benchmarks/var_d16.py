"""VAR-d16 at 256 px, random weights: seconds, memory, where the time goes, and against the release's way:   python tests/benchmarks/var_d16.py [batch]

The release's way of the same step: every AdaLN matrix is applied anew at each scale, and keys and values are kept by concatenation;
var.sample applies the matrices once and writes into a cache. Outputs are equal. With guidance, as the release's demo.
"""
import sys
import time

import torch
from common import compare

import var


class Joined:
    """The release's cache."""
    k = v = None

    def __init__(self, size):
        pass

    def __call__(self, k, v):
        self.k, self.v = (k, v) if self.k is None else (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        return self.k, self.v


class Anew(var.VAR):
    """The same transformer: what AdaLNs make of the class is computed in every pass."""
    def modulation(self, cond):
        return cond

    def logits(self, x, cond, mask=None, cache=None):
        return super().logits(x, super().modulation(cond), mask, cache)


def main():
    batch, config = int(sys.argv[1]) if len(sys.argv) > 1 else 1, var.PRESETS["imagenet256-d16"]
    torch.manual_seed(0)
    start = time.perf_counter()
    tokenizer, prior = var.build_tokenizer(config).eval(), var.build_prior(config).eval()
    print(f"built in {time.perf_counter() - start:.0f} s: {sum(p.numel() for p in tokenizer.parameters()):,} and {sum(p.numel() for p in prior.parameters()):,} parameters")
    settings = dict(top_k=900, top_p=0.96, guidance=2.5)
    start = time.perf_counter()
    var.sample(tokenizer, prior, torch.zeros(batch, dtype=torch.long), generator=torch.Generator().manual_seed(0), **settings)
    whole, start = time.perf_counter() - start, time.perf_counter()
    with torch.no_grad():
        tokenizer.decode_latents(torch.randn(batch, 32, 16, 16))
    print(f"batch {batch}: {whole:.1f} s in all, of which the decoder {time.perf_counter() - start:.1f} s; peak memory {var.peak_memory():,.0f} MiB")
    q = tokenizer.quantize
    f = torch.randn(batch, 32, 16, 16)
    with torch.no_grad():
        tokens, start = q.indices(f), time.perf_counter()
        q.inputs(tokens)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        prior.modulation(prior.condition(torch.zeros(2 * batch, dtype=torch.long), 2 * batch))
    print(f"of it: all maps (area, bicubic, phi) {seconds:.2f} s, AdaLN's matrices once {time.perf_counter() - start:.2f} s")
    tokenizer.decode_latents, ours = lambda f_hat: f_hat, var.Cache       # from here on the transformer alone

    def draw(anew):
        prior.__class__, var.Cache = (Anew, Joined) if anew else (var.VAR, ours)
        out = var.sample(tokenizer, prior, torch.zeros(batch, dtype=torch.long), generator=torch.Generator().manual_seed(0), **settings)
        prior.__class__, var.Cache = var.VAR, ours
        return out
    assert torch.equal(draw(True), draw(False))
    compare(f"batch {batch}: AdaLN at every scale and joined caches, as the release, against var.sample; decoder left out", lambda: draw(True), lambda: draw(False))


if __name__ == "__main__":
    main()
