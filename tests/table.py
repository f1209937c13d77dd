"""Prints README's tables:   python tests/table.py [exactness]

Figures: from notebooks/reports/*.json, each the report.json of a run, kept under the name of its file and preset (pixelcnn_mnist.json).
exactness: what is recorded in tests/golden, of whose code.
"""
import json
import sys
from pathlib import Path

REPORTS = Path(__file__).resolve().parent.parent / "notebooks" / "reports"
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


def table(folder=REPORTS):
    rows = [json.loads(path.read_text()) | {"stem": path.stem} for path in sorted(folder.glob("*.json"))]
    rows = [row | {"preset": row["stem"].removeprefix(row["file"][:-3] + "_")} for row in rows]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def exactness(folder=Path(__file__).resolve().parent / "golden"):
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
    lines = ["| file | compared with | outputs compared | left out, with the reason |", "| --- | --- | --- | --- |"]
    lines += [f"| `{file}.py` | {source} | {done} | {left} |" for (file, source), (done, left) in sorted(counted.items())]
    lines.append(f"| all | | {sum(done for done, _ in counted.values())} | {sum(left for _, left in counted.values())} |")
    return "\n".join(lines), len(list(folder.glob("*.json.gz")))


FILE_OF = {"vqgan": "vqgan_gpt", "movq": "rqvae"}                               # the start of a golden file's name, where it is not the file's


if __name__ == "__main__":
    if sys.argv[1:] == ["exactness"]:
        text, number = exactness()
        sys.stdout.write(f"{text}\n\nreleased checkpoints whose names and shapes must fit: {number}\n")
    else:
        sys.stdout.write(table() + "\n")
