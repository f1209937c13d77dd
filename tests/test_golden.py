"""Golden numbers: what the official code computes when every parameter is filled by a formula (tests/golden/golden.py).

Every <file>_<part>_<anything>.json in tests/golden/, or in the folder named by GOLDEN_DIR, is judged by the check of its
<file>_<part>. A check builds the model from the sizes in the file, never from sizes of its own, and returns everything it can
compute; a recorded output that it does not return fails, unless LEFT_OUT gives the reason.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "golden"))
from golden import check, fill, make_input  # noqa: E402

import magvit  # noqa: E402
import mar  # noqa: E402
import maskgit  # noqa: E402
import pixelcnn  # noqa: E402
import rqvae  # noqa: E402
import var  # noqa: E402
import vqgan_gpt  # noqa: E402
import vqvae2  # noqa: E402

FILES = sorted(path for path in Path(os.environ.get("GOLDEN_DIR", HERE / "golden")).glob("*_*_*.json"))

LEFT_OUT = {   # part: {recorded output: why no check computes it}
    "pixelcnn_binary": dict.fromkeys(
        ("logits", "nll_nats"), "EugenHotaj's network adds each block's input twice (x + (x + f(x))): a mistake of that "
        "repository, not the paper's network; single_residual/* are the same numbers with the paper's single skip"),
    "vqgan_gpt_transformer": dict.fromkeys(
        (f"permuter/{name}" for name in ("Subsample", "ZCurve", "SpiralOut", "SpiralIn", "Random", "AlternateParsing")),
        "the file holds the raster order alone, which all releases use"),
    "vqgan_gpt_sliding": dict.fromkeys(
        ("scene/16", "scene/24", "scene/32", "scene/45"), "windows of the scene models (bounding boxes), which the file does not hold"),
    "magvit_tokenizer": {"strided/z": "strided convolutions between MAGVIT's levels, off in all released configs; the file does not hold them"},
    "magvit_losses": {"d2/logit_real_blur1": "a blur in the discriminator of frames, off in all released configs; the file does not hold it"},
    "magvit_commit": dict.fromkeys((f"schedule/poly:-1.0,0.0,1.0/{n}" for n in (64, 1024)), "a polynomial given by its coefficients: here the square schedule"),
    "magvit_transformer": {"segment/logits": "a table of segments, off in all released configs; the file does not hold it"},
    "magvit_lfq": dict.fromkeys(
        (*(f"vqp/{name}{suffix}" for name in ("per_sample_entropy", "codebook_entropy", "aux_loss", "grad_x_aux") for suffix in ("", "_unit")),
         *(f"vqp/groups/{name}" for name in ("indices", "per_sample_entropy", "codebook_entropy", "aux_loss", "grad_x_aux")), "vqp/gamma2.5/aux_loss"),
        "the other third party's entropies: log(max(p, 1e-5)), means over groups of bits and a factor of its own; the file follows the first, as the paper") | {
        "om2/entropy_fn": "a function of general affinities, whose arguments are not recorded"},
    "mar_diffloss": {"times/ddim": "a sampler that the release holds and never calls; the file does not hold it"},
}
CHECKS = {}    # part: function(golden file as a dict, inputs) -> {output name: array}


def checks(part):
    return lambda function: CHECKS.setdefault(part, function)


def params_of(golden, key="params", layout="torch"):
    """The filled parameters of a golden file, under their official names."""
    return {name: torch.from_numpy(np.asarray(fill(name, shape, layout))) for name, shape in golden[key].items()}


@checks("pixelcnn_masks")
def pixelcnn_masks(golden, inputs):
    c = golden["config"]
    sizes = {f"{h}x{w}": (h, w) for k in [c["kernel"]] for h, w in ((k, k), (1, k), (1, 1))}
    return {f"mask_{kind}_{name}": pixelcnn.causal_mask(kind, c["out_channels"], c["in_channels"], size, c["data_channels"])
            for kind in "AB" for name, size in sizes.items()}


@checks("pixelcnn_binary")
def pixelcnn_binary(golden, inputs):
    c, params = golden["config"], params_of(golden)
    net = pixelcnn.PixelCNN(c["in_channels"], c["residual_channels"], c["n_residual"], params["_causal_layers.0._net.3.weight"].shape[-1],
                            c["head_channels"], c["out_channels"], first_kernel=params["_input.weight"].shape[-1])
    rename = {"_input": "input", "_head": "head"} | {f"_causal_layers.{i}._net": f"blocks.{i}.net" for i in range(c["n_residual"])}
    state = {}
    for name, value in params.items():
        old = next(old for old in rename if name.startswith(old + "."))
        # official kernels are whole squares, ours end with the centre's row
        state[rename[old] + name[len(old):]] = value[:, :, :value.shape[2] // 2 + 1] if value.ndim == 4 else value
    net.load_state_dict(state)
    bits = inputs["bits"].float()
    out = {"input_conv": net.input(bits)}
    out["block0"] = net.blocks[0](out["input_conv"])
    out["single_residual/logits"] = net(bits)
    nll = F.binary_cross_entropy_with_logits(out["single_residual/logits"], bits, reduction="none")
    return out | {"single_residual/nll_nats": nll.sum((1, 2, 3))}


@checks("pixelcnn_gated")
def pixelcnn_gated(golden, inputs):
    c, params = golden["config"], params_of(golden)
    shape = {name: list(value.shape) for name, value in params.items()}
    net = pixelcnn.GatedPixelCNN(c["dim"], c["dim"], c["n_layers"], shape["layers.1.vert_stack.weight"][-1], shape["output_conv.0.weight"][0],
                                 c["input_dim"], num_classes=c["n_classes"], first_kernel=shape["layers.0.vert_stack.weight"][-1])
    rename = {"vert_stack": "vertical", "horiz_stack": "horizontal", "vert_to_horiz": "link", "horiz_resid": "out",
              "output_conv.0": "head.1", "output_conv.2": "head.3", "class_cond_embedding.weight": "class_bias"}
    ours = {}
    for name in params:
        ours[name] = name
        for old, new in rename.items():
            ours[name] = ours[name].replace(old, new)
    net.load_state_dict({ours[name]: value for name, value in params.items() if name != "embedding.weight"})
    first = net.layers[0]
    for conv in (first.vertical, first.horizontal):
        # the official code zeroes the hidden weights in place and takes gradients through the whole kernel (notes: grad)
        conv.weight.data *= conv.mask
        conv.mask.fill_(1)
    embedding = params["embedding.weight"].clone().requires_grad_()
    classes = F.one_hot(inputs["labels"], c["n_classes"]).float()

    def forward(indices):
        v = h = F.embedding(indices, embedding).permute(0, 3, 1, 2)
        maps = {}
        for i, layer in enumerate(net.layers):
            v, h = maps[f"layer{i}/v"], maps[f"layer{i}/h"] = layer(v, h, layer.bias(classes))
        return net.head[1:](h), maps                    # the official head does not begin with a ReLU, the paper's does
    logits, out = forward(inputs["indices"])
    loss = F.cross_entropy(logits, inputs["indices"])
    (1000 * loss).backward()
    grads = {ours[name]: name for name in params}
    out |= {f"grad1000/{grads[name]}": p.grad for name, p in net.named_parameters()} | {"grad1000/embedding.weight": embedding.grad}
    greedy = torch.zeros_like(inputs["indices"])
    with torch.no_grad():
        for y in range(greedy.shape[1]):
            for x in range(greedy.shape[2]):
                greedy[:, y, x] = forward(greedy)[0][:, :, y, x].argmax(1)
    return out | {"logits": logits, "loss": loss.reshape(1), "greedy": greedy}


@checks("pixelcnn_logistic")
def pixelcnn_logistic(golden, inputs):
    out, pixels = {}, {"": inputs["pixels"], "edge": 255 * inputs["edge_pixels"]}
    K = golden["config"]["nr_mix"]
    sharp = inputs["l"].clone()
    scales = sharp[..., K:].unflatten(-1, (3, 3, K))[..., 1, :]                     # a view: the log scales of all colours
    scales.copy_(3 * scales - 5)
    for name, l, p in (("plain", inputs["l"], ""), ("edge", inputs["l"], "edge"), ("sharp", sharp, ""), ("sharp_edge", sharp, "edge")):
        l = l.clone().requires_grad_()
        nll = pixelcnn.logistic_nll(l, (pixels[p] - 127.5) / 127.5)
        nll.sum().backward()
        out |= {f"{name}/nll_per_pixel": nll, f"{name}/nll_per_image_nats": nll.sum((1, 2)), f"{name}/nll_total": nll.sum().reshape(1),
                f"{name}/bits_per_dim": nll.sum().reshape(1) / (np.log(2) * pixels[p].numel()), f"{name}/grad_l": l.grad}
    u, v = (((inputs[name] + 0.5) / 1000003).clamp(1e-5, 1 - 1e-5).float() for name in ("u_mixture", "u_logistic"))
    out["sample"], out["sample/mixture_index"] = pixelcnn.logistic_draw(inputs["l"], u, v)
    grey = (pixels[""][..., :1] - 127.5) / 127.5
    out["grey/nll_total"] = pixelcnn.logistic_nll(inputs["l_grey"], grey).sum().reshape(1)
    out["grey/sample"] = pixelcnn.logistic_draw(inputs["l_grey"], u, v[..., :1])[0]
    return out


@contextlib.contextmanager
def recorded(net, names, prefix=""):
    """-> dict that fills with the outputs of net's modules of these names; other names belong to no module."""
    out, modules = {}, dict(net.named_modules())
    keep = lambda name: lambda module, args, result: out.__setitem__(prefix + name, result)
    hooks = [modules[name].register_forward_hook(keep(name)) for name in names if name in modules]
    yield out
    for hook in hooks:
        hook.remove()


def grads(net, loss, prefix, names, factor=1000):
    """{prefix + name: gradient of factor * loss} of the parameters among names."""
    net.zero_grad()
    (factor * loss).backward(retain_graph=True)
    return {prefix + name: p.grad.clone() for name, p in net.named_parameters() if prefix + name in names}


@checks("vqgan_gpt_tokenizer")
def vqgan_gpt_tokenizer(golden, inputs):
    wanted = golden["outputs"]
    net = vqgan_gpt.from_official(params_of(golden), golden["config"])
    with recorded(net, wanted) as out:
        z = net.latents(inputs["image"])
        z_q, indices, loss = net.quantize(z)
        rec = net.decoder(net.post_quant_conv(z_q))
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    out |= {"indices": indices.flatten(), "quant": z_q, "qloss": loss, "rec": rec, "codes_used": torch.tensor(float(len(indices.unique()))),
            "dist_min": (flat - net.quantize.embedding.weight[indices.flatten()]).square().sum(1)}
    assert torch.equal(net.encode(inputs["image"]), indices)
    torch.testing.assert_close(net(inputs["image"])[0], rec)
    # the other weighting of the same two terms
    fixed = vqgan_gpt.from_official(params_of(golden), golden["config"] | {"legacy": False})
    for model, key in ((net, ""), (fixed, "_fixed")):
        again, found = model(inputs["image"])
        total = (again * inputs["probe"]).mean() + found["codebook_loss"]
        out |= {"qloss" + key: found["codebook_loss"], "train/loss": total} | grads(model, total, f"train/grad{key}/", wanted)
        model.zero_grad()
        h = model.latents(inputs["image"]).detach().requires_grad_()
        (1000 * model.quantize(h)[2]).backward()
        out |= {f"train/grad_vq{key}/h": h.grad, f"train/grad_vq{key}/quantize.embedding.weight": model.quantize.embedding.weight.grad}
    again, found = net(inputs["wide"])
    out |= {"wide/indices": net.encode(inputs["wide"]).flatten(), "wide/qloss": found["codebook_loss"], "wide/rec": again}
    side = golden["config"]["ddconfig"]["resolution"] // net.f
    codes = inputs["codes"].view(len(inputs["codes"]), side, -1)
    out |= {"codes/quant": net.quantize.lookup(codes), "codes/rec": net.decode(codes)}
    for name in (name for name in wanted if name.startswith("tiny/")):
        out[name] = net.get_submodule(name[5:])(0.001 * inputs["tiny"])
    return out


@checks("vqgan_gpt_gumbel")
def vqgan_gpt_gumbel(golden, inputs):
    c, s = golden["config"], golden["config"]["temperature_schedule"]
    net = vqgan_gpt.GumbelQuantizer(c["n_embed"], c["embedding_dim"], c["num_hiddens"], c["kl_weight"], c["straight_through"])
    net.load_state_dict({name.removeprefix("quantize."): value for name, value in params_of(golden).items()})
    h, out = inputs["h"], {}
    out |= {"logits": net.proj(h), "indices_clean": net.indices(h), "diff": 1000 * net(h)[2]}
    side = h.shape[2]
    out["codes/z_q"] = net.lookup(inputs["codes"].view(len(h), side, -1))
    for name in golden["outputs"]:
        if match := re.search(r"tau([\d.]+)(/z_q)?$", name):
            net.temperature = float(match[1])
            net.straight_through = not name.startswith("soft")
            out[name] = net(h, noise=inputs["gumbel"])[0]
            out[name.replace("z_q", "indices")] = net(h, noise=inputs["gumbel"])[1] if match[2] else None
    order = s["warm_up_steps"], s["max_decay_steps"], s["lr_start"], s["lr_max"], s["lr_min"]
    out["schedule"] = torch.tensor([vqgan_gpt.warmup_cosine(n, *order) for n in range(0, 1_100_001, 100_000)])
    out["warm/schedule"] = torch.tensor([vqgan_gpt.warmup_cosine(n, 10, 50, 0.1, 1.0, 0.01) for n in range(60)])
    return out


@checks("vqgan_gpt_discriminator")
def vqgan_gpt_discriminator(golden, inputs):
    c, out = golden["config"], {}
    sizes = c["input_nc"], c["ndf"]
    net = vqgan_gpt.NLayerDiscriminator(*sizes, c["n_layers"])
    missing, unexpected = net.load_state_dict(params_of(golden), strict=False)
    assert not unexpected and set(missing) <= set(golden["buffers"])
    with recorded(net.eval(), [name.removeprefix("eval/") for name in golden["outputs"]], "eval/") as seen:
        out["eval/logits"] = net(inputs["image"])
    out |= seen
    net.train()
    out |= {"train/logits": net(inputs["image"]), "train/logits2": net(inputs["image2"])}
    out |= {f"train/{name}": value for name, value in net.named_buffers()}
    short = vqgan_gpt.NLayerDiscriminator(*sizes, c["n_layers"] - 1).eval()
    short.load_state_dict(params_of(golden, "params_short"), strict=False)
    out["short/logits"] = short(inputs["image"])
    act = vqgan_gpt.NLayerDiscriminator(*sizes, c["n_layers"], actnorm=True).eval()
    act.load_state_dict(params_of(golden, "params_actnorm"), strict=False)
    out["actnorm/eval_logits"] = act(inputs["image"])
    act.train()
    out |= {"actnorm/logits": act(inputs["image"]), "actnorm/second_logits": act(inputs["image2"])}
    out |= {"actnorm/main.3.loc": act.main[3].loc, "actnorm/main.3.scale": act.main[3].scale}
    real, fake = inputs["logits_real"], inputs["logits_fake"]
    out |= {f"loss/{gan}_d": vqgan_gpt.discriminator_loss(gan, real, fake) for gan in ("hinge", "vanilla")}
    losses = vqgan_gpt.VQLPIPSWithDiscriminator(vqgan_gpt.Config(disc_start=100))
    losses.discriminator = torch.nn.Identity()
    flat, weight = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    images, again = torch.zeros_like(fake), fake + 0 * weight
    on = ["g_loss" in losses.generator(images, again, flat.sum(), weight, step)[1] for step in (99, 100, 101)]
    return out | {"loss/g": losses.generator(images, again, flat.sum(), weight, 100)[1]["g_loss"], "adopt_weight": torch.tensor(on).float()}


@checks("vqgan_gpt_lpips")
def vqgan_gpt_lpips(golden, inputs):
    net, prefix = vqgan_gpt.LPIPS(), "loss.perceptual_loss."
    missing, unexpected = net.load_state_dict({name.removeprefix(prefix): p for name, p in params_of(golden).items()}, strict=False)
    assert not unexpected and set(missing) == {name.removeprefix(prefix) for name in golden["buffers"]}
    for name, value in golden["buffers"].items():
        assert net.get_buffer(name.removeprefix(prefix)).flatten().tolist() == pytest.approx(value)
    a, b = inputs["image"], inputs["image2"].requires_grad_()
    out = {"scaled": (a - net.scaling_layer.shift) / net.scaling_layer.scale, "value": 1000 * net(a, b), "same": net(a, a),
           "tiny_norm": net.unit(3e-10 * inputs["tiny"])}
    for k, (x, y) in enumerate(zip(net.features(a), net.features(b))):
        diff = (net.unit(x) - net.unit(y)).square()
        out |= {f"relu{k}": x, f"norm{k}": net.unit(x), f"diff{k}": 1000 * diff,
                f"res{k}": 1e5 * getattr(net, f"lin{k}").model(diff).mean((2, 3), keepdim=True)}
    (1e5 * net(a, b).mean()).backward()
    return out | {"grad": b.grad}


@checks("vqgan_gpt_loss")
def vqgan_gpt_loss(golden, inputs):
    c, params, out = golden["config"], params_of(golden), {}
    image, quant_loss = inputs["image"], torch.tensor(c["codebook_loss"])

    def setting(gan="hinge", perceptual=None):
        """Fresh losses (and running statistics), last layer and reconstruction."""
        config = vqgan_gpt.Config(gan=gan, disc_start=c["disc_start"], disc_weight=c["disc_weight"], disc_layers=c["disc_num_layers"],
                                  disc_width=c["disc_ndf"], lpips="given", codebook_weight=c["codebook_weight"],
                                  perceptual_weight=c["perceptual_weight"] if perceptual is None else perceptual)
        losses = vqgan_gpt.VQLPIPSWithDiscriminator(config)
        _, unexpected = losses.load_state_dict({name[5:]: p for name, p in params.items() if name.startswith("loss.")}, strict=False)
        assert not unexpected
        weight, bias = (params[f"decoder.conv_out.{name}"].clone().requires_grad_() for name in ("weight", "bias"))
        return losses, weight, torch.tanh(F.conv2d(inputs["features"], weight, bias, padding=1))
    for gan in ("hinge", "vanilla"):
        for name, step in (("on", c["disc_start"]), ("off", c["disc_start"] - 1)):
            losses, weight, rec = setting(gan)
            total, m = losses.generator(image, rec, quant_loss, weight, step)
            g = -losses.discriminator(rec).mean()
            # before disc_start our loop computes no weight: the same function, asked directly
            d_weight = m.get("d_weight", vqgan_gpt.adaptive_weight(m["nll"], g, weight) * c["disc_weight"])
            out |= {f"{gan}/{name}/g/{key}": value for key, value in dict(
                total_loss=total, quant_loss=m["codebook_loss"], nll_loss=m["nll"], rec_loss=m["nll"], d_weight=d_weight, g_loss=m.get("g_loss"),
                p_loss=losses.perceptual_loss(image, rec).mean(), disc_factor=torch.tensor(float("g_loss" in m)),
                grad=1000 * torch.autograd.grad(total, weight)[0]).items()}
            losses, _, rec = setting(gan)
            loss, m = losses.discriminate(image, rec)
            factor = float(step >= c["disc_start"])             # in our loop the discriminator's step is left out: factor 0
            out |= {f"{gan}/{name}/d/{key}": value for key, value in dict(disc_loss=factor * loss, **m).items()}
            out |= grads(losses.discriminator, loss, f"{gan}/{name}/d/grad/", golden["outputs"])
    losses, weight, rec = setting()
    nll, g = losses.generator(image, rec, quant_loss, weight, 0)[1]["nll"], -losses.discriminator(rec).mean()
    out["delta/d_weight"] = c["disc_weight"] * vqgan_gpt.adaptive_weight(nll, 1e-6 * g, weight)
    out["clamp/d_weight"] = c["disc_weight"] * vqgan_gpt.adaptive_weight(1000 * nll, 1e-6 * g, weight)
    with torch.no_grad():
        total, m = setting()[0].generator(image, rec, quant_loss, weight, c["disc_start"])
        out |= {"nograd/d_weight": m["d_weight"], "nograd/total_loss": total}
    losses, weight, rec = setting(perceptual=0.0)
    total, m = losses.generator(image, rec, quant_loss, weight, c["disc_start"])
    return out | {"no_perceptual/nll_loss": m["nll"], "no_perceptual/d_weight": m["d_weight"], "no_perceptual/total_loss": total}


def net2net_config(c):
    """The constructor arguments of a golden file's Net2NetTransformer, nested as in the release's yaml."""
    return {"transformer_config": {"params": c["transformer"]}, "first_stage_config": {"params": c["first_stage"]},
            "cond_stage_config": c["cond_stage"]}


@checks("vqgan_gpt_transformer")
def vqgan_gpt_transformer(golden, inputs):
    c, wanted = golden["config"], golden["outputs"]
    net = vqgan_gpt.from_official(params_of(golden), net2net_config(c))
    gpt, tokenizer = net.transformer, net.first_stage_model
    with recorded(gpt, [name.removeprefix("gpt/") for name in wanted], "gpt/") as out:
        logits = gpt(inputs["idx"])
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["target"].flatten())
    out |= {"gpt/logits": logits, "gpt/loss": loss} | grads(gpt, loss, "gpt/grad/", wanted)
    gpt.n_unmasked = c["n_unmasked"]
    out["gpt/unmasked"] = gpt(inputs["idx"])
    gpt.n_unmasked = 0
    out["gpt/embeddings"] = gpt(inputs["idx"][:, :20], embeddings=inputs["emb"])
    label, z = inputs["label"], tokenizer.encode(inputs["image"]).flatten(1)
    out |= {"class/z": z, "class/c": net.condition(label, len(z)), "class/logits": net(z, label), "class/loss": net.loss(z, label)[0]}
    noisy = torch.where(inputs["pkeep_mask"] > 0, z, inputs["pkeep_random"])
    out |= {"pkeep/logits": net(noisy, label), "pkeep/loss": net.loss(z, label, noisy)[0]}
    classes, net.num_classes = net.num_classes, 0
    out |= {"uncond/c": net.condition(label, len(z)), "uncond/logits": net(z)}
    net.num_classes = classes
    stage, side = vqgan_gpt.CoordStage(c["coord"]["n_embed"], c["coord"]["down_factor"]), inputs["image"].shape[2]
    coord = stage.encode(41, 59, 6, 13, (side, side))[None]
    out |= {"coord/c": coord.flatten(1), "coord/logits": net(z, coord.expand(len(z), -1, -1)), "coord/decode": stage.decode(coord)}
    depth = tokenizer.encode(inputs["image2"])
    out |= {"depth/c": depth.flatten(1), "depth/logits": net(z, depth), "depth/loss": net.loss(z, depth)[0]}
    for name, known in (("argmax", None), ("half", z[:, :z.shape[1] // 2])):
        trace = []
        image = vqgan_gpt.sample(tokenizer, net, label, known=known, top_k=1, trace=trace)
        out |= {f"sample/{name}": trace[-1]["tokens"].flatten(1)} | ({"sample/img": tokenizer.decode(trace[-1]["tokens"])} if known is None else {})
        assert torch.equal(image, tokenizer.decode(trace[-1]["tokens"]).clamp(-1, 1))
        if known is None:
            out |= {"cached/argmax": trace[-1]["tokens"].flatten(1)}
            out |= {f"cached/logits_step{k}": trace[k]["logits"][:, None] for k in range(3)}
    x = 3 * inputs["sampler_logits"]
    for name in wanted:
        if match := re.fullmatch(r"filter/topk_topp_(\d+)_([\d.]+)", name):
            out[name] = vqgan_gpt.filter_logits(x, int(match[1]), float(match[2])).softmax(-1)
    out["filter/topk"] = vqgan_gpt.filter_logits(x, 10).softmax(-1)
    names = {id(p): "transformer." + name for name, p in gpt.named_parameters()}
    groups = [{"weight_decay": g["weight_decay"], "params": sorted(names[id(p)] for p in g["params"])} for g in vqgan_gpt.parameter_groups(net)]
    assert groups == [{"weight_decay": g["weight_decay"], "params": sorted(g["params"])} for g in golden["optimizer"]["groups"]]
    return out


@checks("vqgan_gpt_sliding")
def vqgan_gpt_sliding(golden, inputs):
    c, s, out = golden["config"], golden["config"]["window"], {}
    for H, W in c["grids"]:
        start = torch.tensor([[vqgan_gpt.window_start(i, H, s), vqgan_gpt.window_start(j, W, s)] for i in range(H) for j in range(W)])
        place = torch.cartesian_prod(torch.arange(H), torch.arange(W)) - start
        out |= {f"{H}x{W}/{name}": value for name, value in zip(("row_start", "col_start", "local_row", "local_col"), (*start.T, *place.T))}
    config = vqgan_gpt.Config(image_size=s, ch_mult=(1,), codebook_size=c["transformer"]["vocab_size"], layers=c["transformer"]["n_layer"],
                              heads=c["transformer"]["n_head"], width=c["transformer"]["n_embd"], block_size=c["transformer"]["block_size"],
                              condition="edges", num_classes=0)
    tokenizer, prior, (h, w) = vqgan_gpt.build_tokenizer(config), vqgan_gpt.build_prior(config).eval(), c["grid"]
    prior.transformer.load_state_dict({name.removeprefix("transformer."): p for name, p in params_of(golden).items()})
    noise, trace = iter(inputs["noise"]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqgan_gpt, "draw", lambda logits, *_: (logits + 2 * next(noise)).argmax(-1, keepdim=True))
        vqgan_gpt.sample(tokenizer, prior, inputs["cond"].view(1, h, w), size=(h, w), trace=trace)
    logits = torch.cat([step["logits"] for step in trace])
    return out | {"steered/tokens": trace[-1]["tokens"], "steered/logits": logits, "steered/logits_last_row": logits[-w:]}


def vqvae2_tokenizer_of(golden, inplace_relu=False, scale=1.4):
    """The tokenizer with weights scaled and codebooks as the files' notes say (cluster sizes: as new)."""
    params = params_of(golden)
    params = {name: 4 * p if name.endswith("embed") else scale * p if name.endswith("weight") else p for name, p in params.items()}
    return vqvae2.from_official(params, golden["config"], inplace_relu=inplace_relu)


def scalars(out):
    """These files record numbers as arrays of one element."""
    return {name: value.reshape(1) if value.ndim == 0 else value for name, value in out.items()}


def coloured(inputs, name="image"):
    return 0.5 * inputs[name] + inputs[f"{name}_colours"].repeat_interleave(8, 2).repeat_interleave(8, 3)


@checks("vqvae2_tokenizer")
def vqvae2_tokenizer(golden, inputs):
    wanted, image, results = golden["outputs"], coloured(inputs), {}
    for prefix, inplace in (("", False), ("inplace/", True)):
        net, out = vqvae2_tokenizer_of(golden, inplace), {}
        modules = {name.removeprefix(prefix): vqvae2.our_name(name.removeprefix(prefix)) for name in wanted if name.startswith(prefix)}
        modules |= {"z_t": "quantize_conv.0", "z_b": "quantize_conv.1"}
        with recorded(net, modules.values()) as seen:
            again, losses = net(image)
        out |= {name: seen[module] for name, module in modules.items() if module in seen}
        codes, beta = net.codes(image), net.config.beta
        out |= {"id_t": codes[0], "id_b": codes[1], "quant_t": net.quantize[0].lookup(codes[0]), "quant_b": net.quantize[1].lookup(codes[1])}
        out |= {f"diff_{t}": q(z)[2] / beta for t, q, z in (("t", net.quantize[0], out["z_t"]), ("b", net.quantize[1], out["z_b"]))}
        loss, metrics = vqvae2.tokenizer_loss(image, again, losses["latent_loss"])
        out |= {"rec": again, "diff": losses["latent_loss"] / beta, "mse": metrics["mse"], "loss": loss}
        out["decode_code"] = net.decode([inputs["code_t"], inputs["code_b"]])
        torch.testing.assert_close(net.decode(codes), again)
        net.zero_grad()
        (1000 * loss).backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        out |= {name: gradients[vqvae2.our_name(name[9:])] for name in wanted if name.startswith("grad1000/")}
        results |= {prefix + name: value for name, value in out.items()}
    return scalars(results)


@checks("vqvae2_ema")
def vqvae2_ema(golden, inputs):
    c, out = golden["config"], {}
    embed = 4 * torch.from_numpy(np.asarray(fill("embed", (c["embed_dim"], c["n_embed"])))).T

    def quantizer(codebook):
        made = vqvae2.Quantizer(c["n_embed"], c["embed_dim"], codebook, c["decay"], beta=1.0)
        made.embed.copy_(embed)
        if codebook == "release":
            made.embed_avg.copy_(embed)
        return made
    warm = quantizer("release")
    warm.cluster_size.copy_(5 + 4 * inputs["cluster_size"])
    warm.embed_avg.copy_(embed * warm.cluster_size[:, None])
    for name, made in (("fresh", quantizer("release")), ("warm", warm), ("sonnet", quantizer("debiased"))):
        for step in (1, 2):
            z_q, indices, diff = made(1.5 * inputs[f"z{step - 1}"].permute(0, 3, 1, 2))
            key = f"{name}/step{step}/"
            if name == "sonnet":
                out |= {key + "embeddings": made.embed.T, key + "cluster_size_debiased": made.cluster_size / (1 - c["decay"] ** step),
                        key + "idx": indices.flatten()}
            else:
                out |= {key + "idx": indices, key + "quantize": z_q.permute(0, 2, 3, 1), key + "diff": diff,
                        key + "cluster_size": made.cluster_size.clone(), key + "embed_avg": made.embed_avg.T.clone(), key + "embed": made.embed.T.clone()}
            if name == "sonnet":
                out[key + "embeddings"] = made.embed.T.clone()
    net = vqvae2_tokenizer_of(golden).train()
    for q in net.quantize:
        q.cluster_size.fill_(4)
        q.embed_avg.copy_(4 * q.embed)
    optimizer = torch.optim.Adam(net.parameters(), c["lr"])
    for step in (1, 2):
        image = coloured(inputs, f"image{step}")
        again, losses = net(image)
        loss, metrics = vqvae2.tokenizer_loss(image, again, losses["latent_loss"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out |= {f"train/step{step}/{name}": value.clone() for name, value in dict(
            mse=metrics["mse"], diff=losses["latent_loss"] / net.config.beta, loss=loss).items()}
        for t, q in zip("tb", net.quantize):
            out |= {f"train/step{step}/quantize_{t}.{name}": value.clone() for name, value in dict(
                cluster_size=q.cluster_size, embed_avg=q.embed_avg.T, embed=q.embed.T).items()}
    net.eval()
    return scalars(out) | {"train/after/rec": net(coloured(inputs, "image2"))[0], "train/after/dec.blocks.0.weight": net.decoders[1][0].weight}


@checks("vqvae2_pixelsnail_top")
@checks("vqvae2_pixelsnail_bottom")
def vqvae2_pixelsnail(golden, inputs):
    wanted, codes = golden["outputs"], inputs["codes"]
    net = vqvae2.from_official(params_of(golden), golden["config"])
    coarser = [inputs["top_codes"]] if "top_codes" in inputs else []
    names = {"horizontal": "horizontal", "vertical": "vertical", "cond_resnet": "cond_resnet"}
    for i, block in enumerate(net.blocks):
        names |= {f"block{i}": f"blocks.{i}", f"block{i}.key": f"blocks.{i}.key_resblock", f"block{i}.query": f"blocks.{i}.query_resblock",
                  f"block{i}.attention": f"blocks.{i}.causal_attention"}
        for j in range(len(block.resblocks)):
            names |= {f"block{i}.res{j}": f"blocks.{i}.resblocks.{j}", f"block{i}.res{j}.conv1": f"blocks.{i}.resblocks.{j}.conv1"}
    with recorded(net, names.values()) as seen:
        logits = net(codes, net.condition(coarser))
    loss = F.cross_entropy(logits, codes)
    out = {name: seen[module] for name, module in names.items() if module in seen}
    out |= {"logits": logits, "loss": loss, "accuracy": (logits.argmax(1) == codes).float().mean(), "background": net.background}
    (1000 * loss).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    for name in (name for name in wanted if name.startswith("grad1000/")):
        out[name] = gradients[vqvae2.our_name(name[9:])].reshape(wanted[name]["shape"])
    if coarser:
        out["logits_without_condition"] = net(codes)
    # greedy decoding after the given first row, by the sampler's incremental passes
    rows, drawn = wanted["greedy"]["shape"][1], torch.zeros_like(codes)
    drawn[:, 0] = codes[:, 0]
    with torch.no_grad():
        condition = net.condition(coarser)
        with vqvae2.incremental(net, len(codes), codes.shape[2]) as at:
            for i in range(rows):
                for j in range(codes.shape[2]):
                    at[:] = i, j
                    step = net.position(drawn, i, j, condition)
                    if i:
                        drawn[:, i, j] = step.argmax(1)
    return scalars(out) | {"greedy": drawn[:, :rows]}


def shared_codebook(golden, key="params"):
    """The filled parameters; the one codebook also under the names that the release gives it for the other depths."""
    params, first = params_of(golden, key), "quantizer.codebooks.0."
    depth = golden["config"].get("depth", 1)
    return params | {name.replace(first, f"quantizer.codebooks.{d}."): p for name, p in params.items() if name.startswith(first)
                     for d in range(1, depth)}


@checks("rqvae_quantizer")
def rqvae_quantizer(golden, inputs):
    c, out = golden["config"], {}
    K, E, D = c["n_embed"], c["dim"], c["depth"]
    weight = params_of(golden)["quantizer.codebooks.0.weight"]

    def quantizer(depth=D, restart=False, cluster=None):
        q = rqvae.RQBottleneck(K, E, depth, c["decay"], restart)
        q.weight.data.copy_(weight)
        q.embed_ema.copy_(weight[:-1])
        if cluster is not None:
            q.cluster_size_ema.copy_(0.6 + cluster.square())
            q.embed_ema.copy_(weight[:-1] * q.cluster_size_ema[:, None] + 0.1 * inputs["embed_noise"])
        return q
    first, last = lambda x: x.permute(0, 3, 1, 2), lambda x: x.permute(0, 2, 3, 1)      # the files' channels are last
    q, x = quantizer().eval(), inputs["x"].clone().requires_grad_()
    z_q, codes, commit = q(first(x))
    (100 * (commit + (last(z_q) * inputs["probe"]).mean())).backward()
    out |= {"codes": codes, "out": last(z_q), "commit": commit, "grad_x": x.grad}
    r, done = inputs["x"], 0
    for d in range(D):
        e = F.embedding(codes[..., d], weight)
        done = done + e
        out |= {f"depth{d}/residual": r, f"depth{d}/dist": (r[..., None, :] - weight[:-1]).square().sum(-1), f"depth{d}/idx": codes[..., d],
                f"depth{d}/sum": done}
        r = r - e
    for name in golden["outputs"]:
        if match := re.fullmatch(r"soft([\d.]+)/(\d+)", name):
            out[name] = q.soft_codes(first(inputs["x"]), float(match[1]), stochastic=False)[0][:, :, :, int(match[2])]
        if match := re.fullmatch(r"given/add(\d+)", name):
            out[name] = last(q.lookup(inputs["idx"][..., :int(match[1]) + 1]))
        if match := re.fullmatch(r"given/select(\d+)", name):
            out[name] = last(q.lookup(inputs["idx"][..., int(match[1]):int(match[1]) + 1]))
    per_depth = F.embedding(inputs["idx"], weight)
    out |= {"given/sum": last(q.lookup(inputs["idx"])), "given/per_depth": per_depth, "given/cumsum": per_depth.cumsum(3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n - 1, -1, -1))
        patch.setattr(torch, "rand", lambda shape, generator=None: torch.full(tuple(shape), 0.5))

        def run(name, q, x):
            update, d = q.update, iter(range(99))

            def watched(*args):
                update(*args)
                key = next(d)
                out.update({f"{name}/weight_d{key}": q.weight[:-1].clone(), f"{name}/cluster_size_d{key}": q.cluster_size_ema.clone()})
            q.update = watched
            z_q, codes, commit = q.train()(first(x))
            out.update({f"{name}/out": last(z_q), f"{name}/commit": commit, f"{name}/codes": codes, f"{name}/embed_ema": q.embed_ema})
        run("ema", quantizer(cluster=inputs["cluster"]), inputs["x"])
        run("restart", quantizer(restart=True, cluster=inputs["cluster"]), inputs["x"])
        run("tile", quantizer(1, restart=True, cluster=inputs["cluster"]), inputs["x_small"][:, :1])
        run("fresh", quantizer(1), inputs["x"])
        out["tile/codes"] = out["tile/codes"][..., 0]
    return out


@checks("rqvae_tokenizer")
def rqvae_tokenizer(golden, inputs):
    wanted, c = golden["outputs"], golden["config"]
    net = rqvae.from_official(shared_codebook(golden), c)
    with recorded(net, wanted) as out:
        again, found = net(inputs["image"])
    z = net.latents(inputs["image"])
    z_q, codes, commit = net.quantizer(z)
    mse = F.mse_loss(again, inputs["image"])
    total = rqvae.generator_loss(net.config, inputs["image"], again, found["commitment"], None)[0]
    last = lambda x: x.permute(0, 2, 3, 1)
    out |= {"z_e": last(z), "codes": codes, "z_q": last(z_q), "recon": again, "loss/recon": mse, "loss/latent": commit, "loss/total": total}
    net.zero_grad()
    (10 * total).backward(retain_graph=True)
    out |= {f"grad/{name}": p.grad.clone() for name, p in net.named_parameters() if f"grad/{name}" in wanted}
    disc = rqvae.NLayerDiscriminator(3, c["disc_ndf"], c["disc_layers"]).train()
    disc.load_state_dict({name.removeprefix("discriminator."): p for name, p in params_of(golden, "params_disc").items()}, strict=False)
    fake, real = disc(again.detach()), disc(inputs["image"])
    d_loss = rqvae.discriminator_loss("hinge", real, fake)
    grad = torch.autograd.grad(10 * d_loss, disc.main[2].weight)[0]
    out |= {"gan/logits_real": real, "gan/logits_fake": fake, "gan/d_loss": d_loss, "gan/grad_disc_conv": grad}
    g_total, metrics = rqvae.generator_loss(net.config, inputs["image"], again, commit, net.decoder.conv_out.weight, None, disc)
    out |= {"gan/g_loss": metrics["g_loss"], "gan/g_weight": metrics["d_weight"] / net.config.disc_weight, "gan/g_total": g_total}
    given = inputs["idx"]
    out |= {"given/all": net.decode(given), "given/img01": (net.decode(given) * 0.5 + 0.5).clamp(0, 1)}
    for name in wanted:
        if match := re.fullmatch(r"given/(add|select)(\d+)", name):
            d = int(match[2])
            out[name] = net.decode(given[..., (0 if match[1] == "add" else d):d + 1])
        if match := re.fullmatch(r"soft([\d.]+)", name):
            out[name] = net.quantizer.soft_codes(z, float(match[1]), stochastic=False)[0]
        if name.startswith("tiny/"):
            out[name] = net.get_submodule(name[5:])(0.001 * inputs["tiny"])
    return out


@checks("rqvae_transformer_text")
@checks("rqvae_transformer_uncond")
@checks("rqvae_transformer")
def rqvae_transformer(golden, inputs):
    c, wanted, codes = golden["config"], golden["outputs"], inputs["codes"]
    net = rqvae.from_official(params_of(golden), c)
    net.codebook.copy_(params_of(golden, "params_vae")["quantizer.codebooks.0.weight"][:-1])
    B, D, cond, seen = len(codes), c["depth"], inputs.get("cond"), {}
    keep = lambda name: lambda module, args, result: seen.update({f"{name}/input": args[0], f"{name}/output": result})
    hooks = [net.body_transformer.register_forward_hook(keep("body")), net.head_transformer.register_forward_hook(keep("head"))]
    with recorded(net, ["body_transformer.blocks.0", "body_transformer.blocks.0.attn"]) as parts:
        logits = net(codes, cond)
    for hook in hooks:
        hook.remove()
    shape = (*codes.shape, -1)
    e = F.embedding(codes.view(B, -1, D), net.codebook)
    out = seen | {"body/block0": parts["body_transformer.blocks.0"], "body/block0.attn": parts["body_transformer.blocks.0.attn"],
                  "spatial_ctx": net.body(e, cond)[0], "logits": logits.view(shape)}
    soft = (2 * inputs["soft"]).softmax(-1).view(B, -1, c["vocab_size"])
    nll = F.cross_entropy(logits.transpose(1, 2), codes.flatten(1), reduction="none").view(-1, D)
    soft_nll = rqvae.soft_cross_entropy(logits, soft).view(-1, D)
    out |= {"loss/hard": nll.mean(), "loss/per_depth": nll.mean(0), "loss/soft": soft_nll.mean(), "loss/soft_per_depth": soft_nll.mean(0)}
    total, found = net.loss(codes.flatten(1), cond)
    torch.testing.assert_close(torch.stack([found[f"nats_{d}"] for d in range(D)]), nll.mean(0))
    objective = nll.mean()
    if "cond_logits" in wanted:
        objective = objective + found["text"]
        out |= {"cond_logits": net.cond_classifier(net.body(e, cond)[1]), "loss/cond": found["text"], "loss/mix": total}
    else:
        torch.testing.assert_close(total, nll.mean())
        torch.testing.assert_close(net.loss(codes.flatten(1), cond, soft)[0], soft_nll.mean())
    net.zero_grad()
    (10 * objective).backward()
    out |= {f"grad/{name}": p.grad.clone() for name, p in net.named_parameters() if f"grad/{name}" in wanted}
    out["logits_cond_none"] = net(codes).view(shape)
    out |= {name: rqvae.filtered(2 * inputs["filter_logits"], float(m[1]), int(m[2]), float(m[3])) for name in wanted
            if (m := re.fullmatch(r"sampler/t([\d.]+)_k(\d+)_p([\d.]+)", name))}
    out["tiny/classifier"] = net.classifier(0.001 * inputs["tiny"])

    class Tokenizer:
        codebook_size, quantizer = c["vocab_size"], type("", (), {"weight": F.pad(net.codebook, (0, 0, 0, 1))})
        decode = staticmethod(lambda codes: codes.float())
    labels = torch.zeros(B, dtype=torch.long) if cond is None else cond
    draw = lambda known=None, **more: rqvae.sample(Tokenizer, net, labels, known=known, **more)
    trace = []
    draw(top_k=1, trace=trace)
    out["greedy"] = trace[-1]["tokens"].view(codes.shape)
    before = (c["side"] // 2 * c["side"] + 1) * D
    draw(codes.flatten(1)[:, :before], top_k=1, trace=trace)
    out["resumed"] = trace[-1]["tokens"].view(codes.shape)
    with pytest.MonkeyPatch.context() as patch:                         # the cache, fed with the given codes
        fed, cached = iter(codes.flatten(1).T), []
        patch.setattr(torch, "multinomial", lambda p, n, generator=None: next(fed)[:, None])
        draw(trace=cached)
    out["cached/logits"] = torch.stack([step["logits"] for step in cached], 1).view(shape)
    return out


@checks("movq_tokenizer")
def movq_tokenizer(golden, inputs):
    wanted = golden["outputs"]
    net = rqvae.from_official(params_of(golden), golden["config"])
    with recorded(net, wanted) as out:
        again, found = net(inputs["image"])
    z, codes = net.latents(inputs["image"]), net.encode(inputs["image"])
    out |= {"z": z, "idx": codes.flatten(), "zq": net.quantize.embedding(codes).permute(0, 3, 1, 2), "vq_loss": found["codebook_loss"],
            "rec": again, "given": net.decode(inputs["idx"])}
    net.zero_grad()
    (10 * (F.mse_loss(net(inputs["image"])[0], inputs["image"]) + net(inputs["image"])[1]["codebook_loss"])).backward()
    out |= {f"grad/{name}": p.grad.clone() for name, p in net.named_parameters() if f"grad/{name}" in wanted}
    net.z_q[0] = inputs["cond"]
    return out | {"norm/out": net.decoder.norm_out(inputs["feat"]), "norm/tiny": net.decoder.norm_out(0.001 * inputs["feat"])}


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def nchw(x):
    return x.permute(0, 3, 1, 2)


def flax_grads(net, loss, prefix, golden, scale=1000, ours=None, inside=""):
    """{prefix + official name: gradient of scale * loss, in Flax's layout} of the parameters that the file records.

    ours: {official name: ours} (default: maskgit's). inside: what the file's names of parameters begin with besides.
    """
    ours, parameters, found = ours or maskgit.our_names(golden["params"]), dict(net.named_parameters()), {}
    net.zero_grad()
    (scale * loss).backward(retain_graph=True)
    for name, shape in golden["params"].items():
        name = name.removeprefix(inside)
        if prefix + name in golden["outputs"]:
            grad = parameters[ours[name]].grad
            grad = grad.permute(*range(2, grad.ndim), 1, 0) if grad.ndim >= 4 else grad.T if name.endswith("kernel") else grad
            found[prefix + name] = grad.reshape(shape)
    return found


@checks("maskgit_tokenizer")
def maskgit_tokenizer(golden, inputs):
    wanted, ours = golden["outputs"], maskgit.our_names(golden["params"])
    net = maskgit.from_official(params_of(golden, layout="flax"), golden["config"])

    def module(name):
        """An official module's name -> ours, by one of its parameters."""
        inside = next(p for p in golden["params"] if p.startswith(name + "/"))
        return ours[inside].rsplit(".", inside.count("/") - name.count("/"))[0]
    names = {name: module(name.removeprefix("given_ids/")) for name in wanted if re.fullmatch(r"(given_ids/)?(en|de)coder/\w+", name)}
    fed = (nchw(inputs["image"]) + 1) / 2
    with recorded(net, names.values()) as seen:
        z = net.encoder(fed)
        again = net.decoder(net.quantize.lookup(inputs["ids"]))
    out = {name: nhwc(seen[ours_]) for name, ours_ in names.items()}
    z_q, indices, losses = net.quantize(z)
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    distance = (flat[:, None] - net.quantize.embedding.weight).square().sum(-1)
    assert torch.equal(net.encode(nchw(inputs["image"])), indices)
    torch.testing.assert_close(net(nchw(inputs["image"]))[0], 2 * net.decoder(z_q) - 1)
    torch.testing.assert_close(net.decode(inputs["ids"]), 2 * again - 1)
    out |= {"z": nhwc(z), "indices": indices, "quantized": nhwc(z_q), "reconstruction": nhwc(net.decoder(z_q)), "dist_min": distance.min(1).values,
            "given_ids/quantized": nhwc(net.quantize.lookup(inputs["ids"])), "given_ids/reconstruction": nhwc(again),
            "train/quantizer_loss": sum(losses.values()), "train/e_latent_loss": losses["commitment"], "train/q_latent_loss": losses["codebook"],
            "train/entropy_loss": losses["entropy"], "tiny/z": nhwc(net.encoder(0.001 * fed)),
            "tiny/groupnorm": nhwc(net.encoder.norm_out(0.001 * nchw(inputs["tiny"])))}
    out |= {name: maskgit.entropy_loss(-distance, float(m[2]), m[1]) for name in wanted if (m := re.fullmatch(r"entropy/(\w+)_T([\d.]+)", name))}
    net.quantize.temperature = 1.0                                      # notes: train
    z_q, _, losses = net.quantize(net.encoder(fed))
    out["train/loss"] = sum(losses.values()) + (nhwc(net.decoder(z_q)) * inputs["probe"]).mean()
    return out | flax_grads(net, out["train/loss"], "train/grad/", golden) | flax_grads(net, losses["entropy"], "train/grad_entropy/", golden)


@checks("maskgit_discriminator")
def maskgit_discriminator(golden, inputs):
    c, params, state = golden["config"], params_of(golden, layout="flax"), {}
    rename = [("Dense_0", "dense1"), ("Dense_1", "dense2"), (r"^Conv_0", "conv_in"), (r"^Conv_1", "conv_out"), ("ResBlock_", "blocks/"),
              ("Conv_0", "conv1"), ("Conv_1", "skip"), ("Conv_2", "conv2"), ("kernel", "weight"), ("/", ".")]
    for name, value in params.items():
        new = name
        for old, ours in rename:
            new = re.sub(old, ours, new)
        state[new] = maskgit.torch_layout(name, value)
    nets = [maskgit.Discriminator(c["image_size"], 512 // c["divide"], blur) for blur in (True, False)]
    for net in nets:
        net.load_state_dict(state)
    net, (real, fake) = nets[0], ((nchw(inputs[name]) + 1) / 2 for name in ("real", "fake"))
    with recorded(net, ["conv_in", "conv_out", "dense1", "dense2", *(f"blocks.{i}" for i in range(len(net.blocks)))]) as seen:
        net(real)
    out = {"Conv_0": nhwc(seen["conv_in"]), "Conv_1": nhwc(seen["conv_out"]), "Dense_0": seen["dense1"], "Dense_1": seen["dense2"]}
    out |= {f"ResBlock_{i}": nhwc(seen[f"blocks.{i}"]) for i in range(len(net.blocks))}
    out |= {"blur": nhwc(maskgit.downsample(real)), "blur_odd": nhwc(maskgit.downsample(real[:, :, :7, :7]))}
    logits, r1 = maskgit.r1_penalty(net, real)
    out |= {"real_logit": logits, "fake_logit": net(fake), "r1": maskgit.Config().r1_weight * r1, "real_logit_avgpool": nets[1](real)}
    for gan in ("non-saturating", "hinge"):
        found = maskgit.generator_loss(maskgit.Config(gan=gan), real, fake, 0, None, net)[1]
        out |= {f"d_loss/{gan}": maskgit.discriminator_loss(gan, logits, out["fake_logit"]), f"g_loss/{gan}": found["g_loss"]}
    return out


@checks("maskgit_transformer")
def maskgit_transformer(golden, inputs):
    wanted, c, tokens, labels = golden["outputs"], golden["config"], inputs["ids"], inputs["label"]
    net, V, n = maskgit.from_official(params_of(golden, layout="flax"), c), c["codebook_size"], inputs["ids"].shape[1]
    assert net.config.heads == c["num_heads"] and net.config.num_classes == c["num_class"]
    mask = inputs["mask"].bool()
    mask[1, :n // 2] = False
    sequence = net.sequence(tokens.masked_fill(mask, -1), labels)
    out, x = {"embed": net.embed(sequence), "embed_ln": net.embed(sequence)}, net.embed(sequence)
    for i, layer in enumerate(net.layers):
        out[f"layer{i}/self_attention"] = layer.attention(x)
        out[f"layer{i}/attention"] = layer.attention_output_ln(x + out[f"layer{i}/self_attention"])
        out[f"layer{i}/mlp"] = x = layer(x)
    whole = lambda h: F.linear(h, net.word_embeddings.weight, net.mlm_bias)         # the release's logits also have classes and [MASK]
    out["mlm_ln"] = net.features(sequence)
    out["logits"] = whole(out["mlm_ln"])
    out["logits_all_masked"] = whole(net.features(net.sequence(torch.full_like(tokens, -1), labels)))
    torch.testing.assert_close(net(tokens, labels, mask), out["logits"][:, 1:, :V])
    for name in wanted:
        if match := re.fullmatch(r"loss/(\w+)_smooth([\d.]+)(_mean_over_all_masked)?", name):
            smoothing, logits = float(match[2]), out["logits"][:, 1:]
            logits = logits[..., :V] if match[1] == "codebook" else logits
            each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none", label_smoothing=smoothing) * mask
            out[name] = each.sum() / mask.sum() if match[3] else (each.sum(1) / mask.sum(1)).mean()
            if match[1] == "codebook" and not match[3]:
                net.config = dataclasses.replace(net.config, label_smoothing=smoothing)
                out[name], found = net.loss(tokens, labels, mask)       # these are the file's own; the others show what it does not do
                assert smoothing or torch.equal(out[name], found["nats"])
    out |= flax_grads(net, out["loss/codebook_smooth0.1"], "grad/", golden)
    with torch.no_grad():
        for table in (net.word_embeddings, net.position_embeddings):
            table.weight *= 0.001
    return out | {"tiny/embed": net.embed(sequence)}


def official_method(name):
    """The release's names of the schedules are others than the paper's, but for pow..., cosine and log."""
    return {"uniform": "linear", "exp": "exponential"}.get(name, name)


@checks("maskgit_schedules")
def maskgit_schedules(golden, inputs):
    methods = [official_method(name) for name in re.search(r"method order (.*?), ratio", golden["notes"]["mask_ratio"])[1].split()]
    ratios, out = torch.arange(golden["config"]["ratios"] + 1) / golden["config"]["ratios"], {}
    for N in golden["config"]["totals"]:
        out[f"mask_ratio/N{N}"] = torch.stack([maskgit.schedule(ratios, N, method) for method in methods])
        logits = [value for value in inputs.values() if value.shape[1] == N]
        for T in golden["config"]["iters"] if logits else ():
            def prior(tokens, labels=None, logits=logits):
                return logits[0]
            prior.config, counts = maskgit.Config(num_classes=0, guidance=1.0), []
            for method in methods:
                maskgit.parallel_decode(prior, torch.full((1, N), -1), steps=T, method=method, generator=torch.Generator().manual_seed(0),
                                        trace=(trace := []))
                counts.append(torch.stack([step["masked"].sum() for step in trace]))
            out[f"masked_counts/N{N}_T{T}"] = torch.stack(counts)
    return out


@checks("maskgit_decode")
def maskgit_decode(golden, inputs):
    c, out = golden["config"], {}
    net = maskgit.from_official(params_of(golden, layout="flax"), c["transformer"])
    B, n, V, labels = c["batch"], c["transformer"]["latent"] ** 2, c["transformer"]["codebook_size"], inputs["decode_label"]
    blank, known = torch.full((B, n), -1), inputs["decode_keep"].bool()
    known[1, :n // 2] = True
    edit = inputs["decode_ids"].masked_fill(~known, -1)
    row = lambda tokens: torch.cat([V + labels[:, None], tokens], 1)
    for name in {key.split("/")[0] for key in golden["outputs"]} - {"topk"}:
        editing, zero, method = name.startswith("edit"), "zero" in name, official_method(name.partition("noise_")[2] or "cosine")
        tokens, steps, start = (edit, c["edit_iter"], c["start_iter"]) if editing else (blank, c["num_iter"], 0)
        kind, trace = "edit" if editing else "decode", []

        def noise(like, generator=None, kind=kind, zero=zero, trace=trace, start=start):
            given = inputs[f"{kind}_cat_noise" if like.ndim == 3 else f"{kind}_gumbel_noise"][len(trace) + start]
            return torch.zeros_like(like) if zero else given[:, 1:]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(maskgit, "gumbel", noise)
            result = maskgit.parallel_decode(net, tokens, labels, steps=steps, start=start, method=method,
                                             choice_temperature=c["choice_temperature"], trace=trace)
        drawn = [row(step["tokens"]) for step in trace]
        carried = [row(step["tokens"].masked_fill(step["masked"], -1)) for step in trace]
        assert torch.equal(result, trace[-1]["tokens"])
        out |= {f"{name}/final_seqs": torch.stack([row(tokens)] * start + drawn, 1), f"{name}/after_masking": torch.stack(carried),
                f"{name}/masked_counts": torch.stack([step["masked"].sum(1) for step in trace])}
    p = inputs["topk_probs"].softmax(-1)
    p[1, 3:6], p[2, 5:], p[3] = p[1, 2].clone(), np.inf, np.inf
    for name in golden["outputs"]:
        if match := re.fullmatch(r"topk/temp([\d.]+)_len(\d+)", name):
            number = torch.full((len(p),), int(match[2]))
            out[name] = maskgit.least_confident(p.log() + float(match[1]) * inputs["topk_noise"], number)
    return out


@checks("var_tokenizer")
def var_tokenizer(golden, inputs):
    wanted, net = golden["outputs"], var.from_official(params_of(golden), golden["config"])
    q, f = net.quantize, net.latents(inputs["image"])
    assert q.phi_of == golden["phi_of_scale"]
    tokens = net.encode(inputs["image"])
    with recorded(net, wanted) as out:
        net.encoder(inputs["image"])
        img = net.decode(tokens)
    out |= {"f": f, "img": img.clamp(-1, 1), "var_input": q.inputs(tokens), **multiscale(q, f)}
    out |= {f"recon_scale{k}": net.decode(tokens, k + 1).clamp(-1, 1) for k in range(len(q.scales))}
    out |= {"from_idx/var_input": q.inputs(inputs["idx"]), "from_idx/img": net.decode(inputs["idx"]).clamp(-1, 1)}
    out |= {f"from_idx/f_hat{k}": f_hat for k, f_hat in enumerate(q.sums(inputs["idx"]))}
    for name in wanted:
        if name.startswith("tiny/"):
            out[name] = net.get_submodule(name[5:])(0.001 * inputs["tiny"]) * (10 if "attn" in name else 1)
    rec, found = net(inputs["image"])
    loss = found["codebook_loss"] + (rec * inputs["probe"]).mean()
    out |= {"train/rec": rec, "train/vq_loss": found["codebook_loss"], "train/loss": loss}
    official = lambda name: name.replace("quantize.phi", "quantize.quant_resi.qresi_ls")
    net.zero_grad()
    (1000 * loss).backward()
    out |= {f"train/grad/{official(name)}": p.grad.clone() for name, p in net.named_parameters() if f"train/grad/{official(name)}" in wanted}
    net.zero_grad()
    leaf = f.detach().requires_grad_()
    (1000 * q(leaf)[2]).backward()
    return out | {"train/grad_vq_only/f": leaf.grad, "train/grad_vq_only/quantize.embedding.weight": q.embedding.weight.grad}


def multiscale(q, f):
    """Per scale: rest, z, smallest distance, index, enlarged codes, phi of them, running sum; what is left at the end."""
    out, f_hat, side = {}, 0, q.scales[-1]
    for k, (z, tokens, h) in enumerate(q.steps(f)):
        p, rest = q.scales[k], f - f_hat
        f_hat = f_hat + h
        codes = q.lookup(tokens)
        out |= {f"scale{k}/rest": rest, f"scale{k}/z": z.view(len(f), p, p, -1).permute(0, 3, 1, 2), f"scale{k}/idx": tokens,
                f"scale{k}/dist_min": (z - q.embedding(tokens).flatten(0, 1)).square().sum(1).view(len(f), -1), f"scale{k}/phi": h,
                f"scale{k}/f_hat": f_hat, f"scale{k}/up": F.interpolate(codes, (side, side), mode="bicubic")}
        torch.testing.assert_close(z.view(len(f), p, p, -1).permute(0, 3, 1, 2), q.shrink(rest, k))
    return out | {"rest_final": f - f_hat}


@checks("var_quantizer10")
def var_quantizer10(golden, inputs):
    c = golden["config"]
    q = var.MultiScaleQuantizer(c["v_patch_nums"], c["vocab_size"], c["z_channels"], c["beta"])
    assert q.phi_of == golden["phi_of_scale"]
    q.load_state_dict({name.removeprefix("quantize.").replace("quant_resi.qresi_ls", "phi"): p for name, p in params_of(golden).items()})
    f_hat, tokens, loss = q(inputs["f10"])
    assert torch.equal(tokens, q.indices(inputs["f10"]))
    return {**multiscale(q, inputs["f10"]), "var_input": q.inputs(tokens), "from_idx/var_input": q.inputs(inputs["idx10"]),
            "from_idx/f_hat": q.sums(inputs["idx10"])[-1], "train/vq_loss": loss, "train/f_hat": f_hat}


@checks("var_transformer_shared")
@checks("var_transformer")
def var_transformer(golden, inputs):
    wanted, c = golden["outputs"], golden["config"]
    net = var.from_official(params_of(golden), c["var"])
    tokenizer = var.from_official(params_of(golden, "params_vae"), c["vae"])
    q, label, K = tokenizer.quantize, inputs["label"], len(net.config.scales)
    x, cond = inputs["x_BLCv_wo_first_l"], net.class_emb(label)
    given = []
    hooks = [module.register_forward_pre_hook(lambda module, args: given.append(args[0])) for module in (net.blocks[0].attn, net.head)]
    with recorded(net, wanted) as out:
        logits = net(None, label, x)
    for hook in hooks:
        hook.remove()
    out |= {"attn_visible": (net.level[:, None] >= net.level).float(), "input_tokens": net.embed(cond, x), "blocks.0.attn_in": given[0], "head_nm": given[1],
            "logits": logits, "logits_uncond": net(None, None, x)}
    if net.config.shared_adaln:
        out["cond_gss"] = net.shared_ada_lin(cond).view(len(cond), 1, 6, -1)
    # a loss takes tokens; here the inputs are given and belong to no tokens
    net.inputs_of = lambda tokens: x
    smoothed = var.dataclasses.replace(net.config, label_smoothing=0.1)
    out["loss_ls0"] = net.loss(inputs["target"], label)[0]
    out |= grads(net, out["loss_ls0"], "grad/", wanted)
    net.config, plain = smoothed, net.config
    out["loss_ls0.1"], net.config = net.loss(inputs["target"], label)[0], plain
    scales = [block.attn.scale_mul_1H11.data.clone() for block in net.blocks]
    for block in net.blocks:
        block.attn.scale_mul_1H11.data.fill_(6.0)
    out["logits_scale_mul_6"] = net(None, label, x)
    for block, scale in zip(net.blocks, scales):
        block.attn.scale_mul_1H11.data = scale
    tiny = 0.001 * inputs["tiny"]
    sixes, last = net.modulation(cond)
    out |= {"tiny/block0": net.blocks[0](tiny, sixes[0]), "tiny/logits": net.head(var.modulated(tiny, *last))}
    steps = range(0, 2000, 37)
    rates, decays = zip(*(var.lr_and_decay(step, 2000, 40, 0.01, 0.05, 0.08) for step in steps))
    out |= {"schedule/lr": 1e4 * 3.2e-4 * torch.tensor(rates), "schedule/wd": torch.tensor(decays)}
    for name in wanted:
        if match := re.fullmatch(r"sampler/probs_k(\d+)_p([\d.]+)", name):
            out[name] = var.filter_logits(2 * inputs["sampler_logits"], int(match[1]), float(match[2]) or 1.0).softmax(-1)
    sampled = functools.partial(var.sample, tokenizer, net, guidance=1 + c["cfg"])
    image = lambda x: (x + 1) / 2
    # forced: all tokens are known; the raw logits are those of one pass over these tokens
    forced = {"forced/img": image(sampled(label, known=inputs["idx"], trace=(trace := [])))}
    net.inputs_of = q.inputs
    both = q.split(torch.cat([net(inputs["idx"], label), net(inputs["idx"], None)]))
    for k, step in enumerate(trace):
        forced |= {f"forced/stage{k}/logits": both[k], f"forced/stage{k}/cfg_logits": step["logits"], f"forced/stage{k}/f_hat": step["f_hat"]}
        if k + 1 < K:
            forced[f"forced/stage{k}/next"] = q.shrink(step["f_hat"], k + 1)
    out |= forced
    runs = {"greedy": dict(labels=label, top_k=1)}
    if "smooth/img" in wanted:
        runs["smooth"] = dict(labels=label, top_k=20, top_p=0.9, smooth=True)
        S = net.config.image_size
        keep = var.kept_tokens((S // 4, S // 4, S // 2, S // 2), net.config.scales, S)
        runs["edit"] = dict(labels=torch.full_like(label, net.config.num_classes), top_k=1, known=inputs["idx"].masked_fill(~keep, -1))
    for name, more in runs.items():
        noise = iter([inputs.get(f"gumbel{k}") for k in range(K)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(var, "gumbel", lambda like, generator=None, noise=noise: next(noise))
            out[f"{name}/img"] = image(sampled(**more, trace=(trace := [])))
        for k, step in enumerate(trace):
            out |= {f"{name}/stage{k}/cfg_logits": step["logits"], f"{name}/stage{k}/idx": step["logits"].argmax(-1),
                    f"{name}/stage{k}/f_hat": step["f_hat"], f"{name}/stage{k}/h": step["codes"]}
            if name == "edit":
                side = net.config.scales[k]
                out[f"edit/stage{k}/keep"] = q.split(keep[None])[k].view(1, side, side).expand(len(label), -1, -1).float()
    return out


@checks("mar_vae")
def mar_vae(golden, inputs):
    wanted, net = golden["outputs"], mar.from_official(params_of(golden), golden["config"])
    with recorded(net, wanted) as out:
        posterior = net.posterior(inputs["image"])
    moments = net.quant_conv(out["encoder"])
    with recorded(net, [name[7:] for name in wanted if name.startswith("decode/")], "decode/") as decoded:
        z = net.normalise(inputs["latent"])
        decoded["decode/rec"] = net.decode(z)
    sample = posterior.sample(inputs["noise"])
    rec = net.decode(net.encode(inputs["image"], inputs["noise"]))
    out |= decoded | {"moments": moments, "mean": posterior.mean, "logvar": posterior.log_variance, "std": (0.5 * posterior.log_variance).exp(),
                      "sample": sample, "kl": posterior.kl(), "nll": posterior.nll(inputs["latent"]), "scaled_sample": net.encode(inputs["image"], inputs["noise"]),
                      "moments_flip": net.quant_conv(net.encoder(inputs["image"].flip(3))), "clamp/logvar": mar.Posterior(100 * moments).log_variance,
                      "rec_mode": net.decode(net.encode(inputs["image"])), "rec_sample": rec}
    loss = (rec * inputs["probe"]).mean() + 1e-3 * posterior.kl().mean()
    out |= {"train/loss": loss, **grads(net, loss, "train/grad/", wanted)}
    return out | {name: net.get_submodule(name[5:])(0.001 * inputs["tiny"]) for name in wanted if name.startswith("tiny/")}


def damped(diffloss, damp):
    """The last layer times damp, as the notes say: untrained, it would give x0 of 1e4."""
    diffloss.net.final_layer.linear.weight.data *= damp
    diffloss.net.final_layer.linear.bias.data *= damp


@checks("mar_diffloss")
def mar_diffloss(golden, inputs):
    wanted, c, given = golden["outputs"], golden["config"], golden["given"]
    head = mar.DiffLoss(c["target_channels"], c["z_channels"], c["width"], c["depth"])
    head.load_state_dict(params_of(golden))
    net, t, mask = head.net, torch.tensor(given["t"]), torch.tensor(given["mask"])
    out, chains = {}, {"train": head.chain} | {f"gen{S or ''}": mar.Chain.respaced(S or int(c["num_sampling_steps"])) for S in (0, 100, 250, 50)}
    official = {"log_betas": "log_beta", "posterior_log_variance_clipped": "log_variance", "posterior_mean_coef1": "coef1", "posterior_mean_coef2": "coef2"}
    for name, chain in chains.items():
        out |= {f"{name}/{theirs}": chain.tables[ours] for theirs, ours in official.items()}
        out |= {f"{name}/log_alphas_cumprod": 2 * chain.tables["signal"].log(), f"{name}/timestep_map": chain.times}
    x, z, eps = inputs["x"], inputs["z"].clone().requires_grad_(), inputs["eps"]
    out |= {"time_embedding": net.time_embed.waves(t), "x_t": head.chain.noised(x, t, eps)}
    with recorded(net, [name[4:] for name in wanted if name.startswith("net/")], "net/") as inside:
        mse, vb = head.loss(x, z, t, eps)
    out |= inside
    y = net.time_embed(t) + net.cond_embed(z)
    out["net/eps"], out["net/v"] = net(out["x_t"], y)
    loss = ((mse + vb) * mask).sum() / mask.sum()
    out |= {"loss/mse": mse, "loss/vb": vb, "loss/loss": mse + vb, "loss/masked": loss, "loss/unmasked": (mse + vb).mean()}
    out |= grads(head, loss, "grad/", wanted, 100) | {"grad/z": z.grad}
    tiny = 0.001 * inputs["tiny"]
    for name in wanted:
        if name.startswith("tiny/"):
            out[name] = net.get_submodule(name[5:])(tiny, y[:len(tiny)])
    chain = chains["gen"]
    for i, time in enumerate(chain.times):
        where = torch.full((len(x),), i)
        eps_v = head.predict(inputs["x_step"], net.time_embed(time[None]) + net.cond_embed(z))
        out |= dict(zip((f"step{i}/mean", f"step{i}/log_variance", f"step{i}/pred_xstart"), chain.back(inputs["x_step"], where, *eps_v)))
        out[f"step{i}/sample"] = chain.step(inputs["x_step"], i, *eps_v, inputs["noise_step"], given["temperature"])
    both = torch.cat([z, inputs["z_uncond"]])
    out["cfg/eps"], out["cfg/v"] = head.predict(inputs["x_step"], net.time_embed(t).repeat(2, 1) + net.cond_embed(both), given["cfg"])
    settings = {"t1": {}, "temp": dict(temperature=given["temperature"]),
                "cfg": dict(z_null=inputs["z_uncond"], guidance=given["cfg"], temperature=given["temperature"])}

    def sampled(chain, draws, damp, more):
        noise = iter([damp * draws[0], *draws[1:]])
        return head.sample(inputs["z"], chain=chain, draw=lambda *shape: next(noise), **more)
    out |= {f"times/{name}": sampled(mar.Chain(given["times"]), inputs["draws_times"], 1, more) for name, more in settings.items()}
    damped(head, given["damp"])
    out |= {f"sample/{name}": sampled(chain, inputs["draws"], given["damp"], more) for name, more in settings.items()}
    return out | {"sample100/cfg": sampled(chains["gen100"], inputs["draws100"], given["damp"], settings["cfg"])}


@checks("mar_transformer")
def mar_transformer(golden, inputs):
    wanted, c, given = golden["outputs"], golden["config"], golden["given"]
    net = mar.from_official(params_of(golden), c)
    labels, orders = inputs["labels"].long(), inputs["order_keys"].argsort(1)
    tokens, mask = mar.patchify(inputs["latents"], c["patch_size"]), orders.argsort(1) < given["num_masked"]
    entered = {}
    hooks = [getattr(net, f"{part}_blocks")[0].register_forward_pre_hook(lambda module, args, part=part: entered.setdefault(f"{part}_in", args[0]))
             for part in ("encoder", "decoder")]
    with recorded(net, wanted) as out:
        z = net(tokens, labels, mask)
    for hook in hooks:
        hook.remove()
    dropped = torch.cat([torch.full_like(labels[:1], c["class_num"]), labels[1:]])
    out |= entered | {"orders": orders, "tokens": tokens, "patch2/tokens": mar.patchify(inputs["latents"], 2), "mask": mask.float(), "z": z,
                      "z_fake": net(tokens, None, mask), "z_all_masked": net(tokens, labels), "z_train_first_dropped": net(tokens, dropped, mask)}
    assert torch.equal(mar.unpatchify(mar.patchify(inputs["latents"], 2), 2), inputs["latents"])
    tiled = lambda x: x.unflatten(0, (c["diffusion_batch_mul"], *tokens.shape[:2])).transpose(0, 1)
    out["loss"] = net.loss(tokens, labels, mask, tiled(inputs["t"].long()), tiled(inputs["eps"]))[0]
    out |= grads(net, out["loss"], "grad/", wanted, 100)
    names = {id(p): name for name, p in net.named_parameters()}
    assert sorted(names[id(p)] for p in mar.parameter_groups(net)[0]["params"]) == sorted(given["decayed"])
    out |= {name: net.get_submodule(name[5:])(0.001 * inputs["tiny"]) for name in wanted if name.startswith("tiny/")}
    damped(net.diffloss, given["damp"])
    plain = argparse.Namespace(config=net.config, decode=lambda latents: latents)
    for name in (name for name in given if name.startswith("gen/")):
        g, trace = given[name], []
        draws = [inputs[f"draws_n{g['num_iter']}_step{s}"] for s in range(g["num_iter"])]
        noise = iter([x for d in draws for x in (given["damp"] * d[0], *d[1:])])
        mar.sample(plain, net, torch.full_like(labels, c["class_num"]) if "unlabelled" in name else labels, sample_steps=g["num_iter"],
                   denoise_steps=int(c["num_sampling_steps"]), temperature=g["temperature"], guidance=g["cfg"], guidance_schedule=g["cfg_schedule"],
                   order=orders, draw=lambda *shape, noise=noise: next(noise), trace=trace)
        assert [int(step["chosen"][0].sum()) for step in trace] == g["tokens_per_step"]
        assert [step["guidance"] for step in trace] == pytest.approx(g["cfg_per_step"])
        out[f"{name}/latents"] = mar.unpatchify(trace[-1]["tokens"], c["patch_size"])
        for s, step in enumerate(trace):
            z, *fake = step["z"].split(int(step["chosen"].sum()))
            out |= {f"{name}/step{s}/z": z, f"{name}/step{s}/sampled": step["drawn"]} | ({f"{name}/step{s}/z_fake": fake[0]} if fake else {})
    return out


@checks("mar_schedules")
def mar_schedules(golden, inputs):
    c, out = golden["config"], {}
    for N in c["num_iter"]:
        left, guidance = zip(*mar.schedule(c["seq_len"], N, c["cfg"]))
        assert list(left) == golden["given"][f"masked_after_step_n{N}"]
        out |= {f"n{N}/masked_after_step": torch.tensor(left), f"n{N}/cfg_linear": torch.tensor(guidance)}
    ratio = mar.mask_ratio((torch.arange(64, dtype=torch.float64) + 0.5) / 64, c["mask_ratio_min"])
    fine = mar.mask_ratio((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000, c["mask_ratio_min"])
    out |= {"mask_ratio_quantiles": ratio, "num_masked_quantiles": (c["seq_len"] * ratio).ceil(), "mask_ratio_mean": fine.mean()}
    for name, cosine in (("lr_constant", False), ("lr_cosine", True)):
        rates = [mar.learning_rate(k * c["epochs"] / 64, c["epochs"], c["lr"], c["warmup_epochs"], cosine, c["min_lr"]) for k in range(64)]
        out[name] = 1e4 * torch.tensor(rates)
    for i, (*_, size) in enumerate(c["crops"]):
        image = Image.fromarray(inputs[f"crop{i}"].numpy().astype(np.uint8))
        out[f"crop{i}"] = torch.from_numpy(np.asarray(mar.center_crop(image, size)).astype(np.float32))
    return out


to_last, to_second = lambda x: x.movedim(1, -1), lambda x: x.movedim(-1, 1)     # channels: N,C,T,H,W -> N,T,H,W,C, and back


def magvit_load(golden, config, prefix=""):
    """The golden file's parameters `prefix/...` -> the net that they fit, {official name: ours}."""
    inside = (lambda name: name.startswith(prefix)) if prefix else (lambda name: not name.startswith(("2d/", "d2/", "d3/", "strided/")))
    net = magvit.from_official({name.removeprefix(prefix): value for name, value in params_of(golden, layout="flax").items() if inside(name)}, config)
    return net, {theirs: ours for ours, theirs in magvit.flax_names(net).items()}


def magvit_modules(net, names):
    """{official module: ours} of everything that has parameters, residual blocks and layers included."""
    found = {}
    for theirs, ours in names.items():
        while "/" in theirs and "." in ours:
            theirs, ours = theirs.rpartition("/")[0], ours.rpartition(".")[0]
            found[theirs] = ours
    return found


def magvit_config(c, **more):
    return magvit.Config(**dict(tasks="CG", frames=c.get("frames", 16), image_size=c["image_size"], ch=c["filters"], groups=32, ch_mult=c["channel_multipliers"],
                                temporal=c["temporal_downsample"], num_res_blocks=c["num_enc_res_blocks"], num_res_blocks_decoder=c["num_dec_res_blocks"],
                                code_dim=c["embedding_dim"], codebook_size=c["codebook_size"], beta=c["commitment_cost"],
                                entropy_weight=c["entropy_loss_ratio"], entropy_temperature=c["entropy_temperature"]) | more)


@checks("magvit_tokenizer")
def magvit_tokenizer(golden, inputs):
    c, build, out = golden["config"], lambda **more: magvit.VideoTokenizer(magvit_config(golden["config"], **more)), {}
    (net, names), video = magvit_load(golden, magvit_config(c)), to_second(inputs["video"])
    modules = {theirs: ours for theirs, ours in magvit_modules(net, names).items() if theirs in golden["outputs"]}
    decoded = lambda net, ids: net.decoder(net.quantize.lookup(ids.flatten(1, 2)).view(len(ids), -1, *ids.shape[1:]))
    with recorded(net, modules.values()) as seen:
        z = net.encoder(video)
        q, indices, losses = net.quantized(z)
        again = net.decoder(q)
    out |= {theirs: to_last(seen[ours]) for theirs, ours in modules.items()}
    flat, e = to_last(z).flatten(0, 3), net.quantize.embedding.weight
    distance = (flat[:, None] - e).square().sum(-1)
    assert torch.equal(net.encode(2 * video - 1), indices)
    torch.testing.assert_close(net(2 * video - 1)[0], 2 * again - 1)
    torch.testing.assert_close(net.decode(inputs["ids"]), 2 * decoded(net, inputs["ids"]) - 1)
    out |= {"z": to_last(z), "dist_min": distance.min(1).values.view(indices.shape), "indices": indices, "quantized": to_last(q), "recon": to_last(again),
            "loss/quantizer_loss": sum(losses.values()), "loss/e_latent_loss": losses["commitment"], "loss/q_latent_loss": losses["codebook"],
            "loss/entropy_loss": losses["entropy"], "from_ids/recon": to_last(decoded(net, inputs["ids"])),
            "tiny/z": to_last(net.encoder(0.001 * to_second(inputs["tiny"])))}
    for name, temperature, kind in (("softmax", c["entropy_temperature"], "softmax"), ("argmax", c["entropy_temperature"], "argmax"), ("T1", 1.0, "softmax")):
        total, log_p = magvit.entropy_loss(-distance, temperature, kind), (-distance / temperature).log_softmax(-1)
        each = -(log_p.max(-1).values if kind == "argmax" else (log_p.exp() * log_p).sum(-1)).mean()
        out |= {f"loss/entropy_{name}/{part}": value for part, value in (("sample", each), ("total", total), ("avg", each - total))}
    for ours, theirs in (("reflect", "reflect"), ("replicate", "edge")):
        padded = build(padding=ours)
        padded.load_state_dict(net.state_dict())
        out |= {f"pad_{theirs}/z": to_last(padded.encoder(video)), f"pad_{theirs}/from_ids/recon": to_last(decoded(padded, inputs["ids"]))}
    flat_net, _ = magvit_load(golden, magvit_config(c, time_kernel=1, frame_norm=True, temporal=len(c["temporal_downsample"]) * (False,)), "2d/")
    out |= {"2d/z": to_last(flat_net.encoder(video)), "2d/from_ids/recon": to_last(decoded(flat_net, inputs["ids2d"]))}
    for how in ("central", "average"):
        inflated = magvit.inflate(build(), flat_net, how)
        out |= {f"inflate_{how}/z": to_last(inflated.encoder(video)), f"inflate_{how}/from_ids/recon": to_last(decoded(inflated, inputs["ids"]))}
    net, video = net.double(), video.double()       # at temperature 0.01 the entropy's gradient is off by 4e-4 in float32, the official one by 1e-4
    q, _, losses = net.quantized(net.encoder(video))
    again = net.decoder(q)
    loss = 100 * (sum(losses.values()) + F.mse_loss(again, video) + (to_last(again) * inputs["probe"]).mean())
    return out | {"train/loss_x100": loss} | flax_grads(net, loss, "grad/", golden, 1, names)


@checks("magvit_losses")
def magvit_losses(golden, inputs):
    c, out = golden["config"], {}
    config = magvit.Config(tasks="CG", frames=c["T"], image_size=c["S"], disc_width=c["filters"], disc_mult=c["disc_mult"])
    (net, names), real, fake = magvit_load(golden, config, "d3/"), to_second(inputs["real"]), to_second(inputs["fake"])
    modules = {theirs: ours for theirs, ours in magvit_modules(net, names).items() if f"d3/{theirs}" in golden["outputs"]}
    modules |= {theirs: ours for theirs, ours in (("Conv_0", "conv_in"), ("Conv_1", "conv_out"), ("Dense_0", "dense1"), ("Dense_1", "dense2"))}
    with recorded(net, modules.values()) as seen:
        out["d3/logit_real"] = net(real)
    out |= {f"d3/{theirs}": to_last(seen[ours]) if seen[ours].ndim == 5 else seen[ours] for theirs, ours in modules.items()}
    logits, r1 = magvit.r1_penalty(net, real)
    torch.testing.assert_close(logits, out["d3/logit_real"])
    out |= {"d3/logit_fake": net(fake), "d3/r1_x1e4": 1e5 * r1} | flax_grads(net, r1, "d3/grad_r1_x1e5/", golden, 1e6, names, "d3/")   # the weight 10 is in both
    frames, _ = magvit_load(golden, config.of_images, "d2/")
    out["d2/logit_real_blur0"] = frames(real.transpose(1, 2).flatten(0, 1)[:, :, None]).view(*inputs["real"].shape[:2], 1)
    out |= dict.fromkeys(("pool/odd", "pool/odd_t"), to_last(magvit.MeanPool((2, 2, 2))(to_second(inputs["odd"]))))
    real, fake = inputs["logit_real"], inputs["logit_fake"]
    for gan in ("hinge", "non-saturating"):
        out |= {f"d_loss/{gan}": magvit.discriminator_loss(gan, real, fake), f"g_loss/{gan}": magvit.adversarial_loss(gan, fake)}
    lecam = lambda *ema: magvit.lecam(real, fake, *map(torch.tensor, ema))
    return out | {"lecam": lecam(0.3, -0.2), "lecam_ema0": lecam(0.0, 0.0)}


MAGVIT_TASKS = dict(full_generation="CG", frame_prediction="FP", frame_prediction_cfp="CFP", frame_interpolation="FI", outpainting_h="OPH", outpainting_v="OPV",
                    outpainting_c="OPC", outpainting_dv="OPD", inpainting_c="IPC", inpainting_dv="IPD")


def magvit_prefix(task, labels, config):
    """The prefix of a task, without its class where it has none, and the release's ids of it (special rows are negative there)."""
    prefix = magvit.prefix_of(len(labels) * [task], labels if task in ("CG", "CFP") else torch.full_like(labels, config.num_classes), config)
    return prefix, torch.where(prefix >= config.rows - 16, prefix - config.rows, prefix)


@checks("magvit_commit")
def magvit_commit(golden, inputs):
    c, out, B = golden["config"], {}, golden["config"]["B"]
    config, grid, labels = magvit.Config(codebook_size=c["K"], num_classes=c["classes"]), (c["lt"], c["ls"], c["ls"]), inputs["label"][:, 0]
    z, z_cond, scores = (inputs[name].flatten(1) for name in ("z", "z_cond", "score"))
    logits, video, ratio = [inputs["logits"][:, 2:]], to_second(inputs["video"]), torch.linspace(0.25, 0.9, B)
    prior = argparse.Namespace(config=config)
    for name in c["tasks"]:
        task = MAGVIT_TASKS[name]
        known = magvit.region(task, grid).expand(B, *grid).flatten(1)
        if magvit.TASKS[task][1]:
            out |= {f"{name}/cond_video": to_last(magvit.condition_video(task, video, black=0.0)), f"{name}/latent_mask": known.view(B, *grid),
                    f"{name}/video_mask": magvit.region(task, video.shape[2:]).expand(B, *video.shape[2:])[..., None]}
        shown, targets, weights, hidden = magvit.hide(z, z_cond, known, scores, ratio)
        out |= {f"{name}/masked_inputs": torch.cat([magvit_prefix(task, labels, config)[1], shown], 1), f"{name}/segment_ids": F.pad((hidden & known).long(), (2, 0)),
                f"{name}/uncond_masked_inputs": torch.cat([magvit_prefix("CG", torch.full_like(labels, c["classes"]), config)[1], shown.masked_fill(hidden, -1)], 1),
                f"{name}/weights": F.pad(weights.float(), (2, 0))}
        nats = magvit.MagvitTransformer.nats(prior, logits, targets)
        out |= {f"{name}/loss_ls{s}": magvit.weighted_mean(magvit.MagvitTransformer.nats(prior, logits, targets, s), weights) for s in (0.0, 0.0001)}
        out |= {f"{name}/ce_{part}": magvit.weighted_mean(nats, where) for part, where in (("refine", hidden & known), ("mask", hidden & ~known), ("recons", ~hidden))}
    known = magvit.region("OPC", grid).expand(B, *grid).flatten(1)
    for theirs, mode in (("None", "ignore"), ("cond2input", "commit"), ("input2input", "keep"), ("cond2cond", "paste")):
        shown, targets, maskable, hidden = magvit.hide(z, z_cond, known, scores, ratio, mode)
        for loss, weights in (("mask+refine", hidden), ("mask+refine+recons", maskable)):
            out |= {f"mask/{theirs}/{loss}/{what}": x.view(B, *grid) for what, x in (("masked_inputs", shown), ("weights", weights), ("targets", targets))}
    out["mask/limits/weights"] = magvit.hide(z, z_cond, known, scores, 1e-6, "ignore", most=torch.tensor([5, 2, 9]))[3].view(B, *grid)
    for theirs, method in (("uniform", "linear"), ("pow2", "square"), ("pow3.5", "pow3.5"), ("cosine", "cosine"), ("log", "log"), ("exp", "exponential")):
        out |= {f"schedule/{theirs}/{total}": magvit.schedule(torch.linspace(0.02, 0.98, 25), total, method) for total in (64, 1024)}
    return out


def magvit_bert(golden):
    c = golden["config"]
    net, names = magvit_load(golden, magvit.Config(
        tasks="CG FP CFP OPC IPD", frames=c["lt"], image_size=c["ls"], ch_mult=(1,), temporal=(), codebook_size=c["K"], num_classes=c["classes"], width=c["width"], heads=c["heads"],
        layers=c["layers"], mlp_ratio=c["mlp"] // c["width"], label_smoothing=c.get("smoothing", 0.0)))
    assert net.config.rows == c["vocab"]
    return net, names


@checks("magvit_transformer")
def magvit_transformer(golden, inputs):
    c, pick, codes = golden["config"], inputs["pick"], inputs["codes"]
    net, names = magvit_bert(golden)
    ids = torch.where(pick == 0, magvit.MASK, codes)
    ids[:, 0], ids[:, 1] = -3 - torch.arange(len(ids)), c["K"] + torch.arange(len(ids))
    rows, modules = ids % net.config.rows, magvit_modules(net, names)
    modules = {theirs: ours for theirs, ours in modules.items() if theirs in golden["outputs"]}
    modules |= {f"BertLayer_{i}": f"layers.{i}" for i in range(c["layers"])}
    modules = {theirs: ours for theirs, ours in modules.items() if not re.search(r"Attention_0$|Mlp_0$|self_attention$|Embed_0|BertMlmLayer_0$", theirs)}
    with recorded(net, modules.values()) as seen:
        embedded = net.embed(rows[:, :2], ids[:, 2:])
        features = net.features(embedded)
    out = {theirs: seen[ours] for theirs, ours in modules.items()}
    logits = F.linear(features, net.word_embeddings.weight, net.mlm_bias)
    [ours] = net(rows[:, :2], ids[:, 2:])
    torch.testing.assert_close(ours, logits[:, 2:, :c["K"]])
    out |= {"ids": ids, "BertEmbed_0": embedded, "BertEmbed_0/embeddings_ln": embedded, "BertEmbed_0/word_embeddings": net.word_embeddings(rows),
            "BertEmbed_0/position_embeddings": net.position_embeddings.weight[None], "BertMlmLayer_0": logits, "logits": logits,
            "logits_codes": logits[..., :c["K"]], "BertMlmLayer_0/mlm_ln": features}
    for i in range(c["layers"]):
        layer, attention = f"BertLayer_{i}", f"BertLayer_{i}/BertAttention_0"
        for name in (f"{attention}/self_attention/{x}" for x in ("query", "key", "value")):
            out[name] = out[name].unflatten(-1, (c["heads"], -1)) if name in out else None
        out |= {attention: out.get(f"{attention}/attention_output_ln"), f"{attention}/self_attention": out.get(f"{attention}/self_attention/out"),
                f"{layer}/BertMlp_0": out.get(f"{layer}/BertMlp_0/layer_output_ln")}
    nats = net.nats([ours], codes[:, 2:], c["smoothing"])
    out |= {"loss_masked": magvit.weighted_mean(nats, (pick == 0)[:, 2:]), "loss_all": magvit.weighted_mean(nats, torch.ones_like(nats))}
    return out | flax_grads(net, out["loss_all"], "grad/", golden, ours=names)


@checks("magvit_decode")
def magvit_decode(golden, inputs):
    c, out = golden["config"], {}
    (net, _), grid, labels = magvit_bert(golden), (c["lt"], c["ls"], c["ls"]), inputs["label"][:, 0]
    null, null_ids = magvit_prefix("CG", torch.full_like(labels, c["classes"]), net.config)
    for name in {name.split("/")[0] for name in golden["outputs"]}:
        task = MAGVIT_TASKS[re.sub(r"_fixed|_cfg[\d.]+", "", name)]
        prefix, ids = magvit_prefix(task, labels, net.config)
        known, trace = magvit.region(task, grid).expand(len(labels), *grid).flatten(1), []
        drawn = magvit.decode_tokens(
            net, prefix, inputs["z_cond"].flatten(1), known, steps=c["steps"], method=c["schedule"], choice_temperature=c["temperature"],
            guidance=1 + c["guidance"] if "_cfg" in name else 1.0, null_prefix=null, mode="paste" if "_fixed" in name else "commit",
            noise=lambda step, what, like: inputs[f"gumbel_{what}{step}{c['name']}"].view(like.shape), trace=trace)
        assert [int(step["hidden"][0].sum()) for step in trace[:-1]] == golden["notes"][f"{name}/unknown_counts"]
        out |= {f"{name}/prefix": ids, f"{name}/prefix_uncond": null_ids, f"{name}/final": drawn.view(-1, *grid)}
        for k, step in enumerate(trace):
            values = {"logits": step["logits"][0], "tokens": step["tokens"], "next_input": step["inputs"], "score_unknown": step["score"].nan_to_num(posinf=0.0)}
            out |= {f"{name}/step{k}/{what}": x.unflatten(1, grid) for what, x in values.items()}
    return out


@checks("magvit_lfq")
def magvit_lfq(golden, inputs):
    c, out, E = golden["config"], {}, golden["config"]["bits"]
    quantizer, reverse = magvit.LookupFree(E), lambda indices: magvit.join(magvit.split(indices, E * (1,)).flip(-1), E * (1,))
    for suffix, scale in (("", c["scale"]), ("_unit", 1.0)):
        x = (scale * inputs["x"]).requires_grad_()
        q, indices, losses = quantizer(x)
        each, together = quantizer.entropies(to_last(x).flatten(0, -2))
        out |= {f"om2/{name}{suffix}": value for name, value in dict(quantized=q, indices=indices.flatten(), per_sample_entropy=each, codebook_entropy=together,
                                                                     entropy_loss=each - together, commitment=losses["commitment"] / quantizer.beta).items()}
        out |= {f"vqp/quantized{suffix}": q, f"vqp/commitment{suffix}": out[f"om2/commitment{suffix}"], f"vqp/indices{suffix}": reverse(indices)}
        out[f"om2/grad_x_aux{suffix}"], = torch.autograd.grad(sum(losses.values()), x, retain_graph=True)
        out |= {} if suffix else {"om2/grad_x_ste": torch.autograd.grad((q * inputs["probe"]).sum(), x)[0]}
        if not suffix:
            bits = (2, E - 2)
            for i, name in enumerate(("pre", "post")):
                part = magvit.split(indices, bits)[..., i]
                out |= {f"om2/factorized/{name}": part.flatten(), f"om2/factorized/decoded_{name}": magvit.LookupFree(bits[i]).lookup(part)}
    zeros = torch.tensor([0.0, -0.0, 1e-30, -1e-30]).repeat(-(-E // 4))[:E].view(1, E, 1, 1)
    q, indices, _ = quantizer(zeros)
    return out | {"edge/om2/quantized": q, "edge/om2/indices": indices.flatten(), "edge/vqp/indices": reverse(indices),
                  "om2/decode_ids": to_last(quantizer.lookup(inputs["ids"])), "vqp/indices_to_codes": quantizer.lookup(reverse(inputs["ids"]))}


@checks("magvit_om2_video")
def magvit_om2_video(golden, inputs):
    c, params, video = golden["config"], params_of(golden), inputs["video"]
    config = magvit.Config(tasks="CG", causal=True, frames=c["T"], image_size=c["S"], ch=c["ch"], groups=32, ch_mult=c["mult"], temporal=[m != 1 for m in c["mult"][:-1]],
                           num_res_blocks=c["blocks"], num_res_blocks_decoder=c["blocks"], code_dim=c["z"])
    plain = lambda state: {name.replace(".conv_1.", "."): value for name, value in state.items()}
    net = magvit.from_official({name: value for name, value in params.items() if name.startswith(("encoder", "decoder"))}, config)
    with torch.no_grad():
        names = [name for name, _ in net.named_modules() if name in golden["outputs"]]
        with recorded(net, names) as seen:
            z = net.encoder(video)
            indices = net.quantize.indices(z)
            again = net.decoder(net.quantize.lookup(indices))
        torch.testing.assert_close(net(video)[0], again)
        bits, out = 2.0 * inputs["bits"] - 1, {name: seen[name] for name in names}
        out |= {"z": z, "z_abs_min": z.abs().min(), "indices": indices.flatten(), "recon": again, "from_bits/recon": net.decoder(bits),
                "image/z": net.encoder(video[:, :, :1]), "image/from_bits/recon": net.decoder(bits[:, :, :1]),
                "depth_to_space3d": magvit.DepthToSpace.cells(inputs["d2s"], (2, 2, 2))}
        for s in ("111", "122", "222"):
            weight = params[f"conv{s}.conv_1.weight"]
            conv = magvit.Conv(weight.shape[1], weight.shape[0], config, stride=tuple(map(int, s)))
            conv.load_state_dict({"weight": weight, "bias": params[f"conv{s}.conv_1.bias"]})
            out |= {f"conv{s}": conv(inputs["conv_in"]), f"conv{s}/first_frame_only": conv(inputs["conv_in"][:, :, :1])}
        up = magvit.DepthToSpace(params["up222.conv1.conv_1.weight"].shape[1], config, (2, 2, 2))
        up.load_state_dict(plain({name.removeprefix("up222."): value for name, value in params.items() if name.startswith("up222.")}))
        out |= {f"up222/T{i}": up(inputs[f"up_in{i}"]) for i in (1, 2, 3)}
        flat = magvit.VideoTokenizer(dataclasses.replace(config, time_kernel=1, temporal=len(config.temporal) * (False,))).eval()
        flat.load_state_dict({name[3:]: value[:, :, None] if value.ndim == 4 else value for name, value in params.items() if name.startswith("2d.")})
        inflated = magvit.inflate(magvit.VideoTokenizer(config).eval(), flat, "last")
        return out | {"2d/z": flat.encoder(video[:, :, :1])[:, :, 0], "inflated/z": inflated.encoder(video), "inflated/image_z": inflated.encoder(video[:, :, :1]),
                      "inflated/from_bits/recon": inflated.decoder(bits)}


def read(path):
    golden = json.loads(path.read_text())
    made = {name: torch.from_numpy(make_input(name, spec)) for name, spec in golden["inputs"].items()}
    return golden, {role: made[name] for role, name in golden.get("input_of", {}).items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_equals_the_official_numbers(path):
    part = path.stem.rsplit("_", 1)[0]
    assert part in CHECKS, f"{path.name}: no check computes {part}"
    golden, inputs = read(path)
    computed, left_out = CHECKS[part](golden, inputs), LEFT_OUT.get(part, {})
    missing = [name for name in golden["outputs"] if name not in computed and name not in left_out]
    assert not missing, f"{path.name}: nothing computes {missing}"
    for name, recorded in golden["outputs"].items():
        if name not in left_out:
            check(name, computed[name].detach().numpy(), recorded)


def test_golden_files_are_there():
    assert FILES, "no golden files found"
