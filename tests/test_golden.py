"""Golden numbers: what the official code computes when every parameter is filled by a formula (tests/golden/golden.py).

Every <file>_<part>_<anything>.json in tests/golden/, or in the folder named by GOLDEN_DIR, is judged by the check of its
<file>_<part>. A check builds the model from the sizes in the file, never from sizes of its own, and returns everything it can
compute; a recorded output that it does not return fails, unless LEFT_OUT gives the reason.
"""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "golden"))
from golden import check, fill, make_input  # noqa: E402

import pixelcnn  # noqa: E402

FILES = sorted(path for path in Path(os.environ.get("GOLDEN_DIR", HERE / "golden")).glob("*_*_*.json"))

LEFT_OUT = {   # part: {recorded output: why no check computes it}
    "pixelcnn_binary": dict.fromkeys(
        ("logits", "nll_nats"), "EugenHotaj's network adds each block's input twice (x + (x + f(x))): a mistake of that "
        "repository, not the paper's network; single_residual/* are the same numbers with the paper's single skip"),
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
