"""What is true of pixelcnn.py alone: masks, receptive fields, a likelihood that is one, the quantizer."""
import itertools

import pytest
import torch

import pixelcnn
from pixelcnn import Config, GatedPixelCNN, PixelCNN, Tokenizer, build_prior, build_tokenizer, causal_mask, sample


def visible(net, in_channels, size, output):
    """(H, W) bool: which input pixels the output pixel depends on, any channel, by gradient in float64."""
    net = net.double()
    for p in net.parameters():
        p.data.abs_().mul_(0.3)                                         # positive: no path is cut by a ReLU or cancels another
    x = torch.rand(1, in_channels, size, size, dtype=torch.float64, requires_grad=True)
    net(x)[0, :, output[0], output[1]].sum().backward()
    return x.grad[0].abs().sum(0) > 0


@pytest.mark.parametrize("blocks, seen", [(1, 39), (3, 78), (7, 192), (15, 450), (30, 450)])
def test_pixelcnn_has_the_papers_blind_spot(blocks, seen):
    """Of 528 predecessors of (16, 16) in 32 x 32 (counts of the fact sheet). Planted: an unmasked pixel to the right."""
    field = visible(PixelCNN(1, 4, blocks, 3, 4, 1), 1, 32, (16, 16))
    before = torch.arange(32 * 32).view(32, 32) < 16 * 32 + 16
    assert not (field & ~before).any() and int(field.sum()) == seen


@pytest.mark.parametrize("output", [(4, 4), (7, 7), (3, 0), (0, 5)])
def test_gated_pixelcnn_sees_all_predecessors(output):
    """Planted: vertical map moved down one row too many (a blind row); A twice (the left neighbour is lost)."""
    field = visible(GatedPixelCNN(1, 4, 6, 3, 4, 1), 1, 8, output)
    before = torch.arange(64).view(8, 8) < output[0] * 8 + output[1]
    assert torch.equal(field, before)


@pytest.mark.parametrize("net", [PixelCNN(3, 18, 2, 3, 30, 3, 3), GatedPixelCNN(3, 18, 2, 3, 30, 3, 3)], ids=["plain", "gated"])
def test_colours_of_a_pixel_see_each_other_in_order(net):
    """R sees none of its pixel, G sees R, B sees R and G. Planted: colour groups that the gate's chunk mixes; A twice."""
    for p in net.double().parameters():
        p.data.abs_().mul_(0.3)                                         # as above
    x = torch.rand(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    for colour in range(3):
        x.grad = None
        net(x)[0, colour, 2, 2].backward()
        assert (x.grad[0, :, 2, 2] != 0).tolist() == [i < colour for i in range(3)]
        assert (x.grad[0, :, 2, 1] != 0).all() and (x.grad[0, :, 1, 2] != 0).all()


def test_hidden_weights_get_no_gradient():
    """Planted: the mask written into weight.data instead of multiplied in the graph."""
    conv = pixelcnn.MaskedConv2d("A", 3, 6, (5, 5), 3)
    conv(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert (conv.weight.grad[conv.mask == 0] == 0).all() and (conv.weight.grad[conv.mask == 1] != 0).all()


def test_block_with_zeroed_last_layer_is_the_identity():
    """Finds the doubled skip x + (x + f(x)). Planted: x + x + f(x)."""
    block, x = pixelcnn.ResidualBlock(4, 3, 1), torch.randn(1, 8, 6, 6)
    torch.nn.init.zeros_(block.net[5].weight)
    torch.nn.init.zeros_(block.net[5].bias)
    assert torch.equal(block(x), x)


TOYS = {   # 2 x 2 images small enough to list them all
    "gated, 3 levels": Config(image_size=2, colours=1, levels=3, layers=2, width=4, head=4, num_classes=2),
    "plain, 3 levels": Config(image_size=2, colours=1, levels=3, model="pixelcnn", layers=2, width=4, head=4, num_classes=0),
    "logistic, binary colours": Config(image_size=2, colours=3, levels=2, likelihood="logistic", mixtures=2, layers=1, width=3, head=3,
                                       num_classes=0),
    "logistic, 3 levels": Config(image_size=2, colours=1, levels=3, likelihood="logistic", mixtures=2, layers=1, width=3, head=3,
                                 num_classes=0),
    "plain, binary colours": Config(image_size=2, colours=3, levels=2, model="pixelcnn", layers=1, width=3, head=3, num_classes=0),
}


def toy(name):
    config = TOYS[name]
    torch.manual_seed(1)
    prior = build_prior(config).double()
    for p in prior.parameters():
        p.data *= 2                                                     # far from uniform, so that a mistake shows
    tokens = torch.tensor(list(itertools.product(range(config.levels), repeat=4 * config.colours)))
    labels = torch.full((len(tokens),), min(1, config.num_classes))
    with torch.no_grad():
        logits = prior(tokens, labels)
        log_p = (-pixelcnn.logistic_nll(logits, prior.values(tokens).unflatten(1, (4, config.colours)), config.levels) if prior.logistic
                 else logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0])
    return config, prior, tokens, log_p.sum(1).exp()


@pytest.mark.parametrize("name", TOYS)
def test_probabilities_of_all_images_sum_to_one(name):
    """Planted: any leak of a pixel to itself; the loss divided by the wrong count."""
    config, prior, tokens, p = toy(name)
    assert p.sum().item() == pytest.approx(1, abs=1e-9) and p.max() > 1.5 / len(p)
    labels = torch.full((len(tokens),), min(1, config.num_classes))
    loss, metrics = prior.loss(tokens, labels)
    assert loss.item() == pytest.approx(-p.log().mean().item() / tokens.shape[1])
    assert metrics["nats_per_image"].item() == pytest.approx(-p.log().mean().item())


@pytest.mark.parametrize("name", TOYS)
def test_sampled_frequencies_are_the_probabilities(name):
    """Chi-square over all images, 20,000 draws, fixed seed. Planted: argmax of half the draws; temperature 0.9."""
    config, prior, tokens, p = toy(name)
    trace, draws = [], 20_000
    labels = torch.full((draws,), min(1, config.num_classes))
    sample(build_tokenizer(config), prior, labels, generator=torch.Generator().manual_seed(0), trace=trace)
    powers = config.levels ** torch.arange(tokens.shape[1]).flip(0)
    count = torch.bincount((trace[-1]["tokens"] * powers).sum(1), minlength=len(p)).double()
    rare = p * draws < 5                                                # pooled, as the test's approximation asks
    pool = lambda a: torch.cat([a[~rare], a[rare].sum()[None]]) if rare.any() else a
    count, expected = pool(count), pool(p * draws)
    chi2, freedom = ((count - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5, f"chi-square {chi2:.0f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("levels", [2, 3, 8, 100, 255, 256])
def test_quantizer_is_uniform_and_stable(levels):
    """Equal bins of the 256 bytes, and encode(decode(token)) = token. Planted: round() instead of equal bins."""
    tokenizer = Tokenizer(levels, 1, 16)
    every_byte = (torch.arange(256).view(1, 1, 16, 16) / 127.5 - 1).expand(-1, 3, -1, -1)
    tokens = tokenizer.encode(every_byte)
    count = torch.bincount(tokens.flatten(), minlength=levels)
    assert count.max() - count.min() <= 1 and len(count) == levels and (tokens.diff() >= 0).all()
    assert torch.equal(tokenizer.encode(tokenizer.decode(tokens)), tokens)
    if levels == 256:
        torch.testing.assert_close(tokenizer.decode(tokens), every_byte, atol=1e-6, rtol=0)


def test_binarisation_draws_each_pixel_by_its_intensity():
    """Planted: threshold in place of the draw; a draw without the generator."""
    tokenizer = Tokenizer(2, 1, 100)
    images = torch.full((1, 3, 100, 100), 0.4)                           # intensity 0.7
    draw = lambda seed: tokenizer.encode(images, torch.Generator().manual_seed(seed))
    assert draw(0).float().mean() == pytest.approx(0.7, abs=0.02)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_token_order_is_raster_then_colours():
    """Planted: planes before pixels."""
    images = torch.full((1, 3, 2, 2), -1.0)
    images[0, 2, 0, 1] = 1                                              # blue of the second pixel
    assert Tokenizer(256, 3, 2).encode(images).tolist() == [[0, 0, 0, 0, 0, 255] + 6 * [0]]


def test_spatial_map_reaches_every_position_through_unmasked_1x1s():
    """The map at a pixel reaches the logits there and below, in every colour, without a class vector. Planted: masked V."""
    config = Config(image_size=5, levels=3, layers=2, width=6, head=6, num_classes=0)
    torch.manual_seed(0)
    prior, tokens = pixelcnn.Prior(config, map_channels=2), torch.randint(3, (1, 75))
    spatial = torch.randn(1, 2, 5, 5, requires_grad=True)
    logits = prior(tokens, None, spatial)
    logits[0, 3 * 12:3 * 13].sum().backward()                           # all colours of pixel (2, 2)
    assert (spatial.grad[0, :, 2, 2] != 0).all() and (spatial.grad[0, :, 3:] == 0).all()
    images = sample(build_tokenizer(config), prior, torch.zeros(1, dtype=torch.long), spatial=spatial, generator=torch.Generator().manual_seed(0))
    assert images.isfinite().all()


def test_class_vector_may_be_any_vector():
    """A one-hot float vector gives what its label gives. Planted: argmax of the vector."""
    config = Config(image_size=4, levels=3, layers=2, width=6, head=6, num_classes=4)
    torch.manual_seed(0)
    prior, tokens = build_prior(config), torch.randint(3, (2, 48))
    one_hot = torch.eye(4)[[1, 3]]
    torch.testing.assert_close(prior(tokens, one_hot), prior(tokens, torch.tensor([1, 3])))
    assert not torch.allclose(prior(tokens, 0.5 * one_hot), prior(tokens, one_hot))


def test_masks_show_what_the_table_of_the_paper_shows():
    """Planted: < and <= exchanged."""
    assert causal_mask("A", 3, 3, (3, 3), 3)[:, :, 1, 1].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert causal_mask("B", 3, 3, (3, 3), 3)[:, :, 1, 1].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask("A", 1, 1, (3, 3))[0, 0].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert causal_mask("above", 1, 1, (3, 3))[0, 0].tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert causal_mask("row", 1, 1, (3, 3))[0, 0].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("condition, known", [(c, n) for c in ("class", "map", "none", "plain") for n in (0, 30, 41)] +
                         [("logistic", 0), ("logistic", 33)])
def test_fast_sampler_draws_what_the_plain_one_draws(condition, known):
    """The same pixels for the same generator, in float64, with and without given tokens. Planted: as test_models says."""
    config = Config(image_size=5, levels=3, layers=3, width=6, head=12, model="pixelcnn" if condition == "plain" else "gated",
                    likelihood="logistic" if condition == "logistic" else "softmax",
                    num_classes=4 if condition == "class" else 0)
    torch.manual_seed(0)
    tokenizer, prior = build_tokenizer(config), pixelcnn.Prior(config, 2 if condition == "map" else 0).double()
    for p in prior.parameters():
        p.data *= 2
    arguments = dict(labels=torch.tensor([0, 3, 1]) % (config.num_classes + 1), known=torch.randint(3, (3, known)) if known else None,
                     spatial=torch.randn(3, 2, 5, 5, dtype=torch.float64) if condition == "map" else None)
    fast, plain = (draw(tokenizer, prior, generator=torch.Generator().manual_seed(7), **arguments) for draw in (sample, pixelcnn.sample_plain))
    assert torch.equal(fast, plain) and len(fast.unique()) == 3
    assert all(module.seen is None for module in prior.modules() if isinstance(module, pixelcnn.MaskedConv2d))


def test_logistic_draws_repeat_through_the_fast_sampler():
    """Given tokens are kept, pixels are drawn whole, and the trace's parameters are those of one full pass."""
    config = Config(image_size=5, levels=256, likelihood="logistic", mixtures=3, layers=2, width=6, head=12, num_classes=0)
    torch.manual_seed(0)
    tokenizer, prior, trace = build_tokenizer(config), build_prior(config).double(), []
    known = torch.randint(256, (2, 33))
    sample(tokenizer, prior, torch.zeros(2, dtype=torch.long), known=known, generator=torch.Generator().manual_seed(0), trace=trace)
    tokens = trace[-1]["tokens"]
    assert torch.equal(tokens[:, :33], known) and len(trace) == 25 - 11 and tokens[:, 33:].float().std() > 10
    torch.testing.assert_close(torch.stack([step["logits"] for step in trace], 1), prior(tokens)[:, 11:])
    with pytest.raises(pixelcnn.UserError, match="inside a pixel"):
        sample(tokenizer, prior, torch.zeros(2, dtype=torch.long), known=known[:, :32])
    with pytest.raises(pixelcnn.UserError, match="temperature"):
        sample(tokenizer, prior, torch.zeros(2, dtype=torch.long), temperature=0.5)


def test_shapes_and_dtypes_are_those_of_the_docstrings(tmp_path):
    """Every public call whose docstring gives a shape. Planted: psnr averaged over the batch."""
    B, S, p, M, K = 2, 5, 6, 2, 3
    config = Config(image_size=S, levels=3, layers=2, width=p, head=12, num_classes=4, train_images=9, test_images=3)
    prior, image, spatial = pixelcnn.Prior(config, M), torch.zeros(B, 3, S, S), torch.zeros(B, M, S, S)
    classes, layer = torch.eye(4)[:B], prior.net.layers[1]
    maps = torch.zeros(B, p, S, S)
    assert [tuple(a.shape) for a in layer(maps, maps)] == [(B, p, S, S)] * 2
    assert layer.bias(classes).shape == (B, 2 * p, 1, 1) and layer.bias(classes, spatial).shape == (B, 2 * p, S, S)
    assert pixelcnn.gate(torch.zeros(B, 2 * p, S, S)).shape == (B, p, S, S)
    assert pixelcnn.ResidualBlock(p, 3, 3)(torch.zeros(B, 2 * p, S, S)).shape == (B, 2 * p, S, S)
    assert PixelCNN(3, p, 2, 3, 12, 9, 3)(image).shape == (B, 9, S, S) and prior.net(image, classes, spatial).shape == (B, 9, S, S)
    with torch.no_grad(), pixelcnn.incremental(prior.net, image) as (at, inside):
        assert inside.shape == image.shape and at == [0, 0]
        links = prior.net.start_row(inside, 0, classes, spatial)
        assert [tuple(link.shape) for link in links] == [(B, 2 * p, 1, S)] * 2
        assert prior.net.pixel(inside, 0, 0, links).shape == (B, 9, 1, 1)
    tokens = prior.draw(torch.zeros(B, 3))
    assert tokens.shape == (B, 1) and tokens.dtype == torch.int64
    logistic = build_prior(Config(image_size=S, likelihood="logistic", mixtures=K, layers=2, width=p, head=12, num_classes=0))
    out = logistic(torch.zeros(B, 75, dtype=torch.long))
    assert out.shape == (B, 25, 10 * K) and logistic.draw(out[:, 0]).shape == (B, 3)
    logits, *rest = pixelcnn.logistic_parameters(out, 3)
    assert logits.shape == (B, 25, K) and [tuple(a.shape) for a in rest] == [(B, 25, 3, K)] * 3
    assert pixelcnn.logistic_nll(out, torch.zeros(B, 25, 3)).shape == (B, 25)
    x, component = pixelcnn.logistic_draw(out, torch.full((B, 25, K), 0.5), torch.full((B, 25, 3), 0.5))
    assert x.shape == (B, 25, 3) and component.shape == (B, 25)
    data = pixelcnn.load_data(Config(image_size=S, train_images=9, test_images=3))
    images, labels = data.batch("train", 4, pixelcnn.rng(0, 0))
    assert data.train[0].dtype == torch.uint8 and data.train[0].shape == (9, 3, S, S) and data.test[1].shape == (3,)
    assert images.shape == (4, 3, S, S) and images.dtype == torch.float32 and -1 <= images.min() and images.max() <= 1
    assert labels.shape == (4,) and labels.dtype == torch.int64
    assert pixelcnn.psnr(images, images).tolist() == [100] * 4
    pixelcnn.save_grid(images, tmp_path / "grid.png", 2)
    read = pixelcnn.read_image(tmp_path / "grid.png", 7)
    assert read.shape == (7, 7, 3) and read.dtype == "uint8" and pixelcnn.to_bytes(images).dtype == torch.uint8
    nats = pixelcnn.likelihood(prior, torch.zeros(5, 75, dtype=torch.long), torch.zeros(5, dtype=torch.long), batch_size=2)
    assert isinstance(nats, float)
