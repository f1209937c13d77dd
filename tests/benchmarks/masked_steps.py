"""How many passes, and which schedule:   python tests/benchmarks/masked_steps.py RUN [--num 900] [--data-dir DIR]

Samples of a trained run of maskgit.py at 1 to 64 passes, then with every schedule at the run's passes, judged by tests/judge.py:
Frechet distance, class agreement, spread (mean distance of two samples' features within a class) and milliseconds an image.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from judge import judge_samples  # noqa: E402  it puts the eight files on the path

import maskgit  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--num", type=int, default=900)
    parser.add_argument("--data-dir")
    args = parser.parse_args()
    run, tokenizer, prior = maskgit.load_run(args.run)
    c = run.config
    data, labels = (c.data, args.data_dir or c.data_dir), torch.arange(c.num_classes).repeat(-(-args.num // c.num_classes))[:args.num]
    test, truth = maskgit.load_data(c).test
    real = judge_samples(test, truth, *data)
    print(f"real test pictures: class agreement {real['class_agreement']:.1%}, spread {real['spread']:.2f}; Frechet distance of {args.num}: "
          f"{judge_samples(test[:args.num], None, *data)['frechet']:.2f}")

    def judged(name, **settings):
        generator, start = torch.Generator().manual_seed(0), time.perf_counter()
        images = torch.cat([maskgit.sample(tokenizer, prior, part.to(run.device), generator=generator, **maskgit.decoding(c) | settings).cpu()
                            for part in labels.split(64)])
        seconds = time.perf_counter() - start
        found = judge_samples(maskgit.to_bytes(images), labels, *data)
        print(f"| {name} | {found['frechet']:.2f} | {found['class_agreement']:.1%} | {found['spread']:.2f} | {1000 * seconds / len(labels):.1f} |", flush=True)
    print("\n| passes | Frechet distance | class agreement | spread | ms an image |\n| --- | --- | --- | --- | --- |")
    for steps in (1, 2, 4, 8, 12, 16, 32, 64):
        judged(steps, steps=steps)
    print(f"\n| schedule, {c.sample_steps} passes | Frechet distance | class agreement | spread | ms an image |\n| --- | --- | --- | --- | --- |")
    for method in ("cosine", "linear", "square", "cubic", "sqrt", "log", "exponential"):
        judged(method, method=method)


if __name__ == "__main__":
    main()
