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
they seldom fill whole codes. COMMIT: what is known is padded to a whole clip, and that clip's codes stand where MASK
would stand. They are half right, so the model learns three things in one loss: to refine them, to tell what is masked,
and to repeat what is given. In sampling all are drawn anew, the known ones too.

MAGVIT-v2 makes the tokenizer causal in time, so that a picture is a clip of one frame, and has no table of codes: a
code is the signs of 18 numbers (lookup-free quantization), one of 2^18. A transformer reads and tells them as 2 x 9
bits.

    videos (B,3,T,H,W) -> Encoder -> z (B,E,t,h,w) -> nearest of V codes, or signs -> tokens (B,N) -> Decoder -> videos
    training: tokens, some hidden (as the condition's codes or MASK) -> Transformer -> cross-entropy at ALL positions
    sampling: all hidden -> [ logits -> draw every hidden code -> hide the least sure again ] x steps -> Decoder

Glossary
    T, t       frames of a clip, of the code volume;   f, f_time: pixels and frames to a code, each way
    V, E       codes, width of a code (v2: V = 2^E);   N = t h w tokens
    condition  what a task knows of a clip, padded to a whole clip; known: where it is not padding
    MASK       id -1, which reads the last row of the table;   prefix: task (if several) and class, before the codes
    refine, mask, recons   parts of the loss: hidden and known, hidden and not known, not hidden
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# === Config and presets: every number of both stages ==================================================================
@dataclass
class Config:
    """All settings; each comment is also the flag's --help. The defaults are the demo."""
    frames: int = 8                 # T, frames of a clip (causal: one more than a multiple of f_time)
    image_size: int = 32            # side of the (square) frames in pixels
    num_classes: int = 9            # classes the transformer is told (0: none)
    # tokenizer
    causal: bool = False            # MAGVIT-v2's: causal convolutions, signs as codes (off: MAGVIT's)
    frame_norm: bool = False        # statistics of the norms per frame: nothing of the future (v2's third party: off)
    time_kernel: int = 3            # frames a convolution sees (1: a 2D net)
    padding: str = "constant"       # around the frames: constant (zeros), reflect or replicate (paper: reflect)
    ch: int = 32                    # width of the first level, a multiple of the groups (release: 64, 128)
    groups: int = 8                 # groups of GroupNorm (release: 32)
    ch_mult: tuple = (1, 2, 2)      # widths of the levels in units of ch; each level but the last halves the side
    temporal: tuple = (True, False)  # which of these halvings halve time as well
    num_res_blocks: int = 1         # residual blocks per level of the encoder, and after the last (release: 2)
    num_res_blocks_decoder: int = 1  # of the decoder, and before the first (release: as many)
    code_dim: int = 8               # E, width of a code; causal: bits, V = 2^E
    codebook_size: int = 128        # V, codes (causal: ignored)
    beta: float = 0.25              # weight of the commitment term
    entropy_weight: float = 0.1     # weight of the entropy term
    entropy_temperature: float = 0.01  # squared distances are divided by it in the entropy term
    codebook_ema: float = 0.0       # decay of the running means that the codes are (release: 0, by gradient)
    restart: int = 0                # a code unused for so many steps moves to a random latent of the batch (0: never)
    # transformer
    multi_task: bool = True         # several tasks: a task token before the class (off: one task, no token)
    token_bits: tuple = ()          # a code's bits in parts, each with a table of its own (v2: 9 9; empty: one table)
    width: int = 128                # M, width of the transformer
    heads: int = 4                  # attention heads
    layers: int = 4                 # transformer layers
    mlp_ratio: int = 4              # width of the layers' hidden units in units of M
    dropout: float = 0.0            # of embeddings, attention, its output and the mlp's (release: 0.1)
    label_smoothing: float = 1e-4   # share of the target spread evenly over all codes

    def __post_init__(self):
        self.ch_mult, self.temporal, self.token_bits = map(tuple, (self.ch_mult, self.temporal, self.token_bits))
        self.codebook_size = 2 ** self.code_dim if self.causal else self.codebook_size

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
        return ((self.frames - self.causal) // self.f_time + self.causal, *2 * (self.image_size // self.f,))

    @property
    def group_sizes(self):
        """Rows of the table for each part of a code."""
        return [2 ** bits for bits in self.token_bits] or [self.codebook_size]

    @property
    def rows(self):
        """Rows of the transformer's table: codes' parts, classes, "no class", and 1 or 16 special ones."""
        return sum(self.group_sizes) + self.num_classes + 1 + (16 if self.multi_task else 1)


# === Tokenizer: videos <-> codes ======================================================================================
class Conv(nn.Conv3d):
    """3D convolution of odd kernel that pads itself.  (B, C_in, T, H, W) -> (B, C_out, T', H', W'), T' = ceil(T / s).

    causal: in time all padding comes before, k - 1 frames of zeros, so that output t sees frames up to s t.
    """
    def __init__(self, in_channels, out_channels, config, kernel=3, stride=1, bias=True):
        time = min(kernel, config.time_kernel)
        super().__init__(in_channels, out_channels, (time, kernel, kernel), stride, bias=bias)
        self.before, self.mode = time - 1 if config.causal else time // 2, config.padding
        self.around = 4 * (kernel // 2,) + (self.before, time - 1 - self.before)

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


def blocks(in_channels, width, config, number):
    """Residual blocks, of which the first changes the width."""
    return nn.Sequential(*(ResBlock(width if i else in_channels, width, config) for i in range(number)))


class MeanPool(nn.Module):
    """Means of (2 or 1) x 2 x 2 cells; at an odd end of those that are there (TensorFlow's SAME)."""
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        stride = np.broadcast_to(self.stride, 3)
        kernel = [min(k, side) for k, side in zip(stride.tolist(), x.shape[2:])]            # one frame stays one
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
            self.down.append(nn.ModuleDict({"block": blocks(before, width, c, number)}))
            if i < len(widths) - 1:
                self.down[i]["downsample"] = (Conv(width, width, c, stride=c.strides[i]) if c.causal
                                              else MeanPool(c.strides[i]))
        self.mid_block, self.norm_out = blocks(widths[-1], widths[-1], c, number), Norm(widths[-1], c)
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

    QUIRK: the deviation is the unbiased one, so that a map needs two places.   Source: as the causal Encoder.
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
        self.conv_in, self.mid_block = Conv(c.code_dim, widths[-1], c), blocks(widths[-1], widths[-1], c, number)
        self.up = nn.ModuleList()                                               # up.0 is the finest
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            self.up.append(nn.ModuleDict({"block": blocks(before, width, c, number)}))
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


class LookupFree(nn.Module):
    """MAGVIT-v2's quantizer: a code is the signs of E channels, 2^E codes without a table.

    beta mean (z - sg(q))^2 + weight (mean entropy of each position's p - entropy of their mean); p(code | z) =
    softmax(-|z - code|^2 / temperature) over all 2^E codes. That softmax is a product over the channels, each bit
    being +1 with probability sigmoid(4 z / temperature), so that its entropy is a sum, and the mean over positions of
    all 2^E probabilities a product of two matrices, of the codes' lower and upper halves: nothing is approximated.
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
        return ((indices[:, None] >> torch.arange(self.dim, device=indices.device).view(-1, *(indices.ndim - 1) * [1]))
                % 2 * 2 - 1).float()

    def entropies(self, z):
        """z (n, E) -> mean entropy of a position's p, entropy of the mean p (nats)."""
        logits = 4 * z / self.temperature                                       # of each bit being +1
        each = (F.softplus(logits) - logits * logits.sigmoid()).sum(1).mean()
        halves = []
        for part in logits.split([self.dim // 2, self.dim - self.dim // 2], 1):
            signs = LookupFree(part.shape[1]).lookup(torch.arange(2 ** part.shape[1], device=z.device))
            halves.append(F.logsigmoid(part[:, None] * signs).sum(2).exp())     # (n, 2^(E/2))
        p = halves[1].T @ halves[0] / len(z)
        everywhere = p.detach().clone()
        average(everywhere)                                                     # in place, over all processes
        p = p + (everywhere - p.detach())
        return each, -(p * (p + 1e-5).log()).sum()

    def forward(self, z, generator=None):
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
        self.config, self.codebook_size = (c := config), config.codebook_size
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quantize = (LookupFree(c.code_dim, c.beta, c.entropy_weight, c.entropy_temperature) if c.causal else
                         VectorQuantizer(c.codebook_size, c.code_dim, c.beta, c.entropy_weight, c.entropy_temperature,
                                         c.codebook_ema, c.restart))
        for module in self.modules():                                           # Flax's initial weights, lecun_normal
            if isinstance(module, nn.Conv3d):
                std = module.weight[0].numel() ** -0.5 / 0.8796                 # 0.8796: what cutting at 2 std leaves
                nn.init.trunc_normal_(module.weight, 0, std, -2 * std, 2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def latents(self, videos):
        """videos (B, 3, T, H, W) -> z (B, E, t, h, w), before the quantizer. ValueError: not of this form."""
        f, time = self.config.f, self.config.f_time
        if (videos.ndim != 5 or videos.shape[1] != 3 or any(side % f or not side for side in videos.shape[3:])
                or (videos.shape[2] - self.config.causal) % time or not videos.shape[2]):
            raise ValueError(f"videos must be (B, 3, T, H, W), H and W multiples of {f}, T "
                             f"{'one more than ' * self.config.causal}a multiple of {time}, not {tuple(videos.shape)}")
        return self.encoder(videos if self.config.causal else (videos + 1) / 2)

    def quantized(self, z, generator=None):
        """z -> q, indices (B, t, h, w), losses. The 2D quantizer sees frames below each other."""
        q, indices, losses = self.quantize(z.flatten(2, 3), generator)
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

    def forward(self, videos, generator=None):
        """videos -> reconstruction, {commitment, codebook (not causal), entropy, perplexity of this batch's codes}."""
        q, indices, losses = self.quantized(self.latents(videos), generator)
        return self.decode_latents(q), losses | {"perplexity": use(indices, self)[1]}


# Copied from vqgan_gpt.py
def use(indices, tokenizer):
    """Share of the codebook that occurs in indices, and perplexity: so many codes, used evenly, would say as much."""
    p = torch.bincount(indices.flatten(), minlength=tokenizer.codebook_size) / indices.numel()
    return (p > 0).float().mean(), (-(p * p.clamp(min=1e-12).log()).sum()).exp()


@torch.no_grad()
def inflate(net, flat, how="central"):
    """Fill a 3D net with the parameters of one with time_kernel 1, by name: a 2D kernel becomes the central slice, or
    (average) every slice, divided; or (last) the last one, which in a causal net sees the present.

    Where channels were doubled (time's depth-to-space) the kernel goes to both halves. Other shapes stay as they are.
    Source: videogvt's 2d->3d; last: SEED-Voken video_lfqgan.inflate_from_image.
    """
    state, flat = net.state_dict(), flat.state_dict()
    for name, value in state.items():
        old = flat[name]
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
    "IPC": ("not centre", "black", -6), "IPD": ("not moving centre", "black", -6)}      # QUIRK: not their own, -7
MASK, GENERATE = -1, -3                                                         # rows from the end of the table


def region(task, shape, frames=1):
    """What a task knows of a volume (T, H, W), of pixels or of codes -> (T, H, W) bool. frames: of FP, CFP, FI.

    UserError: as many frames known as there are.   Source: train_lib/cond_utils.py; paper table 1, appendix.
    """
    T, H, W = shape
    t, y, x = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    if "start" in TASKS[task][0] or "ends" in TASKS[task][0]:
        if frames * (2 if task == "FI" else 1) >= T:
            raise UserError(f"{task} with {frames} known frames needs more than the {T} that there are")
    start = torch.from_numpy(np.round(np.linspace(0, W / 2, T))).long()[:, None, None]      # half to even
    rows, columns = (y >= H // 4) & (y < 3 * H // 4), (x >= W // 4) & (x < 3 * W // 4)
    moving = (x >= start) & (x < start + W // 2)
    return {"nothing": t < 0, "start": t < frames, "ends": (t < frames) | (t >= T - frames), "centre": rows & columns,
            "columns": columns, "rows": rows, "moving": moving, "not centre": ~(rows & columns),
            "not moving centre": ~(rows & moving)}[TASKS[task][0]]


def condition_video(task, videos, frames=1, black=-1.0):
    """videos (B, 3, T, H, W) -> the same where the task knows them; else their edge, repeated, or frames between the
    first and the last known, or black. What a task does not know is not read.   Source: as region."""
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


def hide(tokens, condition, known, scores, ratio, mode="commit", least=1, most=None):
    """COMMIT: hide some tokens -> inputs, targets (B, N), maskable and hidden (B, N) bool.

    tokens (B, N): codes; condition (B, N): codes of the condition video; known (B, N) bool: where that says something;
    scores (B, N): the lowest are hidden, floor(ratio N) of them, at least `least` and at most `most` (both (B,) or
    int); ratio (B,) or scalar. Where a hidden token is known it reads the condition's code (to be refined), else MASK.
    mode "commit" (release: cond->input): all may be hidden. Others keep known ones: "keep" (input->input) shows their
    own codes, "paste" (cond->cond) the condition's, which are then the targets too; "ignore" (None): no condition.
    Source: train_lib/mask_utils.py random_mask; paper eq. 3, 4.
    """
    maskable = torch.ones_like(known) if mode in ("commit", "ignore") else ~known
    count = maskable.sum(1)
    number = (count * torch.as_tensor(ratio, dtype=torch.float32, device=tokens.device)).floor().long()
    number = number.clamp(min=torch.as_tensor(least, device=tokens.device))
    number = number.minimum(torch.as_tensor(count if most is None else most, device=tokens.device))
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
    """p(every code | prefix, the codes that are not hidden).   Source: videogvt/models/simplified_bert.py.

    One table embeds codes, then classes and "no class", then 1 special row, or with several tasks 16 (MASK: the last);
    its rows of codes are the output's weights too. With Config.token_bits a code is several parts, each with rows and a
    softmax of its own; their vectors are added (MAGVIT-v2's token factorisation: 2^18 codes with 2 x 2^9 rows).
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
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):                   # cut at 2 std, not rescaled
                nn.init.trunc_normal_(module.weight, 0, 0.02, -0.04, 0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

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
        inputs, targets, weights, hidden = hide(tokens, condition, known, scores, ratio)
        logits = self(prefix, inputs)
        loss = weighted_mean(self.nats(logits, targets, self.config.label_smoothing), weights)
        nats = self.nats([part.detach() for part in logits], targets)
        right = join(torch.stack([part.argmax(-1) for part in logits], -1), self.config.token_bits) == targets
        return loss, {"refine": weighted_mean(nats, hidden & known), "mask": weighted_mean(nats, hidden & ~known),
                      "recons": weighted_mean(nats, ~hidden), "accuracy": weighted_mean(right, hidden & ~known)}


def weighted_mean(x, weights):
    """x, weights (B, N): mean over each video's weighted positions, then over videos."""
    return ((x * weights).sum(1) / (weights.sum(1) + 1e-8)).mean()


def build_prior(config):
    return MagvitTransformer(config)


# === Losses: squared error + ResNet-50's logits + GAN with R1 and LeCam ===============================================
class DiscriminatorBlock(nn.Module):
    """(leaky 3x3x3, means, leaky 3x3x3; plus means, 1x1x1) / sqrt 2.  (B, C_in, T, H, W) -> (B, C, T/2, H/2, W/2)."""
    def __init__(self, in_channels, out_channels, time_kernel=3):
        super().__init__()
        kernel, around = (time_kernel, 3, 3), (time_kernel // 2, 1, 1)
        self.conv1 = nn.Conv3d(in_channels, in_channels, kernel, padding=around)
        self.skip = nn.Conv3d(in_channels, out_channels, 1, bias=False)
        self.conv2, self.down = nn.Conv3d(in_channels, out_channels, kernel, padding=around), MeanPool(2)

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
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.blocks(F.leaky_relu(self.conv_in(x), 0.2))
        x = F.leaky_relu(self.conv_out(x), 0.2).permute(0, 2, 3, 4, 1).flatten(1)           # T, H, W, C, as in Flax
        return self.dense2(F.leaky_relu(self.dense1(x), 0.2))


def r1_penalty(discriminator, real):
    """Logits of real videos (B, 1), mean over them of D's squared gradient there. Not to be called under autocast."""
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


def lecam(real, fake, ema_real, ema_fake):
    """How far the mean logit of real videos is above the running mean of made ones, and the other way round, squared.

    Holds D back where it tells both apart too well.   Source: train_lib/losses.py; Tseng et al. 2021.
    """
    return F.relu(real.mean() - ema_fake).square() + F.relu(ema_real - fake.mean()).square()


# === Sampler: one visible loop for all tasks ==========================================================================
# Copied from maskgit.py
def gumbel(like, generator=None):
    """Gumbel noise of the shape and device of `like`: argmax(logits + it) is a draw from softmax(logits)."""
    u = torch.rand(like.shape, generator=generator, device=generator.device if generator else like.device)
    return -(-u.clamp(min=1e-30).log()).log().to(like)


@torch.no_grad()
def decode_tokens(prior, prefix, condition=None, known=None, *, steps=12, method="cosine", choice_temperature=4.5,
                  guidance=1.0, null_prefix=None, mode="commit", generator=None, noise=None, trace=None):
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
    blank = condition if mode == "paste" else torch.zeros_like(condition)       # all of it is hidden at first
    inputs, _, maskable, hidden = hide(blank, condition, known, torch.zeros(B, N, device=prefix.device), 1.0, mode)
    tokens, total = inputs, maskable.sum(1)
    for step in range(steps):
        logits = prior(prefix, inputs)
        if guidance != 1:
            null = prior(null_prefix, inputs.masked_fill(hidden, MASK))
            logits = [b + guidance * (a - b) for a, b in zip(logits, null)]
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


# === Helpers: data, run folder, pictures (the other files copy them; a reader may stop here) ==========================
# Copied from pixelcnn.py
class UserError(Exception):
    """A mistake the user can mend: main prints its line (what is wrong, what would be right) and exits with code 2."""


def check(config):
    """Raise UserError on settings that no model can be built from: one line with what would be right."""


# Copied from pixelcnn.py
def average(*tensors):
    """Mean of each tensor over all processes, in place. One process: nothing to do."""
    for t in tensors if dist.is_initialized() else ():
        dist.all_reduce(t)
        t /= dist.get_world_size()
