"""var.py: maps and their order, the bridge between tokenizer and transformer, guidance, editing, progressive training, releases."""
import dataclasses
import gzip
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES

import var
from var import VAR, VQVAE, Config, MultiScaleQuantizer, UserError, from_official, kept_tokens, sample

GOLDEN = Path(__file__).parent / "golden"
TINY = Config(**CASES["var-class"][1])


def build(config=TINY, seed=0):
    torch.manual_seed(seed)
    tokenizer, prior = VQVAE(config).eval(), VAR(config).eval()
    return tokenizer, var.bind(prior, tokenizer)


def rough(prior, seed=0):
    """Weights that let every part matter: the release's initial gates and head are nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in prior.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return prior


# --- tokenizer

@pytest.mark.parametrize("K, table", {3: [0, 2, 3], 4: [0, 1, 2, 3], 5: [0, 1, 2, 2, 3], 6: [0, 0, 1, 2, 3, 3], 7: [0, 0, 1, 2, 2, 3, 3],
                                      8: [0, 0, 1, 1, 2, 2, 3, 3], 9: [0, 0, 1, 1, 2, 2, 2, 3, 3], 10: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
                                      14: [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]}.items())
def test_scales_use_the_released_phis(K, table):
    """Planted: ties to the coarser phi; ticks from 0 to 1."""
    assert var.phi_of_scale(K) == table
    assert MultiScaleQuantizer(range(1, K + 1), 8, 4).phi_of == table


def test_sum_of_residuals_is_what_decode_decodes():
    """f = what all scales add + what is left; decode(tokens) decodes that sum. Planted: phi left out of the last scale; of the rest."""
    tokenizer, _ = build()
    images = torch.randn(3, 3, 8, 8)
    f, q = tokenizer.latents(images), tokenizer.quantize
    steps = list(q.steps(f))
    tokens, added = torch.cat([step[1] for step in steps], 1), [step[2] for step in steps]
    assert torch.equal(tokens, tokenizer.encode(images))
    torch.testing.assert_close(q.sums(tokens), torch.stack(added).cumsum(0))
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer.decode_latents(sum(added)))
    torch.testing.assert_close(tokenizer.decode(tokens, 2), tokenizer.decode_latents(added[0] + added[1]))
    for k, side in enumerate(q.scales):                                 # the next scale quantizes exactly what is left
        z = F.adaptive_avg_pool2d(f - sum(added[:k]), side) if k else F.adaptive_avg_pool2d(f, side)
        torch.testing.assert_close(steps[k][0], z.permute(0, 2, 3, 1).flatten(0, 2))


def test_quantizer_loss_trains_what_it_should():
    """beta on the encoder's side; codes and phi learn from the loss alone, the encoder gets the decoder's gradient. Planted: f_hat
    detached between the scales; straight-through per scale."""
    q = MultiScaleQuantizer((1, 2, 4), 16, 8)
    f = torch.randn(2, 8, 4, 4, requires_grad=True)
    f_hat, _, loss = q(f)
    sums = [step[2] for step in q.steps(f)]
    want = sum(0.25 * F.mse_loss(f, s) + F.mse_loss(s, f) for s in torch.stack(sums).cumsum(0)) / 3
    torch.testing.assert_close(loss, want)
    grad, = torch.autograd.grad(f_hat.sum(), f, retain_graph=True)
    assert torch.equal(grad, torch.ones_like(f))
    assert torch.autograd.grad(f_hat.sum(), q.embedding.weight, retain_graph=True, allow_unused=True)[0] is None
    coarse = [torch.autograd.grad(F.mse_loss(s, f.detach()), q.phi[0].weight, retain_graph=True)[0] for s in torch.stack(sums).cumsum(0)]
    full, = torch.autograd.grad(loss, q.phi[0].weight, retain_graph=True)
    torch.testing.assert_close(full, sum(coarse) / 3)                   # finer terms train the coarsest phi too


@pytest.mark.parametrize("decay, restart", [(0.9, 0), (0.0, 2), (0.9, 2)])
def test_moving_codebook(decay, restart):
    """Planted: no restart; the mean of the last scale's latents alone."""
    torch.manual_seed(0)
    q = MultiScaleQuantizer((1, 2, 4), 16, 8, decay=decay, restart=restart).train()
    f = torch.randn(64, 8, 4, 4)
    first = q.embedding.weight.clone()
    for step in range(12):
        rests = torch.cat([z for z, _, _ in q.steps(f)])
        tokens = torch.cat([t.flatten() for _, t, _ in q.steps(f)])
        q(f, torch.Generator().manual_seed(step))
    assert not torch.equal(first, q.embedding.weight) and q.embedding.weight.requires_grad == (not decay)
    if restart:
        assert len(q.indices(f).unique()) >= 12
    if decay and not restart:
        assert q.total.norm() > 0 and len(rests) == len(tokens) == 64 * 21
        assert torch.equal(q.indices(f), q.eval().indices(f))


def test_codes_are_running_means_and_start_anew_where_idle():
    """By hand, for one code; a code moves after exactly `restart` steps without use. Planted: decay and 1 - decay exchanged; one step late."""
    q = MultiScaleQuantizer((1, 2), 4, 2, decay=0.9, restart=3)
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    count, total = q.count.clone(), q.total.clone()
    q.update(z, torch.tensor([1, 1]), torch.Generator().manual_seed(0))
    count = 0.9 * count + 0.1 * torch.tensor([0.0, 2, 0, 0])
    total = 0.9 * total + 0.1 * torch.tensor([[0.0, 0], [4, 6], [0, 0], [0, 0]])
    torch.testing.assert_close(q.embedding.weight.data, total / count[:, None], rtol=1e-3, atol=1e-5)
    for step in range(2):
        assert not any(torch.equal(code, row) for code in q.embedding.weight[[0, 2, 3]] for row in z)
        q.update(z, torch.tensor([1, 1]), torch.Generator().manual_seed(step))
    assert all(any(torch.equal(code, row) for row in z) for code in q.embedding.weight[[0, 2, 3]]) and q.idle.tolist() == [0, 0, 0, 0]


def test_top_p_keeps_what_reaches_p():
    """Sums that hit p exactly end there (binary fractions: no rounding). Planted: > for >=."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for p, kept in ((0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 4)):
        assert int(var.filter_logits(logits, top_p=p).isfinite().sum()) == kept


def test_generator_loss_is_its_formula():
    """Written out, with the GAN's term and its adaptive weight. Planted: l1 left out; codebook_weight ignored; the GAN's sign."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, l1_weight=0.3, codebook_weight=0.7, disc_weight=0.4)
    images, last = torch.randn(2, 3, 8, 8), torch.nn.Parameter(torch.randn(3, 3, 8, 8)[:2])
    again, judge = images + 0.1 * last, lambda x: x.square().mean((1, 2, 3))
    loss, metrics = var.generator_loss(config, images, again, torch.tensor(2.0), last, None, judge)
    nll, g = F.mse_loss(again, images) + 0.3 * F.l1_loss(again, images), -judge(again).mean()
    a, b = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (nll, g))
    torch.testing.assert_close(loss, nll + 0.7 * 2.0 + 0.4 * a / (b + 1e-4) * g)
    plain, _ = var.generator_loss(config, images, again, torch.tensor(2.0), last)
    torch.testing.assert_close(plain, nll + 0.7 * 2.0)
    lpips = lambda x, y: torch.full((2, 1, 1, 1), 5.0)
    torch.testing.assert_close(var.generator_loss(config, images, again, torch.tensor(2.0), last, lpips)[0], nll + config.perceptual_weight * 5.0 + 0.7 * 2.0)


def test_discriminator_learns_to_tell_real_from_fake(tmp_path, monkeypatch):
    """Real ones get the larger logits, and it sees reconstructions of the same images. Planted: real and fake exchanged; ascent."""
    config = dataclasses.replace(TINY, disc_start=0, train_steps_tokenizer=40, batch_size=16, lr_tokenizer=3e-3, restart=0)
    monkeypatch.setattr(var, "generator_loss", lambda *args: (0 * args[2].sum(), {}))           # the autoencoder stays bad
    data = var.load_data(config)
    run = var.Run(tmp_path / "run", config, data.classes)
    var.train_tokenizer(config, data, run)
    rows = [row for row in run.state["metrics"] if row["stage"] == "discriminator"]
    last = rows[-5:]
    assert sum(row["logits_real"] - row["logits_fake"] for row in last) / 5 > 0.5 and last[-1]["loss"] < rows[0]["loss"]


# --- transformer

@pytest.mark.parametrize("name", ["var-class", "var-start"])
def test_block_causality_in_both_directions(name):
    """A token of scale k moves no logit of scales up to k, and every logit of all finer ones; within a map, inputs of one place
    move the logits of all. Planted: the mask with > for >=; per token."""
    config = Config(**CASES[name][1])
    tokenizer, prior = build(config)
    rough(prior)
    tokens, labels = torch.randint(16, (1, 21), generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    with torch.no_grad():
        before = prior(tokens, labels)
        for t in range(21):
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + 1) % 16
            moved = (prior(changed, labels) != before)[0].any(-1)
            finer = prior.level > prior.level[t]
            assert not moved[~finer].any() and moved[finer].all()
        inputs = tokenizer.quantize.inputs(tokens)
        before = prior(None, labels, inputs)
        changed = inputs.clone()
        changed[0, 3] += 1                                              # the last place of the 2 x 2 map
        moved = (prior(None, labels, changed) != before)[0].any(-1)
        assert torch.equal(moved, prior.level >= 1)


def test_transformer_reads_the_sum_of_all_coarser_maps():
    """Planted: the embedding of the map before in place of f_hat; bilinear shrinking."""
    tokenizer, prior = build()
    q, tokens = tokenizer.quantize, torch.randint(16, (2, 21), generator=torch.Generator().manual_seed(0))
    maps, f_hat, inputs = q.split(tokens), 0, []
    for k, side in enumerate((2, 4)):
        codes = q.embedding(maps[k]).transpose(1, 2).view(2, 8, *[(1, 2)[k]] * 2)
        h = F.interpolate(codes, (4, 4), mode="bicubic")
        f_hat = f_hat + 0.5 * h + 0.5 * F.conv2d(h, q.phi[q.phi_of[k]].weight, q.phi[q.phi_of[k]].bias, padding=1)
        inputs.append(F.adaptive_avg_pool2d(f_hat, side).flatten(2).transpose(1, 2))
    torch.testing.assert_close(q.inputs(tokens), torch.cat(inputs, 1))


def test_attention_scale_is_learned_and_bounded():
    """Planted: no clamp; 1 / sqrt(d) on top."""
    attention = var.SelfAttention(16, 2)
    x = torch.randn(1, 5, 16)
    assert attention.scale_mul_1H11.data.exp().allclose(torch.tensor(4.0))
    attention.scale_mul_1H11.data.fill_(math.log(100))
    most = attention(x)
    attention.scale_mul_1H11.data.fill_(50.0)
    assert torch.equal(attention(x), most)
    q, k, v = F.linear(x, attention.mat_qkv.weight).view(1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    weights = (100 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3)).softmax(-1)
    torch.testing.assert_close(most, attention.proj((weights @ v).transpose(1, 2).reshape(1, 5, 16)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_initial_weights_are_the_releases(shared):
    """Loss log V, gates nearly closed. Planted: gates of the last two sixths; head not scaled."""
    config = dataclasses.replace(Config(), shared_adaln=shared, codebook_size=64, width=64, heads=2, depth=2, gate_init=1e-5)
    _, prior = build(config)
    tokens = torch.randint(64, (4, 66))
    assert prior.loss(tokens, torch.arange(4))[0].item() == pytest.approx(math.log(64), abs=0.02)
    std, block = math.sqrt(1 / 64 / 3), prior.blocks[0]
    six = block.ada_gss[0, 0] if shared else block.ada_lin[1].weight.view(6, 64, 64).flatten(1)
    wide = 1 / 8 if shared else std
    assert six[:2].std().item() == pytest.approx(1e-5 * wide, rel=0.3) and six[2:].std().item() == pytest.approx(0.5 * wide, rel=0.2)
    assert block.ffn.fc2.weight.std().item() == pytest.approx(std / 2, rel=0.1) and prior.head.weight.std().item() == pytest.approx(0.02 * std, rel=0.1)
    assert block.attn.mat_qkv.weight.std().item() == pytest.approx(std, rel=0.1) and not block.ffn.fc1.bias.any()


def test_weight_decay_spares_what_the_release_spares():
    """Planted: class_emb without decay."""
    for shared in (False, True):
        _, prior = build(dataclasses.replace(TINY, shared_adaln=shared))
        names = {id(p): name for name, p in prior.named_parameters()}
        decayed, spared = ({names[id(p)] for p in group["params"]} for group in var.parameter_groups(prior))
        assert decayed | spared == set(names.values()) and not decayed & spared
        assert {"class_emb.weight", "word_embed.weight", "head.weight", "head_nm.ada_lin.1.weight", "blocks.0.attn.mat_qkv.weight"} <= decayed
        assert {"pos_start", "pos_1LC", "lvl_embed.weight", "blocks.0.attn.scale_mul_1H11", "blocks.0.attn.q_bias", "head.bias"} <= spared
        assert ("blocks.0.ada_gss" in spared) == shared


def test_drop_path_keeps_the_mean():
    """Planted: no enlargement; in evaluation too."""
    block = var.AdaLNBlock(8, 2, drop_path=0.5).train()
    torch.manual_seed(0)
    out = block.drop(torch.ones(2000, 3, 8))
    assert set(out.unique().tolist()) == {0.0, 2.0} and out.mean().item() == pytest.approx(1, abs=0.1)
    assert (out.flatten(1).std(1) == 0).all() and torch.equal(block.eval().drop(out), out)
    rates = [b.drop_path for b in VAR(dataclasses.replace(TINY, depth=3, drop_path=0.2)).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


# --- training

def test_scales_are_added_one_by_one():
    """Progressive training: 2 scales in the warm-up, all at half of the steps; the newest counts little at first. Planted: progress from 0."""
    config = dataclasses.replace(TINY, scales=(1, 2, 3, 4), progressive=0.5, progressive_start=1, warmup=12, train_steps_prior=100)
    seen = [var.curriculum(config, step) for step in range(100)]
    counts = [k for k, _ in seen]
    assert counts[:13] == [2] * 13 and counts == sorted(counts) and set(counts) == {2, 3, 4} and counts[50:] == [4] * 50
    assert all(weight == 1 for k, weight in seen if k == 2)
    first = counts.index(3)
    assert seen[first][1] == 0.5 and seen[first + 1][1] == 1 and all(weight == 1 for k, weight in seen if k == 4)       # 1 / 2: a sixth of 12
    assert var.curriculum(dataclasses.replace(config, progressive=0.0), 0) == (4, 1.0)


def test_loss_of_few_scales_is_a_part_of_the_whole():
    """Weights stay 1 / L. Planted: a mean over the scales that are there."""
    tokenizer, prior = build()
    rough(prior)
    tokens, labels = torch.randint(16, (2, 21)), torch.tensor([0, 1])
    nll = F.cross_entropy(prior(tokens, labels).transpose(1, 2), tokens, reduction="none")
    torch.testing.assert_close(prior.loss(tokens, labels)[0], nll.mean())
    torch.testing.assert_close(prior.loss(tokens, labels, 2, 0.1)[0], (nll[:, :1].sum(1) + 0.1 * nll[:, 1:5].sum(1)).mean() / 21)
    torch.testing.assert_close(prior.loss(tokens, labels, 1)[0], nll[:, 0].mean() / 21)
    assert prior.loss(tokens, labels, 2)[1]["nats_tail"].item() == pytest.approx(nll[:, 1:5].mean().item())


def test_progressive_learning_rate_is_the_releases():
    """lin<pg>: two lines that meet at pg. Recorded from the formula of utils/lr_control.py. Planted: flat until pg."""
    rates = {step: var.lr_and_decay(step, 3000, 0, 0.01, progressive=0.5)[0] for step in (500, 1500, 2000, 2999)}
    assert rates == pytest.approx({500: 0.917, 1500: 0.752, 2000: 0.505, 2999: 0.01}, abs=0.004)


def test_label_smoothing_is_torchs():
    """With the weight of the newest scale; the metrics stay those without. Planted: half of it; the weight left out."""
    tokenizer, prior = build(dataclasses.replace(TINY, label_smoothing=0.2))
    rough(prior)
    tokens, labels = torch.randint(16, (2, 21)), torch.tensor([1, 2])
    logits = prior(tokens, labels).transpose(1, 2)
    each = F.cross_entropy(logits, tokens, reduction="none", label_smoothing=0.2)
    loss, metrics = prior.loss(tokens, labels, 3, 0.3)
    weight = torch.tensor([1.0] * 5 + [0.3] * 16)
    torch.testing.assert_close(loss, (each * weight).sum(1).mean() / 21)
    torch.testing.assert_close(metrics["nats"], F.cross_entropy(logits, tokens))


def test_sampling_does_not_bind():
    """Planted: sample binds the transformer to its tokenizer."""
    tokenizer, prior = build()
    other, _ = build(seed=7)
    sample(other, prior, torch.tensor([1]))
    assert prior.inputs_of == tokenizer.quantize.inputs
    for more in (dict(codebook_size=8), dict(code_dim=6)):
        with pytest.raises(UserError, match="reads maps"):
            sample(VQVAE(dataclasses.replace(TINY, **more)), prior, torch.tensor([1]))


def test_training_follows_its_schedules(tmp_path, monkeypatch):
    """Every step's learning rate, weight decay, scales and weight of the newest are the functions'. Planted: rates never set; scales
    not passed on."""
    config = dataclasses.replace(TINY, progressive=0.6, progressive_start=0, warmup=5, train_steps_prior=40, train_steps_tokenizer=1, weight_decay_end=0.1)
    data, rates, asked = var.load_data(config), [], []
    run = var.Run(tmp_path / "run", config, data.classes)
    loss, step = VAR.loss, torch.optim.AdamW.step
    monkeypatch.setattr(VAR, "loss", lambda self, tokens, labels, *more: asked.append(more) or loss(self, tokens, labels, *more))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: rates.append([(g["lr"], g["weight_decay"]) for g in self.param_groups]) or step(self, *args))
    var.train_prior(config, data, run, var.train_tokenizer(config, data, run))
    assert asked == [var.curriculum(config, n) for n in range(40)] and len({scales for scales, _ in asked}) == 3
    for n, (first, second) in enumerate(rates):
        rate, decay = var.lr_and_decay(n, 40, 5, config.lr_end, config.weight_decay, 0.1, 0.6)
        assert first == pytest.approx((config.lr_prior * rate, decay)) and second == pytest.approx((config.lr_prior * rate, 0.0))


def test_flags_reach_the_sampler(tmp_path, monkeypatch):
    """Planted: --smooth dropped; --official with the run's settings in place of the release's."""
    config = dataclasses.replace(TINY, ch=32, groups=32, codebook_decay=0.0, restart=0, train_steps_tokenizer=1, train_steps_prior=1)
    data, seen = var.load_data(config), []
    run = var.Run(tmp_path / "run", config, data.classes)
    prior = var.train_prior(config, data, run, tokenizer := var.train_tokenizer(config, data, run))
    monkeypatch.setattr(var, "sample", lambda tokenizer, prior, labels, **more: seen.append(more) or torch.zeros(len(labels), 3, 8, 8))
    flags = ["--smooth", "--top-k", "3", "--top-p", "0.5", "--temperature", "0.7", "--guidance", "4"]
    var.main(["sample", str(tmp_path / "run"), "--num", "1", *flags])
    given = {name: seen[0][name] for name in ("smooth", "top_k", "top_p", "temperature", "guidance")}
    assert given == dict(smooth=True, top_k=3, top_p=0.5, temperature=0.7, guidance=4.0)
    monkeypatch.setitem(var.SCALES, 256, (1, 2, 4))
    monkeypatch.chdir(tmp_path)
    torch.save(tokenizer.state_dict(), "vae.pth")
    torch.save(prior.state_dict(), "var.pth")
    var.main(["sample", "--official", "vae.pth", "var.pth", "--num", "1"])
    given = {name: seen[1][name] for name in ("smooth", "top_k", "top_p", "temperature", "guidance")}
    assert given == dict(smooth=False, top_k=16, top_p=0.96, temperature=1.0, guidance=2.5)        # the release's; 900 of 16 codes are 16


def test_tokenizer_stays_as_it_is_when_the_transformer_is_trained():
    """Planted: gradients through the maps."""
    tokenizer, prior = build()
    prior.loss(torch.randint(16, (2, 21)), torch.tensor([0, 1]))[0].backward()
    assert all(p.grad is None for p in tokenizer.parameters()) and all(p.grad is not None for p in prior.parameters())


# --- sampler, editing

def test_guidance_grows_with_the_scale():
    """Scale 0 is not guided, the last in full. Planted: constant guidance; r = (k + 1) / K."""
    tokenizer, prior = build()
    rough(prior)
    trace, known = [], torch.randint(16, (2, 21), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    sample(tokenizer, prior, labels, known=known, guidance=4.0, trace=trace)
    with_class, without = (tokenizer.quantize.split(prior(known, y)) for y in (labels, None))
    for k, step in enumerate(trace):
        torch.testing.assert_close(step["logits"], without[k] + (1 + 3 * k / 2) * (with_class[k] - without[k]), atol=1e-3, rtol=1e-3)


def test_smooth_mixes_codes_and_noise_fades():
    """Planted: the filtered logits replaced by the raw ones."""
    tokenizer, prior = build()
    rough(prior)
    trace = []
    sample(tokenizer, prior, torch.tensor([0]), top_k=1, smooth=True, trace=trace, generator=torch.Generator().manual_seed(0))
    for step in trace:                                                  # one code is left: the mixture is that code
        torch.testing.assert_close(step["codes"], tokenizer.quantize.lookup(step["logits"].argmax(-1)))


def test_kept_tokens():
    """The box falls on the finest map; coarser ones by bilinear interpolation; the 1 x 1 map is kept. Planted: rows and columns
    swapped; the kept inside for the outside."""
    scales = (1, 2, 4, 8)
    keep = kept_tokens((0, 16, 16, 16), scales, 32)
    finest = keep[-64:].view(8, 8)
    assert keep[0] and not finest[:4, 4:].any() and finest.sum() == 48
    assert keep[1:5].tolist() == [True, False, True, True]
    around = kept_tokens((0, 16, 16, 16), scales, 32, inside=True)
    assert around[0] and torch.equal(around[-64:], ~keep[-64:])
    assert kept_tokens((3, 0, 6, 32), scales, 32)[-64:].view(8, 8)[:, 0].tolist() == [True, False, *[True] * 6]         # rounded, 0.75 and 2.25
    half = kept_tokens((0, 0, 16, 32), (1, 3, 4), 32)                           # the 3 x 3 map's middle row is half kept: drawn
    assert half[1:10].view(3, 3)[:, 0].tolist() == [False, False, True]
    for box in ((0, 0, 33, 8), (-1, 0, 8, 8), (0, 0, 0, 8), (30, 0, 4, 4)):
        with pytest.raises(UserError, match="does not lie in a picture of 32 x 32"):
            kept_tokens(box, scales, 32)
    for box in ((0, 0, 32, 32), (0, 0, 1, 1)):
        with pytest.raises(UserError, match="nothing to draw or nothing known"):
            kept_tokens(box, scales, 32)


def test_edit_keeps_what_is_kept():
    """Planted: the mask not passed on."""
    tokenizer, prior = build()
    rough(prior)
    images, keep, trace = torch.rand(2, 3, 8, 8) * 2 - 1, kept_tokens((0, 0, 4, 8), TINY.scales, 8), []
    drawn = var.edit(tokenizer, prior, images, keep, torch.tensor([0, 1]), trace=trace, generator=torch.Generator().manual_seed(0))
    tokens, given = torch.cat([step["tokens"] for step in trace], 1), tokenizer.encode(images)
    assert torch.equal(tokens[:, keep], given[:, keep]) and not torch.equal(tokens, given) and drawn.shape == images.shape
    torch.testing.assert_close(drawn, tokenizer.decode(tokens).clamp(-1, 1))


def test_verbs_tell_the_class_that_is_asked_for(tmp_path, monkeypatch):
    """inpaint: none; complete: the images' own; replace: --labels. Planted: labels left out; the test images' for inpaint."""
    config = dataclasses.replace(TINY, train_steps_tokenizer=1, train_steps_prior=1)
    data, seen = var.load_data(config), []
    run = var.Run(tmp_path / "run", config, data.classes)
    var.train_prior(config, data, run, var.train_tokenizer(config, data, run))
    monkeypatch.setattr(var, "edit", lambda tokenizer, prior, images, keep, labels, **more: seen.extend(labels.tolist()) or images)
    for verb, more, want in (("inpaint", [], [9] * 8), ("complete", [], data.test[1][:8].tolist()), ("replace", ["--labels", "3"], [3] * 8)):
        seen.clear()
        var.main([verb, str(tmp_path / "run"), "--num", "1", *([] if verb == "complete" else ["--box", "0", "0", "4", "4"]), *more])
        assert seen == want


def test_evaluate_measures_what_it_says(tmp_path):
    """Against the same by hand. Planted: the last map's picture for all scales; the batch's mean not weighted by its size."""
    config = dataclasses.replace(TINY, train_steps_tokenizer=1, train_steps_prior=1, image_size=8)
    data = var.load_data(config)
    run = var.Run(tmp_path / "run", config, data.classes)
    var.train_prior(config, data, run, var.train_tokenizer(config, data, run))
    var.at_once, before = (lambda config: 7), var.at_once                       # 30 images in uneven parts
    try:
        var.main(["evaluate", str(tmp_path / "run")])
    finally:
        var.at_once = before
    report, (_, tokenizer, prior) = json.loads((tmp_path / "run" / "report.json").read_text()), var.load_run(tmp_path / "run")
    x, y = data.test[0] / 127.5 - 1, data.test[1]
    with torch.no_grad():
        tokens = tokenizer.encode(x)
        quality = [var.psnr(x, tokenizer.decode(tokens, k + 1).clamp(-1, 1)).mean().item() for k in range(3)]
        nats = var.bind(prior, tokenizer).loss(tokens, y)[1]
    assert report["psnr_by_scale"] == pytest.approx(quality, rel=1e-4) and report["psnr"] == pytest.approx(quality[-1], rel=1e-4)
    assert report["nats_per_token"] == pytest.approx(nats["nats"].item(), rel=1e-4) and report["accuracy"] == pytest.approx(nats["accuracy"].item(), rel=1e-4)


def test_trace_shows_every_scale():
    tokenizer, prior = build()
    trace = []
    images = sample(tokenizer, prior, torch.tensor([0, 1]), trace=trace, generator=torch.Generator().manual_seed(0))
    assert [step["tokens"].shape[1] for step in trace] == [1, 4, 16] and torch.equal(trace[-1]["images"], images)
    assert all(step["images"].shape == images.shape for step in trace)


def test_sampler_refuses():
    """One line each. Planted: no check."""
    tokenizer, prior = build()
    labels = torch.tensor([0])
    for more, says in ((dict(top_k=17), "top_k 17"), (dict(temperature=0.0), "temperature 0.0"), (dict(top_p=0.0), "top_p 0.0"), (dict(known=torch.zeros(1, 5, dtype=torch.long)), "known must be"),
                       (dict(known=torch.full((1, 21), 16)), "from 0 to 15")):
        with pytest.raises(UserError, match=says):
            sample(tokenizer, prior, labels, **more)
    _, plain = build(dataclasses.replace(TINY, label_dropout=0.0, guidance=1.0))
    with pytest.raises(UserError, match="never saw dropped labels"):
        sample(tokenizer, plain, labels, guidance=2.0)
    other = VQVAE(dataclasses.replace(TINY, scales=(1, 3, 4)))
    with pytest.raises(UserError, match=r"\(1, 2, 4\).*\(1, 3, 4\)"):
        sample(other, prior, labels)
    with pytest.raises(UserError, match="bind"):
        VAR(TINY)(torch.zeros(1, 21, dtype=torch.long))


# --- presets and released weights

COUNTS = {"imagenet256-d16": 310_283_520, "imagenet256-d20": 600_917_136, "imagenet256-d24": 1_033_399_360, "imagenet256-d30": 2_010_020_356,
          "imagenet512-d36": 2_353_893_904}


def released(path):
    release = json.load(gzip.open(path))
    shapes = release["params"] | release.get("buffers", {})
    return release, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("var_*_release.json.gz")), ids=lambda path: path.name.removesuffix("_release.json.gz"))
def test_released_checkpoints_map_completely(path):
    """Every name once, equal shapes, the recorded number of parameters, and one name more or less is seen. Planted: a key's bias."""
    release, state = released(path)
    model = from_official(dict(state))
    assert sum(p.numel() for p in model.parameters()) == sum(math.prod(shape) for shape in release["params"].values())
    if isinstance(model, VAR):
        depth = len(model.blocks)
        assert model.config.width == 64 * depth and model.config.heads == depth and model.config.shared_adaln == (depth == 36)
        assert model.config.scales == var.SCALES[512 if depth == 36 else 256]
        assert sum(p.numel() for p in model.parameters()) == COUNTS[f"imagenet{512 if depth == 36 else 256}-d{depth}"]
    else:
        assert sum(p.numel() for p in model.parameters()) == 108_948_355
    for wrong in ({**state, "extra": torch.empty(1)}, {k: v for k, v in state.items() if not k.endswith("conv_out.bias") and k != "head.bias"}):
        with pytest.raises(UserError, match="1 names|2 names"):
            from_official(wrong)


def test_presets_have_the_released_sizes():
    for name, preset in var.PRESETS.items():
        var.check(preset)
        if name in COUNTS:
            with torch.device("meta"):
                tokenizer, prior = VQVAE(preset), VAR(preset)
            assert sum(p.numel() for p in prior.parameters()) == COUNTS[name]
            assert sum(p.numel() for p in tokenizer.parameters()) == 108_948_355


def test_scales_come_from_the_checkpoint_or_are_asked_for():
    """A transformer of other scales than any release's needs its patch_nums; those of another are refused. Planted: no comparison of L."""
    _, prior = build()
    state = {name: p.detach() for name, p in prior.state_dict().items()}
    assert from_official(state, {"patch_nums": [1, 2, 4], "num_heads": 2}).config.scales == (1, 2, 4)
    for config in (None, {"patch_nums": [1, 3, 4]}, {"patch_nums": [1, 2, 3, 4]}):
        with pytest.raises(UserError, match="21 tokens in 3 scales"):
            from_official(state, config)


def test_official_weights_draw_on_the_command_line(tmp_path, monkeypatch, capsys):
    """Both files written as the release stores them, read by sample --official. Planted: the tokenizer's scales not the transformer's."""
    monkeypatch.setitem(var.SCALES, 256, (1, 2, 4))                             # the usage below is of another number of scales: no matter
    config = dataclasses.replace(TINY, ch=32, groups=32, codebook_decay=0.0, restart=0)
    tokenizer, prior = build(config)
    state = {name.replace("quantize.phi", "quantize.quant_resi.qresi_ls"): p for name, p in tokenizer.state_dict().items()}
    state["quantize.ema_vocab_hit_SV"] = torch.zeros(10, 16)
    torch.save(state, tmp_path / "vae.pth")
    theirs = dict(prior.state_dict()) | {"lvl_1L": prior.level[None], "attn_bias_for_masking": torch.zeros(1, 1, 21, 21)}
    theirs |= {f"blocks.{i}.attn.zero_k_bias": torch.zeros(16) for i in range(2)}
    torch.save(theirs, tmp_path / "var.pth")
    monkeypatch.chdir(tmp_path)
    var.main(["sample", "--official", "vae.pth", "var.pth", "--labels", "1", "--num", "2", "--guidance", "1", "--top-k", "0", "--top-p", "1"])
    assert "samples.png" in capsys.readouterr().out and (tmp_path / "samples.npz").exists()
    again, loaded = from_official("vae.pth"), from_official("var.pth")
    for mine, theirs in ((tokenizer, again), (prior, loaded)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))
