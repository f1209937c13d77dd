"""The one judge of samples in this project: a small classifier of its own for each data set.

    python tests/judge.py RUN [--data-dir DIR]      judges RUN/samples.npz, adds the figures to RUN/report.json if there is one

class agreement   share of the samples that the judge takes for the class they were asked to be
frechet           Frechet distance between Gaussians fitted to the judge's 128 features of samples and of real test images
                  (not comparable with FID, whose features come from an Inception network; smaller is better; it grows
                  when there are few samples, so the same number of real images is given as its floor, where there are more than that)
spread            mean distance of the features of two samples of the same class: how varied they are (labels needed)
judge_accuracy    of the judge itself on real test images it was not trained on

Of clips it sees eight frames, evenly chosen, as so many channels: so their class may be a motion. Features are then the clip's.
A judge is trained once, from a fixed seed, and kept in the cache folder (JUDGE_CACHE, default ~/.cache/visual-autoregression).
"""
import argparse
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import magvit  # noqa: E402
import pixelcnn  # noqa: E402

STEPS, SIZE, FRAMES = int(os.environ.get("JUDGE_STEPS", 600)), 32, 8       # fewer steps: only to test the judge itself


def network(classes, channels):
    """images (B, channels, 32, 32) -> features (B, 128) -> class logits: judge[:-1] gives the features."""
    conv = lambda i, o, stride: (nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(*conv(channels, 32, 1), *conv(32, 64, 2), *conv(64, 128, 2), *conv(128, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(128, classes))


def prepare(images):
    """uint8 (N, 3, H, W) -> float (N, 3, 32, 32) in [-1, 1]; clips (N, 3, T, H, W) -> (N, 24, 32, 32): eight of their frames."""
    images = images.float() / 127.5 - 1
    if images.ndim == 5:
        images = images[:, :, torch.linspace(0, images.shape[2] - 1, FRAMES).round().long()].flatten(1, 2)
    return images if images.shape[-1] == SIZE else F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)


def run(judge, images, layers=slice(None)):
    with torch.no_grad():
        return torch.cat([judge[layers](prepare(part)) for part in images.split(256)])


def real_data(data, data_dir, frames):
    if frames:
        return magvit.load_data(magvit.Config(data=data, data_dir=str(data_dir), image_size=SIZE, frames=frames, num_classes=0))
    return pixelcnn.load_data(pixelcnn.Config(data=data, data_dir=str(data_dir), image_size=SIZE, num_classes=0))


def get_judge(data, data_dir="data", frames=0):
    """frames: of clips (0: images) -> judge (eval mode), its accuracy on real test images, their features (N, 128)."""
    cache = Path(os.environ.get("JUDGE_CACHE", Path.home() / ".cache" / "visual-autoregression"))
    return load_judge(data, data_dir, cache / f"judge_{Path(data).stem}{f'_{frames}' if frames else ''}_{STEPS}.pt", frames)


@functools.lru_cache(1)                     # a notebook asks many times
def load_judge(data, data_dir, path, frames):
    real = real_data(data, data_dir, frames)
    sizes = len(real.classes), prepare(real.test[0][:1]).shape[1]
    judge = network(*sizes)
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
    else:
        print(f"training the judge of {data}, once: {path}", file=sys.stderr)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            judge = network(*sizes)
            optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
            for step in range(STEPS):
                index = torch.randint(len(real.train[0]), (64,))
                images, labels = prepare(real.train[0][index]), real.train[1][index]
                # samples may be smaller than 32 x 32 and of few levels: so is half of every batch
                coarse, levels = F.interpolate(images[::2], (16, 16), mode="bilinear", antialias=True), (2, 4, 8)[step % 3]
                coarse = ((coarse + 1) / 2 * levels).floor().clamp(0, levels - 1) / (levels - 1) * 2 - 1
                images[::2] = F.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
                images = torch.roll(images, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3)) + 0.05 * torch.randn_like(images)
                loss = F.cross_entropy(judge(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(judge.state_dict(), part := path.with_suffix(f".{os.getpid()}"))
        os.replace(part, path)
    judge.eval()
    features = run(judge, real.test[0], slice(-1))
    with torch.no_grad():
        accuracy = (judge[-1](features).argmax(1) == real.test[1]).float().mean().item()
    return judge, accuracy, features


def frechet_distance(a, b):
    """Between Gaussians fitted to features a (N, F) and b (M, F): |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))."""
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def class_spread(features, labels):
    """features (N, F), labels (N,) -> mean distance between two of the same class, over all classes alike."""
    return float(torch.stack([torch.pdist(features[labels == c]).mean() for c in labels.unique() if (labels == c).sum() > 1]).mean())


def judge_samples(images, labels, data="shapes", data_dir="data"):
    """images uint8 (N, 3, H, W) or clips (N, 3, T, H, W), labels int64 (N,) or None -> dict of figures; see the top of this file."""
    judge, accuracy, real_features = get_judge(data, data_dir, images.shape[2] if images.ndim == 5 else 0)
    features = run(judge, images, slice(-1))
    figures = {"frechet": frechet_distance(features, real_features), "judge_accuracy": accuracy, "judged_samples": len(images)}
    if len(images) < len(real_features):                                        # else all real ones would be compared with themselves
        few = torch.randperm(len(real_features), generator=torch.Generator().manual_seed(0))[:len(images)]
        figures["frechet_of_as_many_real"] = frechet_distance(real_features[few], real_features)
    if labels is not None:
        figures["class_agreement"] = (run(judge, images).argmax(1) == labels).float().mean().item()
        figures["spread"] = class_spread(features, labels) if labels.bincount().max() > 1 else 0.0
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-dir")
    args = parser.parse_args()
    if not (args.run / "samples.npz").exists():
        parser.error(f"{args.run} has no samples.npz: draw some with sample {args.run} --num 900")
    samples, config = np.load(args.run / "samples.npz"), json.loads((args.run / "config.json").read_text())
    labels = torch.from_numpy(samples["labels"]) if config["num_classes"] else None
    figures = judge_samples(torch.from_numpy(samples["arr_0"]).movedim(-1, 1), labels, config["data"], args.data_dir or config["data_dir"])
    print(json.dumps(figures, indent=1))
    report = args.run / "report.json"
    if report.exists():
        report.write_text(json.dumps(json.loads(report.read_text()) | figures, indent=1))


if __name__ == "__main__":
    main()
