"""Properties of every file's tokenizer, prior and sampler. Each test names the planted bug it was seen to catch."""

import pytest
import torch


def test_tokens_are_in_range_and_decode_to_images(case):
    """Planted: an off-by-one bin edge (index V)."""
    tokenizer, _ = case.build()
    images, _ = case.images()
    tokens = tokenizer.encode(images)
    if case.continuous:
        side = case.config.image_size // case.config.f
        assert tokens.dtype == torch.float32 and tokens.shape == (len(images), case.config.latent_dim, side, side)
    else:
        assert tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < case.V
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    if list(tokenizer.parameters()):                                    # a decoder may overshoot; sample() clamps
        if getattr(case.config, "quantizer", "") == "gumbel":
            return                                                      # its forward pass draws noise, encode does not
    else:
        assert decoded.min() >= -1 and decoded.max() <= 1
    again, losses = tokenizer(images)
    torch.testing.assert_close(again, decoded)
    assert all(torch.as_tensor(value).shape == () for value in losses.values())


def test_tokenizer_refuses_other_sizes(case):
    """Planted: no check."""
    tokenizer, _ = case.build()
    with pytest.raises(ValueError, match=str(getattr(case.config, "f", case.config.image_size))):
        tokenizer.encode(torch.zeros(1, 3, case.config.image_size + 1, case.config.image_size))


def test_logits_have_the_documented_shape(case):
    """Planted: colours and levels swapped in the final view (shape then differs for V != C)."""
    if case.video:
        pytest.skip(case.own_tests)
    tokenizer, prior = case.build()
    images, labels = case.images(3)
    tokens, labels = case.tokens(tokenizer, images), case.condition(labels)
    logits = prior(tokens, labels)
    width = case.config.decoder_width if case.continuous else case.V
    assert logits.shape == (3, tokens.shape[1], width) and logits.dtype == torch.float32
    loss, metrics = prior.loss(tokens, labels)
    assert loss.shape == () and all(torch.as_tensor(value).shape == () for value in metrics.values())


def test_logits_ignore_their_own_and_later_tokens(case):
    """Change token t: logits up to t (of maps: up to the end of its map) keep their bits, some logit behind changes. All t.

    Planted: mask B in the first layer; residual around the first gated layer; vertical stack that shows its own row;
    i <= o at the centre of mask A; the last view with colours first.
    """
    if case.masked or case.continuous:
        pytest.skip("sees all that is not masked")
    tokenizer, prior = case.build()
    images, labels = case.images(1)
    tokens, labels = tokenizer.encode(images).flatten(1), case.condition(labels)
    with torch.no_grad():
        before = prior(tokens, labels)
        for t in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % case.V
            after, n = prior(changed, labels), case.seen_from(t)
            assert torch.equal(after[:, :n], before[:, :n]), f"a logit before {n} sees token {t}"
            if n < tokens.shape[1]:
                assert not torch.equal(after[:, n:], before[:, n:]), f"no later logit sees token {t}"


def test_logits_ignore_masked_tokens(case):
    """Change token t: where t is masked all logits keep their bits, where it is not others change. All t.

    Planted: the mask compared with the wrong sign; the loss's mask not passed on; True = known.
    """
    if not case.masked or case.video:
        pytest.skip(case.own_tests or "causal")
    tokenizer, prior = case.build()
    images, labels = case.images(1)
    tokens, labels = tokenizer.encode(images).flatten(1), case.condition(labels)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        before = prior(tokens, labels, mask)
        for t in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % case.V
            after = prior(changed, labels, mask)
            if mask[0, t]:
                assert torch.equal(after, before), f"a logit sees masked token {t}"
            else:
                assert (after != before)[0].any(-1).all(), f"a logit does not see token {t}"
        kept = prior.loss(tokens.masked_fill(~mask, 0), labels, mask)[0]
        assert not torch.equal(kept, prior.loss(tokens, labels, mask)[0])


def test_labels_matter_and_no_class_is_no_term(case):
    """Planted: condition() drops the labels."""
    if not case.config.num_classes or case.video:
        pytest.skip(case.own_tests or "unconditional")
    tokenizer, prior = case.build()
    tokens = case.tokens(tokenizer, case.images(1)[0])
    logits = [prior(tokens, torch.tensor([label])) for label in (0, 1, case.config.num_classes)]
    assert not torch.equal(logits[0], logits[1])
    assert torch.equal(logits[2], prior(tokens, None))


def test_untrained_samples_are_finite_and_repeat_with_the_seed(case):
    """Planted: a draw without the generator."""
    tokenizer, prior = case.build()
    labels = case.condition(torch.zeros(2, dtype=torch.long))
    draw = lambda seed: case.module.sample(tokenizer, prior, labels, generator=torch.Generator().manual_seed(seed))
    images = draw(0)
    assert images.shape == case.images()[0].shape and images.isfinite().all()
    assert torch.equal(images, draw(0)) and not torch.equal(images, draw(1))


def test_sampler_sees_what_training_sees(case):
    """The logits of every sampling step are those of one teacher-forced pass over the finished tokens (float64).

    Planted: the cache of a row not written; the vertical stack reads row i - 1 before it is complete.
    """
    if case.own_tests:
        pytest.skip(case.own_tests)
    tokenizer, prior = case.build()
    trace, labels = [], case.condition(torch.zeros(2, dtype=torch.long))
    case.module.sample(tokenizer.double(), prior.double(), labels, generator=torch.Generator().manual_seed(0), trace=trace)
    if case.masked:                                                     # each pass: what the earlier ones left known, the rest masked
        given = torch.full_like(trace[0]["tokens"], -1)
        for step in trace:
            assert torch.equal(step["logits"], prior(given, labels))
            given = step["tokens"].masked_fill(step["masked"], -1)
        return
    join = (lambda name: torch.cat([step[name] for step in trace], 1)) if case.scales else lambda name: torch.stack([step[name] for step in trace], 1)
    full, stepwise = prior(join("tokens") if case.scales else trace[-1]["tokens"], labels), join("logits")
    torch.testing.assert_close(stepwise, full, rtol=1e-9, atol=1e-9)


def test_low_temperature_draws_the_most_likely_token(case):
    """Planted: temperature multiplies the logits."""
    if case.own_tests:
        pytest.skip(case.own_tests)
    tokenizer, prior = case.build()
    trace = []
    labels = case.condition(torch.zeros(1, dtype=torch.long))
    case.module.sample(tokenizer, prior, labels, temperature=1e-6, generator=torch.Generator().manual_seed(0), trace=trace)
    if case.masked:
        for step in trace:
            drawn = step["fixed"] | step["masked"]
            assert torch.equal(step["tokens"][drawn], step["logits"].argmax(-1)[drawn])
        return
    if case.scales:
        assert len(trace) == len(case.config.scales) and all(torch.equal(step["logits"].argmax(-1), step["tokens"]) for step in trace)
        return
    best = torch.stack([step["logits"].argmax(-1) for step in trace], 1)
    assert torch.equal(best, trace[-1]["tokens"].flatten(1))


@pytest.mark.parametrize("more", [0, 5])
def test_sampling_keeps_known_tokens(case, more):
    """Half the image known, and some tokens of the next row. Planted: known tokens overwritten by the first draw."""
    if case.own_tests:
        pytest.skip(case.own_tests)
    tokenizer, prior = case.build()
    tokens = tokenizer.encode(case.images()[0]).flatten(1)
    trace, n = [], tokens.shape[1] // 2 + more
    if case.masked or case.scales:
        known = tokens.clone()
        known[:, n:] = -1
        case.module.sample(tokenizer, prior, case.condition(torch.zeros(2, dtype=torch.long)), known=known,
                           generator=torch.Generator().manual_seed(0), trace=trace)
        if case.scales:
            assert torch.equal(torch.cat([step["tokens"] for step in trace], 1)[:, :n], tokens[:, :n])
            return
        assert all(torch.equal(step["tokens"][:, :n], tokens[:, :n]) and not step["masked"][:, :n].any() for step in trace)
        return
    case.module.sample(tokenizer, prior, case.condition(torch.zeros(2, dtype=torch.long)), known=tokens[:, :n],
                       generator=torch.Generator().manual_seed(0), trace=trace)
    assert torch.equal(trace[-1]["tokens"].flatten(1)[:, :n], tokens[:, :n]) and len(trace) == tokens.shape[1] - n


def test_one_batch_is_learned_by_heart(case):
    """Planted: loss on shifted targets (cannot fall this far); a detached logit."""
    if case.own_tests:
        pytest.skip(case.own_tests)
    tokenizer, prior = case.build()
    images, labels = case.images(4)
    tokens, labels = tokenizer.encode(images).flatten(1), case.condition(labels)
    if list(tokenizer.parameters()):                                    # an untrained codebook says too little
        tokens = torch.randint(case.V, tokens.shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(prior.parameters(), 1e-2)
    losses = []
    for _ in range(300 if case.masked or case.scales else 150):
        loss, metrics = prior.loss(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics.get("nats", loss).item())                 # of a loss with label smoothing the part without
    share = torch.bincount(tokens.flatten()) / tokens.numel()
    unigram = -(share * share.clamp(min=1e-9).log()).sum().item()
    last = sum(losses[-20:]) / 20 if case.masked else losses[-1]        # masks are drawn: the loss jumps
    assert last < 0.4 * unigram, f"{last:.3f} nats per token at the end; a model without context: {unigram:.3f}"


def test_learning_rate_rises_then_falls_to_zero(case):
    """Planted: cosine without its 1/2; warm-up that starts at zero."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    rates = []
    for step in range(100):
        case.module.set_lr(optimizer, 1.0, step, 10, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert 0 < rates[0] <= 0.1 and max(rates) == pytest.approx(1) and rates.index(max(rates)) in (9, 10)
    assert rates[55] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_average_of_weights_follows_the_model(case):
    """Planted: decay and 1 - decay exchanged."""
    if not hasattr(case.module, "update_ema"):
        pytest.skip("no averaged weights in this paper")
    _, prior = case.build()
    _, ema = case.build(seed=1)
    start, target = next(ema.parameters()).clone(), next(prior.parameters())
    case.module.update_ema(ema, prior, 10**6, 0.9)
    torch.testing.assert_close(next(ema.parameters()).data, 0.9 * start + 0.1 * target.data)
    case.module.update_ema(ema, prior, 0, 0.9)                          # the first step: 0.1 old, 0.9 new
    torch.testing.assert_close(next(ema.parameters()).data, 0.1 * (0.9 * start + 0.1 * target.data) + 0.9 * target.data)
