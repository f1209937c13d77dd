"""The release's codebook rule beside ours, on CIFAR-10:   python tests/benchmarks/codebook_rules.py FOLDER_OR_ZIP [STEPS]

The `cifar10` preset's tokenizer of vqgan_gpt.py without its GAN, twice from the same seed on the same batches: running means with
restart of unused codes, and the release's rule (codes by gradient, weight 1, no restart). Printed: use of the codebook, perplexity and
PSNR on 2,000 test images.
"""
import contextlib
import dataclasses
import io
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from vqgan_gpt import PRESETS, Run, load_data, psnr, train_tokenizer, use  # noqa: E402


def main(source, steps=600):
    ours = dataclasses.replace(PRESETS["cifar10"], data=source, disc_weight=0.0, train_steps_tokenizer=steps, test_images=2000, save_every=10**6)
    release = dataclasses.replace(ours, codebook_decay=0.0, restart=0, codebook_weight=1.0)
    data = load_data(ours)
    images = data.test[0] / 127.5 - 1
    for name, config in (("running means, restart", ours), ("the release's rule", release)):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            tokenizer = train_tokenizer(config, data, Run(f"{folder}/run", config, data.classes))
        with torch.no_grad():
            codes = torch.cat([tokenizer.encode(part) for part in images.split(100)])
            quality = torch.cat([psnr(x, tokenizer.decode(c).clamp(-1, 1)) for x, c in zip(images.split(100), codes.split(100))]).mean()
        share, perplexity = use(codes, tokenizer)
        print(f"{name}, {steps} steps of {config.batch_size}: {share:.1%} of {config.codebook_size} codes used, perplexity {perplexity:.1f}, "
              f"PSNR {quality:.2f} dB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
