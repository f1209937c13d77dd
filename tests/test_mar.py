"""mar.py: what a masked token tells (nothing), orders and counts, the diffusion loss against formulas, latents' scale, releases."""
import dataclasses
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CASES

import mar
from mar import MAR, AutoencoderKL, Chain, Config, DiffLoss, Posterior, UserError, from_official, sample

GOLDEN = Path(__file__).parent / "golden"
TINY = Config(**CASES["mar-class"][1])
L = TINY.side ** 2


def build(config=TINY, seed=0):
    """Every weight random: the release's head says nothing at first."""
    torch.manual_seed(seed)
    tokenizer, prior = AutoencoderKL(config).eval(), MAR(config).eval()
    for p in prior.parameters():
        p.data = 0.3 * torch.randn(p.shape)
    return tokenizer, prior


def some_tokens(B=2, config=TINY):
    return torch.randn(B, config.side ** 2, config.latent_dim * config.patch_size ** 2, generator=torch.Generator().manual_seed(1))


def some_mask(B=2, n=10):
    return torch.rand(B, L, generator=torch.Generator().manual_seed(2)).argsort(1) < n


# --- tokenizer

def test_kl_is_that_of_torch():
    """Planted: variance in place of its log; the mean over an image in place of the sum."""
    moments = torch.randn(3, 8, 4, 4)
    posterior = Posterior(moments)
    mean, std = moments[:, :4], (0.5 * moments[:, 4:]).exp()
    theirs = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), theirs.sum((1, 2, 3)))
    x = torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(posterior.nll(x), -torch.distributions.Normal(mean, std).log_prob(x).sum((1, 2, 3)))


def test_measured_latents_have_mean_0_and_deviation_1():
    """Of samples, in each channel; decode undoes it. Planted: the means' deviation alone; deviations of all channels together."""
    tokenizer, _ = build()
    moments = torch.randn(500, 6, 4, 4) * torch.tensor([3.0, 0.1, 1, 1, 1, 1])[:, None, None] + torch.tensor([5.0, 0, -2, -1, 0, 1])[:, None, None]
    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 4, 4)
    before = tokenizer(images, noise)[0]
    tokenizer.measure(moments)
    z = tokenizer.normalise(Posterior(moments).sample(torch.randn(500, 3, 4, 4)))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.05, rtol=0)
    torch.testing.assert_close(tokenizer(images, noise)[0], before, atol=1e-4, rtol=1e-4)


def test_encode_draws_only_with_noise():
    """Planted: noise ignored; a sample where the mean was asked for."""
    tokenizer, _ = build()
    images, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 4, 4)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images))
    posterior = tokenizer.posterior(images)
    std = (tokenizer.encode(images, noise) - tokenizer.encode(images)) / noise
    torch.testing.assert_close(std, (0.5 * posterior.log_variance).exp(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches_come_back(p):
    latents = torch.randn(2, 3, 8, 8)
    tokens = mar.patchify(latents, p)
    assert torch.equal(mar.unpatchify(tokens, p), latents)
    assert torch.equal(tokens[0, 1, :p], latents[0, 0, 0, p:2 * p])             # the second token, its first channel's first row


def test_generator_loss_is_latent_diffusions():
    """Sums over an image, LPIPS's number at each pixel of each channel. Planted: means; LPIPS added once; the GAN's sign."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, kl_weight=0.01, perceptual_weight=2.0, disc_weight=0.4)
    images, last = torch.randn(2, 3, 8, 8), torch.nn.Parameter(torch.randn(2, 3, 8, 8))
    again, judge = images + 0.1 * last, lambda x: x.square().mean((1, 2, 3))
    nll, g = (images - again).abs().sum() / 2, -judge(again).mean()
    torch.testing.assert_close(mar.generator_loss(config, images, again, torch.tensor(5.0), last)[0], nll + 0.05)
    a, b = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (nll, g))
    torch.testing.assert_close(mar.generator_loss(config, images, again, torch.tensor(5.0), last, None, judge)[0], nll + 0.05 + 0.4 * a / (b + 1e-4) * g)
    lpips = lambda x, y: torch.tensor([1.0, 3.0])[:, None, None, None]
    torch.testing.assert_close(mar.generator_loss(config, images, again, torch.tensor(5.0), last, lpips)[0], nll + 2.0 * 2.0 * 192 + 0.05)


# --- transformer

def test_masked_latents_never_leak():
    """Change token t: where it is masked no z changes, bit for bit; where it is not, all do. All t. Planted: the mask's sign; no masking."""
    _, prior = build()
    tokens, mask, labels = some_tokens(1), some_mask(1), torch.tensor([3])
    with torch.no_grad():
        before = prior(tokens, labels, mask)
        for t in range(L):
            changed = tokens.clone()
            changed[:, t] += 1
            after = prior(changed, labels, mask)
            if mask[0, t]:
                assert torch.equal(after, before), f"z sees masked token {t}"
            else:
                assert (after != before)[0].any(-1).all(), f"z does not see token {t}"


def test_loss_is_of_masked_tokens_alone():
    """Its value does not change with known tokens' noise, and no gradient comes from there. Planted: the mean over all tokens."""
    _, prior = build()
    tokens, labels = some_tokens(), torch.tensor([3, 4])
    mask, t, noise = prior.draws(2, torch.Generator().manual_seed(0))
    value = prior.loss(tokens, labels, mask, t, noise)[0]
    other = torch.where(mask[:, None, :, None], noise, torch.randn_like(noise))
    assert torch.equal(prior.loss(tokens, labels, mask, t, other)[0], value)
    mse, vb, levels = prior.losses(tokens, labels, mask, t, noise)
    assert len(mse) == int(mask.sum()) * TINY.noise_levels and torch.equal(levels, t[mask[:, None].expand(t.shape)])
    z = prior(tokens, labels, mask)                                             # one copy of one token by hand
    b, k, i = 1, 2, int(mask[1].nonzero()[0])
    alone = prior.diffloss.loss(tokens[b, i][None], z[b, i][None], t[b, k, i][None], noise[b, k, i][None])
    row = int(mask[:, None].expand(t.shape).flatten()[:(b * TINY.noise_levels + k) * L + i].sum())
    torch.testing.assert_close(torch.cat(alone), torch.stack([mse[row], vb[row]]), rtol=1e-4, atol=1e-5)


def test_training_masks_the_same_number_in_every_image():
    """ceil(L r), r from least to 1, other places. Planted: floor; one order for the batch."""
    _, prior = build()
    seen = []
    for seed in range(60):
        mask, t, noise = prior.draws(4, torch.Generator().manual_seed(seed))
        counts = mask.sum(1)
        share = mar.mask_ratio(torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
        assert (counts == math.ceil(L * share)).all() and len(mask.unique(dim=0)) > 1 or counts[0] == L
        assert t.shape == (4, TINY.noise_levels, L) and 0 <= t.min() and t.max() < 1000 and noise.shape == (*t.shape, TINY.latent_dim)
        seen.append(int(counts[0]))
    assert min(seen) >= math.ceil(0.7 * L) and max(seen) == L


def test_mask_ratio_is_a_cut_normal_distribution():
    """Against draws that are thrown away outside. Planted: the mean at the lower end; deviation 0.5."""
    draws = 1 + 0.25 * torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    draws = draws[(draws >= 0.7) & (draws <= 1)].double()
    u = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    torch.testing.assert_close(mar.mask_ratio(u), torch.quantile(draws[:100_000], u), atol=3e-3, rtol=0)


@pytest.mark.parametrize("power", [1.0, 0.35])
def test_noise_levels_follow_their_power(power):
    """Quantiles of 1000 u^power, never 1000. Planted: the exponent's inverse; no clamp."""
    prior = MAR(dataclasses.replace(TINY, level_power=power))
    t = torch.cat([prior.draws(500, torch.Generator().manual_seed(seed))[1].flatten() for seed in range(3)]).float()
    assert 0 <= t.min() and t.max() == 999
    u = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(torch.quantile(t, u), 1000 * u ** power, rtol=0.03, atol=3.0)


def test_labels_are_the_buffer():
    """None and num_classes are the same, and no class. Planted: the last class for "no class"."""
    _, prior = build()
    tokens, mask = some_tokens(), some_mask()
    a, b, c = (prior(tokens, labels, mask) for labels in (None, torch.full((2,), 9), torch.full((2,), 8)))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_one_batch_is_learned_by_heart():
    """Planted: a detached z; the noise of another copy."""
    config = dataclasses.replace(TINY, width=32, decoder_width=32, head_width=64, dropout=0.0)
    torch.manual_seed(0)
    prior, tokens, labels = MAR(config), some_tokens(4), torch.arange(4)
    optimizer, losses = torch.optim.Adam(prior.parameters(), 5e-3), []
    for step in range(400):
        mask, t, noise = prior.draws(4, torch.Generator().manual_seed(step))
        loss, metrics = prior.loss(tokens, labels, mask, t, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["mse"].item())
    assert losses[0] == pytest.approx(1, abs=0.3) and np.mean(losses[-30:]) < 0.3


# --- diffusion loss

def test_zeroed_head_has_its_closed_form():
    """A head that says eps = 0 and v = 0, as at the start: mse is the noise's square, vb the formula, in float64, written out here.

    Planted: nats; the sum over channels; share of variance v in place of (v + 1) / 2; x0 clipped.
    """
    torch.manual_seed(0)
    head, n, D = DiffLoss(5, 8, 16, 2), 400, 5
    x, z, noise, t = torch.randn(n, D), torch.randn(n, 8), torch.randn(n, D), torch.randint(0, 1000, (n,))
    t[:20] = 0
    mse, vb = head.loss(x, z, t, noise)
    torch.testing.assert_close(mse, noise.square().mean(1))
    steps = np.arange(1000)
    abar = np.cumprod(1 - np.minimum(1 - np.cos(((steps + 1) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos((steps / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2, 0.999))
    for row in range(n):
        i, x0, e = int(t[row]), x[row].double().numpy(), noise[row].double().numpy()
        a, before = abar[i], abar[i - 1] if i else 1.0
        beta = 1 - a / before
        x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * e
        true_mean = (np.sqrt(before) * beta * x0 + np.sqrt(a / before) * (1 - before) * x_t) / (1 - a)
        ours = (np.sqrt(before) * beta * (x_t / np.sqrt(a)) + np.sqrt(a / before) * (1 - before) * x_t) / (1 - a)
        least = (lambda i: (1 - abar[i] / abar[i - 1]) * (1 - abar[i - 1]) / (1 - abar[i]))(max(i, 1))
        variance = np.sqrt(beta * least)
        if i:
            bits = np.mean(0.5 * (np.log(variance / least) + (least + (true_mean - ours) ** 2) / variance - 1)) / np.log(2)
        else:
            phi = lambda u: 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u ** 3)))
            low, high = (phi((x0 - ours + edge) / np.sqrt(variance)) for edge in (-1 / 255, 1 / 255))
            p = np.where(x0 < -0.999, high, np.where(x0 > 0.999, 1 - low, high - low))
            bits = np.mean(-np.log(np.maximum(p, 1e-12))) / np.log(2)
        assert vb[row].item() == pytest.approx(bits, rel=2e-3, abs=1e-3), (row, i)


def test_variance_alone_learns_from_its_loss():
    """Planted: eps not detached."""
    head = DiffLoss(3, 4, 16, 1)
    for p in head.parameters():
        p.data = 0.3 * torch.randn(p.shape)
    x, z, t, noise = torch.randn(6, 3), torch.randn(6, 4), torch.tensor([0, 1, 5, 200, 700, 999]), torch.randn(6, 3)
    head.loss(x, z, t, noise)[1].sum().backward()
    gradient = head.net.final_layer.linear.bias.grad
    assert not gradient[:3].any() and gradient[3:].all()


def test_true_noise_leads_back():
    """With the true eps x0 comes back, and the mean is the true one, in the full chain and in short ones. Planted: 1000-step betas in the short one."""
    x0 = torch.randn(7, 4, dtype=torch.float64)
    for chain in (Chain(), Chain.respaced(100), Chain.respaced(8)):
        n = len(chain.times)
        chain.tables = {name: table.double() for name, table in chain.tables.items()}
        for i in (1, n // 2, n - 2):
            where = torch.full((7,), i)
            noise = torch.randn(7, 4, dtype=torch.float64)
            x = chain.noised(x0, where, noise)
            mean, _, again = chain.back(x, where, noise, torch.zeros(7, 4))
            torch.testing.assert_close(again, x0, rtol=1e-3, atol=1e-3)
            signal, before = chain.tables["signal"][i].square(), chain.tables["signal"][i - 1].square()
            ddpm = before.sqrt() * x0 + (1 - before) * (signal / before).sqrt() / (1 - signal) * (x - signal.sqrt() * x0)
            torch.testing.assert_close(mean, ddpm, rtol=1e-3, atol=1e-3)
    Chain.respaced.cache_clear()


@pytest.mark.parametrize("S", [2, 7, 100, 1000])
def test_short_chains_keep_their_levels(S):
    """First and last level, growing; a level has the same share of signal in all chains. Planted: times 0..S-1."""
    chain, full = Chain.respaced(S), Chain()
    assert len(chain.times) == S and chain.times[0] == 0 and chain.times[-1] == 999 and (chain.times.diff() > 0).all()
    torch.testing.assert_close(chain.tables["signal"], full.tables["signal"][chain.times], rtol=1e-5, atol=1e-9)


def test_a_ring_is_learned():
    """Points on a circle, one for all z: a Gaussian would fill it. Planted: noise added in the last step; coef1 and coef2 exchanged."""
    torch.manual_seed(0)
    head = DiffLoss(2, 4, 64, 2)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(500):
        angle, t = 2 * math.pi * torch.rand(512), torch.randint(0, 1000, (512,))
        x = 1.4 * torch.stack([angle.cos(), angle.sin()], 1)
        mse, vb = head.loss(x, torch.zeros(512, 4), t, torch.randn(512, 2))
        optimizer.zero_grad()
        (mse + vb).mean().backward()
        optimizer.step()
    with torch.no_grad():
        x = head.sample(torch.zeros(500, 4), chain=Chain.respaced(50), clip_x0=3.0)
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    assert ((radius > 1.0) & (radius < 1.8)).float().mean() > 0.9
    assert torch.histc(angle, 8, -math.pi, math.pi).min() > 25                  # all around


def test_temperature_scales_the_steps_noise_alone():
    """At 0 only the start is random. Planted: the start scaled too; the last step's noise kept."""
    _, prior = build()
    z, start = torch.randn(5, TINY.decoder_width), torch.randn(5, TINY.latent_dim)
    def draw(seed):
        generator, first = torch.Generator().manual_seed(seed), [start]
        return lambda *shape: first.pop() if first else torch.randn(*shape, generator=generator)
    with torch.no_grad():
        a, b, c = (prior.diffloss.sample(z, temperature=T, chain=Chain.respaced(5), draw=draw(seed)) for T, seed in ((0.0, 1), (0.0, 2), (1.0, 1)))
        other = prior.diffloss.sample(z, temperature=0.0, chain=Chain.respaced(5), draw=lambda *shape: torch.ones(shape))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, other)


def test_guidance_of_one_is_no_guidance():
    """And at any other the two predictions' line is followed; the variance is the class's. Planted: halves exchanged."""
    _, prior = build()
    net, x, z, null = prior.diffloss.net, torch.randn(4, 3), torch.randn(4, 24), torch.randn(4, 24)
    y = torch.cat([net.cond_embed(z), net.cond_embed(null)])
    with torch.no_grad():
        eps, v = net(x, y[:4])
        none = net(x, y[4:])[0]
        for g in (0.0, 1.0, 3.0):
            guided = prior.diffloss.predict(x, y, g)
            torch.testing.assert_close(guided[0], none + g * (eps - none))
            torch.testing.assert_close(guided[1], v)


# --- sampler

@pytest.mark.parametrize("N", [1, 2, 3, 7, L])
def test_every_token_is_drawn_once(N):
    """Planted: the order read from its start (the released one is walked backwards); the last step draws one token."""
    tokenizer, prior = build()
    trace, order = [], torch.stack([torch.randperm(L) for _ in range(3)])
    sample(tokenizer, prior, torch.arange(3), sample_steps=N, denoise_steps=2, order=order, generator=torch.Generator().manual_seed(0), trace=trace)
    assert len(trace) == N and torch.equal(sum(step["chosen"].int() for step in trace), torch.ones(3, L, dtype=torch.int32))
    counts = [int(step["chosen"][0].sum()) for step in trace]
    assert all((step["chosen"].sum(1) == n).all() for step, n in zip(trace, counts)) and min(counts) > 0
    for b in range(3):
        drawn = torch.cat([step["chosen"][b].nonzero()[:, 0].sort().values for step in trace])
        wanted = torch.cat([part.sort().values for part in order[b].flip(0).split(counts)])
        assert torch.equal(drawn, wanted)
    for step, after in zip(trace, trace[1:]):
        assert torch.equal(after["masked"], step["masked"] & ~step["chosen"])
        assert torch.equal(step["tokens"][~after["masked"]], trace[-1]["tokens"][~after["masked"]])     # final, never revisited


def test_training_feeds_normalised_samples_and_drops_labels(tmp_path, monkeypatch):
    """Planted: means in place of samples; latents not normalised; labels never dropped; the average and the model exchanged."""
    config = dataclasses.replace(TINY, train_steps_prior=20, batch_size_prior=16, label_dropout=0.5, warmup=0, lr_prior=1e-3)
    tokenizer, _ = build(config)
    side, data = config.image_size // config.f, mar.Data(list("abc"), (torch.zeros(30), torch.arange(30) % 3), None)
    moments = torch.cat([torch.full((30, config.latent_dim, side, side), 5.0), torch.full((30, config.latent_dim, side, side), 2 * math.log(2))], 1)
    seen, loss = [], MAR.loss
    monkeypatch.setattr(mar, "cached_moments", lambda *_: moments[None])
    monkeypatch.setattr(MAR, "loss", lambda self, tokens, labels, *more: (seen.append((tokens, labels)), loss(self, tokens, labels, *more))[1])
    torch.manual_seed(config.seed)
    first = mar.build_prior(config).state_dict()
    averaged = mar.train_prior(config, data, mar.Run(tmp_path / "run", config, data.classes), tokenizer).state_dict()
    tokens, labels = (torch.cat(parts) for parts in zip(*seen))
    assert tokens.mean().abs() < 0.02 and abs(tokens.std() - 1) < 0.02          # mean 5 and deviation 2 before
    assert 0.4 < (labels == config.num_classes).float().mean() < 0.6
    assert any(not torch.equal(first[name], averaged[name]) for name in first)


def test_an_order_passes_over_what_is_known():
    """Wherever the known places stand in it, each iteration draws as many hidden ones as the schedule says. Planted: ranks among all places."""
    tokenizer, prior = build()
    hidden, order, trace = torch.rand(L) < 0.5, torch.stack([torch.randperm(L) for _ in range(3)]), []
    hidden[:3] = True
    known = torch.randn(3, prior.config.latent_dim, prior.config.side, prior.config.side)
    sample(tokenizer, prior, torch.arange(3), known=known, hidden=hidden, sample_steps=3, denoise_steps=2, order=order, trace=trace)
    left = [int(hidden.sum())] + [left for left, _ in mar.schedule(int(hidden.sum()), 3)]
    assert [step["chosen"].sum(1).tolist() for step in trace] == [3 * [a - b] for a, b in zip(left, left[1:])]
    for b in range(3):
        wanted = [place for place in order[b].flip(0).tolist() if hidden[place]]
        assert set(trace[0]["chosen"][b].nonzero()[:, 0].tolist()) == set(wanted[:left[0] - left[1]])
        assert not (trace[0]["chosen"][b] & ~hidden).any()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampler_sees_what_training_sees(guidance):
    """z of every iteration is that of the finished tokens under that iteration's mask (float64). Planted: the mask after the draw."""
    tokenizer, prior = build()
    tokenizer, prior, trace, labels = tokenizer.double(), prior.double(), [], torch.tensor([1, 2])
    sample(tokenizer, prior, labels, sample_steps=5, denoise_steps=4, guidance=guidance, generator=torch.Generator().manual_seed(0), trace=trace)
    with torch.no_grad():
        for step in trace:
            z = [prior(trace[-1]["tokens"], every, step["masked"])[step["chosen"]] for every in (labels, None)[:1 if guidance == 1 else 2]]
            torch.testing.assert_close(step["z"], torch.cat(z), rtol=1e-9, atol=1e-9)


def test_known_latents_stay():
    """Only hidden tokens are drawn, each in its turn; the pictures differ only by them. Planted: known ones put at the order's start."""
    tokenizer, prior = build()
    known, hidden, trace = torch.randn(2, 3, 4, 4), mar.hidden_tokens((4, 0, 4, 8), TINY), []
    sample(tokenizer, prior, torch.tensor([1, 2]), known=known, hidden=hidden, sample_steps=5, denoise_steps=2, generator=torch.Generator().manual_seed(0), trace=trace)
    before = mar.patchify(known, 1)
    assert torch.equal(trace[-1]["tokens"][:, ~hidden], before[:, ~hidden]) and (trace[-1]["tokens"] != before)[:, hidden].all()
    assert torch.equal(sum(step["chosen"].int() for step in trace), hidden.int().expand(2, L))
    assert all(step["chosen"].any() for step in trace)


@pytest.mark.parametrize("box, says", [((0, 0, 8, 8), "leaves nothing known"), ((0, 0, 9, 8), "does not lie in"), ((-1, 0, 2, 2), "does not lie in"), ((0, 0, 0, 2), "does not lie in")])
def test_boxes_that_make_no_sense(box, says):
    with pytest.raises(UserError, match=says):
        mar.hidden_tokens(box, TINY)


def test_boxes_hide_what_they_touch():
    """Planted: rounding down at both ends."""
    hidden = mar.hidden_tokens((1, 3, 2, 3), TINY).view(4, 4)                   # rows 1-2 and columns 3-5 of pixels, tokens of 2 x 2
    assert torch.equal(hidden.nonzero(), torch.tensor([[0, 1], [0, 2], [1, 1], [1, 2]]))


def test_sampler_refuses():
    """One line each. Planted: no check."""
    tokenizer, prior = build()
    labels = torch.tensor([0])
    with pytest.raises(UserError, match="17 iterations for 16 tokens"):
        sample(tokenizer, prior, labels, sample_steps=17)
    with pytest.raises(UserError, match="5 iterations for 4 tokens"):
        sample(tokenizer, prior, labels, known=torch.zeros(1, 3, 4, 4), hidden=mar.hidden_tokens((0, 0, 4, 4), TINY), sample_steps=5)
    _, plain = build(dataclasses.replace(TINY, label_dropout=0.0, guidance=1.0))
    with pytest.raises(UserError, match="never saw dropped labels"):
        sample(tokenizer, plain, labels, guidance=2.0)
    with pytest.raises(UserError, match="3 channels at f = 2, this tokenizer makes 5"):
        sample(AutoencoderKL(dataclasses.replace(TINY, latent_dim=5)), prior, labels)


def test_linear_guidance_rises_with_what_is_known():
    """Planted: the share known before the iteration."""
    left, guidance = zip(*mar.schedule(256, 64, 3.0))
    assert guidance[0] == pytest.approx(1 + 2 / 256) and all(a <= b for a, b in zip(guidance, guidance[1:])) and guidance[-1] == pytest.approx(3 - 2 / 256)
    assert left[-1] == 0 and {g for _, g in mar.schedule(256, 64, 3.0, "constant")} == {3.0}


# --- training

def test_latents_are_cached_with_their_mirror_images(tmp_path):
    """Of images, not of latents; another tokenizer's are refused. Planted: moments mirrored."""
    tokenizer, _ = build()
    data = mar.load_data(TINY)
    run = mar.Run(tmp_path / "run", TINY, data.classes)
    moments = mar.cached_moments(tokenizer, data, run)
    assert moments.shape == (2, 200, 6, 4, 4)
    with torch.no_grad():
        mirrored = tokenizer.quant_conv(tokenizer.encoder(data.train[0][:4].flip(3) / 127.5 - 1))
    torch.testing.assert_close(moments[1, :4], mirrored, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moments[1, :4], moments[0, :4].flip(3), atol=1e-3)
    assert torch.equal(mar.cached_moments(tokenizer, data, run), moments)
    with pytest.raises(UserError, match="latents.npz was made by another tokenizer"):
        mar.cached_moments(build(seed=5)[0], data, run)
    (tmp_path / "run" / "latents.npz").write_bytes(b"half a file")
    with pytest.raises(UserError, match="latents.npz is damaged"):
        mar.cached_moments(tokenizer, data, run)


def test_weight_decay_spares_the_head():
    """Planted: decay on the head's matrices; none on tables."""
    _, prior = build()
    names = {id(p): name for name, p in prior.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in mar.parameter_groups(prior))
    assert {"mask_token", "fake_latent", "class_emb.weight", "encoder_pos_embed_learned", "decoder_blocks.0.mlp.fc1.weight"} <= decayed
    assert {"diffloss.net.input_proj.weight", "encoder_norm.weight", "z_proj.bias"} <= spared and len(decayed) + len(spared) == len(names)


def test_dropout_is_only_in_training():
    _, prior = build()
    tokens, mask = some_tokens(), some_mask()
    assert torch.equal(prior(tokens, None, mask), prior(tokens, None, mask))
    assert not torch.equal(prior.train()(tokens, None, mask), prior(tokens, None, mask))


# --- presets and released weights

COUNTS = {"imagenet256-base": 207_924_768, "imagenet256-large": 478_326_304, "imagenet256-huge": 942_403_104}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("mar_*_release.json.gz")), ids=lambda path: path.name.removesuffix("_release.json.gz"))
def test_released_checkpoints_map_completely(path):
    """Every name once, equal shapes, the recorded number of parameters; one name more or less is seen. Planted: attention in the decoder's level."""
    release = json.load(gzip.open(path))
    state = {name: torch.empty(shape, device="meta") for name, shape in release["params"].items()}
    model, given = from_official(state), list(state)
    assert list(state) == given == list(release["params"])              # the caller's dict stays whole
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(shape) for shape in release["params"].values())
    if isinstance(model, MAR):
        name = "imagenet256-" + path.name.split("_")[1]
        assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
        same = "latent_dim width decoder_width encoder_depth decoder_depth heads mlp_ratio buffer head_width head_depth image_size patch_size dropout".split()
        assert {f: getattr(model.config, f) for f in same} == {f: getattr(mar.PRESETS[name], f) for f in same}
        drawing = (model.config.temperature, model.config.denoise_steps, model.config.guidance_schedule, model.config.clip_x0)
        assert drawing == (1.0, 100, "linear", 0.0)                             # not the demo's
    else:
        assert sum(p.numel() for p in model.parameters()) == 66_456_019 and model.latent_std.flatten()[0] == pytest.approx(1 / 0.2325)
    less = dict(state)
    less.pop("decoder.conv_out.bias" if "decoder.conv_out.bias" in state else "decoder_norm.bias")
    for wrong in ({**state, "extra": torch.empty(1)}, less):
        with pytest.raises(UserError, match="1 names"):
            from_official(wrong)


def test_presets_have_the_released_sizes():
    for name, preset in mar.PRESETS.items():
        mar.check(preset)
        assert (preset.clip_x0 == 0) == (name in COUNTS)                        # the release clips nothing
        if name in COUNTS:
            with torch.device("meta"):
                tokenizer, prior = AutoencoderKL(preset), MAR(preset)
            assert sum(p.numel() for p in prior.parameters()) == COUNTS[name]
            assert sum(p.numel() for p in tokenizer.parameters()) == 66_456_019


def test_official_weights_draw_on_the_command_line(tmp_path, monkeypatch, capsys):
    """Files as the release stores them; of the transformer the averaged weights are read. Planted: the last weights."""
    config = dataclasses.replace(TINY, ch=32, groups=32, ch_mult=(1, 1, 1, 1, 1), image_size=64, buffer=64, heads=1, disc_weight=0.0)
    tokenizer, prior = build(config)
    weights = {name: p for name, p in tokenizer.state_dict().items() if not name.startswith("latent_")}
    torch.save({"model": weights}, tmp_path / "kl16.ckpt")
    other = {name: torch.zeros_like(p) for name, p in prior.state_dict().items()}
    torch.save({"model": other, "model_ema": prior.state_dict(), "epoch": 3}, tmp_path / "checkpoint-last.pth")
    monkeypatch.chdir(tmp_path)
    mar.main(["sample", "--official", "kl16.ckpt", "checkpoint-last.pth", "--labels", "1", "--num", "2", "--sample-steps", "2", "--denoise-steps", "5"])
    assert "samples.png" in capsys.readouterr().out and (tmp_path / "samples.npz").exists()
    again, loaded = from_official("kl16.ckpt"), from_official("checkpoint-last.pth")
    for mine, theirs in ((tokenizer, again), (prior, loaded)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))
