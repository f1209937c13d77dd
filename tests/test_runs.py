"""Run folders: a killed and resumed run ends in the same bits, whatever killed it; several processes equal one."""
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

ONE_OF_EACH = {"pixelcnn-gated", "vqgan_gpt-class", "vqvae2-two", "rqvae-class", "maskgit-class", "var-class", "mar-class", "magvit-class"}        # for slow tests: one variant of each file

# of code that is a declared copy in all files (class Run, main): a file with one stage, and one with two
COPIED = {"pixelcnn-gated", "maskgit-class"}


def only(case, names=ONE_OF_EACH):
    if case.name not in names:
        pytest.skip("one variant of each file")


def same(a, b):
    """Equal bit for bit, through nested dicts, lists and tensors; the seconds of training aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def train(case, folder, resume=False):
    """The tiny config's whole training in this process, without the pictures at the end."""
    m = case.module
    data = m.load_data(case.config)
    run = m.Run(folder) if resume else m.Run(folder, case.config, data.classes)
    m.train_prior(run.config, data, run, m.train_tokenizer(run.config, data, run))
    return run


def start(case, *argv, code=None, **env):
    """The command line in a process of its own."""
    command = ["-c", code] if code else [case.module.__file__]
    return subprocess.Popen([sys.executable, *command, *map(str, argv)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_at_random_steps_and_resumed_ends_in_the_same_bits(case, tmp_path):
    """kill -9 twice at random moments, then resume to the end. Planted: the optimizer left out of the checkpoint; batches drawn
    from one generator for the whole run; metrics of repeated steps kept twice."""
    only(case)
    steps, moment = 3000, random.Random(case.name)
    words = case.flags(train_steps_prior=steps, save_every=20)
    process, start_step = start(case, "train", *words, "--out", tmp_path / "killed"), 0
    for _ in range(2):
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            if (tmp_path / "killed" / "checkpoint.pt").exists() and checkpoint(tmp_path / "killed")["progress"].get("prior", 0) > start_step:
                break
            time.sleep(0.02)
        time.sleep(0.3 * moment.random())
        assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        start_step = checkpoint(tmp_path / "killed")["progress"]["prior"]
        assert 0 < start_step < steps
        process = start(case, "train", "--resume", tmp_path / "killed")
    # the last leg is cut short so that the test is: both runs end three saves after the second kill
    process.kill()
    process.wait()
    stop_at = checkpoint(tmp_path / "killed")["progress"]["prior"] + 60
    runs = {}
    for name in ("killed", "whole"):
        m = case.module
        run = m.Run(tmp_path / name) if name == "killed" else m.Run(tmp_path / name, runs["killed"].config)
        data = m.load_data(run.config)
        run.state["classes"] = data.classes
        original = run.log

        def log(stage, step, run=run, original=original, **metrics):
            if (stage, step) == ("prior", stop_at):
                raise InterruptedError
            original(stage, step, **metrics)
        run.log, runs[name] = log, run
        with pytest.raises(InterruptedError):
            m.train_prior(run.config, data, run, m.train_tokenizer(run.config, data, run))
    killed, whole = checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole")
    assert killed["progress"]["prior"] == stop_at and same(killed, whole)
    rows = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "prior"] == list(range(stop_at))


@pytest.mark.parametrize("stage, step", [("images", 2), ("tokenizer", 7), ("discriminator_tokenizer", 5), ("condition", 6), ("prior", 9)])
def test_stopped_in_any_stage_and_resumed_ends_in_the_same_bits(case, tmp_path, stage, step):
    """Every variant: restarted codes, running means, Gumbel noise, both optimizers. Planted: noise from the global generator;
    the discriminator's optimizer left out of the checkpoint."""
    if stage == "images" and not getattr(case.config, "train_steps_images", 0):
        pytest.skip("this variant has no such stage")
    m = case.module
    data, run = m.load_data(case.config), m.Run(tmp_path / "stopped", case.config)
    run.state["classes"], original = data.classes, run.log

    def log(name, at, **metrics):
        if (name, at) == (stage, step):
            raise InterruptedError
        original(name, at, **metrics)
    run.log = log
    try:
        m.train_prior(run.config, data, run, m.train_tokenizer(run.config, data, run))
        pytest.skip("this variant has no such stage")
    except InterruptedError:
        pass
    torch.manual_seed(999)                                              # a new process would have another global state
    train(case, tmp_path / "stopped", resume=True)
    train(case, tmp_path / "whole")
    assert same(checkpoint(tmp_path / "stopped"), checkpoint(tmp_path / "whole"))


def test_killed_while_it_writes_a_checkpoint(case, tmp_path):
    """The process dies with half of the new checkpoint on disk; the old one loads and the run goes on to the same bits.

    Planted: torch.save straight to checkpoint.pt.
    """
    only(case, COPIED)
    code = f"""
import os, signal, sys, {case.module.__name__} as m
writes = 0
def fsync(descriptor):
    global writes
    writes += "checkpoint" in os.readlink(f"/proc/self/fd/{{descriptor}}")
    if writes == {3 if case.name.startswith("pixelcnn") else 6}:
        os.ftruncate(descriptor, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
m.main(sys.argv[1:])
"""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    process = start(case, "train", *case.flags(), "--out", tmp_path / "killed", code=code)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint(tmp_path / "killed")["progress"]["prior"] == 5
    train(case, tmp_path / "killed", resume=True)
    train(case, tmp_path / "whole")
    assert same(checkpoint(tmp_path / "killed"), checkpoint(tmp_path / "whole"))


def test_ctrl_c_saves_and_says_how_to_go_on(case, tmp_path):
    """Planted: KeyboardInterrupt let through (traceback, nothing saved)."""
    only(case, COPIED)
    first = "train_steps_tokenizer" if case.config.train_steps_tokenizer else "train_steps_prior"     # not between two stages
    process = start(case, "train", *case.flags(**{first: 3000}, save_every=3000), "--out", tmp_path / "run")
    deadline = time.time() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    done = sum(checkpoint(tmp_path / "run")["progress"].values())
    assert process.returncode == 2 and 0 < done < 3000 and "Traceback" not in output
    assert f"--resume {tmp_path / 'run'}" in output.strip().split("\n")[-1]


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(case, tmp_path, fails):
    """The loss is infinite from step 7 on. Planted: the check after the optimizer's step (NaN weights are saved)."""
    m, Prior = case.module, type(case.build()[1])
    loss, calls = Prior.loss, []

    def broken(self, *args):
        value, metrics = loss(self, *args)
        calls.append(1)
        return (value * float("inf") if len(calls) > 7 else value), metrics
    Prior.loss = broken
    try:
        line = fails(m, "train", *case.flags(), "--out", tmp_path / "run", says=["step 7", "checkpoint.pt"])
    finally:
        Prior.loss = loss
    assert "inf" in line
    state = checkpoint(tmp_path / "run")
    assert state["progress"]["prior"] == 5
    assert all(value.isfinite().all() for value in state["objects"]["prior"].values())


def test_training_recipe(case, tmp_path, monkeypatch):
    """The first steps as the config says them: labels dropped at their rate, gradients cut to `clip`, the paper's betas, the first
    discriminator's step. Planted: labels never or inversely dropped; no clipping; Adam's default betas; the GAN from step 0."""
    betas = {"maskgit-class": (0.9, 0.96), "var-class": (0.9, 0.95), "mar-class": (0.9, 0.95)}
    only(case, betas)
    m, config = case.module, dataclasses.replace(case.config, clip=0.01, label_dropout=0.3, train_steps_prior=40, batch_size_prior=32, train_images=50)
    seen, norms, made = [], [], []
    data, run = m.load_data(config), m.Run(tmp_path / "run", config, case.module.load_data(config).classes)
    Prior, name = type(case.build()[1]), "losses" if case.continuous else "loss"
    original, adamw = getattr(Prior, name), torch.optim.AdamW

    class AdamW(adamw):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self.param_groups[0]["betas"])

        def step(self, *args, **kwargs):
            norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
            return super().step(*args, **kwargs)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(Prior, name, lambda self, tokens, labels, *more: seen.append(labels) or original(self, tokens, labels, *more))
    m.train_prior(config, data, run, m.train_tokenizer(config, data, run))
    dropped = (torch.cat(seen) == config.num_classes).float().mean()
    assert 0.25 < dropped < 0.35 and made == [betas[case.name]]
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    if case.name != "maskgit-class":                                    # there both losses are in one row
        rows = [row["step"] for row in run.state["metrics"] if row["stage"] == "discriminator"]
        assert rows == list(range(config.disc_start, config.train_steps_tokenizer))


def test_compile_compiles_what_training_calls(case, tmp_path, monkeypatch):
    """Planted: prior.compile(), which compiles forward, which training does not call."""
    compiled = {"rqvae-class": ["loss"], "maskgit-class": ["loss"], "var-class": ["logits"], "mar-class": ["losses"], "magvit-class": ["loss"]}      # var's loss takes numbers that change
    only(case, compiled)
    calls, module = [], case.module
    monkeypatch.setattr(torch, "compile", lambda function: lambda *a: calls.append(function.__name__) or function(*a))
    config = dataclasses.replace(case.config, compile=True, train_steps_prior=1, train_images=20, test_images=10, batch_size_prior=4)
    data = module.load_data(config)
    module.train_prior(config, data, module.Run(tmp_path / "run", config, data.classes), module.build_tokenizer(config).eval())
    assert calls == compiled[case.name]


def test_compile_leaves_the_moving_codebook_alone(case, tmp_path, monkeypatch):
    """The compiler may read a weight again in the backward pass that update has moved. And a compiled graph takes one backward pass:
    the last layer, whose gradient adaptive_weight takes alone, stays outside. Planted: tokenizer.compile(); decoder.compile()."""
    parts = ["Encoder", "Sequential", "Level", "Level"]
    compiled = {"maskgit-class": ["Encoder", "Decoder"], "magvit-class": 2 * ["Encoder", "Decoder"]} | dict.fromkeys(("vqgan_gpt-class", "rqvae-class", "var-class", "mar-class"), parts)
    only(case, compiled)
    calls, module = [], case.module
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: calls.append(type(self).__name__))
    config = dataclasses.replace(case.config, compile=True, train_steps_tokenizer=1, train_images=20, test_images=10, batch_size=4)
    data = module.load_data(config)
    module.train_tokenizer(config, data, module.Run(tmp_path / "run", config, data.classes))
    assert calls == compiled[case.name]


def test_two_processes_equal_one(case, tmp_path):
    """torchrun with two gloo processes, the same global batch: equal losses to 1e-5. Planted: gradients summed, not averaged;
    every process takes the whole batch's first half."""
    only(case, {"pixelcnn-binary", "vqgan_gpt-start", "maskgit-start", "var-start", "mar-start", "magvit-causal"})         # binary: its data step is random too; start: BatchNorm's statistics are
    # each process's own, as in the release, so the variant without a discriminator
    process = start(case, "--nproc-per-node", 2, "--master-port", 29517, case.module.__file__, "train", *case.flags(),
                    "--out", tmp_path / "two", code="from torch.distributed.run import main; main()")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    train(case, tmp_path / "one")
    losses = {name: [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")}
    assert len(losses["one"]) == case.config.train_steps_prior + case.config.train_steps_tokenizer
    assert losses["two"] == pytest.approx(losses["one"], abs=1e-5, rel=1e-6)          # a sum over an image's pixels is a hundred or more


def test_the_whole_command_line_runs(case, tmp_path, capsys):
    """Every verb that fits the model: the file named in the last line exists, samples.npz is uint8 NHWC."""
    import numpy as np
    m, run = case.module, tmp_path / "run"
    maps = getattr(case.config, "condition", "class") not in ("class", "text")
    m.main(["train", *case.flags(), "--out", str(run)])
    kind, more = ("gif", "edit") if case.video else ("png", "complete")
    verbs = [["reconstruct", str(run), str(run / f"reconstructions.{kind}")], ["evaluate", str(run)]]
    verbs += [["paint", str(run), str(run / "reconstructions.png"), "--num", "1"]] if maps else [["sample", str(run), "--num", "3", "--out", str(tmp_path / f"grid.{kind}")],
                                                               [more, str(run), "--num", "1"]]
    if case.config.num_classes and "interpolate" in m.VERBS:
        verbs += [["interpolate", str(run), "--labels", "0", "star", "--num", "1"]]
    for verb in verbs:
        m.main(verb)
        last = capsys.readouterr().out.strip().split("\n")[-1]
        assert os.path.exists(last.split("   next: ")[0]) and "next: python " in last
    if not maps:
        samples = np.load(run / "samples.npz")["arr_0"]
        frames = (case.config.frames,) if case.video else ()
        assert samples.dtype == np.uint8 and samples.shape == (3, *frames, case.config.image_size, case.config.image_size, 3)
    assert (run / "curves.png").stat().st_size > 1000 and (run / "reconstructions.png").exists()
    report = json.loads((run / "report.json").read_text())
    said = ("diffusion_loss", "kl_nats_per_image") if case.continuous else ("nats_per_token", "codebook_use", "perplexity")
    for key in ("psnr", "samples_per_second", "parameters", "peak_memory_mib", "train_seconds", *said):
        assert report[key] is not None and report[key] >= 0, key
