# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66", "pillow>=10"]
# ///
"""VQ-VAE and VQ-VAE-2: an image is one or several small maps of learned codes; PixelCNNs with attention predict them.

    VQ-VAE    van den Oord, Vinyals, Kavukcuoglu: Neural Discrete Representation Learning, NIPS 2017, arXiv 1711.00937
    VQ-VAE-2  Razavi, van den Oord, Vinyals: Generating Diverse High-Fidelity Images with VQ-VAE-2, arXiv 1906.00446
    Code      of VQ-VAE-2 was never released. This file computes what rosinality/vq-vae-2-pytorch computes (which made
              the one published checkpoint: from_official) and has the codebook rule of deepmind/sonnet as an option

The idea. An autoencoder whose latents are rounded, vector by vector, to the nearest of V learned codes: the decoder
gets integers; the rounding passes gradients straight through. A code is the running mean of the latents that chose it
(in 2017 also: learned by gradient). Training is plain squared error, no adversary: no mode is dropped, and detail that
the codes do not carry becomes blur. VQ-VAE-2 stacks such maps: a small TOP map holds the shape of the whole image; the
BOTTOM map, twice as wide, is encoded knowing the top and adds the detail. Then an autoregressive prior per map:
p(top | class) p(bottom | top, class), each a PixelSNAIL: gated causal convolutions, and attention where the map is
small enough. One level is VQ-VAE.

    images (B,3,H,W) -> encoder 1/4 -> encoder 1/2 -> nearest code -> top (B,H/8,W/8)
                             '--- + decoded top -----> nearest code -> bottom (B,H/4,W/4);  both -> decoder -> images
    class -> PixelSNAIL -> top, code by code in raster order; class, top -> PixelSNAIL -> bottom -> decoder -> images

Glossary
    level      0 is the top (coarsest); every next one has twice the side; the last is the bottom, at 1/4 of the image
    V, E       codes of a level, width of a code (release: n_embed, embed_dim)      C, R  features, inside a residual
    N, tokens  codes of all levels in the order they are drawn: top first, each level row by row
    condition  what a prior is told at each position: its class, and features of the coarser levels' codes

Run
    python vqvae2.py                                                the demo: nine shapes by class, minutes on two cores
    python vqvae2.py train --preset cifar10 --data FOLDER_OR_ZIP --out RUN
    python vqvae2.py sample RUN --labels cat dog --num 16           (also: complete, reconstruct, evaluate RUN; --help)
    python vqvae2.py reconstruct --official vqvae_560.pt photo.jpg

Contents   Config and presets, Tokenizer, Prior, Losses, Sampler, Training, Official weights, Helpers, Command line
Not here   VQ-VAE's WaveNet for speech and its video model. Classifier-based rejection sampling: see the notebook.
Departs    Three levels and classes are in no released code: built by analogy, from the paper's text. The restart of
           unused codes and running means that start from the code itself ("ema") are ours, off in the papers' presets.
           All levels' priors train in one loop, side by side; one dropout holds for all blocks of a level.
"""
import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from tqdm import tqdm


# === Config and presets: every number of both stages ==================================================================
@dataclass
class Config:
    """All settings; each comment is also the flag's --help. The defaults are the demo. Tuples: a number per level."""
    data: str = "shapes"            # shapes, mnist, cifar10, or a folder or .zip with train/<class>/*, test/<class>/*
    data_dir: str = "data"          # where mnist and cifar10 are looked for, or downloaded to
    train_images: int = 0           # use only this many training images (0: all; of the endless shapes 20,000)
    test_images: int = 0            # use only this many test images (0: all; of the endless shapes 2,000)
    skip_corrupt: bool = False      # leave out images that cannot be read, instead of stopping
    image_size: int = 32            # side of the (square) images in pixels
    num_classes: int = 9            # classes the priors are told (0: none)
    # tokenizer
    levels: int = 2                 # maps of codes: 1 is VQ-VAE, 2 and 3 are VQ-VAE-2
    channels: int = 64              # C, features of encoders and decoders
    res_blocks: int = 2             # residual blocks of each of them
    res_channels: int = 32          # R, features inside a residual block
    inplace_relu: bool = False      # QUIRK of the published checkpoint: residual blocks compute relu(x) + f(x)
    code_dim: int = 16              # E, width of a code
    codebook_size: int = 128        # V, codes of each level
    codebook: str = "ema"           # ema, release or debiased (running means), gradient (VQ-VAE): see Quantizer
    beta: float = 0.25              # weight of the commitment term
    codebook_decay: float = 0.95    # decay of the running means
    restart: int = 20               # a code unused for so many steps moves to a random latent of the batch (0: never)
    # priors
    width: tuple = (64, 64)         # features of each level's PixelSNAIL
    res_width: tuple = (32, 32)     # features inside its gated residual blocks
    blocks: tuple = (1, 1)          # blocks: residual blocks, then attention
    block_layers: tuple = (4, 4)    # gated residual blocks in a block
    heads: tuple = (4, 0)           # heads of the attention that ends a block (0: none)
    cond_width: tuple = (32, 32)    # features of the condition (0: the level is told nothing)
    cond_blocks: tuple = (0, 2)     # residual blocks on the codes of the coarser levels
    out_blocks: tuple = (0, 0)      # residual 1 x 1 blocks before the logits
    kernel: int = 3                 # n of the causal n x n kernels (release: 5)
    dropout: tuple = (0, 0)         # dropout inside the residual blocks and of the attention, in per cent
    # training
    seed: int = 0                   # a step is a function of (seed, step)
    batch_size: int = 16            # images per step of the tokenizer, over all processes
    batch_size_prior: int = 16      # images per step of the priors, over all processes
    train_steps_tokenizer: int = 1600  # steps of the tokenizer
    train_steps_prior: int = 3000   # steps of the priors
    lr_tokenizer: float = 1.5e-3    # learning rate of Adam for the tokenizer (release: 3e-4)
    lr_prior: float = 3e-3          # learning rate of Adam for the priors (release: 3e-4)
    warmup: int = 100               # steps of warm-up; then a cosine to zero (0: constant, as the release)
    clip: float = 1.0               # gradients of each prior are scaled down to this norm (0: never, as the release)
    log_every: int = 10             # steps between two rows of metrics.jsonl
    save_every: int = 250           # steps between two checkpoints
    temperature: float = 0.9        # logits are divided by it in sampling (the papers: 1)
    compile: bool = False           # torch.compile (CUDA)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is tuple:
                setattr(self, field.name, tuple(getattr(self, field.name)))

    @property
    def sides(self):
        """Side of each level's map, top first."""
        return [self.image_size // (4 << level) for level in reversed(range(self.levels))]

    @property
    def f(self):
        """Downsampling factor of the top level."""
        return 4 << (self.levels - 1)


# The papers' sizes (appendix tables); learning rates, and one batch size and one step count for all priors, are ours
PAPER = dict(channels=128, res_channels=64, code_dim=64, codebook_size=512, codebook="release", codebook_decay=0.99,
             restart=0, kernel=5, batch_size=128, lr_tokenizer=3e-4, lr_prior=3e-4, warmup=0, clip=0.0,
             save_every=2000, log_every=50, temperature=1.0)
PRESETS = {
    "demo": Config(),
    "mnist": Config(data="mnist", image_size=32, num_classes=10),
    # lr_tokenizer: at 1e-3 the top level collapsed within 300 steps (the bottom alone does), at 5e-4 it is in full use
    "cifar10": Config(data="cifar10", num_classes=10, channels=96, res_channels=48, code_dim=32, codebook_size=512,
                      codebook_decay=0.98, width=(64, 96), res_width=(64, 64), blocks=(1, 2), cond_width=(64, 64),
                      train_steps_tokenizer=6000, lr_tokenizer=5e-4, train_steps_prior=8000, lr_prior=2e-3,
                      temperature=0.8),
    "imagenet256": Config(**PAPER | dict(
        data="imagenet256", image_size=256, num_classes=1000, width=(512, 512), res_width=(2048, 1024), blocks=(4, 4),
        block_layers=(5, 5), heads=(8, 0), cond_width=(512, 512), cond_blocks=(0, 20), out_blocks=(20, 0),
        dropout=(10, 10), batch_size_prior=512, train_steps_tokenizer=2_207_444, train_steps_prior=1_600_000)),
    "ffhq1024": Config(**PAPER | dict(
        data="ffhq1024", image_size=1024, num_classes=0, levels=3, width=(512, 512, 512), res_width=(2048, 1024, 1024),
        blocks=(4, 1, 1), block_layers=(5, 20, 10), heads=(8, 8, 0), cond_width=(0, 512, 512), cond_blocks=(0, 8, 8),
        out_blocks=(0, 0, 0), dropout=(50, 30, 25), batch_size_prior=256, train_steps_tokenizer=304_741,
        train_steps_prior=270_000)),
}


# === Tokenizer: images <-> maps of codes ==============================================================================
# Copied from vqgan_gpt.py
def nearest(z, codebook, limit=2 ** 22):
    """Index of the codebook's row nearest to each row of z.  z (n, E), codebook (V, E) -> (n,) int64.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all e. At most `limit` distances exist at a time.
    """
    square, rows = codebook.square().sum(1), max(1, limit // len(codebook))
    return torch.cat([torch.addmm(square, part, codebook.T, alpha=-2).argmin(1) for part in z.split(rows)])


class Quantizer(nn.Module):
    """The nearest of V codes for every position; codes are running means of the latents that chose them.

    For code k, n of the batch's latents chose it and s is their sum (VQ-VAE appendix A.1, eq. 6 to 8):
        cluster_size <- decay cluster_size + (1 - decay) n        embed_avg <- decay embed_avg + (1 - decay) s
        code <- embed_avg / cluster_size, where Laplace smoothing, (c + eps) / (sum c + V eps) * sum c, avoids 0 / 0
    codebook, how it starts:
        "ema"       cluster_size 1, embed_avg the code itself: nothing jumps (a code in no use slowly shrinks to 0)
        "release"   QUIRK: cluster_size 0. A code unused in step 1 is divided by eps, lands 1e5 times its value away,
                    and is back after about 1,150 steps at decay 0.99: until then nearly all latents share a few codes
        "debiased"  (sonnet) both averages from 0, divided by 1 - decay^t: an unused code is exactly 0 after step 1
        "gradient"  (VQ-VAE eq. 3) no means: codes are parameters, moved by a loss of their own
    restart > 0: a code that nothing chose in the first step, or later for so many, becomes a latent of the batch (of
    several processes: of the first one's part).   Source: rosinality vqvae.py Quantize; sonnet nets/vqvae.py.
    """
    def __init__(self, size, dim, codebook="ema", decay=0.99, beta=0.25, restart=0):
        super().__init__()
        self.codebook, self.decay, self.beta, self.restart = codebook, decay, beta, restart
        embed = torch.randn(size, dim)                                          # a code is a row (release: a column)
        if codebook == "gradient":
            self.embed = nn.Parameter(embed)
        else:
            debiased = codebook == "debiased"
            self.register_buffer("embed", embed)
            self.register_buffer("cluster_size", torch.ones(size) * (codebook == "ema"))
            self.register_buffer("embed_avg", torch.zeros_like(embed) if debiased else embed.clone())
            if debiased:
                self.register_buffer("steps", torch.zeros(()))
        if restart:
            self.register_buffer("idle", torch.full((size,), float(restart)))   # step 0 moves all it does not use

    def indices(self, z):
        """z (B, E, h, w) -> (B, h, w) int64.  Always float32: in bfloat16 distances tie, and a tie is no choice."""
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(self.embed.dtype)
            return nearest(flat, self.embed).view(len(z), *z.shape[2:])

    def lookup(self, indices):
        """indices (B, h, w) -> z_q (B, E, h, w)."""
        return F.embedding(indices, self.embed).permute(0, 3, 1, 2)

    def forward(self, z, generator=None):
        """z (B, E, h, w) -> z_q of that shape, indices (B, h, w), loss. Straight-through: z gets z_q's gradient.

        z_q and the loss are those of the codebook before its update. Means are over all elements, not sums over E.
        """
        z = z.to(self.embed.dtype)
        indices = self.indices(z)
        z_q = self.lookup(indices)
        loss = self.beta * F.mse_loss(z, z_q.detach())                          # commitment: latents stay near codes
        if self.codebook == "gradient":
            loss = loss + F.mse_loss(z_q, z.detach())
        out = z + (z_q - z).detach()
        if self.training:
            self.update(z.detach().permute(0, 2, 3, 1).flatten(0, 2), indices.flatten(), generator)
        return out, indices, loss

    @torch.no_grad()
    def update(self, z, indices, generator=None):
        """What codes do between gradient steps: follow the mean of their latents z (n, E); start anew where unused."""
        V, means = len(self.embed), self.codebook != "gradient"
        count = torch.bincount(indices, minlength=V).to(z)
        total = torch.zeros_like(self.embed).index_add_(0, indices, z)
        for t in (count, total) if dist.is_initialized() else ():
            dist.all_reduce(t)
        if means:
            self.cluster_size.lerp_(count, 1 - self.decay)
            self.embed_avg.lerp_(total, 1 - self.decay)
            scale = 1 - self.decay ** self.steps.add_(1) if self.codebook == "debiased" else 1
            size = self.cluster_size / scale
            smooth = (size + 1e-5) / (size.sum() + V * 1e-5) * size.sum()
            self.embed.copy_(self.embed_avg / scale / smooth[:, None])
        if self.restart:
            self.idle.add_(1)[count > 0] = 0
            dead = (self.idle >= self.restart).nonzero()[:, 0]
            fresh = z[torch.randint(len(z), (len(dead),), generator=generator).to(z.device)]
            if dist.is_initialized():
                dist.broadcast(fresh, 0)
            self.embed[dead], self.idle[dead] = fresh, 0
            if means:
                self.cluster_size[dead], self.embed_avg[dead] = 1, fresh


class ResBlock(nn.Module):
    """x + f(x), f = ReLU, 3x3 (C -> R), ReLU, 1x1 (R -> C).  No norm anywhere in this tokenizer.

    QUIRK inplace_relu: until January 2021 rosinality's first ReLU worked in place, so that x itself was rectified too;
    vqvae_560.pt was trained so. Names and shapes are the same, codes are not.
    """
    def __init__(self, channels, res_channels, inplace_relu=False):
        super().__init__()
        self.inplace_relu = inplace_relu
        self.conv = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, res_channels, 3, padding=1),
                                  nn.ReLU(), nn.Conv2d(res_channels, channels, 1))

    def forward(self, x):
        return (F.relu(x) if self.inplace_relu else x) + self.conv(x)


def encoder(channels, C, stride, residual):
    """(B, channels, H, W) -> (B, C, H / stride, W / stride), stride 4 (of images) or 2 (of the finer level's features).

    Kernels of 4 at stride 2 cover all pixels evenly; residual: a list of ResBlocks.
    """
    half = [nn.Conv2d(channels, C // 2, 4, 2, 1), nn.ReLU()]
    quarter = [nn.Conv2d(C // 2, C, 4, 2, 1), nn.ReLU()] if stride == 4 else []
    return nn.Sequential(*half, *quarter, nn.Conv2d(C if quarter else C // 2, C, 3, padding=1), *residual, nn.ReLU())


def decoder(channels, out, C, stride, residual):
    """(B, channels, h, w) -> (B, out, stride h, stride w); no nonlinearity at the end."""
    double = [nn.ConvTranspose2d(C, C // 2, 4, 2, 1), nn.ReLU()] if stride == 4 else []
    last = nn.ConvTranspose2d(C // 2 if double else C, out, 4, 2, 1)
    return nn.Sequential(nn.Conv2d(channels, C, 3, padding=1), *residual, nn.ReLU(), *double, last)


class VQVAE(nn.Module):
    """Encoders, codebooks, decoders of 1, 2 or 3 levels.   Source: rosinality vqvae.py (two levels).

    The levels' quantized latents are stacked: stack 0 is the top's, stack l = [upsample(stack l - 1), level l's].
    decoders[l] turns stack l into what level l + 1 is told of it; the last one turns the whole stack into the image.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        self.codebook_size, levels, last = c.codebook_size, range(c.levels), c.levels - 1
        residual = lambda: [ResBlock(c.channels, c.res_channels, c.inplace_relu) for _ in range(c.res_blocks)]
        self.encoders = nn.ModuleList(
            encoder(3 if l == last else c.channels, c.channels, 4 if l == last else 2, residual()) for l in levels)
        self.quantize_conv = nn.ModuleList(nn.Conv2d(c.channels + c.code_dim * (l > 0), c.code_dim, 1) for l in levels)
        self.quantize = nn.ModuleList(
            Quantizer(c.codebook_size, c.code_dim, c.codebook, c.codebook_decay, c.beta, c.restart) for _ in levels)
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d((l + 1) * c.code_dim, (l + 1) * c.code_dim, 4, 2, 1) for l in levels[:-1])
        self.decoders = nn.ModuleList(
            decoder((l + 1) * c.code_dim, 3 if l == last else c.code_dim, c.channels, 4 if l == last else 2, residual())
            for l in levels)

    def stacked(self, level, stack, z_q):
        """Stack level - 1 (None for the top) and z_q of this level -> the stack of this level."""
        return z_q if stack is None else torch.cat([self.upsample[level - 1](stack), z_q], 1)

    def quantized(self, images, generator=None):
        """images (B, 3, H, W) -> the whole stack, [indices (B, h, w) of each level, top first], [its loss].

        ValueError: height or width is not a multiple of f, 4 x 2^(levels - 1).
        """
        f = self.config.f
        if images.ndim != 4 or images.shape[1] != 3 or any(side % f or not side for side in images.shape[2:]):
            raise ValueError(f"images must be (B, 3, H, W), H and W positive multiples of {f}, "
                             f"not {tuple(images.shape)}")
        features, stack, codes, losses = [images], None, [], []
        for encode in reversed(self.encoders):
            features.insert(0, encode(features[0]))                             # the top reads the bottom's features
        for level, h in enumerate(features[:-1]):                               # top first; the last is the image
            if level:
                h = torch.cat([self.decoders[level - 1](stack), h], 1)          # what coarser levels know already
            z_q, indices, loss = self.quantize[level](self.quantize_conv[level](h), generator)
            stack = self.stacked(level, stack, z_q)
            codes.append(indices)
            losses.append(loss)
        return stack, codes, losses

    def codes(self, images):
        """images (B, 3, H, W) in [-1, 1] -> [indices (B, h, w) of each level, top first]. ValueError as quantized."""
        return self.quantized(images)[1]

    def encode(self, images):
        """images (B, 3, H, W) -> tokens (B, N) int64: the levels' codes one after the other."""
        return torch.cat([indices.flatten(1) for indices in self.codes(images)], 1)

    def decode(self, codes):
        """[indices (B, h, w) of each level], or tokens (B, N) of images of the trained size -> images (B, 3, H, W)."""
        stack, maps = None, split(codes, self.config.sides) if isinstance(codes, torch.Tensor) else codes
        for level, indices in enumerate(maps):
            stack = self.stacked(level, stack, self.quantize[level].lookup(indices))
        return self.decoders[-1](stack)

    def forward(self, images, generator=None):
        """images -> reconstruction, {latent_loss: sum over the levels; perplexity_0, ...: of this batch, by level}."""
        stack, codes, losses = self.quantized(images, generator)
        seen = {f"perplexity_{level}": use(indices, self)[1] for level, indices in enumerate(codes)}
        return self.decoders[-1](stack), {"latent_loss": sum(losses), **seen}


def split(tokens, sides):
    """tokens (B, N) -> [indices (B, side, side) of each level, top first]."""
    parts = tokens.split([side ** 2 for side in sides], 1)
    return [part.unflatten(1, (side, side)) for part, side in zip(parts, sides)]


# Copied from vqgan_gpt.py
def use(indices, tokenizer):
    """Share of the codebook that occurs in indices, and perplexity: so many codes, used evenly, would say as much."""
    p = torch.bincount(indices.flatten(), minlength=tokenizer.codebook_size) / indices.numel()
    return (p > 0).float().mean(), (-(p * p.clamp(min=1e-12).log()).sum()).exp()


def build_tokenizer(config):
    return VQVAE(config)


# === Prior: a PixelSNAIL per level ====================================================================================
class WNConv2d(nn.Module):
    """Convolution with weight normalisation: weight = g v / |v| for every output channel (arXiv 1602.07868).

    pad: zeros on the left, right, top, bottom; default: output as large as input.
    """
    def __init__(self, in_channels, out_channels, kernel=(1, 1), pad=None, bias=True):
        super().__init__()
        conv, (kh, kw) = nn.Conv2d(in_channels, out_channels, kernel, bias=bias), kernel
        self.pad, self.fixed = pad or (kw // 2, kw // 2, kh // 2, kh // 2), None        # fixed: see incremental
        self.weight_v, self.bias = conv.weight, conv.bias
        self.weight_g = nn.Parameter(self.lengths().detach())

    def lengths(self):
        return torch.linalg.vector_norm(self.weight_v, dim=(1, 2, 3), keepdim=True)

    def weight(self):
        """The kernel (out, in, kh, kw); while sampling it does not change and is kept in `fixed`."""
        if self.fixed is not None:
            return self.fixed
        return self.weight_v * (self.weight_g / self.lengths())

    def forward(self, x):
        weight = self.weight()
        if x.shape[2:] == weight.shape[2:] == (1, 1):                           # one position: less overhead
            return F.linear(x.flatten(1), weight.flatten(1), self.bias)[:, :, None, None]
        return F.conv2d(F.pad(x, self.pad) if any(self.pad) else x, weight, self.bias)


class CodeConv2d(WNConv2d):
    """Convolution of one-hot codes: each output is a sum of columns of the weight, looked up instead of multiplied.

    codes (B, H, W) int64 -> (B, C, H, W).
    """
    def forward(self, codes):
        _, V, kh, kw = self.weight_v.shape
        table = F.pad(self.weight().permute(2, 3, 1, 0).flatten(0, 1), (0, 0, 0, 1))   # (kh kw, V + 1, C); V: outside
        codes = F.pad(codes, self.pad, value=V).unfold(1, kh, 1).unfold(2, kw, 1).flatten(3)    # (B, H, W, kh kw)
        return (self.bias + sum(map(F.embedding, codes.unbind(3), table))).permute(0, 3, 1, 2)


class CausalConv2d(WNConv2d):
    """k x k kernel on the rows above and on what lies left in the own row: neither the position itself nor its right.

    QUIRK: PixelSNAIL's own convolutions see the position itself; here it passes by the residual connections alone. And
    hidden weights are set to zero before each use, not multiplied by a mask: their gradients are not zero.
    """
    def __init__(self, in_channels, out_channels, kernel):
        super().__init__(in_channels, out_channels, (kernel, kernel), (kernel // 2, kernel // 2, kernel - 1, 0))
        self.at = self.seen = self.above = self.row = None                      # see incremental

    def weight(self):
        if self.fixed is None:
            self.weight_v.data[:, :, -1, self.weight_v.shape[3] // 2:] = 0
        return super().weight()

    def forward(self, x):
        if self.seen is None:
            return super().forward(x)
        (i, j), (left, _, top, _), weight = self.at, self.pad, self.fixed
        if j == 0:                                                              # the rows above, for the whole row
            self.above = F.conv2d(self.seen[:, :, i:i + top], weight[:, :, :-1], self.bias)
        self.seen[:, :, i + top, j + left] = x[:, :, 0, 0]
        row = self.seen[:, :, i + top, j:j + left].flatten(1)                   # left of the position in its own row
        return self.above[:, :, :, j:j + 1] + F.linear(row, self.row)[:, :, None, None]


@contextlib.contextmanager
def incremental(net, batch, side):
    """Inside, net is given one position after the other, in raster order: its layers remember the earlier ones.

    Yields at = [i, j], the position, to be set before each pass. A causal convolution keeps its inputs in `seen` (with
    the zero padding around them), the attention its keys and values; weights are normalised once.
    """
    at, modules = [0, 0], [module for module in net.modules() if isinstance(module, (WNConv2d, CausalAttention))]
    try:
        for module in modules:
            if isinstance(module, CausalAttention):
                module.cache = Cache(side ** 2)
                continue
            module.fixed = module.weight()
            if isinstance(module, CausalConv2d):
                left, right, top, _ = module.pad
                module.at, module.row = at, module.fixed[:, :, -1, :left].flatten(1)
                module.seen = module.fixed.new_zeros(batch, module.fixed.shape[1], top + side, left + side + right)
        yield at
    finally:
        for module in modules:
            module.cache = module.fixed = module.seen = module.above = module.row = None


# Copied from vqgan_gpt.py
class Cache:
    """Keys and values of one block, of `size` positions at most."""
    def __init__(self, size):
        self.size, self.length, self.k, self.v = size, 0, None, None

    def __call__(self, k, v):
        """Add k, v (B, A, L, M / A) of the next L positions -> those of all positions so far."""
        if self.k is None:
            self.k, self.v = (x.new_zeros(*x.shape[:2], self.size, x.shape[3]) for x in (k, v))
        new = slice(self.length, self.length + k.shape[2])
        self.k[:, :, new], self.v[:, :, new], self.length = k, v, new.stop
        return self.k[:, :, :new.stop], self.v[:, :, :new.stop]


class GatedResBlock(nn.Module):
    """x + a sigmoid(b), [a, b] = conv(ELU(conv(ELU(x)) + 1x1 of aux)) + 1x1 of condition.  (B, C, H, W) -> the same."""
    def __init__(self, channels, width, conv=WNConv2d, aux=0, condition=0, dropout=0.0):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, width), conv(width, 2 * channels)
        self.aux_conv = WNConv2d(aux, width) if aux else None
        self.condition = WNConv2d(condition, 2 * channels, bias=False) if condition else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, aux=None, condition=None):
        h = self.conv1(F.elu(x))
        if aux is not None:
            h = h + self.aux_conv(F.elu(aux))
        h = self.conv2(self.dropout(F.elu(h)))
        if condition is not None:
            h = h + self.condition(condition)
        return x + F.glu(h, 1)


class CausalAttention(nn.Module):
    """Each position attends to all earlier ones, not to itself; the first one gets zeros. No output projection.

    query (B, Q, H, W), key (B, K, H, W; also the values' source) -> (B, width, H, W).
    """
    def __init__(self, query, key, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout, self.cache = heads, dropout, None
        self.query, self.key, self.value = WNConv2d(query, width), WNConv2d(key, width), WNConv2d(key, width)

    def forward(self, query, key):
        maps = self.query(query), self.key(key), self.value(key)
        q, k, v = (x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3) for x in maps)      # (B, A, HW, w / A)
        if self.cache:                                                          # one position: all keys but its own
            past, (k, v) = self.cache.length, self.cache(k, v)
            y = F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1]) if past else torch.zeros_like(v)
        else:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(-1)
            start = mask.any(1)[:, None]                                        # False for the first position alone
            y = F.scaled_dot_product_attention(q, k, v, mask | ~start, self.dropout if self.training else 0.0) * start
        return y.transpose(2, 3).reshape(maps[0].shape)


class PixelBlock(nn.Module):
    """Gated residual blocks, then attention (heads > 0) or a 1x1 convolution (with neither residual nor activation).

    Attention's keys and values come from what enters the block and what the blocks made of it, its queries from the
    latter; both know where they are (background).
    """
    def __init__(self, channels, width, kernel, layers, heads, condition=0, dropout=0.0):
        super().__init__()
        causal = lambda i, o: CausalConv2d(i, o, kernel)
        self.resblocks = nn.ModuleList(
            GatedResBlock(channels, width, causal, 0, condition, dropout) for _ in range(layers))
        self.heads = heads
        if heads:
            query, key, half = channels + 2, 2 * channels + 2, channels // 2
            self.key_resblock = GatedResBlock(key, channels, dropout=dropout)
            self.query_resblock = GatedResBlock(query, channels, dropout=dropout)
            self.causal_attention = CausalAttention(query, key, half, heads, dropout)
            self.out_resblock = GatedResBlock(channels, channels, aux=half, dropout=dropout)
        else:
            self.out = WNConv2d(channels + 2, channels)

    def forward(self, x, background, condition=None):
        out = x
        for block in self.resblocks:
            out = block(out, condition=condition)
        if not self.heads:
            return self.out(torch.cat([out, background], 1))
        key = self.key_resblock(torch.cat([x, out, background], 1))
        query = self.query_resblock(torch.cat([out, background], 1))
        return self.out_resblock(out, self.causal_attention(query, key))


def place_map(side):
    """Row and column of each position, from -1/2 to 1/2 - 1/side: (1, 2, side, side)."""
    place = (torch.arange(side) - side / 2) / side
    return torch.stack(torch.meshgrid(place, place, indexing="ij"))[None]


class PixelSNAIL(nn.Module):
    """p(code | earlier codes of its level, condition) at every position.   Source: rosinality pixelsnail.py.

    codes (B, H, W) int64, condition (B, cond_width, H, W) -> logits (B, V, H, W). A single stack of causal convolutions
    has a blind spot above on the right, which the attention closes but for ends of rows.
    coarser: how many coarser maps the level is conditioned on; num_classes: classes it is told (not in the release).
    """
    def __init__(self, side, codes, width, kernel, blocks, layers, res_width, heads=8, dropout=0.0, cond_width=0,
                 cond_blocks=0, out_blocks=0, coarser=0, num_classes=0):
        super().__init__()
        self.codes, self.reach = codes, (r := kernel // 2)
        up = (kernel + 1) // 2
        # QUIRK, the names are swapped: `horizontal` sees the rows above, `vertical` the columns on the left
        self.horizontal = CodeConv2d(codes, width, (r, kernel), (r, r, r - 1, 0))
        self.vertical = CodeConv2d(codes, width, (up, r), (r - 1, 0, up - 1, 0))
        self.register_buffer("background", place_map(side))
        self.blocks = nn.ModuleList(
            PixelBlock(width, res_width, kernel, layers, heads, cond_width, dropout) for _ in range(blocks))
        self.cond_resnet = self.class_embedding = None
        if coarser:
            square = lambda i, o: WNConv2d(i, o, (3, 3))
            residual = (GatedResBlock(cond_width, cond_width, square, dropout=dropout) for _ in range(cond_blocks))
            self.cond_resnet = nn.Sequential(square(coarser * codes, cond_width), *residual)
        if num_classes:
            self.class_embedding = nn.Parameter(torch.randn(num_classes, cond_width))
        self.out = nn.Sequential(*(GatedResBlock(width, res_width, dropout=dropout) for _ in range(out_blocks)),
                                 nn.ELU(), WNConv2d(width, codes))

    def condition(self, coarser=(), labels=None):
        """coarser: [codes of all coarser levels, top first], labels (B,) -> (B, cond_width, H, W).

        (B, cond_width, 1, 1) of a class alone, None where the level is told nothing. The residual blocks work on the
        grid of the next coarser level.
        """
        condition = None
        if self.cond_resnet is not None:
            side = coarser[-1].shape[1]
            maps = [F.one_hot(m, self.codes).permute(0, 3, 1, 2).to(self.background.dtype) for m in coarser]
            x = self.cond_resnet(torch.cat([F.interpolate(m, scale_factor=side // m.shape[2]) for m in maps], 1))
            condition = F.interpolate(x, scale_factor=2)
        if self.class_embedding is not None and labels is not None:             # no class: a row of zeros
            told = F.embedding(labels, F.pad(self.class_embedding, (0, 0, 0, 1)))[:, :, None, None]
            condition = told if condition is None else condition + told
        return condition

    def first(self, codes):
        """Both first convolutions, shifted: one row down, one column to the right (after their biases)."""
        above, left = self.horizontal(codes), self.vertical(codes)
        return F.pad(above, (0, 0, 1, 0))[:, :, :-1] + F.pad(left, (1, 0))[..., :-1]

    def forward(self, codes, condition=None):
        """codes may be the first rows only: later ones cannot matter."""
        h = codes.shape[1]
        condition = None if condition is None else condition[:, :, :h]
        return self.rest(self.first(codes), self.background[:, :, :h], condition)

    def rest(self, x, background, condition):
        background = background.expand(len(x), -1, -1, -1)
        for block in self.blocks:
            x = block(x, background, condition)
        return self.out(x)

    def position(self, codes, i, j, condition=None):
        """Inside incremental: codes (B, H, W), known up to (i, j) -> logits (B, V) at (i, j)."""
        r, here = self.reach, (slice(None), slice(None), slice(i, i + 1), slice(j, j + 1))
        near = codes[:, max(0, i - r):i + 1, max(0, j - r):j + r + 1]           # all that the first convolutions see
        x = self.first(near)[:, :, -1:, min(j, r)][..., None]
        if condition is not None and condition.shape[2] > 1:
            condition = condition[here]
        return self.rest(x, self.background[here], condition)[:, :, 0, 0]


class Prior(nn.Module):
    """p(tokens | class) = prod over levels p(level | coarser levels, class), top first: `levels`, a PixelSNAIL each.

    codes_of: SHA-256 of the tokenizer whose codes it learned (all zeros: unknown): another's mean something else.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        sizes = zip(c.sides, c.width, c.blocks, c.block_layers, c.res_width, c.heads, c.dropout, c.cond_width,
                    c.cond_blocks, c.out_blocks)
        self.levels = nn.ModuleList()
        for level, (side, width, blocks, layers, res_width, heads, dropout, cond, *more) in enumerate(sizes):
            cond = cond if level or c.num_classes else 0                        # a top that is told nothing
            self.levels.append(PixelSNAIL(side, c.codebook_size, width, c.kernel, blocks, layers, res_width, heads,
                                          dropout / 100, cond, *more, level, c.num_classes if cond else 0))
        self.register_buffer("codes_of", torch.zeros(32, dtype=torch.uint8))
        self.to(memory_format=torch.channels_last)

    def forward(self, tokens, labels=None):
        """tokens (B, N) int64, labels (B,) (num_classes or None: no class) -> logits (B, N, V), float32.

        logits[:, i] depends on tokens[:, :i] alone: on all of the coarser levels, on earlier codes of the own one.
        """
        maps, logits = split(tokens, self.config.sides), []
        for level, net in enumerate(self.levels):
            logits.append(net(maps[level], net.condition(maps[:level], labels)).flatten(2).transpose(1, 2))
        logits = torch.cat(logits, 1)
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(self, tokens, labels=None):
        """-> mean cross-entropy in nats per token, metrics: nats_0, nats_1 ...: that of each level, per token.

        The levels share no weight: the gradient of each is that of its own likelihood, times its share of the tokens.
        """
        nll = F.cross_entropy(self(tokens, labels).transpose(1, 2), tokens, reduction="none")
        parts = nll.split([side ** 2 for side in self.config.sides], 1)
        return nll.mean(), {f"nats_{level}": part.mean() for level, part in enumerate(parts)}


def build_prior(config):
    return Prior(config)


# === Losses: squared error and the commitment to the codes ============================================================
def tokenizer_loss(images, again, latent_loss):
    """mean (x - again)^2 + the sum of the levels' latent losses, weighted already -> loss, metrics (VQ-VAE-2 eq. 2)."""
    mse = F.mse_loss(again, images)
    return mse + latent_loss, {"mse": mse, "latent_loss": latent_loss}


# === Sampler: one visible loop ========================================================================================
@torch.no_grad()
def sample(tokenizer, prior, labels, *, known=None, temperature=1.0, generator=None, trace=None):
    """Draw the top level's codes in raster order, then those of the next level given them, ...; then decode them all.

    labels (B,) int64 (num_classes: no class). known (B, n) int64: the first n tokens, kept as they are; negative ones
    are drawn. temperature divides the logits. trace: a list that gets {level, position (in tokens), logits (B, V),
    tokens (B, N) (0 where not drawn yet)} for each draw. Returns images (B, 3, H, W) in [-1, 1].
    """
    B, sides, n = len(labels), prior.config.sides, 0
    tokens = torch.full((B, sum(side ** 2 for side in sides)), -1, device=labels.device)
    if known is not None:
        tokens[:, :known.shape[1]] = known
    kept = tokens >= 0
    tokens[~kept] = 0
    maps, drawn = split(tokens, sides), (~kept).any(0).tolist()                 # maps: views of tokens
    for level, net in enumerate(prior.levels):
        condition = net.condition(maps[:level], labels)                         # once for the whole level
        with incremental(net, B, sides[level]) as at:
            for place in range(sides[level] ** 2):
                at[:] = i, j = divmod(place, sides[level])
                logits = net.position(maps[level], i, j, condition)             # known codes too: the caches need them
                if drawn[n]:
                    code = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
                    tokens[:, n] = torch.where(kept[:, n], tokens[:, n], code)
                    if trace is not None:
                        trace.append({"level": level, "position": n, "logits": logits, "tokens": tokens.clone()})
                n += 1
    return tokenizer.decode(maps).clamp(-1, 1)


# === Training: one visible loop per stage =============================================================================
# Copied from pixelcnn.py
def backward(loss, optimizer):
    """Gradients of the optimizer's parameters, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    average(*(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None))


def train_tokenizer(config, data, run):
    """Squared error, Adam; the codebooks follow their latents. Returns the VQVAE."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(config).to(run.device)
    optimizer = torch.optim.Adam(tokenizer.parameters(), config.lr_tokenizer, fused=run.device.type != "mps")
    print(f"tokenizer: {sum(p.numel() for p in tokenizer.parameters()):,} parameters on {run.device}, "
          f"{len(data.train[0]):,} images of {config.data}")
    if config.compile:
        tokenizer.compile()
    for step in run.steps("tokenizer", config.train_steps_tokenizer, tokenizer=tokenizer, optimizer=optimizer):
        generator = rng(config.seed, step)
        [images] = shard(data.batch("train", config.batch_size, generator)[0], device=run.device)
        with autocast(run.device):
            again, found = tokenizer(images, generator)
        loss, metrics = tokenizer_loss(images, again.float(), found.pop("latent_loss"))
        backward(loss, optimizer)
        run.log("tokenizer", step, loss=loss, **metrics, **found)               # raises on a NaN loss
        set_lr(optimizer, config.lr_tokenizer, step, config.warmup, config.train_steps_tokenizer)
        optimizer.step()
    return tokenizer.eval()


@torch.no_grad()
def tokenize(tokenizer, images, device):
    """images uint8 (n, 3, H, W) -> tokens (n, N) int64. The tokenizer is in eval mode: else its codes would move."""
    many = max(1, min(64, 2 ** 20 // images.shape[-1] ** 2))                    # the encoder takes memory
    parts = tqdm(images.split(many), "tokens of the images", leave=False, disable=None)
    return torch.cat([tokenizer.encode(part.to(device) / 127.5 - 1).cpu() for part in parts])


def fingerprint(tokenizer, *more):
    """SHA-256 of a tokenizer's weights and of more tensors: uint8 (32,)."""
    digest = hashlib.sha256()
    for value in (*tokenizer.state_dict().values(), *more):
        digest.update(value.cpu().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def cached_tokens(tokenizer, data, run):
    """The training images' tokens, kept in RUN/tokens.npz with the fingerprint of the tokenizer and of the data."""
    mark, path = fingerprint(tokenizer, *data.train), run.folder / "tokens.npz"
    if path.exists():
        with explain(f"{path} is damaged", "delete it, and it is made again"), np.load(path) as file:
            if np.array_equal(file["made_of"], mark.numpy()):
                return torch.from_numpy(file["tokens"].astype(np.int64))
    tokens = tokenize(tokenizer, data.train[0], run.device)
    if run.is_main:
        kind = np.promote_types(np.uint16, np.min_scalar_type(tokenizer.codebook_size - 1))
        np.savez(buffer := io.BytesIO(), made_of=mark.numpy(), tokens=tokens.numpy().astype(kind))
        write_file(path, buffer.getbuffer())
    return tokens


def check_pair(tokenizer, prior, name):
    """UserError unless the prior learned this tokenizer's codes."""
    mine, other = (bytes(t.cpu().tolist()).hex()[:12] for t in (fingerprint(tokenizer), prior.codes_of))
    if prior.codes_of.any() and mine != other:
        raise UserError(f"{name}: its prior was trained on the codes of another tokenizer ({other}, this one is "
                        f"{mine}): put that tokenizer back, or train the prior anew")


def train_prior(config, data, run, tokenizer):
    """Cross-entropy of every code of the cached training images, all levels side by side. Returns the prior."""
    torch.manual_seed(config.seed)
    prior = build_prior(config).to(run.device)
    all_tokens, labels = cached_tokens(tokenizer, data, run), data.train[1]
    if "prior" in run.state["objects"]:                                         # a resumed run
        prior.load_state_dict(run.state["objects"]["prior"])
        check_pair(tokenizer, prior, run.folder)
    prior.codes_of.copy_(fingerprint(tokenizer))
    for level, codes in enumerate(split(all_tokens, config.sides)):
        share, perplexity = use(codes, tokenizer)
        print(f"level {level}: {codes[0].numel()} codes an image, {share:.1%} of {config.codebook_size} used, "
              f"perplexity {perplexity:.1f}: {perplexity.log():.3f} nats per token without context")
        if perplexity < 0.05 * config.codebook_size:
            print(f"warning: the codebook of level {level} collapsed; try --codebook ema --restart 20, a smaller "
                  f"--lr-tokenizer or more --train-steps-tokenizer")
    optimizer = torch.optim.Adam(prior.parameters(), config.lr_prior, fused=run.device.type != "mps")
    if config.compile:
        prior.compile()
    print(f"prior: {' + '.join(f'{sum(p.numel() for p in net.parameters()):,}' for net in prior.levels)} parameters")
    for step in run.steps("prior", config.train_steps_prior, prior=prior, optimizer_prior=optimizer):
        generator = rng(config.seed, step)
        rank = dist.get_rank() if dist.is_initialized() else 0                  # dropout: every process its own
        torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)) + rank)
        index = torch.randint(len(all_tokens), (config.batch_size_prior,), generator=generator)
        tokens, classes = shard(all_tokens[index], labels[index], device=run.device)
        with autocast(run.device):
            loss, metrics = prior.loss(tokens, classes)
        backward(loss, optimizer)
        norms = [nn.utils.clip_grad_norm_(net.parameters(), config.clip or math.inf) for net in prior.levels]
        run.log("prior", step, loss=loss, grad_norm=torch.stack(norms).max(), **metrics)     # raises on NaN, before it
        set_lr(optimizer, config.lr_prior, step, config.warmup, config.train_steps_prior)
        optimizer.step()
    return prior.eval()


# === Official weights: rosinality/vq-vae-2-pytorch ====================================================================
def our_name(name):
    """The release's name of a parameter or module -> its name here.  _t is level 0, _b level 1."""
    name = re.sub(r"(\.conv)+\.(weight_[gv]|bias)$", r".\2", name.removeprefix("module."))     # its wrappers' layers
    for old, new in (("enc_t.blocks", "encoders.0"), ("enc_b.blocks", "encoders.1"), ("enc_t", "encoders.0"),
                     ("enc_b", "encoders.1"), ("dec_t.blocks", "decoders.0"), ("dec.blocks", "decoders.1"),
                     ("dec_t", "decoders.0"), ("quantize_conv_t", "quantize_conv.0"), ("upsample_t", "upsample.0"),
                     ("quantize_conv_b", "quantize_conv.1"), ("quantize_t", "quantize.0"),
                     ("quantize_b", "quantize.1"), ("cond_resnet.blocks", "cond_resnet")):
        if name.startswith(old):
            return new + name[len(old):]
    return name


def read_weights(source):
    """Path of a checkpoint, or a state dict -> state dict with our names. UserError: missing, damaged, or neither."""
    loaded = source
    if not isinstance(source, dict):
        torch.serialization.add_safe_globals([argparse.Namespace])              # the priors' files hold their arguments
        with explain(f"{source} cannot be read as a checkpoint", "give vqvae_560.pt or a file of train_pixelsnail.py"):
            loaded = torch.load(source, map_location="cpu", weights_only=True)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                              for name, value in state.items()):
        hint = "it is a run of this script: name its folder" if isinstance(loaded, dict) and "progress" in loaded else \
            "give vqvae_560.pt or a file of train_pixelsnail.py"
        raise UserError(f"{'the dict' if isinstance(source, dict) else source} holds no names and tensors: {hint}")
    turned = {}
    for name, value in state.items():
        if value.ndim == 2:                             # the codebook's columns; linear layers: 1 x 1 kernels here
            value = value.T.contiguous() if ".embed" in name else value[:, :, None, None]
        turned[our_name(name)] = value.to(torch.float32, copy=True)             # the caller's tensors stay the caller's
    return turned


def from_official(source, config=None, inplace_relu=True):
    """Weights of rosinality/vq-vae-2-pytorch -> VQVAE (two levels), or the PixelSNAIL of one level, in eval mode.

    source: path or state dict. config: the constructor arguments there, of which shape, dropout and decay are read: the
    rest is seen by the weights. inplace_relu: True, as vqvae_560.pt, the one published checkpoint, was trained; False
    for weights of later code. Every name and shape must fit: else UserError with the first five that do not.
    """
    state, given = read_weights(source), config or {}
    name = "the dict" if isinstance(source, dict) else source
    size = lambda key, axis=0: state[key].shape[axis] if key in state else 0
    count = lambda pattern: len({match[1] for match in map(re.compile(pattern).match, state) if match})
    with explain(f"{name} is no model of this paper", "its shapes make no sense"), torch.device("meta"):
        if "horizontal.weight_v" in state:
            side = given["shape"][0] if "shape" in given else size("background", 2)
            if not side:
                raise UserError(f"{name} does not say its map's side: give config={{'shape': [side, side]}}")
            codes, key = size("horizontal.weight_v", 1), "blocks.0.resblocks.0."
            model = PixelSNAIL(
                side, codes, size("horizontal.bias"), size("horizontal.weight_v", 3), count(r"blocks\.(\d+)\."),
                count(r"blocks\.0\.resblocks\.(\d+)"), size(key + "conv1.bias"),
                8 * ("blocks.0.causal_attention.query.bias" in state), given.get("dropout", 0.1),
                size(key + "condition.weight_v", 1), max(0, count(r"cond_resnet\.(\d+)") - 1),
                count(r"out\.(\d+)\.conv1"), size("cond_resnet.0.weight_v", 1) // codes)
        else:                                                                   # neither: a model that cannot fit
            model = VQVAE(Config(
                image_size=256, num_classes=0, channels=size("quantize_conv.0.weight", 1),
                code_dim=size("quantize.0.embed", 1), res_channels=size("encoders.0.3.conv.1.bias") or 1,
                res_blocks=count(r"encoders\.0\.(\d+)\.conv"), codebook_size=size("quantize.0.embed"),
                codebook="release", codebook_decay=given.get("decay", 0.99), restart=0,
                inplace_relu=inplace_relu) if "quantize.0.embed" in state else Config())
    if isinstance(model, PixelSNAIL):                                           # what a file may leave out: as new
        state.setdefault("background", place_map(side))
    for key in [key for key in state if key.endswith(".embed") and isinstance(model, VQVAE)]:
        state.setdefault(key[:-5] + "cluster_size", torch.zeros(len(state[key])))
        state.setdefault(key + "_avg", state[key].clone())
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    wrong = [key for key in {**state, **shapes} if key not in state or state[key].shape != shapes.get(key)]
    if wrong:
        raise UserError(f"{name} is no model of this paper: {len(wrong)} names or shapes do not fit, first "
                        f"{', '.join(wrong[:5])}")
    model.load_state_dict(state, assign=True)
    return model.eval()


# === Helpers: data, run folder, pictures (the same in all files; a reader may stop here) ==============================
# Copied from pixelcnn.py
class UserError(Exception):
    """A mistake the user can mend: main prints its line (what is wrong, what would be right) and exits with code 2."""


def check(config):
    """Raise UserError on settings that no model can be built from: one line with what would be right."""
    def need(good, message):
        if not good:
            raise UserError(message)
    c = config
    need(c.levels in (1, 2, 3), f"levels is {c.levels}: 1, 2 or 3")
    need(c.codebook in ("ema", "release", "debiased", "gradient"),
         f"codebook {c.codebook!r} is unknown: ema, release, debiased, gradient")
    for names, least in (("batch_size batch_size_prior log_every save_every image_size res_channels code_dim", 1),
                         ("codebook_size channels", 2), ("temperature", 1e-3),
                         ("warmup train_images test_images train_steps_tokenizer train_steps_prior num_classes restart "
                          "res_blocks beta clip", 0)):
        for name in names.split():
            need(getattr(c, name) >= least, f"{name} is {getattr(c, name)}: at least {least}")
    for names, least in (("width res_width blocks block_layers", 1),
                         ("heads cond_width cond_blocks out_blocks dropout", 0)):
        for name in names.split():
            values = getattr(c, name)
            need(len(values) >= c.levels, f"{name} has {len(values)} numbers: one for each of {c.levels} levels")
            need(min(values) >= least, f"{name} is {values}: at least {least} each")
    need(c.channels % 2 == 0, f"channels is {c.channels}: an even number")
    need(all(value == 0 or 1 <= value < 100 for value in c.dropout), f"dropout is {c.dropout}: per cent, 1 to 99, or 0")
    need(0 <= c.codebook_decay < 1, f"codebook_decay is {c.codebook_decay}: 0 to 1")
    need(c.lr_tokenizer > 0 and c.lr_prior > 0, "lr_tokenizer and lr_prior must be positive")
    need(0 <= c.seed < 2 ** 63, f"seed {c.seed}: 0 to 2**63 - 1")
    need(c.image_size % c.f == 0, f"images of {c.image_size} pixels are not divisible by {c.f}, the stride of the top "
                                  f"of {c.levels} levels")
    need(c.kernel % 2 == 1 and c.kernel > 1, f"kernel {c.kernel}: 3, 5, 7 ...")
    for width, heads in zip(c.width[:c.levels], c.heads):
        need(not heads or width % (2 * heads) == 0, f"width {width} is not divisible by twice its {heads} heads")
    need(all(c.cond_width[1:c.levels]), f"cond_width is {c.cond_width}: all but the top must be told the coarser codes")


# Copied from pixelcnn.py
@contextlib.contextmanager
def explain(what, remedy):
    """Inside the block an error of reading, writing or decoding becomes a UserError: what failed, why, what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:                                                  # damaged files raise all kinds
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0][:100] or type(error).__name__
        raise UserError(f"{what} ({reason}): {remedy}") from None


# Copied from pixelcnn.py
def write_file(path, data):
    """Write bytes to a temporary file, then rename it: a reader finds the old file or the new one, never a half."""
    temporary = Path(f"{path}.tmp")
    with explain(f"cannot write {path}", "what was there before is unharmed"):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "crescent", "bars")
COLOURS = {"red": (235, 60, 50), "orange": (245, 150, 40), "yellow": (245, 225, 60), "green": (70, 190, 80),
           "cyan": (70, 210, 225), "blue": (65, 105, 235), "purple": (150, 75, 205), "pink": (250, 150, 195)}


# Copied from pixelcnn.py
def shape_distance(shape, x, y):
    """Signed distance (negative inside) from the points x, y to a shape of radius 1 around 0; y points down."""
    def star():
        angle, r = (np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5, np.hypot(x, y)    # five arms as one
        nx, ny = 0.45 * np.sin(np.pi / 5), 1 - 0.45 * np.cos(np.pi / 5)         # normal of the edge from tip to notch
        return ((r * np.cos(angle) - 1) * nx + np.abs(r * np.sin(angle)) * ny) / np.hypot(nx, ny)
    box = lambda x, y, w, h: np.maximum(np.abs(x) - w, np.abs(y) - h)
    return {"circle": lambda: np.hypot(x, y) - 1,
            "square": lambda: box(x, y, 0.8, 0.8),
            "triangle": lambda: np.maximum(y, np.abs(x) * 0.75 ** 0.5 - y / 2) - 0.5,
            "diamond": lambda: (np.abs(x) / 0.65 + np.abs(y) - 1) * 0.55,
            "ring": lambda: np.abs(np.hypot(x, y) - 0.75) - 0.25,
            "cross": lambda: np.minimum(box(x, y, 1, 0.3), box(x, y, 0.3, 1)),
            "star": star,
            "crescent": lambda: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.5, y)),
            "bars": lambda: box(x, np.minimum(np.abs(y), np.abs(np.abs(y) - 0.66)), 0.9, 0.2)}[shape]()


# Copied from pixelcnn.py
def draw_shapes(seed, indices, size):
    """Picture i is a function of (seed, i).  indices (B,) -> images uint8 (B, size, size, 3), labels int64 (B,)."""
    u = np.random.default_rng(seed).random((max(indices) + 1, 6), np.float32)[indices]
    labels = (u[:, 0] * len(SHAPES)).astype(np.int64)
    colour = np.array(list(COLOURS.values()), np.float32)[(u[:, 1] * len(COLOURS)).astype(int)]
    radius, turn, r, phi = 0.45 + 0.25 * u[:, 2], 0.5 * u[:, 3] - 0.25, 0.3 * np.sqrt(u[:, 4]), 2 * np.pi * u[:, 5]
    cx, cy, cos, sin = r * np.cos(phi), r * np.sin(phi), np.cos(turn), np.sin(turn)
    axis = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1               # pixel centres; half the side = 1
    coverage = np.empty((len(labels), size, size), np.float32)
    for label, shape in enumerate(SHAPES):
        k = labels == label
        R, X, Y, c, s = (a[k, None, None] for a in (radius, cx, cy, cos, sin))
        x, y = (axis - X) / R, (axis[:, None] - Y) / R
        distance = shape_distance(shape, c * x + s * y, c * y - s * x) * R * (size / 2)
        coverage[k] = np.clip(0.5 - distance, 0, 1)                             # an edge is one pixel wide
    ground = np.array((20, 20, 30), np.float32)
    return (ground + coverage[..., None] * (colour[:, None, None] - ground)).round().astype(np.uint8), labels


DOWNLOADS = {   # name: (address, {file: MD5 of its content, of .gz files of what is inside})
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"})}


# Copied from pixelcnn.py
def fetch(name, folder):
    """Contents of a data set's files in folder/name or folder. An absent one is downloaded, and named when whole."""
    def content(path, checksum):
        with explain(f"{path} is truncated or corrupt", "delete it, and it is downloaded again"):
            data = gzip.decompress(path.read_bytes()) if path.name.endswith("ubyte.gz") else path.read_bytes()
            kind = hashlib.md5 if len(checksum) == 32 else hashlib.sha256
            if not kind(data).hexdigest().startswith(checksum):
                raise ValueError(f"wrong checksum: that of its content must be {checksum}")
            return data
    address, files = DOWNLOADS[name]
    for file, checksum in files.items():
        target = folder / file if (folder / file).exists() else folder / name / file
        if not target.exists():
            part = folder / name / "unfinished" / f"{os.getpid()}_{file}"       # each process of torchrun its own
            with explain(f"cannot download {address}{file}", f"put it into {target.parent}, or give its --data-dir"):
                part.parent.mkdir(parents=True, exist_ok=True)
                with urllib.request.urlopen(address + file, timeout=60) as source, open(part, "wb") as out, tqdm(
                        total=int(source.headers["Content-Length"]), unit="B", unit_scale=True, disable=None) as bar:
                    while chunk := source.read(1 << 16):
                        bar.update(out.write(chunk))
            content(part, checksum)
            os.replace(part, target)
        yield content(target, checksum)


# Copied from pixelcnn.py
def open_image(file):
    """An image file, upright, of 8 bits, on white where it is transparent -> RGB."""
    image = ImageOps.exif_transpose(Image.open(file))                           # photos of a phone stand upright
    if image.mode.startswith("I"):                                              # 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:      # what shines through is white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Copied from pixelcnn.py
def read_image(file, size):
    """The largest centred square of an image file, resized -> uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(open_image(file), (size, size), Image.Resampling.BOX))


# Copied from pixelcnn.py
def read_folder(source, config):
    """A folder or .zip with train/<class>/*, test/<class>/* -> classes, {"train": (images, labels), "test": ...}."""
    root, splits = Path(source), {"train": ([], []), "test": ([], [])}
    with explain(f"--data {source} is no folder and no whole .zip", "give shapes, mnist, cifar10, a folder or a .zip"):
        archive = None if root.is_dir() else zipfile.ZipFile(root)
    names = archive.namelist() if archive else [path.relative_to(root).as_posix() for path in root.rglob("*")]
    wanted = re.compile(r"(train|test)/[^/]+/[^/]+[.](?i:png|jpe?g|webp|bmp|gif)")
    names = sorted(filter(wanted.fullmatch, names))
    classes, has_test = sorted({name.split("/")[1] for name in names}), any(name.startswith("test/") for name in names)
    names = [names[i] for i in np.random.default_rng(0).permutation(len(names))]    # so that a part has all classes
    for number, name in enumerate(tqdm(names, "reading images", leave=False, disable=None)):
        split, label = name.split("/")[:2]
        images, labels = splits["test" if not has_test and number % 10 == 9 else split]
        try:
            with explain(f"image {name} of {source} cannot be read", "mend it, or leave it out by --skip-corrupt"):
                images.append(read_image(io.BytesIO(archive.read(name)) if archive else root / name, config.image_size))
                labels.append(classes.index(label))
        except UserError:
            if not config.skip_corrupt:
                raise
            tqdm.write(f"left out: {name}")
    return classes, splits


# Copied from pixelcnn.py
@dataclass
class Data:
    """A data set in memory. train, test: (images uint8 (N, 3, H, W), labels int64 (N,))."""
    classes: list
    train: tuple
    test: tuple

    def batch(self, split, size, generator):
        """`size` random images of a split as float (B, 3, H, W) in [-1, 1], and their labels (B,)."""
        images, labels = getattr(self, split)
        index = torch.randint(len(images), (size,), generator=generator)
        return images[index] / 127.5 - 1, labels[index]


# Copied from pixelcnn.py
def load_data(config):
    """The data set config.data at config.image_size. UserError: missing, empty, corrupt, or of other classes."""
    size, folder = config.image_size, Path(config.data_dir)
    limit = {"train": config.train_images or None, "test": config.test_images or None}
    if config.data == "shapes":
        classes = SHAPES
        splits = {"train": draw_shapes(0, range(limit["train"] or 20_000), size),
                  "test": draw_shapes(1, range(limit["test"] or 2_000), size)}
    elif config.data == "mnist":
        x, y, x_test, y_test = (np.frombuffer(file, np.uint8) for file in fetch("mnist", folder))
        classes, splits = "0123456789", {"train": (x[16:], y[8:]), "test": (x_test[16:], y_test[8:])}
        splits = {split: (x.reshape(-1, 28, 28, 1).repeat(3, 3), y) for split, (x, y) in splits.items()}
    elif config.data == "cifar10":
        classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
        with tarfile.open(fileobj=io.BytesIO(*fetch("cifar10", folder))) as tar:
            files = {Path(file.name).stem: tar.extractfile(file).read() for file in tar if file.name.endswith(".bin")}
        splits = {"train": b"".join(files[f"data_batch_{i}"] for i in range(1, 6)), "test": files["test_batch"]}
        splits = {split: np.frombuffer(data, np.uint8).reshape(-1, 3073) for split, data in splits.items()}
        splits = {s: (r[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), r[:, 0]) for s, r in splits.items()}
    else:
        classes, splits = read_folder(config.data, config)
    for split, (images, labels) in splits.items():
        if not len(images):
            raise UserError(f"{config.data} has no {split} images: it needs {split}/<class>/*.png or .jpg "
                            f"(where there is no test/ at all, every tenth image of train/ is held out)")
        images = torch.from_numpy(np.array(images[:limit[split]])).permute(0, 3, 1, 2)
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        splits[split] = images, torch.tensor(np.array(labels[:limit[split]]), dtype=torch.int64)
    if config.num_classes not in (0, len(classes)):
        raise UserError(f"{config.data} has {len(classes)} classes, num_classes is {config.num_classes}: "
                        f"add --num-classes {len(classes)}")
    return Data(list(classes), **splits)


# Copied from pixelcnn.py
def rng(seed, step):
    """The generator of a step: its batch, noise and masks depend on (seed, step) alone, also after a resume."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1)


# Copied from pixelcnn.py
def shard(*tensors, device):
    """This process's part of a global batch, on the device."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(tensors[0]) % world:
        raise UserError(f"a batch of {len(tensors[0])} is not divisible by {world} processes")
    return [t[rank::world].to(device) for t in tensors]


# Copied from pixelcnn.py
def average(*tensors):
    """Mean of each tensor over all processes, in place. One process: nothing to do."""
    for t in tensors if dist.is_initialized() else ():
        dist.all_reduce(t)
        t /= dist.get_world_size()


# Copied from pixelcnn.py
def autocast(device):
    """bfloat16 for the matrix products on CUDA; elsewhere, and for parameters and losses, float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# Copied from pixelcnn.py
def set_lr(optimizer, lr, step, warmup, total):
    """Linear warm-up to lr, then half a cosine down to zero at `total`; warmup 0: constant."""
    rise, fall = (step + 1) / (warmup + 1), (step - warmup) / max(1, total - warmup)
    for group in optimizer.param_groups if warmup else ():
        group["lr"] = lr * min(1, rise) * 0.5 * (1 + math.cos(math.pi * min(1, max(0, fall))))


# Copied from pixelcnn.py
class Run:
    """A run folder: config.json, metrics.jsonl, checkpoint.pt, pictures. Of several processes only the first writes.

    config given: a fresh folder; None: the run that is there. checkpoint.pt holds `state`: config, classes, metrics,
    seconds, progress {stage: steps done}, objects {name: state_dict}.
    """
    def __init__(self, folder, config=None, classes=()):
        self.folder, self.checkpoint = Path(folder), Path(folder) / "checkpoint.pt"
        self.objects, self.config = {}, config
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
        if "RANK" in os.environ and not dist.is_initialized():                  # started by torchrun
            with explain("torch.distributed cannot start", "use torchrun, no more processes than GPUs, or unset RANK"):
                dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        self.is_main = not dist.is_initialized() or dist.get_rank() == 0
        if config is None:
            hint = "name a run folder" if self.folder.is_file() else f"make one with train --out {folder}"
            with explain(f"{folder} is no run folder, it holds no checkpoint.pt", hint):
                data = io.BytesIO(self.checkpoint.read_bytes())
            with explain(f"{self.checkpoint} was refused: truncated, or more than tensors and numbers", "train anew"):
                self.state = torch.load(data, map_location="cpu", weights_only=True)
                fields = {str(name): value for name, value in self.state["config"].items()}
            if unknown := fields.keys() - {f.name for f in dataclasses.fields(Config)}:
                raise UserError(f"{folder} is a run of another file or version: {NAME}.py has no {min(unknown)}")
            with explain(f"{self.checkpoint} was refused", "train anew"):
                self.config = Config(**fields)
            return
        self.state = dict(config=dataclasses.asdict(config), classes=list(classes), metrics=[], seconds=0.0,
                          progress={}, objects={})
        if self.is_main:
            if self.checkpoint.exists():
                raise UserError(f"{folder} holds a run: go on with train --resume {folder}, or choose another --out")
            with explain(f"cannot make the run folder {folder}", "choose another --out"):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / "config.json", json.dumps(self.state["config"], indent=1).encode())

    def steps(self, stage, total, **objects):
        """The steps of a stage that are left. First restores `objects` (all that has a state_dict) from the checkpoint;
        saves them at the start, every save_every steps, at the end and on Ctrl-C: always between two steps."""
        for name, item in objects.items():
            if name in self.state["objects"]:
                item.load_state_dict(self.state["objects"][name])
        self.objects.update(objects)
        start, stop, self.clock = self.state["progress"].setdefault(stage, 0), [], time.time()
        if start == 0:
            self.save()

        def on_interrupt(*_):
            stop.append(True)
            signal.signal(signal.SIGINT, signal.default_int_handler)            # a second Ctrl-C stops at once, unsaved
        previous = signal.signal(signal.SIGINT, on_interrupt)
        try:
            self.bar = tqdm(range(start, total), stage, total, initial=start, disable=None if self.is_main else True)
            for step in self.bar:
                yield step
                self.state["progress"][stage] = step + 1
                average(stopping := torch.tensor(float(len(stop)), device=self.device))         # all stop together
                if stopping or (step + 1) % self.config.save_every == 0 or step + 1 == total:
                    self.save()
                if stopping:
                    raise UserError(f"stopped after step {step}, all saved: go on with train --resume {self.folder}")
        finally:
            signal.signal(signal.SIGINT, previous)

    def save(self):
        self.state["seconds"], self.clock = self.state["seconds"] + time.time() - self.clock, time.time()
        self.state["objects"].update({name: item.state_dict() for name, item in self.objects.items()})
        if self.is_main:
            torch.save(self.state, buffer := io.BytesIO())
            write_file(self.checkpoint, buffer.getbuffer())
            rows = "".join(json.dumps(row) + "\n" for row in self.state["metrics"])
            write_file(self.folder / "metrics.jsonl", rows.encode())

    def log(self, stage, step, **metrics):
        """UserError unless all metrics, averaged over the processes, are finite; every log_every-th row is kept."""
        values = torch.stack([torch.as_tensor(v, device=self.device).detach().float() for v in metrics.values()])
        average(values)
        metrics = dict(zip(metrics, values.tolist()))
        if not values.isfinite().all():
            raise UserError(f"{stage} step {step}: {metrics} is not finite; the last good checkpoint is "
                            f"{self.checkpoint}: train anew with a smaller learning rate")
        if step % self.config.log_every == 0:
            self.state["metrics"].append({"stage": stage, "step": step, **metrics})
            self.bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)

    def plot(self):
        """curves.png: the loss of every stage, raw and smoothed."""
        stages = list(dict.fromkeys(row["stage"] for row in self.state["metrics"]))
        figure = Figure(figsize=(7, 3 * max(1, len(stages))), layout="constrained")
        for i, stage in enumerate(stages):
            axis = figure.add_subplot(len(stages), 1, i + 1)
            rows = [row for row in self.state["metrics"] if row["stage"] == stage]
            step, loss = np.array([(row["step"], row["loss"]) for row in rows]).T
            [line], k = axis.plot(step, loss, alpha=0.3), min(25, len(loss))
            smooth = np.convolve(loss, np.ones(k) / k, "valid")
            axis.plot(step[k - 1:], smooth, color=line.get_color(), label=f"{stage}, mean of {k} rows")
            low, high = loss.min(), np.quantile(loss, 0.95)
            axis.set(xlabel="step", ylabel="loss", ylim=(low, high + 0.05 * (high - low) + 1e-9))
            axis.legend()
        figure.savefig(buffer := io.BytesIO(), dpi=120)
        write_file(self.folder / "curves.png", buffer.getbuffer())


# Copied from pixelcnn.py
def load_run(folder):
    """-> run, tokenizer, prior of a run folder, in eval mode on its device; averaged weights where there are any."""
    run, modules = Run(folder), []
    for name, build in (("tokenizer", build_tokenizer), ("prior", build_prior)):
        modules.append(build(run.config).to(run.device).eval())
        state = run.state["objects"].get(f"{name}_ema") or run.state["objects"].get(name, {})
        if not state and modules[-1].state_dict():
            raise UserError(f"{folder} has no trained {name} yet: go on with train --resume {folder}")
        with explain(f"{run.checkpoint} does not fit its config", "train anew"):
            modules[-1].load_state_dict(state)
    return run, *modules


# Copied from pixelcnn.py
def to_bytes(images):
    """Images in [-1, 1] -> uint8 on the CPU."""
    return ((images.cpu() + 1) * 127.5).round().clamp(0, 255).byte()


# Copied from pixelcnn.py
def save_grid(images, path, columns):
    """Images (N, 3, H, W) in [-1, 1] as one PNG, row by row; small ones enlarged."""
    N, _, H, W = images.shape
    scale, rows = max(1, 64 // H), -(-N // columns)
    grid = torch.full((rows * columns, 3, H * scale + 2, W * scale + 2), 255, dtype=torch.uint8)
    grid[:N, :, 1:-1, 1:-1] = to_bytes(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = grid.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(grid.numpy()).save(buffer := io.BytesIO(), "PNG")
    write_file(path, buffer.getbuffer())


# Copied from pixelcnn.py
def peak_memory():
    """Largest memory of this process so far in MiB; on CUDA the GPU's."""
    if torch.cuda.is_available() or sys.platform == "win32":                    # Windows cannot tell
        return torch.cuda.max_memory_allocated() >> 20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


# === Command line =====================================================================================================
NAME = Path(__file__).stem


# Copied from pixelcnn.py
class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError, and no flag may be abbreviated."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


# Copied from pixelcnn.py
def positive(text):
    """An integer of 1 to ten million on the command line."""
    if not 1 <= int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text} is less than 1, or more than ten million")
    return int(text)


# Copied from pixelcnn.py
def parse(argv):
    """The command line. Every field of the Config is a flag of `train`; its help is the comment behind the field."""
    parser = Parser(prog=f"{NAME}.py", description=__doc__.split("\n\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train, then reconstruct, evaluate and sample")
    train.add_argument("--preset", choices=PRESETS, help="where the fields not given come from (default: demo)")
    train.add_argument("--out", help=f"run folder to make (default: runs/{NAME}_PRESET)")
    train.add_argument("--resume", metavar="RUN", help="go on with this run, exactly where it was stopped")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(sys.modules[__name__]), re.M))
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": int, "nargs": "*"}}
    for field in dataclasses.fields(Config):
        train.add_argument("--" + field.name.replace("_", "-"), dest=field.name, default=argparse.SUPPRESS,
                           help=comments[field.name].replace("%", "%%"), **kinds.get(field.type, {"type": field.type}))
    for name, (_, text, flags) in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        for flag in flags.split():
            verb.add_argument(flag, **FLAGS[flag])
    return parser.parse_args(argv)


# Copied from pixelcnn.py
def main(argv=None):
    """Runs a command line; a UserError ends it with one line on stderr and exit code 2. No arguments: the demo."""
    try:
        argv, demo = sys.argv[1:] if argv is None else list(argv), Path(f"runs/{NAME}_demo")
        args = parse(argv or ["train", "--resume" if (demo / "checkpoint.pt").exists() else "--out", str(demo)])
        if args.verb == "train":
            train_command(args)
        else:
            VERBS[args.verb][0](args, *load(args))
    except (UserError, KeyboardInterrupt, OSError) as error:
        print(f"error: {str(error) or 'interrupted; what was written before is kept'}", file=sys.stderr)
        sys.exit(2)


# Copied from pixelcnn.py
def train_command(args):
    """Train both stages in a new run folder, or go on in one, and show what came of it."""
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    preset = args.preset or "demo"
    if args.resume:
        if args.preset or args.out:
            raise UserError("--resume RUN goes on with RUN's own settings in RUN: leave --preset and --out away")
        run = Run(args.resume)
        with explain(f"cannot read {run.folder}/config.json", "it must be what training wrote"):
            asked = dataclasses.asdict(Config(**json.loads((run.folder / "config.json").read_text()) | fields))
        saved = run.state["config"]
        wrong = [f"{name} {saved.get(name)} there, {value} here" for name, value in asked.items()
                 if saved.get(name) != value and not (name in ("data", "data_dir", "lpips", "perceptual") and
                                                      saved.get(name) and value)]           # these may have moved
        if wrong:
            raise UserError(f"{args.resume} was trained with another Config: {'; '.join(wrong)}")
        run.config = dataclasses.replace(run.config, **fields)
        run.state["config"] = dataclasses.asdict(run.config)
    config = run.config if args.resume else dataclasses.replace(PRESETS[preset], **fields)
    check(config)
    data = load_data(config)
    run = run if args.resume else Run(args.out or f"runs/{NAME}_{preset}", config, data.classes)
    train_prior(config, data, run, train_tokenizer(config, data, run))
    if args.resume and fields:
        run.save()                                                              # the data may have moved after the end
    if run.is_main:
        run.plot()
        for verb in ("reconstruct", "evaluate", "sample"):
            main([verb, str(run.folder)])


# Copied from pixelcnn.py
def read_labels(words, run, num):
    """Classes of the command line, by number or name -> labels (num,), repeated in turn; none given: all in turn."""
    classes, count = run.state["classes"], run.config.num_classes
    if words and not count:
        raise UserError(f"{run.folder} was trained without classes: leave --labels out")
    number = lambda word: int(word[:9]) if word.isdecimal() else -1            # more digits: unknown all the same
    labels = [classes.index(word) if word in classes else number(word) for word in words or ()]
    for word, label in zip(words or (), labels):
        if not 0 <= label < count:
            names = f", or {', '.join(classes)}" if not classes[0].isdecimal() else ""
            raise UserError(f"label {word} is unknown: {run.folder} has 0 to {count - 1}{names}")
    every = torch.tensor(labels or range(max(1, count)))
    return every[torch.arange(num) % len(every)].to(run.device)


# Copied from pixelcnn.py
def show(args, run, images, name, columns, following):
    """Write a grid of images to --out, or to RUN/name; the last line of a command: that path, and what to try next."""
    save_grid(images, out := args.out or run.folder / name, columns)
    official = getattr(args, "official", None)                                  # released weights: no run to go on with
    print(f"{out}   next: python {NAME}.py {'--help' if official else f'{following} {run.folder}'}")


# Copied from pixelcnn.py
def psnr(a, b):
    """Peak signal-to-noise ratio of images in [-1, 1], each (B, 3, H, W) -> (B,) in dB; 100 at most."""
    return -10 * ((a - b) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def load(args):
    """What a verb works on, from a run folder or from released weights -> run, tokenizer, prior (or None)."""
    if not getattr(args, "official", None):
        if not args.run:
            other = ", or give --official CHECKPOINT" if hasattr(args, "official") else ""
            raise UserError(f"name a run folder{other}")
        run, tokenizer, prior = load_run(args.run)
        check_pair(tokenizer, prior, run.folder)
        return run, tokenizer, prior
    tokenizer = from_official(args.official)
    if args.run:                                                                # a photo stands where a run would
        args.photos = [args.run, *args.photos]
    if not isinstance(tokenizer, VQVAE):
        raise UserError(f"{args.official} is a prior without its tokenizer: use it in Python, with from_official")
    run = Run.__new__(Run)                                                      # no folder: pictures go to this one
    run.config, run.folder, run.state = tokenizer.config, Path("."), {"classes": []}
    run.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run, tokenizer.to(run.device), None


# Copied from pixelcnn.py
def load_test(args, run):
    """Test images (N, 3, H, W) in [-1, 1] of the run's data, and their labels."""
    images, labels = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir)).test
    return images / 127.5 - 1, labels


def read_photos(args, run, number=8):
    """images (n, 3, S, S) in [-1, 1], labels or None: of the command line's photos, or of the first test images."""
    if not args.photos:
        if getattr(args, "official", None):
            raise UserError("released weights come without test images: give photos")
        data = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir))
        return data.test[0][:number] / 127.5 - 1, data.test[1][:number]
    images, side = [], run.config.image_size
    for photo in args.photos:
        with explain(f"{photo} cannot be read as an image", "give PNG or JPEG files"):
            width, height = Image.open(photo).size
            if min(width, height) < side:
                raise UserError(f"{photo} is too small, {width} x {height} pixels: this model takes {side} x {side}")
            images.append(torch.from_numpy(read_image(photo, side).copy()).permute(2, 0, 1))
    return torch.stack(images) / 127.5 - 1, None


def at_once(config):
    """Images in one batch: attention, caches and decoder take memory."""
    return max(1, min(64, 2 ** 20 // config.image_size ** 2))


def draw_images(args, run, tokenizer, prior, labels, known=None):
    temperature = run.config.temperature if args.temperature is None else args.temperature
    check(dataclasses.replace(run.config, seed=args.seed, temperature=temperature))
    generator, parts = torch.Generator(run.device).manual_seed(args.seed), []
    many = at_once(run.config)
    for start in range(0, len(labels), many):
        k = slice(start, start + many)
        parts.append(sample(tokenizer, prior, labels[k].to(run.device), known=None if known is None else known[k],
                            temperature=temperature, generator=generator).cpu())
    return torch.cat(parts)


# Copied from pixelcnn.py
def sample_command(args, run, tokenizer, prior):
    columns = run.config.num_classes if 0 < run.config.num_classes <= 16 else 8
    labels = read_labels(args.labels, run, args.num or 8 * columns)
    images = draw_images(args, run, tokenizer, prior, labels)
    np.savez(buffer := io.BytesIO(), arr_0=to_bytes(images).permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy())
    show(args, run, images, "samples.png", columns, "complete")
    write_file(run.folder / "samples.npz", buffer.getbuffer())  # ADM's format; last: the picture may not be writable


@torch.no_grad()
def complete_command(args, run, tokenizer, prior):
    """Each row: an image, what the model is shown of it, and what it makes of that."""
    images, labels = read_photos(args, run)
    if args.labels or not run.config.num_classes:
        labels = read_labels(args.labels, run, len(images))
    if labels is None:
        raise UserError("this model draws by class: give --labels, one for each photo or one for all")
    num, half = args.num or 6, images.shape[2] // 2 // tokenizer.config.f * tokenizer.config.f
    if not half:
        raise UserError("this model's top map is one code high: there is no upper half")
    # the upper half is encoded alone: an encoder that saw the whole image would tell of the lower half
    known = torch.cat([F.pad(codes, (0, 0, 0, side - codes.shape[1]), value=-1).flatten(1) for codes, side in
                       zip(tokenizer.codes(images[:, :, :half].to(run.device)), run.config.sides)], 1)
    drawn = draw_images(args, run, tokenizer, prior, labels.repeat_interleave(num, 0), known.repeat_interleave(num, 0))
    shown = images[:, None].repeat(1, 2, 1, 1, 1)
    shown[:, 1, :, half:] = 0
    columns = torch.cat([shown, drawn.unflatten(0, (-1, num))], 1)
    show(args, run, columns.flatten(0, 1), "completions.png", 2 + num, "evaluate")


@torch.no_grad()
def reconstruct_command(args, run, tokenizer, prior):
    images, _ = read_photos(args, run, 32)
    again = torch.cat([tokenizer.decode(tokenizer.encode(part.to(run.device))).clamp(-1, 1).cpu()
                       for part in images.split(8)])
    print("PSNR in dB:", *(f"{value:.1f}" for value in psnr(images, again)))
    show(args, run, torch.stack([images, again], 1).flatten(0, 1), "reconstructions.png", 8, "sample")


@torch.no_grad()
def evaluate_command(args, run, tokenizer, prior):
    """Reconstruction, use of every codebook, likelihood of the test images' codes by level, speed, size."""
    images, labels = load_test(args, run)
    tokens, levels = tokenize(tokenizer, to_bytes(images), run.device), range(run.config.levels)
    quality, nats = [], torch.zeros(run.config.levels)
    for x, t, y in zip(images.split(64), tokens.split(64), labels.split(64)):
        t, y = t.to(run.device), y.to(run.device)
        quality.append(psnr(x, tokenizer.decode(t).clamp(-1, 1).cpu()))
        nats += torch.tensor([float(prior.loss(t, y)[1][f"nats_{level}"]) for level in levels]) * len(t) / len(tokens)
    shares, perplexities = zip(*(map(float, use(codes, tokenizer)) for codes in split(tokens, run.config.sides)))
    start, num, lengths = time.time(), len(labels[:16]), [side ** 2 for side in run.config.sides]
    sample(tokenizer, prior, labels[:num].to(run.device), generator=torch.Generator(run.device).manual_seed(0)).cpu()
    seconds, total = time.time() - start, float((nats * torch.tensor(lengths)).sum())
    report = dict(
        file=f"{NAME}.py", data=Path(run.config.data).name, image_size=run.config.image_size,
        parameters_tokenizer=sum(p.numel() for p in tokenizer.parameters()),
        parameters_prior=sum(p.numel() for p in prior.parameters()), samples_per_second=num / seconds,
        psnr=float(torch.cat(quality).mean()), codebook_size=tokenizer.codebook_size,
        codebook_use=min(shares), perplexity=min(perplexities),                 # of the worse level: no collapse hides
        codebook_use_by_level=shares, perplexity_by_level=perplexities,
        nats_per_token=total / sum(lengths), nats_per_token_by_level=nats.tolist(), nats_per_image=total,
        tokens_per_image=sum(lengths), unigram_nats_per_token_by_level=[math.log(p) for p in perplexities],
        test_images=len(images), peak_memory_mib=peak_memory(), train_steps=sum(run.state["progress"].values()),
        train_seconds=run.state["seconds"], threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        command=f"python {NAME}.py evaluate {run.folder}")
    report["parameters"] = report["parameters_tokenizer"] + report["parameters_prior"]
    print(f"test: PSNR {report['psnr']:.2f} dB; {total / sum(lengths):.4f} nats per token")
    for level in levels:
        print(f"level {level}: {shares[level]:.1%} of {tokenizer.codebook_size} codes used, perplexity "
              f"{perplexities[level]:.1f}; {nats[level]:.4f} nats per token (without context "
              f"{math.log(perplexities[level]):.4f})")
    write_file(run.folder / "report.json", json.dumps(report, indent=1).encode())
    print(f"{run.folder / 'report.json'}   next: python {NAME}.py sample {run.folder}")


RUN = "run --out --num --seed --labels --temperature"
FLAGS = {
    "run": dict(nargs="?", help="run folder"),
    "photos": dict(nargs="*", help="image files, right behind the run (none: the first test images)"),
    "--official": dict(metavar="CHECKPOINT", help="a released tokenizer in place of a run folder"),
    "--data-dir": dict(help="where mnist and cifar10 are (default: where training found them)"),
    "--out": dict(help="PNG to write (default: in the run folder)"),
    "--labels": dict(nargs="+", help="classes by number or name, repeated in turn (default: the images', or all)"),
    "--num": dict(type=positive, help="images to draw; where there are photos: of each"),
    "--temperature": dict(type=float, help="divides the logits (default: the run's)"),
    "--seed": dict(type=int, default=0, help="of the generator that draws")}
VERBS = {   # name: (function, help, flags)
    "sample": (sample_command, "draw images, top codes first", RUN),
    "complete": (complete_command, "hide the lower half of images and draw it anew", f"{RUN} photos --data-dir"),
    "reconstruct": (reconstruct_command, "images through the tokenizer, side by side, with PSNR",
                    "run --official photos --data-dir --out"),
    "evaluate": (evaluate_command, "PSNR, codebook use, likelihood, speed, size: writes RUN/report.json",
                 "run --data-dir")}

if __name__ == "__main__":
    main()
