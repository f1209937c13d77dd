"""Memory that training each preset takes, computed, not measured:   python tests/benchmarks/memory.py [pixelcnn vqgan_gpt vqvae2 rqvae maskgit var]

Weights, gradients, two moments of Adam (16 bytes a parameter; 20 where an average of the weights is kept), and all tensors that
autograd keeps for the backward pass of one batch, in float32 (on CUDA most are bfloat16: about half). Built on torch's meta
device: nothing is allocated.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import maskgit  # noqa: E402
import pixelcnn  # noqa: E402
import rqvae  # noqa: E402
import var  # noqa: E402
import vqgan_gpt  # noqa: E402
import vqvae2  # noqa: E402


def kept_bytes(nets, loss):
    """Bytes that autograd keeps of loss()'s graph, the parameters of nets aside."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = (tensor, tensor.untyped_storage().nbytes())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    own = {p.untyped_storage()._cdata for net in nets for p in net.parameters()}
    return sum(size for key, (_, size) in kept.items() if key not in own)


def pixelcnn_stages(config):
    prior = pixelcnn.build_prior(config)
    tokens = torch.zeros(config.batch_size, config.image_size ** 2 * config.colours, dtype=torch.long)
    labels = torch.zeros(config.batch_size, config.num_classes)                 # class vectors: one_hot knows no meta tensors
    yield "prior", config.batch_size, 20, [prior], lambda: prior.loss(tokens, labels if config.num_classes else None)


def vqgan_gpt_stages(config):
    tokenizer, losses = vqgan_gpt.build_tokenizer(config), vqgan_gpt.VQLPIPSWithDiscriminator(config)
    images, last_layer = torch.zeros(config.batch_size, 3, *[config.resolution] * 2), tokenizer.decoder.conv_out.weight

    def loss():
        again = tokenizer.decoder(tokenizer.post_quant_conv(tokenizer.latents(images)))     # the quantizer keeps little beside
        losses.generator(images, again, again.mean(), last_layer, config.disc_start)
    yield "tokenizer", config.batch_size, 16, [tokenizer, losses], loss
    prior = vqgan_gpt.build_prior(config)
    tokens = torch.zeros(config.batch_size_prior, prior.window ** 2, dtype=torch.long)
    conditions = tokens if config.condition != "class" else tokens[:, 0]
    yield "prior", config.batch_size_prior, 16, [prior], lambda: prior.loss(tokens, conditions[:, None] if conditions.ndim == 2 else conditions)


def vqvae2_stages(config):
    tokenizer, images = vqvae2.build_tokenizer(config), torch.zeros(config.batch_size, 3, *[config.image_size] * 2)
    for quantizer in tokenizer.eval().quantize:                                 # the distances are freed at once
        quantizer.indices = lambda z: torch.zeros(len(z), *z.shape[2:], dtype=torch.long)
    yield "tokenizer", config.batch_size, 16, [tokenizer], lambda: tokenizer.decoders[-1](tokenizer.quantized(images)[0]).square().mean()
    prior = vqvae2.build_prior(config)
    maps = [torch.zeros(config.batch_size_prior, side, side, dtype=torch.long) for side in config.sides]

    def loss():
        for level, net in enumerate(prior.levels):
            condition = None                                                    # of the coarser codes: one_hot knows no meta tensors
            if net.cond_resnet is not None:
                one_hot = torch.zeros(config.batch_size_prior, level * config.codebook_size, *[config.sides[level] // 2] * 2)
                condition = torch.nn.functional.interpolate(net.cond_resnet(one_hot), scale_factor=2)
            net(maps[level], condition).logsumexp(1).mean()
    yield "prior", config.batch_size_prior, 16, [prior], loss


def rqvae_stages(config):
    tokenizer, discriminator = rqvae.build_tokenizer(config), rqvae.NLayerDiscriminator(3, config.disc_width, config.disc_layers)
    perceptual, last_layer = rqvae.LPIPS() if config.lpips else None, tokenizer.decoder.conv_out.weight
    images = torch.zeros(config.batch_size, 3, *[config.image_size] * 2)

    def loss():
        again = tokenizer.decoder(tokenizer.post_quant_conv(tokenizer.latents(images)))     # the quantizer keeps little beside
        rqvae.generator_loss(config, images, again, again.mean(), last_layer, perceptual, discriminator)
    yield "tokenizer", config.batch_size, 16, [tokenizer, discriminator, *[perceptual] * bool(perceptual)], loss
    prior = rqvae.build_prior(config)
    tokens = torch.zeros(config.batch_size_prior, prior.places * prior.depth, dtype=torch.long)
    conditions = torch.zeros(config.batch_size_prior, prior.length, dtype=torch.long)
    yield "prior", config.batch_size_prior, 16, [prior], lambda: prior.loss(
        tokens, conditions[:, 0] if prior.length == 1 else conditions, torch.zeros(*tokens.shape, config.codebook_size))


def maskgit_stages(config):
    tokenizer, discriminator = maskgit.build_tokenizer(config), maskgit.Discriminator(config.image_size, config.disc_width)
    perceptual = maskgit.ResNet50() if config.perceptual else None
    images, places = torch.zeros(config.batch_size, 3, *[config.image_size] * 2), config.batch_size * config.side ** 2

    def loss():                                                                 # beside: distances of all places to all codes
        fake = (tokenizer.decoder(tokenizer.latents(images)) + 1) / 2
        entropy = maskgit.entropy_loss(torch.zeros(places, config.codebook_size, requires_grad=True))
        maskgit.generator_loss(config, images, fake, entropy, perceptual, discriminator)
    yield "tokenizer", config.batch_size, 20, [tokenizer, discriminator, *[perceptual] * bool(perceptual)], loss
    prior = maskgit.build_prior(config)
    tokens = torch.zeros(config.batch_size_prior, prior.places, dtype=torch.long)
    yield "prior", config.batch_size_prior, 20, [prior], lambda: prior.loss(tokens, tokens[:, 0], torch.ones_like(tokens, dtype=torch.bool))


def var_stages(config):
    tokenizer, discriminator = var.build_tokenizer(config), var.NLayerDiscriminator(3, config.disc_width, config.disc_layers)
    perceptual, images = var.LPIPS() if config.lpips else None, torch.zeros(config.batch_size, 3, *[config.image_size] * 2)

    def loss():                                                                 # the quantizer keeps little beside
        f = tokenizer.latents(images)
        again = tokenizer.decode_latents(f)
        var.generator_loss(config, images, again, f.mean(), tokenizer.decoder.conv_out.weight, perceptual, discriminator)
    yield "tokenizer", config.batch_size, 16, [tokenizer, discriminator, *[perceptual] * bool(perceptual)], loss
    prior = var.build_prior(config)
    tokens = torch.zeros(config.batch_size_prior, len(prior.level), dtype=torch.long)
    prior.inputs_of = lambda tokens: torch.zeros(len(tokens), len(prior.level) - config.scales[0] ** 2, config.code_dim)
    yield "prior", config.batch_size_prior, 16, [prior], lambda: prior.loss(tokens, tokens[:, 0])


STAGES = {"pixelcnn": (pixelcnn, pixelcnn_stages), "vqgan_gpt": (vqgan_gpt, vqgan_gpt_stages), "vqvae2": (vqvae2, vqvae2_stages),
          "rqvae": (rqvae, rqvae_stages), "maskgit": (maskgit, maskgit_stages), "var": (var, var_stages)}


if __name__ == "__main__":
    for file in sys.argv[1:] or STAGES:
        module, stages = STAGES[file]
        for name, config in module.PRESETS.items():
            with torch.device("meta"):
                for stage, batch_size, each, nets, loss in stages(config):
                    trained = sum(p.numel() for net in nets for p in net.parameters() if p.requires_grad)
                    frozen = sum(p.numel() for net in nets for p in net.parameters() if not p.requires_grad)
                    fixed, batch = each * trained + 4 * frozen, kept_bytes(nets, loss)
                    print(f"{file} {name} {stage}: {trained:,} parameters trained; {fixed / 2**30:.2f} GiB for them, {batch / 2**30:.2f} GiB for a "
                          f"batch of {batch_size}; {(fixed + batch) / 2**30:.1f} GiB in float32, about {(fixed + batch / 2) / 2**30:.1f} with bfloat16")
