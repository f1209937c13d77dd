"""rqvae.py: residual quantizer, RQ-Transformer, MoVQ, captions, loader. Each test names the planted bug it was seen to catch."""
import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES

import rqvae
from rqvae import MOVQ, RQVAE, Config, RQBottleneck, RQTransformer, UserError, bind, from_official

GOLDEN = Path(__file__).parent / "golden"
TINY = Config(**CASES["rqvae-class"][1])


def test_depths_refine_each_other():
    """Each depth codes what the former left; the sum of codes comes nearer. Planted: the latent searched again at every depth."""
    torch.manual_seed(0)
    q, z = RQBottleneck(64, 4, 4).eval(), torch.randn(2, 4, 3, 3)
    codes = q(z)[1]
    errors = [F.mse_loss(q.lookup(codes[..., :d + 1]), z).item() for d in range(4)]
    assert all(a > b for a, b in zip(errors, errors[1:]))
    r = z.permute(0, 2, 3, 1)
    for d in range(4):
        nearest = (r[..., None, :] - q.weight[:-1]).square().sum(-1).argmin(-1)
        assert torch.equal(nearest, codes[..., d])
        r = r - q.weight[nearest]


def test_commitment_is_a_mean_over_partial_sums():
    """Planted: the last depth alone; a sum."""
    torch.manual_seed(0)
    q, z = RQBottleneck(16, 4, 3).eval(), torch.randn(2, 4, 3, 3)
    _, codes, loss = q(z)
    torch.testing.assert_close(loss, torch.stack([F.mse_loss(z, q.lookup(codes[..., :d + 1])) for d in range(3)]).mean())


def test_padding_row_is_never_chosen_and_never_moves():
    """Planted: the search over all rows (a residual near zero finds the padding)."""
    torch.manual_seed(0)
    q = RQBottleneck(8, 4, 2)
    codes = q(1e-6 * torch.randn(2, 4, 5, 5))[1]
    assert codes.max() < 8 and torch.equal(q.weight[-1], torch.zeros(4))


def test_stochastic_codes_follow_the_soft_labels():
    """Frequencies of the drawn codes; the label of depth d belongs to what the drawn codes left. Planted: labels of the argmin path."""
    torch.manual_seed(0)
    q = RQBottleneck(4, 2, 2).eval()
    z = torch.randn(1, 2, 1, 1).expand(4000, -1, -1, -1)
    soft, codes = q.soft_codes(z, 1.0, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(codes[:, 0, 0, 0], minlength=4) / 4000
    assert (share - soft[0, 0, 0, 0]).abs().max() < 0.03
    r = z[:, :, 0, 0] - q.weight[codes[:, 0, 0, 0]]
    expected = (-(r[:, None] - q.weight[:-1]).square().sum(-1)).softmax(-1)
    torch.testing.assert_close(soft[:, 0, 0, 1], expected)
    hard, nearest = q.soft_codes(z[:1], 1e-6, stochastic=False)
    assert torch.equal(nearest, q(z[:1])[1]) and torch.equal(hard.argmax(-1), nearest)


def test_soft_cross_entropy_of_hard_labels_is_cross_entropy():
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    soft = F.one_hot(target, 7).float()
    torch.testing.assert_close(rqvae.soft_cross_entropy(logits, soft), F.cross_entropy(logits, target, reduction="none"))


def test_causal_in_space_and_in_depth_separately():
    """A code of place t changes later places and later depths of its own place, nothing else. Planted: the head sees the residual codes of all depths."""
    torch.manual_seed(0)
    tokenizer, prior = RQVAE(TINY).eval(), RQTransformer(TINY).eval()
    bind(prior, tokenizer)
    codes = torch.randint(16, (1, prior.places, prior.depth))
    e = F.embedding(codes, prior.codebook)
    with torch.no_grad():
        context, _ = prior.body(e)
        logits = prior.head(context, e)
        t, d = 5, 1
        changed = codes.clone()
        changed[0, t, d] = (changed[0, t, d] + 1) % 16
        e2 = F.embedding(changed, prior.codebook)
        other = prior.body(e2)[0]
        assert torch.equal(other[:, :t + 1], context[:, :t + 1]) and (other[:, t + 1:] != context[:, t + 1:]).any(-1).all()
        head = prior.head(context, e2)                                  # the same contexts: depth alone
        assert torch.equal(head[:, t, :d + 1], logits[:, t, :d + 1]) and (head[:, t, d + 1:] != logits[:, t, d + 1:]).any()
        keep = [i for i in range(prior.places) if i != t]
        assert torch.equal(head[:, keep], logits[:, keep])


def test_guidance_needs_dropped_labels_and_moves_logits():
    torch.manual_seed(0)
    tokenizer, prior = RQVAE(TINY).eval(), RQTransformer(TINY).eval()
    bind(prior, tokenizer)
    traces = {}
    for g in (1.0, 3.0):
        rqvae.sample(tokenizer, prior, torch.tensor([1]), guidance=g, generator=torch.Generator().manual_seed(0), trace=traces.setdefault(g, []))
    plain, guided = (traces[g][0]["logits"] for g in (1.0, 3.0))
    e = F.embedding(torch.zeros(1, prior.places, prior.depth, dtype=torch.long), prior.codebook)
    null = prior.head(prior.body(e, torch.tensor([9]))[0], e)[:, 0, 0]
    torch.testing.assert_close(guided, null + 3 * (plain - null), rtol=1e-4, atol=1e-4)
    prior.config = dataclasses.replace(TINY, label_dropout=0.0, guidance=1.0)
    with pytest.raises(UserError, match="never saw dropped labels"):
        rqvae.sample(tokenizer, prior, torch.tensor([1]), guidance=2.0)


def test_filters_per_depth():
    """Planted: the first depth's filter for all."""
    torch.manual_seed(0)
    tokenizer, prior = RQVAE(TINY).eval(), RQTransformer(TINY).eval()
    bind(prior, tokenizer)
    trace = []
    rqvae.sample(tokenizer, prior, torch.zeros(1, dtype=torch.long), top_k=[0, 1, 0], generator=torch.Generator().manual_seed(0), trace=trace)
    assert all(step["tokens"][0, step["position"]] == step["logits"].argmax() for step in trace[1::3])
    assert any(step["tokens"][0, step["position"]] != step["logits"].argmax() for step in trace[::3])
    with pytest.raises(UserError, match="top_k"):
        rqvae.sample(tokenizer, prior, torch.zeros(1, dtype=torch.long), top_k=17)


def test_another_tokenizers_codebook_is_refused():
    torch.manual_seed(0)
    tokenizer, prior = RQVAE(TINY).eval(), RQTransformer(TINY).eval()
    with pytest.raises(UserError, match="another tokenizer"):
        rqvae.sample(tokenizer, prior, torch.zeros(1, dtype=torch.long))
    with pytest.raises(UserError, match=r"\(3, 16, 8\).*\(3, 32, 8\)"):
        bind(prior, RQVAE(Config(**CASES["rqvae-class"][1] | dict(codebook_size=32))))


def test_captions_say_what_the_pictures_show():
    """Colour, shape, size and place of 200 pictures, measured in the pixels. Planted: y pointing up; another draw for the colour."""
    images, labels = rqvae.draw_shapes(3, range(200), 32)
    captions = rqvae.shape_captions(3, range(200))
    grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")).float()
    sizes = {"small": [], "large": []}
    for image, label, caption in zip(torch.from_numpy(images).float(), labels, captions):
        _, size, colour, shape, _, _, place = caption.split()
        assert shape == rqvae.SHAPES[label]
        weight = (image - torch.tensor([20.0, 20, 30])).abs().sum(-1)
        brightest = image.view(-1, 3)[weight.flatten().argmax()]
        assert (brightest - torch.tensor(rqvae.COLOURS[colour]).float()).abs().max() < 40
        sizes[size].append((weight > 60).sum().item())
        y, x = ((grid * weight).sum((1, 2)) / weight.sum() - 15.5) / 16
        if place != "centre" and max(abs(x), abs(y)) > 0.2 and shape not in ("crescent", "triangle"):
            along, across = (x, y) if place in ("left", "right") else (y, x)
            assert abs(along) > abs(across) - 0.12 and (along > 0) == (place in ("right", "bottom"))
    assert sum(sizes["small"]) / len(sizes["small"]) < 0.8 * sum(sizes["large"]) / len(sizes["large"])
    words = rqvae.read_captions(captions)
    assert words.shape == (200, rqvae.CAPTION_LENGTH) and words.min() > 0


@pytest.mark.parametrize("caption, says", [("", "has 0 words"), ("a huge red star", "'huge'"), ("a small red star at the top top", "8 words")])
def test_captions_that_cannot_be_read(caption, says):
    with pytest.raises(UserError, match=says):
        rqvae.read_captions([caption])


def test_movq_equal_codes_get_equal_modulation():
    """Where z_q is equal, so is what every norm multiplies and adds; elsewhere it is not. Planted: modulation by post_quant_conv(z_q)."""
    torch.manual_seed(0)
    config = Config(image_size=8, ch=32, groups=8, ch_mult=(1, 1), num_classes=0, label_dropout=0.0, guidance=1.0, code_dim=4, z_channels=8,
                    codebook_size=16, disc_weight=0.0)
    net, seen = MOVQ(config).eval(), []
    for module in net.decoder.modules():
        if isinstance(module, rqvae.SpatialNorm):
            module.conv_y.register_forward_hook(lambda m, args, out: seen.append(out))
    codes = torch.tensor([[[1, 2, 1, 2], [3, 3, 3, 3], [1, 1, 2, 2], [0, 0, 0, 0]]])
    net.decode(codes)
    assert len(seen) == sum(isinstance(m, torch.nn.GroupNorm) for m in net.decoder.modules())
    for scale in seen:
        a, same, again, other = (scale[0, :, i, j] for i, j in ((0, 0), (0, 2), (2, 1), (0, 1)))
        assert torch.equal(a, same) and torch.equal(a, again) and not torch.equal(a, other)


LISTS = sorted([*GOLDEN.glob("rqvae_*_release.json.gz"), *GOLDEN.glob("movq_*_release.json.gz")])


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name.removesuffix("_release.json.gz"))
def test_released_checkpoints_map_completely(path):
    """Every name once, equal shapes, the recorded number of parameters. Planted: three depths; attention at another level."""
    release = json.load(gzip.open(path))
    names = {**release["params"], **release["buffers"]}
    state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    if "movq" in path.name:                                             # released files also hold averages and the loss
        state |= {"ema_encoder.x": torch.empty(1), "loss.discriminator.x": torch.empty(1)}
    model = from_official({"state_dict": state})
    assert sum(p.numel() for p in model.parameters()) == release["n_params"]
    ours = {name: list(value.shape) for name, value in model.state_dict().items() if name != "codebook"}
    theirs = {(f"quantizer.{name.split('.')[-1]}" if "codebooks" in name else name): shape for name, shape in names.items()}
    assert ours == theirs
    if isinstance(model, RQTransformer):
        assert model.config.heads * 64 == model.config.width
    if "discriminator" in release:
        disc = rqvae.NLayerDiscriminator(3, 64, 2)
        assert {name: list(value.shape) for name, value in disc.state_dict().items()} == release["discriminator"]["params"] | release["discriminator"]["buffers"]


def test_presets_have_the_released_sizes():
    counts = {"ffhq256": 355_393_536, "imagenet256-480M": 480_921_088, "imagenet256-821M": 820_899_328, "imagenet256-1.4B": 1_387_529_728,
              "imagenet256-3.8B": 3_822_488_064}
    for name, preset in rqvae.PRESETS.items():
        rqvae.check(preset)
        with torch.device("meta"):
            tokenizer, prior = RQVAE(preset), RQTransformer(preset)
        if name in counts:
            assert sum(p.numel() for p in prior.parameters()) == counts[name], name
            assert sum(p.numel() for p in tokenizer.parameters()) == (100_732_035 if name == "ffhq256" else 104_402_051)


@pytest.mark.parametrize("state, says", [
    ({"quantizer.codebooks.0.weight": torch.zeros(5, 2), "quantizer.codebooks.1.weight": torch.zeros(6, 2)}, "differs from the first depth"),
    ({"quantizer.codebooks.0.weight": torch.zeros(5, 2), "quantizer.codebooks.1.weight": torch.ones(5, 2)}, "differs from the first depth"),
    ({f"layers.{i}.weight": torch.zeros(2) for i in range(7)}, "layers.0.weight"),
    ({"classifier.linear.weight": torch.zeros(3)}, "no model of these papers")])
def test_odd_weights_get_one_line(state, says):
    with pytest.raises(UserError, match=says) as error:
        from_official(state)
    assert "\n" not in str(error.value)


def test_weights_in_half_precision_load():
    """Planted: weights kept in the dtype of the file."""
    state = {f"quantizer.codebooks.{d}.weight": torch.ones(5, 2, dtype=torch.float16) for d in range(2)}
    found, depth = rqvae.our_names(state)
    assert depth == 2 and found["quantizer.weight"].dtype == torch.float32


def test_shapes_and_dtypes_are_those_of_the_docstrings():
    """Every public call whose docstring gives a shape. Planted: lookup without its permute."""
    B, h, D, V, E = 2, 4, 3, 16, 8
    tokenizer, prior = RQVAE(TINY).eval(), RQTransformer(TINY).eval()
    bind(prior, tokenizer)
    images = torch.zeros(B, 3, 8, 8)
    codes, z = tokenizer.encode(images), tokenizer.latents(images)
    assert codes.shape == (B, h, h, D) and codes.dtype == torch.int64 and z.shape == (B, E, h, h)
    z_q, again, loss = tokenizer.quantizer(z)
    assert z_q.shape == z.shape and again.shape == codes.shape and loss.shape == () and tokenizer.quantizer.lookup(codes).shape == z.shape
    soft, drawn = tokenizer.quantizer.soft_codes(z, 1.0)
    assert soft.shape == (B, h, h, D, V) and drawn.shape == codes.shape
    assert tokenizer.decode(codes).shape == tokenizer.decode(codes[..., :1]).shape == images.shape
    e = F.embedding(codes.view(B, -1, D), prior.codebook)
    context, read = prior.body(e, torch.zeros(B, dtype=torch.long))
    assert context.shape == (B, h * h, TINY.width) and read.shape == (B, 0, TINY.width) and prior.head(context, e).shape == (B, h * h, D, V)
    assert prior(codes).shape == (B, h * h * D, V) and prior(codes).dtype == torch.float32
    assert prior.condition(None, B).shape == (B, 1, TINY.width) and prior.place_inputs(e).shape == context.shape
    assert rqvae.sample(tokenizer, prior, torch.zeros(B, dtype=torch.long)).shape == images.shape
    assert rqvae.encode_all(tokenizer, torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "cpu", latents=True).shape == (3, E, h, h)
    assert rqvae.filtered(torch.zeros(B, V)).shape == (B, V)


def test_lpips_weights_of_a_released_vqgan(tmp_path):
    """Planted: a reader of weights that drops the names of losses."""
    given, taken = rqvae.LPIPS(), rqvae.LPIPS()
    torch.save({"state_dict": {f"loss.perceptual_loss.{name}": value for name, value in given.state_dict().items()}}, tmp_path / "last.ckpt")
    rqvae.load_lpips(taken, dataclasses.replace(TINY, lpips=str(tmp_path / "last.ckpt")))
    assert all(torch.equal(value, taken.state_dict()[name]) for name, value in given.state_dict().items())


def test_captions_are_shortened_to_captions():
    """Each part goes in three of ten; what is left is a caption, padded behind. Planted: [pad] in the middle."""
    words = rqvae.read_captions(["a small red star at the top"] * 2000)
    short = rqvae.shorten(words, torch.Generator().manual_seed(0))
    texts = [" ".join(rqvae.WORDS[w] for w in row if w) for row in short.tolist()]
    assert torch.equal(short, rqvae.read_captions(texts))
    assert set(texts) == {" ".join(filter(None, ("a", size, colour, "star", place)))
                          for size in ("small", "") for colour in ("red", "") for place in ("at the top", "")}
    for word in ("small", "red", "top"):
        assert abs(sum(word in text for text in texts) / 2000 - 0.7) < 0.05


def test_known_codes_out_of_range_get_one_line():
    tokenizer, prior = RQVAE(TINY).eval(), RQTransformer(TINY).eval()
    bind(prior, tokenizer)
    for known in (torch.zeros(1, 49, dtype=torch.long), torch.full((1, 2), 16), torch.full((1, 2), -1)):
        with pytest.raises(UserError, match="known: at most 48 codes, each from 0 to 15"):
            rqvae.sample(tokenizer, prior, torch.zeros(1, dtype=torch.long), known=known)
