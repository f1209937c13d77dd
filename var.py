# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66", "pillow>=10"]
# ///
"""VAR: a picture is drawn from coarse to fine; each pass predicts the whole map of the next finer scale at once.

    Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction, Tian, Jiang, Yuan, Peng, Wang,
    NeurIPS 2024, arXiv 2404.02905
    Release: FoundationVision/VAR (no training of the tokenizer); this file computes what it computes, loads its weights
    and trains both stages

The idea. A GPT needs an order, and pixels or patches have none: in raster order a code is drawn blind to all that is
below it. Scales have one. The tokenizer writes an image as K maps of codes of growing side, 1 x 1 to h x w, where each
map holds what the sum of the coarser ones, enlarged, left unexplained. p(maps) = prod_k p(map k | maps before k): the
transformer gives all codes of a map in one pass, K passes in place of h w; causal across scales, in both directions
within one. It reads no codes: only what the coarser maps' sum says at the size of the map to come.

    images (B,3,H,W) -> Encoder -> f (B,E,h,w) -> tokens (B,L): for k in 0..K-1
        rest = f - f_hat -> shrunk to p_k x p_k -> nearest of V codes -> enlarged -> phi -> added to f_hat (B,E,h,w)
    f_hat -> Decoder -> images
    training:  class, f_hat before each scale k, shrunk to p_k x p_k, all at once -> Transformer -> logits (B,L,V)
    sampling:  class -> map 0 -> f_hat -> shrunk -> map 1 -> ... -> map K-1 -> f_hat -> Decoder

Glossary
    f, f_hat   the encoder's output, and the sum of what codes say of it; config.f: the downsampling factor
    p_k, K     side of scale k's map (release: patch_nums); number of scales
    h, w       side of the finest map, p_(K-1)
    V, E       codebook entries, one table for all scales; width of a code (release: Cvae)
    L          tokens of an image, sum of p_k^2, coarse maps first, each row by row
    phi        half identity, half 3x3 convolution, after the codes are enlarged; the scales share four of them
    M          width of the transformer (release: C = 64 depth)
    AdaLN      LayerNorm whose scale and shift, and the gate behind it, are computed from the class

Run
    python var.py                                                   the demo: nine shapes by class, minutes on two cores
    python var.py train --preset cifar10 --data FOLDER_OR_ZIP --out RUN
    python var.py sample RUN --labels cat dog --guidance 3          (also: complete, reconstruct, evaluate; --help)
    python var.py inpaint RUN photo.jpg --box 8 8 16 16             (also: outpaint, replace)
    python var.py sample --official vae_ch160v4096z32.pth var_d16.pth --labels 207 --num 8

Contents   Config and presets, Tokenizer, Prior, Losses, Sampler, Training, Official weights, Helpers, Command line
Not here   rejection sampling ("-re", no code released), the fused kernels, dropout, the codebook's cosine variant.
Departs    The tokenizer's training was not released: the paper says "as VQGAN" with the multi-scale loss, which is
           built here, with VQGAN's patch discriminator, on the transformer's data (paper: OpenImages). Its authors'
           later trainer has DINO's features, AdamW, augmentation, averaged weights; its batch, rate and start of the
           GAN stand in RELEASE. Codes as running means and the restart of unused ones are ours (off in the paper's
           presets). Labels are dropped in training alone, the release drops them in evaluation too. float32, or
           bfloat16 on CUDA, without loss scaling; convolutions as PyTorch is set (TF32 on CUDA). No random crops.
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
from collections import OrderedDict
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
    """All settings; each comment is also the flag's --help. The defaults are the demo."""
    data: str = "shapes"            # shapes, mnist, cifar10, or a folder or .zip with train/<class>/*, test/<class>/*
    data_dir: str = "data"          # where mnist, cifar10 and LPIPS's weights are looked for, or downloaded to
    train_images: int = 0           # use only this many training images (0: all; of the endless shapes 20,000)
    test_images: int = 0            # use only this many test images (0: all; of the endless shapes 2,000)
    skip_corrupt: bool = False      # leave out images that cannot be read, instead of stopping
    image_size: int = 24            # side of the (square) images in pixels
    num_classes: int = 9            # classes the transformer is told (0: none)
    scales: tuple = (1, 2, 3, 4, 6)  # p_k: sides of the maps, growing, the last one image_size / f
    # tokenizer
    ch: int = 32                    # width of the first level, a multiple of the groups (release: 160)
    groups: int = 8                 # groups of GroupNorm (release: 32)
    ch_mult: tuple = (1, 1, 2)      # widths of the levels in units of ch; each level but the last halves the side
    num_res_blocks: int = 1         # residual blocks per level (the decoder has one more; release: 2)
    code_dim: int = 8               # E, width of a code (release: 32)
    codebook_size: int = 128        # V, codes, one table for all scales (release: 4096)
    beta: float = 0.25              # weight of the commitment term
    codebook_weight: float = 0.2    # weight of the whole quantizer's loss (paper: 1)
    codebook_decay: float = 0.95    # decay of the running means that the codes are (0: by gradient, as the paper)
    restart: int = 20               # a code unused for so many steps moves to a random latent of the batch (0: never)
    l1_weight: float = 0.2          # weight of the absolute error beside the squared one
    lpips: str = ""                 # perceptual loss: "" none, download, or a folder or released .ckpt with its weights
    perceptual_weight: float = 1.0  # weight of LPIPS
    disc_weight: float = 0.4        # the GAN's share after the adaptive weight (0: no GAN)
    disc_start: int = 520           # first step of the GAN; before it the discriminator does not learn
    disc_layers: int = 2            # layers of the patch discriminator: how large a patch it judges
    disc_width: int = 32            # features of its first layer
    # transformer
    depth: int = 4                  # blocks
    width: int = 128                # M (release: 64 depth)
    heads: int = 4                  # attention heads (release: depth, 64 features each)
    mlp_ratio: int = 4              # width of the mlp's hidden units in units of M
    l2_norm: bool = True            # queries and keys have length one, a learned temperature for each head
    shared_adaln: bool = False      # one AdaLN matrix for all blocks, and an offset of its own for each (512 px model)
    drop_path: float = 0.0          # rate of dropping the last block's branches, rising from 0 (release: depth / 240)
    gate_init: float = 1e-3         # factor of the weights that make gates: small, blocks start as identity
    label_dropout: float = 0.1      # share of labels replaced by "no class", which guidance needs
    label_smoothing: float = 0.0    # share of the target spread evenly over all codes
    # training
    seed: int = 0                   # a step is a function of (seed, step)
    batch_size: int = 16            # images per step of the tokenizer, over all processes
    batch_size_prior: int = 16      # images per step of the transformer, over all processes
    train_steps_tokenizer: int = 650  # steps of the tokenizer
    train_steps_prior: int = 1700   # steps of the transformer
    lr_tokenizer: float = 1e-3      # learning rate of autoencoder and discriminator
    lr_prior: float = 2e-3          # learning rate of the transformer
    lr_end: float = 0.01            # the transformer's last learning rate in units of lr_prior
    weight_decay: float = 0.05      # of the transformer's matrices and embeddings
    weight_decay_end: float = 0.0   # the cosine that it follows ends here (0: it stays as it is)
    warmup_tokenizer: int = 30      # steps of warm-up of the tokenizer; then a cosine to zero (0: constant)
    warmup: int = 60                # steps of warm-up of the transformer, from 0.005 of its learning rate
    clip: float = 2.0               # gradients of the transformer are scaled down to this norm (0: never)
    progressive: float = 0.0        # share of the steps in which the scales are added one by one (0: all at once)
    progressive_start: int = 4      # the finest scale, from 0, that is trained during the warm-up, if progressive
    log_every: int = 10             # steps between two rows of metrics.jsonl
    save_every: int = 250           # steps between two checkpoints
    temperature: float = 1.0        # logits are divided by it in sampling
    top_k: int = 0                  # only the k likeliest codes are drawn (0: all)
    top_p: float = 0.9              # only the likeliest codes that together reach probability p are drawn
    guidance: float = 3.0           # logits = no class + g (class - no class), g from 1 to this; 1: none (cfg + 1)
    smooth: bool = False            # codes mixed, not drawn: nicer, not for FID (release: more_smooth)
    compile: bool = False           # torch.compile (CUDA)

    def __post_init__(self):
        self.ch_mult, self.scales = tuple(self.ch_mult), tuple(self.scales)

    @property
    def f(self):
        """Downsampling factor."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def side(self):
        """Side of the finest map."""
        return self.image_size // self.f


# The release: one tokenizer (its training: see Departs); transformers of depth d with d heads and 64 d channels
SCALES = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
RELEASE = dict(num_classes=1000, ch=160, groups=32, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, code_dim=32,
               codebook_size=4096, codebook_weight=1.0, codebook_decay=0.0, restart=0, lpips="download", disc_layers=3,
               disc_width=64, batch_size=768, train_steps_tokenizer=400_000, disc_start=80_000, lr_tokenizer=3e-4,
               warmup_tokenizer=4000, temperature=1.0, top_k=900, top_p=0.96, guidance=2.5, log_every=50,
               save_every=2000)


def released(depth, size, epochs, batch, lr, gate_init, lr_end, **more):
    """A transformer of the release's table; an epoch is 1,281,167 images. The 512 px model shares the tokenizer."""
    steps = epochs * -(-1_281_167 // batch)
    return Config(**RELEASE | dict(data=f"imagenet{size}", image_size=size, scales=SCALES[size], depth=depth,
                  width=64 * depth, heads=depth, drop_path=depth / 240, gate_init=gate_init, lr_end=lr_end,
                  batch_size_prior=batch, lr_prior=lr * batch / 256, train_steps_prior=steps,
                  warmup=steps // 50) | more)


PRESETS = {
    "demo": Config(),
    "mnist": Config(data="mnist", image_size=28, num_classes=10, scales=(1, 2, 3, 5, 7)),
    "cifar10": Config(data="cifar10", image_size=32, num_classes=10, scales=(1, 2, 3, 4, 6, 8), ch=48, code_dim=16,
                      codebook_size=512, codebook_decay=0.98, disc_start=2400, train_steps_tokenizer=3000, width=192,
                      heads=6, depth=6, train_steps_prior=5000, lr_prior=1e-3, warmup=200),
    "imagenet256-d16": released(16, 256, 200, 768, 1e-4, 1e-3, 0.1),
    "imagenet256-d20": released(20, 256, 250, 768, 1e-4, 1e-3, 0.1),
    "imagenet256-d24": released(24, 256, 350, 768, 8e-5, 1e-4, 0.01),
    "imagenet256-d30": released(30, 256, 350, 1024, 8e-5, 1e-5, 0.01, weight_decay_end=0.08),
    "imagenet512-d36": released(36, 512, 350, 768, 8e-5, 5e-6, 0.01, weight_decay_end=0.08, shared_adaln=True),
}


# === Tokenizer: images <-> K maps of codes, coarse to fine ============================================================
# Copied from vqgan_gpt.py
def norm(width, groups):
    """GroupNorm, eps 1e-6. With one channel a group it would lose every channel's mean, and with it the colours."""
    return nn.GroupNorm(groups, width, eps=1e-6)


# Copied from vqgan_gpt.py
class ResnetBlock(nn.Module):
    """x + f(x), f = norm, swish, 3x3, norm, swish, 3x3; a 1x1 convolution on x where widths differ.

    (B, C_in, H, W) -> (B, C_out, H, W).   Source: taming/modules/diffusionmodules/model.py (without time and dropout).
    """
    def __init__(self, in_channels, out_channels, groups=32):
        super().__init__()
        self.norm1 = norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """x + attention of every position to all, one head as wide as x.  (B, C, H, W) -> (B, C, H, W)."""
    def __init__(self, width, groups=32):
        super().__init__()
        self.norm, self.qkv = norm(width, groups), nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)       # (B, 1, HW, C) each
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


# Copied from vqgan_gpt.py
class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded at the right and bottom only.  (B, C, H, W) -> (B, C, H/2, W/2)."""
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


# Copied from vqgan_gpt.py
class Upsample(nn.Module):
    """Every pixel twice in both directions, then a 3x3 convolution.  (B, C, H, W) -> (B, C, 2H, 2W)."""
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# Copied from vqgan_gpt.py
class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it, then the change of size."""
    def __init__(self, in_channels, width, blocks, attention, groups, **resample):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width if i else in_channels, width, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(width, groups) for _ in range(blocks if attention else 0))
        for name, module in resample.items():                                   # downsample=, upsample=: a part of keys
            self.add_module(name, module)
        self.resample = list(resample)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in self.resample:
            x = getattr(self, name)(x)
        return x


# Copied from vqgan_gpt.py
def middle(width, groups):
    """Block, attention, block at the lowest resolution: the only place where far parts of the image meet."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(width, width, groups), attn_1=AttnBlock(width, groups),
                                     block_2=ResnetBlock(width, width, groups)))


# Copied from vqgan_gpt.py
class Encoder(nn.Module):
    """images (B, C, H, W) -> (B, z_channels, H / f, W / f).

    resolution decides which levels have attention, once: at another size of input they keep it. Source: as ResnetBlock.
    """
    def __init__(self, channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels,
                 groups=32):
        super().__init__()
        self.conv_in, self.down, width = nn.Conv2d(channels, ch, 3, padding=1), nn.ModuleList(), ch
        for i, mult in enumerate(ch_mult):
            resample = {"downsample": Downsample(ch * mult)} if i < len(ch_mult) - 1 else {}
            attention = resolution >> i in attn_resolutions
            self.down.append(Level(width, ch * mult, num_res_blocks, attention, groups, **resample))
            width = ch * mult
        self.mid, self.norm_out = middle(width, groups), norm(width, groups)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


# Copied from vqgan_gpt.py
class Decoder(nn.Module):
    """(B, z_channels, h, w) -> images (B, C, f h, f w), not clamped: neither in the losses nor by a tanh."""
    def __init__(self, channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, z_channels,
                 groups=32):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in, self.mid, levels = nn.Conv2d(z_channels, width, 3, padding=1), middle(width, groups), []
        for i, mult in reversed(list(enumerate(ch_mult))):
            resample = {"upsample": Upsample(ch * mult)} if i else {}
            attention = resolution >> i in attn_resolutions
            levels.append(Level(width, ch * mult, num_res_blocks + 1, attention, groups, **resample))
            width = ch * mult
        self.up = nn.ModuleList(reversed(levels))                               # the release's keys: up.0 is the finest
        self.norm_out, self.conv_out = norm(width, groups), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


# Copied from vqgan_gpt.py
def nearest(z, codebook, limit=2 ** 22):
    """Index of the codebook's row nearest to each row of z.  z (n, E), codebook (V, E) -> (n,) int64.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all e. At most `limit` distances exist at a time.
    """
    square, rows = codebook.square().sum(1), max(1, limit // len(codebook))
    return torch.cat([torch.addmm(square, part, codebook.T, alpha=-2).argmin(1) for part in z.split(rows)])


def phi_of_scale(K):
    """Which of four phis each of K scales uses: the nearest on [0, 1].   Source: models/quant.py PhiPartiallyShared.

    QUIRK: some scales lie exactly between two phis, and rounding decides: for ten scales the release's table stands.
    """
    if K == 10:
        return [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    ticks = np.linspace(1 / 12, 11 / 12, 4)
    return [int(np.argmin(np.abs(ticks - k / (K - 1)))) for k in range(K)]


class Phi(nn.Conv2d):
    """Half of the map as it is, half through a 3x3 convolution."""
    def forward(self, h):
        return 0.5 * h + 0.5 * super().forward(h)


class MultiScaleQuantizer(nn.Module):
    """f (B, E, h, w) <-> tokens (B, L): each scale codes what the coarser ones left.   Source: models/quant.py.

    decay > 0: codes are running means of their latents (VQ-VAE appendix A.1), not trained by gradient. restart: codes
    unused for so many steps (none before that many) move to latents of the batch, the first process's.
    """
    def __init__(self, scales, size, dim, beta=0.25, decay=0.0, restart=0):
        super().__init__()
        self.scales, self.beta, self.decay, self.restart = tuple(scales), beta, decay, restart
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -dim ** -0.5 / 36, dim ** -0.5 / 36)
        self.phi, self.phi_of = nn.ModuleList(Phi(dim, dim, 3, padding=1) for _ in range(4)), phi_of_scale(len(scales))
        if decay:
            self.embedding.weight.requires_grad = False
            self.register_buffer("count", torch.ones(size))
            self.register_buffer("total", self.embedding.weight.detach().clone())
        if restart:
            self.register_buffer("idle", torch.zeros(size))

    def split(self, x):
        """x (B, L, ...) -> a part (B, p_k^2, ...) for each scale."""
        return x.split([p * p for p in self.scales], 1)

    def shrink(self, x, k):
        """x (B, E, h, w) -> (B, E, p_k, p_k): means of areas, which overlap where p_k does not divide h."""
        return F.interpolate(x, (self.scales[k],) * 2, mode="area")

    def enlarge(self, codes, k):
        """Vectors of scale k's codes (B, E, p_k, p_k) -> what they add to f_hat (B, E, h, w). The last has phi."""
        return self.phi[self.phi_of[k]](F.interpolate(codes, (self.scales[-1],) * 2, mode="bicubic"))

    def lookup(self, tokens):
        """Indices of one scale (B, p^2) -> vectors (B, E, p, p)."""
        side = math.isqrt(tokens.shape[1])
        return self.embedding(tokens).transpose(1, 2).unflatten(2, (side, side))

    def steps(self, f):
        """For each scale: z (B p_k^2, E), what is left, shrunk; its tokens (B, p_k^2); what they add (B, E, h, w)."""
        rest, codebook = f.detach(), self.embedding.weight.detach()
        for k in range(len(self.scales)):
            z = self.shrink(rest, k).permute(0, 2, 3, 1).flatten(0, 2)
            tokens = nearest(z, codebook).view(len(f), -1)
            h = self.enlarge(self.lookup(tokens), k)
            rest = rest - h.detach()
            yield z, tokens, h

    @torch.no_grad()
    def indices(self, f):
        """f (B, E, h, w) -> tokens (B, L) int64.  Not under autocast: one code that flips changes all finer scales."""
        with torch.autocast(f.device.type, enabled=False):
            return torch.cat([tokens for _, tokens, _ in self.steps(f.to(self.embedding.weight.dtype))], 1)

    def sums(self, tokens):
        """tokens (B, L) -> f_hat after each scale (K, B, E, h, w)."""
        with torch.autocast(tokens.device.type, enabled=False):
            added = [self.enlarge(self.lookup(part), k) for k, part in enumerate(self.split(tokens))]
            return torch.stack(added).cumsum(0)

    @torch.no_grad()
    def inputs(self, tokens):
        """tokens (B, L) -> the transformer's inputs of scales 1 to K-1 (B, L - p_0^2, E): f_hat before each, shrunk."""
        return torch.cat([self.shrink(f_hat, k + 1).flatten(2) for k, f_hat in enumerate(self.sums(tokens)[:-1])],
                         2).transpose(1, 2)

    def forward(self, f, generator=None):
        """f -> f_hat, tokens (B, L), loss: mean over the scales of beta (f - sg(f_hat_k))^2 + (sg(f) - f_hat_k)^2.

        f_hat_k is the running sum, so that a scale's term trains the codes of all coarser ones too. Straight-through:
        f gets f_hat's gradient; codes and phi learn from the loss alone.
        """
        with torch.autocast(f.device.type, enabled=False):
            f = f.to(self.embedding.weight.dtype)
            rests, maps, added = zip(*self.steps(f))
            sums, tokens = torch.stack(added).cumsum(0), torch.cat(maps, 1)
            loss = self.beta * (f - sums.detach()).square().mean() + (sums - f.detach()).square().mean()
            if self.training and (self.decay or self.restart):
                self.update(torch.cat(rests), torch.cat([part.flatten() for part in maps]), generator)
            return f + (sums[-1] - f).detach(), tokens, loss

    @torch.no_grad()
    def update(self, z, indices, generator=None):
        """What codes do between gradient steps: follow the mean of their latents z (n, E); start anew where unused."""
        weight = self.embedding.weight
        count = torch.bincount(indices, minlength=len(weight)).to(z)
        total = torch.zeros_like(weight).index_add_(0, indices, z)
        for t in (count, total) if dist.is_initialized() else ():
            dist.all_reduce(t)
        if self.decay:
            self.count.lerp_(count, 1 - self.decay)
            self.total.lerp_(total, 1 - self.decay)
            n = self.count.sum()
            smooth = (self.count + 1e-5) / (n + 1e-5 * len(weight)) * n         # Laplace: never a division by zero
            weight.copy_(self.total / smooth[:, None])
        if self.restart:
            self.idle.add_(1)[count > 0] = 0
            dead = (self.idle >= self.restart).nonzero()[:, 0]
            fresh = z[torch.randint(len(z), (len(dead),), generator=generator).to(z.device)]
            if dist.is_initialized():
                dist.broadcast(fresh, 0)
            weight[dead], self.idle[dead] = fresh, 0
            if self.decay:
                self.count[dead], self.total[dead] = 1, fresh


class VQVAE(nn.Module):
    """The multi-scale tokenizer: encoder and decoder of VQGAN, 3x3 convolutions about the quantizer.

    Source: models/vqvae.py.   Raises UserError where config makes no sense.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        self.f, self.codebook_size = c.f, c.codebook_size
        attention = (c.side,)                                                   # at the coarsest level alone
        sizes = c.ch, c.ch_mult, c.num_res_blocks, attention, c.image_size, c.code_dim, c.groups
        self.encoder, self.decoder = Encoder(3, *sizes), Decoder(3, *sizes)
        self.quantize = MultiScaleQuantizer(c.scales, c.codebook_size, c.code_dim, c.beta, c.codebook_decay, c.restart)
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(c.code_dim, c.code_dim, 3, padding=1) for _ in range(2))

    def latents(self, images):
        """images (B, 3, S, S) -> f (B, E, S / f, S / f), before the quantizer. ValueError: not of this size."""
        S = self.quantize.scales[-1] * self.f
        if images.ndim != 4 or images.shape[1:] != (3, S, S):
            raise ValueError(f"images must be (B, 3, {S}, {S}), not {tuple(images.shape)}: maps end at {S} / {self.f}")
        return self.quant_conv(self.encoder(images))

    def encode(self, images):
        """images (B, 3, S, S) in [-1, 1] -> tokens (B, L) int64, coarse maps first. ValueError as latents."""
        return self.quantize.indices(self.latents(images))

    def decode_latents(self, f_hat):
        """f_hat (B, E, h, w) -> images (B, 3, H, W), in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(f_hat))

    def decode(self, tokens, scales=None):
        """tokens (B, L) -> images (B, 3, H, W). scales: of the first so many scales alone."""
        return self.decode_latents(self.quantize.sums(tokens)[(scales or len(self.quantize.scales)) - 1])

    def forward(self, images, generator=None):
        """images -> reconstruction, {codebook_loss, perplexity (of this batch: exp of the codes' entropy)}."""
        f_hat, tokens, loss = self.quantize(self.latents(images), generator)
        return self.decode_latents(f_hat), {"codebook_loss": loss, "perplexity": use(tokens, self)[1]}


# Copied from vqgan_gpt.py
def use(indices, tokenizer):
    """Share of the codebook that occurs in indices, and perplexity: so many codes, used evenly, would say as much."""
    p = torch.bincount(indices.flatten(), minlength=tokenizer.codebook_size) / indices.numel()
    return (p > 0).float().mean(), (-(p * p.clamp(min=1e-12).log()).sum()).exp()


def build_tokenizer(config):
    return VQVAE(config)


# === Prior: p(map k | class, maps before k), all codes of a map at once ===============================================
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


class SelfAttention(nn.Module):
    """Queries and keys have length one; their products are multiplied by exp of a learned number of each head (<= 100).

    Without l2_norm: the plain one with the release's temperature.   Source: models/basic_var.py, as all down to VAR.
    """
    def __init__(self, width, heads, l2_norm=True):
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.mat_qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x, mask=None, cache=None):
        """x (B, L, M) -> (B, L, M).  mask (L, L), True: sees.  cache: keys and values of earlier scales, all seen."""
        B, L, M = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])     # the key has none
        q, k, v = F.linear(x, self.mat_qkv.weight, bias).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scale = 0.25 / math.sqrt(M // self.heads)
        if self.l2_norm:
            q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 1.0
            q = q * self.scale_mul_1H11.clamp(max=math.log(100)).exp()
        if cache is not None:
            k, v = cache(k, v)
        y = F.scaled_dot_product_attention(q, k, v.to(q), mask, scale=scale)      # autocast: v is bfloat16
        return self.proj(y.transpose(1, 2).reshape(B, L, M))


def ada(width, n):
    """AdaLN's matrix: the class -> n vectors."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, n * width))


def modulated(x, scale, shift):
    """AdaLN: LayerNorm without weights of its own, eps 1e-6; then a scale and a shift that the class gave."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class AdaLNBlock(nn.Module):
    """x + gamma attention(norm x), then x + gamma mlp(norm x); the class gives both gates, scales and shifts."""
    def __init__(self, width, heads, mlp_ratio=4, l2_norm=True, shared=False, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.attn, hidden = SelfAttention(width, heads, l2_norm), mlp_ratio * width
        self.ffn = nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), gelu=nn.GELU(approximate="tanh"),
                                             fc2=nn.Linear(hidden, width)))
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width ** 0.5)
        else:
            self.ada_lin = ada(width, 6)

    def drop(self, branch):
        """Stochastic depth: an image's branch is left out, the others are enlarged for it."""
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def forward(self, x, six, mask=None, cache=None):
        """x (B, L, M), six (B, 1, 6, M) -> (B, L, M)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)          # not DiT's order
        x = x + self.drop(gamma1 * self.attn(modulated(x, scale1, shift1), mask, cache))
        return x + self.drop(gamma2 * self.ffn(modulated(x, scale2, shift2)))


def levels(scales):
    """The scale of each token -> (L,) int64."""
    every = [k for k, p in enumerate(scales) for _ in range(p * p)]
    return torch.tensor(every, device="cpu")                                    # from_official builds on "meta"


class VAR(nn.Module):
    """p(tokens | class) = prod_k p(map k | class, maps before k).   Source: models/var.py.

    forward and loss make inputs of tokens by the tokenizer's quantizer: bind(prior, tokenizer) first.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config, self.inputs_of = (c := config), None
        self.register_buffer("level", levels(c.scales), persistent=False)
        L, std = len(self.level), math.sqrt(1 / c.width / 3)
        self.word_embed, self.class_emb = nn.Linear(c.code_dim, c.width), nn.Embedding(c.num_classes + 1, c.width)
        self.lvl_embed = nn.Embedding(len(c.scales), c.width)
        self.pos_start, self.pos_1LC = (nn.Parameter(torch.randn(1, n, c.width) * std) for n in (c.scales[0] ** 2, L))
        if c.shared_adaln:
            self.shared_ada_lin = ada(c.width, 6)
        self.blocks = nn.ModuleList(
            AdaLNBlock(c.width, c.heads, c.mlp_ratio, c.l2_norm, c.shared_adaln, c.drop_path * i / max(1, c.depth - 1))
            for i in range(c.depth))
        self.head_nm = nn.Sequential(OrderedDict(ada_lin=ada(c.width, 2)))      # the release's key
        self.head = nn.Linear(c.width, c.codebook_size)
        self.init_weights(std)

    @torch.no_grad()
    def init_weights(self, std):
        """The release's: small branches, gates nearly closed (not shared ones), logits near 0: loss log V."""
        c = self.config
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.head.weight *= 0.02
        self.head_nm.ada_lin[1].weight *= 0.5
        for block in self.blocks:
            block.attn.proj.weight /= math.sqrt(2 * c.depth)
            block.ffn.fc2.weight /= math.sqrt(2 * c.depth)
            six = block.ada_gss[0, 0] if c.shared_adaln else block.ada_lin[1].weight.view(6, c.width, -1)
            six[:2] *= c.gate_init
            six[2:] *= 0.5

    def embed(self, cond, inputs=None, begin=0):
        """Inputs (B, n, E) of tokens from begin on -> x (B, n, M); at begin 0 the class goes ahead, map 0's input."""
        x = [cond[:, None] + self.pos_start] if begin == 0 else []
        x = torch.cat(x if inputs is None else [*x, self.word_embed(inputs)], 1)
        where = slice(begin, begin + x.shape[1])
        return x + self.lvl_embed(self.level[where]) + self.pos_1LC[:, where]   # map 0: a second position, as released

    def modulation(self, cond):
        """cond (B, M) -> gates, scales, shifts (B, 1, 6, M) of each block, scale and shift (B, 1, M) of the last norm.

        A third of the weights is in these matrices (if not shared): a sample needs them once, not once a scale.
        """
        c = self.config
        if c.shared_adaln:
            shared = self.shared_ada_lin(cond).view(-1, 1, 6, c.width)
            sixes = [shared + block.ada_gss for block in self.blocks]
        else:
            sixes = [block.ada_lin(cond).view(-1, 1, 6, c.width) for block in self.blocks]
        return sixes, self.head_nm.ada_lin(cond)[:, None].chunk(2, -1)

    def logits(self, x, modulation, mask=None, cache=None):
        """x (B, n, M) -> logits (B, n, V), float32: each of its own token: x is made of coarser maps alone."""
        sixes, last = modulation
        for block, six, each in zip(self.blocks, sixes, cache or [None] * len(self.blocks)):
            x = block(x, six, mask, each)
        logits = self.head(modulated(x.to(self.pos_1LC.dtype), *last))
        return logits if logits.dtype == torch.float64 else logits.float()

    def condition(self, labels, batch):
        """labels (B,) int64 (num_classes: no class), None: no class -> vectors (B, M)."""
        if labels is None or not self.config.num_classes:
            labels = torch.full((batch,), self.config.num_classes, device=self.level.device)
        return self.class_emb(labels)

    def inputs_from(self, tokens):
        """tokens (B, L) -> (B, L - p_0^2, E). UserError: no tokenizer is bound."""
        if self.inputs_of is None:
            raise UserError("the transformer has no tokenizer: bind(prior, tokenizer) first")
        return self.inputs_of(tokens)

    def forward(self, tokens, labels=None, inputs=None):
        """tokens (B, L) int64, or inputs (B, n, E) for its first p_0^2 + n tokens -> logits (B, p_0^2 + n, V), float32.

        Those of map k depend on the class and on the maps before k alone.
        """
        inputs = self.inputs_from(tokens) if inputs is None else inputs
        cond = self.condition(labels, len(inputs))
        x = self.embed(cond, inputs)
        level = self.level[:x.shape[1]]
        return self.logits(x, self.modulation(cond), level[:, None] >= level)   # block-causal

    def loss(self, tokens, labels=None, scales=None, newest=1.0):
        """-> cross-entropy in nats, each token with the weight 1 / L; metrics nats, accuracy, and of the last scale.

        scales, newest: progressive training: of the first so many scales alone, the last one with this weight.
        """
        c, shown = self.config, self.config.scales[:scales]
        n = sum(p * p for p in shown)
        tail = slice(n - shown[-1] ** 2, n)                                     # the finest map that is trained
        logits = self(tokens, labels, self.inputs_from(tokens)[:, :n - c.scales[0] ** 2])
        tokens, weight = tokens[:, :n], torch.ones(n, device=logits.device)
        weight[tail] = newest
        nll = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
        loss, right = (nll * weight).sum(1).mean() / len(self.level), (logits.argmax(-1) == tokens).float()
        if c.label_smoothing:                                                   # the metrics are those without
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none",
                                   label_smoothing=c.label_smoothing).view_as(nll)
            loss = (loss * weight).sum(1).mean() / len(self.level)
        return loss, {"nats": nll.mean(), "nats_tail": nll[:, tail].mean(), "accuracy": right.mean(),
                      "accuracy_tail": right[:, tail].mean()}


def build_prior(config):
    return VAR(config)


def compare(prior, tokenizer, name="the transformer"):
    """UserError: a tokenizer's scales or codes are not those that a transformer reads."""
    q, c = tokenizer.quantize, prior.config
    theirs, ours = (q.scales, *q.embedding.weight.shape), (c.scales, c.codebook_size, c.code_dim)
    if theirs != ours:
        raise UserError(f"{name} reads maps of (sides, codes, width of a code) {ours}, this tokenizer makes {theirs}")


def bind(prior, tokenizer, name="the transformer"):
    """Tell a transformer which tokenizer makes its inputs. UserError: its scales or codes differ."""
    compare(prior, tokenizer, name)
    prior.inputs_of = tokenizer.quantize.inputs                                 # a method: no part of the state dict
    return prior


# === Losses: squared and absolute error + LPIPS, patch discriminator, adaptive weight =================================
# Copied from vqgan_gpt.py
class LPIPS(nn.Module):
    """Perceptual distance: squared differences of VGG16's unit-length features, weighted by learned 1x1 convolutions.

    a, b (B, 3 or 1, H, W) in [-1, 1] -> (B, 1, 1, 1). Always frozen.   Source: taming/modules/losses/lpips.py. The
    release's training leaves the dropout before the 1x1 convolutions on (its QUIRK); the losses below keep it off.
    """
    def __init__(self):
        super().__init__()
        self.scaling_layer = nn.Module()                        # from [-1, 1] to what VGG was trained on
        self.scaling_layer.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.scaling_layer.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
        self.net, n, width = nn.Module(), 0, 3
        for k, (depth, out) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
            layers = OrderedDict()                              # numbered as in torchvision's vgg16.features
            for layer in ([nn.MaxPool2d(2)] if k else []) + depth * [None, nn.ReLU()]:
                layers[str(n)] = layer or nn.Conv2d(width, out, 3, padding=1)
                width, n = width if layer else out, n + 1
            self.net.add_module(f"slice{k + 1}", nn.Sequential(layers))
            lin = nn.Module()
            lin.model = nn.Sequential(nn.Dropout(), nn.Conv2d(out, 1, 1, bias=False))
            self.add_module(f"lin{k}", lin)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    def features(self, x):
        """The five maps relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of images in [-1, 1]."""
        x, maps = (x - self.scaling_layer.shift) / self.scaling_layer.scale, []
        for part in self.net.children():
            maps.append(x := part(x))
        return maps

    @staticmethod
    def unit(x):
        """Every position's feature vector at length one; the epsilon stands outside of the root."""
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, a, b):
        differences = ((self.unit(x) - self.unit(y)).square() for x, y in zip(self.features(a), self.features(b)))
        return sum(getattr(self, f"lin{k}").model(d).float().mean((2, 3), keepdim=True)
                   for k, d in enumerate(differences))


# Copied from vqgan_gpt.py
class ActNorm(nn.Module):
    """scale (x + loc) per channel, set by the first training batch so that its output has mean 0, deviation 1."""
    def __init__(self, width):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, width, 1, 1)), nn.Parameter(torch.ones(1, width, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x):
        if self.training and not self.initialized:
            self.loc.data.copy_(-x.mean((0, 2, 3), keepdim=True))
            self.scale.data.copy_(1 / (x.transpose(0, 1).flatten(1).std(1)[None, :, None, None] + 1e-6))
            self.initialized.fill_(1)
        return self.scale * (x + self.loc)


# Copied from vqgan_gpt.py
class NLayerDiscriminator(nn.Module):
    """PatchGAN: one logit for every overlapping patch of the image.  (B, C, H, W) -> (B, 1, h', w').

    n_layers 3: 70 x 70 pixels a patch; 2: 34; 1: 16.   Source: taming/modules/discriminator/model.py, from pix2pix.
    """
    def __init__(self, channels=3, width=64, n_layers=3, actnorm=False):
        super().__init__()
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for n in range(1, n_layers + 1):
            i, o, stride = width * min(2 ** (n - 1), 8), width * min(2 ** n, 8), 2 if n < n_layers else 1
            layers += [nn.Conv2d(i, o, 4, stride, 1, bias=actnorm), ActNorm(o) if actnorm else nn.BatchNorm2d(o),
                       nn.LeakyReLU(0.2, inplace=True)]                       # a bias before BatchNorm would do nothing
        self.main = nn.Sequential(*layers, nn.Conv2d(width * min(2 ** n_layers, 8), 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x):
        return self.main(x)


# Copied from vqgan_gpt.py
def discriminator_loss(gan, real, fake):
    """real, fake: logits -> half the sum of both hinges (0 beyond +-1), or of both cross-entropies (vanilla)."""
    loss = F.softplus if gan == "vanilla" else lambda x: F.relu(1 + x)
    return 0.5 * (loss(-real).mean() + loss(fake).mean())


# Copied from vqgan_gpt.py
def adaptive_weight(nll, g, last_layer):
    """lambda: makes the GAN's gradient as long as that of nll at the decoder's last layer (paper eq. 7).

    The release's delta is 1e-4 (paper: 1e-6) and its clamp 1e4. Without a graph (evaluation): 0.
    """
    if not torch.is_grad_enabled():
        return torch.zeros(())
    a, b = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (nll, g))
    return (a / (b + 1e-4)).clamp(0, 1e4).detach()


def generator_loss(config, images, again, codebook_loss, last_layer, perceptual=None, discriminator=None):
    """(x - again)^2 + l1_weight |x - again| + LPIPS + the quantizer's loss + weighted -mean D(again) -> loss, metrics.

    perceptual None: no LPIPS; discriminator None: no GAN (yet).
    """
    mse = F.mse_loss(again, images)
    nll = mse + config.l1_weight * F.l1_loss(again, images)
    if perceptual:
        nll = nll + config.perceptual_weight * perceptual(images, again).mean()
    loss = nll + config.codebook_weight * codebook_loss
    metrics = {"mse": mse, "nll": nll, "codebook_loss": codebook_loss}
    if discriminator:
        g = -discriminator(again).float().mean()
        weight = config.disc_weight * adaptive_weight(nll, g, last_layer)
        loss, metrics = loss + weight * g, metrics | {"g_loss": g, "d_weight": weight}
    return loss, metrics


# === Sampler: one visible loop over the scales; editing ===============================================================
def filter_logits(logits, top_k=0, top_p=1.0):
    """Keep the k largest logits (and ties), then the largest that reach probability p; the others become -inf.

    (..., V) -> (..., V); the likeliest always stays.   Source: models/helpers.py.
    """
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -math.inf)
    if top_p < 1:
        values, order = logits.sort(-1, descending=True)
        p = values.softmax(-1)
        dropped = p.cumsum(-1) - p >= top_p                                     # what comes before it reaches p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)
    return logits


# Copied from maskgit.py
def gumbel(like, generator=None):
    """Gumbel noise of the shape and device of `like`: argmax(logits + it) is a draw from softmax(logits)."""
    u = torch.rand(like.shape, generator=generator, device=generator.device if generator else like.device)
    return -(-u.clamp(min=1e-30).log()).log().to(like)


@torch.no_grad()
def sample(tokenizer, prior, labels, *, known=None, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, smooth=False,
           generator=None, trace=None):
    """Draw map after map: a pass reads the sum of all coarser maps, gives logits of the whole next one; that is drawn.

    labels (B,) int64 (num_classes: no class). known (B, L) int64: tokens that are kept; -1 where to draw. guidance:
    logits = no class + g (class - no class), g rising with the scale from 1 to guidance (the release's cfg + 1).
    smooth: codes are mixed by a Gumbel softmax in place of a draw. trace: a list that gets {scale, logits (B, p^2, V),
    tokens (B, p^2), codes (B, E, p, p), f_hat, images} for each scale. Returns images (B, 3, H, W) in [-1, 1].
    Raises UserError for a tokenizer of other scales, temperature, top_k, top_p or known out of range, guidance without
    dropped labels.   Source: models/var.py autoregressive_infer_cfg.
    """
    B, c, q, V = len(labels), prior.config, tokenizer.quantize, tokenizer.codebook_size
    compare(prior, tokenizer)
    if not 0 <= top_k <= V or not 0 < top_p <= 1 or temperature <= 0:
        raise UserError(f"top_k {top_k}, top_p {top_p}, temperature {temperature}: top_k must be 0 to {V}, the "
                        f"codebook's size, top_p in (0, 1], temperature positive")
    if known is not None and (known.shape != (B, len(prior.level)) or not -1 <= known.min() <= known.max() < V):
        raise UserError(f"known must be ({B}, {len(prior.level)}) codes from 0 to {V - 1}, -1 where to draw")
    if guidance != 1 and not (c.label_dropout and c.num_classes):
        raise UserError(f"guidance {guidance}: this model never saw dropped labels: use 1, or train with some")
    guided = guidance != 1 and bool((labels != c.num_classes).any())            # without a class both halves are equal
    cond = prior.condition(torch.cat([labels, torch.full_like(labels, c.num_classes)]) if guided else labels, B)
    modulation = prior.modulation(cond)
    cache, inputs, f_hat, at = [Cache(len(prior.level)) for _ in prior.blocks], None, 0, 0
    for k, side in enumerate(c.scales):
        if k:
            inputs = q.shrink(f_hat, k).flatten(2).transpose(1, 2).repeat(1 + guided, 1, 1)
        r = k / (len(c.scales) - 1)
        logits = prior.logits(prior.embed(cond, inputs, at), modulation, cache=cache)   # (B or 2B, p^2, V)
        if guided:
            logits, null = logits.chunk(2)
            logits = logits + (guidance - 1) * r * (logits - null)
        allowed = filter_logits(logits / temperature, top_k, top_p)
        tokens = torch.multinomial(allowed.softmax(-1).flatten(0, 1), 1, generator=generator).view(B, -1)
        codes = q.lookup(tokens)                                                # (B, E, p, p)
        if smooth:
            tau = 0.27 * (1 - 0.95 * r)                                         # as released
            soft = ((allowed * (1 + r) + gumbel(allowed, generator)) / tau).softmax(-1)
            codes = (soft @ q.embedding.weight).transpose(1, 2).unflatten(2, (side, side))
        if known is not None:
            given = known[:, at:at + side * side]
            keep = (given >= 0).view(B, 1, side, side)
            codes = torch.where(keep, q.lookup(given.clamp(min=0)), codes)
            tokens = torch.where(given >= 0, given, tokens)
        f_hat, at = f_hat + q.enlarge(codes, k), at + side * side
        if trace is not None:
            trace.append({"scale": k, "logits": logits, "tokens": tokens, "codes": codes, "f_hat": f_hat,
                          "images": tokenizer.decode_latents(f_hat).clamp(-1, 1)})
    return tokenizer.decode_latents(f_hat).clamp(-1, 1)


def kept_tokens(box, scales, size, inside=False):
    """Which tokens are known when the box (top, left, height, width in pixels) is drawn anew -> (L,) bool.

    inside: the box is known, all around it is drawn. The 1 x 1 map (in the release: maps of at most 3 tokens) is known
    whatever the box: it holds the picture's mean, hidden part included. UserError: box outside of the picture.
    Source: demo_zero_shot_edit.ipynb.
    """
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size or left + width > size:
        raise UserError(f"box {top} {left} {height} {width} (top, left, height, width) does not lie in a picture of "
                        f"{size} x {size} pixels")
    cell = lambda pixel: round(pixel / size * scales[-1])
    mask = torch.full((1, 1, scales[-1], scales[-1]), float(not inside))
    mask[:, :, cell(top):cell(top + height), cell(left):cell(left + width)] = float(inside)
    if mask.min() == mask.max():
        raise UserError(f"box {top} {left} {height} {width} leaves nothing to draw or nothing known on the map of "
                        f"{scales[-1]} x {scales[-1]} tokens: a token is {size // scales[-1]} pixels wide")
    parts = [F.interpolate(mask, (p, p), mode="bilinear", align_corners=False).flatten() > 0.5 for p in scales]
    return torch.cat([torch.ones_like(part) if len(part) <= 3 else part for part in parts])


@torch.no_grad()
def edit(tokenizer, prior, images, keep, labels, **settings):
    """Draw what is not in keep (L,) of images (B, 3, S, S) anew, as labels (B,) -> images. settings: see sample.

    With "no class" this is the paper's in-painting and out-painting (guidance then does nothing), with a class its
    class-conditional editing. Kept codes do not give back exact pixels.
    """
    known = tokenizer.encode(images)
    return sample(tokenizer, prior, labels, known=known.masked_fill(~keep.to(known.device), -1), **settings)


# === Training: one visible loop per stage =============================================================================
# Copied from pixelcnn.py
def backward(loss, optimizer):
    """Gradients of the optimizer's parameters, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    average(*(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None))


def train_tokenizer(config, data, run):
    """Autoencoder and discriminator in turn, on the same reconstruction. Returns the VQVAE."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(config).to(run.device)
    discriminator = NLayerDiscriminator(3, config.disc_width, config.disc_layers).to(run.device)
    perceptual = LPIPS().to(run.device) if config.lpips else None
    if perceptual:
        load_lpips(perceptual, config)
    else:
        print("no weights for LPIPS (--lpips): the reconstruction loss is on pixels alone")
    optimizers = [torch.optim.Adam([p for p in net.parameters() if p.requires_grad], config.lr_tokenizer, (0.5, 0.9),
                                   fused=run.device.type != "mps") for net in (tokenizer, discriminator)]
    print(f"tokenizer: {sum(p.numel() for p in tokenizer.parameters()):,} parameters on {run.device}, "
          f"{len(data.train[0]):,} images of {config.data}")
    if config.compile:
        for part in (tokenizer.encoder, tokenizer.decoder.mid, *tokenizer.decoder.up):  # not the last layer, whose
            part.compile()                                                      # gradient adaptive_weight takes alone
    last_layer = tokenizer.decoder.conv_out.weight
    for step in run.steps("tokenizer", config.train_steps_tokenizer, tokenizer=tokenizer, discriminator=discriminator,
                          optimizer=optimizers[0], optimizer_discriminator=optimizers[1]):
        generator = rng(config.seed, step)
        [images] = shard(data.batch("train", config.batch_size, generator)[0], device=run.device)
        adversary = discriminator if config.disc_weight and step >= config.disc_start else None
        for optimizer in optimizers:
            set_lr(optimizer, config.lr_tokenizer, step, config.warmup_tokenizer, config.train_steps_tokenizer)
        # 1. the autoencoder, with the discriminator's opinion as a part of its loss
        with autocast(run.device):
            again, found = tokenizer(images, generator)
            again = again.float()
            loss, metrics = generator_loss(config, images, again, found["codebook_loss"], last_layer, perceptual,
                                           adversary)
        backward(loss, optimizers[0])
        run.log("tokenizer", step, loss=loss, perplexity=found["perplexity"], **metrics)    # raises on a NaN loss
        optimizers[0].step()
        # 2. the discriminator
        if adversary:
            with autocast(run.device):                                          # two passes: BatchNorm must not mix
                fake, real = discriminator(again.detach()).float(), discriminator(images).float()
                loss = discriminator_loss("hinge", real, fake)
            backward(loss, optimizers[1])
            run.log("discriminator", step, loss=loss, logits_real=real.mean(), logits_fake=fake.mean())
            optimizers[1].step()
    return tokenizer.eval()


# Copied from vqvae2.py
@torch.no_grad()
def tokenize(tokenizer, images, device):
    """images uint8 (n, 3, H, W) -> tokens (n, N) int64. The tokenizer is in eval mode: else its codes would move."""
    many = max(1, min(64, 2 ** 20 // images.shape[-1] ** 2))                    # the encoder takes memory
    parts = tqdm(images.split(many), "tokens of the images", leave=False, disable=None)
    return torch.cat([tokenizer.encode(part.to(device) / 127.5 - 1).cpu() for part in parts])


# Copied from vqvae2.py
def fingerprint(tokenizer, *more):
    """SHA-256 of a tokenizer's weights and of more tensors: uint8 (32,)."""
    digest = hashlib.sha256()
    for value in (*tokenizer.state_dict().values(), *more):
        digest.update(value.cpu().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


# Copied from vqvae2.py
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


def parameter_groups(prior):
    """Weight decay on all matrices, class embedding included; not on vectors, positions, levels, ada_gss, scale_mul."""
    decays = lambda name, p: p.ndim > 1 and not re.search("pos_start|pos_1LC|lvl_embed|ada_gss|scale_mul", name)
    groups = [[p for name, p in prior.named_parameters() if decays(name, p) == wanted] for wanted in (True, False)]
    return [dict(params=groups[0]), dict(params=groups[1], weight_decay=0.0)]


def lr_and_decay(step, total, warmup, end=0.01, decay=0.05, decay_end=0.0, progressive=0.0):
    """Factor of the learning rate, weight decay at a step.   Source: utils/lr_control.py, lin0 and lin<pg>.

    Warm-up from 0.005, constant for a twentieth of the rest, then a line down to `end`. Progressive training: a line to
    the middle between 1 and what a straight one would have at that share, from there to `end`. The decay is a cosine to
    `decay_end` (0: constant).
    """
    t = (step - warmup) / max(1, total - 1 - warmup)
    meet, height = (progressive, 1 - (1 - end) * progressive / 2) if progressive else (0.05, 1.0)
    rate = 1 - (1 - height) * t / meet if t < meet else end + (height - end) * (1 - t) / (1 - meet)
    if step < warmup:
        rate = 0.005 + 0.995 * step / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / max(1, total - 1))
    return rate, (decay_end or decay) + (decay - (decay_end or decay)) * cosine


def curriculum(config, step):
    """Progressive training: how many scales are trained at a step, and the weight of the newest.

    During the warm-up scales 0 to progressive_start; one by one all of them, by the share `progressive` of the steps. A
    new scale's weight rises from 0.01 to 1 within a sixth of the warm-up, but the last one's, which is at 1 at once.
    Source: trainer.py, train.py.
    """
    c, last = config, len(config.scales) - 1
    first, span = min(c.progressive_start, last), max(1.0, c.progressive * c.train_steps_prior - c.warmup)
    finest = lambda n: first + round(min(1.0, max(0.0, (n - c.warmup) / span)) * (last - first))
    if not c.progressive or finest(step) == last:
        return last + 1, 1.0
    now, rise = finest(step), max(1, c.warmup / 6)                              # no need to look back further than that
    age = next((n for n in range(1, int(rise) + 1) if finest(step - n) != now), rise)
    return now + 1, 1.0 if now == first else max(0.01, age / rise)


def train_prior(config, data, run, tokenizer):
    """Cross-entropy of all maps of the cached training images, each given the true coarser ones. Returns the prior."""
    torch.manual_seed(config.seed)
    prior = bind(build_prior(config).to(run.device), tokenizer)
    all_tokens, all_labels = cached_tokens(tokenizer, data, run), data.train[1]
    share, perplexity = use(all_tokens, tokenizer)
    if perplexity < 0.05 * config.codebook_size:
        print(f"warning: the codebook collapsed: {share:.1%} of {config.codebook_size} codes are used, perplexity "
              f"{perplexity:.1f}; try --restart 20, a smaller --lr-tokenizer or more --train-steps-tokenizer")
    optimizer = torch.optim.AdamW(parameter_groups(prior), config.lr_prior, (0.9, 0.95),
                                  weight_decay=config.weight_decay, fused=run.device.type != "mps")
    if config.compile:
        prior.logits = torch.compile(prior.logits)
    print(f"prior: {sum(p.numel() for p in prior.parameters()):,} parameters, {len(prior.level)} tokens an image in "
          f"{len(config.scales)} scales; yardsticks in nats per token: {math.log(config.codebook_size):.3f} if all "
          f"codes were alike, {perplexity.log():.3f} without context")
    for step in run.steps("prior", config.train_steps_prior, prior=prior, optimizer_prior=optimizer):
        generator = rng(config.seed, step)
        rank = dist.get_rank() if dist.is_initialized() else 0                  # drop path: every process its own
        torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)) + rank)
        index = torch.randint(len(all_tokens), (config.batch_size_prior,), generator=generator)
        tokens, labels = all_tokens[index], all_labels[index]
        if config.num_classes:
            dropped = torch.rand(labels.shape, generator=generator) < config.label_dropout
            labels = labels.masked_fill(dropped, config.num_classes)
        tokens, labels = shard(tokens, labels, device=run.device)
        scales, newest = curriculum(config, step)
        with autocast(run.device):
            loss, metrics = prior.loss(tokens, labels, scales, newest)
        backward(loss, optimizer)
        length = nn.utils.clip_grad_norm_(prior.parameters(), config.clip or math.inf)
        run.log("prior", step, loss=loss, grad_norm=length, **metrics)          # raises on NaN before a weight changes
        rate, decay = lr_and_decay(step, config.train_steps_prior, config.warmup, config.lr_end, config.weight_decay,
                                   config.weight_decay_end, config.progressive)
        for group, each in zip(optimizer.param_groups, (decay, 0.0)):
            group["lr"], group["weight_decay"] = config.lr_prior * rate, each
        optimizer.step()
    return prior.eval()


# === Official weights: FoundationVision/VAR ===========================================================================
# Copied from vqgan_gpt.py
def read_weights(source):
    """Path of a checkpoint, or a state dict -> state dict of tensors on the CPU. UserError: missing or damaged."""
    if not isinstance(source, dict):
        # Lightning names its callbacks' classes in a checkpoint: an empty class of that name, and nothing is executed
        stub = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
        torch.serialization.add_safe_globals([stub])
        with explain(f"{source} cannot be read as a checkpoint", "give a .ckpt or .pth of the release"):
            loaded = torch.load(source, map_location="cpu", weights_only=True)
    else:
        loaded = source
    inside = next((key for key in ("state_dict", "model_ema", "model") if key in loaded), None) if isinstance(
        loaded, dict) else None
    state = loaded[inside] if inside else loaded
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                              for name, value in state.items()):
        hint = "it is a run of this script: name its folder" if isinstance(loaded, dict) and "progress" in loaded else \
            "give a .ckpt or .pth of the release"
        raise UserError(f"{'the dict' if isinstance(source, dict) else source} holds no names and tensors: {hint}")
    return state


def from_official(source, config=None):
    """Released weights -> VQVAE or VAR, in eval mode.

    source: path or state dict (of a training checkpoint, ar-ckpt-*.pth: its ["trainer"]["var_wo_ddp"]). config: the
    constructor arguments, of which v_patch_nums, patch_nums and num_heads are read; else the tokenizer gets the 256 px
    scales, and the transformer's are seen by its number of tokens. Buffers of the release (masks, usage of codes) are
    checked for their shapes and left. Every name and shape must fit: else UserError with the first five that do not.
    """
    name = "the dict" if isinstance(source, dict) else source
    state = {key.replace("quant_resi.qresi_ls", "phi"): value for key, value in read_weights(source).items()}
    size = lambda key, axis=0: state[key].shape[axis] if key in state and state[key].ndim > axis else 0
    count = lambda pattern: len({match[1] for match in map(re.compile(pattern).match, state) if match})
    given, buffers = config or {}, {}
    with explain(f"{name} is no model of this paper", "its shapes make no sense"), torch.device("meta"):
        if "pos_1LC" in state:
            L, K, width = size("pos_1LC", 1), size("lvl_embed.weight"), size("pos_1LC", 2)
            fitting = [s for s in SCALES.values() if len(s) == K and sum(p * p for p in s) == L]
            scales, depth = tuple(given.get("patch_nums", fitting[0] if fitting else ())), count(r"blocks\.(\d+)")
            if len(scales) != K or sum(p * p for p in scales) != L:
                raise UserError(f"{name} has {L} tokens in {K} scales, not those of {scales or 'any release'}: give "
                                "its patch_nums")
            heads = size("blocks.0.attn.scale_mul_1H11", 1) or given.get("num_heads", depth)
            model = VAR(Config(
                scales=scales, image_size=16 * scales[-1], ch_mult=(1, 1, 2, 2, 4),
                num_classes=size("class_emb.weight") - 1,
                code_dim=size("word_embed.weight", 1), codebook_size=size("head.weight"), depth=depth, width=width,
                heads=heads, mlp_ratio=size("blocks.0.ffn.fc1.weight") // width, disc_weight=0.0,
                l2_norm="blocks.0.attn.scale_mul_1H11" in state, shared_adaln="shared_ada_lin.1.weight" in state))
            buffers = {"lvl_1L": (1, L), "attn_bias_for_masking": (1, 1, L, L)} | {
                f"blocks.{i}.attn.zero_k_bias": (width,) for i in range(depth)}
        elif "encoder.conv_in.weight" in state:
            depth, ch = count(r"encoder\.down\.(\d+)"), size("encoder.conv_in.weight")
            scales = tuple(given.get("v_patch_nums", SCALES[256]))
            model = VQVAE(Config(
                scales=scales, image_size=scales[-1] * 2 ** (depth - 1), num_classes=0, ch=ch, groups=32,
                ch_mult=[size(f"encoder.down.{i}.block.0.conv1.weight") // max(1, ch) for i in range(depth)],
                num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)"), code_dim=size("quantize.embedding.weight", 1),
                codebook_size=size("quantize.embedding.weight"), codebook_decay=0.0, restart=0, disc_weight=0.0))
            buffers = {"quantize.ema_vocab_hit_SV": (                           # statistics, of 256 px's scales in all
                size("quantize.ema_vocab_hit_SV"), size("quantize.embedding.weight"))}
        else:
            raise ValueError("neither encoder.conv_in.weight nor pos_1LC is in it")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = [key for key in {**state, **shapes} if key not in buffers and key not in state
             or key in state and tuple(state[key].shape) != (shapes | buffers).get(key)]
    if wrong:
        raise UserError(f"{name} is no model of this paper: {len(wrong)} names or shapes do not fit, first "
                        f"{', '.join(wrong[:5])}")
    model.load_state_dict({key: state.pop(key).to(torch.float32, copy=True) for key in shapes}, assign=True)
    return model.eval()


# Copied from vqgan_gpt.py
def load_lpips(lpips, config):
    """Weights for LPIPS: from a released VQGAN's .ckpt that holds them, or VGG16's and the 1x1 convolutions' own files.

    These two are looked for in the folder config.lpips ("download": in data_dir) and downloaded if they are not there.
    """
    if Path(config.lpips).is_file():
        state, prefix = read_weights(config.lpips), "loss.perceptual_loss."
        state = {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}
    elif config.lpips != "download" and not Path(config.lpips).is_dir():
        raise UserError(f"--lpips {config.lpips} is no file and no folder: give download, or one of these")
    else:
        folder = Path(config.data_dir if config.lpips == "download" else config.lpips)
        vgg, lin = (torch.load(io.BytesIO(*fetch(name, folder)), map_location="cpu", weights_only=True)
                    for name in ("vgg16", "lpips"))
        state = lin | {name: vgg["features." + name.split(".", 2)[2]] for name in lpips.state_dict() if "slice" in name}
    with explain(f"{config.lpips} does not hold LPIPS's weights", "give download, a folder, or a released VQGAN"):
        missing, unexpected = lpips.load_state_dict(state, strict=False)
        if unexpected or any(not name.startswith("scaling_layer") for name in missing):
            raise ValueError(f"first names that do not fit: {', '.join((missing + unexpected)[:5])}")


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
    for names, least in (("batch_size batch_size_prior log_every save_every image_size num_res_blocks code_dim depth "
                          "disc_layers disc_width width heads mlp_ratio", 1), ("codebook_size", 2),
                         ("temperature", 1e-6),
                         ("warmup warmup_tokenizer train_images test_images train_steps_tokenizer train_steps_prior "
                          "num_classes restart disc_start disc_weight beta codebook_weight l1_weight perceptual_weight "
                          "clip weight_decay weight_decay_end lr_end gate_init progressive_start", 0)):
        for name in names.split():
            need(getattr(c, name) >= least, f"{name} is {getattr(c, name)}: at least {least}")
    for name in ("codebook_decay", "label_dropout", "label_smoothing", "drop_path", "progressive"):
        need(0 <= getattr(c, name) < 1, f"{name} is {getattr(c, name)}: at least 0, below 1")
    need(0 < c.top_p <= 1, f"top_p is {c.top_p}: above 0, at most 1")
    need(0 <= c.top_k <= c.codebook_size, f"top_k is {c.top_k}: 0 to {c.codebook_size}, the codebook's size")
    need(-100 <= c.guidance <= 100, f"guidance is {c.guidance}: a number up to 100, 1 for none")
    need(c.lr_tokenizer > 0 and c.lr_prior > 0, "lr_tokenizer and lr_prior must be positive")
    need(not c.lpips or c.image_size >= 16, f"LPIPS needs images of at least 16 pixels, these have {c.image_size}")
    need(0 <= c.seed < 2 ** 63, f"seed {c.seed}: 0 to 2**63 - 1")
    need(c.ch_mult and min(c.ch_mult) > 0, "ch_mult needs a positive number for each level")
    need(c.ch > 0 and c.groups > 0 and c.ch % c.groups == 0, f"ch {c.ch} is not divisible by groups, {c.groups}")
    need(c.width % c.heads == 0, f"width {c.width} is not divisible by heads, {c.heads}")
    need(c.image_size % c.f == 0, f"images of {c.image_size} pixels are not divisible by f = {c.f}")
    need(len(c.scales) > 1 and c.scales[0] > 0 and all(a < b for a, b in zip(c.scales, c.scales[1:])),
         f"scales {' '.join(map(str, c.scales))}: at least two, each larger than the one before")
    need(not c.progressive or c.progressive_start < len(c.scales) - 1,
         f"progressive_start is {c.progressive_start}: below {len(c.scales) - 1}, the last scale")
    need(c.scales[-1] == c.side, f"scales end at {c.scales[-1]}: with images of {c.image_size} pixels and f = {c.f} "
         f"the last must be {c.side}")
    need(c.codebook_size <= 2 ** 16, f"codebook_size {c.codebook_size}: at most 65536")
    need(not c.disc_weight or c.image_size >> c.disc_layers >= 3,
         f"images of {c.image_size} pixels are too small for disc_layers {c.disc_layers}: fewer, or --disc-weight 0")
    need(c.guidance == 1 or c.label_dropout > 0 or not c.num_classes,
         "guidance needs a model that saw dropped labels: --label-dropout 0.1, or --guidance 1")


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


DOWNLOADS = {   # name: (address, {file: MD5 (or start of the SHA-256) of its content, of .gz files of what is inside})
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
    "vgg16": ("https://download.pytorch.org/models/", {"vgg16-397923af.pth": "397923af"}),
    "lpips": ("https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/", {
        "vgg.pth": "d507d7349b931f0638a25a48a722f98a"})}


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
            other = ", or give --official TOKENIZER [TRANSFORMER]" if hasattr(args, "official") else ""
            raise UserError(f"name a run folder{other}")
        run, tokenizer, prior = load_run(args.run)
        return run, tokenizer, bind(prior, tokenizer)
    if args.run and "photos" not in args:
        raise UserError(f"{args.run} or --official: one of them")
    if args.run:                                                                # a photo stands where a run would
        args.photos = [args.run, *args.photos]
    run, prior = Run.__new__(Run), None                                         # no folder: pictures go to this one
    if len(args.official) > 2 or len(args.official) == 1 and args.verb != "reconstruct":
        raise UserError("--official needs the tokenizer first, then its transformer; photos stand before it")
    if len(args.official) > 1:
        prior = from_official(args.official[1])
        if not isinstance(prior, VAR):
            raise UserError(f"{args.official[1]} is a tokenizer: give the tokenizer first, then its transformer")
    # one tokenizer serves all transformers: its scales are theirs
    tokenizer = from_official(args.official[0], prior and {"v_patch_nums": prior.config.scales})
    if not isinstance(tokenizer, VQVAE):
        raise UserError(f"{args.official[0]} is a transformer: give the tokenizer first, then its transformer")
    run.folder, run.device = Path("."), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run.config = tokenizer.config
    if prior:
        bind(prior.to(run.device), tokenizer, args.official[1])
        top_k = min(900, tokenizer.codebook_size)
        run.config = dataclasses.replace(prior.config, top_k=top_k, top_p=0.96, guidance=2.5)
    run.state = {"classes": [str(i) for i in range(run.config.num_classes)]}
    return run, tokenizer.to(run.device), prior


# Copied from vqvae2.py
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


# Copied from maskgit.py
def labels_of(args, run, images, labels):
    """--labels, else the test images' own labels, else "no class" where the model knows it -> labels (n,)."""
    if args.labels or not run.config.num_classes:
        return read_labels(args.labels, run, len(images))
    if labels is None and not run.config.label_dropout:
        raise UserError("this model draws by class: give --labels, one for each photo or one for all")
    return torch.full((len(images),), run.config.num_classes) if labels is None else labels


# Copied from vqvae2.py
def at_once(config):
    """Images in one batch: attention, caches and decoder take memory."""
    return max(1, min(64, 2 ** 20 // config.image_size ** 2))


def draw_images(args, run, draw, *tensors):
    """draw(parts of tensors, generator=, sampling's settings by the flags or the run's) -> images, on the CPU."""
    settings = {name: getattr(run.config, name) if getattr(args, name) is None else getattr(args, name)
                for name in SETTINGS.split()}
    if not run.config.num_classes and args.guidance is None:
        settings["guidance"] = 1.0                                              # nothing to be guided by
    check(dataclasses.replace(run.config, seed=args.seed, **settings))
    generator = torch.Generator(run.device).manual_seed(args.seed)
    return torch.cat([draw(*(t.to(run.device) for t in part), generator=generator, **settings).cpu()
                      for part in zip(*(t.split(at_once(run.config)) for t in tensors))])


# Copied from maskgit.py
def sample_command(args, run, tokenizer, prior):
    columns = run.config.num_classes if 0 < run.config.num_classes <= 16 else 8
    labels = read_labels(args.labels, run, args.num or 8 * columns)
    images = draw_images(args, run, lambda labels, **more: sample(tokenizer, prior, labels, **more), labels)
    np.savez(buffer := io.BytesIO(), arr_0=to_bytes(images).permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy())
    show(args, run, images, "samples.png", columns, "complete")
    write_file(run.folder / "samples.npz", buffer.getbuffer())  # ADM's format; last: the picture may not be writable


# Copied from maskgit.py
def show_edits(args, run, images, hidden, drawn, name):
    """Each row: an image, what the model is shown of it (hidden (n or 1, 1, S, S): not), what it makes of that."""
    shown = torch.stack([images, images.masked_fill(hidden, 0)], 1)
    num = len(drawn) // len(images)
    show(args, run, torch.cat([shown, drawn.unflatten(0, (-1, num))], 1).flatten(0, 1), name, 2 + num, "evaluate")


def edit_images(args, run, tokenizer, prior, box, inside, name, classless=True):
    """Each row: an image, what of it the box leaves known, and what the model makes of that, --num times.

    classless: without --labels as "no class", where the model knows it, as the release does.
    """
    (images, labels), S = read_photos(args, run), run.config.image_size
    labels = labels_of(args, run, images, None if classless and run.config.label_dropout else labels)
    keep, num = kept_tokens(box, run.config.scales, S, inside), args.num or 6
    drawn = draw_images(args, run, lambda images, labels, **more: edit(tokenizer, prior, images, keep, labels, **more),
                        images.repeat_interleave(num, 0), labels.repeat_interleave(num))
    finest = keep[-run.config.scales[-1] ** 2:].view(1, 1, *run.config.scales[-1:] * 2)
    show_edits(args, run, images, ~F.interpolate(finest.float(), (S, S)).bool(), drawn, name)


def complete_command(args, run, tokenizer, prior):
    """The lower half of each image is hidden and drawn anew."""
    S = run.config.image_size
    edit_images(args, run, tokenizer, prior, (S // 2, 0, S - S // 2, S), False, "completions.png", classless=False)


def inpaint_command(args, run, tokenizer, prior):
    """Draws a box of each image anew."""
    edit_images(args, run, tokenizer, prior, args.box, False, "inpainted.png")


def outpaint_command(args, run, tokenizer, prior):
    """Draws all around a box of each image anew."""
    edit_images(args, run, tokenizer, prior, args.box, True, "outpainted.png")


def replace_command(args, run, tokenizer, prior):
    """Draws a box of each image anew, as another class."""
    if not args.labels:
        raise UserError("replace needs --labels: what to draw in the box")
    edit_images(args, run, tokenizer, prior, args.box, False, "replaced.png")


@torch.no_grad()
def reconstruct_command(args, run, tokenizer, prior):
    """Each row: an image, then what its first map says of it, its first two, ... all."""
    (images, _), K, rows = read_photos(args, run, 8), len(run.config.scales), []
    for part in images.split(8):
        tokens = tokenizer.encode(part.to(run.device))
        again = [tokenizer.decode_latents(f_hat).clamp(-1, 1).cpu() for f_hat in tokenizer.quantize.sums(tokens)]
        rows.append(torch.stack([part, *again], 1))
    rows = torch.cat(rows)
    for k in range(K):
        print(f"PSNR in dB after {k + 1} maps:", *(f"{value:.1f}" for value in psnr(images, rows[:, k + 1])))
    show(args, run, rows.flatten(0, 1), "reconstructions.png", K + 1, "sample")


@torch.no_grad()
def evaluate_command(args, run, tokenizer, prior):
    """Reconstruction by number of scales, use of the codebook, likelihood of the test images' maps, speed, size."""
    data = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir))
    (images, labels), c = data.test, run.config
    tokens, K = tokenize(tokenizer, images, run.device), len(c.scales)
    quality, nats, right = torch.zeros(K), torch.zeros(len(prior.level)), 0.0
    many = at_once(c)
    for x, t, y in zip(images.split(many), tokens.split(many), labels.split(many)):
        t, share = t.to(run.device), len(x) / len(images)
        for k, f_hat in enumerate(tokenizer.quantize.sums(t)):
            again = tokenizer.decode_latents(f_hat).clamp(-1, 1).cpu()
            quality[k] += psnr(x / 127.5 - 1, again).mean() * share
        logits = prior(t, y.to(run.device))
        nats += F.cross_entropy(logits.transpose(1, 2), t, reduction="none").mean(0).cpu() * share
        right += float((logits.argmax(-1) == t).float().mean()) * share
    by_scale = [float(nats[prior.level.cpu() == k].mean()) for k in range(K)]
    (share, perplexity), N, num = use(tokens, tokenizer), tokens.shape[1], len(labels[:min(16, many)])
    by_map = [use(part, tokenizer) for part in tokenizer.quantize.split(tokens)]
    start = time.time()
    sample(tokenizer, prior, labels[:num].to(run.device), temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
           guidance=c.guidance if c.num_classes else 1.0, generator=torch.Generator(run.device).manual_seed(0)).cpu()
    seconds = time.time() - start
    report = dict(
        file=f"{NAME}.py", data=Path(c.data).name, image_size=c.image_size, scales=list(c.scales),
        parameters_tokenizer=sum(p.numel() for p in tokenizer.parameters()),
        parameters_prior=sum(p.numel() for p in prior.parameters()), samples_per_second=num / seconds,
        psnr=float(quality[-1]), psnr_by_scale=quality.tolist(), codebook_size=tokenizer.codebook_size,
        codebook_use=float(share), perplexity=float(perplexity),
        codebook_use_by_scale=[float(each[0]) for each in by_map],
        perplexity_by_scale=[float(each[1]) for each in by_map],
        nats_per_token=float(nats.mean()), nats_per_token_by_scale=by_scale, nats_per_image=float(nats.mean()) * N,
        accuracy=right, tokens_per_image=N, unigram_nats_per_token=float(perplexity.log()), test_images=len(images),
        peak_memory_mib=peak_memory(), train_steps=sum(run.state["progress"].values()),
        train_seconds=run.state["seconds"], threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        command=f"python {NAME}.py evaluate {run.folder}")
    report["parameters"] = report["parameters_tokenizer"] + report["parameters_prior"]
    print(f"test: PSNR by scale {' '.join(f'{value:.2f}' for value in quality)} dB; {share:.1%} of "
          f"{tokenizer.codebook_size} codes used, perplexity {perplexity:.1f}; {report['nats_per_token']:.4f} nats per "
          f"token, by scale {' '.join(f'{value:.3f}' for value in by_scale)} (without context {perplexity.log():.3f}); "
          f"{right:.1%} of the tokens right")
    write_file(run.folder / "report.json", json.dumps(report, indent=1).encode())
    print(f"{run.folder / 'report.json'}   next: python {NAME}.py sample {run.folder}")


SETTINGS = "temperature top_k top_p guidance smooth"                            # of sample, also in the Config
RUN = "run --official --out --num --seed --labels --temperature --top-k --top-p --guidance --smooth"
EDIT = f"{RUN} photos --data-dir"
FLAGS = {
    "run": dict(nargs="?", help="run folder"),
    "photos": dict(nargs="*", help="image files, right behind the run (none: the first test images)"),
    "--official": dict(nargs="+", metavar="FILE", help="released tokenizer and its transformer (photos go before it)"),
    "--data-dir": dict(help="where mnist and cifar10 are (default: where training found them)"),
    "--out": dict(help="PNG to write (default: in the run folder)"),
    "--labels": dict(nargs="+", help="classes by number or name, repeated in turn (default: all; for images: theirs)"),
    "--num": dict(type=positive, help="images to draw; where there are photos: of each"),
    "--temperature": dict(type=float, help="divides the logits (default: the run's)"),
    "--top-k": dict(type=int, help="only the k likeliest codes are drawn (default: the run's)"),
    "--top-p": dict(type=float, help="only the likeliest codes up to this probability (default: the run's)"),
    "--guidance": dict(type=float, help="no class + g (class - no class), g from 1 to this (default: the run's)"),
    "--smooth": dict(action="store_true", default=None, help="mix codes softly, no draw: nicer, not for FID"),
    "--box": dict(required=True, type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"), help="in model pixels"),
    "--seed": dict(type=int, default=0, help="of the generator that draws")}
VERBS = {   # name: (function, help, flags)
    "sample": (sample_command, "draw images by class", RUN),
    "complete": (complete_command, "hide the lower half of images and draw it anew", EDIT),
    "inpaint": (inpaint_command, "draw a box of images anew", f"{EDIT} --box"),
    "replace": (replace_command, "draw a box of images anew, as another class", f"{EDIT} --box"),
    "outpaint": (outpaint_command, "draw all around a box of images anew", f"{EDIT} --box"),
    "reconstruct": (reconstruct_command, "images through the tokenizer, after 1, 2, ... all maps, with PSNR",
                    "run --official photos --data-dir --out"),
    "evaluate": (evaluate_command, "PSNR, codebook use, likelihood, speed, size: writes RUN/report.json",
                 "run --data-dir")}

if __name__ == "__main__":
    main()
