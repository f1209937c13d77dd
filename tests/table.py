"""Prints README's table from notebooks/reports/*.json:   python tests/table.py

Each report is the report.json of a run, kept under the name of its file and preset (pixelcnn_mnist.json).
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


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
