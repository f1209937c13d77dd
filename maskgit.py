# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66", "pillow>=10"]
# ///
"""MaskGIT: all codes of a picture are predicted at once, the surest are kept, the others masked and predicted again.

    MaskGIT: Masked Generative Image Transformer, Chang, Zhang, Jiang, Liu, Freeman, CVPR 2022, arXiv 2202.04200
    Release: google-research/maskgit (Flax; no training code); this file computes what it computes and loads its weights

The idea. A GPT draws a picture's codes one by one in an order that is no picture's: row by row, each code blind to all
that is below it. MaskGIT trains a bidirectional transformer as BERT is trained: some codes are hidden, and it tells
them from the others; but the share of hidden codes is itself random, from nearly none to all. So it can start from
nothing: hide all codes, predict all, keep the few it is surest of, predict the rest again from these, and so on.
8 passes give 256 codes. How many codes stay hidden after each pass is the mask schedule; the cosine (few codes first,
many last) is best. And as any set of codes may be given, inpainting and outpainting need no other model.

    images (B,3,H,W) -> Encoder -> z (B,E,h,w) -> nearest of V codes -> tokens (B,N) -> Decoder -> images
    training: tokens, hidden at random -> Transformer -> logits (B,N,V) -> cross-entropy at the hidden positions
    sampling: all hidden -> [ logits -> draw every hidden code -> hide the least confident again ] x steps -> Decoder

Glossary
    f, h, w    downsampling factor 2^(levels - 1); height and width of the code map;   N = h w tokens
    V, E       codebook entries, width of a code
    [MASK]     a hidden token: id -1, which reads the last row of the embedding table, as in the release
    M          width of the transformer
    r, gamma   share of the steps done (in training: uniform in [0, 1)); gamma(r): share of the tokens that is masked
    confidence log-probability of the drawn code + choice_temperature (1 - r) Gumbel noise; of a known token: infinity

Run
    python maskgit.py                                               the demo: nine shapes by class, minutes on two cores
    python maskgit.py train --preset cifar10 --data FOLDER_OR_ZIP --out RUN
    python maskgit.py sample RUN --labels cat dog --sample-steps 12   (also: complete, reconstruct, evaluate; --help)
    python maskgit.py inpaint RUN photo.jpg --mask hole.png         white is drawn anew
    python maskgit.py replace RUN photo.jpg --box 8 8 16 16 --labels dog
    python maskgit.py outpaint RUN photo.jpg --right 64

Contents   Config and presets, Tokenizer, Prior, Losses, Sampler, Training, Official weights, Helpers, Command line
Not here   the Gumbel quantizer, which no released model uses; the family: Muse, Paella, Halton's order, TiTok (these
           are in notebooks/05_maskgit.ipynb); the config's min_masking_rate, unused in the release.
Departs    No training code was released: written from its configs and losses and from MAGVIT's trainers (same lab);
           but masks are counted as in the paper (rounded up). Inpainting and outpainting are the paper's, whose models
           of them, without classes, are not released. The perceptual loss takes torchvision's ResNet-50, with its
           normalisation. Attention dropout is drawn for every head and image, not once for all. Guidance by dropped
           labels, running means as codes and the restart of unused ones are not the release's (off in the paper's
           presets). Pictures are not augmented. One r is drawn for each picture of a batch. On CUDA convolutions run in
           TF32 unless torch.backends.cudnn.allow_tf32 is set to False, which may turn a few codes.
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
import struct
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
from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm


# === Config and presets: every number of both stages ==================================================================
@dataclass
class Config:
    """All settings; each comment is also the flag's --help. The defaults are the demo."""
    data: str = "shapes"            # shapes, mnist, cifar10, or a folder or .zip with train/<class>/*, test/<class>/*
    data_dir: str = "data"          # where mnist, cifar10 and ResNet-50's weights are looked for, or downloaded to
    train_images: int = 0           # use only this many training images (0: all; of the endless shapes 20,000)
    test_images: int = 0            # use only this many test images (0: all; of the endless shapes 2,000)
    skip_corrupt: bool = False      # leave out images that cannot be read, instead of stopping
    image_size: int = 24            # side of the (square) images in pixels
    num_classes: int = 9            # classes the transformer is told (0: none)
    # tokenizer
    ch: int = 48                    # width of the first level, a multiple of the groups (release: 128)
    groups: int = 8                 # groups of GroupNorm (release: 32)
    ch_mult: tuple = (1, 1, 1)      # widths of the levels in units of ch; each level but the last halves the side
    num_res_blocks: int = 1         # residual blocks per level, and in the middle of encoder and decoder (release: 2)
    code_dim: int = 8               # E, width of a code
    codebook_size: int = 128        # V, codes
    beta: float = 0.05              # weight of the commitment term (release: 0.25)
    entropy_weight: float = 0.001   # weight of the entropy term (release: 0.1)
    entropy_temperature: float = 0.01  # squared distances are divided by it in the entropy term
    codebook_decay: float = 0.95    # decay of the running means that the codes are (release: 0, by gradient)
    restart: int = 20               # a code unused for so many steps moves to a random latent of the batch (0: never)
    perceptual: str = ""            # perceptual loss: "" none, download, or a file with torchvision's ResNet-50
    perceptual_weight: float = 0.1  # its weight beside the squared error
    gan: str = "non-saturating"     # losses of generator and discriminator: non-saturating or hinge
    disc_weight: float = 0.02       # weight of the GAN's term (0: no GAN; release: 0.1)
    disc_start: int = 680           # first step of the GAN; before it the discriminator does not learn (release: 0)
    disc_width: int = 32            # widest layers of the discriminator (release: 512)
    r1_weight: float = 10.0         # weight of the squared gradient of the discriminator at real images
    # transformer
    width: int = 128                # M, width of the transformer
    heads: int = 4                  # attention heads
    layers: int = 4                 # transformer layers
    mlp_ratio: int = 4              # width of the layers' hidden units in units of M
    dropout: float = 0.0            # of embeddings, attention, its output and the mlp's (release: 0.1)
    label_dropout: float = 0.1      # share of labels replaced by "no class", which guidance needs (release: 0)
    label_smoothing: float = 0.1    # share of the target spread evenly over all codes
    schedule: str = "cosine"        # mask schedule: cosine, linear, square, cubic, sqrt, log, exponential, or pow2.5
    # training
    seed: int = 0                   # a step is a function of (seed, step)
    batch_size: int = 16            # images per step of the tokenizer, over all processes
    batch_size_prior: int = 16      # images per step of the transformer, over all processes
    train_steps_tokenizer: int = 750  # steps of the tokenizer
    train_steps_prior: int = 3500   # steps of the transformer
    lr_tokenizer: float = 2e-3      # learning rate of autoencoder and discriminator (release: 1e-4)
    lr_prior: float = 2e-3          # learning rate of the transformer (release: 1e-4)
    warmup_tokenizer: int = 30      # steps of warm-up of the tokenizer; then a cosine to zero (0: constant)
    warmup: int = 100               # steps of warm-up of the transformer; then a cosine to zero (0: constant)
    clip: float = 1.0               # gradients of the transformer are scaled down to this norm (0: never)
    ema: float = 0.999              # decay of the averaged weights, which sampling uses (0: the weights themselves)
    log_every: int = 10             # steps between two rows of metrics.jsonl
    save_every: int = 250           # steps between two checkpoints
    sample_steps: int = 12          # passes of the transformer for a picture
    temperature: float = 0.7        # logits are divided by it in sampling (release: 1)
    choice_temperature: float = 4.5  # noise on the confidence, falling to 0 at the last step: which codes come first
    guidance: float = 2.5           # logits = no class + guidance (class - no class); 1: none
    compile: bool = False           # torch.compile (CUDA)

    def __post_init__(self):
        self.ch_mult = tuple(self.ch_mult)

    @property
    def f(self):
        """Downsampling factor."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def side(self):
        """Side of the code map."""
        return self.image_size // self.f

    @property
    def class_rows(self):
        """Rows of the embedding table between the codes and [MASK]: classes, and "no class" where it occurs."""
        return self.num_classes + (self.num_classes == 0 or self.label_dropout > 0)


# The release's configs; passes by the paper, their noise by its notebook. The transformer's rate after its warm-up is
# constant in the config, a cosine in MAGVIT's trainer and here
RELEASE = dict(num_classes=1000, ch=128, groups=32, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, code_dim=256,
               codebook_size=1024, beta=0.25, entropy_weight=0.1, codebook_decay=0.0, restart=0, perceptual="download",
               disc_weight=0.1, disc_start=0, disc_width=512, width=768, heads=16, layers=24, dropout=0.1,
               label_dropout=0.0, batch_size=256, batch_size_prior=256, train_steps_tokenizer=1_000_000,
               train_steps_prior=2_000_000, lr_tokenizer=1e-4, lr_prior=1e-4, warmup_tokenizer=0, warmup=5000,
               clip=0.0, temperature=1.0, guidance=1.0, log_every=50, save_every=2000)
PRESETS = {
    "demo": Config(),
    "mnist": Config(data="mnist", image_size=28, num_classes=10),
    "cifar10": Config(data="cifar10", image_size=32, num_classes=10, codebook_size=512, codebook_decay=0.98,
                      disc_start=2100, train_steps_tokenizer=2500, lr_tokenizer=1.5e-3, width=192, heads=6,
                      train_steps_prior=16_000, lr_prior=1e-3),
    "imagenet256": Config(**RELEASE | dict(data="imagenet256", image_size=256, sample_steps=8)),
    "imagenet512": Config(**RELEASE | dict(data="imagenet512", image_size=512, sample_steps=12)),
}


# === Tokenizer: images <-> codes ======================================================================================
# Copied from vqgan_gpt.py
def norm(width, groups):
    """GroupNorm, eps 1e-6. With one channel a group it would lose every channel's mean, and with it the colours."""
    return nn.GroupNorm(groups, width, eps=1e-6)


class ResBlock(nn.Module):
    """h = norm, swish, 3x3, norm, swish, 3x3, without biases; then x + h.  (B, C_in, H, W) -> (B, C_out, H, W).

    QUIRK: where widths differ the shortcut is a 1x1 convolution of the block's OUTPUT, h + conv(h): the release's code
    has overwritten x by then, so that such a block has no skip path.   Source: maskgit/nets/layers.py.
    """
    def __init__(self, in_channels, out_channels, groups=32):
        super().__init__()
        self.norm1 = norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


def blocks(in_channels, width, number, groups):
    """`number` residual blocks, of which the first changes the width."""
    return nn.Sequential(*(ResBlock(width if i else in_channels, width, groups) for i in range(number)))


class Level(nn.Module):
    """Residual blocks of one resolution; in the decoder then, but for the finest, every pixel as 2 x 2 and a 3x3."""
    def __init__(self, in_channels, width, number, groups, upsample=False):
        super().__init__()
        self.block = blocks(in_channels, width, number, groups)
        self.upsample_conv = nn.Conv2d(width, width, 3, padding=1) if upsample else None

    def forward(self, x):
        x = self.block(x)
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0)) if self.upsample_conv else x


class Encoder(nn.Module):
    """images (B, 3, H, W) in [0, 1] -> z (B, E, H / f, W / f). No attention; 2 x 2 means between the levels.

    Names are those of the PyTorch port (open-muse).   Source: maskgit/nets/vqgan_tokenizer.py, as all of the tokenizer.
    """
    def __init__(self, ch, ch_mult, num_res_blocks, code_dim, groups=32):
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(a, b, num_res_blocks, groups) for a, b in zip([ch, *widths], widths))
        self.mid = blocks(widths[-1], widths[-1], num_res_blocks, groups)
        self.norm_out, self.conv_out = norm(widths[-1], groups), nn.Conv2d(widths[-1], code_dim, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if i else x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """z_q (B, E, h, w) -> images (B, 3, f h, f w) around [0, 1]; neither clamped nor squashed."""
    def __init__(self, ch, ch_mult, num_res_blocks, code_dim, groups=32):
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(code_dim, widths[-1], 3, padding=1)
        self.mid = blocks(widths[-1], widths[-1], num_res_blocks, groups)
        self.up = nn.ModuleList(Level(a, b, num_res_blocks, groups, upsample=i > 0)         # up.0 is the finest
                                for i, (a, b) in enumerate(zip([*widths[1:], widths[-1]], widths)))
        self.norm_out, self.conv_out = norm(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

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


def entropy_loss(affinity, temperature=0.01, kind="softmax"):
    """Entropy of each position's p minus that of their mean: sure of its code everywhere, yet using all codes alike.

    affinity (n, V) = minus squared distances of ALL positions of the batch -> scalar, negative down to -log V. p =
    softmax(affinity / temperature); kind "argmax": the nearest code alone, with p's gradient. Source: libml/losses.py.
    """
    affinity = affinity / temperature
    p, log_p = affinity.softmax(-1), (affinity + 1e-5).log_softmax(-1)          # QUIRK: the 1e-5 does nothing
    if kind == "argmax":
        p = p + (F.one_hot(affinity.argmax(-1), p.shape[-1]).to(p) - p).detach()
    mean = p.mean(0)
    everywhere = mean.detach().clone()
    average(everywhere)                                                         # in place, over all processes
    mean = mean + (everywhere - mean.detach())
    return (mean * (mean + 1e-5).log()).sum() - (p * log_p).sum(-1).mean()


class VectorQuantizer(nn.Module):
    """The nearest of V codes for every position, no normalisation; the losses of the release, and two options of ours.

    beta mean (z - sg(e))^2 (commitment: moves the encoder) + mean (e - sg(z))^2 (moves the codes) + weighted entropy;
    sg: no gradient goes through.
    decay > 0: codes are running means of their latents (VQ-VAE appendix A.1), not trained by gradient. restart: codes
    unused for so many steps (at first: all unused ones) move to latents of the batch, the first process's.
    """
    def __init__(self, size, dim, beta=0.25, entropy_weight=0.1, temperature=0.01, decay=0.0, restart=0):
        super().__init__()
        self.beta, self.entropy_weight, self.temperature = beta, entropy_weight, temperature
        self.decay, self.restart, self.embedding = decay, restart, nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -(3 / size) ** 0.5, (3 / size) ** 0.5)      # Flax: variance 1 / V
        if decay:
            self.embedding.weight.requires_grad = False
            self.register_buffer("count", torch.ones(size))
            self.register_buffer("total", self.embedding.weight.detach().clone())
        if restart:
            self.register_buffer("idle", torch.full((size,), float(restart)))

    def indices(self, z):
        """z (B, E, h, w) -> (B, h, w) int64.  Distances in float32: in bfloat16 they tie."""
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(self.embedding.weight.dtype)
            return nearest(flat, self.embedding.weight).view(len(z), *z.shape[2:])

    def lookup(self, indices):
        """indices (B, h, w) -> z_q (B, E, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, z, generator=None):
        """z (B, E, h, w) -> z_q of that shape, indices (B, h, w), {commitment, codebook, entropy}, weighted.

        Straight-through: z gets z_q's gradient.
        """
        with torch.autocast(z.device.type, enabled=False):
            e = self.embedding.weight.clone()                   # a copy: update moves the codes before the gradient
            z = z.to(e.dtype)
            indices, flat = self.indices(z), z.permute(0, 2, 3, 1).flatten(0, 2)
            z_q = self.lookup(indices)
            distance = flat.square().sum(1, keepdim=True) - 2 * flat @ e.T + e.square().sum(1)
            losses = {"commitment": self.beta * F.mse_loss(z, z_q.detach()), "codebook": F.mse_loss(z_q, z.detach()),
                      "entropy": self.entropy_weight * entropy_loss(-distance, self.temperature)}
            if self.training and (self.decay or self.restart):
                self.update(flat.detach(), indices.flatten(), generator)
            return z + (z_q - z).detach(), indices, losses

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
    """Encoder, codebook, decoder: a VQGAN without attention.   Source: maskgit/nets/vqgan_tokenizer.py VQVAE.

    Images may have any height and width divisible by f. Outside they are in [-1, 1], inside in [0, 1], as released.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        self.f, self.codebook_size = c.f, c.codebook_size
        sizes = c.ch, c.ch_mult, c.num_res_blocks, c.code_dim, c.groups
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.quantize = VectorQuantizer(c.codebook_size, c.code_dim, c.beta, c.entropy_weight, c.entropy_temperature,
                                        c.codebook_decay, c.restart)
        for module in self.modules():                                           # Flax's initial weights, lecun_normal
            if isinstance(module, nn.Conv2d):
                std = module.weight[0].numel() ** -0.5 / 0.8796                 # 0.8796: what cutting at 2 std leaves
                nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def latents(self, images):
        """images (B, 3, H, W) -> z (B, E, h, w), before the quantizer. ValueError: not of this form."""
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.f or not side for side in images.shape[2:]):
            raise ValueError(f"images must be (B, 3, H, W), H and W positive multiples of {self.f}, "
                             f"not {tuple(images.shape)}")
        return self.encoder((images + 1) / 2)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> indices (B, h, w) int64. ValueError as latents."""
        return self.quantize.indices(self.latents(images))

    def decode(self, indices):
        """indices (B, h, w) -> images (B, 3, H, W), in [-1, 1] but for overshoot (a decoder is not clamped)."""
        return 2 * self.decoder(self.quantize.lookup(indices)) - 1

    def forward(self, images, generator=None):
        """images -> reconstruction, {commitment, codebook, entropy, perplexity (of this batch's codes)}."""
        z_q, indices, losses = self.quantize(self.latents(images), generator)
        return 2 * self.decoder(z_q) - 1, losses | {"perplexity": use(indices, self)[1]}


# Copied from vqgan_gpt.py
def use(indices, tokenizer):
    """Share of the codebook that occurs in indices, and perplexity: so many codes, used evenly, would say as much."""
    p = torch.bincount(indices.flatten(), minlength=tokenizer.codebook_size) / indices.numel()
    return (p > 0).float().mean(), (-(p * p.clamp(min=1e-12).log()).sum()).exp()


def build_tokenizer(config):
    return VQVAE(config)


# === Prior: a bidirectional transformer that tells the masked tokens from the others ==================================
class TransformerLayer(nn.Module):
    """a = LN(x + attention(x)); LN(a + mlp(a)): the norms come last, as in BERT.  (B, L, M) -> (B, L, M).

    Every position sees every other. Norms with eps 1e-12, gelu in its tanh form. Source: nets/maskgit_transformer.py.
    """
    def __init__(self, width, heads, mlp_width, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attention_output_ln, self.layer_output_ln = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))
        self.intermediate_output, self.layer_output = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def attention(self, x):
        """x (B, L, M) -> (B, L, M): of each position to all."""
        B, L, M = x.shape
        q, k, v = (layer(x).view(B, L, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, L, M))

    def forward(self, x):
        drop = lambda y: F.dropout(y, self.dropout, self.training)
        x = self.attention_output_ln(x + drop(self.attention(x)))
        h = F.gelu(self.intermediate_output(x), approximate="tanh")
        return self.layer_output_ln(x + drop(self.layer_output(h)))


class BidirectionalTransformer(nn.Module):
    """p(token i | class, the tokens that are not masked), for all masked i at once.   Source: as TransformerLayer.

    One table of V + classes (+ "no class") + 1 rows embeds codes, classes (V + label) and [MASK] (-1: the last row),
    and its first V rows are the output's weights too (tied). The class is the sequence's first token, at position 0.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        self.places, self.codebook_size = c.side ** 2, c.codebook_size
        self.word_embeddings = nn.Embedding(c.codebook_size + c.class_rows + 1, c.width)
        self.position_embeddings = nn.Embedding(1 + self.places, c.width)
        self.embeddings_ln, self.mlm_ln = (nn.LayerNorm(c.width, eps=1e-12) for _ in range(2))
        self.layers = nn.ModuleList(TransformerLayer(c.width, c.heads, c.mlp_ratio * c.width, c.dropout)
                                    for _ in range(c.layers))
        self.mlm_dense = nn.Linear(c.width, c.width)
        self.mlm_bias = nn.Parameter(torch.zeros(self.word_embeddings.num_embeddings))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):                   # cut at 2 std, not rescaled
                nn.init.trunc_normal_(module.weight, 0, 0.02, -0.04, 0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def sequence(self, tokens, labels=None):
        """tokens (B, N), labels (B,) int64 (num_classes or None: no class) -> class and tokens (B, 1 + N)."""
        c = self.config
        if labels is None or c.num_classes == 0:
            labels = torch.full((len(tokens),), c.num_classes, device=tokens.device)
            if c.class_rows == c.num_classes:
                raise UserError("this model was never without a class: give labels")
        return torch.cat([c.codebook_size + labels[:, None], tokens], 1)

    def embed(self, sequence):
        """sequence (B, L) of rows of the table (-1: [MASK]) -> (B, L, M), normalised."""
        x = self.word_embeddings(torch.where(sequence < 0, self.word_embeddings.num_embeddings - 1, sequence))
        return self.embeddings_ln(x + self.position_embeddings.weight[:sequence.shape[1]])

    def features(self, sequence):
        """sequence (B, 1 + N) -> (B, 1 + N, M), what the output matrix takes."""
        x = F.dropout(self.embed(sequence), self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        return self.mlm_ln(F.gelu(self.mlm_dense(x), approximate="tanh"))

    def forward(self, tokens, labels=None, mask=None):
        """tokens (B, N) or (B, h, w) int64, -1 = [MASK]; labels: see sequence; mask: bool of tokens' shape, True hides
        that token too -> logits (B, N, V), float32: row i is of token i. Classes and [MASK] get none."""
        if mask is not None:
            tokens = tokens.masked_fill(mask, -1)
        h = self.features(self.sequence(tokens.flatten(1), labels))[:, 1:]
        logits = F.linear(h, self.word_embeddings.weight[:self.codebook_size], self.mlm_bias[:self.codebook_size])
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(self, tokens, labels=None, mask=None, generator=None):
        """-> smoothed cross-entropy of the masked tokens in nats per token, {nats (not smoothed), accuracy}.

        The mean over each image's masked tokens, then over images: an image with few masks counts as much as one with
        many.  tokens, labels, mask: see forward; mask None: drawn anew.   Source: libml/losses.py.
        """
        tokens = tokens.flatten(1)
        mask = draw_mask(tokens.shape, self.config.schedule, generator) if mask is None else mask.flatten(1)
        mask = mask.to(tokens.device)
        logits = self(tokens, labels, mask)
        per_image = lambda x: ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        log_p = logits.log_softmax(-1)
        nats = -log_p.gather(-1, tokens[..., None])[..., 0]
        loss = torch.lerp(nats, -log_p.mean(-1), self.config.label_smoothing)   # its share is of all codes alike
        return per_image(loss), {"nats": per_image(nats), "accuracy": per_image((logits.argmax(-1) == tokens).float())}


def build_prior(config):
    return BidirectionalTransformer(config)


POWERS = {"linear": 1.0, "square": 2.0, "cubic": 3.0, "sqrt": 0.5}


def schedule(r, total, method="cosine"):
    """gamma(r): the share of `total` tokens that is masked.  r: a number or a tensor of any shape in [0, 1], total: a
    number or a tensor that fits -> tensor in [1e-6, 1].

    method: cosine, linear (the release's uniform), square, cubic, sqrt, log, exponential (exp), or powX: 1 - r^X. In
    float32, as released: float64 leaves 128 of 256 tokens at r = 2/3, not 127.   Source: libml/mask_schedule.py.
    """
    r, total = (torch.as_tensor(x, dtype=torch.float32, device="cpu") for x in (r, total))
    bits = total.clamp(min=2).log2()                                            # of one token log 1 would divide
    if method == "cosine":
        gamma = torch.cos(math.pi / 2 * r)
    elif method == "log":
        gamma = -r.log2() / bits
    elif method == "exponential":
        gamma = 1 - torch.exp2(-bits * (1 - r))
    else:
        gamma = 1 - r ** (POWERS[method] if method in POWERS else float(method.removeprefix("pow")))
    return gamma.clamp(1e-6, 1)


def draw_mask(shape, method="cosine", generator=None):
    """A training mask (B, N) on the CPU: of each image ceil(gamma(r) N) random positions, r uniform in [0, 1).

    One r for each image (MAGVIT: one for all images of a device). The class is never masked.
    """
    B, N = shape
    count = (N * schedule(torch.rand(B, 1, generator=generator), N, method)).ceil()
    return torch.rand(B, N, generator=generator).argsort(1).argsort(1) < count


# === Losses: squared error + ResNet-50's features + GAN; discriminator with R1 ========================================
class Bottleneck(nn.Module):
    """A residual block of ResNet-50 (torchvision's names): 1x1, 3x3 (stride), 1x1 to four times the width."""
    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential() if in_channels == 4 * width else nn.Sequential(
            nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        h = self.bn1(self.conv1(x)).relu()
        h = self.bn2(self.conv2(h)).relu()
        return (self.bn3(self.conv3(h)) + self.downsample(x)).relu()


class ResNet50(nn.Module):
    """Perceptual features: the last map before the mean.  images (B, 3, H, W) in [0, 1] -> (B, 2048, 7, 7). Frozen.

    Resized to 224, as MAGVIT's perceptual loss; then normalised as torchvision's weights expect (the release: not).
    """
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        for i, depth in enumerate((3, 4, 6, 3)):
            widths = [128 << i if i else 64] + [256 << i] * (depth - 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*(
                Bottleneck(width, 64 << i, 2 if i and not k else 1) for k, width in enumerate(widths))))
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)                                             # BatchNorm's statistics are ImageNet's

    def forward(self, x):
        mean, std = (x.new_tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = (F.interpolate(x, (224, 224), mode="bilinear") - mean) / std
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def downsample(x, blur=True):
    """Half the size: blurred by [1, 3, 3, 1] in both directions, or by 2 x 2 means.  (B, C, H, W) -> (B, C, H/2, W/2).

    Zeros around as TensorFlow's SAME: an odd side, which becomes (side + 1) / 2, gets one more behind.
    """
    if not blur:
        return F.avg_pool2d(x, 2)
    (C, H, W), k = x.shape[1:], x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 8
    x = F.pad(x, (1, 1 + W % 2, 1, 1 + H % 2))
    return F.conv2d(x, (k[:, None] * k).expand(C, 1, 4, 4), stride=2, groups=C)


class DiscriminatorBlock(nn.Module):
    """(leaky 3x3, down, leaky 3x3; plus down, 1x1) / sqrt 2.  (B, C_in, H, W) -> (B, C, H/2, W/2)."""
    def __init__(self, in_channels, out_channels, blur=True):
        super().__init__()
        self.blur, self.conv1 = blur, nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x):
        h = downsample(F.leaky_relu(self.conv1(x), 0.2), self.blur)
        h = F.leaky_relu(self.conv2(h), 0.2)
        return (h + self.skip(downsample(x, self.blur))) / math.sqrt(2)


class Discriminator(nn.Module):
    """StyleGAN2's, without equalised rates and minibatch deviation: one logit per image.  (B, 3, S, S) -> (B, 1).

    images in [0, 1]; the release: S a power of two, so that the last map is 4 x 4. Widths by side: `width` up to 32
    pixels, then half for each doubling.   Source: maskgit/nets/discriminator.py.
    """
    def __init__(self, size, width=512, blur=True):
        super().__init__()
        wide = lambda side: max(1, min(width, 32 * width // side))
        self.conv_in, self.blocks = nn.Conv2d(3, wide(size), 3, padding=1), nn.Sequential()
        while size > 4:
            half = (size + blur) // 2
            self.blocks.append(DiscriminatorBlock(wide(size), wide(half), blur))
            size = half
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        self.dense1, self.dense2 = nn.Linear(size ** 2 * width, width), nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.blocks(F.leaky_relu(self.conv_in(x), 0.2))
        x = F.leaky_relu(self.conv_out(x), 0.2).permute(0, 2, 3, 1).flatten(1)  # flat in the order H, W, C, as in Flax
        return self.dense2(F.leaky_relu(self.dense1(x), 0.2))


def r1_penalty(discriminator, real):
    """Logits of real images (B, 1), mean over images of D's squared gradient there. Not to be called under autocast."""
    real = real.detach().requires_grad_()
    logits = discriminator(real)
    [gradient] = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return logits, gradient.square().flatten(1).sum(1).mean()


def discriminator_loss(gan, real, fake):
    """Logits of real and of made images -> sum of both terms: softplus, or hinge: relu(1 - real) + relu(1 + fake)."""
    loss = (lambda x: F.relu(1 + x)) if gan == "hinge" else F.softplus
    return (loss(-real) + loss(fake)).mean()


def generator_loss(config, real, fake, quantizer_loss, perceptual=None, discriminator=None):
    """mean (real - fake)^2 + quantizer_loss + weighted mse of ResNet's features, weighted GAN term -> loss, metrics.

    real, fake: images (B, 3, H, W) in [0, 1], the range that the release's weights of these terms belong to.
    perceptual, discriminator None: without them. Weights are fixed, unlike VQGAN's adaptive one.
    """
    metrics = {"mse": F.mse_loss(fake, real)}
    loss = metrics["mse"] + quantizer_loss
    if perceptual:
        metrics["perceptual"] = F.mse_loss(perceptual(fake), perceptual(real))
        loss = loss + config.perceptual_weight * metrics["perceptual"]
    if discriminator:
        logits = discriminator(fake)
        metrics["g_loss"] = -logits.mean() if config.gan == "hinge" else F.softplus(-logits).mean()
        loss = loss + config.disc_weight * metrics["g_loss"]
    return loss, metrics


# === Sampler: one visible loop; editing ===============================================================================
def gumbel(like, generator=None):
    """Gumbel noise of the shape and device of `like`: argmax(logits + it) is a draw from softmax(logits)."""
    u = torch.rand(like.shape, generator=generator, device=generator.device if generator else like.device)
    return -(-u.clamp(min=1e-30).log()).log().to(like)


def least_confident(confidence, number):
    """confidence (B, N), number (B,) -> (B, N) bool: the `number` lowest of each row.

    Strictly below the (number + 1)-th lowest: ties at the cut leave fewer, never more. Source: parallel_decode.py.
    """
    cut = confidence.sort(1).values.gather(1, number[:, None])
    return confidence < cut


@torch.no_grad()
def parallel_decode(prior, tokens, labels=None, *, steps=12, start=0, method="cosine", temperature=1.0,
                    choice_temperature=4.5, guidance=1.0, generator=None, trace=None):
    """Draw the masked tokens (-1) of tokens (B, N) in passes start ... steps - 1; all others are kept as they are.

    Each pass draws every masked token, then masks the least confident again. What is not masked again is known for
    ever. labels: see the prior. method: mask schedule. start > 0 leaves out the first, most careful passes: some tokens
    are known. guidance: see Config. trace: a list that gets for each pass {step, logits (B, N, V), tokens (B, N) as
    drawn, fixed (B, N): what this pass has made known, masked (B, N): what is left, confidence (B, N)}.
    Returns tokens (B, N): the last pass's draw; its masked state would still hold one [MASK].
    UserError: no passes, temperature 0, unknown labels, guidance without dropped ones. Source: parallel_decode.py.
    """
    c = prior.config
    if not 0 <= start < steps:
        raise UserError(f"start {start}, steps {steps}: start must be 0 or more, and below steps")
    if guidance != 1 and not (c.label_dropout and c.num_classes):
        raise UserError(f"guidance {guidance}: this model never saw dropped labels: use 1, or train with some")
    if temperature <= 0:
        raise UserError(f"temperature {temperature}: above 0")
    if labels is not None and c.num_classes and not ((0 <= labels) & (labels < c.class_rows)).all():
        raise UserError(f"labels {labels.tolist()}: this model knows 0 to {c.class_rows - 1}")
    guided = guidance != 1 and labels is not None and bool((labels != c.num_classes).any())     # else both are equal
    mask = tokens < 0
    total = mask.sum(1).cpu()                                                   # of each image: holes differ in size
    for step in range(start, steps):
        logits = prior(tokens, labels)
        if guided:
            null = prior(tokens)
            logits = null + guidance * (logits - null)
        logits = logits / temperature
        drawn = torch.where(mask, (logits + gumbel(logits, generator)).argmax(-1), tokens)
        # how many stay masked: gamma of those masked at first, but fewer than now, and at least one
        r = torch.tensor(step + 1.0) / steps                                    # float32, as the schedule
        number = (total * schedule(r, total, method)).floor().long().to(mask.device)
        number = number.minimum(mask.sum(1) - 1).clamp(min=1)
        # noise on the confidence: which tokens come first is nearly random in the first passes, not in the last
        confidence = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        confidence = confidence + choice_temperature * (1 - r.item()) * gumbel(confidence, generator)
        confidence = confidence.masked_fill(~mask, math.inf)                    # not log 1: noise could lift others
        remasked = least_confident(confidence, number)
        if trace is not None:
            trace.append({"step": step, "logits": logits, "tokens": drawn, "fixed": mask & ~remasked,
                          "masked": remasked, "confidence": confidence})
        tokens, mask = drawn.masked_fill(remasked, -1), remasked
    return drawn


@torch.no_grad()
def sample(tokenizer, prior, labels, *, known=None, **decoding):
    """Draw pictures by class: parallel_decode from nothing, or from known tokens.

    labels (B,) int64 classes (num_classes: no class). known (B, N) int64: tokens, -1 where to draw. decoding: steps,
    temperature, guidance, generator, trace, ...: see parallel_decode. Returns images (B, 3, H, W) in [-1, 1].
    """
    side = prior.config.side
    if known is None:
        known = torch.full((len(labels), prior.places), -1, device=labels.device)
    return tokenizer.decode(parallel_decode(prior, known, labels, **decoding).view(-1, side, side)).clamp(-1, 1)


def box_tokens(box, f, side):
    """A box (top, left, height, width) in pixels -> (side, side) bool: its tokens, and one more on every side.

    One more, as neighbours' codes tell of it. QUIRK: all is rounded down; of a box that is not aligned to tokens the
    last one more, or even its own last, is missing. UserError: outside of the picture.   Source: maskgit/inference.py.
    """
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1 or max(top + height, left + width) > f * side:
        raise UserError(f"box {' '.join(map(str, box))} (top left height width) does not lie in the picture, "
                        f"{f * side} x {f * side} pixels")
    span = lambda a, n: slice(max(0, a // f - 1), min(side, n // f + a // f + 1))
    where = torch.zeros(side, side, dtype=torch.bool)
    where[span(top, height), span(left, width)] = True
    return where


def mask_tokens(mask, f):
    """A mask (B, H, W) of pixels, True = draw anew -> (B, h, w) bool: tokens that it touches, and one more around."""
    touched = F.max_pool2d(mask[:, None].float(), f)
    return F.max_pool2d(touched, 3, 1, 1)[:, 0] > 0


def encode_square(tokenizer, prior, images):
    """images (B, 3, S, S) -> tokens (B, h, w). UserError: of another size than the prior's."""
    tokens, side = tokenizer.encode(images), prior.config.side
    if tokens.shape[1:] != (side, side):
        raise UserError(f"images of {tuple(images.shape[2:])} pixels are {tuple(tokens.shape[1:])} tokens: this model "
                        f"draws {side} x {side}")
    return tokens


@torch.no_grad()
def inpaint(tokenizer, prior, images, where, labels=None, *, steps=12, start=None, composite=True, **decoding):
    """Draw the tokens `where` (B, h, w) of images (B, 3, S, S) anew, as labels (B,); the other tokens are kept.

    With where = box_tokens(...) and another class this is the paper's class-conditional editing, with mask_tokens(...)
    inpainting. Tokens cannot bring back exact pixels: composite takes those outside of `where` (enlarged, blurred at
    the edge by S // 16 - 1 pixels) from the images. start: see parallel_decode; by default a sixth of the steps, 2 of
    the release's 12.   Source: maskgit/inference.py.
    """
    (H, W), tokens = images.shape[2:], encode_square(tokenizer, prior, images)
    start = steps // 6 if start is None else start
    where = where.to(tokens.device).expand(tokens.shape)
    known = tokens.masked_fill(where, -1).flatten(1)
    drawn = parallel_decode(prior, known, labels, steps=steps, start=start, **decoding)
    drawn = tokenizer.decode(drawn.view(tokens.shape))
    if not composite:
        return drawn.clamp(-1, 1)
    shown = [Image.fromarray(m.cpu().numpy().astype(np.uint8) * 255).resize((W, H)).filter(
        ImageFilter.GaussianBlur(max(0, H // 16 - 1))) for m in where]
    alpha = torch.from_numpy(np.stack([np.asarray(m) for m in shown])).to(images)[:, None] / 255
    return drawn.clamp(-1, 1) * alpha + images * (1 - alpha)


@torch.no_grad()
def outpaint(tokenizer, prior, images, labels=None, *, left=0, right=0, **decoding):
    """Widen images (B, 3, S, S) by left and right tokens: the trained window slides outwards by half of its width.

    In every window the half that is there is known, the other half is drawn: first to the right, then to the left, each
    time up to the canvas's edge. -> images (B, 3, S, S + f (left + right)).
    """
    if min(left, right) < 0:
        raise UserError(f"left {left}, right {right}: at least 0 tokens")
    s, canvas = prior.config.side, F.pad(encode_square(tokenizer, prior, images), (left, right), value=-1)
    half = s // 2
    starts = [min(i, left + right) for i in range(left + half, left + right + half, half)]
    for i in starts + [max(i, 0) for i in range(left - half, -half, -half)]:
        window = canvas[:, :, i:i + s]
        window.copy_(parallel_decode(prior, window.flatten(1), labels, **decoding).view(window.shape))
    return tokenizer.decode(canvas).clamp(-1, 1)


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
    """Autoencoder and discriminator, both in every step and from the same pictures. Returns the averaged VQVAE."""
    torch.manual_seed(config.seed)
    tokenizer, ema = (build_tokenizer(config).to(run.device) for _ in range(2))
    ema.load_state_dict(tokenizer.state_dict())
    discriminator = Discriminator(config.image_size, config.disc_width).to(run.device) if config.disc_weight else None
    perceptual = ResNet50().to(run.device) if config.perceptual else None
    if perceptual:
        load_resnet(perceptual, config)
    else:
        print("no weights for ResNet-50 (--perceptual): the reconstruction loss is squared error alone")
    objects = {"tokenizer": tokenizer, "tokenizer_ema": ema}
    adam = lambda net: torch.optim.Adam([p for p in net.parameters() if p.requires_grad], config.lr_tokenizer,
                                        (0.0, 0.99), fused=run.device.type != "mps")
    optimizer = adam(tokenizer)
    if discriminator:
        opposing = adam(discriminator)
        objects |= {"discriminator": discriminator, "optimizer_discriminator": opposing}
    print(f"tokenizer: {sum(p.numel() for p in tokenizer.parameters()):,} parameters on {run.device}, "
          f"{len(data.train[0]):,} images of {config.data}")
    if config.compile:
        tokenizer.encoder.compile()                                             # not the codebook, which update changes
        tokenizer.decoder.compile()
    for step in run.steps("tokenizer", config.train_steps_tokenizer, **objects, optimizer=optimizer):
        generator = rng(config.seed, step)
        [images] = shard(data.batch("train", config.batch_size, generator)[0], device=run.device)
        adversary = discriminator if step >= config.disc_start else None
        with autocast(run.device):
            again, found = tokenizer(images, generator)
        real, fake = (images + 1) / 2, (again.float() + 1) / 2
        # 1. the autoencoder
        quantizer_loss = found["commitment"] + found["codebook"] + found["entropy"]
        loss, metrics = generator_loss(config, real, fake, quantizer_loss, perceptual, adversary)
        backward(loss, optimizer)
        # 2. the discriminator, before either has changed
        if adversary:
            logits, r1 = r1_penalty(discriminator, real)
            d_loss = discriminator_loss(config.gan, logits, discriminator(fake.detach()))
            backward(d_loss + config.r1_weight * r1, opposing)
            metrics |= {"d_loss": d_loss, "r1": r1}
        run.log("tokenizer", step, loss=loss, **found, **metrics)               # raises on NaN before a weight changes
        for each in (optimizer, opposing) if adversary else (optimizer,):
            set_lr(each, config.lr_tokenizer, step, config.warmup_tokenizer, config.train_steps_tokenizer)
            each.step()
        update_ema(ema, tokenizer, step, config.ema)
    return ema.eval()


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


def parameter_groups(prior, weight_decay=0.045):
    """Weight decay on the matrices of linear layers alone: not on biases, LayerNorm, embeddings (MAGVIT's rule)."""
    decay = {id(module.weight) for module in prior.modules() if isinstance(module, nn.Linear)}
    groups = [[p for p in prior.parameters() if (id(p) in decay) == wanted] for wanted in (True, False)]
    return [dict(params=groups[0], weight_decay=weight_decay), dict(params=groups[1], weight_decay=0.0)]


def train_prior(config, data, run, tokenizer):
    """Cross-entropy of masked tokens of the cached training images, given the others. Returns the averaged prior."""
    torch.manual_seed(config.seed)
    prior, ema = (build_prior(config).to(run.device) for _ in range(2))
    ema.load_state_dict(prior.state_dict())
    all_tokens, all_labels = cached_tokens(tokenizer, data, run), data.train[1]
    share, perplexity = use(all_tokens, tokenizer)
    if perplexity < 0.05 * config.codebook_size:
        print(f"warning: the codebook collapsed: {share:.1%} of {config.codebook_size} codes are used, perplexity "
              f"{perplexity:.1f}; try --restart 20, a smaller --lr-tokenizer or more --train-steps-tokenizer")
    optimizer = torch.optim.AdamW(parameter_groups(prior), config.lr_prior, (0.9, 0.96),
                                  fused=run.device.type != "mps")
    if config.compile:
        prior.loss = torch.compile(prior.loss)                                  # loss does not go through forward
    print(f"prior: {sum(p.numel() for p in prior.parameters()):,} parameters, {prior.places} tokens an image; "
          f"yardsticks in nats per token: {math.log(config.codebook_size):.3f} if all codes were alike, "
          f"{perplexity.log():.3f} without context")
    for step in run.steps("prior", config.train_steps_prior, prior=prior, prior_ema=ema, optimizer_prior=optimizer):
        generator = rng(config.seed, step)
        rank = dist.get_rank() if dist.is_initialized() else 0                  # dropout: every process its own
        torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)) + rank)
        index = torch.randint(len(all_tokens), (config.batch_size_prior,), generator=generator)
        tokens, labels = all_tokens[index].flatten(1), all_labels[index]
        mask = draw_mask(tokens.shape, config.schedule, generator)
        if config.num_classes and config.label_dropout:
            dropped = torch.rand(labels.shape, generator=generator) < config.label_dropout
            labels = labels.masked_fill(dropped, config.num_classes)
        tokens, labels, mask = shard(tokens, labels, mask, device=run.device)
        with autocast(run.device):
            loss, metrics = prior.loss(tokens, labels, mask)
        backward(loss, optimizer)
        length = nn.utils.clip_grad_norm_(prior.parameters(), config.clip or math.inf)
        run.log("prior", step, loss=loss, grad_norm=length, **metrics)          # raises on NaN before a weight changes
        set_lr(optimizer, config.lr_prior, step, config.warmup, config.train_steps_prior)
        optimizer.step()
        update_ema(ema, prior, step, config.ema)
    return ema.eval()


# === Official weights: google-research/maskgit (Flax), and the tokenizer's PyTorch port (open-muse) ===================
def read_msgpack(data):
    """What flax.serialization.to_bytes writes -> nested dicts of numpy arrays: the part of msgpack that it uses."""
    at = 0

    def take(n):
        nonlocal at
        at += n
        if at > len(data):
            raise ValueError("it ends too early")
        return data[at - n:at]

    def value():
        kind = number(1)
        if kind < 0x80 or kind >= 0xe0:                                         # small integers
            return kind - 256 * (kind >= 0xe0)
        if kind < 0xc0:                                                         # short maps, arrays, strings
            return {8: dictionary, 9: array}.get(kind >> 4, string)(kind & (31 if kind >= 0xa0 else 15))
        for first, widths, read in ((0xc4, (1, 2, 4), take), (0xc7, (1, 2, 4), extension), (0xd9, (1, 2, 4), string),
                                    (0xdc, (2, 4), array), (0xde, (2, 4), dictionary)):
            if first <= kind < first + len(widths):                             # a length of so many bytes, content
                return read(number(widths[kind - first]))
        if 0xcc <= kind < 0xd4:                                                 # integers of 1, 2, 4, 8 bytes
            return number(1 << (kind - 0xcc) % 4, signed=kind >= 0xd0)
        if 0xd4 <= kind < 0xd9:
            return extension(1 << kind - 0xd4)
        constants = {0xc0: lambda: None, 0xc2: lambda: False, 0xc3: lambda: True,
                     0xca: lambda: struct.unpack(">f", take(4))[0], 0xcb: lambda: struct.unpack(">d", take(8))[0]}
        return constants[kind]()

    def extension(n):                                                           # 1: an array, 3: a scalar
        kind, content = number(1), take(n)
        if kind not in (1, 3):
            raise ValueError(f"extension {kind}")
        shape, dtype, content = read_msgpack(content)
        return np.frombuffer(content, dtype).reshape(shape)
    number = lambda n, signed=False: int.from_bytes(take(n), "big", signed=signed)
    array = lambda n: [value() for _ in range(n)]
    dictionary = lambda n: {value(): value() for _ in range(n)}
    string = lambda n: bytes(take(n)).decode()
    return value()


def flatten(tree, prefix=""):
    """A nested dict -> {"a/b/c": value}; names may be flat already."""
    found = {}
    for name, value in tree.items():
        found |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def read_weights(source):
    """A checkpoint's path, a tree of parameters or a state dict -> {name: tensor}. UserError: missing, damaged, other.

    Files are Flax's msgpack bytes (the release) or torch.save's (the port). Flax's names are joined by "/".
    """
    name, hint = "the dict", "give a checkpoint of the release, or the port's .bin"
    if not isinstance(source, dict):
        name = source
        with explain(f"{source} cannot be read as a checkpoint", hint):
            data = Path(source).read_bytes()
            flax = data[:1] in [bytes([kind]) for kind in (*range(0x81, 0x90), 0xde, 0xdf)]     # a map, not empty
            source = read_msgpack(data) if flax else torch.load(io.BytesIO(data), "cpu", weights_only=True)
    if isinstance(source, dict) and "progress" in source:
        raise UserError(f"{name} is a run of this script: name its folder")
    state = {}
    with explain(f"{name} holds no names and tensors", hint):
        tree = source.get("params", source)
        for key, value in flatten(source.get("state_dict", tree) if isinstance(tree, dict) else None).items():
            value = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
            state[key.removeprefix("params/")] = value
        if not state:
            raise ValueError("it is empty")
    return state


def torch_layout(name, value):
    """A Flax parameter -> PyTorch's layout: convolutions from H W I O, matrices from I O, heads are joined."""
    if name.endswith("/kernel"):
        if value.ndim == 3:                                                     # A heads: (M, A, M/A), out: (A, M/A, M)
            value = value.flatten(0, 1) if "/out/" in name else value.flatten(1)
        return value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
    return value.flatten() if name.endswith("/bias") else value


def our_names(names):
    """Official names -> {official: ours}, which are the port's; the transformer's without Flax's scopes.

    Flax numbers the tokenizer's blocks as they run: `levels` of n blocks; in the decoder the coarsest level is first.
    """
    levels = max(1, len({name.split("/")[1] for name in names if re.match(r"decoder/Conv_\d", name)}) - 1)
    n = max(1, len({name.split("/")[1] for name in names if re.match(r"encoder/ResBlock_\d", name)}) // (levels + 1))
    inside = {"Conv_0": "conv1", "Conv_1": "conv2", "Conv_2": "nin_shortcut", "GroupNorm_0": "norm1",
              "GroupNorm_1": "norm2", "kernel": "weight", "scale": "weight", "embedding": "weight"}

    def translate(name):
        side, _, rest = name.partition("/")
        if match := re.match(r"ResBlock_(\d+)/", rest):
            k, rest = int(match[1]), rest[match.end():]
            place = f"down.{k // n}.block.{k % n}" if side == "encoder" else f"up.{levels - k // n}.block.{k % n}"
            if k >= levels * n if side == "encoder" else k < n:
                place = f"mid.{k % n}"
            return ".".join([side, place, *(inside.get(part, part) for part in rest.split("/"))])
        if match := re.match(r"Conv_(\d+)/", rest):
            k = int(match[1])
            place = "conv_in" if k == 0 else f"up.{levels - k}.upsample_conv"
            place = "conv_out" if k and (side == "encoder" or k == levels) else place
            rest = rest.replace(match[0], place + "/")
        name = re.sub(r"(Embed|MlmLayer|Attention|Mlp)_0/|self_attention/", "", f"{side}/{rest}")
        name = name.replace("GroupNorm_0", "norm_out").replace("quantizer/codebook", "quantize.embedding/weight")
        name = name.replace("TransformerLayer_", "layers/").replace("mlm_bias/bias", "mlm_bias")
        return ".".join(inside.get(part, part) for part in name.split("/"))
    return {name: translate(name) if "/" in name else name for name in names}


def from_official(source, config=None):
    """Released weights -> VQVAE or BidirectionalTransformer, in eval mode.

    source: path of a file, Flax's tree of parameters (nested, or flat with "a/b/c" as names; numpy arrays or tensors),
    or the state dict of the tokenizer's PyTorch port. config: of the constructor's arguments codebook_size is read
    (else 1024), which a transformer's shapes do not show. Every name and shape must fit: else UserError with the first
    five that do not.
    """
    given, name = read_weights(source), "the dict" if isinstance(source, dict) else source
    theirs = {new: old for old, new in our_names(given).items()}                # ours: official
    query = given.get("TransformerLayer_0/Attention_0/self_attention/query/kernel")
    with explain(f"{name} is no model of this paper", "its shapes make no sense"):
        state = {new: (torch_layout(old, given[old]) if "/" in old else given[old]).to(torch.float32, copy=True)
                 .contiguous() for new, old in theirs.items()}
        size = lambda key, axis=0: state[key].shape[axis] if key in state else 0
        count = lambda pattern: len({match[1] for match in map(re.compile(pattern).match, state) if match})
        with torch.device("meta"):
            if "word_embeddings.weight" in state:
                V, width = (config or {}).get("codebook_size", 1024), size("word_embeddings.weight", 1)
                if query is None or size("word_embeddings.weight") < V + 2:
                    raise ValueError(f"{size('word_embeddings.weight')} embeddings cannot hold {V} codes (config: "
                                     f"codebook_size), or no query in layer 0")
                model = BidirectionalTransformer(Config(**RELEASE | dict(
                    image_size=16 * math.isqrt(size("position_embeddings.weight") - 1), width=width, codebook_size=V,
                    num_classes=size("word_embeddings.weight") - V - 1, heads=query.shape[1],
                    layers=count(r"layers\.(\d+)"), mlp_ratio=size("layers.0.layer_output.weight", 1) // width,
                    sample_steps=8 if size("position_embeddings.weight") == 257 else 12)))      # 256, 512 pixels
            else:
                levels, ch = count(r"encoder\.down\.(\d+)"), size("encoder.conv_in.weight")
                model = VQVAE(Config(**RELEASE | dict(
                    image_size=256, num_classes=0, ch=ch, code_dim=size("quantize.embedding.weight", 1),
                    codebook_size=size("quantize.embedding.weight"),
                    ch_mult=[size(f"encoder.down.{i}.block.0.conv1.weight") // max(1, ch) for i in range(levels)],
                    num_res_blocks=count(r"encoder\.down\.0\.block\.(\d+)")) if levels and ch else {}))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    wrong = [theirs.get(key, key) for key in state | shapes if key not in state or state[key].shape != shapes.get(key)]
    wrong += [old for old in given if old not in theirs.values()]
    if wrong:
        raise UserError(f"{name} is no model of this paper: {len(wrong)} names or shapes do not fit, first "
                        f"{', '.join(wrong[:5])}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_resnet(net, config):
    """torchvision's weights into ResNet50: of the file config.perceptual, or looked for in data_dir and downloaded."""
    if config.perceptual != "download" and not Path(config.perceptual).is_file():
        raise UserError(f"--perceptual {config.perceptual} is no file: give download, or torchvision's resnet50 .pth")
    with explain(f"{config.perceptual} does not hold ResNet-50's weights", "give download, or torchvision's file"):
        source = Path(config.perceptual) if config.perceptual != "download" else io.BytesIO(
            *fetch("resnet50", Path(config.data_dir)))
        state = torch.load(source, map_location="cpu", weights_only=True)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        missing, unexpected = net.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]       # older files lack them
        if missing or unexpected:
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
    need(c.gan in ("non-saturating", "hinge"), f"gan {c.gan!r} is unknown: non-saturating or hinge")
    need(c.schedule in ("cosine", "log", "exponential", *POWERS) or
         re.fullmatch(r"pow(?=.*[1-9])\d*\.?\d+", c.schedule),
         f"schedule {c.schedule!r} is unknown: cosine, {', '.join(POWERS)}, log, exponential, or pow2.5 and the like")
    for names, least in (("batch_size batch_size_prior log_every save_every image_size num_res_blocks code_dim "
                          "disc_width width heads layers mlp_ratio sample_steps", 1), ("codebook_size", 2),
                         ("temperature", 1e-6),
                         ("warmup warmup_tokenizer train_images test_images train_steps_tokenizer train_steps_prior "
                          "num_classes restart disc_start disc_weight perceptual_weight r1_weight beta entropy_weight "
                          "clip choice_temperature", 0)):
        for name in names.split():
            need(getattr(c, name) >= least, f"{name} is {getattr(c, name)}: at least {least}")
    for name in ("codebook_decay", "dropout", "label_dropout", "label_smoothing", "ema"):
        need(0 <= getattr(c, name) < 1, f"{name} is {getattr(c, name)}: at least 0, below 1")
    need(-100 <= c.guidance <= 100, f"guidance is {c.guidance}: a number up to 100, 1 for none")
    need(math.isfinite(c.choice_temperature), f"choice_temperature is {c.choice_temperature}: a number, at least 0")
    need(c.lr_tokenizer > 0 and c.lr_prior > 0 and c.entropy_temperature > 0,
         "lr_tokenizer, lr_prior and entropy_temperature must be positive")
    need(0 <= c.seed < 2 ** 63, f"seed {c.seed}: 0 to 2**63 - 1")
    need(c.ch_mult and min(c.ch_mult) > 0, "ch_mult needs a positive number for each level")
    need(c.ch > 0 and c.groups > 0 and c.ch % c.groups == 0, f"ch {c.ch} is not divisible by groups, {c.groups}")
    need(c.width % c.heads == 0, f"width {c.width} is not divisible by heads, {c.heads}")
    need(c.image_size % c.f == 0, f"images of {c.image_size} pixels are not divisible by f = {c.f}")
    need(c.side >= 2, f"images of {c.image_size} pixels are one token at f = {c.f}: masks need at least 2 x 2")
    need(c.codebook_size <= 2 ** 16, f"codebook_size {c.codebook_size}: at most 65536")
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
    "resnet50": ("https://download.pytorch.org/models/", {"resnet50-0676ba61.pth": "0676ba61"})}


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
    if isinstance(tokenizer, BidirectionalTransformer) or len(args.official) > 2:
        raise UserError("--official needs the tokenizer first, then its transformer; photos stand before it")
    run = Run.__new__(Run)                                                      # no folder: pictures go to this one
    run.config, run.folder = tokenizer.config, Path(".")
    run.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if len(args.official) > 1:
        prior, V = from_official(args.official[1]), tokenizer.codebook_size
        if not isinstance(prior, BidirectionalTransformer) or prior.codebook_size != V:
            raise UserError(f"{' '.join(args.official)}: give a tokenizer and the transformer of its {V} codes")
        run.config = dataclasses.replace(prior.config, ch_mult=tokenizer.config.ch_mult,
                                         image_size=prior.config.side * tokenizer.f)
    elif args.verb != "reconstruct":
        raise UserError(f"{args.official[0]} is a tokenizer: {args.verb} needs its transformer too, behind it")
    run.state = {"classes": [str(i) for i in range(run.config.num_classes)]}
    return run, tokenizer.to(run.device), prior and prior.to(run.device)


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


def labels_of(args, run, images, labels):
    """--labels, else the test images' own labels, else "no class" where the model knows it -> labels (n,)."""
    if args.labels or not run.config.num_classes:
        return read_labels(args.labels, run, len(images))
    if labels is None and not run.config.label_dropout:
        raise UserError("this model draws by class: give --labels, one for each photo or one for all")
    return torch.full((len(images),), run.config.num_classes) if labels is None else labels


def decoding(config):
    """The settings of parallel_decode that a run was trained to be drawn with."""
    return dict(steps=config.sample_steps, method=config.schedule, temperature=config.temperature,
                choice_temperature=config.choice_temperature, guidance=config.guidance if config.num_classes else 1.0)


# Copied from vqvae2.py
def at_once(config):
    """Images in one batch: attention, caches and decoder take memory."""
    return max(1, min(64, 2 ** 20 // config.image_size ** 2))


def draw_images(args, run, draw, *tensors):
    """draw(parts of tensors, generator=, decoding's settings by the flags or the run's) -> images, on the CPU."""
    fields = dict(sample_steps=args.sample_steps, schedule=args.schedule, temperature=args.temperature,
                  choice_temperature=args.choice_temperature, guidance=args.guidance)
    config = dataclasses.replace(run.config, seed=args.seed, **{k: v for k, v in fields.items() if v is not None})
    check(config)
    settings = decoding(config)
    if args.guidance is not None:                                               # even where there are no classes
        settings["guidance"] = args.guidance
    if "start" in args:
        settings["start"] = args.start
    generator = torch.Generator(run.device).manual_seed(args.seed)
    return torch.cat([draw(*(t.to(run.device) for t in part), generator=generator, **settings).cpu()
                      for part in zip(*(t.split(at_once(config)) for t in tensors))])


def sample_command(args, run, tokenizer, prior):
    columns = run.config.num_classes if 0 < run.config.num_classes <= 16 else 8
    labels = read_labels(args.labels, run, args.num or 8 * columns)
    images = draw_images(args, run, lambda labels, **more: sample(tokenizer, prior, labels, **more), labels)
    np.savez(buffer := io.BytesIO(), arr_0=to_bytes(images).permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy())
    show(args, run, images, "samples.png", columns, "complete")
    write_file(run.folder / "samples.npz", buffer.getbuffer())  # ADM's format; last: the picture may not be writable


def show_edits(args, run, images, hidden, drawn, name):
    """Each row: an image, what the model is shown of it (hidden (n or 1, 1, S, S): not), what it makes of that."""
    shown = torch.stack([images, images.masked_fill(hidden, 0)], 1)
    num = len(drawn) // len(images)
    show(args, run, torch.cat([shown, drawn.unflatten(0, (-1, num))], 1).flatten(0, 1), name, 2 + num, "evaluate")


@torch.no_grad()
def complete_command(args, run, tokenizer, prior):
    """The lower half of each image is hidden and drawn anew."""
    images, labels = read_photos(args, run)
    labels, num, side = labels_of(args, run, images, labels), args.num or 6, run.config.side
    half = side // 2 * tokenizer.f
    # the upper half is encoded alone: an encoder that saw the whole image would tell of the lower half
    known = tokenizer.encode(images[:, :, :half].to(run.device)).flatten(1)
    known = F.pad(known, (0, side ** 2 - known.shape[1]), value=-1).repeat_interleave(num, 0)
    drawn = draw_images(args, run, lambda labels, known, **more: sample(tokenizer, prior, labels, known=known, **more),
                        labels.repeat_interleave(num), known)
    hidden = (torch.arange(images.shape[2]) >= half)[None, None, :, None]
    show_edits(args, run, images, hidden, drawn, "completions.png")


def edit(args, run, tokenizer, prior, images, labels, where, name):
    """Draw the tokens `where` (h, w) of each image anew and show it."""
    if where.all():
        raise UserError("what is to be drawn anew, and one token more on every side, is the whole picture: nothing "
                        "would be known; make it smaller, or draw whole pictures with sample")
    num = args.num or 6
    draw = lambda images, labels, **more: inpaint(tokenizer, prior, images, where, labels, **more)
    drawn = draw_images(args, run, draw, images.repeat_interleave(num, 0), labels.repeat_interleave(num))
    hidden = where.repeat_interleave(tokenizer.f, 0).repeat_interleave(tokenizer.f, 1)
    show_edits(args, run, images, hidden, drawn, name)


def inpaint_command(args, run, tokenizer, prior):
    """Draws what a mask (a picture: white) covers anew. It is cut and scaled as its photo is."""
    (images, labels), side = read_photos(args, run), run.config.image_size
    with explain(f"{args.mask} cannot be read as an image", "give a PNG, white where to draw anew"):
        mask = ImageOps.exif_transpose(Image.open(args.mask)).convert("L").point(lambda value: 255 * (value >= 128))
        size, (darkest, brightest) = mask.size, mask.getextrema()
        mask = np.asarray(ImageOps.fit(mask, (side, side), Image.Resampling.BOX)) > 0       # however thin a line was
    upright = lambda photo: ImageOps.exif_transpose(Image.open(photo)).size
    shown = [(photo, upright(photo)) for photo in args.photos] or [("the images", (side, side))]
    for photo, wanted in shown:
        if size != wanted:
            raise UserError(f"{args.mask} has {size[0]} x {size[1]} pixels, {photo} {wanted[0]} x {wanted[1]}: a mask "
                            f"must be as large as the picture")
    if brightest == 0:
        raise UserError(f"{args.mask} is empty: it must be white where to draw anew")
    if not mask.any():
        raise UserError(f"{args.mask}: its white lies outside of the square that the model sees, or is too small")
    if darkest == 255:
        raise UserError(f"{args.mask} is white everywhere: nothing would be known; draw whole pictures with sample")
    where = mask_tokens(torch.from_numpy(mask)[None], tokenizer.f)[0]
    edit(args, run, tokenizer, prior, images, labels_of(args, run, images, labels), where, "inpainted.png")


def replace_command(args, run, tokenizer, prior):
    """Draws a box of each image anew, as another class."""
    (top, left, height, width), f = args.box, tokenizer.f
    box_tokens(args.box, f, run.config.side)                                    # does it lie in the picture?
    grow = lambda a, n: (a // f * f, -(-(a + n) // f) * f - a // f * f)         # to whole tokens: see its QUIRK
    (top, height), (left, width) = grow(top, height), grow(left, width)
    where = box_tokens((top, left, height, width), f, run.config.side)
    images, labels = read_photos(args, run)
    edit(args, run, tokenizer, prior, images, labels_of(args, run, images, labels), where, "replaced.png")


def outpaint_command(args, run, tokenizer, prior):
    """Widens each image by --left and --right pixels."""
    (images, labels), f = read_photos(args, run), tokenizer.f
    if args.left % f or args.right % f or args.left + args.right <= 0 or min(args.left, args.right) < 0:
        raise UserError(f"--left {args.left} --right {args.right}: give multiples of {f} pixels, 0 or more, not both 0")
    draw = lambda images, labels, **more: outpaint(tokenizer, prior, images, labels, left=args.left // f,
                                                   right=args.right // f, **more)
    num = args.num or 1
    drawn = draw_images(args, run, draw, images.repeat_interleave(num, 0),
                        labels_of(args, run, images, labels).repeat_interleave(num))
    show(args, run, drawn, "outpainted.png", num, "evaluate")


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
    """Reconstruction, use of the codebook, cross-entropy of masked tokens of the test images, speed, size.

    Masks are as in training, from one seed; besides, a quarter, a half, three quarters and all of the tokens masked.
    """
    data = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir))
    (images, labels), c = data.test, run.config
    tokens = tokenize(tokenizer, images, run.device)
    N, generator = prior.places, torch.Generator().manual_seed(0)
    order = torch.rand(len(tokens), N, generator=generator).argsort(1).argsort(1)
    masks = {"training": draw_mask(order.shape, c.schedule, generator)}
    masks |= {share: order < share * N for share in (0.25, 0.5, 0.75, 1.0)}
    quality, nats, hits = [], dict.fromkeys(masks, 0.0), 0.0
    for k in torch.arange(len(images)).split(64):
        t, y = tokens[k].to(run.device), labels[k].to(run.device)
        quality.append(psnr(images[k] / 127.5 - 1, tokenizer.decode(t).clamp(-1, 1).cpu()))
        for kind, mask in masks.items():
            found = prior.loss(t, y, mask[k])[1]
            nats[kind] += float(found["nats"]) * len(k) / len(images)
            hits += float(found["accuracy"]) * len(k) / len(images) * (kind == "training")
    (share, perplexity), start, num = use(tokens, tokenizer), time.time(), len(labels[:16])
    sample(tokenizer, prior, labels[:num].to(run.device), generator=torch.Generator(run.device).manual_seed(0),
           **decoding(c)).cpu()
    seconds = time.time() - start
    report = dict(
        file=f"{NAME}.py", data=Path(c.data).name, image_size=c.image_size,
        parameters_tokenizer=sum(p.numel() for p in tokenizer.parameters()),
        parameters_prior=sum(p.numel() for p in prior.parameters()), samples_per_second=num / seconds,
        sample_steps=c.sample_steps, psnr=float(torch.cat(quality).mean()), codebook_size=tokenizer.codebook_size,
        codebook_use=float(share), perplexity=float(perplexity), nats_per_token=nats.pop("training"),
        nats_per_token_by_share_masked={str(kind): value for kind, value in nats.items()}, accuracy=hits,
        tokens_per_image=N, unigram_nats_per_token=float(perplexity.log()), test_images=len(images),
        peak_memory_mib=peak_memory(), train_steps=sum(run.state["progress"].values()),
        train_seconds=run.state["seconds"], threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        command=f"python {NAME}.py evaluate {run.folder}")
    report["parameters"] = report["parameters_tokenizer"] + report["parameters_prior"]
    print(f"test: PSNR {report['psnr']:.2f} dB; {share:.1%} of {tokenizer.codebook_size} codes used, perplexity "
          f"{perplexity:.1f}; {report['nats_per_token']:.4f} nats per masked token, by share masked "
          f"{', '.join(f'{kind}: {value:.3f}' for kind, value in nats.items())} (without context "
          f"{perplexity.log():.3f}); {hits:.1%} of the masked tokens right")
    write_file(run.folder / "report.json", json.dumps(report, indent=1).encode())
    print(f"{run.folder / 'report.json'}   next: python {NAME}.py sample {run.folder}")


RUN = ("run --official --out --num --seed --labels --sample-steps --schedule --temperature --choice-temperature "
       "--guidance")
EDIT = f"{RUN} photos --data-dir"
FLAGS = {
    "run": dict(nargs="?", help="run folder"),
    "photos": dict(nargs="*", help="image files, right behind the run (none: the first test images)"),
    "--official": dict(nargs="+", metavar="FILE", help="released tokenizer and its transformer (photos go before it)"),
    "--data-dir": dict(help="where mnist and cifar10 are (default: where training found them)"),
    "--out": dict(help="PNG to write (default: in the run folder)"),
    "--labels": dict(nargs="+", help="classes by number or name, repeated in turn (default: the images', or all)"),
    "--num": dict(type=positive, help="images to draw; where there are photos: of each"),
    "--sample-steps": dict(type=positive, help="passes of the transformer (default: the run's)"),
    "--schedule": dict(help="mask schedule: cosine, linear, square, ... (default: the run's)"),
    "--temperature": dict(type=float, help="divides the logits (default: the run's)"),
    "--choice-temperature": dict(type=float, help="noise on the confidence (default: the run's)"),
    "--guidance": dict(type=float, help="no class + guidance (class - no class) (default: the run's)"),
    "--start": dict(type=int, help="first pass; those before it are left out (default: a sixth of the steps)"),
    "--mask": dict(required=True, metavar="PNG", help="as large as the photo, white where to draw anew"),
    "--box": dict(required=True, type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"), help="in model pixels"),
    "--left": dict(type=int, default=0, help="pixels to add at the left"),
    "--right": dict(type=int, default=0, help="pixels to add at the right"),
    "--seed": dict(type=int, default=0, help="of the generator that draws")}
VERBS = {   # name: (function, help, flags)
    "sample": (sample_command, "draw images by class", RUN),
    "complete": (complete_command, "hide the lower half of images and draw it anew", EDIT),
    "inpaint": (inpaint_command, "draw anew what a mask covers", f"{EDIT} --mask --start"),
    "replace": (replace_command, "draw a box of images anew, as another class", f"{EDIT} --box --start"),
    "outpaint": (outpaint_command, "widen images", f"{EDIT} --left --right"),
    "reconstruct": (reconstruct_command, "images through the tokenizer, side by side, with PSNR",
                    "run --official photos --data-dir --out"),
    "evaluate": (evaluate_command, "PSNR, codebook use, likelihood, speed, size: writes RUN/report.json",
                 "run --data-dir")}

if __name__ == "__main__":
    main()
