"""Data: the shapes as DESIGN lists them, the real sets found or downloaded, never a half file that passes for whole."""
import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import pixelcnn
from pixelcnn import COLOURS, SHAPES, Config, UserError, draw_shapes, load_data


def test_a_shape_is_a_function_of_seed_and_index():
    """Planted: numbers that depend on how many are drawn."""
    images, labels = draw_shapes(3, range(40), 24)
    again, labels_again = draw_shapes(3, [7, 31], 24)
    assert images.dtype == np.uint8 and images.shape == (40, 24, 24, 3) and labels.dtype == np.int64
    assert (again == images[[7, 31]]).all() and (labels_again == labels[[7, 31]]).all()
    assert (draw_shapes(4, range(40), 24)[0] != images).any()


def test_shapes_are_what_the_list_says():
    """Nine classes and eight colours, evenly; each picture one colour on one dark ground, nothing cut by the border.

    Planted: radius doubled; a tenth colour; classes drawn from 8.
    """
    assert SHAPES == ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "crescent", "bars")
    assert list(COLOURS) == ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
    images, labels = draw_shapes(0, range(3000), 32)
    assert (np.abs(np.bincount(labels, minlength=9) - 3000 / 9) < 80).all()
    ground = images[0, 0, 0]
    assert (images[:, 0, 0] == ground).all() and ground.max() < 40
    brightest = np.array([image.reshape(-1, 3)[image.reshape(-1, 3).astype(int).sum(1).argmax()] for image in images])
    colours = np.array(list(COLOURS.values()))
    nearest = np.abs(brightest[:, None].astype(int) - colours).sum(2)
    assert (nearest.min(1) < 25).mean() > 0.99 and (np.bincount(nearest.argmin(1), minlength=8) > 250).all()
    covered = (images != ground).any(3)
    share = [covered[labels == k].mean() for k in range(9)]
    assert all(0.05 < value < 0.6 for value in share) and share[0] > share[4] > share[7]        # circle > ring > crescent
    rows = np.flatnonzero(covered.any((0, 2)))
    assert rows[0] >= 0 and rows[-1] <= 31 and covered[:, 0].mean() < 0.02


def test_train_and_test_shapes_differ():
    """Planted: one seed for both."""
    data = load_data(Config(train_images=300, test_images=300))
    train = {image.numpy().tobytes() for image in data.train[0]}
    assert not any(image.numpy().tobytes() in train for image in data.test[0])


def test_shapes_are_drawn_fast_enough():
    """5,000 pictures of 32 x 32 a second on one core, measured with room for a busy machine: best of three, half of that."""
    best = 0
    for _ in range(3):
        start = time.process_time()
        draw_shapes(0, range(2000), 32)
        best = max(best, 2000 / (time.process_time() - start))
    assert best > 2500, f"{best:.0f} pictures a second"


def mnist_files():
    """Four tiny files in the official format, and the table of their checksums."""
    head = lambda *numbers: b"".join(number.to_bytes(4, "big") for number in numbers)
    files = {}
    for split, count in (("train", 30), ("t10k", 10)):
        images = np.random.RandomState(count).randint(0, 256, (count, 28, 28), np.uint8)
        files[f"{split}-images-idx3-ubyte.gz"] = head(2051, count, 28, 28) + images.tobytes()
        files[f"{split}-labels-idx1-ubyte.gz"] = head(2049, count) + bytes(i % 10 for i in range(count))
    return files, {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


@pytest.fixture
def server(tmp_path):
    """A server on this machine's loopback address; server.cut = number of bytes after which it hangs up."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = server.files[self.path.strip("/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:server.cut])

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.cut, server.address_text = None, f"http://127.0.0.1:{server.server_address[1]}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_download_and_what_interrupts_it(server, tmp_path, monkeypatch):
    """Cut off, wrong content, then right; then without a server. Planted: written under the final name; no checksum."""
    files, checksums = mnist_files()
    server.files = {name: gzip.compress(content) for name, content in files.items()}
    monkeypatch.setitem(pixelcnn.DOWNLOADS, "mnist", (server.address_text, checksums))
    config = Config(data="mnist", data_dir=str(tmp_path), image_size=28, num_classes=0)
    target = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    server.cut = 500
    with pytest.raises(UserError):
        load_data(config)
    assert not target.exists()
    server.cut, right = None, server.files[target.name]
    server.files[target.name] = gzip.compress(b"something else")
    with pytest.raises(UserError, match="checksum"):
        load_data(config)
    assert not target.exists()
    server.files[target.name] = right
    assert len(load_data(config).train[0]) == 30
    server.files = {}
    data = load_data(config)
    pixels = np.frombuffer(files[target.name], np.uint8, offset=16).reshape(30, 1, 28, 28)
    assert (data.train[0].numpy() == pixels).all() and data.train[1].tolist() == [i % 10 for i in range(30)] and len(data.test[0]) == 10


def test_no_network_is_one_line(tmp_path, monkeypatch, fails):
    monkeypatch.setitem(pixelcnn.DOWNLOADS, "mnist", ("http://127.0.0.1:9/", mnist_files()[1]))
    fails(pixelcnn, "train", "--preset", "mnist", "--data-dir", tmp_path, "--out", tmp_path / "run", says=["cannot download", "--data-dir"])


def test_cifar10_in_its_binary_format(tmp_path, monkeypatch):
    """Planted: labels read from the wrong end of the record; channels last."""
    records = np.random.RandomState(0).randint(0, 10, (6, 4, 3073), np.uint8)
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
        for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = records[i].size
            tar.addfile(info, io.BytesIO(records[i].tobytes()))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(buffer.getvalue())
    monkeypatch.setitem(pixelcnn.DOWNLOADS, "cifar10", ("", {"cifar-10-binary.tar.gz": hashlib.md5(buffer.getvalue()).hexdigest()}))
    data = load_data(Config(data="cifar10", data_dir=str(tmp_path), image_size=32, num_classes=10))
    train = records[:5].reshape(20, 3073)
    assert (data.train[0].numpy() == train[:, 1:].reshape(20, 3, 32, 32)).all() and (data.train[1].numpy() == train[:, 0]).all()
    assert (data.test[1].numpy() == records[5][:, 0]).all() and data.classes[9] == "truck"


def test_another_size_is_resized():
    data = load_data(Config(image_size=20, train_images=9, test_images=3))
    assert data.train[0].shape == (9, 3, 20, 20) and data.train[0].dtype == torch.uint8


def test_real_mnist():
    """Where the real files are: `--data-dir` of this project's developers, or MNIST_DIR."""
    folder = Path(os.environ.get("MNIST_DIR", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "mnist" / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("real MNIST is not here: name its folder in MNIST_DIR")
    data = load_data(Config(data="mnist", data_dir=str(folder), image_size=28, num_classes=10))
    assert data.train[0].shape == (60000, 3, 28, 28) and data.test[0].shape == (10000, 3, 28, 28)
    assert data.train[1][:5].tolist() == [5, 0, 4, 1, 9] and data.train[0].float().mean().item() == pytest.approx(33.32, abs=0.01)
