"""Prints README's tables:   python tests/table.py [comparison | weights | exactness]

Figures: from notebooks/reports/*.json, each the report.json of a run, kept under the name of its file and preset (pixelcnn_mnist.json).
comparison: all files on equal terms, from notebooks/reports/comparison (python tests/benchmarks/comparison.py).
weights: released checkpoints, how to load them; their sizes from the lists in tests/golden. exactness: what is recorded there, of whose code.
"""
import argparse
import functools
import gzip
import json
import math
import sys
from pathlib import Path

REPORTS, GOLDEN = Path(__file__).resolve().parent.parent / "notebooks" / "reports", Path(__file__).resolve().parent / "golden"
FILE_OF = {"vqgan": "vqgan_gpt", "movq": "rqvae"}                               # the start of a golden file's name, where it is not the file's
COLUMNS = {   # heading: report -> cell
    "file": lambda r: f"`{r['file']}`",
    "run": lambda r: f"`{r['preset']}`",
    "parameters": lambda r: f"{r['parameters']:,}",
    "training": lambda r: f"{r['train_seconds'] / 60:.0f} min, {r['train_steps']:,} steps",
    "on": lambda r: r["device"],
    "PSNR": lambda r: f"{r['psnr']:.1f} dB",
    "NLL": lambda r: f"{r['nats_per_token']:.4f} nats/token, {r['nats_per_image']:.2f} nats/image" if "nats_per_image" in r else
    f"{r['nats_per_token']:.4f} nats/masked token" if "nats_per_token" in r else f"none (diffusion loss {r['diffusion_loss']:.3f})",
    "class agreement": lambda r: f"{100 * r['class_agreement']:.0f} % (judge: {100 * r['judge_accuracy']:.0f} %)" if "class_agreement" in r else "not judged",
    "samples/s": lambda r: f"{r['samples_per_second']:.2f}",
    "memory": lambda r: f"{r['peak_memory_mib']:,} MiB",
    "printed by": lambda r: f"`{r['command']}`",
}


def markdown(heads, rows):
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows))


def table(folder=REPORTS):
    rows = [json.loads(path.read_text()) | {"stem": path.stem} for path in sorted(folder.glob("*.json"))]
    rows = [row | {"preset": row["stem"].removeprefix(row["file"][:-3] + "_")} for row in rows]
    return markdown(list(COLUMNS), [[cell(row) for cell in COLUMNS.values()] for row in rows])


# --- all files side by side

WAY = {   # file: its tokens, the network's passes for an image
    "pixelcnn": ("16 x 16 pixels x 3", "768 small ones"), "vqvae2": ("3 x 3, then 6 x 6 codes", "9 and 36"), "vqgan_gpt": ("6 x 6 codes", "36"),
    "rqvae": ("6 x 6 codes x 4", "36, and 144 of the head"), "maskgit": ("6 x 6 codes", "12"), "magvit": ("6 x 6 codes", "12"),
    "var": ("1, 2, 3, 4, 6 squared codes", "5"), "mar": ("2 x 2 of 36 numbers", "4, and 200 of the head")}


def span(reports, key, form, scale=1):
    """The reports' figure, or of several seeds the lowest and the highest."""
    values = [scale * report[key] for report in reports]
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def of_cifar10(name):
    """PSNR and nats an image by the file's own report of its cifar10 run."""
    path = REPORTS / f"{name}_cifar10.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    return [f"{report['psnr']:.1f} dB" if report else "not run", f"{report['nats_per_image']:.0f}" if "nats_per_image" in report else "none"]


def comparison(folder=REPORTS / "comparison"):
    """A row for each file, in the order of the papers; of several seeds the lowest and the highest figure (speed: of the first)."""
    rows = []
    for name, (tokens, passes) in WAY.items():
        reports = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}_[0-9].json"))]
        if not reports:
            continue
        first, of = reports[0], functools.partial(span, reports)
        parameters = f"{first['parameters_tokenizer']:,} + {first['parameters_prior']:,}" if "parameters_tokenizer" in first else f"{first['parameters']:,}"
        nll = of("nats_per_image", "{:.0f}") if "nats_per_image" in first else "none"
        rows.append([f"`{name}.py`", tokens, passes, parameters, of("train_steps", "{:,}"), of("psnr", "{:.1f}") + " dB",
                     of("codebook_use", "{:.0f} %", 100) if "codebook_use" in first else "no codes", nll, of("frechet", "{:.1f}"), of("class_agreement", "{:.0f} %", 100),
                     of("spread", "{:.1f}"), *(f"{first['images_per_second'][number]:.1f}" for number in ("1", "16")), of("peak_memory_mib", "{:,}") + " MiB", str(len(reports)), *of_cifar10(name)])
    return markdown("file,tokens,passes,parameters (tokenizer + prior),training steps,PSNR,codebook use,nats/image,Frechet,class agreement,spread,images/s (1),images/s (16),memory,seeds,CIFAR-10: PSNR,CIFAR-10: nats/image".split(","), rows)


# --- released weights

WEIGHTS = [   # file; lists of names, tokenizer first; the command; FID (r: of reconstructions) as its authors give it
    ("vqvae2", ["tokenizer"], "reconstruct photo.jpg --official vqvae_560.pt", ""),
    ("vqgan_gpt", ["imagenet_f16_1024"], "reconstruct photo.jpg --official vqgan_imagenet_f16_1024/last.ckpt", "r 7.94"),
    ("vqgan_gpt", ["imagenet_f16_16384"], "reconstruct photo.jpg --official vqgan_imagenet_f16_16384/last.ckpt", "r 4.98"),
    ("vqgan_gpt", ["gumbel_f8"], "reconstruct photo.jpg --official vqgan_gumbel_f8/last.ckpt", "r 1.49"),
    ("vqgan_gpt", ["imagenet_f16_16384", "cin_transformer"], "sample --official cin_transformer/last.ckpt --labels 207", "15.78"),
    ("vqgan_gpt", ["faceshq_vqgan", "faceshq_transformer"], "sample --official faceshq_transformer/last.ckpt", ""),
    ("vqgan_gpt", ["faceshq_vqgan", "ffhq_transformer"], "sample --official ffhq_transformer/last.ckpt", "9.6"),
    ("rqvae", ["tokenizer_imagenet", "transformer_imagenet_480M"], "sample --official stage1/model.pt stage2/model.pt --labels 207", "15.72"),
    ("rqvae", ["tokenizer_imagenet", "transformer_imagenet_821M"], "the same: 821M", "13.11"),
    ("rqvae", ["tokenizer_imagenet", "transformer_imagenet_1400M"], "the same: 1.4B", "8.71"),
    ("rqvae", ["tokenizer_imagenet", "transformer_imagenet_3800M"], "the same: 3.8B", "7.55"),
    ("rqvae", ["tokenizer_ffhq", "transformer_ffhq"], "sample --official stage1/model.pt stage2/model.pt", "10.38"),
    ("rqvae", ["tokenizer_imagenet", "transformer_church"], "the same: LSUN church", "7.45"),
    ("rqvae", ["tokenizer_imagenet", "transformer_cat"], "the same: LSUN cat; bedroom", "8.64; 3.04"),
    ("rqvae", ["tokenizer_imagenet", "transformer_cc3m"], "CC3M: captions as numbers, by `from_official` alone", "12.33"),
    ("movq", ["tokenizer_67M"], "reconstruct photo.jpg --official movqgan_67M.ckpt", ""),
    ("movq", ["tokenizer_102M"], "reconstruct photo.jpg --official movqgan_102M.ckpt", ""),
    ("movq", ["tokenizer_270M"], "reconstruct photo.jpg --official movqgan_270M.ckpt", ""),
    ("maskgit", ["tokenizer", "transformer_256"], "sample --official tokenizer_imagenet256_checkpoint maskgit_imagenet256_checkpoint --labels 207", "6.06 (r 2.28)"),
    ("maskgit", ["tokenizer", "transformer_512"], "sample --official tokenizer_imagenet512_checkpoint maskgit_imagenet512_checkpoint --labels 207", "7.32 (r 1.97)"),
    ("maskgit", ["tokenizer_openmuse"], "reconstruct photo.jpg --official maskgit-vqgan-imagenet-f16-256.bin", ""),
    *(("var", ["tokenizer", f"transformer_d{depth}"], f"sample --official vae_ch160v4096z32.pth var_d{depth}.pth --labels 207", fid)
      for depth, fid in ((16, "3.55"), (20, "2.95"), (24, "2.33"), (30, "1.97"), (36, "2.63 (512 px)"))),
    *(("mar", ["vae", size], f"sample --official kl16.ckpt mar_{size}/checkpoint-last.pth --labels 207", fid)
      for size, fid in (("base", "3.48; with guidance 2.31"), ("large", "2.60; 1.78"), ("huge", "2.35; 1.55"))),
    ("magvit", ["om2_video_128_262144"], "reconstruct clip.gif --official video.ckpt", "(FVD of reconstructions: 16)"),
]


def weights(folder=GOLDEN):
    """A row for each released checkpoint: parameters without those of losses and of running means, GiB of them in float32."""
    rows = []
    for name, lists, command, fid in WEIGHTS:
        released = [json.loads(gzip.decompress((folder / f"{name}_{each}_release.json.gz").read_bytes())) for each in lists]
        sizes = [min(each["n_params"], sum(math.prod(shape) for key, shape in each["params"].items() if not key.startswith("loss"))) for each in released]
        file = FILE_OF.get(name, name)
        command = f"`python {file}.py {command}`" if "--official" in command else command
        rows.append([command, " + ".join(f"{size:,}" for size in sizes), f"{sum(sizes) * 4 / 2 ** 30:.2g}", fid])
    return markdown(["command", "parameters (tokenizer + transformer)", "GiB", "FID by its authors (r: of reconstructions)"], rows)


# --- what is compared with whose code

def exactness(folder=GOLDEN):
    """A row for each file and each code it is compared with; released weights: lists of names and shapes that from_official must fit."""
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from test_golden import LEFT_OUT
    counted = {}
    for path in sorted(folder.glob("*_*_*.json")):
        golden = json.loads(path.read_text())
        repository, _, commit, *_ = golden["source"].split()
        name = path.name.split("_")[0]
        row = counted.setdefault((FILE_OF.get(name, name), f"{repository} @ {commit[:7]}"), [0, 0])
        left = len(LEFT_OUT.get(path.stem.rsplit("_", 1)[0], {}).keys() & golden["outputs"].keys())
        row[0] += len(golden["outputs"]) - left
        row[1] += left
    rows = [[f"`{file}.py`", source, str(done), str(left)] for (file, source), (done, left) in sorted(counted.items())]
    rows.append(["all", "", *(str(sum(counts)) for counts in zip(*counted.values()))])
    return markdown(["file", "compared with", "outputs compared", "left out, with the reason"], rows), len(list(folder.glob("*.json.gz")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("which", nargs="?", default="runs", choices=["runs", "comparison", "weights", "exactness"])
    which = parser.parse_args().which
    if which == "exactness":
        text, number = exactness()
        sys.stdout.write(f"{text}\n\nreleased checkpoints whose names and shapes must fit: {number}\n")
    else:
        sys.stdout.write({"runs": table, "comparison": comparison, "weights": weights}[which]() + "\n")
