"""All eight files on the same nine shapes: training steps for about eight minutes each on two cores (nine on one).

    python tests/benchmarks/comparison.py [FILE ...] [--seed N] [--share X | --speed]

Each file's demo, with its steps stretched from the demo's minutes (notebooks/reports) to eight, on 6 x 6 places of codes of 24 x 24 pixels where the paper
allows: VQ-VAE-2 has 3 x 3 besides, RQ-VAE four codes a place, MAR 3 x 3 latents a token, VAR five maps up to 6 x 6; PixelCNN has no codes, but 16 x 16
pixels. MAGVIT has clips of one frame. Trains into runs/comparison, samples 900 pictures, has them judged, and writes
notebooks/reports/comparison/FILE_SEED.json and .png, and comparison.png of all eight; what is there is not made again. --share 0.01: a hundredth of the steps, to try it out, nothing is kept.
"""
import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from table import REPORTS, WAY  # noqa: E402

FILES, MINUTES = list(WAY), 8
SIZE, NUMBER = 24, {"train": 20_000, "test": 2_000}
MORE = {   # file: flags, and by what its steps are more than the demo's for equal time (smaller pictures; measured)
    "vqvae2": (["--image-size", str(SIZE)], 1.6),
    "magvit": (f"--image-size {SIZE} --frames 1 --time-kernel 1 --temporal 0 0 --ch-mult 1 2 4 --tasks CG --no-multi-task --num-classes 9 --train-steps-images 0 "
               "--ch 16 --batch-size 16 --lr-tokenizer 2e-3 --guidance 2.5 --temperature 0.7".split(), 1.0)}
STEPS = {"magvit": {"train_steps_tokenizer": 2500, "train_steps_prior": 5000}}  # in place of the demo's, which has three stages


def one_frame_clips(folder):
    """The shapes as a folder of clips of one frame, classes in the shapes' order."""
    import pixelcnn
    for seed, (split, number) in enumerate(NUMBER.items()):
        images, labels = pixelcnn.draw_shapes(100 + seed, range(number), SIZE)
        for i, (image, label) in enumerate(zip(images, labels)):
            path = folder / split / f"{label}_{pixelcnn.SHAPES[label]}" / f"{i:05}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, image[None])
    return folder


def speeds(module, run):
    """Pictures a second, 1 and 16 at a time, on one thread, each the best of three: evaluate's call of sample, timed."""
    original, threads, found = module.sample, torch.get_num_threads(), {}

    def sample(tokenizer, prior, labels, **more):
        for number in (1, 16):
            for _ in range(3):
                start = time.perf_counter()
                original(tokenizer, prior, labels.repeat(16)[:number], **more)
                found[str(number)] = max(found.get(str(number), 0), number / (time.perf_counter() - start))
        return original(tokenizer, prior, labels, **more)
    module.sample = sample
    torch.set_num_threads(1)
    module.main(["evaluate", str(run)])
    torch.set_num_threads(threads)
    module.sample = original
    return found


def one(name, seed, share):
    """Train, evaluate, sample, judge one file, all in this process, so that its peak of memory is the run's."""
    module, run = importlib.import_module(name), ROOT / "runs" / "comparison" / f"{name}_{seed}"
    demo, (flags, faster) = json.loads((REPORTS / f"{name}_demo.json").read_text()), MORE.get(name, ([], 1.0))
    stretch = MINUTES * 60 / demo["train_seconds"] * faster
    steps = STEPS.get(name) or {field: getattr(module.Config(), field) * stretch for field in ("train_steps_tokenizer", "train_steps_prior")}
    words = [word for field, value in steps.items() if value for word in (f"--{field.replace('_', '-')}", str(max(2, round(value * share))))]
    if name == "magvit":
        clips = run.parent / "one_frame"
        words += ["--data", str(clips if clips.exists() else one_frame_clips(clips))]
    if not (run / "config.json").exists():
        module.main(["train", "--out", str(run), "--seed", str(seed), *words, *flags])
    else:
        module.main(["train", "--resume", str(run)])
    speed = speeds(module, run)
    module.main(["sample", str(run), "--num", "900"])
    from judge import judge_samples
    with np.load(run / "samples.npz") as file:
        images = torch.from_numpy(file["arr_0"].reshape(-1, *file["arr_0"].shape[-3:])).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["labels"])
    report = json.loads((run / "report.json").read_text()) | judge_samples(images, labels)
    del report["samples_per_second"]                                            # of evaluate: timed with the rest
    report |= {"seed": seed, "threads": torch.get_num_threads(), "images_per_second": speed,
               "command": f"python tests/benchmarks/comparison.py {name} --seed {seed}"}
    if share == 1:
        folder = REPORTS / "comparison"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_{seed}.json").write_text(json.dumps(report, indent=1) + "\n")
        module.save_grid(images[torch.argsort(labels, stable=True)].view(9, 100, *images.shape[1:])[:, :4].transpose(0, 1).flatten(0, 1) / 127.5 - 1,
                         folder / f"{name}_{seed}.png", 9)
    print(json.dumps({key: report.get(key) for key in ("train_seconds", "psnr", "frechet", "class_agreement", "images_per_second", "peak_memory_mib")}), flush=True)


def picture():
    """All files' samples on one sheet: notebooks/reports/comparison.png."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 4, figsize=(18, 4.6), layout="constrained")
    for axis, name in zip(axes.flat, FILES):
        axis.imshow(plt.imread(REPORTS / "comparison" / f"{name}_0.png"), interpolation="nearest")
        axis.set_title(f"{name}.py", fontsize=15)
        axis.axis("off")
    figure.savefig(REPORTS / "comparison.png", dpi=80)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", choices=[[], *FILES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--speed", action="store_true", help="time the sampling of trained runs anew; nothing else should run")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.speed:
        for name in args.files or FILES:
            path = REPORTS / "comparison" / f"{name}_{args.seed}.json"
            speed = speeds(importlib.import_module(name), ROOT / "runs" / "comparison" / f"{name}_{args.seed}")
            path.write_text(json.dumps(json.loads(path.read_text()) | {"images_per_second": speed}, indent=1) + "\n")
        return None
    if args.inside:
        return one(args.files[0], args.seed, args.share)
    for name in args.files or FILES:
        if args.share < 1 or not (REPORTS / "comparison" / f"{name}_{args.seed}.json").exists():
            print(f"== {name}, seed {args.seed}", flush=True)
            subprocess.run([sys.executable, __file__, name, "--inside", "--seed", str(args.seed), "--share", str(args.share)], check=True)
    if all((REPORTS / "comparison" / f"{name}_0.png").exists() for name in FILES):
        picture()


if __name__ == "__main__":
    main()
