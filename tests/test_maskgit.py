"""maskgit.py: tokenizer with its quirks, masks, decoding, editing, loader. Each test names the planted bug it was seen to catch."""
import dataclasses
import gzip
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CASES

import maskgit
from maskgit import VQVAE, BidirectionalTransformer, Config, UserError, from_official, parallel_decode

GOLDEN = Path(__file__).parent / "golden"
TINY = Config(**CASES["maskgit-class"][1])
METHODS = ("cosine", "linear", "square", "cubic", "sqrt", "log", "exponential")


def build(**changed):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **changed)
    return VQVAE(config).eval(), BidirectionalTransformer(config).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- schedules and masks

@pytest.mark.parametrize("method, T, left", [
    ("cosine", 8, "251 236 212 181 142 97 49 1"), ("linear", 8, "224 192 160 128 96 64 32 1"), ("square", 8, "252 240 220 192 156 112 60 1"),
    ("cubic", 8, "255 252 242 224 193 148 84 1"), ("sqrt", 8, "165 128 99 74 53 34 16 1"), ("log", 8, "96 64 45 32 21 13 6 1"),
    ("exponential", 8, "254 252 248 240 224 192 128 1"), ("cosine", 12, "253 247 236 221 203 181 155 127 97 66 33 1"),
    ("cosine", 16, "254 251 244 236 225 212 197 181 162 142 120 97 74 49 25 1")])
def test_masks_left_after_each_step(method, T, left):
    """Of 256 tokens, through the decoder. Planted: r = step / T; the sort's index one too high; count of the whole sequence (257)."""
    def prior(tokens, labels=None):
        return torch.randn(len(tokens), 256, 4, generator=seeded())
    prior.config, trace = Config(num_classes=0, guidance=1.0), []
    parallel_decode(prior, torch.full((2, 256), -1), steps=T, method=method, generator=seeded(), trace=trace)
    assert all(step["masked"].sum(1).tolist() == [int(n)] * 2 for step, n in zip(trace, left.split())) and len(trace) == T


def test_schedule_is_computed_in_float32():
    """The cosine at 2/3 lies below a half there. Planted: float64 (128)."""
    assert int(256 * maskgit.schedule(8 / 12, 256)) == 127 and int(1024 * maskgit.schedule(8 / 12, 1024)) == 511


@pytest.mark.parametrize("method", METHODS)
def test_schedules_fall_from_one_to_almost_nothing(method):
    gamma = maskgit.schedule(torch.arange(101) / 100, 256, method)
    assert gamma.dtype == torch.float32 and (gamma[1:] <= gamma[:-1]).all() and gamma[0] > 0.99 and gamma[-1] == pytest.approx(1e-6, rel=0.01)
    assert maskgit.schedule(0.3, torch.tensor([1, 2, 256]), method).isfinite().all()
    if method in maskgit.POWERS:
        assert torch.equal(gamma, maskgit.schedule(torch.arange(101) / 100, 256, f"pow{maskgit.POWERS[method]}"))


def test_schedules_count_each_image_s_own_masks():
    """log and exponential depend on how many are unknown. Planted: the sequence's length for all."""
    total = torch.tensor([16, 256])
    both = maskgit.schedule(0.25, total, "log")
    torch.testing.assert_close(both, torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(maskgit.schedule(0.25, total, "exponential"), 1 - total.float() ** -0.75)


@pytest.mark.parametrize("method", METHODS)
def test_training_masks_follow_the_schedule(method):
    """Number: the distribution of ceil(gamma(r) N); positions: uniform. Planted: one r for all images; floor (0 masks occur)."""
    N = 16
    mask = maskgit.draw_mask((20_000, N), method, seeded())
    count = mask.sum(1)
    assert mask.dtype == torch.bool and count.min() >= 1 and count.max() == N - (method == "exponential")     # gamma(0) = 1 - 1 / N
    expected = (N * maskgit.schedule((torch.arange(20_000) + 0.5) / 20_000, N, method)).ceil()
    share = [torch.bincount(c.long(), minlength=N + 1) / 20_000 for c in (count, expected)]
    assert (share[0] - share[1]).abs().max() < 0.015
    assert (mask.float().mean(0) - mask.float().mean()).abs().max() < 0.02


def test_cosine_masks_two_over_pi_on_average():
    assert maskgit.draw_mask((20_000, 256), "cosine", seeded()).float().mean() == pytest.approx(2 / math.pi, abs=0.01)


# --- transformer and its loss

def test_loss_is_smoothed_cross_entropy_of_masked_tokens_per_image():
    """Against a loop. Planted: one mean over all masked tokens of the batch; all tokens; smoothing over the other codes alone."""
    _, prior = build(label_smoothing=0.2)
    tokens, labels = torch.randint(16, (3, 16), generator=seeded()), torch.tensor([0, 4, 9])
    mask = torch.arange(16)[None] < torch.tensor([[1], [5], [16]])
    logits, total, plain, hits = prior(tokens, labels, mask).log_softmax(-1), 0, 0, 0
    for b in range(3):
        places = mask[b].nonzero()[:, 0]
        for i in places:
            target = torch.full((16,), 0.2 / 16)
            target[tokens[b, i]] += 0.8
            total -= (target * logits[b, i]).sum() / len(places) / 3
            plain -= logits[b, i, tokens[b, i]] / len(places) / 3
            hits += float(logits[b, i].argmax() == tokens[b, i]) / len(places) / 3
    loss, metrics = prior.loss(tokens, labels, mask)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(metrics["nats"], plain)
    assert float(metrics["accuracy"]) == pytest.approx(hits)


def test_loss_has_no_gradient_at_known_tokens():
    """Planted: compute_loss_for_all."""
    _, prior = build()
    tokens, mask, seen = torch.randint(16, (2, 16), generator=seeded()), torch.arange(32).view(2, 16) % 3 == 0, []
    prior.mlm_ln.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[0])
    prior.loss(tokens, torch.zeros(2, dtype=torch.long), mask)[0].backward()
    grad = seen[0].grad[:, 1:].abs().sum(-1)
    assert (grad[mask] > 0).all() and (grad[~mask] == 0).all() and (seen[0].grad[:, 0] == 0).all()


def test_mask_is_the_last_row_and_classes_follow_the_codes():
    """Planted: mask id V (the first class); labels from 0."""
    _, prior = build()
    table = prior.word_embeddings.weight
    assert len(table) == 16 + 9 + 1 + 1                                         # codes, classes, no class, [MASK]
    sequence = prior.sequence(torch.tensor([[3, -1]]), torch.tensor([4]))
    assert sequence.tolist() == [[20, 3, -1]]
    x = table[[20, 3, 26]] + prior.position_embeddings.weight[:3]
    torch.testing.assert_close(prior.embed(sequence)[0], prior.embeddings_ln(x))
    assert prior.sequence(torch.tensor([[3]])).tolist() == [[25, 3]]
    _, alone = build(label_dropout=0.0, guidance=1.0)
    assert len(alone.word_embeddings.weight) == 16 + 9 + 1
    with pytest.raises(UserError, match="never without a class"):
        alone(torch.zeros(1, 16, dtype=torch.long))


def test_output_weights_are_the_embeddings_of_the_codes():
    """Planted: a matrix of its own; logits of classes and [MASK] left in."""
    _, prior = build()
    tokens = torch.randint(16, (2, 16), generator=seeded())
    logits = prior(tokens)
    torch.testing.assert_close(logits, prior.features(prior.sequence(tokens))[:, 1:] @ prior.word_embeddings.weight[:16].T + prior.mlm_bias[:16])
    assert "mlm_bias" in dict(prior.named_parameters()) and not any("head" in name for name, _ in prior.named_parameters())


def test_layers_are_post_norm():
    """A layer's output is normalised, and so is what the mlp reads. Planted: norms before the attention; the exact gelu."""
    _, prior = build()
    layer, x = prior.layers[0], 3 * torch.randn(2, 5, TINY.width) + 1
    for module in (layer.query, layer.value, layer.out, layer.intermediate_output, layer.layer_output):
        torch.nn.init.normal_(module.weight)
    unit = lambda x: F.layer_norm(x, (TINY.width,), eps=1e-12)
    a = unit(x + layer.attention(x))
    hidden = layer.intermediate_output(a)
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / math.pi) ** 0.5 * (hidden + 0.044715 * hidden ** 3)))
    torch.testing.assert_close(layer(x), unit(a + layer.layer_output(gelu)))


def test_initial_weights_are_cut_at_two_deviations():
    _, prior = build(width=64)
    w = prior.layers[0].intermediate_output.weight
    assert w.abs().max() <= 0.04 and w.std().item() == pytest.approx(0.0176, rel=0.05)
    tokenizer = VQVAE(dataclasses.replace(TINY, code_dim=256, codebook_size=1024))
    assert tokenizer.quantize.embedding.weight.abs().max().item() == pytest.approx((3 / 1024) ** 0.5, rel=0.01)
    conv = tokenizer.encoder.down[0].block[0].conv1.weight
    assert conv.var().item() == pytest.approx(1 / conv[0].numel(), rel=0.1)


def test_guidance_formula_and_its_need_of_dropped_labels():
    """Planted: guidance weight g where 1 + g is meant; no class and class exchanged."""
    tokenizer, prior = build()
    labels, trace = torch.tensor([1, 5]), []
    blank = torch.full((2, 16), -1)
    maskgit.sample(tokenizer, prior, labels, guidance=3.0, generator=seeded(), trace=trace)
    cond, null = prior(blank, labels), prior(blank, torch.tensor([9, 9]))
    torch.testing.assert_close(trace[0]["logits"], null + 3 * (cond - null))
    tokenizer, prior = build(label_dropout=0.0, guidance=1.0)
    with pytest.raises(UserError, match="never saw dropped labels"):
        maskgit.sample(tokenizer, prior, labels, guidance=2.0)
    with pytest.raises(UserError, match="knows 0 to 8"):                # one more would be the row of [MASK]
        maskgit.sample(tokenizer, prior, torch.tensor([1, 9]))


# --- decoding

def holes(number=3):
    """Tokens (3, 16) with holes of 16, 7 and 0 masked tokens."""
    tokens = torch.randint(16, (number, 16), generator=seeded())
    for row, n in zip(tokens, (16, 7, 0)):
        row[torch.randperm(16, generator=seeded(1))[:n]] = -1
    return tokens


@pytest.mark.parametrize("noise", [0.0, 4.5, 1000.0])
@pytest.mark.parametrize("steps, start", [(1, 0), (5, 0), (12, 2), (40, 0)])
def test_known_tokens_stay_and_what_is_fixed_stays_fixed(steps, start, noise):
    """Also with more steps than tokens, and of noise without end. Planted: known tokens at confidence log 1 = 0; the sort's index one
    too high (a known token is masked again); the carried state returned (one [MASK] left)."""
    _, prior = build()
    given, trace = holes(), []
    result = parallel_decode(prior, given, torch.zeros(3, dtype=torch.long), steps=steps, start=start, choice_temperature=noise, generator=seeded(),
                             trace=trace)
    assert torch.equal(result[given >= 0], given[given >= 0]) and result.min() >= 0 and torch.equal(result, trace[-1]["tokens"])
    assert [step["step"] for step in trace] == list(range(start, steps))
    mask = given < 0
    for step in trace:
        assert torch.equal(step["fixed"] | step["masked"], mask) and not (step["fixed"] & step["masked"]).any()
        assert (step["confidence"][~mask] == math.inf).all() and step["confidence"][mask].isfinite().all()
        assert torch.equal(result[step["fixed"]], step["tokens"][step["fixed"]])
        assert all(step["fixed"].sum(1)[mask.sum(1) > 1] >= 1)                  # at least one a step, as long as there are two
        mask = step["masked"]
    assert mask.sum(1).tolist() == [1, 1, 0]


def test_counts_follow_each_image_s_own_hole():
    """Planted: N gamma in place of the hole's size."""
    _, prior = build()
    trace = []
    parallel_decode(prior, holes(), torch.zeros(3, dtype=torch.long), steps=4, generator=seeded(), trace=trace)
    expected = [[max(1, math.floor(n * math.cos(math.pi / 2 * (s + 1) / 4))) if n else 0 for n in (16, 7, 0)] for s in range(4)]
    assert [step["masked"].sum(1).tolist() for step in trace] == expected


def test_noise_on_the_confidence_falls_to_zero():
    """Confidence minus log-probability: its deviation is that of Gumbel noise times c (1 - r). Planted: r = step / T; noise on p; no fall."""
    _, prior = build()
    trace, B = [], 400
    parallel_decode(prior, torch.full((B, 16), -1), torch.zeros(B, dtype=torch.long), steps=4, choice_temperature=4.5, generator=seeded(), trace=trace)
    mask = torch.ones(B, 16, dtype=torch.bool)
    for s, step in enumerate(trace):
        noise = (step["confidence"] - step["logits"].log_softmax(-1).gather(-1, step["tokens"][..., None])[..., 0])[mask]
        wanted = 4.5 * (1 - (s + 1) / 4)
        assert noise.std() == pytest.approx(wanted * math.pi / 6 ** 0.5, rel=0.06, abs=1e-6)
        assert noise.mean() == pytest.approx(wanted * 0.5772, abs=0.25)
        mask = step["masked"]


def test_without_noise_the_surest_are_fixed():
    """Planted: the least confident fixed."""
    _, prior = build()
    trace = []
    parallel_decode(prior, torch.full((4, 16), -1), torch.zeros(4, dtype=torch.long), steps=6, choice_temperature=0.0, generator=seeded(), trace=trace)
    for step in trace:
        log_p = step["logits"].log_softmax(-1).gather(-1, step["tokens"][..., None])[..., 0]
        for sure, fixed, masked in zip(log_p, step["fixed"], step["masked"]):
            if fixed.any() and masked.any():
                assert sure[fixed].min() >= sure[masked].max()


def test_codes_are_drawn_from_the_softmax():
    """Planted: argmax; Gumbel noise with the wrong sign (another distribution)."""
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5])

    def prior(tokens, labels=None):
        return logits.expand(*tokens.shape, 4)
    prior.config = Config(num_classes=0, guidance=1.0)
    for temperature in (1.0, 2.0):
        drawn = parallel_decode(prior, torch.full((200, 100), -1), steps=1, temperature=temperature, generator=seeded())
        share = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
        assert (share - (logits / temperature).softmax(-1)).abs().max() < 0.015


def test_ties_at_the_cut_leave_fewer_masks():
    """Planted: <= (then more); topk (then exactly as many)."""
    confidence = torch.tensor([[1.0, 2, 2, 2, 3], [1, 2, 3, 4, math.inf]])
    assert maskgit.least_confident(confidence, torch.tensor([2, 2])).tolist() == [[True, False, False, False, False], [True, True, False, False, False]]


def test_every_number_comes_from_the_generator():
    """Planted: a draw without it."""
    tokenizer, prior = build()
    draw = lambda: maskgit.sample(tokenizer, prior, torch.tensor([1, 2]), generator=seeded(3))
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(2)
    assert torch.equal(first, draw())


@pytest.mark.parametrize("start, steps", [(2, 2), (-1, 4), (0, 0)])
def test_no_passes_are_refused(start, steps):
    _, prior = build()
    with pytest.raises(UserError, match=f"start {start}, steps {steps}"):
        parallel_decode(prior, holes(), torch.zeros(3, dtype=torch.long), steps=steps, start=start)


# --- editing

@pytest.mark.parametrize("box, rows, columns", [((32, 64, 64, 32), (1, 7), (3, 7)), ((0, 0, 16, 16), (0, 2), (0, 2)), ((40, 200, 64, 56), (1, 7), (11, 16)),
                                                ((0, 0, 256, 256), (0, 16), (0, 16))])
def test_box_covers_one_more_token_on_each_side(box, rows, columns):
    """Rows max(0, top // 16 - 1) to min(S, height // 16 + top // 16 + 1), as the release. Planted: without the ring."""
    where = maskgit.box_tokens(box, 16, 16)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(where, expected)


@pytest.mark.parametrize("box", [(-1, 0, 4, 4), (0, 0, 0, 4), (20, 0, 16, 4), (0, 20, 4, 16), (40, 40, 4, 4)])
def test_box_outside_of_the_picture_is_refused(box):
    with pytest.raises(UserError, match="does not lie in the picture, 32 x 32"):
        maskgit.box_tokens(box, 4, 8)


def test_mask_of_pixels_covers_what_it_touches_and_one_more():
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 5, 6] = True
    where = maskgit.mask_tokens(mask, 2)
    assert where.shape == (2, 8, 8) and not where[1].any()
    assert where[0].nonzero().tolist() == [[i, j] for i in (1, 2, 3) for j in (2, 3, 4)]


def test_inpainting_keeps_tokens_and_far_pixels():
    """Planted: the mask inverted; compositing with 1 - alpha; known tokens drawn anew."""
    tokenizer, prior = build(image_size=32, restart=0, codebook_size=64)
    images, labels, trace = torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1, torch.tensor([1, 2]), []
    where = maskgit.box_tokens((8, 8, 4, 4), 2, 16)
    again = maskgit.inpaint(tokenizer, prior, images, where, labels, steps=6, generator=seeded(), trace=trace)
    before, after = tokenizer.encode(images), trace[-1]["tokens"].view(2, 16, 16)
    assert torch.equal(before[:, ~where], after[:, ~where]) and trace[0]["step"] == 1                 # a sixth of the steps
    assert torch.equal(again[:, :, 20:], images[:, :, 20:]) and not torch.equal(again[:, :, 8:12, 8:12], images[:, :, 8:12, 8:12])
    plain = maskgit.inpaint(tokenizer, prior, images, where, labels, steps=6, generator=seeded(), composite=False)
    torch.testing.assert_close(again[:, :, 9:11, 9:11], plain[:, :, 9:11, 9:11])        # in the middle: only what was drawn
    nothing = torch.zeros(16, 16, dtype=torch.bool)
    assert torch.equal(maskgit.inpaint(tokenizer, prior, images, nothing, labels, generator=seeded()), images)


@pytest.mark.parametrize("left, right", [(0, 0), (0, 1), (0, 2), (0, 5), (3, 0), (2, 7), (9, 4)])
def test_outpainting_slides_by_half_windows(left, right, monkeypatch):
    """The picture's tokens are kept, every window has at least half of its columns known, nothing stays masked. Planted: windows that
    slide by their whole width; the left side from the far end."""
    tokenizer, prior = build()
    images, known, original = torch.rand(2, 3, 8, 8, generator=seeded()) * 2 - 1, [], maskgit.parallel_decode

    def decode(prior, tokens, labels, **more):
        known.append((tokens >= 0).view(2, 4, 4))
        return original(prior, tokens, labels, **more)
    monkeypatch.setattr(maskgit, "parallel_decode", decode)
    canvas = []
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: (canvas.append(tokens), VQVAE.decode(tokenizer, tokens))[1])
    wide = maskgit.outpaint(tokenizer, prior, images, torch.tensor([1, 2]), left=left, right=right, steps=3, generator=seeded())
    assert wide.shape == (2, 3, 8, 2 * (left + 4 + right)) and wide.abs().max() <= 1
    assert torch.equal(canvas[0][:, :, left:left + 4], tokenizer.encode(images)) and canvas[0].min() >= 0
    assert len(known) == -(-left // 2) + -(-right // 2)
    assert all(k.all(1).sum(1).min() >= 2 and not k.all() for k in known)


# --- tokenizer

def test_width_changing_blocks_have_no_path_around():
    """QUIRK: their shortcut is a convolution of their output. Planted: of their input."""
    same, other = maskgit.ResBlock(32, 32, 8), maskgit.ResBlock(32, 64, 8)
    for block in (same, other):
        torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(same(x), x) and torch.equal(other(x), torch.zeros(1, 64, 4, 4))
    assert other.nin_shortcut.weight.shape == (64, 64, 1, 1)
    assert not [name for name, _ in other.named_parameters() if "conv" in name and "bias" in name]


def test_encoder_sees_images_between_zero_and_one():
    """Planted: [-1, 1] fed on."""
    tokenizer, _ = build()
    seen = []
    tokenizer.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokenizer.encode(torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0)]))
    assert [x.unique().tolist() for x in seen[0]] == [[0.0], [0.5], [1.0]]
    codes = torch.randint(16, (1, 4, 4))
    torch.testing.assert_close(tokenizer.decode(codes), 2 * tokenizer.decoder(tokenizer.quantize.lookup(codes)) - 1)


@pytest.mark.parametrize("kind", ["softmax", "argmax"])
def test_entropy_loss_equals_a_loop(kind):
    """Planted: mean of the positions' log p; the average entropy's sign; temperature multiplied."""
    distance = 3 * torch.rand(20, 7, generator=seeded())
    p, sample, average = [], 0, 0
    for row in distance:
        q = (-row / 0.5).softmax(0)
        hard = F.one_hot(row.argmin(), 7).float() if kind == "argmax" else q
        p.append(hard)
        sample -= (hard * q.log()).sum() / 20
    for k in range(7):
        share = sum(q[k] for q in p) / 20
        average -= share * math.log(share + 1e-5)
    torch.testing.assert_close(maskgit.entropy_loss(-distance, 0.5, kind), sample - average, rtol=1e-4, atol=1e-5)


def test_entropy_loss_wants_sure_positions_and_all_codes():
    """-log V where each position is sure and all codes are used alike; 0 where all use one, or none is sure."""
    sure, one, unsure = -100 * (1 - torch.eye(8)), -100 * (1 - torch.eye(8)[:1].expand(8, 8)), torch.zeros(8, 8)
    assert maskgit.entropy_loss(sure, 1.0) == pytest.approx(-math.log(8), abs=1e-3)
    assert all(maskgit.entropy_loss(x, 1.0) == pytest.approx(0, abs=1e-3) for x in (one, unsure))
    x = torch.randn(30, 5, generator=seeded(), requires_grad=True)
    maskgit.entropy_loss(x, 1.0, "argmax").backward()
    assert x.grad.abs().sum() > 0                                               # straight through


def test_commitment_moves_the_encoder_and_the_rest_the_codes():
    """Planted: beta on the codebook's term (as the PyTorch port has it)."""
    q = maskgit.VectorQuantizer(16, 4, entropy_weight=0.0)
    z = torch.randn(2, 4, 3, 3, generator=seeded(), requires_grad=True)
    z_q, indices, losses = q(z)
    e = q.lookup(indices)
    grads = [torch.autograd.grad(losses[name], (z, q.embedding.weight), retain_graph=True, allow_unused=True) for name in ("commitment", "codebook")]
    torch.testing.assert_close(grads[0][0], 0.25 * 2 * (z - e) / z.numel())
    assert grads[0][1] is None and grads[1][0] is None and grads[1][1].abs().sum() > 0
    torch.testing.assert_close(losses["codebook"], F.mse_loss(e, z))
    [through] = torch.autograd.grad((z_q * torch.arange(18).view(2, 1, 3, 3)).sum(), z)
    assert torch.equal(through, torch.arange(18.0).view(2, 1, 3, 3).expand_as(z))       # straight-through


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_gradients_are_those_of_the_codes_that_were_looked_up(decay):
    """Codes move within the forward pass of training. Planted: distances of the moved parameter itself, through .data."""
    grads = []
    for training in (True, False):
        torch.manual_seed(0)
        q = maskgit.VectorQuantizer(32, 4, temperature=1.0, decay=decay, restart=3).train(training)
        z = (5 + torch.randn(2, 4, 4, 4)).requires_grad_()
        sum(q(z, seeded())[2].values()).backward()
        grads.append((z.grad, q.embedding.weight.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_codes_begin_at_latents_and_unused_ones_move(decay):
    """Planted: idle counted from 0 (the first batch leaves codes where they were drawn)."""
    torch.manual_seed(0)
    q = maskgit.VectorQuantizer(32, 4, decay=decay, restart=3).train()
    z = 5 + torch.randn(8, 4, 4, 4)
    indices = q(z, seeded())[1]
    flat, used = z.permute(0, 2, 3, 1).flatten(0, 2), indices.unique()
    unused = [k for k in range(32) if k not in used]
    assert len(unused) > 20 and (q.embedding.weight[unused][:, None] == flat).all(-1).any(1).all()
    assert len(q(z, seeded())[1].unique()) > 20
    far = 50 + torch.randn(8, 4, 4, 4)
    for _ in range(4):
        q(far, seeded())
    assert (q.embedding.weight.mean(1) > 20).sum() > 25                         # no code stays behind


def test_r1_is_the_squared_gradient_at_real_images():
    """By finite differences. Planted: half of it; the mean over pixels."""
    torch.manual_seed(0)
    net = maskgit.Discriminator(8, 8).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    logits, r1 = maskgit.r1_penalty(net, x)
    torch.testing.assert_close(logits, net(x))
    slopes = []
    for i in range(x[0].numel()):
        step = torch.zeros(x[0].numel(), dtype=torch.float64)
        step[i] = 1e-5
        slopes.append((net(x + step.view(3, 8, 8)) - net(x - step.view(3, 8, 8)))[:, 0] / 2e-5)
    torch.testing.assert_close(r1, torch.stack(slopes).square().sum(0).mean(), rtol=1e-5, atol=1e-10)


def test_discriminator_has_the_released_widths():
    with torch.device("meta"):
        net = maskgit.Discriminator(256)
    assert [net.conv_in.out_channels, *(block.conv2.out_channels for block in net.blocks)] == [64, 128, 256, 512, 512, 512, 512]
    assert net.dense1.in_features == 16 * 512
    assert [maskgit.Discriminator(side, 8)(torch.zeros(2, 3, side, side)).shape for side in (4, 24, 28, 30)] == 4 * [(2, 1)]
    assert maskgit.downsample(torch.ones(1, 2, 8, 8))[0, 0, 1:-1, 1:-1].eq(1).all()     # a mean: what is flat stays


def test_generator_loss_has_fixed_weights():
    torch.manual_seed(0)
    real, fake, net = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), maskgit.Discriminator(8, 8)
    loss, found = maskgit.generator_loss(TINY, real, fake, torch.tensor(0.5), lambda x: 2 * x, net)
    expected = F.mse_loss(real, fake) * (1 + 0.1 * 4) + 0.5 + TINY.disc_weight * F.softplus(-net(fake)).mean()
    torch.testing.assert_close(loss, expected)
    assert set(found) == {"mse", "perceptual", "g_loss"}


def test_resnet_is_torchvision_s(tmp_path):
    """Names and sizes of its file; frozen; BatchNorm stays in eval mode. Planted: stride at the first 1x1 (shapes stay: see the map's)."""
    net = maskgit.ResNet50().train()
    assert sum(p.numel() for p in net.parameters()) == 25_557_032 - 2048 * 1000 - 1000
    state = net.state_dict()
    assert {"layer1.0.downsample.0.weight", "layer4.2.bn3.running_var", "layer3.5.conv2.weight", "bn1.bias"} <= state.keys()
    assert state["layer2.0.conv2.weight"].shape == (128, 128, 3, 3) and net.layer2[0].conv2.stride == (2, 2) and net.layer2[0].conv1.stride == (1, 1)
    assert not any(p.requires_grad for p in net.parameters()) and not net.bn1.training
    assert net(torch.rand(1, 3, 16, 16)).shape == (1, 2048, 7, 7)
    older = {name: value + 1 for name, value in state.items() if "num_batches" not in name}
    torch.save(older | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, tmp_path / "resnet50.pth")
    maskgit.load_resnet(net, dataclasses.replace(TINY, perceptual=str(tmp_path / "resnet50.pth")))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in older.items())
    torch.save({"layer1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for path, says in ((tmp_path / "other.pth", "conv1.weight"), (tmp_path / "none.pth", "is no file")):
        with pytest.raises(UserError, match=says):
            maskgit.load_resnet(net, dataclasses.replace(TINY, perceptual=str(path)))


def test_training_returns_the_average_of_the_weights(tmp_path):
    """Planted: the last weights returned and sampled from."""
    config = dataclasses.replace(TINY, ema=0.5, train_steps_tokenizer=2, train_steps_prior=2, train_images=20, test_images=10)
    data = maskgit.load_data(config)
    run = maskgit.Run(tmp_path / "run", config, data.classes)
    tokenizer = maskgit.train_tokenizer(config, data, run)
    prior = maskgit.train_prior(config, data, run, tokenizer)
    saved = run.state["objects"]
    for name, model in (("tokenizer", tokenizer), ("prior", prior)):
        assert not model.training and all(torch.equal(value, saved[f"{name}_ema"][key]) for key, value in model.state_dict().items())
        assert any(not torch.equal(saved[name][key], value) for key, value in saved[f"{name}_ema"].items())
    loaded = maskgit.load_run(tmp_path / "run")[1:]
    assert all(torch.equal(a, b) for x, y in zip(loaded, (tokenizer, prior)) for a, b in zip(x.parameters(), y.parameters()))


def test_replace_draws_all_of_its_box_anew(tmp_path, monkeypatch):
    """The release's rule of boxes leaves out the last token of one that is not aligned. Planted: the box passed on as it is."""
    config = dataclasses.replace(TINY, image_size=24, ch_mult=(1, 1, 1), train_images=20, test_images=4, train_steps_tokenizer=0, train_steps_prior=0)
    data = maskgit.load_data(config)
    run = maskgit.Run(tmp_path / "run", config, data.classes)
    maskgit.train_prior(config, data, run, maskgit.train_tokenizer(config, data, run))
    seen = []
    monkeypatch.setattr(maskgit, "edit", lambda args, run, tokenizer, prior, images, labels, where, name: seen.append(where))
    for top in range(15):
        maskgit.main(["replace", str(tmp_path / "run"), "--labels", "1", "--box", str(top), "0", "10", "9"])
        rows = seen[-1].any(1).nonzero()[:, 0]
        assert rows[0] <= top // 4 and rows[-1] >= (top + 9) // 4


def test_guidance_without_a_class_costs_nothing():
    """Planted: two passes of the transformer for equal logits."""
    tokenizer, prior = build()
    calls, forward = [], prior.forward
    prior.forward = lambda *a: calls.append(0) or forward(*a)
    for labels, passes in ((None, 3), (torch.full((2,), 9), 3), (torch.tensor([1, 9]), 6)):
        calls.clear()
        maskgit.parallel_decode(prior, torch.full((2, 16), -1), labels, steps=3, guidance=2.0)
        assert len(calls) == passes


# --- presets and released weights

@pytest.mark.parametrize("path", sorted(GOLDEN.glob("maskgit_*_release.json.gz")), ids=lambda path: path.name.removesuffix("_release.json.gz"))
def test_released_checkpoints_map_completely(path):
    """Every name once, equal shapes, the recorded number of parameters. Planted: the decoder's levels counted from the finest."""
    release = json.load(gzip.open(path))
    state = {name: torch.empty(shape, device="meta") for name, shape in release["params"].items()}
    model, ours = from_official(state), maskgit.our_names(release["params"])
    assert sum(p.numel() for p in model.parameters()) == release["n_params"]
    assert len(set(ours.values())) == len(release["params"]) and set(ours.values()) == set(model.state_dict())
    for flax, port in (release.get("flax_name") or {}).items():
        assert ours[flax] == flax and maskgit.our_names(release["flax_name"].values())[port] == flax
    if isinstance(model, BidirectionalTransformer):
        assert (model.config.heads, model.config.num_classes, model.codebook_size) == (16, 1000, 1024)
        assert model.places == release["config"]["latent"] ** 2


def test_presets_have_the_released_sizes():
    counts = {"imagenet256": 172_457_193, "imagenet512": 173_047_017}
    for name, preset in maskgit.PRESETS.items():
        maskgit.check(preset)
        with torch.device("meta"):
            tokenizer, prior = VQVAE(preset), BidirectionalTransformer(preset)
        if name in counts:
            assert sum(p.numel() for p in prior.parameters()) == counts[name]
            assert sum(p.numel() for p in tokenizer.parameters()) == 54_515_587 and not list(tokenizer.buffers())


def flax_tree(model, names):
    """A model's weights as the release stores them: {official name: array}."""
    ours, state, found = maskgit.our_names(names), model.state_dict(), {}
    for name, shape in names.items():
        value = state[ours[name]]
        value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T if name.endswith("kernel") else value
        found[name] = value.reshape(shape).contiguous().numpy()
    return found


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *scopes, last = name.split("/")
        inner = tree
        for scope in scopes:
            inner = inner.setdefault(scope, {})
        inner[last] = value
    return tree


def pack(x):
    """msgpack as flax.serialization writes it."""
    if isinstance(x, dict):
        head = bytes([0x80 | len(x)]) if len(x) < 16 else b"\xde" + struct.pack(">H", len(x))
        return head + b"".join(pack(k) + pack(v) for k, v in x.items())
    if isinstance(x, np.ndarray):
        content = b"\x93" + bytes([0x90 | x.ndim]) + b"".join(map(pack, x.shape)) + pack(x.dtype.name) + pack(x.tobytes())
        return (b"\xc7" + bytes([len(content)]) if len(content) < 256 else b"\xc9" + struct.pack(">I", len(content))) + b"\x01" + content
    if isinstance(x, bytes):
        return b"\xc6" + struct.pack(">I", len(x)) + x
    if isinstance(x, str):
        return (bytes([0xa0 | len(x)]) if len(x) < 32 else b"\xd9" + bytes([len(x)])) + x.encode()
    return bytes([x]) if x < 128 else b"\xcd" + struct.pack(">H", x)


def names_of(part):
    return json.loads((GOLDEN / f"maskgit_{part}_small.json").read_text())


@pytest.mark.parametrize("part", ["tokenizer", "transformer"])
def test_weights_come_back_from_every_form(part, tmp_path):
    """Nested, flat, under "params", as a file of Flax, of torch, of the port: the same bits. Planted: matrices not transposed; heads of
    `out` joined as those of `query`; query and key exchanged."""
    golden = names_of(part)
    start = from_official({name: np.random.RandomState(i).standard_normal(shape).astype(np.float32)
                           for i, (name, shape) in enumerate(golden["params"].items())}, golden["config"])
    flat = flax_tree(start, golden["params"])
    (tmp_path / "flax").write_bytes(pack({"params": nested(flat)}))
    torch.save(start.state_dict(), tmp_path / "port.bin")
    forms = [flat, nested(flat), {"params": nested(flat)}, {f"params/{name}": value for name, value in flat.items()}, tmp_path / "flax"]
    forms += [start.state_dict(), tmp_path / "port.bin"] if part == "tokenizer" else []
    for form in forms:
        again = from_official(form, golden["config"])
        assert all(torch.equal(value, start.state_dict()[name]) for name, value in again.state_dict().items()) and not again.training
    assert all(p.requires_grad for p in again.parameters())
    again.load_state_dict({name: value + 1 for name, value in again.state_dict().items()})
    assert np.array_equal(next(iter(flat.values())), next(iter(flax_tree(start, golden["params"]).values())))   # a copy, not the source


def test_transformer_of_another_codebook_size_needs_the_config():
    golden = names_of("transformer")
    state = {name: np.zeros(shape, np.float32) for name, shape in golden["params"].items()}
    assert from_official(state, {"codebook_size": 70}).config.num_classes == 4
    with pytest.raises(UserError, match="75 embeddings cannot hold 1024 codes"):
        from_official(state)


@pytest.mark.parametrize("part", ["tokenizer", "transformer"])
def test_names_and_shapes_that_do_not_fit_are_named(part):
    """The first five. Planted: names missing in the checkpoint left at their initial values."""
    golden = names_of(part)
    state = {name: np.zeros(shape, np.float32) for name, shape in golden["params"].items()}
    name = next(name for name in state if name.endswith("kernel") and "Conv_0" in name or "mlm_dense/kernel" in name)
    for wrong in ({**state, name: state[name][..., :-1]}, {**state, "extra/thing": np.zeros(2)}):
        with pytest.raises(UserError, match="1 names or shapes do not fit, first (" + re.escape(name) + "|extra/thing)"):
            from_official(wrong, golden["config"])
    with pytest.raises(UserError, match="1 names or shapes do not fit"):
        from_official({key: value for key, value in state.items() if key != name}, golden["config"])
    with pytest.raises(UserError, match="7 names or shapes do not fit, first a0/b, a1/b, a2/b, a3/b, a4/b$"):
        from_official(state | {f"a{i}/b": np.zeros(1) for i in range(7)}, golden["config"])


@pytest.mark.parametrize("state, says", [
    ({f"layers.{i}.weight": torch.zeros(2) for i in range(7)}, "layers.0.weight, layers.1.weight"),
    ({"word_embeddings.weight": torch.zeros(3)}, "no model of this paper"), ({}, "holds no names and tensors"),
    ({"params": {}}, "holds no names and tensors"), ({"encoder": "text"}, "holds no names and tensors"), ({"progress": 1}, "is a run of this script")])
def test_odd_weights_get_one_line(state, says):
    with pytest.raises(UserError, match=says) as error:
        from_official(state)
    assert "\n" not in str(error.value)


def test_msgpack_reads_what_it_should():
    data = {"a": 5, "b": 300, "c": "x" * 40, "d": {str(i): i for i in range(20)}, "e": np.arange(6, dtype=np.int32).reshape(2, 3)}
    again = maskgit.read_msgpack(pack(data))
    assert np.array_equal(again.pop("e"), data.pop("e")) and again == data
    for kind, wanted in ((b"\xc0", None), (b"\xc2", False), (b"\xc3", True), (b"\xff", -1), (b"\xd1\xff\x00", -256), (b"\xcb" + struct.pack(">d", 0.5), 0.5),
                         (b"\x92\x01\x02", [1, 2])):
        assert maskgit.read_msgpack(kind) == wanted
    with pytest.raises(ValueError, match="ends too early"):
        maskgit.read_msgpack(pack(data)[:-1])


def test_shapes_and_dtypes_are_those_of_the_docstrings():
    """Every public call whose docstring gives a shape. Planted: lookup without its permute."""
    B, h, V, E, N, M = 2, 4, 16, 8, 16, 16
    tokenizer, prior = build()
    images, labels = torch.zeros(B, 3, 8, 8), torch.zeros(B, dtype=torch.long)
    tokens, z = tokenizer.encode(images), tokenizer.latents(images)
    assert tokens.shape == (B, h, h) and tokens.dtype == torch.int64 and z.shape == (B, E, h, h)
    z_q, again, losses = tokenizer.quantize(z)
    assert z_q.shape == z.shape == tokenizer.quantize.lookup(tokens).shape and torch.equal(again, tokens) and set(losses) == {"commitment", "codebook", "entropy"}
    assert tokenizer.decode(tokens).shape == tokenizer(images)[0].shape == images.shape
    assert tokenizer.encode(torch.zeros(1, 3, 8, 12)).shape == (1, 4, 6)
    sequence = prior.sequence(tokens.flatten(1), labels)
    assert sequence.shape == (B, 1 + N) and prior.embed(sequence).shape == prior.features(sequence).shape == (B, 1 + N, M)
    assert prior(tokens, labels).shape == (B, N, V) and prior(tokens).dtype == torch.float32 and prior.double()(tokens).dtype == torch.float64
    prior.float()
    assert torch.equal(prior(tokens, labels), prior(tokens.flatten(1), labels))
    mask = maskgit.draw_mask((B, N))
    assert mask.shape == (B, N) and mask.dtype == torch.bool and prior.loss(tokens, labels)[0].shape == ()
    assert prior.loss(tokens, labels, mask.view(B, h, h))[0].shape == ()
    assert maskgit.schedule(torch.zeros(3, 2), 9).shape == (3, 2) and maskgit.schedule(0.5, 9).shape == ()
    assert maskgit.gumbel(torch.zeros(3, 2, dtype=torch.float64)).shape == (3, 2)
    assert maskgit.least_confident(torch.zeros(B, N), torch.ones(B, dtype=torch.long)).shape == (B, N)
    assert parallel_decode(prior, torch.full((B, N), -1), labels).shape == (B, N)
    assert maskgit.sample(tokenizer, prior, labels).shape == images.shape
    assert maskgit.inpaint(tokenizer, prior, images, torch.ones(h, h, dtype=torch.bool), labels).shape == images.shape
    assert maskgit.outpaint(tokenizer, prior, images, labels, right=3).shape == (B, 3, 8, 14)
    assert maskgit.box_tokens((0, 0, 2, 2), 2, 4).shape == (4, 4) and maskgit.mask_tokens(torch.zeros(B, 8, 8, dtype=torch.bool), 2).shape == (B, h, h)
    assert maskgit.Discriminator(16, 8)(torch.zeros(B, 3, 16, 16)).shape == (B, 1)
    assert maskgit.entropy_loss(torch.zeros(5, V)).shape == () and maskgit.downsample(torch.zeros(B, 3, 7, 8)).shape == (B, 3, 4, 4)
    assert maskgit.tokenize(tokenizer, torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "cpu").shape == (3, h, h)
    with pytest.raises(ValueError, match="multiples of 2"):
        tokenizer.encode(torch.zeros(1, 3, 8, 9))
