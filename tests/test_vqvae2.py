"""vqvae2.py: quantizer, levels, priors, loader. Each test names the planted bug it was seen to catch."""
import argparse
import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CASES

import vqvae2
from vqvae2 import VQVAE, Config, PixelSNAIL, Prior, Quantizer, UserError, from_official, split

GOLDEN = Path(__file__).parent / "golden"
TINY = Config(**CASES["vqvae2-two"][1])
THREE = Config(**CASES["vqvae2-three"][1])


def latents(B=4, E=4, side=6, seed=0):
    return torch.randn(B, E, side, side, generator=torch.Generator().manual_seed(seed))


def test_both_terms_of_the_codebook_loss():
    """VQ-VAE eq. 3 by gradient: 1 for the codes, beta for the latents; running means: beta for the latents alone. Planted: beta exchanged."""
    z = latents().requires_grad_()
    for codebook, on_codes in (("gradient", 1.0), ("ema", 0.0)):
        q = Quantizer(8, 4, codebook, beta=0.3).eval()                  # the codebook stays
        z.grad, (_, indices, loss) = None, q(z)
        loss.backward()
        e = q.lookup(indices).detach()
        torch.testing.assert_close(z.grad, 0.3 * 2 * (z - e).detach() / z.numel())
        torch.testing.assert_close(loss.detach(), (0.3 + on_codes) * (z - e).square().mean().detach())
        if codebook == "gradient":
            expected = torch.zeros(8, 4).index_add_(0, indices.flatten(), (2 * (e - z) / z.numel()).permute(0, 2, 3, 1).reshape(-1, 4).detach())
            torch.testing.assert_close(q.embed.grad, expected)
        else:
            assert not list(q.parameters())


def test_gradient_passes_straight_through():
    """Planted: gradient through z_q alone (none arrives)."""
    z = latents().requires_grad_()
    out = Quantizer(8, 4).eval()(z)[0]
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


@pytest.mark.parametrize("codebook", ["ema", "release", "debiased"])
def test_means_follow_the_paper(codebook):
    """One step, code by code, in plain Python. Planted: mean in place of sum; decay on the code; update before lookup."""
    torch.manual_seed(0)
    q, z = Quantizer(8, 4, codebook, decay=0.9), latents()
    q.embed[7] += 100                                                   # a code that nothing will choose
    if codebook != "debiased":
        q.embed_avg.copy_(q.embed)
    before = q.embed.clone()
    out, indices, _ = q(z)
    torch.testing.assert_close(out, before[indices].permute(0, 3, 1, 2))
    flat, chosen = z.permute(0, 2, 3, 1).reshape(-1, 4), indices.flatten()
    n0 = 1.0 if codebook == "ema" else 0.0
    n = [0.9 * n0 + 0.1 * int((chosen == k).sum()) for k in range(8)]
    m = [0.9 * (before[k] if codebook != "debiased" else 0) + 0.1 * flat[chosen == k].sum(0) for k in range(8)]
    if codebook == "debiased":
        n, m = [value / 0.1 for value in n], [value / 0.1 for value in m]
    total = sum(n)
    expected = torch.stack([m[k] / ((n[k] + 1e-5) / (total + 8e-5) * total) for k in range(8)])
    torch.testing.assert_close(q.embed, expected, rtol=1e-4, atol=1e-5)
    unused = [k for k in range(8) if not (chosen == k).any()]
    assert unused, "the test needs an unused code"
    jump = (q.embed[unused].norm(dim=1) / before[unused].norm(dim=1)).max()
    assert jump < 1.1 if codebook == "ema" else jump == 0 if codebook == "debiased" else jump > 1e4


def test_evaluation_moves_no_code():
    """Planted: no look at self.training (extraction would train the codebook)."""
    q = Quantizer(8, 4, restart=1).eval()
    before = {name: value.clone() for name, value in q.state_dict().items()}
    q(latents())
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())


def test_unused_codes_start_anew():
    """At latents of the first batch, then whenever idle for so long. Planted: idle never reset; means left behind (the code would jump back)."""
    torch.manual_seed(0)
    q = Quantizer(16, 4, decay=0.9, restart=3)

    def away():
        q.embed[5:] += 100
        q.embed_avg.copy_(q.embed * q.cluster_size[:, None])

    def step(seed):
        q(latents(seed=seed), torch.Generator().manual_seed(seed))
        fresh = {tuple(row) for row in latents(seed=seed).permute(0, 2, 3, 1).reshape(-1, 4).tolist()}
        return [tuple(row) in fresh for row in q.embed[5:].tolist()]
    away()
    assert all(step(0)) and (q.idle[5:] == 0).all()
    assert torch.equal(q.embed_avg[5:], q.embed[5:]) and (q.cluster_size[5:] == 1).all()
    away()
    assert not any(step(1)) and not any(step(2)) and all(step(3))


@pytest.mark.parametrize("config", [TINY, THREE], ids=["two", "three"])
def test_levels_know_each_other_and_all_reach_the_image(config):
    """Finer codes depend on the coarser ones; every level moves the decoded image. Planted: concatenation of h twice; a level left out."""
    torch.manual_seed(0)
    net = VQVAE(config).eval()
    images = torch.randn(2, 3, 16, 32)
    codes = net.codes(images)
    assert [tuple(c.shape[1:]) for c in codes] == [(16 // s, 32 // s) for s in (16, 8, 4)[-config.levels:]]
    decoded = net.decode(codes)
    torch.testing.assert_close(net(images)[0], decoded)
    for level in range(config.levels):
        changed = [c.clone() for c in codes]
        changed[level][:, 0, 0] = (changed[level][:, 0, 0] + 1) % 16
        assert not torch.equal(net.decode(changed), decoded)
    features = []
    hook = net.quantize_conv[-1].register_forward_hook(lambda *_: features.append(_[2]))
    net(images)
    net.quantize[0].embed.add_(1.0)
    net(images)
    hook.remove()
    assert not torch.equal(*features)


def test_inplace_relu_is_another_function():
    """Same names and shapes, other numbers: that is what makes it silent. Planted: the flag not passed on."""
    torch.manual_seed(0)
    plain = VQVAE(TINY).eval()
    quirk = VQVAE(dataclasses.replace(TINY, inplace_relu=True)).eval()
    quirk.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(plain.encoders[1](images), quirk.encoders[1](images))
    block = quirk.encoders[1][5]
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x), x.relu() + block.conv(x))


def test_bottom_sees_the_whole_top_and_only_earlier_bottom():
    """Every top code reaches some bottom logit near it, no bottom code a top logit; classes reach both. Planted: condition left out of the blocks."""
    torch.manual_seed(0)
    prior = Prior(TINY).eval()
    tokens = torch.randint(16, (1, 20))
    with torch.no_grad():
        before = prior(tokens, torch.tensor([1]))
        for t in range(4):
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + 1) % 16
            after = prior(changed, torch.tensor([1]))
            i, j = divmod(t, 2)
            block = (after != before)[0, 4:].any(-1).view(4, 4)[2 * i:2 * i + 2, 2 * j:2 * j + 2]
            assert block.all(), "a top code does not reach the four codes below it"
        changed = tokens.clone()
        changed[0, 4:] = (changed[0, 4:] + 1) % 16
        assert torch.equal(prior(changed, torch.tensor([1]))[:, :4], before[:, :4])
        other = prior(tokens, torch.tensor([2])) != before
        assert other[:, :4].any() and other[:, 4:].any()


def test_attention_closes_the_blind_spot():
    """Without attention some predecessors are never seen (the golden file counts 126 of 136); with it all but row ends are. Planted: no mask."""
    def seen(heads):
        torch.manual_seed(0)
        net = PixelSNAIL(8, 5, 8, 3, 1, 1, 8, heads).eval()
        codes = torch.randint(5, (1, 8, 8))
        at, found = (6, 3), torch.zeros(8, 8, dtype=torch.bool)
        with torch.no_grad():
            before = net(codes)[0, :, at[0], at[1]]
            for i in range(8):
                for j in range(8):
                    changed = codes.clone()
                    changed[0, i, j] = (changed[0, i, j] + 1) % 5
                    found[i, j] = not torch.equal(net(changed)[0, :, at[0], at[1]], before)
        return found
    past = torch.arange(64).view(8, 8) < 6 * 8 + 3
    assert not seen(0)[~past].any() and not seen(2)[~past].any()
    assert seen(2).sum() > seen(0).sum()


def test_code_convolution_is_that_of_one_hot_codes():
    """Planted: taps in another order; the border's row missing."""
    torch.manual_seed(0)
    conv = vqvae2.CodeConv2d(6, 8, (3, 2), (1, 0, 2, 0)).double()
    codes = torch.randint(6, (2, 5, 7))
    one_hot = F.pad(F.one_hot(codes, 6).permute(0, 3, 1, 2).double(), conv.pad)
    torch.testing.assert_close(conv(codes), F.conv2d(one_hot, conv.weight(), conv.bias))


@pytest.mark.parametrize("config", [TINY, THREE], ids=["two", "three"])
def test_incremental_sampler_draws_the_tokens_of_the_plain_one(config):
    """Full passes for every token, the same generator, float64. Planted: a cache that is one row behind."""
    torch.manual_seed(0)
    tokenizer, prior, labels = VQVAE(config).eval().double(), Prior(config).eval().double(), torch.tensor([3, 9])
    generator, trace = torch.Generator().manual_seed(5), []
    N = sum(side ** 2 for side in config.sides)
    plain = torch.zeros(2, N, dtype=torch.long)
    with torch.no_grad():
        for n in range(N):
            plain[:, n] = torch.multinomial((prior(plain, labels)[:, n] / 0.8).softmax(-1), 1, generator=generator)[:, 0]
    images = vqvae2.sample(tokenizer, prior, labels, temperature=0.8, generator=torch.Generator().manual_seed(5), trace=trace)
    assert torch.equal(trace[-1]["tokens"], plain) and torch.equal(images, tokenizer.decode(plain).clamp(-1, 1))


def test_kept_tokens_anywhere():
    """Negative tokens are drawn, all others kept: half of each level, as `complete` asks. Planted: known tokens not clamped."""
    torch.manual_seed(0)
    tokenizer, prior = VQVAE(TINY).eval(), Prior(TINY).eval()
    known = torch.randint(16, (2, 20))
    known[:, 2:4], known[:, 12:] = -1, -1
    trace = []
    vqvae2.sample(tokenizer, prior, torch.zeros(2, dtype=torch.long), known=known, generator=torch.Generator().manual_seed(0), trace=trace)
    tokens = trace[-1]["tokens"]
    assert torch.equal(tokens[known >= 0], known[known >= 0]) and tokens.min() >= 0
    assert [step["position"] for step in trace] == [2, 3, *range(12, 20)]
    known[0, :2] = -1                                                   # one row's own: the other's are kept
    vqvae2.sample(tokenizer, prior, torch.zeros(2, dtype=torch.long), known=known, generator=torch.Generator().manual_seed(0), trace=trace)
    assert torch.equal(trace[-1]["tokens"][known >= 0], known[known >= 0])


def test_sampler_leaves_nothing_behind():
    """After sampling the prior computes as before, also if a draw fails. Planted: no finally."""
    torch.manual_seed(0)
    tokenizer, prior = VQVAE(TINY).eval(), Prior(TINY).eval()
    tokens = torch.randint(16, (1, 20))
    before = prior(tokens)
    with pytest.raises(RuntimeError):
        vqvae2.sample(tokenizer, prior, torch.zeros(1, dtype=torch.long), temperature=float("nan"))
    assert torch.equal(prior(tokens), before)


def test_levels_learn_as_if_alone():
    """The gradient of each level is that of its own likelihood. Planted: a condition that feels gradients of the finer level."""
    torch.manual_seed(0)
    prior, tokens, labels = Prior(TINY), torch.randint(16, (2, 20)), torch.tensor([0, 1])
    prior.loss(tokens, labels)[0].backward()
    got = [p.grad.clone() for p in prior.levels[0].parameters()]
    prior.zero_grad()
    (prior.loss(tokens, labels)[1]["nats_0"] * 4 / 20).backward()
    for a, p in zip(got, prior.levels[0].parameters()):
        torch.testing.assert_close(a, p.grad)


LISTS = sorted(GOLDEN.glob("vqvae2_*_release.json.gz"))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name.removeprefix("vqvae2_").removesuffix("_release.json.gz"))
def test_released_checkpoints_map_completely(path, wrapped):
    """Every name once, equal shapes, the recorded number of parameters. Planted: no conditions; a renamed stack."""
    release = json.load(gzip.open(path))
    names = {**release["params"], **release["buffers"]}
    state = {("module." if wrapped else "") + name: torch.empty(shape, device="meta") for name, shape in names.items()}
    model = from_official({"model": state} if wrapped else state)
    ours = dict(model.named_parameters())
    assert sum(p.numel() for p in ours.values()) == release["n_params"]
    assert len(model.state_dict()) == len(names) and {vqvae2.our_name(name) for name in names} == set(model.state_dict())
    assert sum(v.numel() for v in model.state_dict().values()) == sum(torch.Size(shape).numel() for shape in names.values())


def official_names(net):
    """A two-level VQVAE's state dict as the release names and turns it."""
    inverse = {"encoders.0": "enc_t.blocks", "encoders.1": "enc_b.blocks", "decoders.0": "dec_t.blocks", "decoders.1": "dec.blocks",
               "quantize_conv.0": "quantize_conv_t", "quantize_conv.1": "quantize_conv_b", "quantize.0": "quantize_t", "quantize.1": "quantize_b",
               "upsample.0": "upsample_t"}
    state = {}
    for name, value in net.state_dict().items():
        old = next(old for old in inverse if name.startswith(old + "."))
        state[inverse[old] + name[len(old):]] = value.T if ".embed" in name else value
    return state


def test_loaded_weights_are_those_of_the_file(tmp_path):
    """A file as train_pixelsnail.py writes it, arguments included. Planted: codebook not transposed."""
    torch.manual_seed(0)
    net = VQVAE(dataclasses.replace(TINY, codebook="release", restart=0))
    state = official_names(net)
    torch.save({"model": state, "args": argparse.Namespace(channel=8)}, tmp_path / "vqvae.pt")
    model = from_official(tmp_path / "vqvae.pt")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in model.state_dict().items()) and not model.training
    assert model.config.inplace_relu and not from_official(tmp_path / "vqvae.pt", inplace_relu=False).config.inplace_relu
    with pytest.raises(UserError, match="1 names or shapes"):
        from_official(state | {"dec.blocks.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("state, says", [
    ({"quantize_t.embed": torch.zeros(3)}, "no model of this paper"),
    ({"horizontal.conv.conv.weight_v": torch.zeros(8, 0, 2, 5), "background": torch.zeros(1, 2, 4, 4)}, "no model of this paper"),
    ({"horizontal.conv.conv.weight_v": torch.zeros(8, 4, 2, 5), "background": torch.zeros(2)}, "no model of this paper")])
def test_odd_weights_get_one_line(state, says):
    with pytest.raises(UserError, match=says):
        from_official(state)


def test_two_losses_in_one_backward():
    """Planted: hidden weights zeroed under no_grad (the second pass then invalidates the first one's graph)."""
    torch.manual_seed(0)
    prior, tokens = Prior(TINY), torch.randint(16, (2, 20))
    (prior.loss(tokens)[0] + prior.loss(tokens)[0]).backward()


def test_first_rows_alone_with_a_condition():
    torch.manual_seed(0)
    net, codes = Prior(TINY).eval().levels[1], torch.randint(16, (1, 4, 4))
    condition = net.condition([torch.randint(16, (1, 2, 2))])
    torch.testing.assert_close(net(codes[:, :3], condition), net(codes, condition)[:, :, :3])


def test_loading_leaves_the_callers_tensors_alone():
    """Planted: tensors taken over without a copy (training then moves the caller's)."""
    net = VQVAE(dataclasses.replace(TINY, codebook="release", restart=0))
    state = official_names(net)
    before = {name: value.clone() for name, value in state.items()}
    from_official(state).train()(torch.randn(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_prior_without_its_background_needs_the_side():
    with pytest.raises(UserError, match="shape"):
        from_official({"horizontal.conv.conv.weight_v": torch.zeros(8, 4, 2, 5)})


def test_reconstructs_with_a_released_tokenizer(tmp_path, monkeypatch, fails):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    release = json.load(gzip.open(GOLDEN / "vqvae2_tokenizer_release.json.gz"))
    torch.manual_seed(0)
    torch.save({name: torch.randn(shape) * 0.05 for name, shape in {**release["params"], **release["buffers"]}.items()}, "vqvae_560.pt")
    Image.new("RGB", (300, 260), (200, 30, 30)).save("photo.png")
    vqvae2.main(["reconstruct", "--official", "vqvae_560.pt", "photo.png", "--out", "r.png"])
    assert Image.open("r.png").size == (8 * 258, 258)
    fails(vqvae2, "reconstruct", "--official", "vqvae_560.pt", says=["give photos"])
    fails(vqvae2, "reconstruct", says=["--official"])


def test_presets_have_the_papers_sizes():
    """Codes of an image: 1,024 + 4,096 at 256 pixels; 1,024 + 4,096 + 16,384 at 1,024 (with three levels of stride 32, 16, 8 the paper's)."""
    assert [side ** 2 for side in vqvae2.PRESETS["imagenet256"].sides] == [1024, 4096]
    for name, preset in vqvae2.PRESETS.items():
        vqvae2.check(preset)
        with torch.device("meta"):
            tokenizer, prior = VQVAE(preset), Prior(preset)
        assert len(prior.levels) == preset.levels == len(tokenizer.quantize), name


def test_shapes_and_dtypes_are_those_of_the_docstrings():
    """Every public call whose docstring gives a shape. Planted: lookup without its permute."""
    B, V = 2, 16
    tokenizer, prior = VQVAE(TINY).eval(), Prior(TINY).eval()
    images = torch.zeros(B, 3, 16, 16)
    stack, codes, losses = tokenizer.quantized(images)
    assert stack.shape == (B, 2 * TINY.code_dim, 4, 4) and [c.shape for c in codes] == [(B, 2, 2), (B, 4, 4)] and len(losses) == 2
    tokens = tokenizer.encode(images)
    assert tokens.shape == (B, 20) and tokens.dtype == torch.int64 and [m.shape for m in split(tokens, TINY.sides)] == [(B, 2, 2), (B, 4, 4)]
    assert tokenizer.decode(tokens).shape == tokenizer.decode(codes).shape == images.shape
    again, found = tokenizer(images)
    assert again.shape == images.shape and all(value.shape == () for value in found.values()) and {"perplexity_0", "perplexity_1"} < set(found)
    net = prior.levels[1]
    condition = net.condition(codes[:1], torch.zeros(B, dtype=torch.long))
    assert condition.shape == (B, 4, 4, 4) and net(codes[1], condition).shape == (B, V, 4, 4) and net.first(codes[1]).shape == (B, 8, 4, 4)
    assert prior.levels[0].condition((), torch.zeros(B, dtype=torch.long)).shape == (B, 4, 1, 1)
    assert prior(tokens).shape == (B, 20, V) and prior(tokens).dtype == torch.float32
    assert vqvae2.place_map(6).shape == (1, 2, 6, 6) and vqvae2.fingerprint(tokenizer).shape == (32,)
    assert vqvae2.tokenize(tokenizer, torch.zeros(3, 3, 16, 16, dtype=torch.uint8), "cpu").shape == (3, 20)
    assert vqvae2.sample(tokenizer, prior, torch.zeros(B, dtype=torch.long)).shape == images.shape
    z = torch.zeros(B, TINY.code_dim, 4, 4)
    z_q, indices, loss = Quantizer(V, TINY.code_dim)(z)
    assert z_q.shape == z.shape and indices.shape == (B, 4, 4) and loss.shape == ()
