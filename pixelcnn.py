# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66", "pillow>=10"]
# ///
"""PixelCNN: an image is a sequence of pixel values, and one masked convolutional network predicts every value at once.

    PixelCNN        van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, 2016, arXiv 1601.06759
    Gated PixelCNN  van den Oord et al.: Conditional Image Generation with PixelCNN Decoders, 2016, arXiv 1606.05328

The idea. By the chain rule p(x) = prod_i p(x_i | x_1 ... x_{i-1}), exactly, in any order of the values; take them row
by row, left to right, inside a pixel red, green, blue. A convolutional network computes all factors of a known image
in ONE pass if no output can see its own value or a later one: its kernels are multiplied by masks. Each factor is a
softmax over all values a pixel can have: nothing is assumed about its form. Training is a classifier's cross-entropy,
the result a true likelihood. To sample, draw one value after the other: N values, N passes (or one pixel's share of
each: see sample). PixelCNN's masks leave a blind spot: a layer reaches right only by going up a row first, so a wedge
above and to the right of a pixel is never seen. Gated PixelCNN removes it with two stacks (one reads the rows above,
one the row to the left), gates its features as an LSTM does, and can be told a class or a map of features.

    images (B,3,H,W) -> Tokenizer.encode -> tokens (B,N), N = H*W*C -> Prior -> logits (B,N,V), from earlier tokens only
    labels (B,) -> sample: for each i draw tokens[:, i] from softmax(logits[:, i]) -> Tokenizer.decode -> images

Glossary
    B, H, W    batch, height, width           C    colours of a pixel: 3, or 1 for grey and binary images
    N, L       tokens of an image, H*W*C; tokens at hand     V    levels a colour can have (the papers: 256, or 2)
    h, p       PixelCNN's h (it has 2h residual features), Gated PixelCNN's p features per stack: both Config.width;
               in the gated layers v and h are feature maps: of the vertical stack (all rows above) and of the
               horizontal one (this row, left of the pixel). The papers' condition h is `classes` or `spatial` here
    mask A, B  A hides the value itself (first layer); B shows it (later layers: there it is a feature of the past)

Run
    python pixelcnn.py                                              the demo: nine shapes by class, minutes on two cores
    python pixelcnn.py train --preset mnist --data-dir DIR --out RUN
    python pixelcnn.py sample RUN --labels star ring 3 --num 64     (also: complete, interpolate, evaluate RUN; --help)

Contents   Config and presets, Tokenizer, Prior, Losses, Sampler, Training, Official weights, Helpers, Command line
Not here   PixelRNN's LSTMs; PixelCNN++'s network (its likelihood is: --likelihood logistic). Neither paper's code or
           weights were released, so there is no from_official; the tests compare with trusted third-party networks.
Departs    Adam and averaged weights, not RMSProp; other levels than 256; the papers do not say how 128 or 256 features
           are divided among three colours, so widths here are multiples of 3.
"""
import argparse
import contextlib
import copy
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
    """All settings; each comment is also the flag's --help. The defaults are the demo."""
    data: str = "shapes"            # shapes, mnist, cifar10, or a folder or .zip with train/<class>/*, test/<class>/*
    data_dir: str = "data"          # where mnist and cifar10 are looked for, or downloaded to
    train_images: int = 0           # use only this many training images (0: all; of the endless shapes 20,000)
    test_images: int = 0            # use only this many test images (0: all; of the endless shapes 2,000)
    skip_corrupt: bool = False      # leave out images that cannot be read, instead of stopping
    image_size: int = 16            # side of the (square) images in pixels
    colours: int = 3                # colour channels of a pixel: 3, or 1 for grey
    levels: int = 4                 # values a colour can have, 2 to 256; 2 = binary, drawn anew as Bernoulli(intensity)
    likelihood: str = "softmax"     # softmax over the levels, or logistic (mixture of discretized logistics)
    mixtures: int = 10              # logistics in that mixture
    model: str = "gated"            # gated (Gated PixelCNN) or pixelcnn
    layers: int = 6                 # gated layers, or residual blocks (pixelcnn)
    width: int = 24                 # features: p of each stack (gated), or h (pixelcnn, whose residual has 2h)
    kernel: int = 5                 # n of the n x n kernels after the first layer, whose kernel is 7
    head: int = 48                  # features between the last two 1 x 1 convolutions
    num_classes: int = 9            # classes the gated model is told (0: none)
    seed: int = 0                   # a step is a function of (seed, step)
    batch_size: int = 16            # images per step, over all processes
    train_steps_tokenizer: int = 0  # always 0: this tokenizer has nothing to learn
    train_steps_prior: int = 4000   # steps of training
    lr: float = 3e-3                # peak learning rate of Adam: a short warm-up, then a cosine to zero
    warmup: int = 100               # steps of that warm-up (0: a constant learning rate)
    clip: float = 1.0               # gradients are scaled down to this norm (0: never)
    ema: float = 0.999              # decay of the averaged weights, which sampling uses (0: the weights themselves)
    log_every: int = 10             # steps between two rows of metrics.jsonl
    save_every: int = 250           # steps between two checkpoints
    temperature: float = 1.0        # logits are divided by it in sampling (the papers: 1)
    compile: bool = False           # torch.compile (CUDA)


PRESETS = {
    "demo": Config(),
    # binary pixels as in PixelRNN sec. 5.3; the second paper's network, which learns more per hour of CPU
    "mnist": Config(data="mnist", image_size=28, colours=1, levels=2, layers=12, width=16, kernel=3, head=32,
                    num_classes=0, lr=2e-3, train_steps_prior=24_000, save_every=1000, log_every=50),
    # Gated with PixelCNN's CIFAR-10 sizes (the second paper gives none): 15 layers, 2h = 256 features rounded up to a
    # multiple of 3 and 8, a head of 1024 rounded down to a multiple of 3
    "cifar10": Config(data="cifar10", image_size=32, levels=256, layers=15, width=264, kernel=3, head=1023,
                      num_classes=10, lr=3e-4, train_steps_prior=200_000, save_every=2000, log_every=50),
    # Gated PixelCNN's own: 20 layers of 384 features, 5 x 5 kernels, batch 128, 200 K updates. Needs --data FOLDER
    "imagenet64": Config(data="imagenet64", image_size=64, levels=256, layers=20, width=384, kernel=5, head=1023,
                         num_classes=1000, batch_size=128, lr=3e-4, train_steps_prior=200_000, save_every=1000),
}


# === Tokenizer: pixel values <-> tokens (no learning) =================================================================
class Tokenizer(nn.Module):
    """Uniform quantizer of pixel values: the only "tokenizer" these papers have. It has no parameters.

    Token i of an image is colour i % C of pixel i // C in raster order: the order the prior predicts in.
    """
    def __init__(self, levels, colours, image_size):
        super().__init__()
        self.levels, self.colours, self.image_size = levels, colours, image_size

    def encode(self, images, generator=None):
        """images (B, 3, H, W) in [-1, 1] -> tokens (B, N) int64 in [0, V).

        256 levels keep the byte; fewer cut the bytes into V equal bins. With two levels and a generator each pixel is
        drawn as Bernoulli(intensity): MNIST's dynamic binarisation; without a generator it is cut at one half.
        Raises ValueError if the images are not 3 x image_size x image_size.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 3, {self.image_size}, {self.image_size}), not {tuple(images.shape)}")
        if self.colours == 1:
            images = images.mean(1, keepdim=True)
        intensity = (images.permute(0, 2, 3, 1).flatten(1) + 1) / 2             # (B, N): raster order, then R, G, B
        if self.levels == 2 and generator is not None:
            return torch.bernoulli(intensity.clamp(0, 1), generator=generator).long()
        # 1e-3: a byte on the edge of a bin must not fall below it by rounding
        return (intensity * self.levels + 1e-3).floor().long().clamp(0, self.levels - 1)

    def decode(self, tokens):
        """tokens (B, N) -> images (B, 3, H, W): level 0 is -1, level V - 1 is 1 (no bin's middle), others between."""
        pixels = tokens.view(-1, self.image_size, self.image_size, self.colours).permute(0, 3, 1, 2)
        return (2 * pixels / (self.levels - 1) - 1).expand(-1, 3, -1, -1)

    def forward(self, images):
        """images -> reconstruction, losses (empty: nothing is learned)."""
        return self.decode(self.encode(images)), {}


def build_tokenizer(config):
    return Tokenizer(config.levels, config.colours, config.image_size)


# === Prior: p(token | earlier tokens), all positions in one pass ======================================================
def causal_mask(kind, out_channels, in_channels, kernel_size, colours=1):
    """0/1 mask (out, in, kh, kw) of a kernel centred on the pixel to be predicted (PixelRNN sec. 3.4, Fig. 2).

    kind  "A": the pixels before the centre in raster order; at the centre output colour o sees input colour i iff i < o
          "B": the same, but i <= o: a feature of colour i has seen nothing beyond colour i, so o may see it
          "above", "row": Gated PixelCNN's vertical stack: the rows above only; these and the centre's whole row (safe
          after the first layer, where a feature of that row knows only the rows above it)
    Feature maps belong to colours in turn: channel c to colour c % colours, in every layer.
    """
    kh, kw = kernel_size
    mask = torch.zeros(out_channels, in_channels, kh, kw)
    mask[:, :, :kh // 2] = 1
    if kind == "row":
        mask[:, :, kh // 2] = 1
    elif kind in ("A", "B"):
        mask[:, :, kh // 2, :kw // 2] = 1
        o, i = torch.arange(out_channels)[:, None] % colours, torch.arange(in_channels) % colours
        mask[:, :, kh // 2, kw // 2] = (i < o if kind == "A" else i <= o).float()
    return mask


class MaskedConv2d(nn.Conv2d):
    """Convolution whose kh x kw kernel is multiplied by a causal mask; height and width are kept (zero padding).

    Positions hidden by all kinds of mask are neither stored nor computed: the rows below the centre and, in a kernel of
    one row, the columns right of it. The weight is (out, in, kh // 2 + 1, kw), or (out, in, 1, kw // 2 + 1) for kh = 1.
    """
    def __init__(self, kind, in_channels, out_channels, kernel_size, colours=1):
        kh, kw = kernel_size
        rows, columns = kh // 2 + 1, kw if kh > 1 else kw // 2 + 1
        super().__init__(in_channels, out_channels, (rows, columns))
        self.border = (kw // 2, columns - 1 - kw // 2, kh // 2, 0)              # left, right, top, bottom
        mask = causal_mask(kind, out_channels, in_channels, kernel_size, colours)
        self.register_buffer("mask", mask[:, :, :rows, :columns].clone(), persistent=False)
        self.first, self.seen, self.at, self.flat = kind in ("A", "above"), None, None, None   # see incremental()

    def forward(self, x):
        if self.seen is None:
            # the mask multiplies the weight in the graph: a hidden weight gets no gradient and can never leak
            return F.conv2d(F.pad(x, self.border), self.weight * self.mask, self.bias)
        if any(self.border):                                    # a 1 x 1 kernel needs no memory
            (i, j), (r, w), (left, right, top, _) = self.at, x.shape[2:], self.border
            # x is rows i - r + 1 ... i, columns j ... j + w - 1; row 0, column 0 lie at top, left in the padding
            self.seen[:, :, top + i + 1 - r:top + i + 1, left + j:left + j + w] = x
            x = self.seen[:, :, i + 1 - r:i + 1 + top, j:j + w + left + right]
        if x.shape[2:] == self.kernel_size:                     # one pixel: a matrix product has less overhead
            return F.linear(x.flatten(1), self.flat, self.bias)[:, :, None, None]
        return F.conv2d(x, self.weight * self.mask, self.bias)


@contextlib.contextmanager
def incremental(net, image):
    """Inside, net's layers may be given parts of the image: each convolution remembers the inputs of earlier parts.

    image (B, C, H, W). Yields at, image. at = [i, j] says where a part lies: it ends with row i, begins with column j
    (one pixel: [i, j]; rows 0 to i: [i, 0]). The image is a copy inside zero padding that the first convolutions look
    at directly, so a pixel written to it is seen at once; the others keep what they were given in `seen`.
    The caches of Fast PixelCNN++ (arXiv 1704.06001), but whole maps: simpler, and small beside a training step.
    """
    (B, _, H, W), convs = image.shape, [module for module in net.modules() if isinstance(module, MaskedConv2d)]
    k, at = max(conv.border[0] for conv in convs if conv.first), [0, 0]
    padded = F.pad(image, (k, k, k, 0))
    for conv in convs:
        left, right, top, _ = conv.border
        conv.at, conv.flat = at, (conv.weight * conv.mask).flatten(1)
        conv.seen = (padded[:, :, k - top:, k - left:k + W + right] if conv.first else
                     image.new_zeros(B, conv.in_channels, top + H, left + W + right))
    try:
        yield at, padded[:, :, k:, k:k + W]
    finally:
        for conv in convs:
            conv.at = conv.seen = conv.flat = None


class ResidualBlock(nn.Module):
    """x + f(x), f = ReLU, 1x1 (2h -> h), ReLU, 3x3 (h -> h), ReLU, 1x1 (h -> 2h), all mask B (PixelRNN Fig. 5)."""
    def __init__(self, h, kernel, colours):
        super().__init__()
        self.net = nn.Sequential(
            nn.ReLU(), MaskedConv2d("B", 2 * h, h, (1, 1), colours),
            nn.ReLU(), MaskedConv2d("B", h, h, (kernel, kernel), colours),
            nn.ReLU(), MaskedConv2d("B", h, 2 * h, (1, 1), colours))

    def forward(self, x):
        return x + self.net(x)


def output_head(width, head, out_channels, colours):
    """The last layers of both papers: twice ReLU and a 1 x 1 convolution with mask B (PixelRNN Table 1)."""
    return nn.Sequential(nn.ReLU(), MaskedConv2d("B", width, head, (1, 1), colours),
                         nn.ReLU(), MaskedConv2d("B", head, out_channels, (1, 1), colours))


class PixelCNN(nn.Module):
    """7x7 mask A, residual blocks, two 1x1 layers (PixelRNN Table 1).  x (B, C, H, W) -> (B, out_channels, H, W).

    Wired as EugenHotaj/pytorch-generative pixel_cnn.py, but each block's input is added once, as in the paper.
    """
    def __init__(self, in_channels, h, layers, kernel, head, out_channels, colours=1, first_kernel=7):
        super().__init__()
        self.input = MaskedConv2d("A", in_channels, 2 * h, (first_kernel, first_kernel), colours)
        self.blocks = nn.Sequential(*(ResidualBlock(h, kernel, colours) for _ in range(layers)))
        self.head = output_head(2 * h, head, out_channels, colours)

    def forward(self, x):
        return self.head(self.blocks(self.input(x)))

    def start_row(self, image, i):
        """Incremental sampling: what a row needs before its first pixel. Here: nothing."""

    def pixel(self, image, i, j, links):
        """Incremental forward: the output at one pixel (B, out_channels, 1, 1)."""
        return self(image[:, :, i:i + 1, j:j + 1])


def gate(x):
    """tanh(first half) * sigmoid(second half): (B, 2p, H, W) -> (B, p, H, W) (Gated PixelCNN eq. 2)."""
    f, g = x.chunk(2, 1)
    return torch.tanh(f) * torch.sigmoid(g)


class GatedLayer(nn.Module):
    """Two stacks side by side (Gated PixelCNN Fig. 2).  v, h (B, p, H, W), bias -> v, h of the same shape.

    v at row r knows all rows above r; h at a pixel knows these and its own row up to the pixel. v feeds h, never the
    reverse: what h knows lies in the future of some pixels that read v. In the first layer v and h are the image, so
    the vertical kernel leaves its own row out and the horizontal one has mask A. v needs no colour masks: it knows
    finished rows only. As in the paper v has no residual and there are no skips; ritheshkumar95/pytorch-vqvae agrees.
    """
    def __init__(self, in_channels, p, kernel, colours=1, num_classes=0, map_channels=0, first=False):
        super().__init__()
        self.first = first
        self.vertical = MaskedConv2d("above" if first else "row", in_channels, 2 * p, (kernel, kernel))
        self.horizontal = MaskedConv2d("A" if first else "B", in_channels, 2 * p, (1, kernel), colours)
        self.link = nn.Conv2d(2 * p, 2 * p, 1)                                  # v to h, before the gate
        self.out = MaskedConv2d("B", p, p, (1, 1), colours)
        self.class_bias = nn.Parameter(torch.randn(num_classes, 2 * p)) if num_classes else None    # V of V^T h, eq. 4
        self.map_bias = nn.Conv2d(map_channels, 2 * p, 1, bias=False) if map_channels else None     # V * s: not masked

    def bias(self, classes=None, spatial=None):
        """What the condition adds before both gates: (B, 2p, 1, 1) for a class, (B, 2p, H, W) for a map."""
        bias = 0 if classes is None else (classes @ self.class_bias)[:, :, None, None]
        return bias if spatial is None else bias + self.map_bias(spatial)

    def forward(self, v, h, bias=0):
        above = self.vertical(v)                                                # (B, 2p, H, W)
        return gate(above + bias), self.horizontal_stack(h, self.link(above) + bias)

    def horizontal_stack(self, h, linked):
        """linked: from the vertical stack. A residual around the first layer would hand the pixel to itself."""
        return self.out(gate(self.horizontal(h) + linked)) + (0 if self.first else h)


class GatedPixelCNN(nn.Module):
    """Gated layers, the first of kernel 7, then the head on the horizontal stack.  x (B, C, H, W) -> (B, out, H, W).

    classes (B, num_classes): one-hot, or any vector h of eq. 4; spatial: (B, map_channels, H, W).
    """
    def __init__(self, in_channels, p, layers, kernel, head, out_channels, colours=1, num_classes=0, map_channels=0,
                 first_kernel=7):
        super().__init__()
        condition = (colours, num_classes, map_channels)
        self.layers = nn.ModuleList([GatedLayer(in_channels, p, first_kernel, *condition, first=True)])
        self.layers.extend(GatedLayer(p, p, kernel, *condition) for _ in range(layers - 1))
        self.head = output_head(p, head, out_channels, colours)

    def forward(self, x, classes=None, spatial=None):
        v = h = x
        for layer in self.layers:
            v, h = layer(v, h, layer.bias(classes, spatial))
        return self.head(h)

    def start_row(self, image, i, classes=None, spatial=None):
        """Incremental sampling: the vertical stack of row i, once for all its pixels -> per layer (B, 2p, 1, W)."""
        v, links = image[:, :, i:i + 1], []                     # not drawn yet, but the first layer's mask hides it
        for layer in self.layers:
            bias = layer.bias(classes, None if spatial is None else spatial[:, :, i:i + 1])
            above = layer.vertical(v)
            v = gate(above + bias)
            links.append(layer.link(above) + bias)
        return links

    def pixel(self, image, i, j, links):
        """Incremental forward: the horizontal stack and the head at one pixel -> (B, out_channels, 1, 1)."""
        h = image[:, :, i:i + 1, j:j + 1]
        for layer, linked in zip(self.layers, links):
            h = layer.horizontal_stack(h, linked[:, :, :, j:j + 1])
        return self.head(h)


class Prior(nn.Module):
    """p(tokens | condition) = prod_i p(tokens_i | tokens_<i, condition): one of the two networks as a sequence model.

    With the logistic likelihood the network predicts a pixel at a time, from whole earlier pixels: its masks know no
    colours, and the mixture itself lets G depend on R, and B on both. map_channels: of a spatial map the gated model is
    told (no data set has one: for use in Python).
    """
    def __init__(self, config, map_channels=0):
        super().__init__()
        check(config)
        self.levels, self.colours, self.image_size = config.levels, config.colours, config.image_size
        self.num_classes, self.logistic, C = config.num_classes, config.likelihood == "logistic", config.colours
        if self.logistic:
            out_channels = config.mixtures * (10 if C == 3 else 3)
        else:       # two levels need one number a: softmax over (0, a) is (1 - sigmoid(a), sigmoid(a))
            out_channels = C * (1 if self.levels == 2 else self.levels)
        sizes = (C, config.width, config.layers, config.kernel, config.head, out_channels, 1 if self.logistic else C)
        self.net = (GatedPixelCNN(*sizes, config.num_classes, map_channels) if config.model == "gated" else
                    PixelCNN(*sizes))
        self.to(memory_format=torch.channels_last)              # the layout tokens come in; faster on CPUs

    def condition(self, labels, spatial=None):
        """labels (B,) int64 (num_classes: no class), (B, num_classes) float (any vector) or None -> net's keywords."""
        kwargs = {} if spatial is None else {"spatial": spatial}
        if self.num_classes and labels is not None:
            if not labels.is_floating_point():
                labels = F.one_hot(labels, self.num_classes + 1)[:, :-1]        # no class is the zero vector: no term
            kwargs["classes"] = labels.to(next(self.parameters()).dtype)
        return kwargs

    def values(self, tokens):
        """tokens, any shape -> what the network reads: -1 to 1."""
        return 2 * tokens.to(next(self.parameters()).dtype) / (self.levels - 1) - 1

    def logits(self, out):
        """The network's output (B, out_channels, H, W) -> (B, H*W*C, V); logistic: (B, H*W, 10K), a row per pixel."""
        out = out if out.dtype == torch.float64 else out.float()                # bfloat16 is too coarse for a loss
        if self.logistic:
            return out.permute(0, 2, 3, 1).flatten(1, 2)
        if self.levels == 2:
            out = torch.cat([torch.zeros_like(out), out], 1)
        out = out.unflatten(1, (self.levels, self.colours))     # channel = level * C + colour
        return out.permute(0, 3, 4, 2, 1).flatten(1, 3)

    def forward(self, tokens, labels=None, spatial=None):
        """tokens (B, L) int64, labels see condition(), spatial (B, map_channels, H, W) -> logits (B, L, V).

        logits[:, i] depends on tokens[:, :i] alone (logistic: (B, pixels, 10K), row i on earlier pixels alone).
        L may be less than N by whole rows: later rows cannot matter.
        """
        x = self.values(tokens).view(len(tokens), -1, self.image_size, self.colours).permute(0, 3, 1, 2)
        spatial = None if spatial is None else spatial[:, :, :x.shape[2]]
        return self.logits(self.net(x, **self.condition(labels, spatial)))      # x (B, C, rows, W)

    def loss(self, tokens, labels=None, spatial=None):
        """-> mean negative log-likelihood in nats per token, metrics: nats_per_image, the sum over an image."""
        logits = self(tokens, labels, spatial)
        if self.logistic:
            x = self.values(tokens).unflatten(1, (-1, self.colours))            # (B, pixels, C)
            loss = logistic_nll(logits, x, self.levels).mean() / self.colours
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return loss, {"nats_per_image": loss * tokens.shape[1]}

    def draw(self, logits, temperature=1.0, generator=None):
        """A token (B, 1) from logits (B, V); logistic: the C tokens of a pixel (B, C) from its parameters (B, 10K).

        temperature divides the logits; the logistic mixture has none (UserError).
        """
        if not self.logistic:
            return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if temperature != 1:
            raise UserError(f"temperature {temperature}: the logistic likelihood knows only 1")
        K = logits.shape[1] // (10 if self.colours == 3 else 3)
        u = torch.rand(len(logits), K + self.colours, generator=generator, device=logits.device, dtype=logits.dtype)
        x, _ = logistic_draw(logits, *u.clamp(1e-5, 1 - 1e-5).split([K, self.colours], 1), self.levels)
        return ((x + 1) / 2 * (self.levels - 1)).round().long()


def build_prior(config):
    return Prior(config)


# === Losses: a second likelihood, the discretized mixture of logistics (PixelCNN++ sec. 2, arXiv 1701.05517) ==========
def logistic_parameters(l, C):
    """l (..., 10K for C = 3, 3K for C = 1) -> logits (..., K), means, log scales, coefficients, each (..., C, K).

    Order of the channels: K logits, then for each colour K means, K log scales and, of three colours, K coefficients.
    """
    K = l.shape[-1] // (10 if C == 3 else 3)
    means, log_scales, *coefficients = l[..., K:].unflatten(-1, (C, -1, K)).unbind(-2)
    return l[..., :K], means, log_scales.clamp(min=-7), coefficients[0].tanh() if coefficients else None


def logistic_nll(l, x, levels=256):
    """-log p(x) in nats per pixel.  l (..., 10K), x (..., C) in [-1, 1] -> (...).  openai/pixel-cnn nn.py."""
    logits, means, log_scales, c = logistic_parameters(l, x.shape[-1])
    if c is not None:           # mean of G: + c0 R; of B: + c1 R + c2 G. The slots of R, G, B hold c0, c1, c2
        R, G = x[..., 0, None], x[..., 1, None]
        means = torch.stack([means[..., 0, :], means[..., 1, :] + c[..., 0, :] * R,
                             means[..., 2, :] + c[..., 1, :] * R + c[..., 2, :] * G], -2)
    x, half = x[..., None], 1 / (levels - 1)                                    # half a bin: bins are 2 / 255 wide
    middle = (x - means) * (-log_scales).exp()
    plus, minus = middle + half * (-log_scales).exp(), middle - half * (-log_scales).exp()
    mass = torch.sigmoid(plus) - torch.sigmoid(minus)
    density = middle - log_scales - 2 * F.softplus(middle) + math.log(2 * half)     # where mass underflows
    log_p = torch.where(mass > 1e-5, mass.clamp(min=1e-12).log(), density)      # clamp: both branches have gradients
    log_p = torch.where(x > 0.999, -F.softplus(minus), log_p)                   # the outer bins reach to infinity
    log_p = torch.where(x < -0.999, plus - F.softplus(plus), log_p)
    return -torch.logsumexp(log_p.sum(-2) + logits.log_softmax(-1), -1)         # one component for all three colours


def logistic_draw(l, u_mixture, u_logistic, levels=None):
    """Sample with given uniforms.  l (..., 10K), u_mixture (..., K), u_logistic (..., C) -> x (..., C), component.

    levels=None is openai/pixel-cnn: R and G go into the later means unrounded (QUIRK: in the likelihood they lie on the
    grid of levels). With levels every colour is rounded first: exact, but for u cut to [1e-5, 1 - 1e-5].
    """
    def grid(x):
        x, steps = x.clamp(-1, 1), (levels or 0) - 1
        return x if levels is None else ((x + 1) / 2 * steps).round() * 2 / steps - 1
    C = u_logistic.shape[-1]
    logits, means, log_scales, c = logistic_parameters(l, C)
    component = (logits - (-u_mixture.log()).log()).argmax(-1)                  # Gumbel: a draw from softmax(logits)
    index = component[..., None, None].expand(*component.shape, C, 1)
    means, log_scales = means.gather(-1, index)[..., 0], log_scales.gather(-1, index)[..., 0]
    x = means + log_scales.exp() * (u_logistic.log() - (1 - u_logistic).log())
    if c is not None:
        c, R = c.gather(-1, index)[..., 0], grid(x[..., 0])
        G = grid(x[..., 1] + c[..., 0] * R)
        x = torch.stack([R, G, x[..., 2] + c[..., 1] * R + c[..., 2] * G], -1)
    return grid(x), component


# === Sampler: one visible loop ========================================================================================
@torch.no_grad()
def sample_plain(tokenizer, prior, labels, *, known=None, spatial=None, temperature=1.0, generator=None):
    """The definition of sampling: for each draw one pass over the whole image. sample() draws the same, faster."""
    B, n, k = len(labels), 0 if known is None else known.shape[1], prior.colours if prior.logistic else 1
    tokens = torch.zeros(B, prior.image_size ** 2 * prior.colours, dtype=torch.long, device=labels.device)
    if known is not None:
        tokens[:, :n] = known
    for i in range(n, tokens.shape[1], k):                                      # k: logistic draws whole pixels
        logits = prior(tokens, labels, spatial)[:, i // k]                      # (B, V), from tokens[:, :i] alone
        tokens[:, i:i + k] = prior.draw(logits, temperature, generator)
    return tokenizer.decode(tokens)


@torch.no_grad()
def sample(tokenizer, prior, labels, *, known=None, spatial=None, temperature=1.0, generator=None, trace=None):
    """Draw images pixel by pixel, colour by colour, computing only what each new pixel needs.

    labels (B,) int64 (prior.num_classes: no class) or (B, num_classes) float; known (B, n) int64: the first n tokens,
    kept as they are (completion of an occluded image); spatial (B, map_channels, H, W); temperature divides the logits.
    generator: source of all randomness. trace: a list that gets {position, logits (B, V), tokens (B, N)} for each draw.
    Returns images (B, 3, H, W) in [-1, 1]. Raises UserError if known ends inside a pixel, for the logistic likelihood.
    """
    B, S, C, n = len(labels), prior.image_size, prior.colours, 0 if known is None else known.shape[1]
    tokens = torch.zeros(B, S, S, C, dtype=torch.long, device=labels.device)
    flat, condition, k = tokens.view(B, -1), prior.condition(labels, spatial), C if prior.logistic else 1
    if n % k:
        raise UserError(f"{n} known tokens end inside a pixel: the logistic likelihood draws whole pixels of {k}")
    if known is not None:
        flat[:, :n] = known
    with incremental(prior.net, prior.values(tokens).permute(0, 3, 1, 2)) as (at, image):       # image (B, C, S, S)
        rows = n // (S * C)
        if rows:                                                                # rows known in full: one pass
            at[:] = rows - 1, 0
            known_map = None if spatial is None else spatial[:, :, :rows]
            prior.net(image[:, :, :rows], **prior.condition(labels, known_map))
        for i in range(rows, S):
            at[:] = i, 0
            links = prior.net.start_row(image, i, **condition)
            for j in range(S):
                at[:] = i, j
                for c in range(0, C, k):                                        # G's pass knows R, B's knows R and G
                    logits = prior.logits(prior.net.pixel(image, i, j, links))[:, c]            # (B, V)
                    if (position := (i * S + j) * C + c) < n:
                        continue                                                # known; the pass has filled the caches
                    tokens[:, i, j, c:c + k] = prior.draw(logits, temperature, generator)
                    image[:, c:c + k, i, j] = prior.values(tokens[:, i, j, c:c + k])
                    if trace is not None:
                        trace.append({"position": position, "logits": logits, "tokens": flat.clone()})
    return tokenizer.decode(flat)


@torch.no_grad()
def likelihood(prior, tokens, labels, batch_size=100):
    """Mean negative log-likelihood of an image in nats, the sum over its tokens.  tokens (B, N), labels (B,)."""
    device, total = next(prior.parameters()).device, 0.0
    for t, l in zip(tokens.split(batch_size), labels.split(batch_size)):
        total += float(prior.loss(t.to(device), l.to(device))[1]["nats_per_image"]) * len(t)
    return total / len(tokens)


# === Training: one visible loop =======================================================================================
def backward(loss, optimizer):
    """Gradients of the optimizer's parameters, averaged over all processes."""
    optimizer.zero_grad()
    loss.backward()
    average(*(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None))


def train_tokenizer(config, data=None, run=None):
    """Nothing to learn: the tokenizer is a fixed quantizer."""
    return build_tokenizer(config)


def train_prior(config, data, run, tokenizer):
    """Maximum likelihood: cross-entropy of every token, given the true earlier ones. Returns the averaged prior."""
    torch.manual_seed(config.seed)
    prior = build_prior(config).to(run.device)
    ema = copy.deepcopy(prior)
    optimizer = torch.optim.Adam(prior.parameters(), config.lr)
    if config.compile:
        prior.compile()
    size = sum(p.numel() for p in prior.parameters())
    print(f"{size:,} parameters on {run.device}, {len(data.train[0]):,} images of {config.data}; yardstick: "
          f"{math.log(config.levels):.4f} nats per token if all levels were alike")
    for step in run.steps("prior", config.train_steps_prior, prior=prior, prior_ema=ema, optimizer_prior=optimizer):
        generator = rng(config.seed, step)
        images, labels = data.batch("train", config.batch_size, generator)
        tokens, labels = shard(tokenizer.encode(images, generator), labels, device=run.device)
        with autocast(run.device):
            loss, metrics = prior.loss(tokens, labels)
        backward(loss, optimizer)
        length = nn.utils.clip_grad_norm_(prior.parameters(), config.clip or math.inf)
        run.log("prior", step, loss=loss, grad_norm=length, **metrics)          # raises on NaN before a weight changes
        set_lr(optimizer, config.lr, step, config.warmup, config.train_steps_prior)
        optimizer.step()
        update_ema(ema, prior, step, config.ema)
    return ema.eval()


# === Official weights: none were released for either paper ============================================================


# === Helpers: data, run folder, pictures (the same in all files; a reader may stop here) ==============================
class UserError(Exception):
    """A mistake the user can mend: main prints its line (what is wrong, what would be right) and exits with code 2."""


def check(config):
    """Raise UserError on settings that no model can be built from: one line with what would be right."""
    def need(good, message):
        if not good:
            raise UserError(message)
    need(config.model in ("gated", "pixelcnn"), f"model {config.model!r} is unknown: gated or pixelcnn")
    need(config.likelihood in ("softmax", "logistic"), f"likelihood {config.likelihood!r}: softmax or logistic")
    need(config.colours in (1, 3), f"colours is {config.colours}: 3, or 1 for grey images")
    need(2 <= config.levels <= 256, f"levels is {config.levels}: 2 to 256")
    for name in ("width", "head"):
        value, colours = getattr(config, name), config.colours      # channel c is colour c % C everywhere
        need(value > 0 and value % colours == 0, f"{name} {value} is not divisible by {colours}, the colours")
    for names, least in (("batch_size log_every save_every image_size layers mixtures kernel", 1),
                         ("warmup clip train_images test_images train_steps_prior num_classes", 0),
                         ("temperature", 1e-3)):
        for name in names.split():
            need(getattr(config, name) >= least, f"{name} is {getattr(config, name)}: at least {least}")
    need(config.lr > 0 and 0 <= config.ema <= 1, "lr must be positive, ema 0 to 1")
    need(0 <= config.seed < 2 ** 63, f"seed {config.seed}: 0 to 2**63 - 1")
    need(config.train_steps_tokenizer == 0, "train_steps_tokenizer must be 0: this tokenizer has nothing to learn")
    need(config.temperature == 1 or config.likelihood == "softmax", "the logistic likelihood has no temperature but 1")
    need(config.kernel % 2 == 1, f"kernel {config.kernel} is even: a kernel needs a centre, so 3, 5, 7 ...")
    need(config.model == "gated" or not config.num_classes,
         "the plain PixelCNN takes no condition: use --model gated, or --num-classes 0")


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
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"})}


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


def open_image(file):
    """An image file, upright, of 8 bits, on white where it is transparent -> RGB."""
    image = ImageOps.exif_transpose(Image.open(file))                           # photos of a phone stand upright
    if image.mode.startswith("I"):                                              # 16 bits
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:      # what shines through is white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(file, size):
    """The largest centred square of an image file, resized -> uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(open_image(file), (size, size), Image.Resampling.BOX))


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


def rng(seed, step):
    """The generator of a step: its batch, noise and masks depend on (seed, step) alone, also after a resume."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1)


def shard(*tensors, device):
    """This process's part of a global batch, on the device."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(tensors[0]) % world:
        raise UserError(f"a batch of {len(tensors[0])} is not divisible by {world} processes")
    return [t[rank::world].to(device) for t in tensors]


def average(*tensors):
    """Mean of each tensor over all processes, in place. One process: nothing to do."""
    for t in tensors if dist.is_initialized() else ():
        dist.all_reduce(t)
        t /= dist.get_world_size()


def autocast(device):
    """bfloat16 for the matrix products on CUDA; elsewhere, and for parameters and losses, float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def set_lr(optimizer, lr, step, warmup, total):
    """Linear warm-up to lr, then half a cosine down to zero at `total`; warmup 0: constant."""
    rise, fall = (step + 1) / (warmup + 1), (step - warmup) / max(1, total - warmup)
    for group in optimizer.param_groups if warmup else ():
        group["lr"] = lr * min(1, rise) * 0.5 * (1 + math.cos(math.pi * min(1, max(0, fall))))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema += (1 - decay) (model - ema), with less decay at first: the average must not lag behind a young model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(decay, (1 + step) / (10 + step)))


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


def to_bytes(images):
    """Images in [-1, 1] -> uint8 on the CPU."""
    return ((images.cpu() + 1) * 127.5).round().clamp(0, 255).byte()


def save_grid(images, path, columns):
    """Images (N, 3, H, W) in [-1, 1] as one PNG, row by row; small ones enlarged."""
    N, _, H, W = images.shape
    scale, rows = max(1, 64 // H), -(-N // columns)
    grid = torch.full((rows * columns, 3, H * scale + 2, W * scale + 2), 255, dtype=torch.uint8)
    grid[:N, :, 1:-1, 1:-1] = to_bytes(images).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = grid.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(grid.numpy()).save(buffer := io.BytesIO(), "PNG")
    write_file(path, buffer.getbuffer())


def peak_memory():
    """Largest memory of this process so far in MiB; on CUDA the GPU's."""
    if torch.cuda.is_available() or sys.platform == "win32":                    # Windows cannot tell
        return torch.cuda.max_memory_allocated() >> 20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


# === Command line =====================================================================================================
NAME = Path(__file__).stem


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError, and no flag may be abbreviated."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def positive(text):
    """An integer of 1 to ten million on the command line."""
    if not 1 <= int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text} is less than 1, or more than ten million")
    return int(text)


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


def read_photos(args, run):
    """images (n, 3, S, S) in [-1, 1], labels: of the command line's photos ("no class"), or of eight test images."""
    if not args.photos:
        images, labels = (split[:8] for split in load_test(args, run))
        return images, labels.clamp(max=run.config.num_classes).to(run.device)
    images = []
    for photo in args.photos:
        with explain(f"{photo} cannot be read as an image", "give PNG or JPEG files"):
            images.append(torch.from_numpy(read_image(photo, run.config.image_size).copy()).permute(2, 0, 1))
    return torch.stack(images) / 127.5 - 1, torch.full((len(images),), run.config.num_classes, device=run.device)


def load_test(args, run):
    """Test images (N, 3, H, W) in [-1, 1] of the run's data, and their labels."""
    images, labels = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir)).test
    return images / 127.5 - 1, labels


def load(args):
    """What a verb works on -> run, tokenizer, prior."""
    return load_run(args.run)


def draw_images(args, run, tokenizer, prior, labels, known=None):
    temperature = run.config.temperature if args.temperature is None else args.temperature
    check(dataclasses.replace(run.config, temperature=temperature, seed=args.seed))
    generator, parts = torch.Generator(run.device).manual_seed(args.seed), []
    for start in range(0, len(labels), 256):                                    # 256 at a time: the caches take memory
        k = slice(start, start + 256)
        parts.append(sample(tokenizer, prior, labels[k], known=None if known is None else known[k],
                            temperature=temperature, generator=generator))
    return torch.cat(parts)


def show(args, run, images, name, columns, following):
    """Write a grid of images to --out, or to RUN/name; the last line of a command: that path, and what to try next."""
    save_grid(images, out := args.out or run.folder / name, columns)
    official = getattr(args, "official", None)                                  # released weights: no run to go on with
    print(f"{out}   next: python {NAME}.py {'--help' if official else f'{following} {run.folder}'}")


def sample_command(args, run, tokenizer, prior):
    columns = run.config.num_classes if 0 < run.config.num_classes <= 16 else 8
    labels = read_labels(args.labels, run, args.num or 8 * columns)
    images = draw_images(args, run, tokenizer, prior, labels)
    np.savez(buffer := io.BytesIO(), arr_0=to_bytes(images).permute(0, 2, 3, 1).numpy(), labels=labels.cpu().numpy())
    show(args, run, images, "samples.png", columns, "complete")
    write_file(run.folder / "samples.npz", buffer.getbuffer())  # ADM's format; last: the picture may not be writable


def complete_command(args, run, tokenizer, prior):
    """Each row: an image, what the model is shown of it, and what it makes of that (PixelRNN Fig. 1)."""
    if args.photos and run.config.num_classes and not args.labels:
        raise UserError("this model draws by class: give --labels, one for each photo or one for all")
    (images, labels), num, S = read_photos(args, run), args.num or 6, run.config.image_size
    labels = read_labels(args.labels, run, len(images)) if args.labels else labels
    tokens = tokenizer.encode(images, torch.Generator().manual_seed(args.seed))
    half = tokens[:, :S // 2 * S * prior.colours]
    labels, known = (t.repeat_interleave(num, 0).to(run.device) for t in (labels, half))
    drawn = draw_images(args, run, tokenizer, prior, labels, known).cpu().unflatten(0, (-1, num))
    shown = tokenizer.decode(tokens)[:, None].repeat(1, 2, 1, 1, 1)
    shown[:, 1, :, S // 2:] = 0
    show(args, run, torch.cat([shown, drawn], 1).flatten(0, 1), "completions.png", 2 + num, "evaluate")


def interpolate_command(args, run, tokenizer, prior):
    """Columns: the class vector moves from one class to another, the random numbers stay (Gated PixelCNN Fig. 5)."""
    if len(args.labels or ()) != 2:
        raise UserError("interpolate needs two classes: --labels A B")
    a, b = F.one_hot(read_labels(args.labels, run, 2), run.config.num_classes).float()
    vectors = [torch.lerp(a, b, k / 8).expand(args.num or 6, -1) for k in range(9)]
    columns = [draw_images(args, run, tokenizer, prior, vector) for vector in vectors]
    show(args, run, torch.stack(columns, 1).flatten(0, 1), "interpolation.png", 9, "sample")


def psnr(a, b):
    """Peak signal-to-noise ratio of images in [-1, 1], each (B, 3, H, W) -> (B,) in dB; 100 at most."""
    return -10 * ((a - b) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def reconstruct_command(args, run, tokenizer, prior):
    images, _ = read_photos(args, run)
    again, _ = tokenizer(images)
    print("PSNR in dB:", *(f"{value:.1f}" for value in psnr(images, again)))
    show(args, run, torch.stack([images, again], 1).flatten(0, 1), "reconstructions.png", 8, "sample")


def evaluate_command(args, run, tokenizer, prior):
    """Likelihood of the test images (binary: bits drawn once, from a fixed seed), code use, speed, size."""
    images, labels = load_test(args, run)
    tokens = tokenizer.encode(images, torch.Generator().manual_seed(0))
    nats, L, V = likelihood(prior, tokens, labels), tokens.shape[1], run.config.levels
    count = torch.bincount(tokens.flatten(), minlength=V)
    entropy, start, num = float(torch.distributions.Categorical(count.double()).entropy()), time.time(), 16
    sample(tokenizer, prior, read_labels(None, run, num), generator=torch.Generator(run.device).manual_seed(0)).cpu()
    seconds = time.time() - start
    report = dict(
        file=f"{NAME}.py", data=Path(run.config.data).name, image_size=run.config.image_size,
        model=run.config.model, parameters=sum(p.numel() for p in prior.parameters()), samples_per_second=num / seconds,
        nats_per_token=nats / L, nats_per_image=nats, bits_per_dim=nats / L / math.log(2), test_images=len(images),
        unigram_nats_per_token=entropy, codebook_use=float((count > 0).float().mean()), perplexity=math.exp(entropy),
        psnr=float(psnr(images, tokenizer(images)[0]).mean()), peak_memory_mib=peak_memory(),
        train_steps=sum(run.state["progress"].values()), train_seconds=run.state["seconds"],
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        command=f"python {NAME}.py evaluate {run.folder}")
    print(f"test: {nats:.2f} nats per image, {nats / L:.4f} per token, {report['bits_per_dim']:.4f} bits per dim "
          f"(without context {entropy:.4f} nats per token, without anything {math.log(V):.4f})")
    if V == 2:
        print("protocol: dynamic binarisation, test bits from seed 0; the paper's 81.30 (PixelCNN) is on a static set")
    write_file(run.folder / "report.json", json.dumps(report, indent=1).encode())
    print(f"{run.folder / 'report.json'}   next: python {NAME}.py sample {run.folder}")


RUN = "run --out --num --seed --labels --temperature"
FLAGS = {
    "run": dict(help="run folder"),
    "photos": dict(nargs="*", help="image files, right behind the run (none: the first test images)"),
    "--data-dir": dict(help="where mnist and cifar10 are (default: where training found them)"),
    "--out": dict(help="PNG to write (default: in the run folder)"),
    "--labels": dict(nargs="+", help="classes by number or name, repeated in turn (default: the images', or all)"),
    "--num": dict(type=positive, help="images to draw; where there are photos: of each"),
    "--temperature": dict(type=float, help="divides the logits (default: the run's)"),
    "--seed": dict(type=int, default=0, help="of the generator that draws")}
VERBS = {   # name: (function, help, flags)
    "sample": (sample_command, "draw images", RUN),
    "complete": (complete_command, "hide the lower half of images and draw it anew", f"{RUN} photos --data-dir"),
    "interpolate": (interpolate_command, "draw images between two classes", RUN),
    "reconstruct": (reconstruct_command, "images through the tokenizer, side by side, with PSNR",
                    "run photos --data-dir --out"),
    "evaluate": (evaluate_command, "likelihood, speed, size: writes RUN/report.json", "run --data-dir")}

if __name__ == "__main__":
    main()
