# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "matplotlib>=3.8", "tqdm>=4.66", "pillow>=10"]
# ///
"""MAGVIT: a video's codes, predicted all at once and refined in a few passes; one model for ten tasks. And MAGVIT-v2.

    MAGVIT: Masked Generative Video Transformer, Yu et al., CVPR 2023, arXiv 2212.05199
    Language Model Beats Diffusion: Tokenizer is Key to Visual Generation (MAGVIT-v2), Yu et al., ICLR 2024, 2310.05737
    Release: google-research/magvit (Flax code, no weights); of v2 none: SEED-Voken's Open-MAGVIT2 (third party)

The idea. A 3D VQGAN turns a clip into a volume of codes, and a bidirectional transformer fills it in as MaskGIT fills
in a picture. To predict, interpolate, inpaint and outpaint with one model, the known pixels must enter somehow, and
they seldom fill whole codes. COMMIT: what is known is padded to a whole clip, and a hidden code inside the known region
reads that clip's code, not MASK. It is half right, for it saw padding too; so the model learns three things in one
loss: to refine such codes, to tell what is masked, and to repeat what is shown. In sampling all codes are drawn anew,
the known ones too.

MAGVIT-v2 makes the tokenizer causal in time, so that a picture is a clip of one frame, and has no table of codes: a
code is the signs of 18 numbers (lookup-free quantization), one of 2^18. A transformer reads and predicts each as two
parts of 9 bits.

    videos (B,3,T,H,W) -> Encoder -> z (B,E,t,h,w) -> nearest of V codes, or signs -> tokens (B,N) -> Decoder -> videos
    training: tokens, some hidden (as the condition's codes or MASK) -> Transformer -> cross-entropy at ALL positions
    sampling: all hidden -> [ logits -> draw every hidden code -> hide the least sure again ] x steps -> Decoder

Glossary
    T, t       frames of a clip, of the code volume;   f, f_time: pixels and frames to a code, each way
    V, E       codes, width of a code (v2: V = 2^E);   N = t h w tokens
    condition  what a task knows of a clip, padded to a whole clip; known: where it is not padding
    MASK       id -1, which reads the last row of the table;   prefix: task (if several) and class, before the codes
    refine, mask, recons   parts of the loss: hidden and known, hidden and not known, not hidden
    tasks      CG class-conditional generation, FP frame prediction, CFP both, FI frame interpolation; OPC, OPV, OPH,
               OPD outpainting from the centre, columns, rows, moving columns; IPC, IPD inpainting of the centre, of a
               moving one
    release    google-research/magvit, where two numbers: of B and L; v2: MAGVIT-v2; QUIRK: an oddity kept for exactness

Run
    python magvit.py                                                the demo: moving shapes, minutes on two cores
    python magvit.py train --preset moving_mnist --data-dir DIR --out RUN
    python magvit.py sample RUN --labels turning growing            animated GIF, and a contact sheet
    python magvit.py edit RUN --task FP OPC                         test clips (or CLIP ...): predicts, outpaints, ...
    python magvit.py reconstruct CLIP.gif --official video.ckpt     Open-MAGVIT2's tokenizer
    python magvit.py train --causal --frame-norm --frames 9 --code-dim 18 --token-bits 9 9 --entropy-weight 0.1

Contents   Config and presets, Tokenizer, Tasks, Prior, Losses, Sampler, Training, Official weights, Helpers, Command
           line
Not here   the perceptual loss (squared differences of ResNet-50's logits, weight 0.1; maskgit.py has such a network),
           block masking, known frames as a prefix, a table that marks the condition's codes (both off in all
           released configs), top-k, FVD (its network is no part of the release), captions.
Departs    The demo and moving_mnist train without GAN and entropy term and with higher rates, for minutes; the paper's
           presets as released, but that positions begin as waves and the transformer's weights are averaged too. On
           CUDA bfloat16. Dropped labels and guidance are ours (release: none). open-magvit2's transformer is the
           paper's idea with MAGVIT-L's sizes: none was released. Clips are .gif, .npy or folders of images, not films.
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
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps, ImageSequence
from tqdm import tqdm


# === Config and presets: every number of both stages ==================================================================
@dataclass
class Config:
    """All settings; each comment is also the flag's --help. The defaults are the demo."""
    data: str = "shapes"            # shapes, moving_mnist, or a folder with train/<class>/*, test/<class>/* (clips)
    data_dir: str = "data"          # where mnist is looked for, or downloaded to
    train_images: int = 0           # use only this many training clips (0: all; of shapes 3,000, of digits 20,000)
    test_images: int = 0            # use only this many test clips (0: all; of shapes 400, of digits 2,000)
    skip_corrupt: bool = False      # leave out clips that cannot be read, instead of stopping
    image_size: int = 32            # side of the (square) frames in pixels
    frames: int = 8                 # T, frames of a clip (causal: one more than a multiple of f_time)
    num_classes: int = 4            # classes the transformer is told (0: none)
    # tokenizer
    causal: bool = False            # MAGVIT-v2's: causal convolutions, signs as codes (off: MAGVIT's)
    frame_norm: bool = False        # statistics of the norms per frame: nothing of the future (v2's third party: off)
    time_kernel: int = 3            # frames a convolution sees (1: a 2D net)
    padding: str = "constant"       # around the frames: constant (zeros), reflect or replicate (paper: reflect)
    ch: int = 8                     # width of the first level, a multiple of the groups (release: 64, 128)
    groups: int = 1                 # groups of GroupNorm (release: 32)
    ch_mult: tuple = (1, 2, 4, 8)   # widths of the levels in units of ch; each level but the last halves the side
    temporal: tuple = (1, 0, 0)     # which of these halvings halve time as well: 0 or 1 each
    num_res_blocks: int = 1         # residual blocks per level of the encoder, and after the last (release: 2)
    num_res_blocks_decoder: int = 1  # of the decoder, and before the first (release: as many)
    code_dim: int = 8               # E, width of a code; causal: bits, V = 2^E
    codebook_size: int = 128        # V, codes (causal: ignored)
    beta: float = 0.25              # weight of the commitment term
    entropy_weight: float = 0.0     # weight of the entropy term (release: 0.1)
    entropy_temperature: float = 0.01  # squared distances are divided by it in the entropy term
    inflation: str = "central"      # slice of a 3D kernel that a 2D one becomes, or average: all (causal: last)
    entropy_boost: float = 0.0      # entropy_weight is 1 + this times as large at first (paper's v2: 3)
    entropy_boost_steps: int = 2000  # steps in which that factor falls to 1
    gan: str = "non-saturating"     # losses of generator and discriminator: non-saturating or hinge
    disc_weight: float = 0.0        # weight of the GAN's term (0: no GAN; release: 0.1)
    disc_start: int = 0             # first step of the GAN; before it the discriminator does not learn (release: 0)
    disc_width: int = 16            # features of the discriminator's first layer (release: 64, 128)
    disc_mult: tuple = (2, 4, 4)    # widths of its blocks in units of that; each halves sides and frames
    r1_weight: float = 10.0         # weight of the squared gradient of the discriminator at real clips
    lecam_weight: float = 0.0       # weight of LeCam's term (paper: 0.001; released configs: 0)
    # transformer
    tasks: str = "CG CG CG CG CG CG FP CFP FI OPC OPV OPH OPD IPC IPD"  # in quotes; a step draws one of them
    known_frames: int = 1           # frames that FP and CFP know at the start, FI at both ends (Kinetics-600: 5)
    multi_task: bool = True         # several tasks: a task token before the class (off: one task, no token)
    token_bits: tuple = ()          # a code's bits in parts, each with a table of its own (v2: 9 9; empty: one table)
    width: int = 128                # M, width of the transformer
    heads: int = 4                  # attention heads
    layers: int = 4                 # transformer layers
    mlp_ratio: int = 4              # width of the layers' hidden units in units of M
    dropout: float = 0.0            # of embeddings, attention, its output and the mlp's (release: 0.1)
    label_dropout: float = 0.1      # share of labels replaced by "no class", which guidance needs (release: 0)
    label_smoothing: float = 1e-4   # share of the target spread evenly over all codes
    schedule: str = "cosine"        # mask schedule: cosine, linear, square, cubic, sqrt, log, exponential, or pow2.5
    # training
    seed: int = 0                   # a step is a function of (seed, step)
    batch_size_images: int = 8      # frames per step of the 2D tokenizer, over all processes
    batch_size: int = 4             # clips per step of the tokenizer, over all processes
    batch_size_prior: int = 16      # clips per step of the transformer, over all processes
    train_steps_images: int = 1200  # steps of a 2D tokenizer of single frames, before it is inflated to 3D (0: none)
    train_steps_tokenizer: int = 150  # steps of the tokenizer
    train_steps_prior: int = 2500   # steps of the transformer
    lr_images: float = 2e-3         # learning rate of the 2D tokenizer (release: 1e-4)
    lr_tokenizer: float = 3e-4      # learning rate of the tokenizer; of discriminators the same (release: 1e-4)
    lr_prior: float = 2e-3          # learning rate of the transformer (release: 1e-4)
    beta1: float = 0.9              # Adam's decay of the mean gradient, of tokenizers and discriminators (release: 0)
    warmup_tokenizer: int = 30      # steps of warm-up of the tokenizer; then a cosine to zero (0: constant)
    warmup: int = 100               # steps of warm-up of the transformer; then a cosine to zero (0: constant)
    clip: float = 1.0               # gradients of the transformer are scaled down to this norm (0: never)
    ema: float = 0.995              # decay of the averaged weights, which sampling uses (0: the weights themselves)
    log_every: int = 10             # steps between two rows of metrics.jsonl
    save_every: int = 250           # steps between two checkpoints
    sample_steps: int = 12          # passes of the transformer for a clip
    temperature: float = 0.8        # logits are divided by it in sampling (release: 1)
    choice_temperature: float = 4.5  # noise on the confidence, falling to 0: which codes come first
    guidance: float = 3.0           # logits = no class + guidance (class - no class) (release: 1, none)
    compile: bool = False           # torch.compile (CUDA)

    def __post_init__(self):
        self.ch_mult, self.temporal, self.disc_mult, self.token_bits = map(tuple, (
            self.ch_mult, self.temporal, self.disc_mult, self.token_bits))
        self.codebook_size = 2 ** self.code_dim if self.causal else self.codebook_size

    @property
    def of_images(self):
        """The 2D tokenizer of single frames that is inflated to this one. Task: one without a second frame."""
        return dataclasses.replace(self, frames=1, time_kernel=1, tasks="CG", temporal=(0,) * len(self.temporal),
                                   lr_tokenizer=self.lr_images, batch_size=self.batch_size_images,
                                   train_steps_tokenizer=self.train_steps_images)

    @property
    def widths(self):
        """Channels of the levels."""
        return [self.ch * mult for mult in self.ch_mult]

    @property
    def strides(self):
        """Of the halvings between the levels: (2 or 1, 2, 2) each."""
        return [(1 + time, 2, 2) for time in self.temporal[:len(self.ch_mult) - 1]]

    @property
    def f(self):
        """Pixels to a code, each way."""
        return 2 ** len(self.strides)

    @property
    def f_time(self):
        """Frames to a code (causal: but for the first)."""
        return math.prod(stride[0] for stride in self.strides)

    @property
    def latent_shape(self):
        """t, h, w of the code volume."""
        side = self.image_size // self.f
        return (self.frames - self.causal) // self.f_time + self.causal, side, side

    @property
    def known_code_frames(self):
        """Frames of codes that known_frames fill, at least 1: at the start, at the end."""
        return (max(1, (self.known_frames - self.causal) // self.f_time + self.causal),
                max(1, self.known_frames // self.f_time))

    @property
    def group_sizes(self):
        """Rows of the table for each part of a code."""
        return [2 ** bits for bits in self.token_bits] or [self.codebook_size]

    @property
    def rows(self):
        """Rows of the transformer's table: codes' parts, classes, "no class", and 1 or 16 special ones."""
        return sum(self.group_sizes) + self.num_classes + 1 + (16 if self.multi_task else 1)


RELEASE = dict(image_size=128, frames=16, ch=64, groups=32, beta1=0.0, ch_mult=(1, 2, 2, 4), temporal=(1, 1, 0),
               num_res_blocks=2, num_res_blocks_decoder=2, code_dim=256, codebook_size=1024, beta=0.25,
               entropy_weight=0.1, disc_weight=0.1, disc_width=64, disc_mult=(2, 4, 4, 4, 4), width=768, heads=12,
               layers=12, dropout=0.1, label_dropout=0.0,
               batch_size=128, batch_size_images=512, batch_size_prior=256, lr_images=1e-4, lr_tokenizer=1e-4,
               lr_prior=1e-4, warmup=5000, ema=0.999, save_every=5000,
               temperature=1.0, choice_temperature=4.5, guidance=1.0)
UCF101 = RELEASE | dict(data="ucf101", num_classes=101, tasks="CG", multi_task=False, train_steps_images=74_000,
                        train_steps_tokenizer=37_000, warmup_tokenizer=74, train_steps_prior=74_000)
BAIR = RELEASE | dict(data="bair", num_classes=0, image_size=64, ch_mult=(1, 2, 4), disc_mult=(2, 4, 4, 4),
                      tasks="FP", multi_task=False, train_steps_images=0, train_steps_tokenizer=135_200,
                      warmup_tokenizer=338, train_steps_prior=67_600)
LARGE = dict(ch=128, disc_width=128, batch_size=256, width=1024, heads=16, layers=24)
EIGHT = dict(tasks="FP FI OPH OPV OPC OPD IPC IPD", multi_task=True, train_steps_prior=202_800)
PRESETS = {
    "demo": Config(),
    "moving_mnist": Config(data="moving_mnist", image_size=24, num_classes=10, known_frames=2, ch_mult=(1, 2, 4),
                           temporal=(1, 0), codebook_size=64, tasks="CG CG FP CFP FI IPC IPD",
                           train_steps_tokenizer=800, train_steps_prior=10_000, guidance=2.0),
    "ucf101-b": Config(**UCF101),
    "ucf101-l": Config(**UCF101 | LARGE | dict(train_steps_tokenizer=74_000, warmup_tokenizer=37)),
    "bair-b": Config(**BAIR),
    "bair-l": Config(**BAIR | LARGE | dict(warmup_tokenizer=169, train_steps_prior=135_200)),
    "bair-b-8": Config(**BAIR | EIGHT),
    "bair-l-8": Config(**BAIR | LARGE | EIGHT | dict(warmup_tokenizer=169, train_steps_prior=270_400)),
    # MAGVIT-v2's: tokenizer as Open-MAGVIT2's, its transformer as the paper says (two tables of 2^9, MAGVIT-L's size)
    "open-magvit2": Config(**UCF101 | LARGE | dict(
        frames=17, causal=True, temporal=(0, 1, 1), num_res_blocks=4, num_res_blocks_decoder=4, code_dim=18,
        token_bits=(9, 9), entropy_boost=3.0, lecam_weight=0.001)),
}


# === Tokenizer: videos <-> codes ======================================================================================
class Conv(nn.Conv3d):
    """3D convolution of odd kernel that pads itself.  (B, C_in, T, H, W) -> (B, C_out, T', H', W'), T' = ceil(T / s).

    causal: in time all padding comes before, k - 1 frames, so that output t sees frames up to s t.
    """
    def __init__(self, in_channels, out_channels, config, kernel=3, stride=1, bias=True):
        kt = min(kernel, config.time_kernel)
        super().__init__(in_channels, out_channels, (kt, kernel, kernel), stride, bias=bias)
        before = kt - 1 if config.causal else kt // 2
        self.around, self.mode = 4 * (kernel // 2,) + (before, kt - 1 - before), config.padding     # of W, H, T

    def forward(self, x):
        return super().forward(F.pad(x, self.around, self.mode) if any(self.around) else x)


class Norm(nn.GroupNorm):
    """GroupNorm, eps 1e-6, over the whole clip (QUIRK: in a causal net the past then sees the future), or per frame."""
    def __init__(self, width, config, affine=True):
        super().__init__(config.groups, width, eps=1e-6, affine=affine)
        self.per_frame = config.frame_norm

    def forward(self, x):
        if not self.per_frame:
            return super().forward(x)
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class ResBlock(nn.Module):
    """x + f(x), f = norm, swish, 3x3x3, norm, swish, 3x3x3; a 1x1x1 convolution on x where widths differ. No biases."""
    def __init__(self, in_channels, out_channels, config):
        super().__init__()
        self.norm1, self.conv1 = Norm(in_channels, config), Conv(in_channels, out_channels, config, bias=False)
        self.norm2, self.conv2 = Norm(out_channels, config), Conv(out_channels, out_channels, config, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = Conv(in_channels, out_channels, config, 1, bias=False)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def blocks(in_channels, width, number, config):
    """`number` residual blocks, of which the first changes the width."""
    return nn.Sequential(*(ResBlock(width if i else in_channels, width, config) for i in range(number)))


class MeanPool(nn.Module):
    """Means of (2 or 1) x 2 x 2 cells; at an odd end of those that are there (TensorFlow's SAME)."""
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        kernel = [min(k, side) for k, side in zip(self.stride, x.shape[2:])]    # one frame stays one
        return F.avg_pool3d(x, kernel, ceil_mode=True, count_include_pad=False)


class Repeat(nn.Module):
    """MAGVIT's way up: every cell (2 or 1) x 2 x 2 times, then 3x3x3."""
    def __init__(self, width, config, stride):
        super().__init__()
        self.stride, self.conv1 = stride, Conv(width, width, config)

    def forward(self, x):
        return self.conv1(F.interpolate(x, scale_factor=tuple(map(float, self.stride))))


class DepthToSpace(nn.Module):
    """MAGVIT-v2's way up: 3x3x3 to (1 or 2) x 2 x 2 times the channels, which become cells. 1 + t -> 1 + 2 t frames.

    Channels are (frame, row, column, c) of the new cells. Of the frames 2 (1 + t) the one with index 1 is dropped (the
    third-party release's choice; paper: the first, which leaves as many and is causal too).
    """
    def __init__(self, width, config, stride):
        super().__init__()
        self.stride, self.conv1 = stride, Conv(width, width * math.prod(stride), config)

    @staticmethod
    def cells(x, stride):
        (B, C, T, H, W), (t, h, w) = x.shape, stride
        x = x.view(B, t, h, w, C // (t * h * w), T, H, W).permute(0, 4, 5, 1, 6, 2, 7, 3)
        return x.reshape(B, -1, T * t, H * h, W * w)

    def forward(self, x):
        x = self.cells(self.conv1(x), self.stride)
        return torch.cat([x[:, :, :1], x[:, :, 2:]], 2) if self.stride[0] == 2 else x


class Encoder(nn.Module):
    """videos (B, 3, T, H, W) -> z (B, E, t, h, w). Means between the levels, or (causal) convolutions of stride 2.

    Names are those of the third-party release. Source: videogvt/models/vqvae.py (all of MAGVIT's tokenizer); causal:
    SEED-Voken's Open_MAGVIT2/modules/diffusionmodules/improved_video_model.py.
    """
    def __init__(self, config):
        super().__init__()
        c, widths, number = config, config.widths, config.num_res_blocks
        self.conv_in, self.down = Conv(3, c.ch, c, bias=False), nn.ModuleList()
        for i, (before, width) in enumerate(zip([c.ch, *widths], widths)):
            self.down.append(nn.ModuleDict({"block": blocks(before, width, number, c)}))
            if i < len(widths) - 1:
                self.down[i]["downsample"] = (Conv(width, width, c, stride=c.strides[i]) if c.causal
                                              else MeanPool(c.strides[i]))
        self.mid_block, self.norm_out = blocks(widths[-1], widths[-1], number, c), Norm(widths[-1], c)
        self.conv_out = Conv(widths[-1], c.code_dim, c, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for part in level.values():
                x = part(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class AdaptiveNorm(nn.Module):
    """Norm of x, scaled and shifted by the deviations and means of the code map q (B, E, t, h, w); per frame: each
    frame by the codes it was made of.  x (B, C, T, H, W) -> as x.

    QUIRK: the deviation is the unbiased one, so that a map needs two codes.   Source: as the causal Encoder.
    """
    def __init__(self, width, config):
        super().__init__()
        self.norm, self.per_frame = Norm(width, config, affine=False), config.frame_norm
        self.gamma, self.beta = (nn.Linear(config.code_dim, width) for _ in range(2))

    def forward(self, x, q):
        dims = (3, 4) if self.per_frame else (2, 3, 4)
        std, mean = (q.var(dims, keepdim=True) + 1e-6).sqrt(), q.mean(dims, keepdim=True)       # (B, E, t or 1, 1, 1)
        scale, shift = (layer(y.movedim(1, -1)).movedim(-1, 1) for layer, y in ((self.gamma, std), (self.beta, mean)))
        if self.per_frame and q.shape[2] > 1:                                   # frame 0 of code 0, then s of each
            s = (x.shape[2] - 1) // (q.shape[2] - 1)
            scale, shift = (y[:, :, (torch.arange(x.shape[2], device=x.device) + s - 1) // s] for y in (scale, shift))
        return scale * self.norm(x) + shift


class Decoder(nn.Module):
    """Codes' vectors (B, E, t, h, w) -> videos (B, 3, T, H, W), neither clamped nor squashed."""
    def __init__(self, config):
        super().__init__()
        c, widths, number = config, config.widths, config.num_res_blocks_decoder
        way_up = DepthToSpace if c.causal else Repeat
        self.conv_in, self.mid_block = Conv(c.code_dim, widths[-1], c), blocks(widths[-1], widths[-1], number, c)
        self.up = nn.ModuleList()                                               # up.0 is the finest
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            self.up.append(nn.ModuleDict({"block": blocks(before, width, number, c)}))
            if i:
                self.up[i]["upsample"] = way_up(width, c, c.strides[i - 1])
        if c.causal:
            self.adaptive = nn.ModuleList(AdaptiveNorm(width, c) for width in [*widths[1:], widths[-1]])
        self.norm_out, self.conv_out = Norm(widths[0], c), Conv(widths[0], 3, c)

    def forward(self, q):
        x = self.mid_block(self.conv_in(q))
        for i in reversed(range(len(self.up))):
            x = self.adaptive[i](x, q) if hasattr(self, "adaptive") else x
            for part in self.up[i].values():
                x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


# Copied from vqgan_gpt.py
def nearest(z, codebook, limit=2 ** 22):
    """Index of the codebook's row nearest to each row of z.  z (n, E), codebook (V, E) -> (n,) int64.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all e. At most `limit` distances exist at a time.
    """
    square, rows = codebook.square().sum(1), max(1, limit // len(codebook))
    return torch.cat([torch.addmm(square, part, codebook.T, alpha=-2).argmin(1) for part in z.split(rows)])


# Copied from maskgit.py
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


# Copied from maskgit.py
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


def signs(indices, dim):
    """indices (B, ...) -> their lowest bits as -1 and 1 (B, dim, ...), channel 0 the lowest."""
    places = torch.arange(dim, device=indices.device).view(-1, *(indices.ndim - 1) * [1])
    return ((indices[:, None] >> places) % 2 * 2 - 1).float()


class LookupFree(nn.Module):
    """MAGVIT-v2's quantizer: a code is the signs of E channels, 2^E codes without a table.

    beta mean (z - sg(q))^2 + weight (mean entropy of each position's p - entropy of their mean); p(code | z) =
    softmax(-|z - code|^2 / temperature) over all 2^E codes. That softmax is a product over the channels, each bit
    being +1 with probability sigmoid(4 z / temperature), so that its entropy is a sum, and the mean over positions of
    all 2^E probabilities a product of two matrices, of the codes' lower and upper halves. Exact, but for a QUIRK: the
    1e-5 in the logarithm, as in the table's entropy_loss, is more than 1 / V from 17 bits on.
    Source: Open_MAGVIT2/modules/vqvae/lookup_free_quantize.py (third party; paper section 3).
    """
    def __init__(self, dim, beta=0.25, entropy_weight=0.1, temperature=0.01):
        super().__init__()
        self.dim, self.beta, self.entropy_weight, self.temperature = dim, beta, entropy_weight, temperature

    def indices(self, z):
        """z (B, E, ...) -> (B, ...) int64: channel 0 is the lowest bit; zero counts as negative."""
        bits = 2 ** torch.arange(self.dim, device=z.device)
        return ((z > 0).movedim(1, -1) * bits).sum(-1)

    def lookup(self, indices):
        """indices (B, ...) -> codes (B, E, ...) of -1 and 1."""
        return signs(indices, self.dim)

    def entropies(self, z):
        """z (n, E) -> mean entropy of a position's p, entropy of the mean p (nats)."""
        logits = 4 * z / self.temperature                                       # of each bit being +1
        each = (F.softplus(logits) - logits * logits.sigmoid()).sum(1).mean()
        halves = []
        for part in logits.split([self.dim // 2, self.dim - self.dim // 2], 1):
            plus = signs(torch.arange(2 ** part.shape[1], device=z.device), part.shape[1]).T.clamp(min=0)
            halves.append((F.logsigmoid(part) @ plus + F.logsigmoid(-part) @ (1 - plus)).exp())     # (n, 2^(E/2))
        p = halves[1].T @ halves[0] / len(z)
        everywhere = p.detach().clone()
        average(everywhere)                                                     # in place, over all processes
        p = p + (everywhere - p.detach())
        return each, -(p * (p + 1e-5).log()).sum()

    def forward(self, z):
        """z (B, E, ...) -> q of that shape, indices (B, ...), {commitment, entropy}, weighted. Straight-through."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            indices = self.indices(z)
            q = self.lookup(indices)
            each, together = self.entropies(z.movedim(1, -1).flatten(0, -2))
            losses = {"commitment": self.beta * F.mse_loss(z, q), "entropy": self.entropy_weight * (each - together)}
            return z + (q - z).detach(), indices, losses


class VideoTokenizer(nn.Module):
    """videos <-> codes: MAGVIT's 3D-VQ, or (causal) MAGVIT-v2's.

    Videos are (B, 3, T, H, W) in [-1, 1]; inside MAGVIT's has [0, 1], as released. T is a multiple of f_time, causal:
    one more than a multiple (an image: T = 1). Config.time_kernel 1: a 2D net, frame by frame, to be inflated.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config, self.codebook_size, c = config, config.codebook_size, config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quantize = (LookupFree(c.code_dim, c.beta, c.entropy_weight, c.entropy_temperature) if c.causal else
                         VectorQuantizer(c.codebook_size, c.code_dim, c.beta, c.entropy_weight, c.entropy_temperature))
        for module in self.modules():                                           # Flax's initial weights, lecun_normal
            if isinstance(module, nn.Conv3d):
                std = module.weight[0].numel() ** -0.5 / 0.8796                 # 0.8796: what cutting at 2 std leaves
                nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def latents(self, videos):
        """videos (B, 3, T, H, W) -> z (B, E, t, h, w), before the quantizer. ValueError: not of this form."""
        f, f_time = self.config.f, self.config.f_time
        if (videos.ndim != 5 or videos.shape[1] != 3 or any(side % f or not side for side in videos.shape[3:])
                or (videos.shape[2] - self.config.causal) % f_time or not videos.shape[2]):
            raise ValueError(f"videos must be (B, 3, T, H, W), H and W multiples of {f}, T "
                             f"{'one more than ' * self.config.causal}a multiple of {f_time}: {tuple(videos.shape)}")
        return self.encoder(videos if self.config.causal else (videos + 1) / 2)

    def quantized(self, z):
        """z -> q, indices (B, t, h, w), losses. The 2D quantizer sees frames below each other."""
        q, indices, losses = self.quantize(z.flatten(2, 3))
        return q.view_as(z), indices.view(len(z), *z.shape[2:]), losses

    def encode(self, videos):
        """videos (B, 3, T, H, W) in [-1, 1] -> indices (B, t, h, w) int64. ValueError as latents."""
        z = self.latents(videos)
        return self.quantize.indices(z.flatten(2, 3)).view(len(z), *z.shape[2:])

    def decode_latents(self, q):
        return self.decoder(q) if self.config.causal else 2 * self.decoder(q) - 1

    def decode(self, indices):
        """indices (B, t, h, w) -> videos (B, 3, T, H, W), in [-1, 1] but for overshoot."""
        q = self.quantize.lookup(indices.flatten(1, 2))
        return self.decode_latents(q.view(*q.shape[:2], *indices.shape[1:]))

    def forward(self, videos):
        """videos -> reconstruction, {commitment, codebook (not causal), entropy, perplexity of this batch's codes}."""
        q, indices, losses = self.quantized(self.latents(videos))
        return self.decode_latents(q), losses | {"perplexity": use(indices, self)[1]}


# Copied from vqgan_gpt.py
def use(indices, tokenizer):
    """Share of the codebook that occurs in indices, and perplexity: so many codes, used evenly, would say as much."""
    p = torch.bincount(indices.flatten(), minlength=tokenizer.codebook_size) / indices.numel()
    return (p > 0).float().mean(), (-(p * p.clamp(min=1e-12).log()).sum()).exp()


@torch.no_grad()
def inflate(net, net_2d, how="central"):
    """Fill a 3D net with the parameters of one with time_kernel 1, by name: a 2D kernel becomes the central slice, or
    (average) every slice, divided; or (last) the last one, which in a causal net sees the present.

    Where channels were doubled (time's depth-to-space) the kernel goes to both halves. Other shapes stay as they are.
    Source: videogvt's 2d->3d; last: SEED-Voken video_lfqgan.inflate_from_image.
    """
    state, state_2d = net.state_dict(), net_2d.state_dict()
    for name, value in state.items():
        old = state_2d[name]
        old = old.repeat(len(value) // len(old), *(old.ndim - 1) * [1]) if old.ndim and len(value) > len(old) else old
        if value.shape == old.shape:
            value.copy_(old)
        elif value.ndim == 5 and value[:, :, :1].shape == old.shape:
            kt = value.shape[2]
            if how == "average":
                value.copy_((old / kt).expand_as(value))
            else:
                value.zero_()
                value[:, :, kt - 1 if how == "last" else kt // 2] = old[:, :, 0]
    return net


def build_tokenizer(config):
    return VideoTokenizer(config)


# === Tasks: what is known of a video, and COMMIT ======================================================================
TASKS = {   # paper's name: what is known (see region), what fills the rest of the condition video, the task's token
    "CG": ("nothing", None, -3), "FP": ("start", "edge", -4), "CFP": ("start", "edge", -4),
    "FI": ("ends", "linear", -5), "OPC": ("centre", "edge", -6), "OPV": ("columns", "edge", -6),
    "OPH": ("rows", "edge", -6), "OPD": ("moving", "black", -6),
    "IPC": ("not centre", "black", -6), "IPD": ("not moving centre", "black", -6)}     # QUIRK: its own, -7, is not used
MASK = -1                                                                       # the last row of the table


def region(task, shape, frames=1, last=None):
    """What a task knows of a volume (T, H, W), of pixels or of codes -> (T, H, W) bool. frames: of FP, CFP, FI;
    last: of FI at the end (default: as many).

    Source: train_lib/cond_utils.py; paper table 1, appendix.
    """
    T, H, W = shape
    t, y, x = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    start = torch.from_numpy(np.round(np.linspace(0, W / 2, T))).long()[:, None, None]      # half to even
    rows, columns = (y >= H // 4) & (y < 3 * H // 4), (x >= W // 4) & (x < 3 * W // 4)
    moving = (x >= start) & (x < start + W // 2)
    ends = (t < frames) | (t >= T - (last or frames))
    return {"nothing": t < 0, "start": t < frames, "ends": ends, "centre": rows & columns, "columns": columns,
            "rows": rows, "moving": moving, "not centre": ~(rows & columns), "not moving centre": ~(rows & moving),
            }[TASKS[task][0]]


def condition_video(task, videos, frames=1, black=-1.0):
    """videos (B, 3, T, H, W) -> the same where the task knows them; else their edge, repeated, or a line from the last
    known frame before the gap to the first after it, or black. Reads nothing that the task does not know. Source: as
    region.
    """
    T, H, W = videos.shape[2:]
    known, fill = region(task, (T, H, W), frames).to(videos.device), TASKS[task][1]
    if fill == "black":
        return torch.where(known, videos, black)
    if fill == "linear":
        a, b = videos[:, :, frames - 1:frames], videos[:, :, T - frames:T - frames + 1]
        share = (torch.arange(T, device=videos.device) - frames + 1).clamp(0) / (T - 2 * frames + 1)
        return torch.where(known, videos, a + (b - a) * share.view(-1, 1, 1).to(videos))
    for dim in (2, 3, 4):                                                       # the known box's nearest index
        inside = known.any(dim=tuple({0, 1, 2} - {dim - 2})).nonzero()
        index = torch.arange(videos.shape[dim], device=videos.device).clamp(inside.min(), inside.max())
        videos = videos.index_select(dim, index)
    return videos


def known_codes(task, number, config, device):
    """region of the code volume for so many clips -> (number, N) bool: the same rule on the codes' grid, where a known
    code may see pixels that are not."""
    return region(task, config.latent_shape, *config.known_code_frames).to(device).expand(number, -1, -1, -1).flatten(1)


def condition_codes(tokenizer, task, videos, config):
    """Codes of the task's condition video: videos (B, 3, T, H, W) in [-1, 1] -> (B, N) int64."""
    return tokenizer.encode(condition_video(task, videos, config.known_frames)).flatten(1)


def class_of(task, labels, config):
    """labels (B,), or "no class" for each where the task or the model has none."""
    return labels if task in ("CG", "CFP") and config.num_classes else torch.full_like(labels, config.num_classes)


def prefix_of(tasks, labels, config):
    """Rows of the table that stand before the codes: [task, if the model knows several] [class or no class] -> (B, P).

    tasks: names, one for each row; labels (B,) int64 (num_classes: none).
    """
    rows = (sum(config.group_sizes) + labels)[:, None]
    if not config.multi_task:
        return rows
    task = torch.tensor([[TASKS[name][2]] for name in tasks], device=labels.device)
    return torch.cat([task + config.rows, rows], 1)


def lowest(scores, number):
    """scores (B, N), number (B,) -> (B, N) bool: the `number` lowest of each row; ties at the cut are among them."""
    return scores <= scores.sort(1).values.gather(1, (number - 1)[:, None])


def hide(tokens, condition, known, scores, ratio, mode="commit", most=None):
    """COMMIT: hide some tokens -> inputs, targets (B, N), maskable and hidden (B, N) bool.

    tokens (B, N): codes; condition (B, N): codes of the condition video; known (B, N) bool: where that says something;
    scores (B, N): the lowest are hidden, floor(ratio N) of them, at least 1 and at most `most` (B,); ratio
    (B,) or scalar. Where a hidden token is known it reads the condition's code (to be refined), else MASK.
    mode "commit" (release: cond->input): all may be hidden. Others keep known ones: "keep" (input->input) shows their
    own codes, "paste" (cond->cond) the condition's, which are then the targets too; "ignore" (None): no condition.
    Source: train_lib/mask_utils.py random_mask; paper eq. 3, 4.
    """
    maskable = torch.ones_like(known) if mode in ("commit", "ignore") else ~known
    count = maskable.sum(1)
    number = (count * torch.as_tensor(ratio, dtype=torch.float32, device=tokens.device)).floor().long()
    number = number.clamp(min=1).minimum(count if most is None else most)
    hidden = lowest(scores.masked_fill(~maskable, math.inf), number) & maskable
    targets = torch.where(known, condition, tokens) if mode == "paste" else tokens
    blank = torch.where(known, condition, MASK) if mode == "commit" else torch.full_like(tokens, MASK)
    return torch.where(hidden, blank, targets), targets, maskable, hidden


POWERS = {"linear": 1.0, "square": 2.0, "cubic": 3.0, "sqrt": 0.5}


# Copied from maskgit.py
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


# === Prior: a bidirectional transformer over prefix and codes =========================================================
# Copied from maskgit.py
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


def split(indices, bits):
    """indices (...) int64 -> a part for each of bits, lowest bits first: (..., len(bits)); bits (): one, the whole."""
    if not bits:
        return indices[..., None]
    return torch.stack([(indices >> sum(bits[:i])) % 2 ** n for i, n in enumerate(bits)], -1)


def join(parts, bits):
    """Undoes split."""
    return sum(parts[..., i] << sum(bits[:i]) for i in range(parts.shape[-1]))


class MagvitTransformer(nn.Module):
    """p(every code | prefix, codes shown, the condition's codes).   Source: videogvt/models/simplified_bert.py.

    One table embeds codes, then classes and "no class", then 1 special row, or with several tasks 16 (MASK: the last);
    its rows of codes are the output's weights too. With Config.token_bits a code is several parts, each with rows and a
    softmax of its own; their vectors are added (MAGVIT-v2's token factorisation: 2^18 codes with 2 x 2^9 rows).
    Positions are learned; they begin as waves of time, row and column (release: as noise), for a quicker start.
    """
    def __init__(self, config):
        super().__init__()
        check(config)
        self.config = c = config
        self.places, self.prefix = math.prod(c.latent_shape), 1 + c.multi_task
        self.word_embeddings = nn.Embedding(c.rows, c.width)
        self.position_embeddings = nn.Embedding(self.prefix + self.places, c.width)
        self.embeddings_ln, self.mlm_ln = (nn.LayerNorm(c.width, eps=1e-12) for _ in range(2))
        self.layers = nn.ModuleList(TransformerLayer(c.width, c.heads, c.mlp_ratio * c.width, c.dropout)
                                    for _ in range(c.layers))
        self.mlm_dense, self.mlm_bias = nn.Linear(c.width, c.width), nn.Parameter(torch.zeros(c.rows))
        wider = max(1, 768 / c.width) ** 0.5                                    # ours, for widths below the release's
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):                   # cut at 2 std, not rescaled
                std = 0.02 * (wider if isinstance(module, nn.Linear) else 1)
                nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        places = torch.stack(torch.meshgrid(*map(torch.arange, c.latent_shape), indexing="ij"), -1).view(-1, 3, 1)
        angle = places * math.pi * 5 ** torch.linspace(0, -2, c.width // 6)     # (N, 3, M / 6): waves of t, y and x
        with torch.no_grad():
            self.position_embeddings.weight[self.prefix:, :6 * (c.width // 6)] = 0.1 * torch.cat(
                [angle.sin(), angle.cos()], 2).flatten(1)

    def embed(self, prefix, tokens):
        """prefix (B, P) rows, tokens (B, N) codes, negative: rows from the table's end -> (B, P + N, M), normalised."""
        c, table = self.config, self.word_embeddings
        offsets = torch.tensor([sum(c.group_sizes[:i]) for i in range(len(c.group_sizes))], device=tokens.device)
        codes = table(split(tokens.clamp(min=0), c.token_bits) + offsets).sum(2)
        x = torch.where((tokens < 0)[..., None], table(torch.where(tokens < 0, c.rows + tokens, 0)), codes)
        return self.embeddings_ln(torch.cat([table(prefix), x], 1) + self.position_embeddings.weight)

    def features(self, x):
        """(B, P + N, M) -> the same, what the output matrix takes."""
        x = F.dropout(x, self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        return self.mlm_ln(F.gelu(self.mlm_dense(x), approximate="tanh"))

    def forward(self, prefix, tokens):
        """prefix (B, P), tokens (B, N) -> logits, a tuple of (B, N, K) float32, one for each part of a code."""
        h, sizes = self.features(self.embed(prefix, tokens))[:, self.prefix:], self.config.group_sizes
        logits = F.linear(h, self.word_embeddings.weight[:sum(sizes)], self.mlm_bias[:sum(sizes)])
        return (logits if logits.dtype == torch.float64 else logits.float()).split(sizes, -1)

    def nats(self, logits, targets, smoothing=0.0):
        """Cross-entropy of codes (B, N), summed over a code's parts -> (B, N). smoothing: so much for all alike."""
        log_p = [part.log_softmax(-1) for part in logits]
        parts = split(targets, self.config.token_bits)
        return sum(-(1 - smoothing) * lp.gather(-1, parts[..., i, None])[..., 0] - smoothing * lp.mean(-1)
                   for i, lp in enumerate(log_p))

    def loss(self, prefix, tokens, condition, known, scores, ratio):
        """-> the mean over ALL codes of smoothed cross-entropy, {nats of refine, mask, recons; accuracy of mask}.

        refine: hidden where the condition is known; mask: hidden elsewhere; recons: not hidden. See hide.
        """
        inputs, targets, _, hidden = hide(tokens, condition, known, scores, ratio)
        logits = self(prefix, inputs)
        loss = self.nats(logits, targets, self.config.label_smoothing).mean()
        nats = self.nats([part.detach() for part in logits], targets)
        right = join(torch.stack([part.argmax(-1) for part in logits], -1), self.config.token_bits) == targets
        return loss, {"refine": weighted_mean(nats, hidden & known), "mask": weighted_mean(nats, hidden & ~known),
                      "recons": weighted_mean(nats, ~hidden), "accuracy": weighted_mean(right, hidden & ~known)}


def weighted_mean(x, weights):
    """x, weights (B, N): mean over each video's weighted positions, then over videos."""
    return ((x * weights).sum(1) / (weights.sum(1) + 1e-8)).mean()


def build_prior(config):
    return MagvitTransformer(config)


# === Losses: squared error + GAN with R1 and LeCam ====================================================================
class DiscriminatorBlock(nn.Module):
    """(leaky 3x3x3, means, leaky 3x3x3; plus means, 1x1x1) / sqrt 2.  (B, C_in, T, H, W) -> (B, C, T/2, H/2, W/2)."""
    def __init__(self, in_channels, out_channels, time_kernel=3):
        super().__init__()
        kernel, around = (time_kernel, 3, 3), (time_kernel // 2, 1, 1)
        self.conv1 = nn.Conv3d(in_channels, in_channels, kernel, padding=around)
        self.skip = nn.Conv3d(in_channels, out_channels, 1, bias=False)
        self.conv2, self.down = nn.Conv3d(in_channels, out_channels, kernel, padding=around), MeanPool((2, 2, 2))

    def forward(self, x):
        h = F.leaky_relu(self.conv2(self.down(F.leaky_relu(self.conv1(x), 0.2))), 0.2)
        return (h + self.skip(self.down(x))) / math.sqrt(2)


class Discriminator(nn.Module):
    """One logit per clip, StyleGAN's without blur.  (B, 3, T, H, W) in [0, 1] -> (B, 1).

    mults: widths of the blocks in units of `width`; each halves time (down to 1) and both sides. time_kernel 1: of
    single frames (T = 1).   Source: videogvt/models/stylegan_discriminator_3d.py.
    """
    def __init__(self, shape, width=64, mults=(2, 4, 4, 4, 4), time_kernel=3):
        super().__init__()
        conv = lambda i, o: nn.Conv3d(i, o, (time_kernel, 3, 3), padding=(time_kernel // 2, 1, 1))
        widths = [width, *(width * mult for mult in mults)]
        left = math.prod(-(-side // 2 ** len(mults)) for side in shape)         # cells of the last map
        self.conv_in = conv(3, width)
        self.blocks = nn.Sequential(*(DiscriminatorBlock(i, o, time_kernel) for i, o in zip(widths, widths[1:])))
        self.conv_out = conv(widths[-1], widths[-1])
        self.dense1, self.dense2 = nn.Linear(left * widths[-1], widths[-1]), nn.Linear(widths[-1], 1)
        self.register_buffer("means", torch.zeros(2))                           # running, of both logits: for LeCam
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.blocks(F.leaky_relu(self.conv_in(x), 0.2))
        x = F.leaky_relu(self.conv_out(x), 0.2).permute(0, 2, 3, 4, 1).flatten(1)           # T, H, W, C, as in Flax
        return self.dense2(F.leaky_relu(self.dense1(x), 0.2))


# Copied from maskgit.py
def r1_penalty(discriminator, real):
    """Logits of real images (B, 1), mean over images of D's squared gradient there. Not to be called under autocast."""
    real = real.detach().requires_grad_()
    logits = discriminator(real)
    [gradient] = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return logits, gradient.square().flatten(1).sum(1).mean()


# Copied from maskgit.py
def discriminator_loss(gan, real, fake):
    """Logits of real and of made images -> sum of both terms: softplus, or hinge: relu(1 - real) + relu(1 + fake)."""
    loss = (lambda x: F.relu(1 + x)) if gan == "hinge" else F.softplus
    return (loss(-real) + loss(fake)).mean()


def adversarial_loss(gan, fake):
    """Logits of made videos -> the generator's term: softplus(-fake), or hinge: -fake; means."""
    return -fake.mean() if gan == "hinge" else F.softplus(-fake).mean()


def generator_loss(config, real, fake, quantizer_loss, discriminator=None):
    """mean (real - fake)^2 + quantizer_loss + weighted GAN term (discriminator None: without it) -> loss, metrics.

    real, fake: videos (B, 3, T, H, W) in [0, 1]. The weight is fixed, unlike VQGAN's adaptive one.
    """
    metrics = {"mse": F.mse_loss(fake, real)}
    loss = metrics["mse"] + quantizer_loss
    if discriminator:
        metrics["g_loss"] = adversarial_loss(config.gan, discriminator(fake))
        loss = loss + config.disc_weight * metrics["g_loss"]
    return loss, metrics


def lecam(real, fake, ema_real, ema_fake):
    """How far the mean logit of real videos is above the running mean of made ones, squared, plus how far the running
    mean of real ones is above the mean logit of made ones, squared.

    Holds D back where it tells both apart too well.   Source: train_lib/losses.py; Tseng et al. 2021.
    """
    return F.relu(real.mean() - ema_fake).square() + F.relu(ema_real - fake.mean()).square()


def build_discriminator(config):
    """-> Discriminator of clips of config's shape; of its time_kernel."""
    return Discriminator((config.frames, config.image_size, config.image_size), config.disc_width, config.disc_mult,
                         config.time_kernel)


# === Sampler: one visible loop for all tasks ==========================================================================
# Copied from maskgit.py
def gumbel(like, generator=None):
    """Gumbel noise of the shape and device of `like`: argmax(logits + it) is a draw from softmax(logits)."""
    u = torch.rand(like.shape, generator=generator, device=generator.device if generator else like.device)
    return -(-u.clamp(min=1e-30).log()).log().to(like)


@torch.no_grad()
def decode_tokens(prior, prefix, condition=None, known=None, *, steps=12, method="cosine", temperature=1.0,
                  choice_temperature=4.5, guidance=1.0, null_prefix=None, mode="commit", generator=None, noise=None,
                  trace=None):
    """Draw all codes of a video in passes -> (B, N). Each draws every hidden code, then hides the least sure again.

    prefix (B, P): see prefix_of. condition (B, N) codes of the condition video, known (B, N) bool where it says
    something (None: nothing is known). Known places are drawn as well: they begin as the condition's codes and are
    refined (mode "paste": they are kept). guidance g: null + g (logits - null), null: of null_prefix, no condition.
    noise(step, what, like): Gumbel noise, what "token" or "mask" (default: the generator's). trace: a list that gets
    {logits, tokens, inputs (of the next pass), score, hidden} of each pass. The last pass's draw is the result.
    Source: train_lib/parallel_decode.py; the paper's algorithm 1.
    """
    B, N, bits = len(prefix), prior.places, prior.config.token_bits
    noise = noise or (lambda step, what, like: gumbel(like, generator))
    known = torch.zeros(B, N, dtype=torch.bool, device=prefix.device) if known is None else known
    condition = torch.zeros(B, N, dtype=torch.long, device=prefix.device) if condition is None else condition
    nothing = torch.zeros(B, N, device=prefix.device)                           # scores: all that may be is hidden
    inputs, _, maskable, hidden = hide(condition, condition, known, nothing, 1.0, mode)
    tokens, total = inputs, maskable.sum(1)
    for step in range(steps):
        logits = prior(prefix, inputs)
        if guidance != 1:
            null = prior(null_prefix, inputs.masked_fill(hidden, MASK))
            logits = [b + guidance * (a - b) for a, b in zip(logits, null)]
        logits = [part / temperature for part in logits]
        parts = torch.stack([(part + noise(step, "token", part)).argmax(-1) for part in logits], -1)
        tokens = torch.where(hidden, join(parts, bits), tokens)
        score = -prior.nats(logits, tokens)                                     # log of its probability
        r = torch.tensor(step + 1.0) / steps                                    # float32, as the schedule
        score = score + choice_temperature * (1 - r.item()) * noise(step, "mask", score)
        score = score.masked_fill(~hidden, math.inf)
        if step < steps - 1:
            inputs, _, _, again = hide(tokens, condition, known, score, schedule(r, total.cpu(), method), mode,
                                       most=(hidden.sum(1) - 1).clamp(min=1))
            hidden = again & hidden
        if trace is not None:
            trace.append(dict(logits=logits, tokens=tokens, inputs=inputs, score=score, hidden=hidden))
    return tokens


@torch.no_grad()
def sample(tokenizer, prior, labels, *, task="CG", videos=None, mode="commit", **decoding):
    """Clips by a task (see TASKS) -> (B, 3, T, H, W) in [-1, 1].

    labels (B,) int64 classes (num_classes: none, as in all tasks but CG and CFP). videos (B, 3, T, H, W): what the task
    completes; what it does not know of them is not read. decoding: see decode_tokens. UserError: a task that the model
    was not trained for, guidance of a model without dropped labels.
    """
    c, B = prior.config, len(labels)
    if task not in c.tasks.split():
        raise UserError(f"task {task} is unknown: this model knows {c.tasks}")
    if (guidance := decoding.get("guidance", 1)) != 1 and not (c.label_dropout and c.num_classes):
        raise UserError(f"guidance {guidance}: this model never saw dropped labels: use 1, or train with some")
    known, condition = known_codes(task, B, c, labels.device), None
    if task != "CG":
        if videos is None:
            raise UserError(f"task {task} needs videos to complete")
        condition = condition_codes(tokenizer, task, videos, c)
    prefix = prefix_of(B * [task], class_of(task, labels, c), c)
    null = prefix_of(B * ["CG" if "CG" in c.tasks.split() else task], torch.full_like(labels, c.num_classes), c)
    tokens = decode_tokens(prior, prefix, condition, known, null_prefix=null, mode=mode, **decoding)
    return tokenizer.decode(tokens.view(B, *c.latent_shape)).clamp(-1, 1)


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
    """On single frames in 2D first, then, inflated, on clips. Returns the averaged tokenizer."""
    trained_2d = train_autoencoder(config.of_images, data, run, "images") if config.train_steps_images else None
    return train_autoencoder(config, data, run, "tokenizer", trained_2d)[0]


def train_autoencoder(config, data, run, stage, trained_2d=None):
    """Autoencoder and discriminator, both in every step and from the same clips (stage images: a frame of each).

    trained_2d: what this returned for single frames. Returns averaged autoencoder, discriminator (None: no GAN).
    """
    torch.manual_seed(config.seed)
    tokenizer, ema = (build_tokenizer(config).to(run.device) for _ in range(2))
    discriminator = build_discriminator(config).to(run.device) if config.disc_weight else None
    if trained_2d:
        inflate(tokenizer, trained_2d[0], "last" if config.causal else config.inflation)
        if discriminator:
            inflate(discriminator, trained_2d[1], config.inflation)
    ema.load_state_dict(tokenizer.state_dict())
    if config.compile:
        tokenizer.encoder.compile()                                             # not the codebook, which update changes
        tokenizer.decoder.compile()
    objects = {stage: tokenizer, f"{stage}_ema": ema}
    adam = lambda net: torch.optim.Adam([p for p in net.parameters() if p.requires_grad], config.lr_tokenizer,
                                        (config.beta1, 0.99), fused=run.device.type != "mps")
    optimizer = objects[f"optimizer_{stage}"] = adam(tokenizer)
    if discriminator:
        opposing = adam(discriminator)
        objects |= {f"discriminator_{stage}": discriminator, f"optimizer_discriminator_{stage}": opposing}
    print(f"{stage}: {sum(p.numel() for p in tokenizer.parameters()):,} parameters on {run.device}, "
          f"{len(data.train[0]):,} clips of {config.data}")
    clips = data.train[0]
    for step in run.steps(stage, config.train_steps_tokenizer, **objects):
        generator = rng(config.seed, step)
        index = torch.randint(len(clips), (config.batch_size,), generator=generator)
        if config.frames < clips.shape[2]:                                      # a frame of each: not whole clips
            frame = torch.randint(clips.shape[2], index.shape, generator=generator)
            [videos] = shard(clips[index, :, frame][:, :, None], device=run.device)
        else:
            [videos] = shard(clips[index], device=run.device)
        videos = videos / 127.5 - 1
        adversary = discriminator if step >= config.disc_start else None
        with autocast(run.device):
            again, found = tokenizer(videos)
        real, fake = (videos + 1) / 2, (again.float() + 1) / 2
        # 1. the autoencoder
        boost = 1 + config.entropy_boost * max(0.0, 1 - step / max(1, config.entropy_boost_steps))
        quantizer_loss = found["commitment"] + found.get("codebook", 0) + boost * found["entropy"]
        loss, metrics = generator_loss(config, real, fake, quantizer_loss, adversary)
        backward(loss, optimizer)
        # 2. the discriminator, before either has changed
        if adversary:
            logits, r1 = r1_penalty(discriminator, real)
            made = discriminator(fake.detach())
            d_loss = discriminator_loss(config.gan, logits, made)
            held = lecam(logits, made, *discriminator.means)
            backward(d_loss + config.r1_weight * r1 + config.lecam_weight * held, opposing)
            average(means := torch.stack([logits.mean(), made.mean()]).detach())            # of all processes
            discriminator.means.lerp_(means, 0.001)                                         # after the loss
            metrics |= {"d_loss": d_loss, "r1": r1, "lecam": held}
        run.log(stage, step, loss=loss, **found, **metrics)                     # raises on NaN before a weight changes
        for each in (optimizer, opposing) if adversary else (optimizer,):
            set_lr(each, config.lr_tokenizer, step, config.warmup_tokenizer, config.train_steps_tokenizer)
            each.step()
        update_ema(ema, tokenizer, step, config.ema)
    return ema.eval(), discriminator


# Copied from maskgit.py
def parameter_groups(prior, weight_decay=0.045):
    """Weight decay on the matrices of linear layers alone: not on biases, LayerNorm, embeddings (MAGVIT's rule)."""
    decay = {id(module.weight) for module in prior.modules() if isinstance(module, nn.Linear)}
    groups = [[p for p in prior.parameters() if (id(p) in decay) == wanted] for wanted in (True, False)]
    return [dict(params=groups[0], weight_decay=weight_decay), dict(params=groups[1], weight_decay=0.0)]


def train_prior(config, data, run, tokenizer):
    """COMMIT on the training clips, a task for each step. Returns the averaged prior."""
    torch.manual_seed(config.seed)
    prior, ema = (build_prior(config).to(run.device) for _ in range(2))
    ema.load_state_dict(prior.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(prior), config.lr_prior, (0.9, 0.96),
                                  fused=run.device.type != "mps")
    (videos, all_labels), tasks = data.train, config.tasks.split()
    all_tokens = cached_tokens(tokenizer, data, run)
    share, perplexity = use(all_tokens, tokenizer)
    print(f"prior: {sum(p.numel() for p in prior.parameters()):,} parameters, {prior.places} tokens a clip; "
          f"{share:.1%} of {tokenizer.codebook_size} codes in use, perplexity {perplexity:.1f}; nats per token without "
          f"context: {perplexity.log():.3f}")
    if config.compile:
        prior.loss = torch.compile(prior.loss)                                  # loss does not go through forward
    for step in run.steps("prior", config.train_steps_prior, prior=prior, prior_ema=ema, optimizer_prior=optimizer):
        generator = rng(config.seed, step)
        rank = dist.get_rank() if dist.is_initialized() else 0                  # dropout: every process its own
        torch.manual_seed(int(torch.randint(2 ** 62, (), generator=generator)) + rank)
        index = torch.randint(len(videos), (config.batch_size_prior,), generator=generator)
        task = tasks[torch.randint(len(tasks), (), generator=generator)]
        ratio = schedule(torch.rand((), generator=generator), prior.places, config.schedule)    # one for all clips
        scores, labels = torch.rand(len(index), prior.places, generator=generator), all_labels[index]
        dropped = torch.rand(labels.shape, generator=generator) < config.label_dropout
        labels = class_of(task, labels, config).masked_fill(dropped, config.num_classes)
        tokens, labels, scores, index = shard(all_tokens[index].flatten(1), labels, scores, index, device=run.device)
        known, condition = known_codes(task, len(tokens), config, run.device), tokens       # CG: known nowhere
        if task != "CG":
            with torch.no_grad():                                               # float32, as the clips' own codes
                seen = videos[index.cpu()].to(run.device) / 127.5 - 1
                condition = condition_codes(tokenizer, task, seen, config)
        with autocast(run.device):
            prefix = prefix_of(len(tokens) * [task], labels, config)
            loss, metrics = prior.loss(prefix, tokens, condition, known, scores, ratio)
        backward(loss, optimizer)
        length = nn.utils.clip_grad_norm_(prior.parameters(), config.clip or math.inf)
        run.log("prior", step, loss=loss, grad_norm=length, **metrics)          # raises on NaN before a weight changes
        set_lr(optimizer, config.lr_prior, step, config.warmup, config.train_steps_prior)
        optimizer.step()
        update_ema(ema, prior, step, config.ema)
    return ema.eval()


@torch.no_grad()
def tokenize(tokenizer, videos, device):
    """videos uint8 (n, 3, T, H, W) -> tokens (n, t, h, w) int64."""
    many = max(1, min(64, 2 ** 22 // videos[0].numel()))                        # the encoder takes memory
    parts = tqdm(videos.split(many), "tokens of the clips", leave=False, disable=None)
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


# === Official weights: google-research/magvit (Flax); SEED-Voken (PyTorch) ============================================
def torch_layout(name, value):
    """A Flax parameter in PyTorch's layout: kernels (kt, kh, kw, in, out), (in, out), attention's with heads apart."""
    if name.endswith("kernel") and value.ndim >= 4:                             # without time: a 2D net's
        value = value[None] if value.ndim == 4 else value
        return value.permute(4, 3, 0, 1, 2)
    if "self_attention/out/kernel" in name:
        return value.flatten(0, 1).T
    if name.endswith("kernel"):
        return value.flatten(1).T
    return value.flatten() if "self_attention" in name else value


def flax_names(model):
    """{our name: the release's} of all parameters of a tokenizer, discriminator or transformer.

    Flax numbers modules of a kind in the order in which they are called.
    """
    inner = dict(norm1="GroupNorm_0", conv1="Conv_0", norm2="GroupNorm_1", conv2="Conv_1", nin_shortcut="Conv_2")
    modules = {}                                                                # ours -> the release's
    if isinstance(model, VideoTokenizer):
        for net in ("encoder", "decoder"):
            down = ["down"] if net == "encoder" else []
            up = [f"up.{i}" for i in reversed(range(len(model.decoder.up)))] if net == "decoder" else []
            count = {}
            for part in ("conv_in", *down, "mid_block", *up, "norm_out", "conv_out"):
                for name, module in model.get_submodule(f"{net}.{part}").named_modules(prefix=f"{net}.{part}"):
                    kind = {ResBlock: "ResBlock", Conv: "Conv", Norm: "GroupNorm"}.get(type(module))
                    above = name.rpartition(".")[0]
                    if kind and "ResBlock" not in modules.get(above, ""):
                        modules[name] = f"{net}/{kind}_{count.get(kind, 0)}"
                        count[kind] = count.get(kind, 0) + 1
                    elif kind:
                        modules[name] = f"{modules[above]}/{inner[name.rpartition('.')[2]]}"
        modules["quantize.embedding"] = "quantizer"
    elif isinstance(model, Discriminator):
        modules = dict(conv_in="Conv_0", conv_out="Conv_1", dense1="Dense_0", dense2="Dense_1")
        modules |= {f"blocks.{i}.{ours}": f"ResBlock_{i}/{theirs}" for i in range(len(model.blocks))
                    for ours, theirs in (("conv1", "Conv_0"), ("skip", "Conv_1"), ("conv2", "Conv_2"))}
    else:
        modules = {name: f"BertEmbed_0/{name}" for name in ("word_embeddings", "position_embeddings", "embeddings_ln")}
        modules |= dict(mlm_dense="BertMlmLayer_0/mlm_dense", mlm_ln="BertMlmLayer_0/mlm_ln")
        for i in range(len(model.layers)):
            for ours in ("query", "key", "value", "out"):
                modules[f"layers.{i}.{ours}"] = f"BertLayer_{i}/BertAttention_0/self_attention/{ours}"
            modules[f"layers.{i}.attention_output_ln"] = f"BertLayer_{i}/BertAttention_0/attention_output_ln"
            for ours in ("intermediate_output", "layer_output", "layer_output_ln"):
                modules[f"layers.{i}.{ours}"] = f"BertLayer_{i}/BertMlp_0/{ours}"
    names = {"mlm_bias": "BertMlmLayer_0/mlm_bias/bias"}
    for name, p in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if name not in names:
            kind = model.get_submodule(module)
            leaf = ("embedding" if isinstance(kind, nn.Embedding) else leaf if leaf == "bias"
                    else "scale" if p.ndim == 1 else "kernel")
            names[name] = f"{modules[module]}/{'codebook' if modules[module] == 'quantizer' else leaf}"
    return {name: names[name] for name, _ in model.named_parameters()}


def third_party_names(model):
    """{our name: Open-MAGVIT2's} of all parameters: its convolutions stand one level deeper."""
    convolutions = {name for name, module in model.named_modules() if isinstance(module, Conv)}
    parts = [name.rpartition(".") for name, _ in model.named_parameters()]
    return {f"{module}.{leaf}": f"{module}.conv_1.{leaf}" if module in convolutions else f"{module}.{leaf}"
            for module, _, leaf in parts}


# Copied from maskgit.py
def flatten(tree, prefix=""):
    """A nested dict -> {"a/b/c": value}; names may be flat already."""
    found = {}
    for name, value in tree.items():
        found |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


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
    """Weights of the authors' code -> VideoTokenizer, MagvitTransformer or Discriminator, in eval mode.

    source: Flax's tree of parameters (g_params, ema_params, ...; nested, or flat with "a/b/c" as names), or
    Open-MAGVIT2's video tokenizer: path of a checkpoint, of which the averaged weights are taken, or its state dict.
    config: a Config; else the first preset whose names and shapes fit. All must: else UserError with the first five
    that do not.
    """
    name = "the dict" if isinstance(source, dict) else source
    if isinstance(source, dict):
        source = {key: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
                  for key, value in flatten(source.get("state_dict", source)).items()}
    given, found = read_weights(source), []
    ema = {key.removeprefix("model_ema."): value for key, value in given.items() if key.startswith("model_ema.")}
    given = {key: ema.get(key.replace(".", ""), value) for key, value in given.items()
             if not key.startswith(("loss.", "model_ema."))}                    # loss: discriminator, LPIPS
    build = (build_prior if any(key.startswith("Bert") for key in given) else build_tokenizer if
             any(key.startswith("encoder") for key in given) else build_discriminator)
    for c in [config] if config else PRESETS.values():
        with torch.device("meta"):
            model = build(c)
        names = third_party_names(model) if c.causal and build is build_tokenizer else flax_names(model)
        state = {ours: torch_layout(theirs, given[theirs].float()) for ours, theirs in names.items() if theirs in given}
        wrong = [names[key] for key, p in model.named_parameters() if key not in state or state[key].shape != p.shape]
        wrong += [key for key in given if key not in names.values()]
        found.append((wrong, model, state))
        if not wrong:
            break
    wrong, model, state = min(found, key=lambda each: len(each[0]))
    if wrong:
        raise UserError(f"{name} is no model of this paper: {len(wrong)} names or shapes do not fit, first "
                        f"{', '.join(wrong[:5])}")
    buffers = {key: torch.zeros(value.shape) for key, value in model.named_buffers()}
    model.load_state_dict(buffers | {key: value.contiguous().clone() for key, value in state.items()}, assign=True)
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
    need(c.gan in ("non-saturating", "hinge"), f"gan {c.gan!r} is unknown: non-saturating or hinge")
    need(c.padding in ("constant", "reflect", "replicate"), f"padding {c.padding!r}: constant, reflect or replicate")
    need(not c.causal or c.padding != "reflect", "padding reflect would show a causal net the future: constant")
    need(not c.causal or c.code_dim <= 24, f"code_dim {c.code_dim}: at most 24 bits")
    need(set(c.temporal) <= {0, 1}, f"temporal {c.temporal}: 0 or 1 for each halving")
    need(c.time_kernel > 0 and c.time_kernel % 2, f"time_kernel {c.time_kernel}: an odd number")
    need(min((*c.disc_mult, *c.token_bits), default=1) > 0, "disc_mult and token_bits take positive numbers")
    need(c.inflation in ("central", "average"), f"inflation {c.inflation!r}: central or average")
    need(c.schedule in ("cosine", "log", "exponential", *POWERS) or
         re.fullmatch(r"pow(?=.*[1-9])\d*\.?\d+", c.schedule),
         f"schedule {c.schedule!r} is unknown: cosine, {', '.join(POWERS)}, log, exponential, or pow2.5 and the like")
    wrong = [task for task in c.tasks.split() if task not in TASKS]
    need(c.tasks.split() and not wrong, f"task {' '.join(wrong)} is unknown: {' '.join(TASKS)}")
    first, last = c.known_code_frames
    told = {"start": (c.known_frames, first), "ends": (2 * c.known_frames, first + last)}   # frames, frames of codes
    for task in c.tasks.split():
        frames, codes = told.get(kind := TASKS[task][0], (0, 0))
        need(kind not in told or frames < c.frames and codes < c.latent_shape[0],
             f"{task} with {c.known_frames} known frames leaves nothing to tell of {c.frames}, or of their "
             f"{c.latent_shape[0]} frames of codes")
    need(c.multi_task or len(set(c.tasks.split())) == 1, "several tasks need --multi-task")
    for names, least in (("batch_size batch_size_prior log_every save_every frames image_size num_res_blocks code_dim "
                          "known_frames num_res_blocks_decoder disc_width batch_size_images width heads layers "
                          "mlp_ratio sample_steps", 1),
                         ("codebook_size", 2),
                         ("warmup warmup_tokenizer train_images test_images train_steps_tokenizer train_steps_prior "
                          "train_steps_images "
                          "num_classes disc_start disc_weight r1_weight lecam_weight beta entropy_weight clip "
                          "entropy_boost entropy_boost_steps choice_temperature", 0)):
        for name in names.split():
            need(getattr(c, name) >= least, f"{name} is {getattr(c, name)}: at least {least}")
    for name in ("dropout", "label_dropout", "label_smoothing", "ema"):
        need(0 <= getattr(c, name) < 1, f"{name} is {getattr(c, name)}: at least 0, below 1")
    need(-100 <= c.guidance <= 100, f"guidance is {c.guidance}: a number up to 100, 1 for none")
    need(c.choice_temperature < math.inf, f"choice_temperature is {c.choice_temperature}: a number, at least 0")
    for name in ("lr_images", "lr_tokenizer", "lr_prior", "entropy_temperature", "temperature"):
        need(0 < getattr(c, name) < math.inf, f"{name} is {getattr(c, name)}: must be positive")
    need(0 <= c.seed < 2 ** 63, f"seed {c.seed}: 0 to 2**63 - 1")
    need(c.ch_mult and min(c.ch_mult) > 0, "ch_mult needs a positive number for each level")
    need(len(c.temporal) >= len(c.ch_mult) - 1, f"temporal needs {len(c.ch_mult) - 1} numbers, 0 or 1 for each halving")
    need(c.ch > 0 and c.groups > 0 and c.ch % c.groups == 0, f"ch {c.ch} is not divisible by groups, {c.groups}")
    need(c.width % c.heads == 0, f"width {c.width} is not divisible by heads, {c.heads}")
    need(c.image_size % c.f == 0, f"frames of {c.image_size} pixels are not divisible by f = {c.f}")
    need((c.frames - c.causal) % c.f_time == 0,
         f"{c.frames} frames: must be {'one more than ' * c.causal}a multiple of {c.f_time}")
    need(math.prod(c.latent_shape) >= 2, "a clip of one token: masks need at least 2")
    need(not c.token_bits or 2 ** sum(c.token_bits) == c.codebook_size,
         f"token_bits {c.token_bits}: their sum must give {c.codebook_size} codes")
    need(sum(c.group_sizes) <= 2 ** 20, f"{sum(c.group_sizes):,} rows of codes: split them, --token-bits 9 9 of 18")
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


# Four each of the other files' nine shapes and eight colours: in minutes of training more do not hold through a clip.
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (235, 60, 50), "yellow": (245, 225, 60), "green": (70, 190, 80), "blue": (65, 105, 235)}
MOTIONS = ("left-right", "up-down", "turning", "growing")


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


def draw_motions(seed, indices, frames, size):
    """Clip i is a function of (seed, i): one shape in one colour; it moves evenly, one way or back in a clip's time.
    indices (B,) -> clips uint8 (B, T, size, size, 3), labels int64 (B,): the motion. turning: around the middle."""
    u = np.random.default_rng(seed).random((max(indices) + 1, 5), np.float32)[indices][..., None]
    labels, kinds, colours = ((u[:, i, 0] * len(names)).astype(np.int64)
                              for i, names in enumerate((MOTIONS, SHAPES, COLOURS)))
    colour = np.array(list(COLOURS.values()), np.float32)[colours]
    phase = 2 * u[:, 3] + np.arange(frames, dtype=np.float32) / frames          # (B, T); 2: there and back
    wave, angle = 1 - 2 * np.abs(phase % 2 - 1), np.pi * phase * np.where(u[:, 4] < 0.5, 1, -1)
    middle = np.zeros_like(wave)
    cx = np.choose(labels[:, None], (0.4 * wave, middle, 0.4 * np.cos(angle), middle))
    cy = np.choose(labels[:, None], (middle, 0.4 * wave, 0.4 * np.sin(angle), middle))
    R = np.where(labels[:, None] == MOTIONS.index("growing"), 0.5 + 0.25 * wave, np.float32(0.55))
    axis = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1               # pixel centres; half the side = 1
    coverage = np.empty((len(labels), frames, size, size), np.float32)
    for kind, shape in enumerate(SHAPES):
        k = kinds == kind
        r, X, Y = (a[k, :, None, None] for a in (R, cx, cy))
        distance = shape_distance(shape, (axis - X) / r, (axis[:, None] - Y) / r)
        coverage[k] = np.clip(0.5 - distance * r * (size / 2), 0, 1)
    ground = np.array((20, 20, 30), np.float32)
    clips = ground + coverage[..., None] * (colour[:, None, None, None] - ground)
    return clips.round().astype(np.uint8), labels


def bounce(digits, seed, frames, size):
    """Moving MNIST: digits uint8 (n, 28, 28), of which each flies through its clip and bounces off its edges ->
    clips uint8 (n, T, size, size, 3). A digit is as large as 28 pixels are in a clip of 64, at least 16."""
    side = max(16, 28 * size // 64)
    if side >= size:
        raise UserError(f"digits of {side} pixels need frames larger than {size} to move in")
    small = F.interpolate(torch.from_numpy(np.array(digits))[:, None], (side, side), mode="bilinear", antialias=True)
    generator, room = np.random.default_rng(seed), size - side
    start, angle = generator.random((len(digits), 2)) * room, generator.random(len(digits)) * 2 * np.pi
    speed = 0.12 * room * np.stack([np.cos(angle), np.sin(angle)], 1)
    path = (start[:, None] + speed[:, None] * np.arange(frames)[:, None]) % (2 * room)
    path = np.where(path > room, 2 * room - path, path).round().astype(int)     # (n, T, 2): a mirror at each edge
    clips = np.zeros((len(digits), frames, size, size), np.uint8)
    n, t = np.arange(len(digits))[:, None, None, None], np.arange(frames)[None, :, None, None]
    y, x = (path[..., i, None] + np.arange(side) for i in (0, 1))
    clips[n, t, y[..., None], x[:, :, None]] = small.numpy()
    return clips[..., None].repeat(3, -1)


DOWNLOADS = {   # name: (address, {file: MD5 (or start of the SHA-256) of its content, of .gz files of what is inside})
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637"})}


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


def read_clip(path, config):
    """The first config.frames frames of a .gif, a .npy (T, H, W, 3) uint8 or a folder of images, of each the largest
    centred square -> uint8 (T, size, size, 3). UserError: too few frames, of changing sizes, damaged."""
    T, path = config.frames, Path(path)
    with explain(f"{path} cannot be read as a clip", "give .gif, .npy (T, H, W, 3) of uint8, or a folder of images"):
        if path.suffix.lower() == ".npy":
            array = np.load(path)
            if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
                raise ValueError(f"{array.dtype} {array.shape}")
            frames = [Image.fromarray(frame) for frame in array[:T]]
        elif path.is_dir():
            files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
            number = lambda file: [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", file.name)]
            frames = [open_image(file) for file in sorted(files, key=number)[:T]]                  # 9 before 10
        else:
            with Image.open(path) as gif:
                shown = [(frame.convert("RGB"), frame.info.get("duration", 0)) for frame in ImageSequence.Iterator(gif)]
            least = min(time for _, time in shown) or 1                         # equal frames are one that lasts longer
            frames = [frame for frame, time in shown for _ in range(max(1, round(time / least)))][:T]
    if len(frames) < T:
        raise UserError(f"{path} has {len(frames)} frames: this model takes {T}")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        sizes = " and ".join(f"{w} x {h}" for w, h in sorted(sizes)[:2])
        raise UserError(f"{path} has frames of {sizes} pixels: all must be of one size")
    fit = lambda frame: np.asarray(ImageOps.fit(frame, 2 * (config.image_size,), Image.Resampling.BOX))
    return np.stack([fit(frame) for frame in frames])


def read_folder(source, config):
    """A folder with train/<class>/*, test/<class>/* (see read_clip) -> classes, {"train": (clips, labels), ...}."""
    root, splits = Path(source), {"train": ([], []), "test": ([], [])}
    if not root.is_dir():
        raise UserError(f"--data {source} is no folder: give shapes, moving_mnist, or a folder of clips")
    paths = sorted(path for split in splits for path in root.glob(f"{split}/*/*") if not path.name.startswith("."))
    classes, has_test = sorted({path.parent.name for path in paths}), any(path.parts[-3] == "test" for path in paths)
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))]    # so that a part has all classes
    for number, path in enumerate(tqdm(paths, "reading clips", leave=False, disable=None)):
        clips, labels = splits["test" if not has_test and number % 10 == 9 else path.parts[-3]]
        try:
            clips.append(read_clip(path, config))
            labels.append(classes.index(path.parent.name))
        except UserError:
            if not config.skip_corrupt:
                raise
            tqdm.write(f"left out: {path}")
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


def load_data(config):
    """The data set config.data as clips (N, 3, T, H, W). UserError: missing, empty, corrupt, or of other classes."""
    limit = {"train": config.train_images or None, "test": config.test_images or None}
    if config.data == "shapes":
        classes = MOTIONS
        splits = {split: draw_motions(seed, range(limit[split] or many), config.frames, config.image_size)
                  for split, seed, many in (("train", 0, 3000), ("test", 1, 400))}
    elif config.data == "moving_mnist":
        x, y, x_test, y_test = (np.frombuffer(file, np.uint8) for file in fetch("mnist", Path(config.data_dir)))
        classes, splits = "0123456789", {"train": (x[16:], y[8:], 20_000), "test": (x_test[16:], y_test[8:], 2_000)}
        for split, (x, y, many) in splits.items():
            many = limit[split] or many
            clips = bounce(x.reshape(-1, 28, 28)[:many], split == "test", config.frames, config.image_size)
            splits[split] = clips, y[:many]
    else:
        classes, splits = read_folder(config.data, config)
    for split, (clips, labels) in splits.items():
        if not len(clips):
            raise UserError(f"{config.data} has no {split} clips: it needs {split}/<class>/*.gif, *.npy or folders "
                            f"of images (where there is no test/ at all, every tenth clip of train/ is held out)")
        clips = torch.from_numpy(np.array(clips[:limit[split]])).permute(0, 4, 1, 2, 3).contiguous()
        splits[split] = clips, torch.tensor(np.array(labels[:limit[split]]), dtype=torch.int64)
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


def save_gif(videos, path, columns):
    """Videos (N, 3, T, H, W) in [-1, 1] as one animated GIF, row by row."""
    N, _, T, H, W = videos.shape
    scale, rows = max(1, 64 // H), -(-N // columns)
    grid = torch.full((rows * columns, 3, T, H * scale + 2, W * scale + 2), 255, dtype=torch.uint8)
    grid[:N, :, :, 1:-1, 1:-1] = to_bytes(videos).repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    grid = grid.unflatten(0, (rows, columns)).permute(3, 0, 4, 1, 5, 2).flatten(3, 4).flatten(1, 2)
    first, *rest = (Image.fromarray(frame.numpy()) for frame in grid)
    first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=rest, duration=125, loop=0)
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


def load(args):
    """What a verb works on: run, tokenizer, prior; of a released tokenizer alone there is no prior."""
    if not getattr(args, "official", None):
        if not args.run:
            other = ", or give --official TOKENIZER" if hasattr(args, "official") else ""
            raise UserError(f"name a run folder{other}")
        return load_run(args.run)
    if args.run:                                                                # a clip stands where a run would
        args.clips = [args.run, *args.clips]
    run, tokenizer = Run.__new__(Run), from_official(args.official)             # no folder: pictures go to this one
    if not isinstance(tokenizer, VideoTokenizer):
        raise UserError(f"{args.official} is no tokenizer")
    run.folder, run.device = Path("."), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run.config = tokenizer.config
    return run, tokenizer.to(run.device), None


def read_clips(args, run, number=8):
    """clips (n, 3, T, H, W) in [-1, 1], labels or None: those of the command line, or the first test clips."""
    if args.clips:
        return torch.from_numpy(np.stack([read_clip(clip, run.config) for clip in args.clips])).permute(
            0, 4, 1, 2, 3) / 127.5 - 1, None
    if getattr(args, "official", None):
        raise UserError("released weights come without test clips: give some")
    data = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir))
    return data.test[0][:number] / 127.5 - 1, data.test[1][:number]


def out_gif(args, run, name):
    """--out or RUN/name. UserError: no .gif."""
    out = Path(args.out or run.folder / name)
    if out.suffix.lower() != ".gif":
        raise UserError(f"--out {out}: give a .gif; a contact sheet .png is written beside it")
    return out


def show(args, run, videos, out, columns, following):
    """Write clips as an animated GIF, and a contact sheet .png: a clip's frames in a row."""
    save_gif(videos, out, columns)
    save_grid(videos[:12].transpose(1, 2).flatten(0, 1), out.with_suffix(".png"), videos.shape[2])
    official = getattr(args, "official", None)                                  # released weights: no run to go on with
    print(f"{out}   next: python {NAME}.py {'--help' if official else f'{following} {run.folder}'}")


def frame_psnr(a, b):
    """Clips in [-1, 1], each (B, 3, T, H, W) -> (B, T) in dB; 100 at most."""
    return -10 * ((a - b) / 2).square().mean((1, 3, 4)).clamp(min=1e-10).log10()


def draw_images(args, run, draw, *tensors):
    """draw(parts of tensors, generator=, decoding's settings by the flags or the run's) -> clips, on the CPU."""
    fields = dict(sample_steps=args.sample_steps, schedule=args.schedule, temperature=args.temperature,
                  choice_temperature=args.choice_temperature, guidance=args.guidance)
    config = dataclasses.replace(run.config, seed=args.seed, **{k: v for k, v in fields.items() if v is not None})
    check(config)
    generator = torch.Generator(run.device).manual_seed(args.seed)
    return torch.cat([draw(*(t.to(run.device) for t in part), generator=generator, **decoding(config)).cpu()
                      for part in zip(*(t.split(16) for t in tensors))])


def decoding(config):
    """The settings of decode_tokens that a run was trained to be drawn with."""
    return dict(steps=config.sample_steps, method=config.schedule, temperature=config.temperature,
                choice_temperature=config.choice_temperature, guidance=config.guidance if config.num_classes else 1.0)


def sample_command(args, run, tokenizer, prior):
    if "CG" not in run.config.tasks.split():                                    # it draws from no class: test clips
        return edit_command(argparse.Namespace(**vars(args), clips=[], task=None, data_dir=None), run, tokenizer, prior)
    out = out_gif(args, run, "samples.gif")
    columns = run.config.num_classes if 0 < run.config.num_classes <= 16 else 8
    labels = read_labels(args.labels, run, args.num or 4 * columns)
    videos = draw_images(args, run, lambda labels, **more: sample(tokenizer, prior, labels, **more), labels)
    np.savez(buffer := io.BytesIO(), arr_0=to_bytes(videos).permute(0, 2, 3, 4, 1).numpy(), labels=labels.cpu().numpy())
    show(args, run, videos, out, columns, "edit" if set(run.config.tasks.split()) > {"CG"} else "evaluate")
    write_file(run.folder / "samples.npz", buffer.getbuffer())                  # last: the picture may not be writable


def edit_command(args, run, tokenizer, prior):
    """Test clips, or given ones: each, what a task shows of it, what the model makes of that."""
    out = out_gif(args, run, "edit.gif")
    videos, labels = read_clips(args, run, args.num or 6)
    known = list(dict.fromkeys(task for task in run.config.tasks.split() if task != "CG"))
    wanted = args.task or known
    if wrong := [task for task in wanted or ["any"] if task not in known]:
        raise UserError(f"task {wrong[0]}: {run.folder} can {' '.join(known) or 'only sample'}")
    if args.labels or labels is None:
        if "CFP" in wanted and run.config.num_classes and not args.labels:
            raise UserError("CFP continues clips by class: give --labels, one for each or one for all")
        labels = read_labels(args.labels, run, len(videos))
    for task in wanted:                                                         # a file for each
        stem = task if not args.out else out.stem if len(args.task or ()) == 1 else f"{out.stem}_{task}"
        edit(args, run, tokenizer, prior, task, videos, labels, out.with_stem(stem))


def edit(args, run, tokenizer, prior, task, videos, labels, out):
    """One task: each clip, what the task shows of it, what the model makes of that."""
    more = {} if task == "CFP" else {"guidance": 1.0}                           # no class: nothing to guide by
    draw = lambda videos, labels, **settings: sample(tokenizer, prior, labels, task=task, videos=videos,
                                                     **settings | more)
    drawn = draw_images(args, run, draw, videos, labels)
    where = region(task, videos.shape[2:], run.config.known_frames)
    unknown = frame_psnr(videos, drawn)[:, ~where.flatten(1).all(1)].mean()
    print(f"{task}: PSNR {unknown:.1f} dB of the frames that are not known whole")
    shown = torch.where(where, videos, 0.0)
    show(args, run, torch.stack([videos, shown, drawn], 1).flatten(0, 1), out, 3, "evaluate")


@torch.no_grad()
def reconstruct_command(args, run, tokenizer, prior):
    out, (videos, _) = out_gif(args, run, "reconstructions.gif"), read_clips(args, run)
    again = tokenizer.decode(tokenizer.encode(videos.to(run.device))).clamp(-1, 1).cpu()
    print("PSNR in dB by frame:", *(f"{value:.1f}" for value in frame_psnr(videos, again).mean(0)))
    show(args, run, torch.stack([videos, again], 1).flatten(0, 1), out, 8, "sample")


@torch.no_grad()
def task_losses(config, tokenizer, prior, task, videos, tokens, labels):
    """COMMIT's parts on clips uint8 and their tokens (n, N), whose shares of hidden codes are spread evenly."""
    known, condition, n = known_codes(task, len(tokens), config, tokens.device), tokens, len(tokens)
    if task != "CG":
        condition = torch.cat([condition_codes(tokenizer, task, part / 127.5 - 1, config) for part in videos.split(16)])
    ratio = schedule((torch.arange(n) + 0.5) / n, prior.places, config.schedule).to(tokens.device)
    scores = torch.rand(known.shape, generator=torch.Generator().manual_seed(0)).to(tokens.device)
    prefix = prefix_of(n * [task], class_of(task, labels, config), config)
    return {k: float(v) for k, v in prior.loss(prefix, tokens, condition, known, scores, ratio)[1].items()}


@torch.no_grad()
def evaluate_command(args, run, tokenizer, prior):
    """Reconstruction, use of the codebook, COMMIT's losses of the test clips by task, speed, size."""
    data = load_data(dataclasses.replace(run.config, data_dir=args.data_dir or run.config.data_dir))
    (videos, labels), c = data.test, run.config
    tokens = tokenize(tokenizer, videos, run.device)
    quality = torch.cat([frame_psnr(v / 127.5 - 1, tokenizer.decode(t.to(run.device)).clamp(-1, 1).cpu())
                         for v, t in zip(videos.split(16), tokens.split(16))])
    few = [x[:64].to(run.device) for x in (videos, tokens.flatten(1), labels)]
    losses = {task: task_losses(c, tokenizer, prior, task, *few) for task in dict.fromkeys(c.tasks.split())}
    (share, perplexity), start, num = use(tokens, tokenizer), time.time(), len(labels[:8])
    sample(tokenizer, prior, labels[:num].to(run.device), task=c.tasks.split()[0],
           videos=videos[:num].to(run.device) / 127.5 - 1,
           generator=torch.Generator(run.device).manual_seed(0), **decoding(c)).cpu()
    seconds = time.time() - start
    report = dict(
        file=f"{NAME}.py", data=Path(c.data).name, image_size=c.image_size, frames=c.frames,
        parameters_tokenizer=sum(p.numel() for p in tokenizer.parameters()),
        parameters_prior=sum(p.numel() for p in prior.parameters()), samples_per_second=num / seconds,
        frames_per_second=num * c.frames / seconds, sample_steps=c.sample_steps, psnr=float(quality.mean()),
        psnr_by_frame=quality.mean(0).tolist(), codebook_size=tokenizer.codebook_size, codebook_use=float(share),
        perplexity=float(perplexity), nats_by_task=losses,
        nats_per_token=sum(x["mask"] for x in losses.values()) / len(losses),
        tokens_per_clip=prior.places, test_images=len(videos), peak_memory_mib=peak_memory(),
        train_steps=sum(run.state["progress"].values()), train_seconds=run.state["seconds"],
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type,
        command=f"python {NAME}.py evaluate {run.folder}")
    report["parameters"] = report["parameters_tokenizer"] + report["parameters_prior"]
    said = ", ".join(f"{task} {found['mask']:.2f}" for task, found in losses.items())
    print(f"test: PSNR {report['psnr']:.2f} dB; {share:.1%} of {tokenizer.codebook_size} codes used, perplexity "
          f"{perplexity:.1f}; nats per masked token {said}")
    write_file(run.folder / "report.json", json.dumps(report, indent=1).encode())
    print(f"{run.folder / 'report.json'}   next: python {NAME}.py sample {run.folder}")


RUN = "run --out --num --seed --labels --sample-steps --schedule --temperature --choice-temperature --guidance"
FLAGS = {
    "run": dict(nargs="?", help="run folder"),
    "--official": dict(metavar="FILE", help="released tokenizer (Open-MAGVIT2's for video)"),
    "clips": dict(nargs="*", help="clips, right behind the run: .gif, .npy or folders of images (none: test clips)"),
    "--task": dict(nargs="+", help="FP CFP FI OPC OPV OPH OPD IPC IPD (default: all that the run knows)"),
    "--data-dir": dict(help="where mnist is (default: where training found it)"),
    "--out": dict(help="GIF to write, with a contact sheet .png beside it (default: in the run folder)"),
    "--labels": dict(nargs="+", help="classes by number or name, repeated in turn (default: all)"),
    "--num": dict(type=positive, help="clips to draw"),
    "--sample-steps": dict(type=positive, help="passes of the transformer (default: the run's)"),
    "--schedule": dict(help="mask schedule: cosine, linear, square, ... (default: the run's)"),
    "--temperature": dict(type=float, help="divides the logits (default: the run's)"),
    "--choice-temperature": dict(type=float, help="noise on the confidence (default: the run's)"),
    "--guidance": dict(type=float, help="no class + guidance (class - no class) (default: the run's)"),
    "--seed": dict(type=int, default=0, help="of the generator that draws")}
VERBS = {   # name: (function, help, flags)
    "sample": (sample_command, "draw clips by class", RUN),
    "edit": (edit_command, "predict, interpolate, inpaint or outpaint clips", f"{RUN} clips --task --data-dir"),
    "reconstruct": (reconstruct_command, "clips through the tokenizer, above each other",
                    "run --official clips --data-dir --out"),
    "evaluate": (evaluate_command, "PSNR, codebook use, losses by task: writes RUN/report.json", "run --data-dir")}

if __name__ == "__main__":
    main()
