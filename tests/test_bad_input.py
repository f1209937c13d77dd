"""Mistakes of a user, one test each: one line that says what was wrong and what would be right, exit code 2, no traceback."""
import dataclasses
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import zipfile

import pytest
import torch
from PIL import Image


@pytest.fixture
def module():
    import pixelcnn
    return pixelcnn


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny finished run of pixelcnn.py; tests work on copies."""
    from conftest import CASES

    import pixelcnn
    config = pixelcnn.Config(**CASES["pixelcnn-gated"][1])
    folder, data = tmp_path_factory.mktemp("runs") / "run", pixelcnn.load_data(config)
    run = pixelcnn.Run(folder, config, data.classes)
    pixelcnn.train_prior(config, data, run, pixelcnn.train_tokenizer(config))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def finished(module, case, tmp_path_factory, **more):
    """The folder of a run of the tiny config `case` that is trained to its end."""
    from conftest import CASES
    config = module.Config(**CASES[case][1] | more)
    folder, data = tmp_path_factory.mktemp("runs") / case, module.load_data(config)
    run = module.Run(folder, config, data.classes)
    module.train_prior(config, data, run, module.train_tokenizer(config, data, run))
    return folder


def make_images(root, corrupt=False, per_class=11):
    for name in ("cat", "dog"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", (20, 12), (10 * i, 20, 30)).save(root / "train" / name / f"{i:02}.png")
    if corrupt:
        path = root / "train" / "cat" / "03.png"
        path.write_bytes(path.read_bytes()[:40])


TINY = ["--num-classes", "2", "--image-size", "8", "--layers", "1", "--width", "3", "--head", "3", "--train-steps-prior", "1"]


@pytest.mark.parametrize("argv, says", [
    (["train", "--preset", "mnits"], ["mnits", "mnist"]),
    (["train", "--widht", "3"], ["--widht", "--help"]),
    (["trian"], ["trian", "train"]),
    (["train", "--width", "wide"], ["--width", "int", "wide"]),
    (["train", "--lr", "fast"], ["--lr", "float", "fast"]),
    (["train", "--width", "10"], ["width 10", "divisible", "3"]),
    (["train", "--head", "10"], ["head 10", "divisible"]),
    (["train", "--kernel", "4"], ["kernel 4", "3, 5"]),
    (["train", "--kernel", "-3"], ["kernel is -3", "at least 1"]),
    (["train", "--batch-size", "0"], ["batch_size is 0", "at least 1"]),
    (["train", "--save-every", "0"], ["save_every is 0", "at least 1"]),
    (["train", "--train-images", "-5"], ["train_images is -5"]),
    (["train", "--lr", "-1"], ["lr", "positive"]),
    (["train", "--seed", "-1"], ["seed -1"]),
    (["train", "--train-steps-tokenizer", "3"], ["train_steps_tokenizer", "nothing to learn"]),
    (["train", "--levels", "1"], ["levels", "2 to 256"]),
    (["train", "--likelihood", "normal"], ["normal", "softmax or logistic"]),
    (["train", "--model", "rnn"], ["rnn", "gated or pixelcnn"]),
    (["train", "--model", "pixelcnn"], ["condition", "--num-classes 0"]),
    (["train", "--data", "no/such/folder"], ["no/such/folder"]),
    (["sample"], ["run"]),
    (["sample", "no/such/run"], ["no/such/run", "checkpoint.pt"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_command_lines(module, fails, argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(module, *argv, says=says)
    assert not list(tmp_path.iterdir())                                 # nothing is left behind


def test_empty_folder(module, fails, tmp_path):
    (tmp_path / "data").mkdir()
    fails(module, "train", *TINY, "--data", tmp_path / "data", "--out", tmp_path / "run", says=["no", "train/<class>/"])


def test_corrupt_image_is_named_and_can_be_skipped(module, fails, tmp_path, capsys):
    make_images(tmp_path / "data", corrupt=True)
    words = ["train", *TINY, "--batch-size", "2", "--data", tmp_path / "data", "--out", tmp_path / "run"]
    fails(module, *words, says=["train/cat/03.png", "--skip-corrupt"])
    config = module.Config(data=str(tmp_path / "data"), image_size=8, num_classes=2, skip_corrupt=True)
    data = module.load_data(config)
    assert "left out: train/cat/03.png" in capsys.readouterr().out
    assert data.classes == ["cat", "dog"] and len(data.train[0]) + len(data.test[0]) == 21 and len(data.test[0]) == 2


def test_data_that_moved_after_the_last_step(module, tmp_path):
    """Planted: the new place not saved, since no step is left (evaluate then looks in the old one)."""
    make_images(tmp_path / "data")
    module.main(["train", *TINY, "--batch-size", "2", "--train-steps-prior", "1", "--num-classes", "2", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    (tmp_path / "data").rename(tmp_path / "moved")
    module.main(["train", "--resume", str(tmp_path / "run"), "--data", str(tmp_path / "moved")])
    module.main(["evaluate", str(tmp_path / "run")])


def test_truncated_zip(module, fails, tmp_path):
    make_images(tmp_path / "data")
    path = shutil.make_archive(tmp_path / "images", "zip", tmp_path / "data")
    whole = module.load_data(module.Config(data=path, image_size=8, num_classes=2))
    folder = module.load_data(module.Config(data=str(tmp_path / "data"), image_size=8, num_classes=2))
    assert torch.equal(whole.train[0], folder.train[0]) and torch.equal(whole.test[1], folder.test[1])
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    fails(module, "train", *TINY, "--data", path, "--out", tmp_path / "run", says=["images.zip", "whole"])


def test_corrupt_member_of_a_zip_is_named(module, fails, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(12):
            Image.new("RGB", (8, 8)).save(buffer := io.BytesIO(), "PNG")
            archive.writestr(f"train/a/{i:02}.png", buffer.getvalue() if i != 4 else b"no picture")
    fails(module, "train", *TINY, "--data", tmp_path / "images.zip", "--out", tmp_path / "run", says=["train/a/04.png", "--skip-corrupt"])


def test_wrong_number_of_classes(module, fails, tmp_path):
    make_images(tmp_path / "data")
    fails(module, "train", "--data", tmp_path / "data", "--out", tmp_path / "run", says=["2 classes", "--num-classes 2"])


@pytest.mark.parametrize("damage, says", [("truncated", "truncated"), ("other content", "checksum"), ("no gzip", "truncated or corrupt")])
def test_damaged_mnist_file(module, fails, tmp_path, damage, says):
    (tmp_path / "mnist").mkdir()
    file = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    whole = gzip.compress(os.urandom(5000))
    file.write_bytes({"truncated": whole[:1000], "other content": whole, "no gzip": b"<html>"}[damage])
    fails(module, "train", "--preset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run", says=[file.name, says, "delete it"])


@pytest.mark.parametrize("words, says", [(["--labels", "9"], ["9", "0 to 8", "circle"]), (["--labels", "-1"], ["-1"]), (["--labels", "cat"], ["cat", "star"]), (["--labels", "9" * 5000], ["0 to 8"])])
def test_unknown_labels(module, fails, run, words, says):
    fails(module, "sample", run, *words, says=says)


def test_a_run_of_another_file_is_told_apart(module, fails, run, tmp_path):
    """Planted: the missing field as a refused checkpoint, with the advice to train anew."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["config"]["no_such_field"] = 1
    torch.save(state, tmp_path / "checkpoint.pt")
    fails(module, "sample", tmp_path, says=["another file", "no_such_field"])


def test_a_photo_is_no_run(module, fails, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.png")
    fails(module, "reconstruct", tmp_path / "photo.png", says=["photo.png", "name a run folder"])


def test_photos_of_a_model_with_classes_need_labels(module, fails, run, tmp_path):
    Image.new("RGB", (30, 20), (250, 20, 20)).save(tmp_path / "photo.png")
    fails(module, "complete", run, tmp_path / "photo.png", says=["--labels"])
    module.main(["complete", str(run), str(tmp_path / "photo.png"), "--labels", "star", "--num", "1"])


def test_resume_takes_no_preset_and_no_out(module, fails, run):
    fails(module, "train", "--resume", run, "--preset", "mnist", says=["--preset"])
    fails(module, "train", "--resume", run, "--out", "elsewhere", says=["--out"])


def test_rank_without_torchrun(module, fails, monkeypatch, run):
    monkeypatch.setenv("RANK", "0")
    fails(module, "sample", run, says=["torchrun"])


def test_part_of_a_folder_has_all_classes(module, tmp_path):
    """Planted: the first names of the sorted list."""
    make_images(tmp_path / "data")
    data = module.load_data(module.Config(data=str(tmp_path / "data"), image_size=8, num_classes=2, train_images=10))
    assert data.train[1].unique().tolist() == [0, 1] and len(data.train[1]) == 10


def test_sixteen_bits_and_rotation_are_read(module, tmp_path):
    import numpy as np
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(tmp_path / "deep.png")
    assert module.read_image(tmp_path / "deep.png", 8).mean() == pytest.approx(20000 / 256, abs=1)
    exif = Image.Exif()
    exif[0x0112] = 3                                                    # stored upside down
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    Image.fromarray(pixels).save(tmp_path / "phone.jpg", exif=exif, quality=100)
    assert module.read_image(tmp_path / "phone.jpg", 8)[0].mean() < 50


def test_labels_of_a_model_without_classes(module, fails, tmp_path):
    config = module.Config(model="pixelcnn", num_classes=0, image_size=4, layers=1, width=3, head=3, train_images=10, test_images=10,
                           train_steps_prior=1, batch_size=2)
    module.train_prior(config, module.load_data(config), module.Run(tmp_path / "run", config), module.train_tokenizer(config))
    fails(module, "sample", tmp_path / "run", "--labels", "1", says=["without classes"])


def test_photo_that_is_none(module, fails, run, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"no picture")
    fails(module, "reconstruct", run, tmp_path / "photo.png", says=["photo.png"])
    fails(module, "complete", run, tmp_path / "missing.png", "--labels", "star", says=["missing.png"])


def test_folder_without_checkpoint(module, fails, tmp_path):
    fails(module, "train", "--resume", tmp_path, says=[str(tmp_path), "checkpoint.pt"])


def test_truncated_checkpoint(module, fails, run):
    with open(run / "checkpoint.pt", "r+b") as file:
        file.truncate(2000)
    fails(module, "train", "--resume", run, says=["checkpoint.pt", "truncated"])


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("write", [lambda path: torch.save({"config": Bomb()}, path), lambda path: path.write_bytes(pickle.dumps(Bomb()))])
def test_pickle_that_would_run_code(module, fails, run, tmp_path, monkeypatch, write):
    monkeypatch.setenv("BOMB", str(tmp_path / "it ran"))
    write(run / "checkpoint.pt")
    fails(module, "train", "--resume", run, says=["checkpoint.pt", "refused"])
    fails(module, "sample", run, says=["refused"])
    assert not (tmp_path / "it ran").exists()


def test_resume_with_another_config(module, fails, run):
    fails(module, "train", "--resume", run, "--width", "36", "--lr", "0.5", says=["width 18", "36", "lr", "0.5"])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "layers": 7}))
    fails(module, "train", "--resume", run, says=["layers 2", "7"])


def test_a_run_is_not_overwritten(module, fails, run):
    before = (run / "checkpoint.pt").read_bytes()
    fails(module, "train", "--train-images", "10", "--test-images", "10", "--out", run, says=["--resume", "--out"])
    assert (run / "checkpoint.pt").read_bytes() == before


def test_output_folder_not_writable(module, fails, tmp_path):
    (tmp_path / "file").write_text("")
    fails(module, "train", "--train-images", "10", "--test-images", "10", "--out", tmp_path / "file" / "run", says=["run", "--out"])


def test_picture_not_writable(module, fails, run):
    fails(module, "reconstruct", run, "--out", run / "no folder" / "x.png", says=["x.png", "cannot write"])


def test_full_disk_keeps_the_last_good_checkpoint(module, fails, run):
    """No file may grow beyond a few bytes: what a full disk does to a write. Planted: no temporary file."""
    good = torch.load(run / "checkpoint.pt", weights_only=True)
    config = module.Config(**good["config"])
    half = module.Run(run)
    half.state["progress"]["prior"] = 6                                  # six of twelve steps: the rest comes again
    torch.save(half.state, run / "checkpoint.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        fails(module, "train", "--resume", run, says=["checkpoint.pt", "unharmed"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert module.Run(run).state["progress"]["prior"] == 6 and not list(run.glob("*.tmp"))
    assert dataclasses.asdict(config) == good["config"]


# --- vqgan_gpt.py

TINY_VQGAN = ["--num-classes", "2", "--image-size", "8", "--ch-mult", "1", "1", "--layers", "1", "--width", "8", "--heads", "2", "--batch-size", "2",
              "--batch-size-prior", "2", "--train-steps-tokenizer", "1", "--train-steps-prior", "1", "--disc-start", "9", "--disc-layers", "1"]


@pytest.fixture(scope="session")
def trained_vqgan(tmp_path_factory):
    import vqgan_gpt
    return finished(vqgan_gpt, "vqgan_gpt-class", tmp_path_factory)


@pytest.fixture
def vqgan(trained_vqgan, tmp_path):
    import vqgan_gpt
    return vqgan_gpt, shutil.copytree(trained_vqgan, tmp_path / "vqgan")


@pytest.mark.parametrize("words, says", [
    (["--ch", "20"], ["ch 20", "groups, 8"]),
    (["--width", "130"], ["width 130", "heads, 4"]),
    (["--image-size", "30"], ["30 pixels", "f = 4"]),
    (["--top-k", "257"], ["top_k is 257", "0 to 256"]),
    (["--top-p", "1.5"], ["top_p is 1.5"]),
    (["--codebook-size", "8"], ["9 classes", "8 codes"]),
    (["--condition", "sketch", "--num-classes", "0"], ["sketch", "class, coordinates, edges"]),
    (["--condition", "edges"], ["edges", "--num-classes 0"]),
    (["--quantizer", "fsq"], ["fsq", "vq, gumbel"]),
    (["--gan", "wgan"], ["wgan", "hinge, vanilla"]),
    (["--ch-mult"], ["ch_mult"]),
    (["--ch-mult", "1", "x"], ["--ch-mult", "x"]),
    (["--crop", "64"], ["crop 64", "24"]),
    (["--guidance", "2", "--label-dropout", "0"], ["guidance", "--label-dropout"]),
    (["--pkeep", "-1"], ["pkeep is -1"]),
    (["--lpips", "download", "--data-dir", "nowhere"], ["cannot download", "vgg16"]),
    (["--lpips", "no/such.ckpt"], ["no/such.ckpt", "no file and no folder"]),
    (["--block-size", "5"], ["block_size 5", "at least 36"]),
    (["--vocab-size", "10"], ["vocab_size 10"]),
    (["--image-size", "8", "--disc-layers", "2"], ["disc_layers 2", "too small"]),
    (["--condition", "segmentation", "--num-classes", "0"], ["segmentation maps"]),
    (["--guidance", "nan"], ["guidance is nan"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_vqgan_command_lines(fails, words, says, tmp_path, monkeypatch):
    import vqgan_gpt
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vqgan_gpt.DOWNLOADS, "vgg16", ("http://127.0.0.1:9/", vqgan_gpt.DOWNLOADS["vgg16"][1]))
    fails(vqgan_gpt, "train", "--train-images", "10", "--test-images", "10", *words, says=says)


@pytest.mark.parametrize("words, says", [
    (["sample", "--top-k", "17"], ["top_k is 17", "0 to 16"]),
    (["sample", "--top-k", "-2"], ["top_k is -2"]),
    (["sample", "--top-p", "0"], ["top_p"]),
    (["sample", "--size", "9", "8"], ["--size 9 8", "multiples of 2"]),
    (["sample", "--size", "4", "8"], ["2 x 4 codes are too few", "4 x 4"]),
    (["sample", "--labels", "nine"], ["nine", "circle"]),
    (["sample", "--temperature", "0"], ["temperature is 0"]),
    (["paint"], ["draws from class", "--condition edges"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_vqgan_verbs(fails, vqgan, words, says):
    module, run = vqgan
    fails(module, words[0], run, *words[1:], says=says)


def test_flags_that_do_not_apply_to_a_model_of_maps(fails, tmp_path):
    """Planted: --size and --labels silently ignored."""
    from conftest import CASES

    import vqgan_gpt
    c = vqgan_gpt.Config(**CASES["vqgan_gpt-edges"][1] | dict(train_steps_tokenizer=1, train_steps_prior=1))
    run, data = vqgan_gpt.Run(tmp_path / "run", c), vqgan_gpt.load_data(c)
    vqgan_gpt.train_prior(c, data, run, vqgan_gpt.train_tokenizer(c, data, run))
    for words in (["--size", "16", "16"], ["--labels", "star"]):
        fails(vqgan_gpt, "sample", run.folder, *words, says=["edges", "do not apply"])


def test_small_photo_is_refused_by_its_size(fails, vqgan, tmp_path):
    module, run = vqgan
    Image.new("RGB", (20, 7)).save(tmp_path / "small.png")
    fails(module, "reconstruct", run, tmp_path / "small.png", says=["small.png is too small", "20 x 7", "8 x 8"])
    (tmp_path / "none.png").write_bytes(b"no picture")
    fails(module, "reconstruct", run, tmp_path / "none.png", says=["none.png cannot be read"])
    fails(module, "complete", run, tmp_path / "missing.png", "--labels", "star", says=["missing.png"])


@pytest.mark.parametrize("mode, colour, expected", [("L", 100, 100), ("LA", (100, 255), 100), ("LA", (100, 0), 255), ("RGBA", (9, 9, 9, 0), 255),
                                                    ("I;16", 25700, 100), ("1", 1, 255), ("P", 0, None), ("CMYK", (0, 0, 0, 0), 255)])
def test_pictures_of_other_kinds_are_read(vqgan, tmp_path, mode, colour, expected):
    """Grey, with alpha (transparent is white), 16 bits, palette. Planted: alpha dropped, so that transparent pixels are black."""
    module, run = vqgan
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    Image.new(mode, (12, 12), colour).save(path)
    pixels = module.read_image(path, 8)
    assert pixels.shape == (8, 8, 3) and (expected is None or abs(int(pixels.mean()) - expected) <= 1)
    module.main(["reconstruct", str(run), str(path), "--out", str(tmp_path / "out.png")])


def test_run_stopped_before_its_prior(fails, vqgan):
    """Planted: an untrained GPT that draws noise."""
    module, run = vqgan
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    del state["objects"]["prior"]
    torch.save(state, run / "checkpoint.pt")
    fails(module, "sample", run, says=["no trained prior yet", "--resume"])


def test_checkpoint_of_another_model(fails, vqgan, tmp_path):
    module, run = vqgan
    torch.save({"state_dict": {f"layers.{i}.weight": torch.zeros(2) for i in range(7)}}, tmp_path / "other.ckpt")
    line = fails(module, "reconstruct", "--official", tmp_path / "other.ckpt", says=["other.ckpt", "do not fit", "layers.0.weight", "layers.4.weight"])
    assert "layers.5" not in line
    for content in ({"state_dict": None}, {1: torch.zeros(1)}, torch.zeros(3), [1, 2]):
        torch.save(content, tmp_path / "odd.ckpt")
        fails(module, "reconstruct", "--official", tmp_path / "odd.ckpt", says=["odd.ckpt holds no names and tensors"])
    fails(module, "sample", run, "--official", tmp_path / "other.ckpt", says=["one of them"])
    fails(module, "reconstruct", "--official", run / "checkpoint.pt", says=["a run of this script"])


def test_vqgan_folder_and_tuples_on_the_command_line(vqgan, tmp_path):
    """A folder of grey and transparent pictures is trained on; ch_mult survives config.json and --resume."""
    module, _ = vqgan
    make_images(tmp_path / "data")
    Image.new("LA", (9, 9), (50, 100)).save(tmp_path / "data" / "train" / "cat" / "grey.png")
    module.main(["train", *TINY_VQGAN, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")])
    module.main(["train", "--resume", str(tmp_path / "run")])
    assert module.Run(tmp_path / "run").config.ch_mult == (1, 1)


# --- vqvae2.py

@pytest.fixture(scope="session")
def trained_vqvae(tmp_path_factory):
    import vqvae2
    return finished(vqvae2, "vqvae2-two", tmp_path_factory)


@pytest.fixture
def vqvae(trained_vqvae, tmp_path):
    import vqvae2
    return vqvae2, shutil.copytree(trained_vqvae, tmp_path / "vqvae")


@pytest.mark.parametrize("words, says", [
    (["--image-size", "36"], ["36 pixels", "not divisible by 8", "2 levels"]),
    (["--image-size", "24", "--levels", "3"], ["width has 2 numbers", "3 levels"]),
    (["--levels", "4"], ["levels is 4", "1, 2 or 3"]),
    (["--codebook", "fsq"], ["fsq", "ema, release, debiased, gradient"]),
    (["--width", "64"], ["width has 1 numbers", "2 levels"]),
    (["--width", "60", "64", "--heads", "8", "0"], ["width 60", "heads"]),
    (["--cond-width", "32", "0"], ["cond_width", "coarser codes"]),
    (["--kernel", "4"], ["kernel 4", "3, 5"]),
    (["--dropout", "0", "100"], ["dropout", "per cent"]),
    (["--codebook-decay", "1"], ["codebook_decay is 1.0"]),
    (["--channels", "33"], ["channels is 33", "even"]),
    (["--res-width", "x"], ["--res-width", "x"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_vqvae_command_lines(fails, words, says, tmp_path, monkeypatch):
    import vqvae2
    monkeypatch.chdir(tmp_path)
    fails(vqvae2, "train", "--train-images", "10", "--test-images", "10", *words, says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, says", [
    (["sample", "--labels", "nine"], ["nine", "circle"]),
    (["sample", "--temperature", "0"], ["temperature is 0"]),
    (["sample", "--num", "0"], ["--num", "less than 1"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_vqvae_verbs(fails, vqvae, words, says):
    module, run = vqvae
    fails(module, words[0], run, *words[1:], says=says)


def test_prior_of_another_tokenizers_codes(fails, vqvae):
    """The hash that the prior keeps tells. Planted: no check; a hash of the config alone."""
    module, run = vqvae
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["objects"]["tokenizer"]["quantize.1.embed"][0, 0] += 1e-3
    torch.save(state, run / "checkpoint.pt")
    for verb in ("sample", "evaluate"):
        fails(module, verb, run, says=["vqvae", "codes of another tokenizer", "train the prior anew"])
    state["progress"]["prior"] -= 3
    torch.save(state, run / "checkpoint.pt")
    fails(module, "train", "--resume", run, says=["codes of another tokenizer"])


def test_cached_tokens_of_another_tokenizer_are_made_anew(vqvae, fails):
    """tokens.npz of another tokenizer is not used; a damaged one is named. Planted: no comparison."""
    import numpy as np
    module, folder = vqvae
    run, tokenizer, _ = module.load_run(folder)
    data = module.load_data(run.config)
    tokens = module.cached_tokens(tokenizer, data, run)
    np.savez(folder / "tokens.npz", made_of=np.zeros(32, np.uint8), tokens=np.zeros((3, 20), np.uint16))
    assert torch.equal(module.cached_tokens(tokenizer, data, run), tokens)
    data.train = (data.train[0].flip(0), data.train[1].flip(0))         # other data, the same tokenizer
    assert torch.equal(module.cached_tokens(tokenizer, data, run), tokens.flip(0))
    (folder / "tokens.npz").write_bytes(b"half")
    with pytest.raises(module.UserError, match="tokens.npz is damaged"):
        module.cached_tokens(tokenizer, data, run)


def test_vqvae_checkpoint_of_another_model(fails, vqvae, tmp_path):
    module, run = vqvae
    torch.save({f"layers.{i}.weight": torch.zeros(2) for i in range(7)}, tmp_path / "other.pt")
    line = fails(module, "reconstruct", "--official", tmp_path / "other.pt", says=["other.pt", "do not fit", "layers.0.weight", "layers.4.weight"])
    assert "layers.5" not in line
    for content in ({"model": None}, {1: torch.zeros(1)}, torch.zeros(3), [1, 2]):
        torch.save(content, tmp_path / "odd.pt")
        fails(module, "reconstruct", "--official", tmp_path / "odd.pt", says=["odd.pt holds no names and tensors"])
    fails(module, "reconstruct", "--official", run / "checkpoint.pt", says=["a run of this script"])
    fails(module, "reconstruct", "--official", tmp_path / "no.pt", says=["no.pt cannot be read"])


# --- rqvae.py

@pytest.fixture(scope="session")
def trained_rqvae(tmp_path_factory):
    import rqvae
    folders = {name: finished(rqvae, name, tmp_path_factory, train_steps_tokenizer=2, train_steps_prior=2) for name in ("rqvae-class", "rqvae-text")}
    return rqvae, folders["rqvae-class"], folders["rqvae-text"]


@pytest.mark.parametrize("words, says", [
    (["--image-size", "26"], ["26 pixels", "f = 4"]),
    (["--depth", "0"], ["depth is 0"]),
    (["--condition", "edges"], ["edges", "class or text"]),
    (["--condition", "text"], ["--num-classes 0"]),
    (["--tau", "0"], ["tau", "positive"]),
    (["--heads", "3"], ["width 128", "heads, 3"]),
    (["--top-k", "65"], ["top_k is 65", "0 to 64"]),
    (["--guidance", "2", "--label-dropout", "0"], ["guidance", "--label-dropout"]),
    (["--guidance", "1e9"], ["guidance is 1000000000.0", "up to 100"]),
    (["--ch", "18"], ["ch 18", "groups, 4"]),
    (["--image-size", "8"], ["disc_layers 2", "too small"]),
    (["--image-size", "12", "--lpips", "download"], ["LPIPS", "16 pixels", "12"]),
    (["--condition", "text", "--num-classes", "0", "--data", "mnist"], ["captions", "shapes"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_rqvae_command_lines(fails, words, says, tmp_path, monkeypatch):
    import rqvae
    monkeypatch.chdir(tmp_path)
    fails(rqvae, "train", "--train-images", "10", "--test-images", "10", *words, says=says)
    assert not list(tmp_path.iterdir())


def test_rqvae_verbs(fails, trained_rqvae, tmp_path):
    module, run, text = trained_rqvae
    fails(module, "sample", run, "--caption", "a star", says=["without captions", "--labels"])
    fails(module, "sample", text, "--labels", "star", says=["--caption"])
    fails(module, "sample", text, "--caption", "a huge red star", says=["'huge'", "small", "star"])
    fails(module, "sample", text, "--caption", "", says=["0 words"])
    fails(module, "sample", run, "--top-p", "0", says=["top_p is 0"])
    fails(module, "sample", run, "--labels", "nine", says=["nine", "circle"])
    Image.new("RGB", (20, 7)).save(tmp_path / "small.png")
    fails(module, "reconstruct", run, tmp_path / "small.png", says=["small.png is too small", "8 x 8"])
    module.main(["sample", str(text), "--caption", "a large red star", "a ring", "--num", "3", "--out", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").exists()


def test_rqvae_checkpoints_that_do_not_belong_together(fails, trained_rqvae, tmp_path, monkeypatch):
    """Planted: no comparison of depth and codebook (the transformer would read other stacks)."""
    module, run, _ = trained_rqvae
    monkeypatch.chdir(tmp_path)
    state = torch.load(run / "checkpoint.pt", weights_only=True)["objects"]
    config = module.Run(run).config
    other = module.RQTransformer(dataclasses.replace(config, depth=2, width=64, heads=1, label_dropout=0.0, guidance=1.0))
    torch.save({"state_dict": {k: v for k, v in other.state_dict().items() if k != "codebook"}}, "transformer.pt")
    torch.save({"state_dict": {k.replace("quantizer.", f"quantizer.codebooks.{d}."): v for k, v in state["tokenizer"].items() for d in range(3)}},
               "tokenizer.pt")
    fails(module, "sample", "--official", "tokenizer.pt", "transformer.pt", says=["transformer.pt", "(2, 16, 8)", "(3, 16, 8)"])
    fails(module, "sample", "--official", "tokenizer.pt", says=["is a tokenizer", "transformer too"])
    fails(module, "sample", run, "--official", "tokenizer.pt", "transformer.pt", says=["one of them"])
    fails(module, "reconstruct", "--official", "transformer.pt", says=["tokenizer first"])
    fails(module, "reconstruct", "--official", "no.pt", says=["no.pt cannot be read"])
    fails(module, "reconstruct", "--official", str(run / "checkpoint.pt"), says=["a run of this script"])
    text = module.RQTransformer(dataclasses.replace(config, width=64, heads=1, label_dropout=0.0, guidance=1.0, num_classes=0, condition="text"), (50, 9))
    torch.save({k: v for k, v in text.state_dict().items() if k != "codebook"}, "text.pt")
    fails(module, "sample", "--official", "tokenizer.pt", "text.pt", says=["text.pt reads byte pairs", "(B, 9)"])
    # and a pair that fits: the transformer's file does not say how many pixels a place has
    fits = module.RQTransformer(dataclasses.replace(config, width=64, heads=1, label_dropout=0.0, guidance=1.0, depth=3))
    torch.save({"state_dict": {k: v for k, v in fits.state_dict().items() if k != "codebook"}}, "fits.pt")
    Image.new("RGB", (20, 9)).save("photo.png")
    module.main(["complete", "photo.png", "--labels", "1", "--num", "2", "--out", "out.png", "--official", "tokenizer.pt", "fits.pt"])
    assert Image.open("out.png").size == (4 * (64 + 2), 64 + 2)


# --- maskgit.py

@pytest.fixture(scope="session")
def trained_maskgit(tmp_path_factory):
    import maskgit
    alone = dict(label_dropout=0.0, guidance=1.0)                       # never without a class
    return maskgit, *(finished(maskgit, "maskgit-class", tmp_path_factory, train_steps_tokenizer=2, train_steps_prior=2, **more) for more in ({}, alone))


@pytest.mark.parametrize("words, says", [
    (["--image-size", "30", "--disc-weight", "0"], ["30 pixels", "f = 4"]),
    (["--image-size", "4", "--disc-weight", "0"], ["one token", "2 x 2"]),
    (["--schedule", "cosin"], ["'cosin'", "cosine, linear, square, cubic, sqrt, log, exponential"]),
    (["--schedule", "pow"], ["'pow'", "pow2.5"]),
    (["--gan", "wgan"], ["wgan", "non-saturating or hinge"]),
    (["--heads", "3"], ["width 128", "heads, 3"]),
    (["--ch", "20"], ["ch 20", "groups, 8"]),
    (["--ch-mult"], ["ch_mult"]),
    (["--guidance", "2", "--label-dropout", "0"], ["guidance", "--label-dropout"]),
    (["--guidance", "inf"], ["guidance is inf"]),
    (["--label-smoothing", "1"], ["label_smoothing is 1.0", "below 1"]),
    (["--sample-steps", "0"], ["sample_steps is 0"]),
    (["--choice-temperature", "-1"], ["choice_temperature is -1.0"]),
    (["--entropy-temperature", "0"], ["entropy_temperature", "positive"]),
    (["--codebook-size", "70000"], ["70000", "65536"]),
    (["--perceptual", "no/such.pth"], ["no/such.pth", "is no file"]),
    (["--perceptual", "download", "--data-dir", "nowhere"], ["cannot download", "resnet50"]),
    (["--ema", "1"], ["ema is 1.0"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_maskgit_command_lines(fails, words, says, tmp_path, monkeypatch):
    import maskgit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(maskgit.DOWNLOADS, "resnet50", ("http://127.0.0.1:9/", maskgit.DOWNLOADS["resnet50"][1]))
    fails(maskgit, "train", "--train-images", "10", "--test-images", "10", *words, says=says)


@pytest.mark.parametrize("words, says", [
    (["sample", "--sample-steps", "0"], ["--sample-steps", "less than 1"]),
    (["sample", "--schedule", "fast"], ["'fast'", "cosine"]),
    (["sample", "--labels", "nine"], ["nine", "circle"]),
    (["sample", "--guidance", "nan"], ["guidance is nan"]),
    (["sample", "--temperature", "0"], ["temperature is 0"]),
    (["replace", "--labels", "1"], ["--box"]),
    (["replace", "--labels", "1", "--box", "4", "4", "8", "2"], ["box 4 4 8 2", "8 x 8"]),
    (["replace", "--labels", "1", "--box", "-1", "0", "2", "2"], ["box -1 0 2 2"]),
    (["replace", "--labels", "1", "--box", "0", "0", "2"], ["--box", "4"]),
    (["replace", "--labels", "1", "--box", "0", "0", "2", "2", "--start", "12"], ["start 12, steps 12"]),
    (["outpaint"], ["--left 0 --right 0", "multiples of 2"]),
    (["outpaint", "--right", "3"], ["--right 3", "multiples of 2"]),
    (["outpaint", "--left", "-2", "--right", "4"], ["--left -2"]),
    (["inpaint"], ["--mask"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_maskgit_verbs(fails, trained_maskgit, words, says):
    module, run, _ = trained_maskgit
    fails(module, words[0], run, *words[1:], says=says)


def test_masks_that_do_not_fit(fails, trained_maskgit, tmp_path, monkeypatch):
    """Of another size than the photo, empty, all ones, no picture; and one that fits. Planted: a mask stretched to the photo;
    a thin line lost in scaling; a phone's photo measured lying down."""
    module, run, _ = trained_maskgit
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 12), (200, 30, 30)).save("photo.png")
    for name, size, box in (("hole", (20, 12), (4, 0, 6, 2)), ("empty", (20, 12), None), ("full", (20, 12), (0, 0, 20, 12)), ("other", (12, 20), (2, 2, 5, 5)),
                            ("small", (8, 8), (0, 0, 2, 2)), ("beside", (20, 12), (0, 0, 3, 12)), ("middle", (20, 12), (8, 4, 12, 8)),
                            ("thin", (20, 12), (4, 0, 5, 1))):
        mask = Image.new("L", size)
        if box:
            mask.paste(255, box)
        mask.save(f"{name}.png")
    (tmp_path / "none.png").write_bytes(b"no picture")
    inpaint = lambda mask, says, photos=("photo.png",): fails(module, "inpaint", run, *photos, "--mask", mask, says=says)
    inpaint("other.png", ["other.png has 12 x 20 pixels", "photo.png 20 x 12"])
    inpaint("empty.png", ["empty.png is empty", "white"])
    inpaint("beside.png", ["beside.png", "outside of the square"])
    inpaint("full.png", ["full.png is white everywhere", "sample"])
    inpaint("none.png", ["none.png cannot be read"])
    inpaint("middle.png", ["one token more on every side", "whole picture"])
    fails(module, "replace", run, "photo.png", "--box", "2", "2", "4", "4", says=["whole picture", "sample"])
    picture, exif = Image.open("photo.png").rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6                                                    # a phone's: to be turned upright, 20 x 12 again
    picture.save("phone.jpg", exif=exif)
    module.main(["inpaint", str(run), "phone.jpg", "--mask", "hole.png", "--num", "1", "--out", "out.png"])
    module.main(["inpaint", str(run), "photo.png", "--mask", "thin.png", "--num", "1", "--out", "out.png"])
    inpaint("hole.png", ["hole.png has 20 x 12 pixels", "8 x 8"], photos=())        # the test images
    inpaint("hole.png", ["missing.png"], photos=("missing.png",))
    Image.new("RGB", (20, 7)).save("low.png")
    inpaint("hole.png", ["low.png is too small", "8 x 8"], photos=("low.png",))
    module.main(["inpaint", str(run), "photo.png", "--mask", "hole.png", "--num", "2", "--out", "out.png"])
    module.main(["inpaint", str(run), "--mask", "small.png", "--num", "1", "--out", "test.png"])
    assert Image.open("out.png").size == (4 * 66, 66) and Image.open("test.png").size[0] == 3 * 66


def test_more_steps_than_tokens(trained_maskgit, tmp_path):
    """100 passes for 16 tokens: the surplus draws the last one again, as the release does. Planted: a sort index below 0."""
    module, run, _ = trained_maskgit
    module.main(["sample", str(run), "--sample-steps", "100", "--num", "2", "--out", str(tmp_path / "out.png")])
    module.main(["complete", str(run), "--sample-steps", "100", "--num", "1", "--out", str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").exists()


def test_photos_without_labels(fails, trained_maskgit, tmp_path):
    """A model that knows "no class" draws so; another needs labels."""
    module, run, alone = trained_maskgit
    Image.new("RGB", (9, 9), (250, 20, 20)).save(tmp_path / "photo.png")
    words = [tmp_path / "photo.png", "--num", "1", "--out", tmp_path / "out.png"]
    for verb, more in (("complete", ()), ("replace", ("--box", "0", "0", "4", "4")), ("outpaint", ("--right", "4"))):
        module.main([verb, str(run), *map(str, words), *more])
        fails(module, verb, alone, *words, *more, says=["by class", "--labels"])
    fails(module, "sample", alone, "--guidance", "2", says=["--label-dropout"])
    fails(module, "train", "--resume", run, "--perceptual", "net.pth", says=["perceptual", "net.pth"])       # there it had none


def test_maskgit_official_files(fails, trained_maskgit, tmp_path, monkeypatch):
    """Of other models, in the wrong order, of another codebook; and a pair that fits. Planted: no comparison of the codebooks' sizes."""
    module, run, alone = trained_maskgit
    monkeypatch.chdir(tmp_path)
    config = module.Config(image_size=64, ch=32, groups=32, ch_mult=(1, 1, 1, 1, 1), code_dim=4, num_classes=0, disc_weight=0.0, codebook_decay=0.0, restart=0)
    wrong = module.VQVAE(dataclasses.replace(config, codebook_size=1000))
    torch.save(wrong.state_dict(), "wrong.bin")
    torch.save(module.VQVAE(dataclasses.replace(config, codebook_size=1024)).state_dict(), "tokenizer.bin")
    prior = module.BidirectionalTransformer(dataclasses.replace(config, codebook_size=1024, num_classes=3, label_dropout=0.0, guidance=1.0, width=16, heads=2,
                                                                layers=1))
    names = {"word_embeddings": "Embed_0/word_embeddings", "position_embeddings": "Embed_0/position_embeddings", "embeddings_ln": "Embed_0/embeddings_ln",
             "mlm_dense": "MlmLayer_0/mlm_dense", "mlm_ln": "MlmLayer_0/mlm_ln", "mlm_bias": "MlmLayer_0/mlm_bias/bias", "layers.0.": "TransformerLayer_0/"}
    tree = {}
    for name, value in prior.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        name = name.replace("TransformerLayer_0/", "TransformerLayer_0/Mlp_0/" if "layer_output" in name or "intermediate" in name else
                            "TransformerLayer_0/Attention_0/" if "ln" in name else "TransformerLayer_0/Attention_0/self_attention/")
        kind = "embedding" if "embeddings" in name and value.ndim == 2 else "kernel" if value.ndim == 2 else "scale"
        name, value = name.replace(".weight", f"/{kind}").replace(".", "/"), value.T if kind == "kernel" else value
        if "self_attention" in name:
            value = value.reshape(2, 8, 16) if "out/kernel" in name else value.reshape(16, 2, 8) if "kernel" in name else value if "out" in name else value.view(2, 8)
        tree[name] = value.contiguous()
    torch.save(tree, "transformer.pt")
    Image.new("RGB", (80, 72)).save("photo.png")
    official = ["--official", "tokenizer.bin", "transformer.pt"]
    fails(module, "sample", "--official", "wrong.bin", "transformer.pt", says=["wrong.bin transformer.pt", "of its 1000 codes"])
    fails(module, "sample", "--official", "tokenizer.bin", says=["is a tokenizer", "transformer too"])
    fails(module, "sample", "--official", "transformer.pt", "tokenizer.bin", says=["tokenizer first"])
    fails(module, "reconstruct", *official, says=["give photos"])
    fails(module, "reconstruct", "--official", "no.pt", says=["no.pt cannot be read"])
    fails(module, "reconstruct", "--official", str(run / "checkpoint.pt"), says=["a run of this script"])
    fails(module, "complete", "photo.png", *official, says=["--labels"])
    fails(module, "sample", "--labels", "3", *official, says=["label 3", "0 to 2"])
    (tmp_path / "odd").write_bytes(b"\x81\xa6params\x81")
    fails(module, "reconstruct", "--official", "odd", says=["odd cannot be read", "ends too early"])
    torch.save({f"layers.{i}.weight": torch.zeros(2) for i in range(7)}, "other.pt")
    assert "layers.5" not in fails(module, "reconstruct", "--official", "other.pt", says=["other.pt", "do not fit", "layers.0.weight", "layers.4.weight"])
    module.main(["replace", "photo.png", "--box", "0", "0", "16", "16", "--labels", "2", "--num", "1", "--out", "out.png", *official])
    module.main(["sample", "--num", "3", "--out", "grid.png", *official])
    assert Image.open("out.png").size == (3 * (64 + 2), 66) and Image.open("grid.png").size[0] > 100


def test_two_processes_need_a_divisible_batch(module, monkeypatch):
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    with pytest.raises(module.UserError, match="a batch of 3 is not divisible by 2"):
        module.shard(torch.zeros(3), device="cpu")


# --- var.py

@pytest.fixture(scope="session")
def trained_var(tmp_path_factory):
    import var
    return var, finished(var, "var-class", tmp_path_factory, train_steps_tokenizer=2, train_steps_prior=2)


@pytest.mark.parametrize("words, says", [
    (["--scales", "1", "2", "2", "6"], ["scales 1 2 2 6", "each larger than the one before"]),
    (["--scales", "1", "3", "2", "6"], ["scales 1 3 2 6", "each larger"]),
    (["--scales", "6"], ["scales 6", "at least two"]),
    (["--scales", "0", "6"], ["scales 0 6"]),
    (["--scales", "1", "2", "4"], ["scales end at 4", "24 pixels", "f = 4", "must be 6"]),
    (["--image-size", "30"], ["30 pixels", "f = 4"]),
    (["--heads", "3"], ["width 128", "heads, 3"]),
    (["--ch", "20"], ["ch 20", "groups, 8"]),
    (["--guidance", "2", "--label-dropout", "0"], ["guidance", "--label-dropout"]),
    (["--top-k", "129"], ["top_k is 129", "128"]),
    (["--top-p", "0"], ["top_p is 0"]),
    (["--progressive", "1"], ["progressive is 1.0", "below 1"]),
    (["--drop-path", "-1"], ["drop_path is -1.0"]),
    (["--disc-layers", "5"], ["24 pixels", "disc_layers 5"]),
    (["--lpips", "no/such"], ["no/such", "is no file"]),
    (["--lpips", "download", "--data-dir", "nowhere"], ["cannot download"]),
    (["--codebook-size", "70000"], ["70000", "65536"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_var_command_lines(fails, words, says, tmp_path, monkeypatch):
    import var
    monkeypatch.chdir(tmp_path)
    for name in ("vgg16", "lpips"):
        monkeypatch.setitem(var.DOWNLOADS, name, ("http://127.0.0.1:9/", var.DOWNLOADS[name][1]))
    fails(var, "train", "--train-images", "10", "--test-images", "10", *words, says=says)


@pytest.mark.parametrize("words, says", [
    (["sample", "--labels", "nine"], ["nine", "circle"]),
    (["sample", "--guidance", "nan"], ["guidance is nan"]),
    (["sample", "--temperature", "0"], ["temperature is 0"]),
    (["sample", "--top-k", "17"], ["top_k is 17", "16"]),
    (["inpaint"], ["--box"]),
    (["inpaint", "--box", "4", "4", "8", "2"], ["box 4 4 8 2", "8 x 8"]),
    (["outpaint", "--box", "0", "0", "8", "8"], ["nothing to draw"]),
    (["replace", "--box", "0", "0", "4", "4"], ["--labels"]),
    (["complete", "no.png"], ["no.png"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_var_verbs(fails, trained_var, words, says):
    module, run = trained_var
    fails(module, words[0], run, *words[1:], says=says)


def test_var_official_files(fails, trained_var, tmp_path, monkeypatch):
    """Missing, damaged, another paper's, in the wrong order, alone, of other scales. Planted: no comparison of the scales."""
    from conftest import CASES
    module, run = trained_var
    monkeypatch.chdir(tmp_path)
    config = module.Config(**CASES["var-class"][1] | dict(ch=32, groups=32, restart=0))
    (tmp_path / "noise.pth").write_bytes(b"noise" * 99)
    torch.save(module.build_tokenizer(config).state_dict(), "vae.pth")
    torch.save(module.build_prior(config).state_dict(), "var.pth")
    torch.save({"a": torch.zeros(3)}, "other.pth")
    fails(module, "sample", "--official", "none.pth", "var.pth", says=["var.pth", "21 tokens in 3 scales", "patch_nums"])
    monkeypatch.setitem(module.SCALES, 256, (1, 2, 4))
    fails(module, "sample", "--official", "none.pth", "var.pth", says=["none.pth cannot be read"])
    fails(module, "sample", "--official", "noise.pth", "var.pth", says=["noise.pth cannot be read"])
    fails(module, "sample", "--official", "other.pth", "var.pth", says=["other.pth is no model of this paper"])
    fails(module, "sample", "--official", "vae.pth", says=["--official needs the tokenizer first, then its transformer"])
    fails(module, "sample", "--official", "var.pth", "vae.pth", says=["vae.pth is a tokenizer", "first"])
    fails(module, "sample", run, "--official", "vae.pth", "var.pth", says=["one of them"])
    fails(module, "sample", "--official", "vae.pth", run / "checkpoint.pt", says=["checkpoint.pt", "run of this script"])
    torch.save(module.build_tokenizer(module.Config(**CASES["var-class"][1] | dict(ch=32, groups=32, restart=0, codebook_size=8))).state_dict(), "few.pth")
    fails(module, "sample", "--official", "few.pth", "var.pth", says=["var.pth reads maps", "(1, 2, 4), 16, 8"])


# --- mar.py

@pytest.fixture(scope="session")
def trained_mar(tmp_path_factory):
    import mar
    alone = dict(label_dropout=0.0, guidance=1.0)                       # never without a class
    return mar, *(finished(mar, "mar-class", tmp_path_factory, train_steps_tokenizer=2, train_steps_prior=2, **more) for more in ({}, alone))


@pytest.mark.parametrize("words, says", [
    (["--sample-steps", "5"], ["sample_steps 5", "there are 4"]),
    (["--sample-steps", "10", "--patch-size", "2"], ["sample_steps 10", "there are 9"]),
    (["--denoise-steps", "1"], ["denoise_steps 1", "2 to 1000"]),
    (["--denoise-steps", "1001"], ["denoise_steps 1001", "2 to 1000"]),
    (["--image-size", "30"], ["30 pixels", "f = 4"]),
    (["--patch-size", "4"], ["24 pixels", "f = 4", "patch_size 4"]),
    (["--heads", "3"], ["width 64", "heads, 3"]),
    (["--decoder-width", "130"], ["decoder_width 130", "heads, 4"]),
    (["--ch", "20"], ["ch 20", "groups, 8"]),
    (["--guidance", "2", "--label-dropout", "0"], ["guidance", "--label-dropout"]),
    (["--guidance-schedule", "cubic"], ["guidance_schedule cubic", "linear or constant"]),
    (["--mask-ratio-min", "1"], ["mask_ratio_min is 1.0", "below 1"]),
    (["--ema", "1"], ["ema is 1.0"]),
    (["--kl-weight", "-1"], ["kl_weight is -1.0"]),
    (["--disc-layers", "5"], ["24 pixels", "disc_layers 5"]),
    (["--lpips", "no/such"], ["no/such", "is no file"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_mar_command_lines(fails, words, says, tmp_path, monkeypatch):
    import mar
    monkeypatch.chdir(tmp_path)
    fails(mar, "train", "--train-images", "10", "--test-images", "10", *words, says=says)


@pytest.mark.parametrize("words, says", [
    (["sample", "--sample-steps", "17"], ["sample_steps 17", "there are 16"]),
    (["sample", "--denoise-steps", "1001"], ["denoise_steps 1001"]),
    (["sample", "--labels", "nine"], ["nine", "circle"]),
    (["sample", "--guidance", "nan"], ["guidance is nan"]),
    (["sample", "--temperature", "inf"], ["temperature is inf"]),
    (["sample", "--num", "100000000000"], ["--num", "ten million"]),
    (["sample", "--temperature", "-1"], ["temperature is -1"]),
    (["sample", "--clip-x0", "-1"], ["clip_x0 is -1"]),
    (["inpaint"], ["--box"]),
    (["inpaint", "--box", "4", "4", "8", "2"], ["box 4 4 8 2", "8 x 8"]),
    (["inpaint", "--box", "0", "0", "8", "7"], ["leaves nothing known"]),
    (["complete", "no.png"], ["no.png"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_mar_verbs(fails, trained_mar, words, says):
    module, run, _ = trained_mar
    fails(module, words[0], run, *words[1:], says=says)


def test_mar_guidance_without_label_dropout(fails, trained_mar):
    module, _, alone = trained_mar
    fails(module, "sample", alone, "--guidance", "2", says=["guidance", "--label-dropout"])


def test_mar_latents_of_another_tokenizer(fails, trained_mar, tmp_path):
    """latents.npz of another run, and half of one: resume says so, and goes on when it is deleted. Planted: the shape compared alone."""
    module, run, alone = trained_mar
    run = shutil.copytree(run, tmp_path / "run")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["objects"]["tokenizer"]["quant_conv.bias"] += 1
    torch.save(state, run / "checkpoint.pt")
    fails(module, "train", "--resume", run, says=["latents.npz was made by another tokenizer", "delete it"])
    path = run / "latents.npz"
    path.write_bytes(path.read_bytes()[:1000])
    fails(module, "train", "--resume", run, says=["latents.npz is damaged", "delete it"])
    path.unlink()
    module.main(["train", "--resume", str(run)])
    assert path.stat().st_size > 1000


def test_mar_official_files(fails, trained_mar, tmp_path, monkeypatch):
    """Missing, damaged, another paper's, in the wrong order, alone, of other latents. Planted: no comparison of the channels."""
    from conftest import CASES
    module, run, _ = trained_mar
    monkeypatch.chdir(tmp_path)
    config = module.Config(**CASES["mar-class"][1] | dict(ch=32, groups=32, ch_mult=(1, 1, 1, 1, 1), image_size=64, buffer=64, disc_weight=0.0))
    save = lambda module, name: torch.save({"model": {k: v for k, v in module.state_dict().items() if not k.startswith("latent_")}}, name)
    (tmp_path / "noise.pth").write_bytes(b"noise" * 99)
    save(module.build_tokenizer(config), "vae.pth")
    save(module.build_tokenizer(dataclasses.replace(config, latent_dim=5)), "wide.pth")
    save(module.build_prior(config), "mar.pth")
    torch.save({"a": torch.zeros(3)}, "other.pth")
    fails(module, "sample", "--official", "none.pth", "mar.pth", says=["none.pth cannot be read"])
    fails(module, "sample", "--official", "noise.pth", "mar.pth", says=["noise.pth cannot be read"])
    fails(module, "sample", "--official", "other.pth", "mar.pth", says=["other.pth is no model of this paper"])
    fails(module, "sample", "--official", "vae.pth", says=["--official needs the tokenizer first, then its transformer"])
    fails(module, "sample", "--official", "mar.pth", "vae.pth", says=["mar.pth is no AutoencoderKL", "first"])
    fails(module, "sample", run, "--official", "vae.pth", "mar.pth", says=["one of them"])
    fails(module, "sample", "--official", "vae.pth", run / "checkpoint.pt", says=["checkpoint.pt", "run of this script"])
    fails(module, "sample", "--official", "wide.pth", "mar.pth", says=["mar.pth reads latents of 3 channels", "makes 5"])
    weights = torch.load("mar.pth")["model"]
    torch.save({"model": {k: v for k, v in weights.items() if "fc1" not in k}}, "holes.pth")
    fails(module, "sample", "--official", "vae.pth", "holes.pth", says=["holes.pth is no model of this paper", "fc1.weight is not in it"])
    save(module.build_prior(dataclasses.replace(config, width=96, decoder_width=96, heads=6)), "heads.pth")
    fails(module, "sample", "--official", "vae.pth", "heads.pth", says=["heads.pth: 96 wide", "encoder_num_heads"])


# --- magvit.py

@pytest.fixture(scope="session")
def trained_magvit(tmp_path_factory):
    """A run of all tasks, and one that knows CG and FP, never saw dropped labels."""
    import magvit
    alone = dict(label_dropout=0.0, guidance=1.0, tasks="CG FP")
    return magvit, *(finished(magvit, "magvit-class", tmp_path_factory, train_steps_images=1, train_steps_tokenizer=2, train_steps_prior=2, **more) for more in ({}, alone))


def write_gif(path, frames, size=20):
    images = [Image.new("RGB", (size, size), (10 * i, 20, 30)) for i in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:])


@pytest.mark.parametrize("words, says", [
    (["--frames", "7"], ["7 frames", "a multiple of 2"]),
    (["--causal", "--code-dim", "9"], ["8 frames", "one more than a multiple of 2"]),
    (["--causal", "--frames", "9", "--padding", "reflect"], ["reflect", "future"]),
    (["--causal", "--frames", "9", "--code-dim", "20000"], ["code_dim 20000", "at most 24"]),
    (["--temporal", "2", "0", "0"], ["temporal (2, 0, 0)", "0 or 1"]),
    (["--time-kernel", "2"], ["time_kernel 2", "odd"]),
    (["--disc-mult", "-2"], ["disc_mult", "positive"]),
    (["--image-size", "30"], ["30 pixels", "f = 8"]),
    (["--known-frames", "8"], ["FP with 8 known frames", "nothing to tell of 8"]),
    (["--known-frames", "4", "--tasks", "FI"], ["FI with 4 known frames", "nothing to tell of 8"]),
    (["--frames", "2", "--tasks", "FP"], ["FP with 1 known frames", "1 frames of codes"]),
    (["--tasks", "FP XY"], ["task XY is unknown", "CG FP CFP"]),
    (["--tasks", ""], ["task", "CG FP CFP"]),
    (["--no-multi-task"], ["several tasks need --multi-task"]),
    (["--ch", "10", "--groups", "4"], ["ch 10", "groups, 4"]),
    (["--width", "130"], ["width 130", "heads, 4"]),
    (["--temporal"], ["temporal needs 3 numbers"]),
    (["--padding", "edge"], ["padding 'edge'", "reflect"]),
    (["--inflation", "first"], ["inflation 'first'", "central"]),
    (["--gan", "wgan"], ["gan 'wgan'", "hinge"]),
    (["--schedule", "sine"], ["schedule 'sine'", "cosine"]),
    (["--token-bits", "4", "4"], ["token_bits (4, 4)", "128 codes"]),
    (["--causal", "--code-dim", "22", "--frames", "9"], ["rows of codes", "--token-bits"]),
    (["--guidance", "2", "--label-dropout", "0"], ["guidance", "--label-dropout"]),
    (["--num-classes", "9"], ["4 classes", "num_classes is 9"]),
    (["--data", "no/such"], ["no/such is no folder", "moving_mnist"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_magvit_command_lines(fails, words, says, tmp_path, monkeypatch):
    import magvit
    monkeypatch.chdir(tmp_path)
    fails(magvit, "train", "--train-images", "10", "--test-images", "10", *words, says=says)


@pytest.mark.parametrize("words, says", [
    (["sample", "--labels", "nine"], ["nine", "left-right"]),
    (["sample", "--guidance", "nan"], ["guidance is nan"]),
    (["sample", "--choice-temperature", "inf"], ["choice_temperature is inf"]),
    (["sample", "--sample-steps", "0"], ["--sample-steps", "less than 1"]),
    (["sample", "--schedule", "sine"], ["schedule 'sine'"]),
    (["edit", "--task", "XY"], ["task XY", "FP CFP FI"]),
    (["edit", "no.gif", "--labels", "0"], ["no.gif cannot be read as a clip"]),
    (["reconstruct", "no.gif"], ["no.gif cannot be read as a clip"]),
    (["sample", "--out", "grid.png"], ["grid.png", "give a .gif"]),
    (["edit", "--out", "grid.png"], ["grid.png", "give a .gif"]),
    (["reconstruct", "--out", "grid.png"], ["grid.png", "give a .gif"]),
], ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None)
def test_magvit_verbs(fails, trained_magvit, words, says):
    module, run, _ = trained_magvit
    fails(module, words[0], run, *words[1:], says=says)


def test_magvit_clips(fails, trained_magvit, tmp_path):
    """Too few frames, frames of two sizes, cut off, not a clip, without the class that CFP needs. Planted: the labels of test clips given to others."""
    module, run, alone = trained_magvit
    write_gif(tmp_path / "short.gif", 5)
    write_gif(tmp_path / "whole.gif", 8)
    (tmp_path / "cut.gif").write_bytes((tmp_path / "whole.gif").read_bytes()[:-120])
    (tmp_path / "sizes").mkdir()
    for i in range(6):
        Image.new("RGB", (20 + i // 3, 20)).save(tmp_path / "sizes" / f"{i}.png")
    fails(module, "reconstruct", run, tmp_path / "short.gif", says=["short.gif has 5 frames", "takes 6"])
    fails(module, "reconstruct", run, tmp_path / "sizes", says=["frames of 20 x 20 and 21 x 20", "one size"])
    fails(module, "reconstruct", run, tmp_path / "cut.gif", says=["cut.gif"])
    fails(module, "edit", run, tmp_path / "whole.gif", says=["CFP", "--labels"])
    fails(module, "edit", alone, tmp_path / "whole.gif", "--task", "FI", says=["task FI", "FP"])
    fails(module, "sample", alone, "--guidance", "2", says=["guidance", "--label-dropout"])
    module.main(["edit", str(run), str(tmp_path / "whole.gif"), "--labels", "turning", "--out", str(tmp_path / "edited.gif")])
    assert len(list(tmp_path.glob("edited_*.gif"))) == 9                         # one for each task: planted: all under one name
    with Image.open(tmp_path / "edited_FP.gif") as gif:
        assert gif.n_frames == 6


def test_magvit_official_files(fails, trained_magvit, tmp_path, monkeypatch):
    """Missing, damaged, another paper's, no tokenizer, without clips. Planted: averaged weights not taken."""
    module, run, _ = trained_magvit
    monkeypatch.chdir(tmp_path)
    config = module.Config(causal=True, frames=5, image_size=16, ch=4, groups=4, ch_mult=(1, 2, 2), temporal=(False, True), code_dim=4)
    monkeypatch.setitem(module.PRESETS, "open-magvit2", config)
    tokenizer = module.build_tokenizer(config).eval()
    names = module.third_party_names(tokenizer)
    ema = {f"model_ema.{theirs.replace('.', '')}": tokenizer.state_dict()[ours] for ours, theirs in names.items()}
    state = {theirs: torch.zeros_like(tokenizer.state_dict()[ours]) for ours, theirs in names.items()} | {"loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state | ema | {"model_ema.decay": torch.tensor(0.999)}}, "video.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.from_official("video.ckpt").state_dict().values(), tokenizer.state_dict().values()))
    write_gif(tmp_path / "clip.gif", 5, 16)
    module.main(["reconstruct", "clip.gif", "--official", "video.ckpt"])
    assert (tmp_path / "reconstructions.gif").exists()
    (tmp_path / "noise.pth").write_bytes(b"noise" * 99)
    torch.save({"a": torch.zeros(3)}, "other.pth")
    torch.save({"state_dict": state | {"encoder.more": torch.zeros(2)}}, "more.ckpt")
    fails(module, "reconstruct", "clip.gif", "--official", "none.ckpt", says=["none.ckpt cannot be read"])
    fails(module, "reconstruct", "clip.gif", "--official", "noise.pth", says=["noise.pth cannot be read"])
    fails(module, "reconstruct", "clip.gif", "--official", "other.pth", says=["other.pth is no model of this paper"])
    fails(module, "reconstruct", "clip.gif", "--official", "more.ckpt", says=["1 names or shapes do not fit", "encoder.more"])
    fails(module, "reconstruct", "clip.gif", "--official", run / "checkpoint.pt", says=["run of this script"])
    fails(module, "reconstruct", "--official", "video.ckpt", says=["give some"])
    fails(module, "reconstruct", says=["--official TOKENIZER"])
