# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66", "pillow>=10"]
# ///
"""MAR: a picture's continuous latents, drawn set by set in random order; a small diffusion model draws each token.

    Autoregressive Image Generation without Vector Quantization, Li, Tian, Li, Deng, He, NeurIPS 2024, arXiv 2406.11838
    Release: LTH14/mar (no training of the tokenizer, whose recipe is CompVis/latent-diffusion's); this file computes
    what it computes, loads its weights and trains both stages

The idea. Autoregression needs p(token | what is known) in a form that can be trained and drawn from. A softmax over a
codebook is one, and costs a quantizer. Diffusion is another: the transformer gives a vector z for each unknown token,
and an mlp, told z, takes the noise off that token's continuous latent; its loss trains the transformer through z. Any
tokens may be known: an encoder reads those, a decoder with mask tokens gives z everywhere at once, and some tokens,
chosen at random beforehand, are drawn together: independently, given z. (The demo's few tokens are drawn singly.)

    images (B,3,H,W) -> Encoder -> mean, log var (B,2E,h,w) -> latents (B,E,h,w), normalised -> tokens (B,L,D)
    tokens not masked -> transformer's encoder -> its decoder, mask tokens at the other places -> z (B,L,M)
    training:  masked token + noise of a random level t, and its z -> DiffLoss -> eps, v
    sampling:  N times: z of all masked tokens -> some of them: noise -> S steps of DiffLoss -> token
    tokens -> latents -> Decoder -> images

Glossary
    E, D       channels of a latent; numbers in a token, E p^2 (p: patch_size)
    L          tokens of an image, (h / p)^2, row by row
    M, W       width of the transformer's decoder, which is that of z; width of the mlp
    K          noisy copies of each masked token in a training step, each at a level of its own
    buffer     copies of the class's vector before the tokens (release: 64): work space for the encoder
    order      a permutation of the L places: first those that are drawn last
    T, S       noise levels in training, 1000; steps of the shortened chain in sampling, 100
    abar, eps  how much of a token's variance is left at a level (alpha-bar); the noise
    v          where between its two bounds the logarithm of a backward step's variance lies, -1 to 1
    N          iterations of sampling: sets of tokens (release: num_iter)

Run
    python mar.py                                                   the demo: nine shapes by class, minutes on two cores
    python mar.py train --preset cifar10 --data FOLDER_OR_ZIP --out RUN
    python mar.py sample RUN --labels cat dog --guidance 3          (also: complete, inpaint, reconstruct, evaluate)
    python mar.py sample --official kl16.ckpt mar_base/checkpoint-last.pth --labels 207 --num 8 --sample-steps 64

Contents   Config and presets, Tokenizer, Prior, Diffusion loss, Losses, Sampler, Training, Official weights, Helpers,
           Command line
Not here   the paper's causal baselines and cross-entropy (in the notebook), DDIM in sampling.
Departs    The tokenizer's training was not released: latent diffusion's is built here, which its authors name, without
           its random crops. Latents of our own are normalised by each channel's mean and deviation (release: one
           factor, 0.2325). Small presets train on more noise (level_power) and draw with x0 limited (clip_x0), for
           minutes in place of hours; the paper's presets do neither. The average of the weights follows a young model
           faster. In editing, the schedule counts the hidden tokens alone. One mask ratio for all processes (release:
           each its own). float32; training on CUDA bfloat16 (release: float16, scaled).
"""
import argparse
import contextlib
import dataclasses
import functools
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
    flip: bool = False              # also train on mirrored pictures
    # tokenizer
    ch: int = 16                    # width of the first level, a multiple of the groups (release: 128)
    groups: int = 8                 # groups of GroupNorm (release: 32)
    ch_mult: tuple = (1, 2, 4)      # widths of the levels in units of ch; each level but the last halves the side
    num_res_blocks: int = 1         # residual blocks per level (the decoder has one more; release: 2)
    latent_dim: int = 4             # E, channels of the latents (release: 16)
    kl_weight: float = 0.06         # weight of the distance from a normal distribution, in nats an image (LDM: 1e-6)
    lpips: str = ""                 # perceptual loss: "" none, download, or a folder or released .ckpt with its weights
    perceptual_weight: float = 1.0  # weight of LPIPS
    disc_weight: float = 0.5        # the GAN's share after the adaptive weight (0: no GAN)
    disc_start: int = 800           # first step of the GAN; before it the discriminator does not learn
    disc_layers: int = 2            # layers of the patch discriminator: how large a patch it judges
    disc_width: int = 32            # features of its first layer
    # transformer
    patch_size: int = 3             # p, side of the squares of latents that are one token
    width: int = 64                 # width of the transformer's encoder (release: 768, 1024, 1280)
    decoder_width: int = 64         # M, width of its decoder and of z (release: as width)
    encoder_depth: int = 2          # blocks of the encoder (release: 12, 16, 20)
    decoder_depth: int = 2          # blocks of the decoder (release: as many)
    heads: int = 4                  # attention heads (release: 12, 16, 16)
    mlp_ratio: int = 4              # hidden units of the blocks' mlp in units of the width
    buffer: int = 4                 # copies of the class's vector before the tokens (release: 64)
    mask_ratio_min: float = 0.3     # the share of masked tokens: from here (release: 0.7) to 1, most often near 1
    dropout: float = 0.0            # in attention and mlp (release: 0.1)
    label_dropout: float = 0.1      # share of labels replaced by "no class", which guidance needs
    # diffusion loss
    head_width: int = 128           # W, width of the diffusion mlp (release: 1024, 1280, 1536)
    head_depth: int = 2             # blocks of the diffusion mlp (release: 6, 8, 12)
    noise_levels: int = 2           # K, noisy copies of each token in a step (release: 4, diffusion_batch_mul)
    level_power: float = 0.35       # levels are 1000 u^this, u uniform: below 1 more noise, z counts there (release: 1)
    # training
    seed: int = 0                   # a step is a function of (seed, step)
    batch_size: int = 16            # images per step of the tokenizer, over all processes
    batch_size_prior: int = 64      # images per step of the transformer, over all processes
    train_steps_tokenizer: int = 950  # steps of the tokenizer
    train_steps_prior: int = 4800   # steps of the transformer
    lr_tokenizer: float = 1e-3      # learning rate of autoencoder and discriminator
    lr_prior: float = 1.5e-3        # learning rate of the transformer
    lr_end: float = 0.0             # the transformer's last learning rate in units of lr_prior
    weight_decay: float = 0.02      # of the transformer's matrices and tables
    warmup_tokenizer: int = 30      # steps of warm-up of the tokenizer; then a cosine to zero (0: constant)
    warmup: int = 100               # steps of warm-up of the transformer
    cosine: bool = True             # after the warm-up a cosine to lr_end (release: constant)
    clip: float = 3.0               # gradients of the transformer are scaled down to this norm (0: never)
    ema: float = 0.998              # decay of the averaged weights, which sampling uses (0: the weights themselves)
    log_every: int = 10             # steps between two rows of metrics.jsonl
    save_every: int = 500           # steps between two checkpoints
    sample_steps: int = 4           # N, iterations of sampling (release: 64, 256 for its table)
    denoise_steps: int = 50         # S, diffusion steps for each token
    temperature: float = 0.6        # factor of the noise that the diffusion steps add
    clip_x0: float = 2.0            # limit of predicted latents in sampling, in deviations (0: none, as released)
    guidance: float = 3.0           # g in: noise = no class + g (class - no class); 1: none
    guidance_schedule: str = "constant"  # linear: g rises with the share of known tokens; constant
    compile: bool = False           # torch.compile (CUDA)

    def __post_init__(self):
        self.ch_mult = tuple(self.ch_mult)

    @property
    def f(self):
        """Downsampling factor."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def side(self):
        """Tokens in a row."""
        return self.image_size // self.f // self.patch_size


# The release: one tokenizer, three transformers. 1,281,167 images, 800 epochs in batches of 2048
RELEASE = dict(data="imagenet256", image_size=256, num_classes=1000, flip=True, ch=128, groups=32,
               ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, latent_dim=16, kl_weight=1e-6, lpips="download",
               disc_layers=3, disc_width=64, batch_size=256, train_steps_tokenizer=250_000, disc_start=50_001,
               lr_tokenizer=1e-4, warmup_tokenizer=0, patch_size=1, buffer=64, mask_ratio_min=0.7, dropout=0.1,
               noise_levels=4, level_power=1.0, batch_size_prior=2048, train_steps_prior=500_000, lr_prior=8e-4,
               warmup=62_500, cosine=False, ema=0.9999, sample_steps=256, denoise_steps=100, temperature=1.0,
               clip_x0=0.0, guidance_schedule="linear", log_every=50, save_every=2000)


def released(width, depth, heads, head_depth, head_width, guidance):
    """The config of one row of the release's table."""
    return Config(**RELEASE | dict(width=width, decoder_width=width, encoder_depth=depth, decoder_depth=depth,
                                   heads=heads, head_depth=head_depth, head_width=head_width, guidance=guidance))


PRESETS = {
    "demo": Config(),
    "mnist": Config(data="mnist", image_size=28, num_classes=10, patch_size=1, width=128, decoder_width=128,
                    batch_size_prior=32, lr_prior=1e-3, sample_steps=12),
    "cifar10": Config(data="cifar10", image_size=32, num_classes=10, flip=True, ch=32, ch_mult=(1, 1, 2), latent_dim=8,
                      kl_weight=0.03, disc_start=2000, train_steps_tokenizer=2500, patch_size=2, width=192,
                      decoder_width=192, encoder_depth=3, decoder_depth=3, heads=6, mask_ratio_min=0.5, head_width=256,
                      head_depth=3, noise_levels=3, batch_size_prior=16, lr_prior=7e-4, warmup=200,
                      train_steps_prior=10_000, sample_steps=16, denoise_steps=100, temperature=0.9, clip_x0=4.0,
                      guidance=5.0),
    "imagenet256-base": released(768, 12, 12, 6, 1024, 2.9),
    "imagenet256-large": released(1024, 16, 16, 8, 1280, 3.0),
    "imagenet256-huge": released(1280, 20, 16, 12, 1536, 3.2),
}


# === Tokenizer: images <-> continuous latents =========================================================================
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


class Posterior:
    """What the encoder says of an image's latents: a Gaussian for each.  moments (B, 2 E, h, w): mean, log variance.

    Source: models/vae.py DiagonalGaussianDistribution.
    """
    def __init__(self, moments):
        self.mean, log_variance = moments.float().chunk(2, 1)
        self.log_variance = log_variance.clamp(-30, 20)

    def sample(self, noise=None):
        """noise: normal, of the mean's shape -> latents; None: the mean."""
        return self.mean if noise is None else self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self):
        """Distance from a standard normal distribution in nats, summed over an image -> (B,)."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).sum((1, 2, 3))

    def nll(self, x):
        """-log density of latents in nats, summed over an image -> (B,)."""
        square = (x - self.mean).square() / self.log_variance.exp()
        return 0.5 * (math.log(2 * math.pi) + self.log_variance + square).sum((1, 2, 3))


class AutoencoderKL(nn.Module):
    """images <-> latents (B, E, h, w), normalised: mean 0, deviation 1 in every channel once measure has seen them.

    QUIRK: the encoder's lowest level has attention, the decoder's has none: left out by oversight in the release.
    Source: models/vae.py.   Raises UserError where config makes no sense.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        self.f = c.f
        sizes = lambda attention: (c.ch, c.ch_mult, c.num_res_blocks, attention, c.image_size)
        self.encoder = Encoder(3, *sizes((c.image_size // c.f,)), 2 * c.latent_dim, c.groups)
        self.decoder = Decoder(3, *sizes(()), c.latent_dim, c.groups)
        self.quant_conv = nn.Conv2d(2 * c.latent_dim, 2 * c.latent_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_dim, c.latent_dim, 1)
        self.register_buffer("latent_mean", torch.zeros(c.latent_dim, 1, 1))
        self.register_buffer("latent_std", torch.ones(c.latent_dim, 1, 1))      # release: 1 / 0.2325 for all

    def posterior(self, images):
        """images (B, 3, H, W) in [-1, 1] -> Posterior. ValueError: not of this form."""
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.f or not side for side in images.shape[2:]):
            raise ValueError(f"images must be (B, 3, H, W), H and W positive multiples of {self.f}, "
                             f"not {tuple(images.shape)}")
        return Posterior(self.quant_conv(self.encoder(images)))

    def normalise(self, z):
        return (z - self.latent_mean) / self.latent_std

    @torch.no_grad()
    def measure(self, moments):
        """Set mean and deviation to those of samples of all images' moments (n, 2 E, h, w), in closed form."""
        parts = [Posterior(part) for part in moments.split(1000)]
        mean = sum(p.mean.double().sum((0, 2, 3)) for p in parts)
        square = sum((p.mean.double().square() + p.log_variance.double().exp()).sum((0, 2, 3)) for p in parts)
        n = moments[:, 0].numel()
        mean, square = mean / n, square / n
        self.latent_mean.copy_(mean[:, None, None])
        self.latent_std.copy_((square - mean.square()).sqrt()[:, None, None])

    def encode(self, images, noise=None):
        """images (B, 3, H, W) -> latents (B, E, h, w): means, or with normal noise a sample, as in training."""
        return self.normalise(self.posterior(images).sample(noise))

    def decode(self, latents):
        """latents (B, E, h, w) -> images (B, 3, H, W), in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(latents * self.latent_std + self.latent_mean))

    def forward(self, images, noise=None):
        """images -> reconstruction of the mean (noise: of a sample), {kl: nats an image}."""
        posterior = self.posterior(images)
        return self.decode(self.normalise(posterior.sample(noise))), {"kl": posterior.kl().mean()}


def build_tokenizer(config):
    return AutoencoderKL(config)


# === Prior: z for every masked token, given any others ================================================================
def patchify(latents, p):
    """(B, E, h, w) -> tokens (B, L, E p^2), row by row; in a token channel by channel."""
    return F.pixel_unshuffle(latents, p).flatten(2).transpose(1, 2)


def unpatchify(tokens, p):
    """Tokens (B, L, E p^2) of a square map -> latents (B, E, h, w)."""
    side = math.isqrt(tokens.shape[1])
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), p)


class Attention(nn.Module):
    """Every position to all.  (B, n, C) -> (B, n, C).   Source: timm 0.9.12, as the next two classes."""
    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, n, C = x.shape
        q, k, v = self.qkv(x).view(B, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(B, n, C)), self.dropout, self.training)


class Mlp(nn.Module):
    """(B, n, C) -> (B, n, C), with the exact GELU."""
    def __init__(self, width, hidden, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(width, hidden), nn.Linear(hidden, width), dropout

    def forward(self, x):
        drop = lambda x: F.dropout(x, self.dropout, self.training)
        return drop(self.fc2(drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""
    def __init__(self, width, heads, mlp_ratio=4, dropout=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, mlp_ratio * width, dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def mask_ratio(u, least=0.7):
    """Uniform u -> share of masked tokens: quantiles of a normal distribution, 1 +- 0.25, cut to [least, 1]."""
    low = torch.special.ndtr(torch.tensor((least - 1) / 0.25, dtype=torch.float64))
    return 1 + 0.25 * torch.special.ndtri(low + (0.5 - low) * u)


class MAR(nn.Module):
    """p(tokens | class) as a product over sets of tokens, in any order.   Source: models/mar.py, an MAE with a class.

    tokens are (B, L, D), masks (B, L) bool, True: masked; every row has equally many.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config, c = config, config
        self.places, D, W = c.side ** 2, c.latent_dim * c.patch_size ** 2, c.decoder_width
        positions = lambda n, width: nn.Parameter(0.02 * torch.randn(1, n, width))
        blocks = lambda depth, width: nn.ModuleList(Block(width, c.heads, c.mlp_ratio, c.dropout) for _ in range(depth))
        self.class_emb, self.fake_latent = nn.Embedding(c.num_classes, c.width), nn.Parameter(torch.empty(1, c.width))
        self.z_proj, self.z_proj_ln = nn.Linear(D, c.width), nn.LayerNorm(c.width, eps=1e-6)
        self.encoder_pos_embed_learned = positions(c.buffer + self.places, c.width)
        self.encoder_blocks = blocks(c.encoder_depth, c.width)
        self.encoder_norm = nn.LayerNorm(c.width, eps=1e-6)
        self.decoder_embed, self.mask_token = nn.Linear(c.width, W), nn.Parameter(torch.empty(1, 1, W))
        self.decoder_pos_embed_learned = positions(c.buffer + self.places, W)
        self.decoder_blocks = blocks(c.decoder_depth, W)
        self.decoder_norm = nn.LayerNorm(W, eps=1e-6)
        self.diffusion_pos_embed_learned = positions(self.places, W)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_emb.weight, self.fake_latent, self.mask_token):
            nn.init.normal_(table, std=0.02)
        self.diffloss = DiffLoss(D, W, c.head_width, c.head_depth)

    def condition(self, labels, batch):
        """labels (B,) int64 (num_classes: no class), None: no class -> vectors (B, 1, width)."""
        if labels is None or not self.config.num_classes:
            return self.fake_latent.expand(batch, 1, -1)
        none = (labels == self.config.num_classes)[:, None]
        return torch.where(none, self.fake_latent, self.class_emb(labels.masked_fill(none[:, 0], 0)))[:, None]

    def forward(self, tokens, labels=None, mask=None):
        """-> z (B, L, M), of which that at masked places is used. What stands in masked tokens does not matter.

        mask None: all are masked.
        """
        B, n = len(tokens), self.config.buffer
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
        x = torch.cat([self.condition(labels, B).expand(B, n, -1), self.z_proj(tokens)], 1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        seen = F.pad(~mask, (n, 0), value=True)
        x = x[seen].view(B, -1, x.shape[2])                                     # MAE: what is masked is not there
        for block in self.encoder_blocks:
            x = block(x)
        x = self.decoder_embed(self.encoder_norm(x))
        x = self.mask_token.to(x).expand(B, seen.shape[1], -1).masked_scatter(seen[..., None], x)
        x = x + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, n:] + self.diffusion_pos_embed_learned

    def draws(self, batch, generator=None):
        """What a training step draws -> mask (B, L), noise levels t (B, K, L) and noise (B, K, L, D) for K copies.

        One share of masked tokens for the whole batch, other places in each image.
        """
        c, L = self.config, self.places
        share = mask_ratio(torch.rand((), dtype=torch.float64, generator=generator), c.mask_ratio_min)
        mask = torch.rand(batch, L, generator=generator).argsort(1) < math.ceil(L * share)
        T, u = self.diffloss.chain.T, torch.rand(batch, c.noise_levels, L, generator=generator)
        t = (T * u ** c.level_power).long().clamp(max=T - 1)
        return mask, t, torch.randn(*t.shape, c.latent_dim * c.patch_size ** 2, generator=generator)

    def losses(self, tokens, labels, mask, t, noise):
        """-> mse, vb and t of every copy of every masked token, (n,) each. mask, t, noise: as draws gives them."""
        z, K = self(tokens, labels, mask), t.shape[1]
        where = mask[:, None].expand(t.shape)                                   # known tokens stay out of the mlp too
        copies = lambda x: x[:, None].expand(-1, K, -1, -1)[where]
        return *self.diffloss.loss(copies(tokens), copies(z), t[where], noise[where]), t[where]

    def loss(self, tokens, labels=None, mask=None, t=None, noise=None):
        """-> mean of the diffusion loss, metrics mse and vb. mask, t, noise: as draws gives them (default: drawn)."""
        if mask is None:
            mask, t, noise = (x.to(tokens.device) for x in self.draws(len(tokens)))
        mse, vb, _ = self.losses(tokens, labels, mask, t, noise)
        return (mse + vb).mean(), {"mse": mse.mean(), "vb": vb.mean()}


def build_prior(config):
    return MAR(config)


def bind(prior, tokenizer, name="the transformer"):
    """Check that a transformer reads what a tokenizer makes. UserError: other channels, or another f."""
    ours, theirs = prior.config, tokenizer.config
    if ours.latent_dim != theirs.latent_dim or ours.f != theirs.f:
        raise UserError(f"{name} reads latents of {ours.latent_dim} channels at f = {ours.f}, this tokenizer makes "
                        f"{theirs.latent_dim} at {theirs.f}")
    return prior


# === Diffusion loss: p(token | z) =====================================================================================
class Chain:
    """Diffusion over the noise levels `times`, which are some of T (None: all), with the cosine schedule.

    Source: diffusion/gaussian_diffusion.py and respace.py (OpenAI's): learned variance between two bounds, x0
    limited only if asked. Tables in float64, used in float32.
    """
    def __init__(self, times=None, T=1000):
        self.T, self.times = T, torch.from_numpy(np.arange(T) if times is None else np.asarray(times))
        u = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        abar = np.cumprod(1 - np.minimum(1 - u[1:] / u[:-1], 0.999))[self.times.numpy()]
        before = np.append(1.0, abar[:-1])
        beta = 1 - abar / before
        variance = beta * (1 - before) / (1 - abar)                             # of x_(i-1), given x_i and x_0; first 0
        self.tables = {name: torch.from_numpy(table).float() for name, table in dict(
            signal=np.sqrt(abar), noise=np.sqrt(1 - abar), recip=np.sqrt(1 / abar), recip_noise=np.sqrt(1 / abar - 1),
            coef1=beta * np.sqrt(before) / (1 - abar), coef2=(1 - before) * np.sqrt(1 - beta) / (1 - abar),
            log_beta=np.log(beta), log_variance=np.log(np.append(variance[1:2], variance[1:]))).items()}

    @staticmethod
    @functools.lru_cache
    def respaced(S, T=1000):
        """S of T levels, evenly, the first and the last among them."""
        return Chain(np.round(np.cumsum([0.0] + [(T - 1) / (S - 1)] * (S - 1))).astype(int), T)

    def at(self, i, names):
        """Rows i (n,) of tables -> (n, 1) each."""
        if self.tables["signal"].device != i.device:                            # once, not in every step
            self.tables = {name: table.to(i.device) for name, table in self.tables.items()}
        return (self.tables[name][i][:, None] for name in names.split())

    def noised(self, x, i, eps):
        """x (n, D) with noise of level i (n,)."""
        signal, noise = self.at(i, "signal noise")
        return signal * x + noise * eps

    def back(self, x, i, eps, v, limit=0.0):
        """The model's x_(i-1) from x_i: its mean and log variance; x_0. eps, v (n, D): what the network says of x_i.

        limit: of x_0. At level 999 an error of eps counts 20,000 times in it: too much for a network that is young.
        """
        recip, recip_noise, coef1, coef2, high, low = self.at(i, "recip recip_noise coef1 coef2 log_beta log_variance")
        x0, share = recip * x - recip_noise * eps, (v + 1) / 2
        x0 = x0.clamp(-limit, limit) if limit else x0
        return coef1 * x0 + coef2 * x, share * high + (1 - share) * low, x0

    def step(self, x, i, eps, v, noise, temperature=1.0, limit=0.0):
        """A draw of x_(i-1), i an int; at i = 0 the mean."""
        mean, log_variance, _ = self.back(x, torch.full((len(x),), i, device=x.device), eps, v, limit)
        return mean + temperature * (0.5 * log_variance).exp() * noise if i else mean

    def variance_loss(self, x0, x, i, eps, v):
        """Bits, on the average of the D numbers, by which the model's x_(i-1) misses the true one -> (n,).

        At i = 0 -log p(x0) of bins of 2/255, as if x0 were pixels (QUIRK). eps detached: v alone learns from it.
        """
        mean, log_variance, _ = self.back(x, i, eps.detach(), v)
        coef1, coef2, true = self.at(i, "coef1 coef2 log_variance")
        kl = 0.5 * (log_variance - true - 1 + (true - log_variance).exp()
                    + (coef1 * x0 + coef2 * x - mean).square() * (-log_variance).exp())
        cdf = lambda u: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        low, high = (cdf((x0 - mean + edge) * (-0.5 * log_variance).exp()) for edge in (-1 / 255, 1 / 255))
        p = torch.where(x0 < -0.999, high, torch.where(x0 > 0.999, 1 - low, high - low))
        return torch.where(i == 0, -p.clamp(min=1e-12).log().mean(1), kl.mean(1)) / math.log(2)


class TimestepEmbedder(nn.Module):
    """Noise levels t (n,), 0 to 999 -> (n, W): 128 cosines, then 128 sines, an mlp."""
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def waves(t):
        angle = t[:, None].float() * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        return torch.cat([angle.cos(), angle.sin()], 1)

    def forward(self, t):
        return self.mlp(self.waves(t).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """x + gate mlp((1 + scale) norm x + shift), the three made from y.  x, y (n, W) -> (n, W)."""
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """x, y (n, W) -> (n, channels); its norm has no weights of its own."""
    def __init__(self, width, channels):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class SimpleMLPAdaLN(nn.Module):
    """x_t (n, D), y (n, W) of noise level and z -> eps, v (n, D).   Source: models/diffloss.py."""
    def __init__(self, channels, z_channels, width, depth):
        super().__init__()
        self.time_embed, self.cond_embed = TimestepEmbedder(width), nn.Linear(z_channels, width)
        self.input_proj, self.final_layer = nn.Linear(channels, width), FinalLayer(width, 2 * channels)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "time_embed" in name:
                    nn.init.normal_(module.weight, std=0.02)
                if "adaLN" in name or "final_layer" in name:                    # at first nothing is said: mse 1
                    nn.init.zeros_(module.weight)

    def forward(self, x, y):
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        out = self.final_layer(x, y)
        return (out if out.dtype == torch.float64 else out.float()).chunk(2, 1)


class DiffLoss(nn.Module):
    """The loss of tokens x (n, D) given z (n, M), and how they are drawn.   Source: models/diffloss.py; section 3.2."""
    def __init__(self, channels, z_channels, width, depth):
        super().__init__()
        self.net, self.channels, self.chain = SimpleMLPAdaLN(channels, z_channels, width, depth), channels, Chain()

    def loss(self, x, z, t, noise):
        """t (n,) int64, noise (n, D) -> mse of the noise, loss of the variance in bits, (n,) each."""
        x_t = self.chain.noised(x, t, noise)
        eps, v = self.net(x_t, self.net.time_embed(t) + self.net.cond_embed(z))
        return (noise - eps).square().mean(1), self.chain.variance_loss(x, x_t, t, eps, v)

    def predict(self, x, y, guidance=1.0):
        """y (n, W), or (2n, W) of tokens with and without their class -> eps, v (n, D): eps guided, v not."""
        if len(y) == len(x):
            return self.net(x, y)
        eps, v = self.net(x.repeat(2, 1), y)
        eps, null = eps.chunk(2)
        return null + guidance * (eps - null), v.chunk(2)[0]

    def sample(self, z, z_null=None, guidance=1.0, temperature=1.0, chain=None, draw=None, clip_x0=0.0):
        """z (n, M) -> tokens (n, D). draw(n, D): normal noise for the start, then for each step (default: new).

        z_null: as z, without the class: noise = null + guidance (class - null), by z_null and by z. temperature is a
        factor of the steps' noise, not of the start's. chain: the noise levels that are gone through (default: 100).
        clip_x0: limit of the tokens that the steps head for (0: none).
        """
        chain = chain or Chain.respaced(100)
        draw, shape = draw or functools.partial(torch.randn, device=z.device), (len(z), self.channels)
        y = self.net.cond_embed(z if z_null is None else torch.cat([z, z_null]))           # the same in every step
        times, x = self.net.time_embed(chain.times.to(z.device)), draw(*shape)
        for i in reversed(range(len(chain.times))):
            x = chain.step(x, i, *self.predict(x, times[i] + y, guidance), draw(*shape), temperature, clip_x0)
        return x


# === Losses: absolute error + LPIPS, KL, patch discriminator, adaptive weight =========================================
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


def generator_loss(config, images, again, kl, last_layer, perceptual=None, discriminator=None):
    """|x - again| + LPIPS, summed over an image; + kl_weight kl; + weighted -mean D(again) -> loss, metrics.

    perceptual None: no LPIPS; discriminator None: no GAN (yet).
    Source: CompVis/latent-diffusion ldm/modules/losses/contperceptual.py (its scale of the error stays 1 there too).
    """
    error = (images - again).abs()
    metrics = {"l1": error.mean(), "kl": kl}
    if perceptual:
        error = error + config.perceptual_weight * perceptual(images, again)    # one number, at each pixel
    nll = error.sum() / len(images)
    loss = nll + config.kl_weight * kl
    if discriminator:
        g = -discriminator(again).float().mean()
        weight = config.disc_weight * adaptive_weight(nll, g, last_layer)
        loss, metrics = loss + weight * g, metrics | {"g_loss": g, "d_weight": weight}
    return loss, metrics | {"nll": nll}


# === Sampler: one visible loop over sets of tokens ====================================================================
def schedule(L, N, guidance=1.0, kind="linear"):
    """For each of N iterations: of L tokens to draw, how many stay masked after it; its guidance.  UserError: N > L.

    A cosine, at least one token each. linear: 1 + (guidance - 1) times the share known afterwards; QUIRK: in the last
    iteration all but one count as known, so that it is never reached.
    """
    if N > L:
        raise UserError(f"{N} iterations for {L} tokens: each draws at least one, so at most {L}")
    plan, left = [], L
    for s in range(N):
        left = max(1, min(left - 1, math.floor(L * math.cos(math.pi / 2 * (s + 1) / N))))
        plan.append((left if s + 1 < N else 0, 1 + (guidance - 1) * (L - left) / L if kind == "linear" else guidance))
    return plan


@torch.no_grad()
def sample(tokenizer, prior, labels, *, known=None, hidden=None, sample_steps=None, denoise_steps=100, temperature=1.0,
           clip_x0=0.0, guidance=1.0, guidance_schedule="linear", generator=None, order=None, draw=None, trace=None):
    """Draw set after set of tokens, in an order drawn before.

    labels (B,) int64 (num_classes: no class). known (B, E, h, w): latents, of which the tokens in hidden (L,) bool are
    drawn anew. sample_steps: iterations, at most the tokens to draw (None: 64, or all of fewer tokens). order (B, L)
    int64: places, the first drawn last; known ones are passed over. draw(*shape): normal noise (default: the
    generator's). trace: a list that gets for each iteration {z (n, M), with guidance (2n, M), drawn (n, D), masked and
    chosen (B, L) bool, guidance, tokens (B, L, D)}. Returns images (B, 3, H, W) in [-1, 1].
    Raises UserError for too many iterations, a tokenizer of other latents, guidance without dropped labels.
    Source: models/mar.py sample_tokens.
    """
    B, c, L, device = len(labels), prior.config, prior.places, labels.device
    bind(prior, tokenizer)
    if guidance != 1 and not c.num_classes:
        raise UserError(f"guidance {guidance}: this model has no classes: use 1")
    if guidance != 1 and not c.label_dropout:
        raise UserError(f"guidance {guidance}: this model never saw dropped labels: use 1, or train with some")
    where = generator.device if generator else device
    draw = draw or (lambda *shape: torch.randn(*shape, generator=generator, device=where).to(prior.mask_token))
    hidden = torch.ones(L, dtype=torch.bool) if hidden is None else hidden
    masked, guided = hidden.to(device).expand(B, L), guidance != 1
    tokens = torch.zeros(B, L, prior.diffloss.channels) if known is None else patchify(known, c.patch_size)
    tokens = tokens.to(prior.mask_token)
    order = draw(B, L).argsort(1) if order is None else order
    rank, chain = order.argsort(1).masked_fill(~masked, L).argsort(1).argsort(1), Chain.respaced(denoise_steps)
    twice = lambda x, y: torch.cat([x, y]) if guided else x
    every, U = twice(labels, torch.full_like(labels, c.num_classes)), int(hidden.sum())
    for left, g in schedule(U, sample_steps or min(64, U), guidance, guidance_schedule):
        chosen = masked & (rank >= left)
        z, n = prior(twice(tokens, tokens), every, twice(masked, masked)), int(chosen.sum())
        z = z[twice(chosen, chosen)]                                            # (n or 2n, M), image by image, by rows
        drawn = prior.diffloss.sample(z[:n], z[n:] if guided else None, g, temperature, chain, draw, clip_x0)
        tokens = tokens.masked_scatter(chosen[..., None], drawn.to(tokens))
        if trace is not None:
            trace.append(dict(z=z, drawn=drawn, masked=masked, chosen=chosen, guidance=g, tokens=tokens))
        masked = masked & ~chosen
    return tokenizer.decode(unpatchify(tokens, c.patch_size)).clamp(-1, 1)


def hidden_tokens(box, config):
    """Which tokens a box (top, left, height, width in pixels) touches -> (L,) bool. UserError: outside, or all."""
    top, left, height, width = box
    size, p = config.image_size, config.image_size // config.side
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size or left + width > size:
        raise UserError(f"box {top} {left} {height} {width} (top, left, height, width) does not lie in a picture of "
                        f"{size} x {size} pixels")
    hidden = torch.zeros(config.side, config.side, dtype=torch.bool)
    hidden[top // p:-(-(top + height) // p), left // p:-(-(left + width) // p)] = True
    if hidden.all():
        raise UserError(f"box {top} {left} {height} {width} leaves nothing known: a token is {p} x {p} pixels")
    return hidden.flatten()


# === Training: one visible loop per stage =============================================================================
# Copied from pixelcnn.py
def backward(loss, optimizer):
    """Gradients of the optimizer's parameters, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    average(*(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None))


# Copied from pixelcnn.py
@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema += (1 - decay) (model - ema), with less decay at first: the average must not lag behind a young model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(decay, (1 + step) / (10 + step)))


def train_tokenizer(config, data, run):
    """Autoencoder and discriminator in turn, on the same reconstruction. Returns the AutoencoderKL."""
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(config).to(run.device)
    discriminator = NLayerDiscriminator(3, config.disc_width, config.disc_layers).to(run.device)
    perceptual = LPIPS().to(run.device) if config.lpips else None
    if perceptual:
        load_lpips(perceptual, config)
    else:
        print("no weights for LPIPS (--lpips): the reconstruction loss is on pixels alone")
    optimizers = [torch.optim.Adam(net.parameters(), config.lr_tokenizer, (0.5, 0.9), fused=run.device.type != "mps")
                  for net in (tokenizer, discriminator)]
    print(f"tokenizer: {sum(p.numel() for p in tokenizer.parameters()):,} parameters on {run.device}, "
          f"{len(data.train[0]):,} images of {config.data}")
    if config.compile:
        for part in (tokenizer.encoder, tokenizer.decoder.mid, *tokenizer.decoder.up):  # not the last layer, whose
            part.compile()                                                      # gradient adaptive_weight takes alone
    last_layer = tokenizer.decoder.conv_out.weight
    side = config.image_size // config.f
    for step in run.steps("tokenizer", config.train_steps_tokenizer, tokenizer=tokenizer, discriminator=discriminator,
                          optimizer=optimizers[0], optimizer_discriminator=optimizers[1]):
        generator = rng(config.seed, step)
        images = data.batch("train", config.batch_size, generator)[0]
        noise = torch.randn(len(images), config.latent_dim, side, side, generator=generator)
        images, noise = shard(mirrored(images, config, generator), noise, device=run.device)
        adversary = discriminator if config.disc_weight and step >= config.disc_start else None
        for optimizer in optimizers:
            set_lr(optimizer, config.lr_tokenizer, step, config.warmup_tokenizer, config.train_steps_tokenizer)
        # 1. the autoencoder, with the discriminator's opinion as a part of its loss
        with autocast(run.device):
            again, found = tokenizer(images, noise)
            again = again.float()
            loss, metrics = generator_loss(config, images, again, found["kl"], last_layer, perceptual, adversary)
        backward(loss, optimizers[0])
        run.log("tokenizer", step, loss=loss, **metrics)                        # raises on a NaN loss
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


def mirrored(images, config, generator):
    """Each image (B, ...) as it is or mirrored, by chance, if the config wants that."""
    if not config.flip:
        return images
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, images.flip(3), images)


# Copied from vqvae2.py
def fingerprint(tokenizer, *more):
    """SHA-256 of a tokenizer's weights and of more tensors: uint8 (32,)."""
    digest = hashlib.sha256()
    for value in (*tokenizer.state_dict().values(), *more):
        digest.update(value.cpu().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


@torch.no_grad()
def cached_moments(tokenizer, data, run):
    """Moments of the training images, and of their mirror images if wanted (1 or 2, n, 2 E, h, w), kept in
    RUN/latents.npz with the fingerprint of the encoder and the data. UserError: it is another's, or damaged.

    Means and variances, not samples: every step draws anew. A mirrored picture is encoded, not a latent mirrored.
    """
    encoder = nn.ModuleList([tokenizer.encoder, tokenizer.quant_conv])
    mark, path = fingerprint(encoder, *data.train), run.folder / "latents.npz"
    if path.exists():
        with explain(f"{path} is damaged", "delete it, and it is made again"), np.load(path) as file:
            made_of, moments = file["made_of"], torch.from_numpy(file["moments"])
        if not np.array_equal(made_of, mark.numpy()) or len(moments) != 1 + run.config.flip:
            raise UserError(f"{path} was made by another tokenizer or of other images: delete it, and it is made again")
        return moments
    def encode(images):
        return torch.cat([tokenizer.quant_conv(tokenizer.encoder(part.to(run.device) / 127.5 - 1)).float().cpu()
                          for part in tqdm(images.split(at_once(run.config)), "latents", leave=False, disable=None)])
    moments = torch.stack([encode(x) for x in (data.train[0], data.train[0].flip(3))[:1 + run.config.flip]])
    moments = moments.contiguous()                                              # as the file gives it: the same bits
    if run.is_main:
        np.savez(buffer := io.BytesIO(), made_of=mark.numpy(), moments=moments.numpy())
        write_file(path, buffer.getbuffer())
    return moments


def parameter_groups(prior):
    """Weight decay on matrices, embedding and tables; not on biases and norms, nor on any of DiffLoss."""
    decays = lambda name, p: not (name.startswith("diffloss") or p.ndim == 1)
    groups = [[p for name, p in prior.named_parameters() if decays(name, p) == wanted] for wanted in (True, False)]
    return [dict(params=groups[0]), dict(params=groups[1], weight_decay=0.0)]


def learning_rate(step, total, lr, warmup, cosine=False, lr_end=0.0):
    """A line from 0 to lr in the warm-up; then constant, or a cosine to lr_end.   Source: util/lr_sched.py."""
    if step < warmup:
        return lr * step / warmup
    return lr_end + (lr - lr_end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) if cosine else lr


def train_prior(config, data, run, tokenizer):
    """Diffusion loss of masked latents of the training images, given the others. Returns the averaged weights."""
    torch.manual_seed(config.seed)
    prior, ema = (build_prior(config).to(run.device) for _ in range(2))
    ema.load_state_dict(prior.state_dict())
    moments, all_labels = cached_moments(tokenizer, data, run), data.train[1]
    tokenizer.measure(moments.flatten(0, 1))
    optimizer = torch.optim.AdamW(parameter_groups(prior), config.lr_prior, (0.9, 0.95),
                                  weight_decay=config.weight_decay, fused=run.device.type != "mps")
    if config.compile:
        prior.losses = torch.compile(prior.losses)
    std = tokenizer.latent_std.flatten().tolist()
    print(f"prior: {sum(p.numel() for p in prior.parameters()):,} parameters, of which the diffusion loss "
          f"{sum(p.numel() for p in prior.diffloss.parameters()):,}; {prior.places} tokens an image; deviations of the "
          f"latents' channels {min(std):.2f} to {max(std):.2f}; mse of a model that says nothing: 1")
    for step in run.steps("prior", config.train_steps_prior, prior=prior, prior_ema=ema, optimizer_prior=optimizer):
        generator = rng(config.seed, step)
        rank = dist.get_rank() if dist.is_initialized() else 0                  # dropout: every process its own
        torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)) + rank)
        B = config.batch_size_prior
        index, mirror = (torch.randint(n, (B,), generator=generator) for n in (moments.shape[1], len(moments)))
        posterior, labels = Posterior(moments[mirror, index]), all_labels[index]
        latents = posterior.sample(torch.randn(posterior.mean.shape, generator=generator))
        if config.num_classes:
            dropped = torch.rand(labels.shape, generator=generator) < config.label_dropout
            labels = labels.masked_fill(dropped, config.num_classes)
        latents, *more = shard(latents, labels, *prior.draws(B, generator), device=run.device)
        tokens = patchify(tokenizer.normalise(latents), config.patch_size)
        with autocast(run.device):
            loss, metrics = prior.loss(tokens, *more)
        backward(loss, optimizer)
        length = nn.utils.clip_grad_norm_(prior.parameters(), config.clip or math.inf)
        run.log("prior", step, loss=loss, grad_norm=length, **metrics)          # raises on NaN before a weight changes
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train_steps_prior, config.lr_prior, config.warmup, config.cosine,
                                        config.lr_end * config.lr_prior)
        optimizer.step()
        update_ema(ema, prior, step, config.ema)
    return ema.eval()


# === Official weights: LTH14/mar ======================================================================================
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
    """Released weights -> AutoencoderKL or MAR (its averaged weights), in eval mode.

    source: path or state dict. config: the constructor arguments, of which patch_size and the numbers of heads are
    read, which shapes do not tell; else those of the release whose width fits. Every name and shape must fit:
    else UserError with the first five that do not.
    """
    torch.serialization.add_safe_globals([argparse.Namespace])                  # the release keeps its arguments
    name = "the dict" if isinstance(source, dict) else source
    state, given = dict(read_weights(source)), config or {}                     # its own: it is emptied below
    def size(key, axis=0):
        if key not in state or state[key].ndim <= axis:
            raise ValueError(f"{key} is not in it, or of another shape")
        return state[key].shape[axis]
    count = lambda pattern: len({match[1] for match in map(re.compile(pattern).match, state) if match})
    with explain(f"{name} is no model of this paper", "its shapes make no sense"), torch.device("meta"):
        if "encoder_pos_embed_learned" in state:
            width, p, places = size("z_proj.weight"), given.get("patch_size", 1), size("diffusion_pos_embed_learned", 1)
            side, buffer = math.isqrt(places), size("encoder_pos_embed_learned", 1) - places
            heads = given.get("encoder_num_heads", {768: 12, 1024: 16, 1280: 16}.get(width, int(width < 64)))
            if not heads:
                raise UserError(f"{name}: {width} wide as no release: how many heads? config=dict(encoder_num_heads=4)")
            if given.get("decoder_num_heads", heads) != heads:
                raise UserError(f"{name}: encoder and decoder differ in heads, which this file cannot build")
            model = MAR(Config(**RELEASE | dict(
                image_size=16 * side * p, num_classes=size("class_emb.weight"), patch_size=p,
                latent_dim=size("z_proj.weight", 1) // p ** 2, width=width, decoder_width=size("decoder_embed.weight"),
                encoder_depth=count(r"encoder_blocks\.(\d+)"), decoder_depth=count(r"decoder_blocks\.(\d+)"),
                heads=heads, mlp_ratio=size("encoder_blocks.0.mlp.fc1.weight") // width, buffer=buffer,
                head_width=size("diffloss.net.input_proj.weight"), sample_steps=1, disc_weight=0.0,    # small ones too
                head_depth=count(r"diffloss\.net\.res_blocks\.(\d+)"))))
        elif "encoder.conv_in.weight" in state:
            depth, ch = count(r"encoder\.down\.(\d+)"), size("encoder.conv_in.weight")
            model = AutoencoderKL(Config(**RELEASE | dict(
                image_size=16 * 2 ** (depth - 1), num_classes=0, ch=ch, sample_steps=1,
                latent_dim=size("post_quant_conv.weight"),
                ch_mult=[size(f"encoder.down.{i}.block.0.conv1.weight") // max(1, ch) for i in range(depth)],
                num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)"), disc_weight=0.0)))
            E = model.config.latent_dim
            state = state | {"latent_mean": torch.zeros(E, 1, 1, device="cpu"),
                             "latent_std": torch.full((E, 1, 1), 1 / 0.2325, device="cpu")}
        else:
            raise ValueError("neither encoder.conv_in.weight nor encoder_pos_embed_learned is in it")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    wrong = [key for key in {**state, **shapes} if key not in state or state[key].shape != shapes.get(key)]
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
    for names, least in (("batch_size batch_size_prior log_every save_every image_size num_res_blocks latent_dim "
                          "disc_layers disc_width width decoder_width encoder_depth decoder_depth heads mlp_ratio "
                          "buffer patch_size head_width head_depth noise_levels sample_steps", 1),
                         ("temperature clip_x0 warmup warmup_tokenizer train_images test_images train_steps_tokenizer "
                          "train_steps_prior num_classes disc_start disc_weight kl_weight perceptual_weight clip "
                          "weight_decay lr_end", 0)):
        for name in names.split():
            need(getattr(c, name) >= least, f"{name} is {getattr(c, name)}: at least {least}")
    for name in ("label_dropout", "dropout", "mask_ratio_min", "ema"):
        need(0 <= getattr(c, name) < 1, f"{name} is {getattr(c, name)}: at least 0, below 1")
    need(c.level_power > 0, f"level_power is {c.level_power}: above 0")
    need(c.guidance_schedule in ("linear", "constant"), f"guidance_schedule {c.guidance_schedule}: linear or constant")
    need(-100 <= c.guidance <= 100, f"guidance is {c.guidance}: a number up to 100, 1 for none")
    need(c.temperature <= 100, f"temperature is {c.temperature}: a number up to 100, 1 as trained")
    need(c.lr_tokenizer > 0 and c.lr_prior > 0, "lr_tokenizer and lr_prior must be positive")
    need(not c.lpips or c.image_size >= 16, f"LPIPS needs images of at least 16 pixels, these have {c.image_size}")
    need(0 <= c.seed < 2 ** 63, f"seed {c.seed}: 0 to 2**63 - 1")
    need(c.ch_mult and min(c.ch_mult) > 0, "ch_mult needs a positive number for each level")
    need(c.ch > 0 and c.groups > 0 and c.ch % c.groups == 0, f"ch {c.ch} is not divisible by groups, {c.groups}")
    need(c.width % c.heads == 0 and c.decoder_width % c.heads == 0,
         f"width {c.width} or decoder_width {c.decoder_width} is not divisible by heads, {c.heads}")
    need(c.image_size % (c.f * c.patch_size) == 0,
         f"images of {c.image_size} pixels are not divisible by f = {c.f} times patch_size {c.patch_size}")
    need(c.sample_steps <= c.side ** 2, f"sample_steps {c.sample_steps}: each iteration draws at least one token, and "
         f"there are {c.side ** 2}")
    need(2 <= c.denoise_steps <= 1000, f"denoise_steps {c.denoise_steps}: 2 to 1000")
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


def center_crop(image, size):
    """The centred square of an RGB image, as ADM and the release cut it.   Source: util/crop.py center_crop_arr."""
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def read_image(file, size):
    """The centred square of an image file -> uint8 (size, size, 3)."""
    return np.asarray(center_crop(open_image(file), size))


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
    run.folder, run.device = Path("."), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modules = [from_official(file).to(run.device) for file in args.official]
    for module, wanted, file in zip(modules, (AutoencoderKL, MAR), args.official):
        if not isinstance(module, wanted):
            raise UserError(f"{file} is no {wanted.__name__}: give the tokenizer first, then its transformer")
    run.config = modules[0].config
    if len(modules) > 1:
        prior = bind(modules[1], modules[0], args.official[1])
        run.config = dataclasses.replace(prior.config, sample_steps=min(64, prior.places), guidance=3.0)
    run.state = {"classes": [str(i) for i in range(run.config.num_classes)]}
    return run, modules[0], prior


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


# Copied from var.py
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


@torch.no_grad()
def edit_command(args, run, tokenizer, prior):
    """Each row: an image, what of it is known, and what the model makes of that, --num times."""
    (images, labels), S, num = read_photos(args, run), run.config.image_size, args.num or 6
    labels, box = labels_of(args, run, images, labels), getattr(args, "box", None) or (S // 2, 0, S - S // 2, S)
    hidden = hidden_tokens(box, run.config)
    def draw(images, labels, sample_steps, **more):
        return sample(tokenizer, prior, labels, known=tokenizer.encode(images), hidden=hidden,
                      sample_steps=min(sample_steps, int(hidden.sum())), **more)
    drawn = draw_images(args, run, draw, images.repeat_interleave(num, 0), labels.repeat_interleave(num))
    shown = F.interpolate(hidden.float().view(1, 1, *[run.config.side] * 2), (S, S)).bool()
    show_edits(args, run, images, shown, drawn, "completions.png" if args.verb == "complete" else "inpainted.png")


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
    """Reconstruction, diffusion loss of the test images (levels and masks drawn as in training), speed, size."""
    data = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir))
    (images, labels), c, quality, kl, rows = data.test, run.config, [], [], []
    generator = torch.Generator().manual_seed(0)
    for x, y in zip(images.split(at_once(c)), labels.split(at_once(c))):
        x = x.to(run.device) / 127.5 - 1
        posterior = tokenizer.posterior(x)
        latents = tokenizer.normalise(posterior.mean)
        quality.append(psnr(x, tokenizer.decode(latents).clamp(-1, 1)).cpu())
        kl.append(posterior.kl().cpu())
        noise = torch.randn(latents.shape, generator=generator).to(run.device)
        tokens = patchify(tokenizer.normalise(posterior.sample(noise)), c.patch_size)
        mask, t, noise = (part.to(run.device) for part in prior.draws(len(x), generator))
        rows.append(torch.stack(prior.losses(tokens, y.to(run.device), mask, t, noise), 1).cpu())
    mse, vb, t = torch.cat(rows).T
    by_level = [mse[(t * 10 // prior.diffloss.chain.T) == i] for i in range(10)]
    by_level = [float(values.mean()) if len(values) else None for values in by_level]   # few images: none drawn there
    num, start = min(16, at_once(c), len(labels)), time.time()
    sample(tokenizer, prior, labels[:num].to(run.device), sample_steps=c.sample_steps, denoise_steps=c.denoise_steps,
           temperature=c.temperature, clip_x0=c.clip_x0, guidance=c.guidance if c.num_classes else 1.0,
           guidance_schedule=c.guidance_schedule, generator=torch.Generator(run.device).manual_seed(0)).cpu()
    seconds, count = time.time() - start, lambda module: sum(p.numel() for p in module.parameters())
    report = dict(
        file=f"{NAME}.py", data=Path(c.data).name, image_size=c.image_size, tokens_per_image=prior.places,
        parameters_tokenizer=count(tokenizer), parameters_prior=count(prior), parameters_head=count(prior.diffloss),
        samples_per_second=num / seconds,
        psnr=float(torch.cat(quality).mean()),
        kl_nats_per_image=float(torch.cat(kl).mean()), diffusion_loss=float((mse + vb).mean()), mse=float(mse.mean()),
        vb=float(vb.mean()), mse_by_tenth_of_noise_levels=by_level, test_images=len(images),
        peak_memory_mib=peak_memory(), train_steps=sum(run.state["progress"].values()),
        train_seconds=run.state["seconds"], threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        command=f"python {NAME}.py evaluate {run.folder}")
    report["parameters"] = report["parameters_tokenizer"] + report["parameters_prior"]
    levels = " ".join("-" if x is None else f"{x:.3f}" for x in by_level)
    print(f"test: PSNR {report['psnr']:.2f} dB; diffusion loss {report['diffusion_loss']:.4f}: mse {report['mse']:.4f} "
          f"(by noise level {levels}), variance {report['vb']:.4f} bits")
    write_file(run.folder / "report.json", json.dumps(report, indent=1).encode())
    print(f"{run.folder / 'report.json'}   next: python {NAME}.py sample {run.folder}")


SETTINGS = "sample_steps denoise_steps temperature clip_x0 guidance guidance_schedule"   # of sample, and in Config
RUN = ("run --official --out --num --seed --labels --sample-steps --denoise-steps --temperature --clip-x0 --guidance "
       "--guidance-schedule")
EDIT = f"{RUN} photos --data-dir"
FLAGS = {
    "run": dict(nargs="?", help="run folder"),
    "photos": dict(nargs="*", help="image files, right behind the run (none: the first test images)"),
    "--official": dict(nargs="+", metavar="FILE", help="released tokenizer and its transformer (photos go before it)"),
    "--data-dir": dict(help="where mnist and cifar10 are (default: where training found them)"),
    "--out": dict(help="PNG to write (default: in the run folder)"),
    "--labels": dict(nargs="+", help="classes by number or name, repeated in turn (default: the images', or all)"),
    "--num": dict(type=positive, help="images to draw; where there are photos: of each"),
    "--sample-steps": dict(type=positive, help="iterations: sets of tokens (default: the run's)"),
    "--denoise-steps": dict(type=positive, help="diffusion steps for each token (default: the run's)"),
    "--temperature": dict(type=float, help="factor of the noise of the diffusion steps (default: the run's)"),
    "--clip-x0": dict(type=float, help="limit of predicted latents, 0 for none (default: the run's)"),
    "--guidance": dict(type=float, help="no class + g (class - no class), g up to this (default: the run's)"),
    "--guidance-schedule": dict(choices=("linear", "constant"), help="how g gets there (default: the run's)"),
    "--box": dict(required=True, type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"), help="in model pixels"),
    "--seed": dict(type=int, default=0, help="of the generator that draws")}
VERBS = {   # name: (function, help, flags)
    "sample": (sample_command, "draw images by class", RUN),
    "complete": (edit_command, "hide the lower half of images and draw it anew", EDIT),
    "inpaint": (edit_command, "draw a box of images anew", f"{EDIT} --box"),
    "reconstruct": (reconstruct_command, "images through the tokenizer, side by side, with PSNR",
                    "run --official photos --data-dir --out"),
    "evaluate": (evaluate_command, "PSNR, diffusion loss, speed, size: writes RUN/report.json", "run --data-dir")}

if __name__ == "__main__":
    main()
