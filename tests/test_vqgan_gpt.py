"""What is true of vqgan_gpt.py alone: quantizers, losses, windows, conditions, official weights."""
import dataclasses
import gzip
import itertools
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES

import vqgan_gpt
from vqgan_gpt import (
    VQGAN,
    Config,
    CoordStage,
    GumbelQuantizer,
    Net2Net,
    ResnetBlock,
    UserError,
    VectorQuantizer,
    VQLPIPSWithDiscriminator,
    build_prior,
    build_tokenizer,
    condition_map,
    draw,
    filter_logits,
    from_official,
    nearest,
    sample,
)

TINY = Config(**CASES["vqgan_gpt-class"][1])
GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def config(**fields):
    return dataclasses.replace(TINY, **fields)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- quantizers

def test_nearest_is_nearest_whatever_the_chunk():
    """Planted: the sign of the product; chunks that drop the last rows."""
    z, codebook = torch.randn(101, 6, dtype=torch.float64), torch.randn(17, 6, dtype=torch.float64)
    expected = torch.cdist(z, codebook).argmin(1)
    for limit in (1, 17, 100, 10 ** 6):
        assert torch.equal(nearest(z, codebook, limit), expected)


def test_distances_never_exceed_one_chunk():
    """The largest tensor that nearest makes is a chunk of distances, not all of them. Planted: one chunk of all rows."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out
    z, codebook = torch.randn(4000, 4), torch.randn(512, 4)
    with Watch():
        nearest(z, codebook, limit=50_000)
    assert largest <= 50_000


@pytest.mark.parametrize("legacy, decay, at_z, at_code", [(True, 0.0, 1, 0.25), (False, 0.0, 0.25, 1), (True, 0.9, 0.25, 0)])
def test_codebook_loss_pulls_with_the_weights_it_says(legacy, decay, at_z, at_code):
    """The value never shows which weighting is at work: gradients do. Planted: beta on the other term."""
    q = VectorQuantizer(8, 3, 0.25, legacy, decay).double().eval()
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    z_q, indices, loss = q(z)
    loss.backward()
    e = q.lookup(indices).detach()
    torch.testing.assert_close(z.grad, at_z * 2 * (z.detach() - e) / z.numel())
    if at_code:
        expected = torch.zeros_like(q.embedding.weight).index_add_(
            0, indices.flatten(), (at_code * 2 * (e - z.detach()) / z.numel()).permute(0, 2, 3, 1).flatten(0, 2))
        torch.testing.assert_close(q.embedding.weight.grad, expected)
    else:
        assert q.embedding.weight.grad is None


def test_straight_through():
    """d loss / d z = d loss / d z_q, and the value is the code's. Planted: z_q without detach; z + z_q - z (value, no gradient)."""
    q = VectorQuantizer(8, 3)
    z, probe = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    z_q, indices, _ = q(z)
    torch.testing.assert_close(z_q, q.lookup(indices))
    (z_q * probe).sum().backward()
    torch.testing.assert_close(z.grad, probe)
    assert q.embedding.weight.grad is None


def test_running_mean_codebook_finds_the_means():
    """Latents around three points: the codes go there, an unused code stays finite. Planted: decay and 1 - decay exchanged."""
    torch.manual_seed(0)
    centres = torch.tensor([[2.0, 0], [-2, 0], [0, 3]])
    q = VectorQuantizer(4, 2, decay=0.8)
    q.embedding.weight.data.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [50, 50]]))
    q.total.copy_(q.embedding.weight)
    for _ in range(60):
        z = centres[torch.randint(3, (64,))] + 0.05 * torch.randn(64, 2)
        q(z.T.reshape(1, 2, 8, 8))
    torch.testing.assert_close(q.embedding.weight[:3], centres, atol=0.05, rtol=0)
    assert q.embedding.weight.isfinite().all() and q.embedding.weight[3].norm() < 100
    before = q.embedding.weight.clone()
    q.eval()(torch.randn(1, 2, 8, 8))
    assert torch.equal(q.embedding.weight, before)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_dead_codes_restart_from_latents(decay):
    """Planted: idle not reset by use; restart of used codes."""
    torch.manual_seed(0)
    q = VectorQuantizer(6, 2, decay=decay, restart=3)
    q.embedding.weight.data.copy_(torch.cat([torch.zeros(1, 2), torch.full((5, 2), 100.0)]))
    if decay:
        q.total.copy_(q.embedding.weight)
    z = torch.randn(1, 2, 8, 8)
    for step in range(3):
        assert (q(z, generator(step))[1] == 0).all() and (step == 2 or (q.embedding.weight[1:].norm(dim=1) > 90).all())
    rows = {tuple(row.tolist()) for row in z[0].flatten(1).T}
    moved = q.embedding.weight[1:] if not decay else q.total[1:]
    assert all(tuple(row.tolist()) in rows for row in moved) and len(q(z, generator(9))[1].unique()) > 2


def test_gumbel_noise_follows_the_generator_and_indices_do_not_need_it():
    """Planted: noise from the global generator; noise in indices()."""
    torch.manual_seed(0)
    q = GumbelQuantizer(16, 8, 8).train()
    z = torch.randn(2, 8, 4, 4)
    a, b, c = q(z, generator(1))[1], q(z, generator(1))[1], q(z, generator(2))[1]
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(q.indices(z), q.indices(z))
    counts = torch.stack([q(z, generator(s))[1] for s in range(2000)])
    p = q.proj(z).softmax(1)[0, :, 0, 0]
    torch.testing.assert_close(torch.bincount(counts[:, 0, 0, 0], minlength=16) / 2000, p, atol=0.04, rtol=0)     # Gumbel-max


# --- networks

def test_block_with_zeroed_last_layer_is_the_identity():
    """Planted: the input added twice."""
    block, x = ResnetBlock(32, 32), torch.randn(1, 32, 6, 6)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (6, 22), (2, 2)])
def test_any_size_divisible_by_f(size):
    """Planted: a view to a square."""
    tokenizer = build_tokenizer(TINY).eval()
    indices = tokenizer.encode(torch.rand(2, 3, *size) * 2 - 1)
    assert indices.shape == (2, size[0] // 2, size[1] // 2) and tokenizer.decode(indices).shape == (2, 3, *size)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 9, 8), torch.zeros(1, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 0, 8)])
def test_wrong_images_are_refused(images):
    with pytest.raises(ValueError, match="multiples of 2"):
        build_tokenizer(TINY).encode(images)


def test_attention_stays_where_the_trained_size_puts_it():
    """At twice the size the same modules attend, at twice the resolution. Planted: resolution from the input."""
    tokenizer = build_tokenizer(config(image_size=8, ch_mult=(1, 1, 1), attn_resolutions=(4,)))
    assert [len(level.attn) for level in tokenizer.encoder.down] == [0, 1, 0] and [len(level.attn) for level in tokenizer.decoder.up] == [0, 2, 0]
    assert tokenizer.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4)


def test_indices_are_row_major():
    """A code changed at (0, last column) changes pixels at the top right. Planted: permute(0, 3, 2, 1)."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config(image_size=16, ch_mult=(1, 1, 1))).eval()
    a = torch.zeros(1, 4, 8, dtype=torch.long)
    b = a.clone()
    b[0, 0, 7] = 9
    changed = (tokenizer.decode(a) - tokenizer.decode(b)).abs().sum((0, 1))
    assert changed.shape == (16, 32) and changed[:4, 28:].mean() > 2 * max(changed[12:, :4].mean(), changed[:4, :4].mean())


def test_gpt_starts_as_the_release_does():
    """Zero positions, matrices and embeddings of deviation 0.02, no biases. Planted: torch's default initialisation."""
    torch.manual_seed(0)
    gpt = build_prior(config(width=64)).transformer
    assert not gpt.pos_emb.any() and gpt.head.bias is None and gpt.head.weight is not gpt.tok_emb.weight
    for weight in (gpt.head.weight, gpt.tok_emb.weight, gpt.blocks[0].attn.proj.weight, gpt.blocks[1].mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(p.any() for name, p in gpt.named_parameters() if name.endswith("bias"))


def test_cache_equals_full_pass_in_parts_of_any_length():
    """Float64. Planted: positions that start at zero again; the causal mask of a single token."""
    torch.manual_seed(0)
    gpt = build_prior(TINY).double().transformer.eval()
    gpt.pos_emb.data.normal_()
    tokens, cache = torch.randint(16, (2, 12)), gpt.new_cache()
    with torch.no_grad():
        parts = [gpt(tokens[:, :5], cache), *(gpt(tokens[:, i:i + 1], cache) for i in range(5, 12))]
        torch.testing.assert_close(torch.cat(parts, 1), gpt(tokens), rtol=1e-10, atol=1e-10)
        cache = gpt.new_cache()
        parts = [gpt(part, cache) for part in tokens.split([5, 4, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), gpt(tokens), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="block_size"):
        gpt(torch.zeros(1, gpt.block_size + 1, dtype=torch.long))


def test_condition_is_seen_by_all_and_predicts_nothing():
    """Planted: logits cut at len(c) instead of len(c) - 1."""
    prior = build_prior(config(condition="edges", num_classes=0, label_dropout=0.0)).eval()
    tokens, c = torch.randint(16, (1, 16)), torch.randint(16, (1, 4, 4))
    logits = prior(tokens, c)
    other = c.clone()
    other[0, 3, 3] = (other[0, 3, 3] + 1) % 16
    assert logits.shape == (1, 16, 16) and (prior(tokens, other) != logits).any(2).all()
    full = prior.transformer(torch.cat([c.flatten(1), tokens[:, :-1]], 1))
    torch.testing.assert_close(logits, full[:, 15:])


def test_class_and_code_share_one_table():
    prior = build_prior(TINY).eval()
    assert prior.transformer.tok_emb.num_embeddings == TINY.codebook_size
    tokens = torch.randint(16, (2, 16))
    assert torch.equal(prior(tokens, torch.tensor([3, 3])), prior(tokens, torch.tensor([[[3]], [[3]]])))


# --- a likelihood

def toy(known=0):
    """A GPT over 2 x 2 codes of 3, far from uniform: all 81 sequences can be listed."""
    torch.manual_seed(3)
    prior = build_prior(config(image_size=4, codebook_size=3, num_classes=2)).double().eval()
    for p in prior.parameters():
        p.data.normal_(std=0.6)
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4)))
    with torch.no_grad():
        logits = prior(tokens, torch.ones(81, dtype=torch.long))
    return prior, tokens, logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2)).exp()


def test_probabilities_of_all_code_maps_sum_to_one():
    """Planted: a leak of a token to itself."""
    prior, tokens, p = toy()
    assert p.sum().item() == pytest.approx(1, abs=1e-9) and p.max() > 3 / 81
    assert prior.loss(tokens, torch.ones(81, dtype=torch.long))[0].item() == pytest.approx(-p.log().mean().item() / 4)


def test_sampled_frequencies_are_the_probabilities():
    """Chi-square of 20,000 draws. Planted: the cache's last token fed twice; top_k of 2."""
    prior, tokens, p = toy()
    tokenizer, trace = build_tokenizer(config(image_size=4, codebook_size=3, num_classes=2)), []
    tokenizer.decode = lambda indices: torch.zeros(1)
    sample(tokenizer, prior, torch.ones(20_000, dtype=torch.long), generator=generator(), trace=trace)
    count = torch.bincount((trace[-1]["tokens"].flatten(1) * 3 ** torch.arange(3, -1, -1)).sum(1), minlength=81).double()
    rare = p * 20_000 < 5
    pool = lambda a: torch.cat([a[~rare], a[rare].sum()[None]]) if rare.any() else a
    expected = pool(p * 20_000)
    chi2, freedom = ((pool(count) - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


# --- sampling

def test_filters():
    """Ties stay, the crossing code stays, the first always stays. Planted: > in place of >=; the shift by one left out."""
    logits = torch.tensor([[2.0, 1, 1, 0, -1]])
    assert filter_logits(logits, 2).isfinite().tolist() == [[True, True, True, False, False]]
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert filter_logits(p.log(), 0, 0.6).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(p.log(), 0, 0.01).isfinite().tolist() == [[True, False, False, False]]
    assert torch.equal(filter_logits(logits), logits)
    assert set(draw(p.log().repeat(500, 1), 1.0, 2, 1.0, generator()).flatten().tolist()) == {0, 1}


def test_guidance_moves_away_from_no_class():
    """logits = null + g (class - null); 1 is none, 0 is no class. Planted: the halves exchanged."""
    torch.manual_seed(0)
    tokenizer, prior = build_tokenizer(TINY).eval(), build_prior(TINY).double().eval()
    for p in prior.parameters():
        p.data.normal_(std=0.3)
    labels = torch.tensor([2, 5])

    def first(g, labels=labels):
        trace = []
        sample(tokenizer, prior, labels, guidance=g, generator=generator(), trace=trace)
        return trace[0]["logits"]
    null = first(1, torch.full((2,), prior.num_classes))
    torch.testing.assert_close(first(0.0), null)
    torch.testing.assert_close(first(3.0), null + 3 * (first(1) - null))
    with pytest.raises(UserError, match="dropped labels"):
        sample(tokenizer, build_prior(config(label_dropout=0.0)), labels, guidance=2.0)


def test_top_k_above_the_vocabulary_is_one_line():
    tokenizer, prior = build_tokenizer(TINY), build_prior(TINY)
    with pytest.raises(UserError, match="0 to 16"):
        sample(tokenizer, prior, torch.zeros(1, dtype=torch.long), top_k=17)
    with pytest.raises(UserError, match="at least as many"):
        sample(tokenizer, prior, torch.zeros(1, dtype=torch.long), size=(3, 8))
    with pytest.raises(UserError, match="do not fit"):
        sample(tokenizer, prior, torch.zeros(1, 4, 4, dtype=torch.long))


@pytest.mark.parametrize("kind", ["class", "coordinates"])
@pytest.mark.parametrize("size", [(4, 4), (4, 9), (7, 4), (6, 11)])
def test_sliding_window_equals_the_plain_loop(kind, size):
    """The release's loop, every window read anew with whatever lies behind the current code in it. Float64.

    Planted: the cache kept when the window moves; the condition not cut to the window; window + 1.
    """
    torch.manual_seed(0)
    c = config(condition=kind, num_classes=9 if kind == "class" else 0, label_dropout=0.1 if kind == "class" else 0.0)
    tokenizer, prior, (h, w), s = build_tokenizer(c).eval(), build_prior(c).double().eval(), size, 4
    for p in prior.parameters():
        p.data.normal_(std=0.3)
    labels = torch.tensor([3, 8]) if kind == "class" else torch.randint(16, (2, h, w))
    trace = []
    sample(tokenizer, prior, labels, size=size, generator=generator(), trace=trace)
    tokens, draws = torch.randint(16, (2, h, w)), generator()           # stale codes may not matter
    for i in range(h):
        for j in range(w):
            top, left = i - (i if i <= 2 else 4 - (h - i) if h - i < 2 else 2), j - (j if j <= 2 else 4 - (w - j) if w - j < 2 else 2)
            cut = labels if kind == "class" else labels[:, top:top + s, left:left + s]
            with torch.no_grad():
                logits = prior(tokens[:, top:top + s, left:left + s].reshape(2, -1), cut)[:, (i - top) * s + j - left]
            torch.testing.assert_close(trace[i * w + j]["logits"], logits, rtol=1e-9, atol=1e-9)
            tokens[:, i, j] = draw(logits, generator=draws)[:, 0]
    assert torch.equal(trace[-1]["tokens"], tokens)


def test_a_larger_vocabulary_never_gives_codes_that_do_not_exist():
    c = config(codebook_size=12, vocab_size=40, num_classes=30)
    trace = []
    sample(build_tokenizer(c), build_prior(c), torch.tensor([29]), generator=generator(), trace=trace)
    assert trace[-1]["tokens"].max() < 12 and trace[0]["logits"].shape == (1, 12)


# --- conditions and training

def test_coordinates_say_where_a_crop_lies():
    stage = CoordStage(1024, 16)
    whole = stage.encode(256, 256)
    assert whole.shape == (16, 16) and whole.max() == 994 and (whole.flatten().diff()[:15] >= 0).all() and (whole[1:] > whole[:-1]).all()
    low = stage.encode(512, 512, 256, 0, (256, 256))
    assert low.min() > 500 and low.shape == (16, 16)
    assert stage.decode(whole[None]).shape == (1, 1, 256, 256)


def test_maps_show_what_they_say():
    """Planted: the gradient of one direction alone."""
    image = torch.full((1, 3, 16, 16), -1.0)
    image[:, :, 4:12, 4:12] = 1
    edges = condition_map(image, "edges")
    assert edges.shape == (1, 1, 16, 16) and edges.min() == -1 and edges.max() == 1
    assert edges[0, 0, 8, 8] == -1 and edges[0, 0, 8, 3] > 0 and edges[0, 0, 3, 8] > 0
    depth = condition_map(image, "depth")
    assert depth[0, 0, 8, 8] == 1 and depth[0, 0, 0, 0] == -1 and -1 < depth[0, 0, 8, 3] < 1


def test_pkeep_and_label_dropout_do_what_they_say(tmp_path, monkeypatch):
    """What the network reads: a share of codes replaced, labels dropped, targets clean. Planted: noise in the targets."""
    c, seen = config(pkeep=0.7, label_dropout=0.3, train_steps_tokenizer=1, train_steps_prior=30, batch_size_prior=64), []
    loss = Net2Net.loss
    monkeypatch.setattr(Net2Net, "loss", lambda self, *args: (seen.append(args), loss(self, *args))[1])
    data = vqgan_gpt.load_data(c)
    run = vqgan_gpt.Run(tmp_path / "run", c, data.classes)
    tokenizer = vqgan_gpt.train_tokenizer(c, data, run)
    vqgan_gpt.train_prior(c, data, run, tokenizer)
    tokens, labels, inputs = (torch.cat(parts) for parts in zip(*seen))
    assert (tokens == inputs).float().mean().item() == pytest.approx(0.7 + 0.3 / 16, abs=0.02)
    assert (labels == c.num_classes).float().mean().item() == pytest.approx(0.3, abs=0.04)
    known = {tuple(row) for row in vqgan_gpt.tokenize(c, data, tokenizer, None, "train", "cpu")[0].flatten(1).tolist()}
    assert all(tuple(row) in known for row in tokens.tolist())


def test_cached_tokens_are_made_anew_for_another_tokenizer(tmp_path):
    """Planted: the hash left out of the comparison; a hash of the tokenizer alone."""
    data, run = vqgan_gpt.load_data(TINY), vqgan_gpt.Run(tmp_path / "run", TINY)
    prior, found = build_prior(TINY), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(TINY).eval()
        found.append(vqgan_gpt.cached_tokens(TINY, data, tokenizer, prior, run))
        with torch.no_grad():
            assert torch.equal(found[-1][0], tokenizer.encode(data.train[0] / 127.5 - 1))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
    data.train = (data.train[0].flip(0), data.train[1].flip(0))         # other data, the same tokenizer
    assert torch.equal(vqgan_gpt.cached_tokens(TINY, data, tokenizer, prior, run)[0], found[2][0].flip(0))
    (tmp_path / "run" / "tokens.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="tokens.npz is damaged"):
        vqgan_gpt.cached_tokens(TINY, data, tokenizer, prior, run)


def test_crops_and_their_coordinates_belong_together(tmp_path):
    """Planted: offsets of another seed for the coordinates."""
    c = config(image_size=16, crop=8, condition="coordinates", num_classes=0, label_dropout=0.0)
    data = vqgan_gpt.load_data(c)
    cut, offsets = vqgan_gpt.crop_data(c, data)
    tokens, conditions = vqgan_gpt.tokenize(c, data, build_tokenizer(c).eval(), build_prior(c), "test", "cpu")
    i, j = offsets["test"][3].tolist()
    assert cut.test[0].shape == (30, 3, 8, 8) and torch.equal(cut.test[0][3], data.test[0][3, :, i:i + 8, j:j + 8])
    assert torch.equal(conditions[3], CoordStage(16, 2).encode(16, 16, i, j, (8, 8))) and tokens.shape == conditions.shape == (30, 4, 4)
    assert len({tuple(offset) for offset in offsets["test"].tolist()}) > 5


def test_adaptive_weight_balances_the_two_gradients():
    """weight * |grad g| = |grad nll|. Planted: the fraction upside down; disc_weight inside the clamp."""
    layer = torch.nn.Conv2d(4, 3, 3).double()
    out = layer(torch.randn(2, 4, 8, 8, dtype=torch.float64))
    nll, g = out.abs().mean(), -(out ** 2).mean()
    weight = vqgan_gpt.adaptive_weight(nll, g, layer.weight)
    norm = lambda loss: torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm()
    assert (weight * norm(g)).item() == pytest.approx(norm(nll).item(), rel=1e-3) and not weight.requires_grad


def test_perceptual_loss_stays_in_evaluation_mode():
    losses = VQLPIPSWithDiscriminator(config(lpips="given")).train()
    assert losses.discriminator.training and not any(module.training for module in losses.perceptual_loss.modules())
    assert not any(p.requires_grad for p in losses.perceptual_loss.parameters())


def test_discriminator_sees_real_and_fake_apart():
    """Two passes: statistics of each batch of its own. Planted: one pass over both."""
    losses = VQLPIPSWithDiscriminator(config(disc_layers=2)).train()
    a, b = torch.zeros(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    seen = []
    losses.discriminator.main[3].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    losses.discriminate(a, b)
    assert seen == [4, 4]


def test_collapsed_codebook_warns_with_numbers(tmp_path, capsys):
    """Planted: no warning. Pictures that are all alike leave one code."""
    c = config(codebook_size=64, train_steps_tokenizer=1, train_steps_prior=1)
    data = vqgan_gpt.load_data(c)
    data = vqgan_gpt.Data(data.classes, (data.train[0] * 0, data.train[1]), data.test)
    run = vqgan_gpt.Run(tmp_path / "run", c, data.classes)
    tokenizer = vqgan_gpt.train_tokenizer(c, data, run)
    tokenizer.quantize.embedding.weight.data[1:] = 1e3                  # one code takes all
    vqgan_gpt.train_prior(c, data, run, tokenizer)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert "collapsed" in line and "1.6% of 64" in line and "perplexity 1.0" in line and "--restart" in line


# --- official weights

LISTS = sorted(GOLDEN.glob("vqgan_gpt_*_release.json.gz"))


def meta_state(release, buffers):
    state = {name: torch.empty(shape, device="meta") for name, shape in release["params"].items()}
    return state | ({name: torch.empty(shape, device="meta") for name, shape in release["buffers"].items()} if buffers else {})


@pytest.mark.parametrize("how", ["by its config", "by its shapes"])
@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name.removeprefix("vqgan_gpt_").removesuffix("_release.json.gz"))
def test_released_checkpoints_map_completely(path, how):
    """Every name once, equal shapes, the recorded number of parameters. Planted: a norm_out left out; 15 heads."""
    release = json.load(gzip.open(path))
    model = from_official(meta_state(release, True), release["config"] if how == "by its config" else None)
    assert sum(p.numel() for p in model.parameters()) == release["n_params"]
    assert {name: list(p.shape) for name, p in model.named_parameters()} == release["params"]
    t = (release["config"]["params"].get("transformer_config") or {"params": None})["params"]
    if t:
        assert model.transformer.blocks[0].attn.heads == t["n_head"] and model.transformer.block_size == t["block_size"]
        assert model.num_classes == (1000 if "cin" in path.name else 0)
    assert sorted(model.state_dict()) == sorted(name for name in [*release["params"], *release["buffers"]]
                                                if not name.endswith(("attn.mask", "colorize")))


def small_official(**more):
    """A state dict in the release's form, of a model of ours, and its config in the release's form."""
    official = {"ddconfig": dict(double_z=False, z_channels=8, resolution=8, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1], num_res_blocks=1,
                                 attn_resolutions=[], dropout=0.0), "n_embed": 16, "embed_dim": 8}
    return VQGAN(vqgan_gpt.official_config(official)[0]).state_dict(), official


def test_loaded_weights_are_those_of_the_file(tmp_path):
    """A checkpoint as Lightning writes it: with an optimizer and the class of a callback as a key. Nothing of it is executed."""
    state, official = small_official()
    package = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    package.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": package.__name__})
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", package.__name__]
    modules = {name: types.ModuleType(name) for name in names} | {package.__name__: package}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": state, "global_step": 7, "callbacks": {package.ModelCheckpoint: {"best_model_score": torch.tensor(1.0)}}},
                   tmp_path / "last.ckpt")
    model = from_official(tmp_path / "last.ckpt", {"target": "taming.models.vqgan.VQModel", "params": official})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and not model.training


@pytest.mark.parametrize("damage, says", [
    (lambda s: s | {"decoder.conv_in.weight": torch.zeros(1)}, ["1 names or shapes", "decoder.conv_in.weight"]),
    (lambda s: {k: v for k, v in s.items() if "mid" not in k}, ["encoder.mid.block_1", "do not fit"]),
    (lambda s: {f"model.{k}": v for k, v in s.items()}, ["do not fit", "model.encoder.conv_in.weight"]),
    (lambda s: s | {f"extra.{i}": torch.zeros(1) for i in range(9)}, ["9 names", "extra.0", "extra.4"])])
def test_a_checkpoint_of_another_model_names_five_keys(damage, says):
    state, official = small_official()
    with pytest.raises(UserError) as error:
        from_official(damage(state), official)
    assert all(word in str(error.value) for word in says) and "extra.5" not in str(error.value) and "\n" not in str(error.value)


def test_checkpoints_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no.ckpt cannot be read"):
        from_official(tmp_path / "no.ckpt")
    (tmp_path / "half.ckpt").write_bytes(b"PK\3\4 half")
    with pytest.raises(UserError, match="half.ckpt cannot be read"):
        from_official(tmp_path / "half.ckpt")


def test_lpips_weights_from_their_two_files_and_from_a_checkpoint(tmp_path, monkeypatch):
    """VGG's layers land where torchvision numbers them; a damaged file is refused. Planted: slice numbers off by one."""
    import hashlib
    torch.manual_seed(0)
    lpips = vqgan_gpt.LPIPS()
    names = {name: "features." + name.split(".", 2)[2] for name in lpips.state_dict() if name.startswith("net.")}
    assert sorted({int(name.split(".")[1]) for name in names.values()}) == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    files = {"vgg16-397923af.pth": {new: torch.randn(lpips.state_dict()[old].shape) for old, new in names.items()} | {"classifier.0.bias": torch.zeros(1)},
             "vgg.pth": {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}}
    for (name, state), entry, kind in zip(files.items(), ("vgg16", "lpips"), (hashlib.sha256, hashlib.md5)):
        torch.save(state, tmp_path / name)
        digest = kind((tmp_path / name).read_bytes()).hexdigest()
        monkeypatch.setitem(vqgan_gpt.DOWNLOADS, entry, ("", {name: digest[:8] if kind is hashlib.sha256 else digest}))
    vqgan_gpt.load_lpips(lpips, Config(lpips=str(tmp_path)))
    assert all(torch.equal(lpips.state_dict()[old], files["vgg16-397923af.pth"][new]) for old, new in names.items())
    assert torch.equal(lpips.lin2.model[1].weight, files["vgg.pth"]["lin2.model.1.weight"])
    other = vqgan_gpt.LPIPS()
    torch.save({"state_dict": {"loss.perceptual_loss." + name: value for name, value in lpips.state_dict().items()}}, tmp_path / "vqgan.ckpt")
    vqgan_gpt.load_lpips(other, Config(lpips=str(tmp_path / "vqgan.ckpt")))
    assert all(torch.equal(a, b) for a, b in zip(lpips.state_dict().values(), other.state_dict().values()))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="other.ckpt"):
        vqgan_gpt.load_lpips(other, Config(lpips=str(tmp_path / "other.ckpt")))
    (tmp_path / "vgg.pth").write_bytes(b"half")
    with pytest.raises(UserError, match="vgg.pth is truncated or corrupt"):
        vqgan_gpt.load_lpips(other, Config(lpips=str(tmp_path)))


def test_samples_from_released_weights(tmp_path, capsys, fails, monkeypatch):
    """The command line over checkpoints: a tokenizer alone reconstructs, a transformer with its tokenizer samples."""
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    small = config(num_classes=4, label_dropout=0.0, guidance=1.0)
    monkeypatch.setattr(vqgan_gpt, "RELEASES", {"small": small})
    Image.new("RGB", (20, 30), (200, 30, 30)).save("photo.png")
    state = {name: value for name, value in VQGAN(small).state_dict().items() if name != "quantize.idle"}
    small.restart = 0
    torch.save({"state_dict": state}, "vqgan.ckpt")
    torch.save({"state_dict": {**{f"first_stage_model.{name}": value for name, value in state.items()},
                               **build_prior(small).state_dict()}}, "gpt.ckpt")
    vqgan_gpt.main(["reconstruct", "--official", "vqgan.ckpt", "photo.png", "--out", "r.png"])
    vqgan_gpt.main(["sample", "--official", "gpt.ckpt", "--labels", "3", "1", "--num", "2", "--size", "8", "12", "--out", "s.png"])
    assert os.path.exists("r.png") and os.path.exists("s.png")
    fails(vqgan_gpt, "sample", "--official", "vqgan.ckpt", says=["tokenizer without a GPT", "reconstruct"])
    fails(vqgan_gpt, "reconstruct", "--official", "vqgan.ckpt", says=["give photos"])
    fails(vqgan_gpt, "sample", says=["--official"])


def test_shapes_and_dtypes_are_those_of_the_docstrings():
    """Every public call whose docstring gives a shape. Planted: lookup without its permute."""
    B, h, E, V = 2, 4, 8, 16
    tokenizer, prior = build_tokenizer(TINY).eval(), build_prior(TINY).eval()
    images = torch.zeros(B, 3, 8, 8)
    z = tokenizer.latents(images)
    indices = tokenizer.encode(images)
    assert z.shape == (B, E, h, h) and indices.shape == (B, h, h) and indices.dtype == torch.int64
    for quantize in (tokenizer.quantize, GumbelQuantizer(V, E, E)):
        z_q, i, loss = quantize(z)
        assert z_q.shape == z.shape and i.shape == (B, h, h) and loss.shape == () and quantize.lookup(i).shape == z.shape
    assert tokenizer.decode(indices).shape == images.shape
    again, found = tokenizer(images)
    assert again.shape == images.shape and all(value.shape == () for value in found.values())
    assert tokenizer.encoder(images).shape == (B, TINY.z_channels, h, h)
    assert tokenizer.decoder(torch.zeros(B, TINY.z_channels, h, h)).shape == images.shape
    x = torch.zeros(B, 32, 8, 8)
    assert ResnetBlock(32, 64)(x).shape == (B, 64, 8, 8) and vqgan_gpt.AttnBlock(32)(x).shape == x.shape
    assert vqgan_gpt.Downsample(32)(x).shape == (B, 32, 4, 4) and vqgan_gpt.Upsample(32)(x).shape == (B, 32, 16, 16)
    tokens = torch.zeros(B, 5, dtype=torch.long)
    assert prior.transformer(tokens).shape == (B, 5, V) and prior.transformer.features(tokens).shape == (B, 5, TINY.width)
    assert prior.condition(torch.zeros(B, dtype=torch.long), B).shape == (B, 1) and prior.condition(None, B).tolist() == [[9], [9]]
    assert prior.condition(torch.zeros(B, h, h, dtype=torch.long), B).shape == (B, h * h)
    assert prior(indices).shape == (B, h * h, V) and prior(indices).dtype == torch.float32
    assert draw(torch.zeros(B, V)).shape == (B, 1) and CoordStage(V, 2).encode(8, 12).shape == (4, 6)
    assert vqgan_gpt.LPIPS()(torch.zeros(B, 3, 32, 32), torch.zeros(B, 1, 32, 32)).shape == (B, 1, 1, 1)
    assert vqgan_gpt.NLayerDiscriminator(3, 8, 2)(torch.zeros(B, 3, 32, 32)).shape == (B, 1, 6, 6)
    assert sample(tokenizer, prior, torch.zeros(B, dtype=torch.long), size=(4, 6)).shape == (B, 3, 8, 12)
    F.mse_loss(again, images).backward()
