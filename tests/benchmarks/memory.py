"""Memory that training each preset takes, computed, not measured:   python tests/benchmarks/memory.py

Weights, gradients, two moments of Adam and the average of the weights (5 x 4 bytes a parameter), and all tensors that autograd
keeps for the backward pass of one batch, in float32 (on CUDA most are bfloat16: about half). Built on torch's meta device:
nothing is allocated.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pixelcnn import PRESETS, build_prior  # noqa: E402


def training_bytes(config):
    """-> parameters, bytes of weights and optimizer, bytes kept for the backward pass."""
    with torch.device("meta"):
        prior = build_prior(config)
        tokens = torch.zeros(config.batch_size, config.image_size ** 2 * config.colours, dtype=torch.long)
        labels = torch.zeros(config.batch_size, config.num_classes)             # class vectors: one_hot knows no meta tensors
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage()._cdata] = (tensor, tensor.untyped_storage().nbytes())
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = prior.loss(tokens, labels if config.num_classes else None)
    own = {p.untyped_storage()._cdata for p in prior.parameters()}
    parameters = sum(p.numel() for p in prior.parameters())
    return parameters, 20 * parameters, sum(size for key, (_, size) in kept.items() if key not in own)


if __name__ == "__main__":
    for name, config in PRESETS.items():
        parameters, fixed, batch = training_bytes(config)
        total = (fixed + batch) / 2**30
        print(f"{name}: {parameters:,} parameters; {fixed / 2**30:.2f} GiB for them, {batch / 2**30:.2f} GiB for a batch of {config.batch_size}; "
              f"{total:.1f} GiB in float32, about {(fixed + batch / 2) / 2**30:.1f} with bfloat16")
