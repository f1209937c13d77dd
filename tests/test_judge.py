"""The judge of samples: it knows real pictures, is not fooled by noise, and says its own accuracy."""
import torch


def test_judge_tells_right_from_wrong(tmp_path, monkeypatch):
    """A judge of few steps. Planted: labels shifted by one; Frechet distance of a set to itself not 0."""
    import judge

    import pixelcnn
    monkeypatch.setenv("JUDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(judge, "STEPS", 40)
    monkeypatch.setattr(judge, "real_data", lambda data, data_dir, frames: pixelcnn.load_data(
        pixelcnn.Config(train_images=1500, test_images=300, image_size=32)))
    images, labels = map(torch.from_numpy, pixelcnn.draw_shapes(5, range(200), 32))
    images = images.permute(0, 3, 1, 2)
    good = judge.judge_samples(images, labels)
    assert good["judge_accuracy"] > 0.5 and abs(good["class_agreement"] - good["judge_accuracy"]) < 0.15
    wrong = judge.judge_samples(images, (labels + 1) % 9)
    assert wrong["class_agreement"] < 0.3
    noise = judge.judge_samples(torch.randint(0, 256, images.shape, dtype=torch.uint8), labels)
    assert noise["frechet"] > 5 * good["frechet"]
    assert len(list(tmp_path.iterdir())) == 1                            # trained once, then read


def test_judge_tells_motions(tmp_path, monkeypatch):
    """Rows and columns exchanged are another class, and so is a clip that stands still. Planted: only the middle frame seen."""
    import judge

    import magvit
    monkeypatch.setenv("JUDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(judge, "STEPS", 60)
    monkeypatch.setattr(judge, "real_data", lambda data, data_dir, frames: magvit.load_data(
        magvit.Config(train_images=900, test_images=200, image_size=32, frames=frames)))
    clips, labels = map(torch.from_numpy, magvit.draw_motions(5, range(150), 12, 32))
    clips = clips.movedim(-1, 1)
    good = judge.judge_samples(clips, labels)
    assert good["judge_accuracy"] > 0.5 and abs(good["class_agreement"] - good["judge_accuracy"]) < 0.2
    turned, still = clips.transpose(3, 4), clips[:, :, 6:7].expand_as(clips)
    assert judge.judge_samples(turned[labels < 2], labels[labels < 2])["class_agreement"] < 0.2
    assert judge.judge_samples(still, labels)["class_agreement"] < 0.6


def test_frechet_distance_of_two_gaussians():
    """Against the closed form for diagonal covariances. Planted: variance in place of its root."""
    from judge import frechet_distance
    torch.manual_seed(0)
    a, b = torch.randn(200_000, 3, dtype=torch.float64), 2 * torch.randn(200_000, 3, dtype=torch.float64) + 1
    assert abs(frechet_distance(a, a)) < 1e-6
    assert abs(frechet_distance(a, b) - 6) < 0.1                        # 3 (1^2 + (2 - 1)^2)


def test_spread_is_the_distance_within_a_class():
    """Two classes, pairs at distances 5 and 1: 3. Planted: pairs of different classes counted."""
    from judge import class_spread
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 1.0]])
    assert class_spread(features, torch.tensor([0, 0, 1, 1])) == 3
    assert class_spread(features[[0, 0, 2, 2]], torch.tensor([0, 0, 1, 1])) == 0
