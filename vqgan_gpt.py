# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66", "pillow>=10"]
# ///
"""VQGAN + GPT: an image is a short sequence of learned codes; a transformer predicts them one after the other.

    Taming Transformers for High-Resolution Image Synthesis, Esser, Rombach, Ommer, CVPR 2021, arXiv 2012.09841
    Release: CompVis/taming-transformers; this file computes what it computes and loads its weights (from_official)

The idea. A transformer that reads pixels cannot go beyond thumbnails: its cost grows with the square of their number.
So two stages. (1) A convolutional autoencoder whose latents are rounded to the nearest of V learned vectors, the
codebook, turns f x f pixels into one code. At f = 16 a plain loss on pixels would give mush; a perceptual loss and a
patch discriminator make the decoder invent plausible detail, so an image of 256 x 256 is 256 codes. (2) A GPT predicts
the codes in raster order, each from all before it. Any condition is a sequence of tokens put in front: a class, the
codes of a depth map or of edges, coordinates. Pictures larger than trained are drawn through a sliding window.

    images (B,3,H,W) -> Encoder -> z (B,E,h,w) -> nearest of V codes -> indices (B,h,w) -> Decoder -> images
    condition, indices[:, :i] -> GPT -> logits (B,V) of index i -> sample: draw, append, repeat h*w times -> Decoder

Glossary
    f, h, w    downsampling factor 2^(levels - 1); height and width of the code map, H / f and W / f
    V, E       codebook entries (release: n_embed), width of a code (release: embed_dim)
    N, L       codes of an image, h*w; length of the sequence the GPT sees
    M, A       width of the GPT (release: n_embd), attention heads
    c          condition tokens in front of the codes; they share the GPT's one embedding table with the codes
    nll, g, d  reconstruction loss (the release's name); generator's and discriminator's loss

Run
    python vqgan_gpt.py                                             the demo: nine shapes by class, minutes on two cores
    python vqgan_gpt.py train --preset cifar10 --data FOLDER_OR_ZIP --out RUN
    python vqgan_gpt.py sample RUN --labels cat dog --top-k 100     (also: complete, paint, reconstruct, evaluate)
    python vqgan_gpt.py reconstruct --official vqgan_imagenet_f16_16384.ckpt photo.jpg

Contents   Config and presets, Tokenizer, Prior, Losses, Sampler, Training, Official weights, Helpers, Command line
Not here   orders other than raster, scene layouts (bounding boxes), the segmentation tokenizer's training, rejection
           sampling. Not from the release: EMA codebook, restart of dead codes, guidance (all off in its presets).
Departs    LPIPS without the dropout that the release leaves on in training; one fixed crop of an image, not a new one
           in every epoch; Gumbel tokens without noise (argmax).
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
    crop: int = 0                   # both stages see one random crop of this side of each image (0: whole images)
    num_classes: int = 9            # classes the GPT is told (0: a start token only)
    # tokenizer
    ch: int = 32                    # width of the first level, a multiple of the groups
    groups: int = 8                 # groups of GroupNorm (release: 32)
    ch_mult: tuple = (1, 1, 2)      # widths of the levels in units of ch; each level but the last halves the side
    num_res_blocks: int = 1         # residual blocks per level (the decoder has one more)
    attn_resolutions: tuple = ()    # sides, computed from the trained image size, at which a level has attention
    z_channels: int = 64            # channels between encoder and quantizer, and quantizer and decoder
    code_dim: int = 8               # E, width of a code
    codebook_size: int = 256        # V, codes
    quantizer: str = "vq"           # vq (nearest code), or gumbel (a softmax over the codes, relaxed in training)
    beta: float = 0.25              # weight of the codebook term (legacy) or of the commitment term of the loss
    legacy: bool = True             # QUIRK of the release: beta on the codebook term; --no-legacy: on the commitment
    codebook_decay: float = 0.95    # decay of the running means that the codes are (release: 0, by gradient)
    restart: int = 20               # a code unused for so many steps moves to a random latent of the batch (0: never)
    kl_weight: float = 5e-4         # gumbel: weight of the KL divergence from uniform use of the codes
    # losses of the tokenizer
    lpips: str = ""                 # perceptual loss: "" none, download, or a folder or released .ckpt with its weights
    perceptual_weight: float = 1.0  # weight of LPIPS beside L1
    codebook_weight: float = 0.1    # weight of the codebook loss (release: 1)
    gan: str = "hinge"              # loss of the discriminator: hinge or vanilla
    disc_weight: float = 0.8        # the GAN's share after the adaptive weight (0: no GAN)
    disc_start: int = 600           # first step of the GAN; before it the discriminator does not learn
    disc_layers: int = 2            # layers of the patch discriminator: how large a patch it judges
    disc_width: int = 32            # features of its first layer
    # GPT
    condition: str = "class"        # what stands before the codes: class, coordinates, edges, depth (maps' own codes)
    width: int = 128                # M, width of the transformer
    heads: int = 4                  # A, attention heads
    layers: int = 4                 # transformer blocks
    block_size: int = 0             # longest sequence (0: as long as needed)
    vocab_size: int = 0             # rows of the embedding table (0: V)
    dropout: float = 0.0            # of embeddings, attention and residuals
    pkeep: float = 1.0              # share of input codes kept in training; the others become random codes
    label_dropout: float = 0.1      # share of labels replaced by "no class", which guidance needs (release: 0)
    # training
    seed: int = 0                   # a step is a function of (seed, step)
    batch_size: int = 16            # images per step of the tokenizer, over all processes
    batch_size_prior: int = 16      # images per step of the GPT, over all processes
    train_steps_tokenizer: int = 800  # steps of the tokenizer
    train_steps_prior: int = 4000   # steps of the GPT
    lr_tokenizer: float = 1e-3      # learning rate of autoencoder and discriminator (release: 4.5e-6 times batch size)
    lr_prior: float = 2e-3          # learning rate of the GPT (release: 4.5e-6 times batch size)
    warmup: int = 30                # steps of warm-up; then a cosine to zero (0: constant, as the release)
    clip: float = 1.0               # gradients of the GPT are scaled down to this norm (0: never, as the release)
    log_every: int = 10             # steps between two rows of metrics.jsonl
    save_every: int = 100           # steps between two checkpoints
    temperature: float = 1.0        # logits are divided by it in sampling
    top_k: int = 0                  # only the k likeliest codes are drawn (0: all)
    top_p: float = 0.85             # only the likeliest codes that together reach probability p are drawn
    guidance: float = 2.5           # logits = no class + guidance (class - no class); 1: none
    compile: bool = False           # torch.compile (CUDA)

    def __post_init__(self):
        self.ch_mult, self.attn_resolutions = tuple(self.ch_mult), tuple(self.attn_resolutions)

    @property
    def f(self):
        """Downsampling factor."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def resolution(self):
        """Side of the images that both stages are trained on."""
        return self.crop or self.image_size


# What the release trained, by its configs: f = 16, 256 x 256, constant learning rates, no clipping, no dropped labels
RELEASE = dict(image_size=256, ch=128, groups=32, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,),
               z_channels=256, code_dim=256, codebook_size=1024, codebook_decay=0.0, restart=0, codebook_weight=1.0,
               lpips="download", disc_layers=3, disc_width=64, warmup=0, clip=0.0, label_dropout=0.0, top_k=250,
               top_p=1.0, guidance=1.0, save_every=2000, log_every=50)
PRESETS = {
    "demo": Config(),
    "mnist": Config(data="mnist", image_size=28, num_classes=10),
    "cifar10": Config(data="cifar10", image_size=32, num_classes=10, ch_mult=(1, 2, 4), z_channels=128,
                      codebook_size=512, codebook_decay=0.98, codebook_weight=0.2, disc_start=2400,
                      train_steps_tokenizer=3600, lr_tokenizer=8e-4, layers=6, heads=6, width=192,
                      train_steps_prior=20_000, lr_prior=1.5e-3, warmup=100, save_every=500, top_p=0.9, guidance=3.0),
    # the release's f16 tokenizer of 16,384 codes and the class-conditional GPT of 1.4 billion parameters
    "imagenet256": Config(**RELEASE | dict(data="imagenet256", num_classes=1000, codebook_size=16384, disc_start=0,
                          disc_weight=0.75, disc_layers=2, layers=48, heads=24, width=1536, block_size=256, top_k=600,
                          top_p=0.92, batch_size=96, batch_size_prior=256, lr_tokenizer=96 * 4.5e-6,
                          lr_prior=256 * 4.5e-6, train_steps_tokenizer=500_000, train_steps_prior=500_000)),
    # FacesHQ: coordinates tell the GPT where its crop lies (the release's config has no crop: they never change)
    "faces256": Config(**RELEASE | dict(data="faces256", num_classes=0, condition="coordinates", disc_start=30001,
                       layers=24, heads=16, width=1024, block_size=512, batch_size=24, batch_size_prior=32,
                       lr_tokenizer=24 * 4.5e-6, lr_prior=32 * 4.5e-6, train_steps_tokenizer=500_000,
                       train_steps_prior=500_000)),
}


# === Tokenizer: images <-> codes ======================================================================================
def norm(width, groups):
    """GroupNorm, eps 1e-6. With one channel a group it would lose every channel's mean, and with it the colours."""
    return nn.GroupNorm(groups, width, eps=1e-6)


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
        self.norm = norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded at the right and bottom only.  (B, C, H, W) -> (B, C, H/2, W/2)."""
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel twice in both directions, then a 3x3 convolution.  (B, C, H, W) -> (B, C, 2H, 2W)."""
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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


def middle(width, groups):
    """Block, attention, block at the lowest resolution: the only place where far parts of the image meet."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(width, width, groups), attn_1=AttnBlock(width, groups),
                                     block_2=ResnetBlock(width, width, groups)))


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


def nearest(z, codebook, limit=2 ** 22):
    """Index of the codebook's row nearest to each row of z.  z (n, E), codebook (V, E) -> (n,) int64.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all e. At most `limit` distances exist at a time.
    """
    square, rows = codebook.square().sum(1), max(1, limit // len(codebook))
    return torch.cat([torch.addmm(square, part, codebook.T, alpha=-2).argmin(1) for part in z.split(rows)])


class VectorQuantizer(nn.Module):
    """The nearest of V codes for every position.   Source: taming/modules/vqvae/quantize.py VectorQuantizer2.

    legacy (the release): mean (sg(e) - z)^2 + beta mean (e - sg(z))^2; else VQ-VAE's beta on the other, the commitment
    term. Values are equal, gradients are not: with legacy the encoder feels 1 / beta times the pull to its code.
    decay > 0: codes are running means of their latents (VQ-VAE appendix A.1), not trained by gradient. restart: codes
    unused for so many steps (none before that many) move to latents of the batch, the first process's.
    """
    def __init__(self, size, dim, beta=0.25, legacy=True, decay=0.0, restart=0):
        super().__init__()
        self.beta, self.legacy, self.decay, self.restart = beta, legacy, decay, restart
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)
        if decay:
            self.embedding.weight.requires_grad = False
            self.register_buffer("count", torch.ones(size))
            self.register_buffer("total", self.embedding.weight.detach().clone())
        if restart:
            self.register_buffer("idle", torch.zeros(size))

    def indices(self, z):
        """z (B, E, h, w) -> (B, h, w) int64.  Always float32: in bfloat16 distances tie, and a tie is no choice."""
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(self.embedding.weight.dtype)
            return nearest(flat, self.embedding.weight).view(len(z), *z.shape[2:])

    def lookup(self, indices):
        """indices (B, h, w) -> z_q (B, E, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, z, generator=None):
        """z (B, E, h, w) -> z_q of that shape, indices (B, h, w), loss. Straight-through: z gets z_q's gradient."""
        z = z.to(self.embedding.weight.dtype)
        indices = self.indices(z)
        z_q = self.lookup(indices)
        # QUIRK legacy: the release's weights; else the paper's (and VQ-VAE's); running means have no codebook term
        a, b = (self.beta, 0) if self.decay else (1, self.beta) if self.legacy else (self.beta, 1)
        loss = a * F.mse_loss(z, z_q.detach()) + b * F.mse_loss(z_q, z.detach())
        if self.training and (self.decay or self.restart):
            self.update(z.detach().permute(0, 2, 3, 1).flatten(0, 2), indices.flatten(), generator)
        return z + (z_q - z).detach(), indices, loss

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


class GumbelQuantizer(nn.Module):
    """A softmax over the codes, relaxed by Gumbel noise in training (the f8 release).   Source: as above.

    QUIRK: the release draws noise in evaluation too; indices() takes the argmax of the logits, so tokens do not change.
    """
    def __init__(self, size, dim, z_channels, kl_weight=5e-4, straight_through=True):
        super().__init__()
        self.kl_weight, self.straight_through, self.temperature = kl_weight, straight_through, 1.0
        self.proj, self.embed = nn.Conv2d(z_channels, size, 1), nn.Embedding(size, dim)

    def indices(self, z):
        with torch.autocast(z.device.type, enabled=False):                      # in bfloat16 logits tie
            return self.proj(z.to(self.proj.weight.dtype)).argmax(1)

    def lookup(self, indices):
        return self.embed(indices).permute(0, 3, 1, 2)

    def forward(self, z, generator=None, noise=None):
        """z (B, z_channels, h, w) -> z_q (B, E, h, w), indices (B, h, w), loss; noise (B, V, h, w): standard Gumbel."""
        logits = self.proj(z).float()                                           # (B, V, h, w)
        if noise is None:
            world = dist.get_world_size() if dist.is_initialized() else 1       # drawn for the global batch, then cut
            [u] = shard(torch.rand(len(z) * world, *logits.shape[1:], generator=generator), device=z.device)
            u = u.clamp(1e-20, 1 - 1e-7)
            noise = -(-u.log()).log()
        soft = ((logits + noise) / self.temperature).softmax(1)
        indices = soft.argmax(1)
        if self.straight_through or not self.training:
            soft = F.one_hot(indices, soft.shape[1]).permute(0, 3, 1, 2) + soft - soft.detach()
        z_q = torch.einsum("bvhw,ve->behw", soft, self.embed.weight)
        q = logits.softmax(1)
        kl = (q * (q * logits.shape[1] + 1e-10).log()).sum(1).mean()            # KL(q || uniform), per position
        return z_q, indices, self.kl_weight * kl


class VQGAN(nn.Module):
    """Encoder, codebook, decoder.   Source: taming/models/vqgan.py VQModel, GumbelVQ.

    channels: 3 for images; a map of edges or depth has 1, a segmentation as many as classes. Images may have any height
    and width divisible by f.
    """
    def __init__(self, config, channels=3):
        super().__init__()
        check(config)
        self.config = c = config
        self.f, self.channels, self.codebook_size = c.f, channels, c.codebook_size
        sizes = c.ch, c.ch_mult, c.num_res_blocks, c.attn_resolutions, c.resolution, c.z_channels, c.groups
        self.encoder, self.decoder = Encoder(channels, *sizes), Decoder(channels, *sizes)
        if c.quantizer == "gumbel":
            self.quantize = GumbelQuantizer(c.codebook_size, c.code_dim, c.z_channels, c.kl_weight)
        else:
            self.quantize = VectorQuantizer(c.codebook_size, c.code_dim, c.beta, c.legacy, c.codebook_decay, c.restart)
        self.quant_conv = nn.Conv2d(c.z_channels, c.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.code_dim, c.z_channels, 1)

    def latents(self, images):
        """images (B, C, H, W) -> z (B, E, h, w), before the quantizer. ValueError: not of this form."""
        if images.ndim != 4 or images.shape[1] != self.channels or any(s % self.f or not s for s in images.shape[2:]):
            raise ValueError(f"images must be (B, {self.channels}, H, W), H and W positive multiples of {self.f}, "
                             f"not {tuple(images.shape)}")
        return self.quant_conv(self.encoder(images))

    def encode(self, images):
        """images (B, C, H, W) in [-1, 1] -> indices (B, h, w) int64. ValueError as latents."""
        return self.quantize.indices(self.latents(images))

    def decode(self, indices):
        """indices (B, h, w) -> images (B, C, H, W), in [-1, 1] but for overshoot (a decoder is not clamped)."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(indices)))

    def forward(self, images, generator=None):
        """images -> reconstruction, {codebook_loss, perplexity (of this batch: exp of the codes' entropy)}."""
        z_q, indices, loss = self.quantize(self.latents(images), generator)
        return self.decoder(self.post_quant_conv(z_q)), {"codebook_loss": loss, "perplexity": use(indices, self)[1]}


def use(indices, tokenizer):
    """Share of the codebook that occurs in indices, and perplexity: so many codes, used evenly, would say as much."""
    p = torch.bincount(indices.flatten(), minlength=tokenizer.codebook_size) / indices.numel()
    return (p > 0).float().mean(), (-(p * p.clamp(min=1e-12).log()).sum()).exp()


def build_tokenizer(config):
    return VQGAN(config)


# === Prior: p(code | condition, earlier codes) ========================================================================
class CausalSelfAttention(nn.Module):
    """Multi-head attention to this and earlier positions.   Source: taming/modules/transformer/mingpt.py."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, cache=None, mask=None):
        """x (B, L, M) -> (B, L, M).  cache: keys and values of all earlier positions, to which those of x are added."""
        B, L, M = x.shape
        q, k, v = (layer(x).view(B, L, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        if cache is not None:
            k, v = cache(k, v)                                                  # (B, A, all positions so far, M / A)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0,
                                           is_causal=mask is None and L == k.shape[2])
        return F.dropout(self.proj(y.transpose(1, 2).reshape(B, L, M)), self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x): a pre-norm transformer block.  (B, L, M) -> (B, L, M)."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width),
                                 nn.Dropout(dropout))

    def forward(self, x, cache=None, mask=None):
        x = x + self.attn(self.ln1(x), cache, mask)
        return x + self.mlp(self.ln2(x))


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


class GPT(nn.Module):
    """minGPT as the release has it: learned positions, pre-norm blocks, an output matrix of its own without bias.

    n_unmasked: the first so many positions see each other in both directions (0 in all releases we know).
    """
    def __init__(self, vocab_size, block_size, layers, heads, width, dropout=0.0, n_unmasked=0):
        super().__init__()
        self.block_size, self.n_unmasked = block_size, n_unmasked
        self.tok_emb, self.drop = nn.Embedding(vocab_size, width), nn.Dropout(dropout)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, tokens, cache=None, embeddings=None):
        """tokens (B, L) int64 -> (B, L, M) before the output matrix.

        cache: a list of Cache, one for each block; tokens continue what they hold.
        embeddings (B, P, M): vectors put before the tokens. ValueError: longer than block_size.
        """
        x, past = self.tok_emb(tokens), cache[0].length if cache else 0
        x = x if embeddings is None else torch.cat([embeddings, x], 1)
        L = x.shape[1]
        if past + L > self.block_size:
            raise ValueError(f"{past + L} tokens are more than block_size {self.block_size}")
        mask = None
        if (self.n_unmasked or past) and L > 1:
            mask = torch.ones(L, past + L, dtype=torch.bool, device=x.device).tril(past)
            mask[:max(0, self.n_unmasked - past), :self.n_unmasked] = True
        x = self.drop(x + self.pos_emb[:, past:past + L])
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None, mask)
        return self.ln_f(x)

    def forward(self, tokens, cache=None, embeddings=None):
        """As features -> logits (B, L, V): at position i for token i + 1."""
        return self.head(self.features(tokens, cache, embeddings))

    def new_cache(self):
        return [Cache(self.block_size) for _ in self.blocks]


class CoordStage:
    """Coordinates as tokens: where in the picture a code lies, from 0 at its top left to V - 1 at its bottom right.

    They tell a window of a larger picture whether it is sky or ground.   Source: taming/modules/misc/coord.py.
    """
    def __init__(self, size, f):
        self.size, self.f = size, f

    def encode(self, height, width, top=0, left=0, crop=None):
        """The crop (h, w) at (top, left) of a picture of height x width pixels -> tokens (h / f, w / f) int64."""
        coord = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width) / (height * width)
        h, w = crop or (height, width)
        c = F.interpolate(coord.float()[:, :, top:top + h, left:left + w], scale_factor=1 / self.f, mode="area")
        return (self.size * c).round().long()[0, 0].clamp(0, self.size - 1)     # release: no upper limit

    def decode(self, tokens):
        """tokens (B, h, w) -> a picture (B, 1, f h, f w) in [0, 1]."""
        return F.interpolate(tokens[:, None] / self.size, scale_factor=float(self.f), mode="nearest")


MAPS = {"edges": 1, "depth": 1, "segmentation": 182}    # conditions with a tokenizer of their own: channels of the map


def condition_map(images, kind):
    """images (B, 3, H, W) in [-1, 1] -> map (B, 1, H, W) in [-1, 1].

    edges: length of the brightness's gradient. depth: a map like depth, smooth brightness (the release's came from a
    network, MiDaS). A segmentation must come with the data.
    """
    grey = images.mean(1, keepdim=True)
    if kind == "depth":
        return F.avg_pool2d(F.pad(grey, (2, 2, 2, 2), mode="replicate"), 5, 1)
    dx = F.pad(grey[..., :, 1:] - grey[..., :, :-1], (0, 1))
    dy = F.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    return (2 * (dx.square() + dy.square()).sqrt()).clamp(max=2) - 1


class Net2Net(nn.Module):
    """p(tokens | condition) = prod_i p(tokens_i | condition, tokens_<i).   Source: taming/models/cond_transformer.py.

    One embedding table serves codes and condition: class 5, code 5 and coordinate 5 are one row, told apart by their
    positions alone. cond_stage_model: the tokenizer of maps, if the condition is one. first_stage_model: the images'
    tokenizer, only in what from_official returns.
    """
    def __init__(self, config, cond_stage=None):
        super().__init__()
        check(config)
        self.config = c = config
        self.window, self.num_classes, self.kind = c.resolution // c.f, c.num_classes, c.condition
        self.droppable, N = c.label_dropout > 0, self.window ** 2
        self.first_stage_model, self.cond_stage_model = None, None
        if c.condition in MAPS:
            self.cond_stage_model = (cond_stage or VQGAN(c, MAPS[c.condition])).requires_grad_(False)
        self.transformer = GPT(c.vocab_size or c.codebook_size,
                               c.block_size or (N if c.condition == "class" else 2 * N - 1),
                               c.layers, c.heads, c.width, c.dropout)

    def condition(self, labels, batch):
        """labels (B,): classes; (B, ...): tokens of a map, coordinates; None: no class -> condition tokens c (B, n)."""
        if labels is None or labels.ndim == 1 and not self.num_classes:
            return torch.full((batch, 1), self.num_classes, device=self.transformer.pos_emb.device)     # SOS: token 0
        return labels[:, None] if labels.ndim == 1 else labels.flatten(1)

    def forward(self, tokens, labels=None):
        """tokens (B, N) or (B, h, w) int64, labels see condition -> logits (B, N, V), float32.

        logits[:, i] depends on the condition and tokens[:, :i] alone.
        """
        tokens = tokens.flatten(1)
        c = self.condition(labels, len(tokens))
        x = torch.cat([c, tokens[:, :-1]], 1)
        logits = self.transformer.head(self.transformer.features(x)[:, c.shape[1] - 1:])    # c itself is not predicted
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(self, tokens, labels=None, inputs=None):
        """-> mean cross-entropy in nats per token, metrics.  inputs: read in place of tokens (pkeep's noise)."""
        logits = self(tokens if inputs is None else inputs, labels)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), {}


def build_prior(config):
    return Net2Net(config)


# === Losses: L1 + LPIPS, patch discriminator, adaptive weight =========================================================
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


def discriminator_loss(gan, real, fake):
    """real, fake: logits -> half the sum of both hinges (0 beyond +-1), or of both cross-entropies (vanilla)."""
    loss = F.softplus if gan == "vanilla" else lambda x: F.relu(1 + x)
    return 0.5 * (loss(-real).mean() + loss(fake).mean())


def adaptive_weight(nll, g, last_layer):
    """lambda: makes the GAN's gradient as long as that of nll at the decoder's last layer (paper eq. 7).

    The release's delta is 1e-4 (paper: 1e-6) and its clamp 1e4. Without a graph (evaluation): 0.
    """
    if not torch.is_grad_enabled():
        return torch.zeros(())
    a, b = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (nll, g))
    return (a / (b + 1e-4)).clamp(0, 1e4).detach()


class VQLPIPSWithDiscriminator(nn.Module):
    """Both losses of the VQGAN.   Source: taming/modules/losses/vqperceptual.py.

    perceptual_loss is None where config.lpips is empty: L1 alone. Before step disc_start neither net feels the GAN, so
    the discriminator enters untrained.
    """
    def __init__(self, config, channels=3):
        super().__init__()
        self.config = config
        self.perceptual_loss = LPIPS() if config.lpips else None
        self.discriminator = NLayerDiscriminator(channels, config.disc_width, config.disc_layers)

    def generator(self, images, again, codebook_loss, last_layer, step):
        """The autoencoder's loss: L1 + LPIPS + codebook loss + weighted -mean D(again) (both GANs) -> loss, metrics."""
        c, rec = self.config, (images - again).abs()
        if self.perceptual_loss:
            rec = rec + c.perceptual_weight * self.perceptual_loss(images, again)
        nll = rec.mean()
        loss, metrics = nll + c.codebook_weight * codebook_loss, {"nll": nll, "codebook_loss": codebook_loss}
        if c.disc_weight and step >= c.disc_start:
            g = -self.discriminator(again).float().mean()
            weight = adaptive_weight(nll, g, last_layer) * c.disc_weight        # the clamp came before disc_weight
            loss, metrics = loss + weight * g, metrics | {"g_loss": g, "d_weight": weight}
        return loss, metrics

    def discriminate(self, images, again):
        """The discriminator's loss on real images and reconstructions -> loss, metrics.

        Two passes: BatchNorm must not see real and fake images in one batch.
        """
        real, fake = self.discriminator(images).float(), self.discriminator(again.detach()).float()
        return discriminator_loss(self.config.gan, real, fake), {"logits_real": real.mean(), "logits_fake": fake.mean()}


# === Sampler: one visible loop ========================================================================================
def filter_logits(logits, top_k=0, top_p=1.0):
    """Keep the k largest logits (and ties), then the largest that reach probability p; the others become -inf.

    The code that crosses p stays, so one always does. (..., V) -> (..., V).   Source: transformers 4.3.1, which the
    release uses (where it ignores top_p without top_k).
    """
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -math.inf)
    if top_p < 1:
        values, order = logits.sort(-1, descending=True)
        p = values.softmax(-1)
        dropped = p.cumsum(-1) - p > top_p                                      # what comes before it exceeds p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)
    return logits


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """A code (B, 1) from logits (B, V)."""
    return torch.multinomial(filter_logits(logits / temperature, top_k, top_p).softmax(-1), 1, generator=generator)


def window_start(i, side, window):
    """First row (column) of the window in which position i of a grid of `side` rows is drawn: i near its middle."""
    return min(max(i - window // 2, 0), side - window)


@torch.no_grad()
def sample(tokenizer, prior, labels, *, size=None, known=None, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0,
           generator=None, trace=None):
    """Draw codes in raster order, each from the condition and the codes drawn before it; then decode them.

    labels (B,) int64 classes (num_classes: no class), or condition tokens (B, h, w) of a map or of coordinates.
    size (h, w) in codes, default the trained grid: larger pictures are drawn through a window of that grid that slides
    along, each code seeing what of the condition and of the drawn codes lies in its window (release: make_samples.py).
    known (B, n) int64: the first n codes, kept as they are. guidance: see Config. trace: a list that gets {position,
    logits (B, V), tokens (B, h, w)} for each draw. Returns images (B, 3, f h, f w) in [-1, 1].
    Raises UserError for a grid smaller than trained, a top_k above V, guidance without dropped labels.
    """
    s, B, gpt, V = prior.window, len(labels), prior.transformer, tokenizer.codebook_size
    h, w = size or (labels.shape[1:] if labels.ndim == 3 else (s, s))
    if (labels.ndim == 3) == (prior.kind == "class") or labels.ndim == 3 and labels.shape[1:] != (h, w):
        raise UserError(f"labels {tuple(labels.shape)} do not fit {h} x {w} codes drawn from {prior.kind}")
    if min(h, w) < s:
        raise UserError(f"{h} x {w} codes are too few: this GPT was trained on {s} x {s}, draw at least as many")
    if not 0 <= top_k <= V or not 0 < top_p <= 1:
        raise UserError(f"top_k {top_k}, top_p {top_p}: top_k must be 0 to {V}, the codebook's size, top_p in (0, 1]")
    if guidance != 1 and not (prior.droppable and prior.num_classes):
        raise UserError(f"guidance {guidance}: this model never saw dropped labels: use 1, or train with some")
    if guidance != 1:
        labels = torch.cat([labels, torch.full_like(labels, prior.num_classes)])
    tokens, window = torch.zeros(B, h * w, dtype=torch.long, device=labels.device), None
    given = 0 if known is None else known.shape[1]
    if given:
        tokens[:, :given] = known
    for n in range(given, h * w):
        i, j = divmod(n, w)
        previous, window = window, (window_start(i, h, s), window_start(j, w, s))
        if window != previous:                                                  # another window: read it anew
            rows, columns = (slice(start, start + s) for start in window)
            c = prior.condition(labels if labels.ndim < 3 else labels[:, rows, columns], len(labels))
            before = tokens.view(B, h, w)[:, rows, columns].flatten(1)[:, :(i - window[0]) * s + j - window[1]]
            x, cache = torch.cat([c, before.repeat(len(labels) // B, 1)], 1), gpt.new_cache()
        else:                                                                   # the cache knows all but the last code
            x = tokens[:, n - 1:n].repeat(len(labels) // B, 1)
        logits = gpt.head(gpt.features(x, cache)[:, -1])[:, :V]                 # rows past the codebook are not drawn
        if guidance != 1:
            logits, null = logits.chunk(2)
            logits = null + guidance * (logits - null)
        tokens[:, n:n + 1] = draw(logits, temperature, top_k, top_p, generator)
        if trace is not None:
            trace.append({"position": n, "logits": logits, "tokens": tokens.view(B, h, w).clone()})
    return tokenizer.decode(tokens.view(B, h, w)).clamp(-1, 1)


# === Training: one visible loop per stage =============================================================================
def crop_data(config, data):
    """config.crop: one random crop of each image, the same in every epoch -> data, {split: offsets (N, 2)}."""
    cut, offsets, s = {}, {}, config.resolution
    for number, split in enumerate(("train", "test")):
        images, labels = getattr(data, split)
        generator = rng(config.seed, 2 ** 31 + number)                          # no step's
        offsets[split] = torch.randint(config.image_size - s + 1, (len(images), 2), generator=generator)
        if config.crop:
            images = torch.stack([x[:, i:i + s, j:j + s] for x, (i, j) in zip(images, offsets[split].tolist())])
        cut[split] = images, labels
    return dataclasses.replace(data, **cut), offsets


def warmup_cosine(n, warmup, total, start, peak, end):
    """Linear from start to peak, then half a cosine to end at n = total: the temperature of the Gumbel quantizer."""
    if n < warmup:
        return start + (peak - start) * n / warmup
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * min(1, (n - warmup) / (total - warmup))))


# Copied from pixelcnn.py
def backward(loss, optimizer):
    """Gradients of the optimizer's parameters, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    average(*(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None))


def train_tokenizer(config, data, run, stage="tokenizer"):
    """Autoencoder and discriminator in turn; stage "condition": of the condition's maps. Returns the VQGAN."""
    if config.condition == "segmentation":
        raise UserError("segmentation maps must come with the data: train with edges or depth")
    if config.disc_weight and config.resolution >> config.disc_layers < 3 or config.lpips and config.resolution < 16:
        raise UserError(f"images of {config.resolution} pixels are too small for disc_layers {config.disc_layers} or "
                        f"LPIPS: take fewer layers, or --disc-weight 0")
    torch.manual_seed(config.seed)
    channels = MAPS[config.condition] if stage == "condition" else 3
    tokenizer = VQGAN(config, channels).to(run.device)
    losses = VQLPIPSWithDiscriminator(config, channels).to(run.device)
    if config.lpips:
        load_lpips(losses.perceptual_loss, config)
    elif stage == "tokenizer":
        print("no weights for LPIPS (--lpips): the reconstruction loss is L1 on pixels alone")
    optimizers = [torch.optim.Adam([p for p in net.parameters() if p.requires_grad], config.lr_tokenizer, (0.5, 0.9))
                  for net in (tokenizer, losses.discriminator)]
    print(f"{stage}: {sum(p.numel() for p in tokenizer.parameters()):,} parameters on {run.device}, "
          f"{len(data.train[0]):,} images of {config.data}")
    if config.compile:
        for part in (tokenizer.encoder, tokenizer.decoder.mid, *tokenizer.decoder.up):  # not the last layer, whose
            part.compile()                                                      # gradient adaptive_weight takes alone
    data, last_layer = crop_data(config, data)[0], tokenizer.decoder.conv_out.weight
    names = stage, f"discriminator_{stage}", f"optimizer_{stage}", f"optimizer_discriminator_{stage}"
    for step in run.steps(stage, config.train_steps_tokenizer,
                          **dict(zip(names, (tokenizer, losses.discriminator, *optimizers)))):
        generator = rng(config.seed, step)
        images, _ = data.batch("train", config.batch_size, generator)
        if stage == "condition":
            images = condition_map(images, config.condition)
        [images] = shard(images, device=run.device)
        tokenizer.quantize.temperature = warmup_cosine(step, 0, config.train_steps_tokenizer, 0.9, 0.9, 1e-6)
        for optimizer in optimizers:
            set_lr(optimizer, config.lr_tokenizer, step, config.warmup, config.train_steps_tokenizer)
        # 1. the autoencoder, with the discriminator's opinion as a part of its loss
        with autocast(run.device):
            again, found = tokenizer(images, generator)
            loss, metrics = losses.generator(images, again.float(), found["codebook_loss"], last_layer, step)
        backward(loss, optimizers[0])
        run.log(stage, step, loss=loss, perplexity=found["perplexity"], **metrics)      # raises on NaN, before the step
        optimizers[0].step()
        # 2. the discriminator, on what the autoencoder makes after its step (before disc_start its loss is zero)
        if config.disc_weight and step >= config.disc_start:
            with autocast(run.device):
                with torch.no_grad():
                    again = tokenizer.decode(tokenizer.encode(images))
                loss, metrics = losses.discriminate(images, again.float())
            backward(loss, optimizers[1])
            run.log(names[1], step, loss=loss, **metrics)
            optimizers[1].step()
    return tokenizer.eval()


@torch.no_grad()
def tokenize(config, data, tokenizer, prior, split, device):
    """All images of a split -> tokens (N, h, w), conditions: labels (N,), or condition tokens (N, h, w)."""
    cut, offsets = crop_data(config, data)
    (images, conditions), size = getattr(cut, split), config.image_size
    tokens, maps = [], []
    for part in tqdm(images.split(32), f"tokens of the {split} images", leave=False, disable=None):
        part = part.to(device) / 127.5 - 1
        tokens.append(tokenizer.encode(part).cpu())
        if config.condition in MAPS:
            maps.append(prior.cond_stage_model.encode(condition_map(part, config.condition)).cpu())
    if config.condition == "coordinates":
        stage, s = CoordStage(config.codebook_size, config.f), (config.resolution,) * 2
        maps = [stage.encode(size, size, i, j, s)[None] for i, j in offsets[split].tolist()]
    return torch.cat(tokens), torch.cat(maps) if maps else conditions


# Copied from vqvae2.py
def fingerprint(tokenizer, *more):
    """SHA-256 of a tokenizer's weights and of more tensors: uint8 (32,)."""
    digest = hashlib.sha256()
    for value in (*tokenizer.state_dict().values(), *more):
        digest.update(value.cpu().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def cached_tokens(config, data, tokenizer, prior, run):
    """tokenize's result for the training images, kept in RUN/tokens.npz with the fingerprint of weights and data."""
    maps = prior.cond_stage_model.state_dict() if prior.cond_stage_model else {}
    mark, path = fingerprint(tokenizer, *maps.values(), *data.train), run.folder / "tokens.npz"
    if path.exists():
        with explain(f"{path} is damaged", "delete it, and it is made again"), np.load(path) as file:
            if np.array_equal(file["made_of"], mark.numpy()):
                return [torch.from_numpy(file[name].astype(np.int64)) for name in ("tokens", "conditions")]
    found = tokenize(config, data, tokenizer, prior, "train", run.device)
    if run.is_main:
        arrays = dict(zip(("tokens", "conditions"), (t.numpy().astype(np.uint16) for t in found)))
        np.savez(buffer := io.BytesIO(), made_of=mark.numpy(), **arrays)
        write_file(path, buffer.getbuffer())
    return found


def parameter_groups(prior, weight_decay=0.01):
    """Weight decay on the matrices of linear layers alone: not on biases, LayerNorm, embeddings, positions."""
    decay = {id(module.weight) for module in prior.transformer.modules() if isinstance(module, nn.Linear)}
    groups = [[p for p in prior.transformer.parameters() if (id(p) in decay) == wanted] for wanted in (True, False)]
    return [dict(params=groups[0], weight_decay=weight_decay), dict(params=groups[1], weight_decay=0.0)]


def train_prior(config, data, run, tokenizer):
    """Cross-entropy of every code of the cached training images, given the true earlier ones. Returns the prior."""
    condition = train_tokenizer(config, data, run, "condition") if config.condition in MAPS else None
    torch.manual_seed(config.seed)
    prior = build_prior(config).to(run.device)
    if condition:
        prior.cond_stage_model.load_state_dict(condition.state_dict())
        prior.cond_stage_model.eval()
    all_tokens, conditions = cached_tokens(config, data, tokenizer, prior, run)
    share, perplexity = use(all_tokens, tokenizer)
    if perplexity < 0.05 * config.codebook_size:
        print(f"warning: the codebook collapsed: {share:.1%} of {config.codebook_size} codes are used, perplexity "
              f"{perplexity:.1f}; try --restart 20, a smaller --lr-tokenizer or more --train-steps-tokenizer")
    optimizer = torch.optim.AdamW(parameter_groups(prior), config.lr_prior, (0.9, 0.95))
    if config.compile:
        prior.compile()
    size = sum(p.numel() for p in prior.transformer.parameters())
    print(f"prior: {size:,} parameters, {all_tokens[0].numel()} codes an image; yardsticks in nats per token: "
          f"{math.log(config.codebook_size):.3f} if all codes were alike, {perplexity.log():.3f} without context")
    for step in run.steps("prior", config.train_steps_prior, prior=prior, optimizer_prior=optimizer):
        generator = rng(config.seed, step)
        rank = dist.get_rank() if dist.is_initialized() else 0                  # dropout: every process its own
        torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)) + rank)
        index = torch.randint(len(all_tokens), (config.batch_size_prior,), generator=generator)
        tokens, labels = all_tokens[index].flatten(1), conditions[index]
        keep = torch.rand(tokens.shape, generator=generator) < config.pkeep     # the target stays clean
        inputs = torch.where(keep, tokens, torch.randint(config.codebook_size, tokens.shape, generator=generator))
        if labels.ndim == 1:
            dropped = torch.rand(labels.shape, generator=generator) < config.label_dropout
            labels = labels.masked_fill(dropped, config.num_classes)
        tokens, inputs, labels = shard(tokens, inputs, labels, device=run.device)
        with autocast(run.device):
            loss, metrics = prior.loss(tokens, labels, inputs)
        backward(loss, optimizer)
        length = nn.utils.clip_grad_norm_(prior.transformer.parameters(), config.clip or math.inf)
        run.log("prior", step, loss=loss, grad_norm=length, **metrics)          # raises on NaN before a weight changes
        set_lr(optimizer, config.lr_prior, step, config.warmup, config.train_steps_prior)
        optimizer.step()
    return prior.eval()


# === Official weights: CompVis/taming-transformers ====================================================================
RELEASES = {    # what the released checkpoints were built from; the VQGANs of faces, depth, segmentation fit faces256
    "imagenet_f16_16384, cin_transformer": PRESETS["imagenet256"],
    "imagenet_f16_1024, faceshq": PRESETS["faces256"],
    "ffhq_transformer": dataclasses.replace(PRESETS["faces256"], condition="class", width=1664, block_size=256),
    "drin_transformer (depth)": dataclasses.replace(PRESETS["faces256"], condition="depth"),
    "sflckr_transformer": dataclasses.replace(PRESETS["faces256"], condition="segmentation"),
    "gumbel_f8": dataclasses.replace(PRESETS["faces256"], ch_mult=(1, 1, 2, 4), attn_resolutions=(32,), block_size=0,
                                     quantizer="gumbel", codebook_size=8192, kl_weight=1e-8, condition="class")}


def official_config(official):
    """Constructor arguments of the release's VQModel, GumbelVQ or Net2NetTransformer -> Config, Config of the maps'."""
    p = official.get("params", official)
    if "transformer_config" not in p:
        d, loss = p["ddconfig"], (p.get("lossconfig") or {}).get("params", {})
        names = "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels"
        return Config(**RELEASE | {name: d[name] for name in names} | dict(
            image_size=d["resolution"], codebook_size=p["n_embed"], code_dim=p["embed_dim"], num_classes=0,
            quantizer="gumbel" if "temperature_scheduler_config" in p else "vq", kl_weight=p.get("kl_weight", 1e-8),
            beta=p.get("beta", 0.25), legacy=p.get("legacy", True), disc_width=loss.get("disc_ndf", 64),
            disc_layers=loss.get("disc_num_layers", 3), disc_start=loss.get("disc_start", 0), top_k=0,
            disc_weight=loss.get("disc_weight", 1.0), codebook_weight=loss.get("codebook_weight", 1.0),
            perceptual_weight=loss.get("perceptual_weight", 1.0), gan=loss.get("disc_loss", "hinge"))), None
    t, cond = p["transformer_config"], p["cond_stage_config"]
    t, arguments = t.get("params", t), cond.get("params", {}) if isinstance(cond, dict) else {}
    maps = official_config(cond)[0] if "ddconfig" in arguments else None
    kind = "class" if not maps else "depth" if arguments["ddconfig"]["in_channels"] == 1 else "segmentation"
    return dataclasses.replace(
        official_config(p["first_stage_config"])[0], condition="coordinates" if "down_factor" in arguments else kind,
        num_classes=arguments.get("n_classes", 0), layers=t["n_layer"], heads=t["n_head"], width=t["n_embd"],
        block_size=t["block_size"], vocab_size=t["vocab_size"], label_dropout=0.0), maps


def assemble(config, state, maps=None):
    """The module, without weights, whose parts the names in state ask for."""
    channels = {name: len(w[0]) for name, w in state.items()
                if name.endswith("encoder.conv_in.weight") and w.ndim == 4}
    if "transformer.tok_emb.weight" in state:
        stage = channels.get("cond_stage_model.encoder.conv_in.weight")
        model = Net2Net(config, VQGAN(maps or config, stage) if stage else None)
        if "first_stage_model.encoder.conv_in.weight" in channels:
            model.first_stage_model = VQGAN(config)
    else:
        model = VQGAN(config, channels.get("encoder.conv_in.weight", 3))
        if any(name.startswith("loss.") for name in state):
            model.loss = VQLPIPSWithDiscriminator(config, model.channels)
    return model


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
    """Released weights -> a VQGAN, or a Net2Net with its tokenizer as first_stage_model, in eval mode.

    source: path of a checkpoint of CompVis/taming-transformers, or its state dict. config: the release's constructor
    arguments (what its yaml has under `model`); without them the release whose names and shapes fit is taken.
    Every parameter must fit by name and shape: else UserError with the first five that do not.
    """
    # buffers that are functions of the configuration: the causal mask, colours to draw a segmentation in
    state = {name: value.float() if value.is_floating_point() else value for name, value in read_weights(source).items()
             if not name.endswith(("attn.mask", "colorize"))}
    best = None
    for candidate in [official_config(config)] if config else [(c, None) for c in RELEASES.values()]:
        with torch.device("meta"):                                              # shapes only: no time, no memory
            model = assemble(candidate[0], state, candidate[1])
        shapes, buffers = {k: v.shape for k, v in model.state_dict().items()}, dict(model.named_buffers())
        wrong = [name for name in {**state, **shapes} if name not in state and name not in buffers
                 or name in state and state[name].shape != shapes.get(name)]
        if best is None or len(wrong) < len(best[0]):
            best = wrong, model, candidate, buffers
    wrong, model, candidate, buffers = best
    if wrong:
        name = "the dict" if isinstance(source, dict) else source
        raise UserError(f"{name} is no model of this paper: {len(wrong)} names or shapes do not fit, first "
                        f"{', '.join(wrong[:5])}")
    if not buffers.keys() <= state.keys():                                      # left out of the file: they start anew
        fresh = assemble(candidate[0], state, candidate[1]).state_dict()
        state |= {name: fresh[name] for name in buffers if name not in state}
    model.load_state_dict(state, assign=True)
    return model.eval()


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
    for name, known in (("quantizer", ("vq", "gumbel")), ("gan", ("hinge", "vanilla")),
                        ("condition", ("class", "coordinates", *MAPS))):
        need(getattr(c, name) in known, f"{name} {getattr(c, name)!r} is unknown: {', '.join(known)}")
    for names, least in (("batch_size batch_size_prior log_every save_every image_size num_res_blocks z_channels "
                          "code_dim disc_layers disc_width layers heads width", 1), ("codebook_size", 2),
                         ("temperature", 1e-3),
                         ("warmup train_images test_images train_steps_tokenizer train_steps_prior num_classes restart "
                          "crop disc_start disc_weight perceptual_weight codebook_weight beta kl_weight clip", 0)):
        for name in names.split():
            need(getattr(c, name) >= least, f"{name} is {getattr(c, name)}: at least {least}")
    need(0 < c.top_p <= 1, f"top_p is {c.top_p}: above 0, at most 1")
    need(-100 <= c.guidance <= 100, f"guidance is {c.guidance}: a number up to 100, 1 for none")
    for name in ("codebook_decay", "dropout", "pkeep", "label_dropout"):
        need(0 <= getattr(c, name) <= 1, f"{name} is {getattr(c, name)}: 0 to 1")
    need(c.lr_tokenizer > 0 and c.lr_prior > 0, "lr_tokenizer and lr_prior must be positive")
    need(0 <= c.seed < 2 ** 63, f"seed {c.seed}: 0 to 2**63 - 1")
    need(c.ch_mult and min(c.ch_mult) > 0, "ch_mult needs a positive number for each level")
    need(c.ch > 0 and c.groups > 0 and c.ch % c.groups == 0, f"ch {c.ch} is not divisible by groups, {c.groups}")
    need(c.width % c.heads == 0, f"width {c.width} is not divisible by heads, {c.heads}")
    need(c.crop <= c.image_size, f"crop {c.crop} is larger than the images, {c.image_size}")
    need(c.resolution % c.f == 0, f"images of {c.resolution} pixels are not divisible by f = {c.f}")
    N = (c.resolution // c.f) ** 2
    longest = N if c.condition == "class" else 2 * N - 1
    need(c.block_size == 0 or c.block_size >= longest, f"block_size {c.block_size}: 0, or at least {longest} here")
    need(c.vocab_size == 0 or c.vocab_size >= c.codebook_size,
         f"vocab_size {c.vocab_size}: 0, or at least {c.codebook_size}")
    need(c.codebook_size <= 2 ** 16, f"codebook_size {c.codebook_size}: at most 65536")
    need(c.quantizer == "vq" or c.z_channels == c.code_dim, "gumbel needs z_channels equal to code_dim (release: 256)")
    need(0 <= c.top_k <= c.codebook_size, f"top_k is {c.top_k}: 0 to {c.codebook_size}, the codebook's size")
    need(c.num_classes < (c.vocab_size or c.codebook_size),
         f"{c.num_classes} classes, {c.codebook_size} codes: they share one table, so fewer classes than codes")
    need(c.num_classes == 0 or c.condition == "class",
         f"condition {c.condition} takes the place of classes: add --num-classes 0")
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
            other = ", or give --official CHECKPOINT" if hasattr(args, "official") else ""
            raise UserError(f"name a run folder{other}")
        return load_run(args.run)
    if args.run and "photos" not in args:
        raise UserError(f"{args.run} or --official: one of them")
    if args.run:                                                                # a photo stands where a run would
        args.photos = [args.run, *args.photos]
    model = from_official(args.official)
    tokenizer, prior = (model, None) if isinstance(model, VQGAN) else (model.first_stage_model, model)
    if prior is None and args.verb != "reconstruct":
        raise UserError(f"{args.official} is a tokenizer without a GPT: use it with reconstruct")
    if tokenizer is None or tokenizer.channels != 3:
        raise UserError(f"{args.official} holds no tokenizer of images: use it in Python, with from_official")
    run = Run.__new__(Run)                                                      # no folder: pictures go to this one
    run.config, run.folder = model.config, Path(".")
    run.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run.state = {"classes": [str(i) for i in range(model.config.num_classes)]}
    return run, tokenizer.to(run.device), prior and prior.to(run.device)


def load_test(args, run):
    """Test images (N, 3, H, W) in [-1, 1] as training saw them, cropped; their labels; the Data before cropping."""
    config = dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir)
    data = load_data(config)
    images, labels = crop_data(config, data)[0].test
    return images / 127.5 - 1, labels, data


def read_photos(args, run, number=8):
    """images (n, 3, S, S) in [-1, 1], labels or None: of the command line's photos, or of the first test images."""
    if not args.photos:
        if getattr(args, "official", None):
            raise UserError("released weights come without test images: give photos")
        return [part[:number] for part in load_test(args, run)[:2]]
    images, side = [], run.config.resolution
    for photo in args.photos:
        with explain(f"{photo} cannot be read as an image", "give PNG or JPEG files"):
            width, height = Image.open(photo).size
            if min(width, height) < side:
                raise UserError(f"{photo} is too small, {width} x {height} pixels: this model takes {side} x {side}")
            images.append(torch.from_numpy(read_image(photo, side).copy()).permute(2, 0, 1))
    return torch.stack(images) / 127.5 - 1, None


def draw_images(args, run, tokenizer, prior, labels, known=None, size=None):
    settings = {name: getattr(run.config, name) if getattr(args, name) is None else getattr(args, name)
                for name in ("temperature", "top_k", "top_p", "guidance")}
    if not run.config.num_classes and args.guidance is None:
        settings["guidance"] = 1.0                                              # nothing to be guided by
    check(dataclasses.replace(run.config, label_dropout=0.1, seed=args.seed, **settings))
    generator, parts = torch.Generator(run.device).manual_seed(args.seed), []
    many = max(1, min(64, 2 ** 20 // run.config.resolution ** 2))               # caches and decoder take memory
    for start in range(0, len(labels), many):
        k = slice(start, start + many)
        parts.append(sample(tokenizer, prior, labels[k].to(run.device), known=None if known is None else known[k],
                            size=size, generator=generator, **settings).cpu())
    return torch.cat(parts)


def grid_size(args, run, tokenizer):
    """--size in pixels -> (h, w) in codes."""
    size = args.size or (run.config.resolution,) * 2
    if any(side % tokenizer.f for side in size):
        raise UserError(f"--size {size[0]} {size[1]}: height and width must be multiples of {tokenizer.f}")
    return size[0] // tokenizer.f, size[1] // tokenizer.f


def sample_command(args, run, tokenizer, prior):
    if prior.kind in MAPS and getattr(args, "official", None):
        raise UserError(f"this model draws from {prior.kind}: use paint, with photos")
    if prior.kind in MAPS and (args.size or args.labels):
        raise UserError(f"this model draws from {prior.kind} of the trained size: --size and --labels do not apply")
    if prior.kind in MAPS:
        return paint_command(argparse.Namespace(**vars(args), photos=[], data_dir=None), run, tokenizer, prior)
    h, w = grid_size(args, run, tokenizer)
    columns = run.config.num_classes if 0 < run.config.num_classes <= 16 else 8
    labels = read_labels(args.labels, run, args.num or (8 * columns if h * w <= 256 else 4))
    if prior.kind == "coordinates":
        place = CoordStage(run.config.codebook_size, tokenizer.f).encode(h * tokenizer.f, w * tokenizer.f)
        conditions = place.expand(len(labels), -1, -1)
    else:
        conditions = labels
    images = draw_images(args, run, tokenizer, prior, conditions, size=(h, w))
    np.savez(buffer := io.BytesIO(), arr_0=to_bytes(images).permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy())
    show(args, run, images, "samples.png", columns, "complete")
    write_file(run.folder / "samples.npz", buffer.getbuffer())  # ADM's format; last: the picture may not be writable


@torch.no_grad()
def complete_command(args, run, tokenizer, prior):
    """Each row: an image, what the model is shown of it, and what it makes of that."""
    if prior.kind != "class":
        raise UserError(f"complete works with classes or without a condition, not with {prior.kind}")
    images, labels = read_photos(args, run)
    if args.labels or not run.config.num_classes:
        labels = read_labels(args.labels, run, len(images))
    if labels is None:
        raise UserError("this model draws by class: give --labels, one for each photo or one for all")
    num, half = args.num or 6, images.shape[2] // tokenizer.f // 2 * tokenizer.f
    if not half:
        raise UserError("this model's pictures are one code high: there is no upper half")
    # the upper half is encoded alone: an encoder that saw the whole image would tell of the lower half
    known = tokenizer.encode(images[:, :, :half].to(run.device)).flatten(1).repeat_interleave(num, 0)
    drawn = draw_images(args, run, tokenizer, prior, labels.repeat_interleave(num, 0), known).unflatten(0, (-1, num))
    shown = images[:, None].repeat(1, 2, 1, 1, 1)
    shown[:, 1, :, half:] = 0
    show(args, run, torch.cat([shown, drawn], 1).flatten(0, 1), "completions.png", 2 + num, "evaluate")


@torch.no_grad()
def paint_command(args, run, tokenizer, prior):
    """Each row: an image, its map (edges, depth), the map as its codes have it, and images drawn from these codes."""
    if prior.kind not in ("edges", "depth"):
        raise UserError(f"this model draws from {prior.kind}: for paint train with --condition edges --num-classes 0")
    images, num = read_photos(args, run)[0], args.num or 6
    maps = condition_map(images, prior.kind).to(run.device)
    codes = prior.cond_stage_model.encode(maps)
    drawn = draw_images(args, run, tokenizer, prior, codes.repeat_interleave(num, 0)).unflatten(0, (-1, num))
    maps = torch.stack([maps, prior.cond_stage_model.decode(codes)], 1).cpu().expand(-1, -1, 3, -1, -1)
    show(args, run, torch.cat([images[:, None], maps, drawn], 1).flatten(0, 1), "paintings.png", 3 + num, "evaluate")


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
    """Reconstruction, use of the codebook, likelihood of the test images' codes, speed, size."""
    images, _, data = load_test(args, run)
    tokens, conditions = tokenize(run.config, data, tokenizer, prior, "test", run.device)
    quality, nats = [], []
    for x, t, y in zip(images.split(32), tokens.split(32), conditions.split(32)):
        x, t, y = x.to(run.device), t.to(run.device), y.to(run.device)
        quality.append(psnr(x, tokenizer.decode(t).clamp(-1, 1)).cpu())
        nats.append(prior.loss(t.flatten(1), y)[0] * len(t))
    (share, perplexity), nats, L = use(tokens, tokenizer), float(sum(nats)) / len(tokens), tokens[0].numel()
    start, num, c = time.time(), len(conditions[:16]), run.config
    sample(tokenizer, prior, conditions[:num].to(run.device), top_k=c.top_k, top_p=c.top_p,
           guidance=c.guidance if c.num_classes else 1.0, generator=torch.Generator(run.device).manual_seed(0)).cpu()
    seconds = time.time() - start
    report = dict(
        file=f"{NAME}.py", data=Path(run.config.data).name, image_size=run.config.resolution,
        parameters_tokenizer=sum(p.numel() for p in tokenizer.parameters()),
        parameters_prior=sum(p.numel() for p in prior.transformer.parameters()), samples_per_second=num / seconds,
        psnr=float(torch.cat(quality).mean()), codebook_size=tokenizer.codebook_size, codebook_use=float(share),
        perplexity=float(perplexity), nats_per_token=nats, nats_per_image=nats * L, tokens_per_image=L,
        unigram_nats_per_token=float(perplexity.log()), test_images=len(images), peak_memory_mib=peak_memory(),
        train_steps=sum(run.state["progress"].values()), train_seconds=run.state["seconds"],
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        command=f"python {NAME}.py evaluate {run.folder}")
    report["parameters"] = report["parameters_tokenizer"] + report["parameters_prior"]
    print(f"test: PSNR {report['psnr']:.2f} dB; {share:.1%} of {tokenizer.codebook_size} codes used, perplexity "
          f"{perplexity:.1f}; {nats:.4f} nats per token (without context {perplexity.log():.4f})")
    write_file(run.folder / "report.json", json.dumps(report, indent=1).encode())
    print(f"{run.folder / 'report.json'}   next: python {NAME}.py sample {run.folder}")


RUN = "run --official --out --num --seed --temperature --top-k --top-p --guidance"
FLAGS = {
    "run": dict(nargs="?", help="run folder"),
    "photos": dict(nargs="*", help="image files, right behind the run (none: the first test images)"),
    "--official": dict(metavar="CHECKPOINT", help="released weights in place of a run folder"),
    "--data-dir": dict(help="where mnist and cifar10 are (default: where training found them)"),
    "--out": dict(help="PNG to write (default: in the run folder)"),
    "--labels": dict(nargs="+", help="classes by number or name, repeated in turn (default: the images', or all)"),
    "--num": dict(type=positive, help="images to draw; where there are photos: of each"),
    "--size": dict(type=positive, nargs=2, metavar=("H", "W"), help="pixels of the pictures (default: as trained)"),
    "--temperature": dict(type=float, help="divides the logits (default: the run's)"),
    "--top-k": dict(type=int, help="only the k likeliest codes are drawn (default: the run's)"),
    "--top-p": dict(type=float, help="only the likeliest codes up to this probability (default: the run's)"),
    "--guidance": dict(type=float, help="no class + guidance (class - no class) (default: the run's)"),
    "--seed": dict(type=int, default=0, help="of the generator that draws")}
VERBS = {   # name: (function, help, flags)
    "sample": (sample_command, "draw images, also larger than trained", f"{RUN} --labels --size"),
    "complete": (complete_command, "hide the lower half of images and draw it anew",
                 f"{RUN} photos --labels --data-dir"),
    "paint": (paint_command, "draw images from the edges or the depth of images", f"{RUN} photos --data-dir"),
    "reconstruct": (reconstruct_command, "images through the tokenizer, side by side, with PSNR",
                    "run --official photos --data-dir --out"),
    "evaluate": (evaluate_command, "PSNR, codebook use, likelihood, speed, size: writes RUN/report.json",
                 "run --data-dir")}

if __name__ == "__main__":
    main()
