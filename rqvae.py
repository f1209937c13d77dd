# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66", "pillow>=10"]
# ///
"""RQ-VAE + RQ-Transformer: every place of a small map is a stack of codes, each of what the codes before it left over.

    Autoregressive Image Generation using Residual Quantization, Lee, Kim, Kim, Cho, Han, CVPR 2022, arXiv 2203.01941
    MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation, Zheng et al., NeurIPS 2022, arXiv 2209.09002
    Releases: kakaobrain/rq-vae-transformer; ai-forever/MoVQGAN, which is not by MoVQ's authors. This file computes what
              they compute, and loads their weights (from_official)

The idea. A shorter sequence needs richer codes: half the side leaves a quarter of the places, each with four times the
bits, so the codebook grows to its fourth power, and large codebooks collapse. RQ-VAE keeps a small codebook and uses it
D times in a row: quantize the latent, subtract the code, quantize the rest, ... D codes name up to V^D points, and each
one refines the sum of those before it. The RQ-Transformer then factorises in two directions: a large "body" walks over
the h x w places, reading each as the sum of its codes; a small "head" walks over the D codes of one place. So the large
one takes h w steps, not h w D. In training the codes are drawn from their distances, and the distances are the targets
(soft labels): so the transformer meets stacks that are a little off, as its own samples will be. MoVQ (at the end of
the tokenizer) is another cure for poor codes: where codes repeat, a decoder that sees them once repeats its textures;
MoVQ's sees them at every normalisation.

    images (B,3,H,W) -> Encoder -> z (B,E,h,w) -> D times: nearest code of the rest -> codes (B,h,w,D)
    codes -> their vectors' sum -> Decoder -> images
    condition, sums of places before t -> body -> context of t; with codes before d of t -> head -> logits of (t, d)

Glossary
    D, V, E    depth of a stack; codes of the one codebook that all depths share; width of a code
    h, w, T    height, width of the map, T = h w places;    N = T D tokens, place by place, at each place depth by depth
    r, q       residual: what is left to quantize; sum of the codes taken so far
    M          width of both transformers (release: embed_dim)
    tau        temperature of the soft labels: Q(k | r) = softmax(-|r - e_k|^2 / tau)

Run
    python rqvae.py                                                 the demo: nine shapes by class, minutes on two cores
    python rqvae.py train --condition text --num-classes 0 --out RUN        then sample RUN --caption "a large red star"
    python rqvae.py train --preset cifar10 --data FOLDER_OR_ZIP --out RUN
    python rqvae.py sample RUN --labels cat dog --num 16            (also: complete, reconstruct, evaluate RUN; --help)

Contents   Config and presets, Tokenizer, Prior, Losses, Sampler, Training, Official weights, Helpers, Command line
Not here   codebooks of their own for each depth, places of several latents (in the release's code, in no release);
           rejection sampling; training of MoVQ; its several codes a place and their masked prior (these are in
           notebooks/04_rqvae.ipynb).
Departs    The transformer's training was not released: written from its configs and loss functions. Guidance by dropped
           labels is ours (off in the paper's presets). Latents are encoded once, so pictures are not augmented.
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
    num_classes: int = 9            # classes the transformer is told (0: a start token, or the caption)
    # tokenizer
    ch: int = 16                    # width of the first level, a multiple of the groups
    groups: int = 4                 # groups of GroupNorm (release: 32)
    ch_mult: tuple = (1, 2, 4)      # widths of the levels in units of ch; each level but the last halves the side
    num_res_blocks: int = 1         # residual blocks per level (the decoder has one more)
    attn_resolutions: tuple = ()    # sides, computed from the trained image size, at which a level has attention
    z_channels: int = 64            # channels between encoder and quantizer, and quantizer and decoder
    code_dim: int = 16              # E, width of a code
    codebook_size: int = 64         # V, codes of the one codebook
    depth: int = 4                  # D, codes at every place
    beta: float = 0.25              # weight of the commitment term
    codebook_decay: float = 0.99    # decay of the running means that the codes are
    restart: bool = True            # codes of a mean count below 1 move to a residual (off: step 1 loses most codes)
    lpips: str = ""                 # perceptual loss: "" none, download, or a folder or released .ckpt with its weights
    disc_weight: float = 0.3        # the GAN's share after the adaptive weight (0: no GAN; release: 0.75)
    disc_start: int = 700           # first step of the GAN; before it the discriminator does not learn (release: 0)
    disc_layers: int = 2            # layers of the patch discriminator: how large a patch it judges
    disc_width: int = 32            # features of its first layer
    # transformer
    condition: str = "class"        # what stands before the places: class, or text (captions, of shapes alone)
    width: int = 128                # M, width of body and head
    heads: int = 4                  # attention heads of both
    body_layers: int = 4            # blocks over the places
    head_layers: int = 1            # blocks over the depths of a place
    dropout: float = 0.0            # of the outputs of attention and mlp (release: 0.1)
    label_dropout: float = 0.1      # share of labels replaced by "no class", which guidance needs (release: 0)
    text_weight: float = 0.1        # share of the caption's own likelihood in the loss
    soft_labels: bool = True        # targets are softmax(-distance / tau) over the codes, not the one code
    stochastic_codes: bool = True   # codes are drawn from that softmax, anew at every step
    tau: float = 0.003              # its temperature, in units of the squared distance, a sum over E (release: 0.5)
    # training
    seed: int = 0                   # a step is a function of (seed, step)
    batch_size: int = 16            # images per step of the tokenizer, over all processes
    batch_size_prior: int = 16      # images per step of the transformer, over all processes
    train_steps_tokenizer: int = 900  # steps of the tokenizer
    train_steps_prior: int = 1800   # steps of the transformer
    lr_tokenizer: float = 1e-3      # learning rate of autoencoder and discriminator (release: 4e-5)
    lr_prior: float = 2e-3          # learning rate of the transformer (release: 5e-4)
    warmup_tokenizer: int = 30      # steps of warm-up of the tokenizer; then a cosine to zero (0: constant)
    warmup: int = 30                # steps of warm-up of the transformer; then a cosine to zero (0: constant)
    clip: float = 1.0               # gradients of the transformer are scaled down to this norm (0: never)
    log_every: int = 10             # steps between two rows of metrics.jsonl
    save_every: int = 250           # steps between two checkpoints
    temperature: float = 1.0        # logits are divided by it in sampling
    top_k: int = 0                  # only the k likeliest codes are drawn (0: all)
    top_p: float = 0.8              # only the likeliest codes that together reach probability p are drawn
    guidance: float = 2.0           # logits = no class + guidance (class - no class); 1: none
    compile: bool = False           # torch.compile (CUDA)

    def __post_init__(self):
        self.ch_mult, self.attn_resolutions = tuple(self.ch_mult), tuple(self.attn_resolutions)

    @property
    def f(self):
        """Downsampling factor."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def side(self):
        """Side of the code map."""
        return self.image_size // self.f

    @property
    def condition_size(self):
        """-> size of the condition's vocabulary, number of its tokens."""
        if self.condition == "text":
            return len(WORDS), CAPTION_LENGTH
        return max(1, self.num_classes + (self.label_dropout > 0 and self.num_classes > 0)), 1


# The release: f = 32, 8 x 8 places, four codes each; its configs' settings. Steps: 10 and 100 epochs of
# ImageNet, 150 and 200 of FFHQ. Its warm-up of the tokenizer (half an epoch of ImageNet, five of FFHQ) is left out
RELEASE = dict(image_size=256, ch=128, groups=32, ch_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attn_resolutions=(8,),
               z_channels=256, code_dim=256, codebook_size=16384, depth=4, lpips="download", disc_weight=0.75,
               disc_start=0, disc_width=64, dropout=0.1, label_dropout=0.0, tau=0.5, batch_size=128,
               batch_size_prior=2048, lr_tokenizer=4e-5, lr_prior=5e-4, warmup_tokenizer=0, warmup=1, top_p=1.0,
               guidance=1.0, save_every=2000, log_every=50, train_steps_tokenizer=100_000, train_steps_prior=62_500)
IMAGENET = RELEASE | dict(data="imagenet256", num_classes=1000, width=1536, heads=24, head_layers=4, top_p=0.92)
PRESETS = {
    "demo": Config(),
    "mnist": Config(data="mnist", image_size=28, num_classes=10),
    "cifar10": Config(data="cifar10", image_size=32, num_classes=10, ch=32, groups=8, z_channels=128, codebook_size=512,
                      disc_weight=0.5, disc_start=1600, train_steps_tokenizer=2200, lr_tokenizer=8e-4,
                      warmup_tokenizer=100, body_layers=8, train_steps_prior=10_000, lr_prior=1.5e-3, warmup=100,
                      tau=1e-3, guidance=3.0, top_p=0.9),
    "ffhq256": Config(**RELEASE | dict(data="ffhq256", num_classes=0, attn_resolutions=(16,), codebook_size=2048,
                      width=1024, heads=16, body_layers=24, head_layers=4, batch_size_prior=128, top_k=250,
                      train_steps_tokenizer=82_000, train_steps_prior=109_000)),
    "imagenet256-480M": Config(**IMAGENET | dict(body_layers=12)),
    "imagenet256-821M": Config(**IMAGENET | dict(body_layers=24)),
    "imagenet256-1.4B": Config(**IMAGENET | dict(body_layers=42, head_layers=6)),
    "imagenet256-3.8B": Config(**IMAGENET | dict(body_layers=42, head_layers=6, width=2560, heads=40)),
    # the release's captions are 32 BPE tokens of 16,384; a word vocabulary of shapes stands in for them here
    "cc3m": Config(**RELEASE | dict(num_classes=0, condition="text", width=1280, heads=20, body_layers=26,
                   head_layers=4, top_p=0.7)),
}


# === Tokenizer: images <-> stacks of codes ============================================================================
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


# Copied from vqgan_gpt.py
class AttnBlock(nn.Module):
    """x + attention of every position to all, one head as wide as x.  (B, C, H, W) -> (B, C, H, W)."""
    def __init__(self, width, groups=32):
        super().__init__()
        self.norm = norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, HW, C)
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


class RQBottleneck(nn.Module):
    """Residual quantizer: D codes of one shared codebook for every latent.   Source: rqvae quantizations.py.

    The codes are running means (no gradient moves them): for each depth in turn, cluster_size_ema and embed_ema follow
    the counts and sums of the residuals that chose each code. QUIRKS of the release, all kept:
    - within one training step the codebook changes D times: depth d + 1 searches in the codebook that depth d has just
      updated, and the vectors added up are those from before each change. As counts start at 0, step 1 restarts
      nearly every code: they begin at latents;
    - restart: a code whose mean count is below 1 AFTER the update becomes a random residual of the batch, count 1;
    - the weight has a last row, a padding of zeros, that no search and no update touches;
    - the commitment is the mean over the D partial sums (paper: their sum).
    """
    def __init__(self, size, dim, depth, decay=0.99, restart=True):
        super().__init__()
        self.depth, self.decay, self.restart = depth, decay, restart
        self.weight = nn.Parameter(F.pad(torch.randn(size, dim), (0, 0, 0, 1)), requires_grad=False)
        self.register_buffer("cluster_size_ema", torch.zeros(size))
        self.register_buffer("embed_ema", self.weight[:-1].clone())

    def lookup(self, codes):
        """codes (B, h, w, any number of depths) -> the sum of their vectors (B, E, h, w)."""
        return F.embedding(codes, self.weight).sum(3).permute(0, 3, 1, 2)

    def forward(self, z, generator=None):
        """z (B, E, h, w) -> z_q of that shape, codes (B, h, w, D), commitment. Straight-through: z gets z_q's gradient.

        Always float32: in bfloat16 distances tie, and a tie is no choice.
        """
        with torch.autocast(z.device.type, enabled=False):
            flat = z.permute(0, 2, 3, 1).flatten(0, 2).to(self.weight.dtype)    # (n, E)
            r, q, codes, loss = flat.detach(), torch.zeros_like(flat), [], 0
            for _ in range(self.depth):
                index = nearest(r, self.weight[:-1])
                e = F.embedding(index, self.weight)                             # before the codes move
                if self.training:
                    self.update(r, index, generator)
                r, q = r - e, q + e
                loss = loss + F.mse_loss(flat, q) / self.depth
                codes.append(index)
            z_q = (flat + (q - flat).detach()).view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
        return z_q, torch.stack(codes, 1).view(len(z), *z.shape[2:], self.depth), loss

    @torch.no_grad()
    def update(self, r, index, generator=None):
        """Running means follow the residuals r (n, E) of one depth; rare codes start anew; the codebook follows."""
        V, E = self.embed_ema.shape
        count = torch.bincount(index, minlength=V).to(r)
        total = torch.zeros_like(self.embed_ema).index_add_(0, index, r)
        for t in (count, total) if dist.is_initialized() else ():
            dist.all_reduce(t)
        self.cluster_size_ema.lerp_(count, 1 - self.decay)
        self.embed_ema.lerp_(total, 1 - self.decay)
        if self.restart:
            pool = r
            if len(r) < V:                                                      # fewer residuals than codes: jittered
                pool = r.repeat(-(-V // len(r)), 1)
                jitter = torch.rand(pool.shape, generator=generator).to(r)
                pool = pool + jitter * 0.01 / math.sqrt(E)
            fresh = pool[torch.randperm(len(pool), generator=generator).to(r.device)[:V]]
            if dist.is_initialized():
                dist.broadcast(fresh, 0)
            rare = self.cluster_size_ema < 1
            self.embed_ema[rare], self.cluster_size_ema[rare] = fresh[rare], 1
        n = self.cluster_size_ema.sum()
        smooth = n * (self.cluster_size_ema + 1e-5) / (n + V * 1e-5)            # Laplace: never a division by zero
        self.weight[:-1] = self.embed_ema / smooth[:, None]

    @torch.no_grad()
    def soft_codes(self, z, tau, stochastic=True, generator=None):
        """z (B, E, h, w) -> soft labels (B, h, w, D, V), codes (B, h, w, D).

        Q(k | r) = softmax(-|r - e_k|^2 / tau) is the label of depth d, of the residual that the codes actually taken
        left over; they are drawn from it (stochastic), or the nearest.   Source: get_soft_codes (stage 2 alone).
        """
        r, labels, codes = z.permute(0, 2, 3, 1).flatten(0, 2).float(), [], []
        codebook = self.weight[:-1]
        for _ in range(self.depth):
            distance = torch.addmm(codebook.square().sum(1), r, codebook.T, alpha=-2) + r.square().sum(1, keepdim=True)
            labels.append((-distance / tau).softmax(1))
            index = torch.multinomial(labels[-1], 1, generator=generator)[:, 0] if stochastic else distance.argmin(1)
            r = r - codebook[index]
            codes.append(index)
        shape = (len(z), *z.shape[2:], self.depth)
        return torch.stack(labels, 1).view(*shape, -1), torch.stack(codes, 1).view(shape)


class RQVAE(nn.Module):
    """VQGAN's encoder and decoder around the residual quantizer.   Source: rqvae/models/rqvae/rqvae.py.

    Images may have any height and width divisible by f.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        self.f, self.codebook_size = c.f, c.codebook_size
        sizes = c.ch, c.ch_mult, c.num_res_blocks, c.attn_resolutions, c.image_size, c.z_channels, c.groups
        self.encoder, self.decoder = Encoder(3, *sizes), Decoder(3, *sizes)
        self.quantizer = RQBottleneck(c.codebook_size, c.code_dim, c.depth, c.codebook_decay, c.restart)
        self.quant_conv = nn.Conv2d(c.z_channels, c.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.code_dim, c.z_channels, 1)

    def latents(self, images):
        """images (B, 3, H, W) -> z (B, E, h, w), before the quantizer. ValueError: not of this form."""
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.f or not side for side in images.shape[2:]):
            raise ValueError(f"images must be (B, 3, H, W), H and W positive multiples of {self.f}, "
                             f"not {tuple(images.shape)}")
        return self.quant_conv(self.encoder(images))

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> codes (B, h, w, D) int64. In eval mode: else the codebook moves."""
        return self.quantizer(self.latents(images))[1]

    def decode(self, codes):
        """codes (B, h, w, D) -> images (B, 3, H, W). Fewer depths, codes[..., :2] say, give a coarser picture."""
        return self.decoder(self.post_quant_conv(self.quantizer.lookup(codes)))

    def forward(self, images, generator=None):
        """images -> reconstruction, {commitment, perplexity (of this batch's codes, all depths together)}."""
        z_q, codes, loss = self.quantizer(self.latents(images), generator)
        return self.decoder(self.post_quant_conv(z_q)), {"commitment": loss, "perplexity": use(codes, self)[1]}


# Copied from vqgan_gpt.py
def use(indices, tokenizer):
    """Share of the codebook that occurs in indices, and perplexity: so many codes, used evenly, would say as much."""
    p = torch.bincount(indices.flatten(), minlength=tokenizer.codebook_size) / indices.numel()
    return (p > 0).float().mean(), (-(p * p.clamp(min=1e-12).log()).sum()).exp()


def build_tokenizer(config):
    return RQVAE(config)


class SpatialNorm(nn.Module):
    """MoVQ's modulation: norm(x) * conv_y(z_q) + conv_b(z_q), z_q enlarged (nearest) to x.   Source: MoVQGAN modules.

    A plain product, no "1 +". Both convolutions are 1x1: they come before the enlargement, which is the same for less.
    """
    def __init__(self, norm_layer, channels, z_q):
        super().__init__()
        self.norm_layer, self.z_q = norm_layer, z_q             # [code map]: one list for all, set by decode_latents
        self.conv_y, self.conv_b = (nn.Conv2d(channels, norm_layer.num_channels, 1) for _ in range(2))

    def forward(self, x):
        scale, shift = (F.interpolate(conv(self.z_q[0]), x.shape[2:]) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


class MOVQ(nn.Module):
    """The released MoVQ tokenizers: VQGAN's encoder, one code a place, and a decoder modulated by z_q in every norm.

    z_q is the map BEFORE post_quant_conv, whose result enters the decoder as usual. Source: MoVQGAN models/vqgan.py.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        sizes = c.ch, c.ch_mult, c.num_res_blocks, c.attn_resolutions, c.image_size, c.z_channels, c.groups
        self.encoder, self.decoder, self.z_q = Encoder(3, *sizes), Decoder(3, *sizes), [None]
        for module in list(self.decoder.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, SpatialNorm(child, c.code_dim, self.z_q))
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(c.codebook_size, c.code_dim)
        nn.init.uniform_(self.quantize.embedding.weight, -1 / c.codebook_size, 1 / c.codebook_size)
        self.quant_conv = nn.Conv2d(c.z_channels, c.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.code_dim, c.z_channels, 1)

    def latents(self, images):
        """images (B, 3, H, W) -> z (B, E, h, w)."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> codes (B, h, w) int64."""
        z = self.latents(images)
        codes = nearest(z.permute(0, 2, 3, 1).flatten(0, 2).float(), self.quantize.embedding.weight)
        return codes.view(len(z), *z.shape[2:])

    def decode_latents(self, z_q):
        """z_q (B, E, h, w) -> images (B, 3, H, W)."""
        self.z_q[0] = z_q
        return self.decoder(self.post_quant_conv(z_q))

    def decode(self, codes):
        """codes (B, h, w) -> images (B, 3, H, W)."""
        return self.decode_latents(self.quantize.embedding(codes).permute(0, 3, 1, 2))

    def forward(self, images):
        """images -> reconstruction, {codebook_loss}: QUIRK, beta is on the codebook's term, as in VQGAN's release."""
        z = self.latents(images)
        z_q = self.quantize.embedding(self.encode(images)).permute(0, 3, 1, 2)
        loss = F.mse_loss(z, z_q.detach()) + self.config.beta * F.mse_loss(z_q, z.detach())
        return self.decode_latents(z + (z_q - z).detach()), {"codebook_loss": loss}


# === Prior: the RQ-Transformer ========================================================================================
class CausalSelfAttention(nn.Module):
    """Multi-head attention to this and earlier positions. Dropout: its output's alone (VQGAN's: its weights' too)."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, cache=None):
        """x (B, L, M) -> (B, L, M).  cache: keys and values of all earlier positions, to which those of x are added."""
        B, L, M = x.shape
        q, k, v = (layer(x).view(B, L, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        causal = cache is None or not cache.length                              # otherwise x is one position
        if cache is not None:
            k, v = cache(k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal and L > 1)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(B, L, M)), self.dropout, self.training)


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


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x): a pre-norm transformer block.  (B, L, M) -> (B, L, M)."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
                                 nn.Dropout(dropout))

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln1(x), cache)
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    """A stack of causal blocks without a final norm.  (B, L, M) -> (B, L, M); cache: a list of Cache, one per block."""
    def __init__(self, layers, width, heads, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))

    def forward(self, x, cache=None):
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        return x

    def new_cache(self, size):
        return [Cache(size) for _ in self.blocks]


def classifier(width, values):
    """Norm and linear layer: vectors (..., M) -> logits (..., values)."""
    return nn.Sequential(OrderedDict(layer_norm=nn.LayerNorm(width), linear=nn.Linear(width, values)))


class RQTransformer(nn.Module):
    """p(tokens | condition) = prod_t prod_d p(code (t, d) | condition, places before t, codes before d of place t).

    Its input vectors are the tokenizer's codebook, kept here as a buffer (V, E): tokenizer and transformer belong
    together.   Source: rqvae/models/rqtransformer/transformers.py.
    """
    def __init__(self, config, condition_size=None):
        super().__init__()
        check(config)
        self.config = c = config
        values, length = condition_size or c.condition_size     # given: captions of another vocabulary (the release's)
        self.depth, self.places, self.length = c.depth, c.side ** 2, length
        self.register_buffer("codebook", torch.randn(c.codebook_size, c.code_dim))
        self.cond_emb = nn.Embedding(values, c.width)
        self.pos_emb_cond, self.pos_emb_hw, self.pos_emb_d = (
            nn.Parameter(0.02 * torch.randn(1, n, c.width)) for n in (length, self.places, c.depth))
        self.input_mlp, self.head_mlp = nn.Linear(c.code_dim, c.width), nn.Linear(c.code_dim, c.width)
        self.body_transformer = Transformer(c.body_layers, c.width, c.heads, c.dropout)
        self.head_transformer = Transformer(c.head_layers, c.width, c.heads, c.dropout)
        self.classifier = classifier(c.width, c.codebook_size)
        self.cond_classifier = classifier(c.width, values) if c.condition == "text" else None

    def condition(self, labels, batch):
        """labels (B,): classes (num_classes: no class); (B, L_cond): words; None: no class -> vectors (B, L_cond, M).

        Without dropped labels in training there is no row for "no class": row 0 then, as in the release.
        """
        if labels is None or labels.ndim == 1 and not self.config.num_classes:
            nothing = min(self.config.num_classes, self.cond_emb.num_embeddings - 1) if self.config.label_dropout else 0
            labels = torch.full((batch, self.length), nothing, device=self.pos_emb_d.device)
        return self.cond_emb(labels.view(batch, self.length)) + self.pos_emb_cond

    def place_inputs(self, e):
        """Vectors e (B, places, D, E) -> body's inputs (B, places, M). Linear, then sum: its bias counts D times."""
        return self.input_mlp(e).sum(2)

    def body(self, e, labels=None):
        """Vectors of all codes e (B, T, D, E) -> contexts (B, T, M), outputs at the condition's tokens but the last.

        The last place is no input. A place's position is that of the input, not of what it predicts.
        """
        x = (self.place_inputs(e) + self.pos_emb_hw)[:, :-1]
        out = self.body_transformer(torch.cat([self.condition(labels, len(e)), x], 1))
        return out[:, self.length - 1:], out[:, :self.length - 1]

    def head(self, context, e):
        """context (B, T, M), vectors e (B, T, D, E) -> logits (B, T, D, V), at depth d from the codes before d.

        Here the linear layer comes after the sum. Places are independent: they are a batch.
        """
        before = self.head_mlp(e.cumsum(2)[:, :, :-1])
        x = torch.cat([context[:, :, None], before], 2) + self.pos_emb_d[:, None]
        return self.classifier(self.head_transformer(x.flatten(0, 1))).view(*x.shape[:3], -1)

    def forward(self, tokens, labels=None):
        """tokens (B, N) or (B, h, w, D) int64, labels see condition -> logits (B, N, V), float32.

        logits[:, i] depends on the condition and tokens[:, :i] alone.
        """
        e = F.embedding(tokens.view(len(tokens), self.places, self.depth), self.codebook)
        logits = self.head(self.body(e, labels)[0], e).flatten(1, 2)
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(self, tokens, labels=None, soft=None):
        """-> mean cross-entropy in nats per token, metrics: nats_0 ... of each depth; of captions also `text`.

        soft (B, N, V): soft labels in place of the tokens. Captions: 1 - text_weight of it and text_weight of theirs.
        """
        e = F.embedding(tokens.view(len(tokens), self.places, self.depth), self.codebook)
        context, caption = self.body(e, labels)
        logits = self.head(context, e).flatten(1, 2).float()
        nll = soft_cross_entropy(logits, soft) if soft is not None else \
            F.cross_entropy(logits.transpose(1, 2), tokens.flatten(1), reduction="none")
        loss, metrics = nll.mean(), {f"nats_{d}": nll[:, d::self.depth].mean() for d in range(self.depth)}
        if self.cond_classifier is not None and labels is not None:
            words = self.cond_classifier(caption).float()
            metrics["text"] = F.cross_entropy(words.flatten(0, 1), labels[:, 1:].flatten())
            loss = (1 - self.config.text_weight) * loss + self.config.text_weight * metrics["text"]
        return loss, metrics


def build_prior(config):
    return RQTransformer(config)


# === Losses: squared error + LPIPS, patch discriminator, adaptive weight; soft labels =================================
def soft_cross_entropy(logits, soft):
    """-sum_k Q_k log p_k; the release adds 1e-7 inside its logarithm.  (..., V), (..., V) -> (...)."""
    x = logits - logits.amax(-1, keepdim=True)
    return -(soft * (x - (x.exp().sum(-1, keepdim=True) + 1e-7).log())).sum(-1)


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


def generator_loss(config, images, again, commitment, last_layer, perceptual=None, discriminator=None):
    """mean (x - again)^2 + LPIPS + beta commitment + weighted -mean D(again) -> loss, metrics.

    Source: trainers/trainer_rqvae.py; perceptual None: no LPIPS; discriminator None: no GAN (yet).
    """
    mse = F.mse_loss(again, images)
    nll = mse + (perceptual(images, again).mean() if perceptual else 0)
    loss, metrics = nll + config.beta * commitment, {"mse": mse, "commitment": commitment}
    if discriminator:
        g = -discriminator(again).float().mean()
        weight = config.disc_weight * adaptive_weight(nll, g, last_layer)
        loss, metrics = loss + weight * g, metrics | {"g_loss": g, "d_weight": weight}
    return loss, metrics


# === Sampler: one visible loop ========================================================================================
def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities (..., V) after temperature, top-k, softmax, top-p, in this order.

    Ties with the k-th stay; of the rest the likeliest, up to and with the one that crosses p.
    """
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        values, order = p.sort(-1, descending=True)
        dropped = values.cumsum(-1) - values >= top_p                           # what comes before it reaches p
        p = p.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
    return p / p.sum(-1, keepdim=True)


@torch.no_grad()
def sample(tokenizer, prior, labels, *, known=None, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, generator=None,
           trace=None):
    """Draw place by place; at each place code by code. The body takes one step a place, the head one a code.

    labels (B,) int64 classes (num_classes: no class), or words (B, L_cond). known (B, n) int64: the first n tokens,
    kept as they are. top_k, top_p: one value, or a list of one for each depth. guidance: see Config. trace: a list that
    gets {position, logits (B, V), tokens (B, N)} for each draw. Returns images (B, 3, H, W) in [-1, 1].
    Raises UserError for a top_k above V, guidance without dropped labels, a codebook that is not the prior's,
    top_p or known out of range.
    """
    B, D, T, c, V = len(labels), prior.depth, prior.places, prior.config, tokenizer.codebook_size
    top_k, top_p = ((x if isinstance(x, (list, tuple)) else [x] * D) for x in (top_k, top_p))
    if not torch.equal(prior.codebook, tokenizer.quantizer.weight[:-1]):
        raise UserError("this transformer was trained on another tokenizer's codebook: use those that belong together")
    if not all(0 <= k <= V for k in top_k) or not all(0 < p <= 1 for p in top_p) or len(top_k) != D or len(top_p) != D:
        raise UserError(f"top_k {top_k}, top_p {top_p}: top_k must be 0 to {V}, top_p in (0, 1], one or {D} of each")
    if guidance != 1:
        if not (c.label_dropout and c.num_classes):
            raise UserError(f"guidance {guidance}: this model never saw dropped labels: use 1, or train with some")
        labels = torch.cat([labels, torch.full_like(labels, c.num_classes)])
    given = 0 if known is None else known.shape[1]
    if given > T * D or given and not 0 <= known.min() <= known.max() < V:
        raise UserError(f"known: at most {T * D} codes, each from 0 to {V - 1}")
    tokens = torch.zeros(B, T * D, dtype=torch.long, device=labels.device)
    if given:
        tokens[:, :given] = known
    doubled = lambda x: x.repeat(len(labels) // B, *[1] * (x.ndim - 1))         # the same codes with and without class
    body_cache, start = prior.body_transformer.new_cache(prior.length + T), given // D
    x = prior.condition(labels, len(labels))                                    # then all places known in full, at once
    if start:
        e = F.embedding(doubled(tokens[:, :start * D]).view(len(labels), start, D), prior.codebook)
        x = torch.cat([x, prior.place_inputs(e) + prior.pos_emb_hw[:, :start]], 1)
    for t in range(start, T):
        context = prior.body_transformer(x, body_cache)[:, -1:]
        head_cache, x = prior.head_transformer.new_cache(D), context            # a fresh head at every place
        for d in range(D):
            out = prior.head_transformer(x + prior.pos_emb_d[:, d:d + 1], head_cache)
            logits = prior.classifier(out)[:, 0]
            if guidance != 1:
                logits, null = logits.chunk(2)
                logits = null + guidance * (logits - null)
            if (n := t * D + d) >= given:
                p = filtered(logits, temperature, top_k[d], top_p[d])
                tokens[:, n] = torch.multinomial(p, 1, generator=generator)[:, 0]
                if trace is not None:
                    trace.append({"position": n, "logits": logits, "tokens": tokens.clone()})
            e = F.embedding(doubled(tokens[:, t * D:n + 1]), prior.codebook)       # (B, d + 1, E)
            x = prior.head_mlp(e.sum(1, keepdim=True))
        x = prior.place_inputs(e[:, None]) + prior.pos_emb_hw[:, t:t + 1]       # e: all D vectors of this place
    return tokenizer.decode(tokens.view(B, c.side, c.side, D)).clamp(-1, 1)


# === Training: one visible loop per stage =============================================================================
# Copied from pixelcnn.py
def backward(loss, optimizer):
    """Gradients of the optimizer's parameters, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    average(*(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None))


def train_tokenizer(config, data, run):
    """Autoencoder and discriminator in turn, on the same reconstruction. Returns the RQVAE."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(config).to(run.device)
    discriminator = NLayerDiscriminator(3, config.disc_width, config.disc_layers).to(run.device)
    perceptual = LPIPS().to(run.device) if config.lpips else None
    if perceptual:
        load_lpips(perceptual, config)
    else:
        print("no weights for LPIPS (--lpips): the reconstruction loss is squared error alone")
    optimizers = [torch.optim.Adam([p for p in net.parameters() if p.requires_grad], config.lr_tokenizer, (0.5, 0.9))
                  for net in (tokenizer, discriminator)]
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
            loss, metrics = generator_loss(config, images, again, found["commitment"], last_layer, perceptual,
                                           adversary)
        backward(loss, optimizers[0])
        run.log("tokenizer", step, loss=loss, perplexity=found["perplexity"], **metrics)    # raises on a NaN loss
        optimizers[0].step()
        # 2. the discriminator; its loss carries disc_weight too, which Adam does not feel
        if adversary:
            with autocast(run.device):                                          # two passes: BatchNorm must not mix
                fake, real = discriminator(again.detach()).float(), discriminator(images).float()
                loss = config.disc_weight * discriminator_loss("hinge", real, fake)
            backward(loss, optimizers[1])
            run.log("discriminator", step, loss=loss, logits_real=real.mean(), logits_fake=fake.mean())
            optimizers[1].step()
    return tokenizer.eval()


@torch.no_grad()
def encode_all(tokenizer, images, device, latents=False):
    """images uint8 (n, 3, H, W) -> codes (n, h, w, D), or latents (n, E, h, w), by a tokenizer in eval mode."""
    encode = tokenizer.latents if latents else tokenizer.encode
    parts = tqdm(images.split(64), "encoding the images", leave=False, disable=None)
    return torch.cat([encode(part.to(device) / 127.5 - 1).float().cpu() if latents else
                      encode(part.to(device) / 127.5 - 1).cpu() for part in parts])


# Copied from vqvae2.py
def fingerprint(tokenizer, *more):
    """SHA-256 of a tokenizer's weights and of more tensors: uint8 (32,)."""
    digest = hashlib.sha256()
    for value in (*tokenizer.state_dict().values(), *more):
        digest.update(value.cpu().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def cached_latents(tokenizer, data, run):
    """The training images' latents, kept in RUN/latents.npz with the fingerprint of the tokenizer and of the data.

    Latents, not codes: codes are drawn from them anew at every step.
    """
    mark, path = fingerprint(tokenizer, *data.train), run.folder / "latents.npz"
    if path.exists():
        with explain(f"{path} is damaged", "delete it, and it is made again"), np.load(path) as file:
            if np.array_equal(file["made_of"], mark.numpy()):
                return torch.from_numpy(file["latents"])
    latents = encode_all(tokenizer, data.train[0], run.device, latents=True)
    if run.is_main:
        np.savez(buffer := io.BytesIO(), made_of=mark.numpy(), latents=latents.numpy())
        write_file(path, buffer.getbuffer())
    return latents


def conditions_of(config, data, split):
    """What the transformer is told of a split's images: labels (N,), or captions' words (N, L_cond)."""
    if config.condition == "class":
        return getattr(data, split)[1]
    return read_captions(shape_captions({"train": 0, "test": 1}[split], range(len(getattr(data, split)[0]))))


def shorten(words, generator):
    """Captions (B, 7) with size, colour and place left out at random, three in ten each: short ones work as well."""
    keep, always = torch.rand(len(words), 3, generator=generator) >= 0.3, torch.ones(len(words), 1, dtype=torch.bool)
    keep = torch.cat([always, keep[:, :2], always, keep[:, 2:].repeat(1, 3)], 1)    # a SIZE COLOUR shape at the PLACE
    order = (~keep).sort(dim=1, stable=True)
    return words.gather(1, order.indices).masked_fill(order.values, 0)


def train_prior(config, data, run, tokenizer):
    """Soft cross-entropy of codes that are drawn anew at every step from the cached latents. Returns the prior."""
    torch.manual_seed(config.seed)
    prior = bind(build_prior(config).to(run.device), tokenizer)
    latents, conditions = cached_latents(tokenizer, data, run), conditions_of(config, data, "train")
    share, perplexity = use(encode_all(tokenizer, data.train[0][:2000], run.device), tokenizer)
    if perplexity < 0.05 * config.codebook_size:
        print(f"warning: the codebook collapsed: {share:.1%} of {config.codebook_size} codes are used, perplexity "
              f"{perplexity:.1f}; try a smaller --lr-tokenizer or more --train-steps-tokenizer")
    optimizer = torch.optim.AdamW(prior.parameters(), config.lr_prior, (0.9, 0.95), weight_decay=1e-4,
                                  fused=run.device.type != "mps")
    if config.compile:
        prior.loss = torch.compile(prior.loss)                                  # loss does not go through forward
    print(f"prior: {sum(p.numel() for p in prior.parameters()):,} parameters, {prior.places} places of {prior.depth} "
          f"codes; yardsticks in nats per token: {math.log(config.codebook_size):.3f} if all codes were alike, "
          f"{perplexity.log():.3f} without context")
    for step in run.steps("prior", config.train_steps_prior, prior=prior, optimizer_prior=optimizer):
        generator = rng(config.seed, step)
        rank = dist.get_rank() if dist.is_initialized() else 0                  # dropout: every process its own
        torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)) + rank)
        index = torch.randint(len(latents), (config.batch_size_prior,), generator=generator)
        noise = torch.Generator(run.device).manual_seed(generator.initial_seed())   # draws of the global batch
        soft, codes = tokenizer.quantizer.soft_codes(latents[index].to(run.device), config.tau,
                                                     config.stochastic_codes, noise)
        labels = conditions[index]
        if config.num_classes and config.label_dropout:
            dropped = torch.rand(labels.shape, generator=generator) < config.label_dropout
            labels = labels.masked_fill(dropped, config.num_classes)
        labels = shorten(labels, generator) if config.condition == "text" else labels
        soft, codes, labels = shard(soft, codes, labels, device=run.device)
        with autocast(run.device):
            loss, metrics = prior.loss(codes.flatten(1), labels, soft.flatten(1, 3) if config.soft_labels else None)
        backward(loss, optimizer)
        length = nn.utils.clip_grad_norm_(prior.parameters(), config.clip or math.inf)
        run.log("prior", step, loss=loss, grad_norm=length, **metrics)          # raises on NaN before a weight changes
        set_lr(optimizer, config.lr_prior, step, config.warmup, config.train_steps_prior)
        optimizer.step()
    return prior.eval()


# === Official weights: kakaobrain/rq-vae-transformer, ai-forever/MoVQGAN ==============================================
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


def our_names(state):
    """A release's names and tensors -> ours (float32 copies), depth (number of codebook names; 0: no stack).

    UserError: the depths' codebooks differ; every release has one tensor under D names.
    """
    found, depths = {}, set()
    for key, value in state.items():
        if key.startswith(("ema_", "loss.")):                                   # MoVQGAN's training leftovers
            continue
        new = re.sub(r"quantizer\.codebooks\.\d+", "quantizer", key)
        depths |= {key} if new == "quantizer.weight" else set()
        first, value = found.get(new), value.to(torch.float32, copy=True)
        if first is not None and (first.shape != value.shape or not (value.is_meta or torch.equal(first, value))):
            raise UserError(f"{key} differs from the first depth's: no model of the release, whose depths share theirs")
        found[new] = value
    return found, len(depths)


def from_official(source, config=None):
    """Released weights -> RQVAE, RQTransformer or MOVQ, in eval mode.

    source: path or state dict. config: the constructor arguments there, of which resolution (else 256) and n_head (else
    heads of 64 features) are read; the rest is seen by the weights.
    Every name and shape must fit: else UserError with the first five that do not.
    """
    (state, depth), name = our_names(read_weights(source)), "the dict" if isinstance(source, dict) else source
    size = lambda key, axis=0: state[key].shape[axis] if key in state else 0
    count = lambda pattern: len({match[1] for match in map(re.compile(pattern).match, state) if match})
    with explain(f"{name} is no model of these papers", "its shapes make no sense"), torch.device("meta"):
        given = config or {}
        if {"classifier.linear.weight", "pos_emb_hw", "pos_emb_d"} <= state.keys():
            width = size("pos_emb_hw", 2)
            text = "cond_classifier.linear.weight" in state
            kind = Config(                                                      # pixels unknown: any f gives the side
                image_size=8 * math.isqrt(size("pos_emb_hw", 1)), ch_mult=(1, 1, 1, 1), disc_weight=0.0,
                depth=size("pos_emb_d", 1), width=width,
                codebook_size=size("classifier.linear.weight"), code_dim=size("input_mlp.weight", 1),
                heads=given.get("n_head", width // 64), body_layers=count(r"body_transformer\.blocks\.(\d+)"),
                head_layers=count(r"head_transformer\.blocks\.(\d+)"), label_dropout=0.0, guidance=1.0,
                condition="text" if text else "class", num_classes=0 if text or size("cond_emb.weight") == 1 else
                size("cond_emb.weight"), dropout=0.1)
            model = RQTransformer(kind, *([(size("cond_emb.weight"), size("pos_emb_cond", 1))] if text else []))
        else:
            levels, ch = count(r"encoder\.down\.(\d+)"), size("encoder.conv_in.weight")
            resolution = given.get("resolution", 256)
            kind = Config(
                image_size=resolution, num_classes=0, ch=ch, groups=32, disc_weight=0.75,
                num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)"),
                ch_mult=[size(f"encoder.down.{i}.block.0.conv1.weight") // max(ch, 1) for i in range(levels)],
                attn_resolutions=[resolution >> i for i in range(levels) if f"encoder.down.{i}.attn.0.q.bias" in state],
                z_channels=size("encoder.conv_out.weight"), code_dim=size("quant_conv.weight"),
                codebook_size=max(2, size("quantizer.weight") - 1, size("quantize.embedding.weight")),
                depth=max(1, depth)) if levels else Config()
            model = (MOVQ if "decoder.norm_out.conv_y.weight" in state else RQVAE)(kind)
    if "quantizer.weight" in state:                                             # where a file leaves them out: as new
        state.setdefault("quantizer.embed_ema", state["quantizer.weight"][:-1].clone())
        state.setdefault("quantizer.cluster_size_ema", torch.zeros(len(state["quantizer.weight"]) - 1))
    if isinstance(model, RQTransformer):                                        # comes from the tokenizer: see bind
        state.setdefault("codebook", torch.zeros(model.codebook.shape))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    wrong = [key for key in {**state, **shapes} if key not in state or state[key].shape != shapes.get(key)]
    if wrong:
        raise UserError(f"{name} is no model of these papers: {len(wrong)} names or shapes do not fit, first "
                        f"{', '.join(wrong[:5])}")
    model.load_state_dict(state, assign=True)
    if isinstance(model, RQVAE):
        model.quantizer.weight.requires_grad_(False)
    return model.eval()


def bind(prior, tokenizer, name="the transformer"):
    """Give a transformer its tokenizer's codebook. UserError: depth, codes or width of a code differ."""
    q = tokenizer.quantizer
    theirs, ours = (q.depth, *q.embed_ema.shape), (prior.depth, *prior.codebook.shape)
    if theirs != ours:
        raise UserError(f"{name} reads stacks of (depth, codes, width) {ours}, this tokenizer makes {theirs}")
    prior.codebook.copy_(q.weight[:-1])
    return prior


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
    need(c.condition in ("class", "text"), f"condition {c.condition!r} is unknown: class or text")
    for names, least in (("batch_size batch_size_prior log_every save_every image_size num_res_blocks z_channels "
                          "code_dim depth disc_layers disc_width width heads body_layers head_layers", 1),
                         ("codebook_size", 2), ("temperature", 1e-3),
                         ("warmup warmup_tokenizer train_images test_images train_steps_tokenizer train_steps_prior "
                          "num_classes disc_start disc_weight beta clip", 0)):
        for name in names.split():
            need(getattr(c, name) >= least, f"{name} is {getattr(c, name)}: at least {least}")
    for name in ("codebook_decay", "dropout", "label_dropout", "text_weight"):
        need(0 <= getattr(c, name) < 1, f"{name} is {getattr(c, name)}: at least 0, below 1")
    need(0 < c.top_p <= 1, f"top_p is {c.top_p}: above 0, at most 1")
    need(0 <= c.top_k <= c.codebook_size, f"top_k is {c.top_k}: 0 to {c.codebook_size}, the codebook's size")
    need(-100 <= c.guidance <= 100, f"guidance is {c.guidance}: a number up to 100, 1 for none")
    need(c.lr_tokenizer > 0 and c.lr_prior > 0 and c.tau >= 1e-8, "lr and tau must be positive")
    need(not c.lpips or c.image_size >= 16, f"LPIPS needs images of at least 16 pixels, these have {c.image_size}")
    need(0 <= c.seed < 2 ** 63, f"seed {c.seed}: 0 to 2**63 - 1")
    need(c.ch_mult and min(c.ch_mult) > 0, "ch_mult needs a positive number for each level")
    need(c.ch > 0 and c.groups > 0 and c.ch % c.groups == 0, f"ch {c.ch} is not divisible by groups, {c.groups}")
    need(c.width % c.heads == 0, f"width {c.width} is not divisible by heads, {c.heads}")
    need(c.image_size % c.f == 0, f"images of {c.image_size} pixels are not divisible by f = {c.f}")
    need(not c.disc_weight or c.image_size >> c.disc_layers >= 3,
         f"images of {c.image_size} pixels are too small for disc_layers {c.disc_layers}: fewer, or --disc-weight 0")
    need(c.condition == "class" or not c.num_classes, "captions take the place of classes: add --num-classes 0")
    need(c.condition == "class" or c.data == "shapes", f"{c.data} has no captions: condition text is for shapes")
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
PLACES = ("centre", "right", "bottom", "left", "top")
WORDS = ("[pad]", "a", "small", "large", *COLOURS, *SHAPES, "at", "the", *PLACES)       # a caption's vocabulary
CAPTION_LENGTH = 7                                                              # "a small red star at the top"


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


def shape_captions(seed, indices):
    """Captions of the pictures that draw_shapes makes of the same numbers: a {size} {colour} {shape} at the {place}."""
    u = np.random.default_rng(seed).random((max(indices) + 1, 6), np.float32)[indices]
    shape, colour = (u[:, 0] * len(SHAPES)).astype(int), (u[:, 1] * len(COLOURS)).astype(int)
    # centres lie within 0.3 of the middle: a ninth of them within 0.1 counts as the centre, the rest by direction
    place = np.where(u[:, 4] < 1 / 9, 0, 1 + np.round(4 * u[:, 5]).astype(int) % 4)
    return [f"a {'small' if v[2] < 0.5 else 'large'} {list(COLOURS)[c]} {SHAPES[s]} at the {PLACES[p]}"
            for v, c, s, p in zip(u, colour, shape, place)]


def read_captions(captions):
    """Captions -> words (N, CAPTION_LENGTH) int64, [pad] behind. UserError: empty, too long, unknown word (named)."""
    rows = []
    for caption in captions:
        words = caption.lower().split()
        unknown = [word for word in words if word not in WORDS[1:]]
        if not words or unknown or len(words) > CAPTION_LENGTH:
            wrong = f"has an unknown word, {unknown[0]!r}" if unknown else f"has {len(words)} words, not 1 to 7"
            raise UserError(f"caption {caption!r} {wrong}; known are: {' '.join(WORDS[1:])}")
        rows.append([WORDS.index(word) for word in words] + [0] * (CAPTION_LENGTH - len(words)))
    return torch.tensor(rows)


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
        return load_run(args.run)
    if args.run and "photos" not in args:
        raise UserError(f"{args.run} or --official: one of them")
    if args.run:                                                                # a photo stands where a run would
        args.photos = [args.run, *args.photos]
    tokenizer, prior = from_official(args.official[0]), None
    if isinstance(tokenizer, RQTransformer) or len(args.official) > 2:
        raise UserError("--official needs the tokenizer first, then its transformer; photos stand before it")
    run = Run.__new__(Run)                                                      # no folder: pictures go to this one
    run.config, run.folder = tokenizer.config, Path(".")
    run.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if len(args.official) > 1:
        prior = from_official(args.official[1])
        if isinstance(tokenizer, MOVQ) or not isinstance(prior, RQTransformer):
            raise UserError(f"{' '.join(args.official)}: give an RQ-VAE and its transformer")
        if prior.config.condition == "text":
            raise UserError(f"{args.official[1]} reads byte pairs, whose vocabulary is not here: in Python, "
                            f"sample takes their numbers, (B, {prior.length})")
        bind(prior, tokenizer, args.official[1])
        side, theirs = prior.config.side, tokenizer.config
        run.config = dataclasses.replace(prior.config, ch_mult=theirs.ch_mult, image_size=side * theirs.f)
    elif args.verb != "reconstruct":
        raise UserError(f"{args.official[0]} is a tokenizer: {args.verb} needs its transformer too, behind it")
    run.state = {"classes": [str(i) for i in range(run.config.num_classes)]}
    return run, tokenizer.to(run.device), prior and prior.to(run.device)


def read_photos(args, run, number=8):
    """images (n, 3, S, S) in [-1, 1], labels or None: of the command line's photos, or of the first test images."""
    if not args.photos:
        if getattr(args, "official", None):
            raise UserError("released weights come without test images: give photos")
        data = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir))
        return data.test[0][:number] / 127.5 - 1, conditions_of(run.config, data, "test")[:number]
    images, side = [], run.config.image_size
    for photo in args.photos:
        with explain(f"{photo} cannot be read as an image", "give PNG or JPEG files"):
            width, height = Image.open(photo).size
            if min(width, height) < side:
                raise UserError(f"{photo} is too small, {width} x {height} pixels: this model takes {side} x {side}")
            images.append(torch.from_numpy(read_image(photo, side).copy()).permute(2, 0, 1))
    return torch.stack(images) / 127.5 - 1, None


def read_conditions(args, run, num):
    """--caption or --labels -> what the transformer is told of `num` images."""
    if run.config.condition == "class":
        if args.caption:
            raise UserError(f"{run.folder} was trained without captions: use --labels")
        return read_labels(args.labels, run, num)
    if args.labels:
        raise UserError(f"{run.folder} was trained on captions: use --caption")
    words = read_captions(args.caption or shape_captions(1, range(num)))
    return words.repeat(-(-num // len(words)), 1)[:num].to(run.device)


# Copied from vqvae2.py
def at_once(config):
    """Images in one batch: attention, caches and decoder take memory."""
    return max(1, min(64, 2 ** 20 // config.image_size ** 2))


def draw_images(args, run, tokenizer, prior, labels, known=None):
    """Conditions (B,) or (B, L_cond), first tokens known (B, n) -> images (B, 3, H, W), in parts that fit in memory."""
    settings = {name: getattr(run.config, name) if getattr(args, name) is None else getattr(args, name)
                for name in ("temperature", "top_k", "top_p", "guidance")}
    if not run.config.num_classes and args.guidance is None:
        settings["guidance"] = 1.0                                              # nothing to be guided by
    check(dataclasses.replace(run.config, seed=args.seed, **settings))
    generator, parts = torch.Generator(run.device).manual_seed(args.seed), []
    many = at_once(run.config)
    for start in range(0, len(labels), many):
        k = slice(start, start + many)
        parts.append(sample(tokenizer, prior, labels[k].to(run.device), known=None if known is None else known[k],
                            generator=generator, **settings).cpu())
    return torch.cat(parts)


def sample_command(args, run, tokenizer, prior):
    columns = run.config.num_classes if 0 < run.config.num_classes <= 16 else 8
    conditions = read_conditions(args, run, args.num or 8 * columns)
    images = draw_images(args, run, tokenizer, prior, conditions)
    labels = conditions.cpu().numpy()
    np.savez(buffer := io.BytesIO(), arr_0=to_bytes(images).permute(0, 2, 3, 1).numpy(), labels=labels)
    show(args, run, images, "samples.png", columns, "complete")
    write_file(run.folder / "samples.npz", buffer.getbuffer())  # ADM's format; last: the picture may not be writable


@torch.no_grad()
def complete_command(args, run, tokenizer, prior):
    """Each row: an image, what the model is shown of it, and what it makes of that."""
    images, conditions = read_photos(args, run)
    if args.labels or args.caption or not run.config.num_classes and run.config.condition == "class":
        conditions = read_conditions(args, run, len(images))
    if conditions is None:
        raise UserError("this model draws by class or caption: give --labels or --caption, one for each photo or all")
    num, half = args.num or 6, images.shape[2] // tokenizer.f // 2 * tokenizer.f
    if not half:
        raise UserError("this model's pictures are one place high: there is no upper half")
    # the upper half is encoded alone: an encoder that saw the whole image would tell of the lower half
    known = tokenizer.encode(images[:, :, :half].to(run.device)).flatten(1).repeat_interleave(num, 0)
    drawn = draw_images(args, run, tokenizer, prior, conditions.repeat_interleave(num, 0), known)
    shown = images[:, None].repeat(1, 2, 1, 1, 1)
    shown[:, 1, :, half:] = 0
    columns = torch.cat([shown, drawn.unflatten(0, (-1, num))], 1)
    show(args, run, columns.flatten(0, 1), "completions.png", 2 + num, "evaluate")


# Copied from vqvae2.py
@torch.no_grad()
def reconstruct_command(args, run, tokenizer, prior):
    images, _ = read_photos(args, run, 32)
    again = torch.cat([tokenizer.decode(tokenizer.encode(part.to(run.device))).clamp(-1, 1).cpu()
                       for part in images.split(8)])
    print("PSNR in dB:", *(f"{value:.1f}" for value in psnr(images, again)))
    show(args, run, torch.stack([images, again], 1).flatten(0, 1), "reconstructions.png", 8, "sample")


@torch.no_grad()
def evaluate_command(args, run, tokenizer, prior):
    """Reconstruction by depth, use of the codebook, likelihood of the test images' codes by depth, speed, size."""
    data = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir))
    images, conditions, c = data.test[0], conditions_of(run.config, data, "test"), run.config
    codes = encode_all(tokenizer, images, run.device)
    quality, nats = torch.zeros(c.depth), torch.zeros(c.depth)
    for x, t, y in zip(images.split(64), codes.split(64), conditions.split(64)):
        t, share = t.to(run.device), len(x) / len(images)
        for d in range(c.depth):
            again = tokenizer.decode(t[..., :d + 1]).clamp(-1, 1).cpu()
            quality[d] += psnr(x / 127.5 - 1, again).mean() * share
        metrics = prior.loss(t.flatten(1), y.to(run.device))[1]
        nats += torch.tensor([float(metrics[f"nats_{d}"]) for d in range(c.depth)]) * share
    (share, perplexity), N = use(codes, tokenizer), codes[0].numel()
    start, num = time.time(), len(conditions[:16])
    sample(tokenizer, prior, conditions[:num].to(run.device), top_k=c.top_k, top_p=c.top_p,
           guidance=c.guidance if c.num_classes else 1.0, generator=torch.Generator(run.device).manual_seed(0)).cpu()
    seconds = time.time() - start
    report = dict(
        file=f"{NAME}.py", data=Path(c.data).name, image_size=c.image_size,
        parameters_tokenizer=sum(p.numel() for p in tokenizer.parameters()),
        parameters_prior=sum(p.numel() for p in prior.parameters()), samples_per_second=num / seconds,
        psnr=float(quality[-1]), psnr_by_depth=quality.tolist(), codebook_size=tokenizer.codebook_size,
        codebook_use=float(share), perplexity=float(perplexity),
        perplexity_by_depth=[float(use(codes[..., d], tokenizer)[1]) for d in range(c.depth)],
        nats_per_token=float(nats.mean()), nats_per_token_by_depth=nats.tolist(), nats_per_image=float(nats.mean()) * N,
        tokens_per_image=N, unigram_nats_per_token=float(perplexity.log()), test_images=len(images),
        peak_memory_mib=peak_memory(), train_steps=sum(run.state["progress"].values()),
        train_seconds=run.state["seconds"], threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        command=f"python {NAME}.py evaluate {run.folder}")
    report["parameters"] = report["parameters_tokenizer"] + report["parameters_prior"]
    print(f"test: PSNR by depth {' '.join(f'{value:.2f}' for value in quality)} dB; {share:.1%} of "
          f"{tokenizer.codebook_size} codes used, perplexity {perplexity:.1f}; nats per token by depth "
          f"{' '.join(f'{value:.3f}' for value in nats)} (without context {perplexity.log():.3f})")
    write_file(run.folder / "report.json", json.dumps(report, indent=1).encode())
    print(f"{run.folder / 'report.json'}   next: python {NAME}.py sample {run.folder}")


RUN = "run --official --out --num --seed --temperature --top-k --top-p --guidance --labels --caption"
FLAGS = {
    "run": dict(nargs="?", help="run folder"),
    "photos": dict(nargs="*", help="image files, right behind the run (none: the first test images)"),
    "--official": dict(nargs="+", metavar="FILE", help="released tokenizer and its transformer (photos go before it)"),
    "--data-dir": dict(help="where mnist and cifar10 are (default: where training found them)"),
    "--out": dict(help="PNG to write (default: in the run folder)"),
    "--labels": dict(nargs="+", help="classes by number or name, repeated in turn (default: the images', or all)"),
    "--caption": dict(nargs="+", metavar="TEXT", help="captions, each in quotes, repeated in turn"),
    "--num": dict(type=positive, help="images to draw; where there are photos: of each"),
    "--temperature": dict(type=float, help="divides the logits (default: the run's)"),
    "--top-k": dict(type=int, help="only the k likeliest codes are drawn (default: the run's)"),
    "--top-p": dict(type=float, help="only the likeliest codes up to this probability (default: the run's)"),
    "--guidance": dict(type=float, help="no class + guidance (class - no class) (default: the run's)"),
    "--seed": dict(type=int, default=0, help="of the generator that draws")}
VERBS = {   # name: (function, help, flags)
    "sample": (sample_command, "draw images by class or caption", RUN),
    "complete": (complete_command, "hide the lower half of images and draw it anew", f"{RUN} photos --data-dir"),
    "reconstruct": (reconstruct_command, "images through the tokenizer, side by side, with PSNR",
                    "run --official photos --data-dir --out"),
    "evaluate": (evaluate_command, "PSNR, codebook use, likelihood, speed, size: writes RUN/report.json",
                 "run --data-dir")}

if __name__ == "__main__":
    main()
