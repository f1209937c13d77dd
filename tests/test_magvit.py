"""magvit.py: causality, look-up free codes, tasks, COMMIT, decoding, data."""
import dataclasses
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import magvit
from magvit import (
    MASK,
    TASKS,
    Config,
    LookupFree,
    MagvitTransformer,
    UserError,
    VideoTokenizer,
    decode_tokens,
    hide,
    region,
    sample,
)

GOLDEN = Path(__file__).parent / "golden"
TINY = Config(ch=8, groups=4, image_size=16, frames=6, ch_mult=(1, 2), temporal=(True,), code_dim=4, codebook_size=16, width=32, heads=2, layers=2,
              sample_steps=3, train_images=12, test_images=6)
CAUSAL = dataclasses.replace(TINY, causal=True, tasks="CG FP IPD", frame_norm=True, frames=5, ch_mult=(1, 2, 2), temporal=(True, True), code_dim=6)
GRID = TINY.latent_shape


def build(config=TINY, seed=0):
    torch.manual_seed(seed)
    return VideoTokenizer(config).eval(), MagvitTransformer(config).eval()


def clips(config=TINY, number=2):
    return 2 * torch.rand(number, 3, config.frames, config.image_size, config.image_size) - 1


# --- tokenizers

@torch.no_grad()
def test_causal_tokenizer_sees_no_future():
    """Changing frame k leaves all earlier codes' z, and all earlier frames of what is decoded. Planted: padding on both sides; norms over time."""
    tokenizer, _ = build(CAUSAL)
    videos = clips(CAUSAL)
    z = tokenizer.latents(videos)
    for frame in range(1, CAUSAL.frames):
        changed = videos.clone()
        changed[:, :, frame:] = torch.rand_like(changed[:, :, frame:])
        other, first = tokenizer.latents(changed), -(-frame // CAUSAL.f_time)          # the first code that sees this frame
        torch.testing.assert_close(other[:, :, :first], z[:, :, :first])
        assert not torch.allclose(other[:, :, first], z[:, :, first])
    q = torch.randn(2, CAUSAL.code_dim, *CAUSAL.latent_shape)
    again = tokenizer.decoder(q)
    for code in range(1, q.shape[2]):
        changed = q.clone()
        changed[:, :, code:] += 1
        other, first = tokenizer.decoder(changed), 1 + (code - 1) * CAUSAL.f_time
        torch.testing.assert_close(other[:, :, :first], again[:, :, :first])
        assert not torch.allclose(other[:, :, first:], again[:, :, first:])


@torch.no_grad()
def test_a_picture_is_a_clip_of_one_frame():
    """The first frame alone has the first frame's code; with the third party's norms over time it has not (its QUIRK)."""
    videos = clips(CAUSAL)
    for frame_norm in (True, False):
        tokenizer, _ = build(dataclasses.replace(CAUSAL, frame_norm=frame_norm))
        z, alone = tokenizer.latents(videos)[:, :, :1], tokenizer.latents(videos[:, :, :1])
        assert torch.allclose(z, alone, atol=1e-5) == frame_norm
        assert tokenizer.decode(tokenizer.encode(videos[:, :, :1])).shape == videos[:, :, :1].shape


def test_images_of_another_form_are_refused():
    for config, wrong in ((TINY, (1, 3, 5, 16, 16)), (TINY, (1, 3, 6, 15, 16)), (TINY, (1, 1, 6, 16, 16)), (CAUSAL, (1, 3, 4, 16, 16)), (TINY, (1, 3, 16, 16))):
        with pytest.raises(ValueError, match="multiple"):
            build(config)[0].latents(torch.zeros(wrong))


@torch.no_grad()
def test_a_centrally_inflated_net_is_the_flat_one():
    """Frame by frame, if the norms are per frame and time keeps its length. Planted: the kernel in the first slice."""
    flat, _ = build(dataclasses.replace(TINY, time_kernel=1, frame_norm=True, temporal=(False,)))
    net = magvit.inflate(build(dataclasses.replace(TINY, frame_norm=True, temporal=(False,)), seed=1)[0], flat, "central")
    videos = clips()
    torch.testing.assert_close(net.latents(videos), flat.latents(videos))


@pytest.mark.parametrize("E", [3, 8])
def test_lookup_free_entropies_equal_brute_force(E):
    """All 2^E codes, one by one. Planted: logits of 2 z / temperature; halves exchanged."""
    torch.manual_seed(0)
    z, quantizer = 0.01 * torch.randn(7, E), LookupFree(E)
    codes = quantizer.lookup(torch.arange(2 ** E))
    p = (-(z[:, None] - codes).square().sum(2) / quantizer.temperature).softmax(1)
    each, together = quantizer.entropies(z)
    torch.testing.assert_close(each, -(p * p.clamp(min=1e-30).log()).sum(1).mean())
    torch.testing.assert_close(together, -(p.mean(0) * (p.mean(0) + 1e-5).log()).sum())


def test_lookup_free_codes_and_gradients():
    """indices and lookup undo each other; the straight-through gradient is that of q. 2^18 codes need no table: the entropy takes n x 512."""
    quantizer = LookupFree(18)
    z = torch.randn(2, 18, 1, 3, 3, requires_grad=True)
    q, indices, losses = quantizer(z)
    assert torch.equal(q, torch.where(z > 0, 1.0, -1.0)) and torch.equal(quantizer.lookup(indices), q)
    assert torch.equal(torch.autograd.grad((q * torch.arange(18.0).view(18, 1, 1, 1)).sum(), z, retain_graph=True)[0][0, :, 0, 0, 0], torch.arange(18.0))
    assert not list(quantizer.parameters()) and losses["entropy"] < 0 and torch.autograd.grad(losses["entropy"], z)[0].abs().sum() > 0


# --- tasks and COMMIT

def test_regions_of_all_tasks():
    """Shares of what is known, in the grid of codes as in that of pixels; no task knows all."""
    shares = dict(CG=0, FP=1 / 8, CFP=1 / 8, FI=2 / 8, OPC=1 / 4, OPV=1 / 2, OPH=1 / 2, OPD=1 / 2, IPC=3 / 4, IPD=3 / 4)
    assert set(shares) == set(TASKS)
    for task, share in shares.items():
        for shape in ((8, 32, 32), (8, 16, 16)):
            assert region(task, shape).float().mean().item() == share, task
    assert region("FP", (8, 4, 4), 3)[:3].all() and not region("FP", (8, 4, 4), 3)[3:].any()
    assert torch.equal(region("OPC", (1, 8, 8))[0], ~region("IPC", (1, 8, 8))[0])
    left = [int(frame.any(0).nonzero()[0]) for frame in region("OPD", (5, 8, 8))]
    assert left == [0, 1, 2, 3, 4]                                              # it moves from the left edge to the right


@pytest.mark.parametrize("task", [task for task in TASKS if task != "CG"])
def test_condition_videos_read_only_what_is_known(task):
    """And keep that. Planted: an edge taken from the whole clip."""
    videos = clips()
    known = region(task, videos.shape[2:])
    seen = magvit.condition_video(task, videos)
    assert torch.equal(seen[:, :, known], videos[:, :, known])
    assert torch.equal(seen, magvit.condition_video(task, torch.where(known, videos, torch.rand_like(videos))))


def test_known_codes_are_of_known_frames():
    """17 frames, 4 to a code but for the first, 5 known: codes 0 and 1 at the start; at the end one, of the last four. Planted: as many at the end as at the start."""
    config = dataclasses.replace(CAUSAL, frames=17, known_frames=5, tasks="CG FP FI")
    for task, wanted in (("FI", [1, 1, 0, 0, 1]), ("FP", [1, 1, 0, 0, 0]), ("CG", [0, 0, 0, 0, 0])):
        known = magvit.known_codes(task, 2, config, "cpu").view(2, *config.latent_shape)
        assert known[0, :, 0, 0].tolist() == wanted and torch.equal(known[0], known[1]) and (known == known[:, :, :1, :1]).all()


@torch.no_grad()
def test_condition_codes_are_those_of_the_condition_video():
    """Planted: one known frame, whatever the configuration says."""
    config = dataclasses.replace(TINY, known_frames=2)
    (tokenizer, _), videos = build(config), clips(config)
    for task in ("FP", "CFP", "FI"):
        codes = magvit.condition_codes(tokenizer, task, videos, config)
        assert torch.equal(codes, tokenizer.encode(magvit.condition_video(task, videos, 2)).flatten(1))
        assert not torch.equal(codes, tokenizer.encode(magvit.condition_video(task, videos, 1)).flatten(1))


def test_linear_condition_is_a_line():
    videos = clips()
    seen = magvit.condition_video("FI", videos)
    torch.testing.assert_close(seen.diff(dim=2), ((videos[:, :, -1:] - videos[:, :, :1]) / 5).expand_as(seen.diff(dim=2)))


def test_commit_shows_the_condition_only_where_hidden_and_known():
    """Counts are exact. Planted: the condition's codes at places that are not hidden."""
    torch.manual_seed(0)
    N = math.prod(GRID)
    tokens, condition, known = torch.randint(0, 8, (3, N)), torch.randint(8, 16, (3, N)), torch.rand(3, N) < 0.4
    for ratio in (0.0, 0.3, 0.999, 1.0):
        inputs, targets, weights, hidden = hide(tokens, condition, known, torch.rand(3, N), ratio)
        assert (hidden.sum(1) == max(1, math.floor(np.float32(ratio) * N))).all() and weights.all() and torch.equal(targets, tokens)
        assert torch.equal(inputs, torch.where(hidden, torch.where(known, condition, MASK), tokens))


def test_factored_tokens():
    """split and join undo each other; a factored model has 2 x 2^3 rows, not 2^6, its nats are those of both parts, and decoding gives whole codes."""
    indices = torch.randint(2 ** 18, (4, 5))
    assert torch.equal(magvit.join(magvit.split(indices, (9, 9)), (9, 9)), indices) and int(magvit.split(indices, (9, 9)).max()) < 512
    config = dataclasses.replace(CAUSAL, token_bits=(3, 3))
    _, prior = build(config)
    assert prior.word_embeddings.num_embeddings == 16 + config.num_classes + 1 + 16
    prefix = magvit.prefix_of(["CG"], torch.tensor([2]), config)
    tokens = torch.randint(64, (1, prior.places))
    logits = prior(prefix, tokens)
    assert [part.shape[-1] for part in logits] == [8, 8]
    whole = logits[0].log_softmax(-1)[..., None, :] + logits[1].log_softmax(-1)[..., None]      # [high, low]
    torch.testing.assert_close(-prior.nats(logits, tokens), whole.flatten(2).gather(2, tokens[..., None])[..., 0])
    drawn = decode_tokens(prior, prefix, steps=3)
    assert drawn.shape == tokens.shape and 0 <= drawn.min() and drawn.max() < 64


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, CAUSAL], ids=["MAGVIT", "v2"])
def test_every_code_and_the_prefix_are_seen_everywhere(config):
    """Logits are float32, (B, N, V); each moves with any code, with the task and with the class. Planted: positions of the prefix left out."""
    _, prior = build(config)
    N, label = prior.places, torch.tensor([1])
    tokens, prefix = torch.randint(config.codebook_size, (1, N)), lambda task, label: magvit.prefix_of([task], label, config)
    tokens[0, ::3] = MASK
    [logits] = prior(prefix("CG", label), tokens)
    assert logits.shape == (1, N, config.codebook_size) and logits.dtype == torch.float32
    for t in range(0, N, 7):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % config.codebook_size
        assert (prior(prefix("CG", label), changed)[0] != logits).any(-1).all()
    for other in (prefix("CG", label + 1), prefix("FP", label)):
        assert (prior(other, tokens)[0] != logits).any(-1).all()
    assert torch.equal(prefix("OPC", label), prefix("IPD", label))             # QUIRK: one token for both kinds of painting


def test_one_batch_is_learned_by_heart():
    """Planted: targets that are the inputs; the loss on the prefix's places."""
    _, prior = build()
    torch.manual_seed(0)
    N, known = prior.places, region("OPV", GRID).expand(4, *GRID).flatten(1)
    tokens, condition = torch.randint(16, (4, N)), torch.randint(16, (4, N))
    prefix = magvit.prefix_of(4 * ["OPV"], torch.arange(4), TINY)
    optimizer, losses = torch.optim.Adam(prior.train().parameters(), 1e-2), []
    for _ in range(150):
        loss, metrics = prior.loss(prefix, tokens, condition, known, torch.rand(4, N), 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["mask"].item())
    assert losses[0] > 2.5 and losses[-1] < 0.5 and metrics["recons"] == 0     # nothing was shown


def test_training_asks_all_tasks_and_drops_labels(tmp_path, monkeypatch):
    """Each step one task, for all clips, drawn as often as it is named; its condition is that clip's; labels of CG and CFP alone, dropped at their rate.
    Planted: labels never dropped; conditions of other clips; classes told to FP; the average and the model exchanged."""
    config = dataclasses.replace(TINY, train_steps_prior=300, batch_size_prior=8, label_dropout=0.4, tasks="CG CG CFP FP IPC", width=16, layers=1, warmup=0, lr_prior=1e-3)
    tokenizer, _ = build(config)
    data, seen, loss = magvit.load_data(config), [], MagvitTransformer.loss
    monkeypatch.setattr(MagvitTransformer, "loss", lambda self, *given: (seen.append(given), loss(self, *given))[1])
    torch.manual_seed(config.seed)
    first = magvit.build_prior(config).state_dict()
    averaged = magvit.train_prior(config, data, magvit.Run(tmp_path / "run", config, data.classes), tokenizer).state_dict()
    assert any(not torch.equal(first[name], averaged[name]) for name in first)
    tasks = [int(prefix[0, 0]) - config.rows for prefix, *_ in seen]
    assert all((prefix[:, 0] == prefix[0, 0]).all() for prefix, *_ in seen)
    shares = {task: tasks.count(task) / 300 for task in (-3, -4, -6)}
    assert abs(shares[-3] - 0.4) < 0.1 and abs(shares[-4] - 0.4) < 0.1 and abs(shares[-6] - 0.2) < 0.1
    told = {task: torch.cat([prefix[:, 1] for prefix, *_ in seen if prefix[0, 0] - config.rows == task]) - config.codebook_size for task in shares}
    assert 0.3 < (told[-3] == 4).float().mean() < 0.5 and (told[-6] == 4).all() and 0.55 < (told[-4] == 4).float().mean() < 0.85
    everything = {tuple(t.tolist()): i for i, t in enumerate(magvit.tokenize(tokenizer, data.train[0], "cpu").flatten(1))}
    for prefix, tokens, condition, known, scores, ratio in seen[:40]:
        index = [everything[tuple(t.tolist())] for t in tokens]
        task = {-3: "CG", -4: "FP", -6: "IPC"}[int(prefix[0, 0]) - config.rows]
        assert torch.equal(known, region(task, GRID).expand(8, *GRID).flatten(1)) and scores.shape == tokens.shape and ratio.shape == ()
        if task != "CG":
            assert torch.equal(condition, tokenizer.encode(magvit.condition_video(task, data.train[0][index] / 127.5 - 1)).flatten(1))


def test_single_frames_are_learned_first_and_carried_over(tmp_path, monkeypatch):
    """The 2D stage is shown every frame of a clip; the 3D stage begins with its averaged weights.
    Planted: the first frame alone; no inflation; an average that never moves; the 3D stage's learning rate in the 2D one."""
    config = dataclasses.replace(TINY, train_steps_images=30, batch_size_images=4, lr_images=1e-3, warmup_tokenizer=1, train_steps_tokenizer=1, lr_tokenizer=1e-12)
    data, seen, forward = magvit.load_data(config), [], VideoTokenizer.forward
    data.train[0].copy_((10 * torch.arange(TINY.frames)).view(-1, 1, 1))                # frame t: 10 t everywhere
    monkeypatch.setattr(VideoTokenizer, "forward", lambda self, videos: (seen.append(videos), forward(self, videos))[1])
    whole = magvit.train_tokenizer(config, data, magvit.Run(tmp_path / "a", config, data.classes)).encoder.conv_in.weight
    assert {round(127.5 * (value.item() + 1)) for videos in seen[:30] for value in videos[:, 0, 0, 0, 0]} == set(range(0, 10 * TINY.frames, 10))
    assert all(videos.shape[2] == 1 for videos in seen[:30]) and seen[-1].shape[2] == TINY.frames
    flat = magvit.train_autoencoder(config.of_images, data, magvit.Run(tmp_path / "b", config, data.classes), "images")[0].encoder.conv_in.weight
    torch.manual_seed(config.seed)
    first = magvit.build_tokenizer(config.of_images).encoder.conv_in.weight
    torch.testing.assert_close(whole[:, :, 1], flat[:, :, 0])
    assert (flat - first).abs().max() > 1e-3


# --- decoding

def test_temperature_sharpens():
    """Towards 0 the draws are the same whatever the noise, at 1 they are not. Planted: logits multiplied by it."""
    _, prior = build()
    prefix = magvit.prefix_of(8 * ["CG"], torch.arange(8) % 4, TINY)
    draw = lambda seed, temperature: decode_tokens(prior, prefix, steps=2, temperature=temperature, choice_temperature=0, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0, 1e-6), draw(1, 1e-6)) and not torch.equal(draw(0, 1.0), draw(1, 1.0))


def test_counts_of_the_paper():
    """1024 codes, 12 steps: in float32, as released (511, not 512, after step 8)."""
    counts = [int(1024 * magvit.schedule(torch.tensor(k + 1.0) / 12, 1024)) for k in range(11)]
    assert counts == [1015, 989, 946, 886, 812, 724, 623, 511, 391, 265, 133]


@pytest.mark.parametrize("task,mode", [("CG", "commit"), ("FP", "commit"), ("IPD", "commit"), ("OPC", "paste")])
def test_decoding_keeps_what_was_fixed(task, mode):
    """Each pass hides fewer; a code once shown is never hidden again; COMMIT draws known places anew, "paste" keeps them.
    Planted: scores of shown codes; as many hidden again, where the schedule says so (40 passes)."""
    _, prior = build()
    known, trace = region(task, GRID).expand(2, *GRID).flatten(1), []
    condition = torch.randint(16, (2, prior.places))
    tokens = decode_tokens(prior, magvit.prefix_of(2 * [task], torch.tensor([9, 9]), TINY), condition, known, steps=40, mode=mode, trace=trace,
                           generator=torch.Generator().manual_seed(0))
    hidden = [step["hidden"] for step in trace[:-1]]
    assert all((b.sum(1) < a.sum(1)).all() and not (b & ~a).any() for a, b in zip(hidden, hidden[1:]))
    for a, step in zip(hidden, trace[1:]):
        assert torch.equal(step["tokens"][~a], tokens[~a])
        assert torch.equal(step["inputs"][step["hidden"]], torch.where(known, condition, MASK)[step["hidden"]]) or mode == "paste" or step is trace[-1]
    assert torch.equal(tokens[known], condition[known]) == (mode == "paste" or not known.any())


@torch.no_grad()
def test_samples_do_not_depend_on_what_a_task_does_not_know():
    """Through the whole way from pixels. Planted: the clip itself tokenized in place of its condition."""
    tokenizer, prior = build()
    videos, labels = clips(), torch.tensor([1, 2])
    for task in ("FP", "FI", "OPV", "IPD"):
        known = region(task, videos.shape[2:])
        a, b = (sample(tokenizer, prior, labels, task=task, videos=x, steps=3, generator=torch.Generator().manual_seed(0))
                for x in (videos, torch.where(known, videos, torch.rand_like(videos))))
        assert torch.equal(a, b) and a.shape == videos.shape
    with pytest.raises(UserError, match="task FP is unknown"):
        sample(tokenizer, build(dataclasses.replace(TINY, tasks="CG"))[1], labels, task="FP", videos=videos)


# --- losses

def test_lecam_is_zero_where_d_tells_nothing_apart():
    zero = torch.tensor(0.0)
    assert magvit.lecam(torch.tensor([-1.0]), torch.tensor([1.0]), zero, zero) == 0
    assert magvit.lecam(torch.tensor([3.0]), torch.tensor([-2.0]), zero, zero) == 13


# --- data

def test_motions_move_as_they_say():
    """The centre of what is bright goes along one axis, or around, or stays while the area changes. Planted: x and y exchanged."""
    videos, labels = magvit.draw_motions(0, range(300), 8, 32)
    assert np.array_equal(magvit.draw_motions(0, [7, 200], 8, 32)[0], videos[[7, 200]]) and np.bincount(labels).min() > 50
    light = (videos.astype(np.float32) - np.array((20, 20, 30))).clip(0).sum(-1)
    area, axis = light.sum((2, 3)), np.arange(32) - 15.5
    centre = np.stack([(light.sum(2) * axis).sum(2) / area, (light.sum(3) * axis).sum(2) / area], -1)
    x, y = np.ptp(centre, axis=1).T
    for label, name in enumerate(magvit.MOTIONS):
        k = labels == label
        step = np.linalg.norm(np.diff(centre[k], axis=1), axis=-1)
        moves = {"left-right": (x[k] > 2) & (y[k] < 0.5), "up-down": (y[k] > 2) & (x[k] < 0.5), "turning": (x[k] > 1) & (y[k] > 1),
                 "growing": (x[k] < 3.2) & (y[k] < 1.5) & (area[k].max(1) > 1.25 * area[k].min(1))}
        assert moves[name].mean() > 0.98, name
        assert name == "growing" or (1.2 < np.median(step) < 2.6 and step.max() < 2.7)     # pixels a frame: evenly, never a jump
        if name == "turning":                                                               # both ways round
            (ax, ay), (bx, by) = (centre[k, t].T - centre[k].mean(1).T for t in (0, 1))
            assert 0.3 < (ax * by > ay * bx).mean() < 0.7


def test_bouncing_digits_stay_whole():
    """No digit leaves its clip: as much light in every frame; clips are a function of seed and number."""
    digits = (np.random.default_rng(0).random((5, 28, 28)) * 255).astype(np.uint8)
    videos = magvit.bounce(digits, 0, 12, 32)
    assert videos.shape == (5, 12, 32, 32, 3) and (np.ptp(videos.astype(int).sum((2, 3, 4)), axis=1) == 0).all()
    assert (videos[:, 0] != videos[:, 6]).any((1, 2, 3)).all() and np.array_equal(videos, magvit.bounce(digits, 0, 12, 32))


def write_clips(folder, frames=TINY.frames, size=20):
    """One clip in each of the three forms."""
    pictures = [Image.fromarray(np.full((size, size + 4, 3), 30 * i, np.uint8)) for i in range(frames)]
    folder.mkdir(parents=True)
    pictures[0].save(folder / "a.gif", save_all=True, append_images=pictures[1:])
    np.save(folder / "b.npy", np.stack([np.asarray(picture) for picture in pictures]))
    (folder / "c").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / "c" / f"{i:03}.png")


def test_clips_of_all_forms_are_read_alike(tmp_path):
    write_clips(tmp_path / "train" / "x", frames=8)
    read = [magvit.read_clip(tmp_path / "train" / "x" / name, TINY) for name in ("a.gif", "b.npy", "c")]
    assert all(np.array_equal(clip, read[1]) for clip in read[1:]) and np.abs(read[0].astype(int) - read[1]).max() < 5      # a GIF has few colours
    assert read[0].shape == (TINY.frames, 16, 16, 3)
    write_clips(tmp_path / "test" / "x")
    data = magvit.load_data(dataclasses.replace(TINY, data=str(tmp_path), num_classes=1))
    assert data.train[0].shape == (3, 3, TINY.frames, 16, 16) and len(data.test[0]) == 3


def test_frames_in_their_order_and_number(tmp_path):
    """9.png before 10.png; hidden files are none; equal frames, which a GIF holds as one, count. Planted: names sorted as strings; durations ignored."""
    (tmp_path / "x").mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(tmp_path / "x" / f"{i}.png")
    (tmp_path / "x" / ".index").write_bytes(b"0")
    config = dataclasses.replace(TINY, frames=12)
    assert magvit.read_clip(tmp_path / "x", config)[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    videos = clips(number=1)
    videos[:, :, 2:4] = videos[:, :, 1:2]
    magvit.save_gif(videos, tmp_path / "still.gif", 1)
    assert magvit.read_clip(tmp_path / "still.gif", TINY).shape == (6, 16, 16, 3)
    with pytest.raises(UserError, match="larger than 16"):
        magvit.bounce(np.zeros((2, 28, 28), np.uint8), 0, 8, 16)


def test_clips_that_cannot_be_read(tmp_path):
    """Each case in one line: too few frames, sizes that change, a GIF cut off, another kind of array, no clip at all."""
    write_clips(tmp_path / "x", frames=3)
    for name in ("a.gif", "b.npy", "c"):
        with pytest.raises(UserError, match=f"{name} has 3 frames: this model takes 6"):
            magvit.read_clip(tmp_path / "x" / name, TINY)
    for i in (100, 101, 102):
        Image.new("RGB", (9, 9)).save(tmp_path / "x" / "c" / f"{i}.png")
    with pytest.raises(UserError, match="9 x 9 and 24 x 20 pixels: all must be of one size"):
        magvit.read_clip(tmp_path / "x" / "c", TINY)
    write_clips(tmp_path / "y", frames=8)
    whole = (tmp_path / "y" / "a.gif").read_bytes()
    (tmp_path / "y" / "a.gif").write_bytes(whole[:len(whole) // 3])
    (tmp_path / "y" / "d.gif").write_bytes(b"GIF89a")
    np.save(tmp_path / "y" / "b.npy", np.zeros((9, 8, 8), np.float32))
    for name, says in (("a.gif", "a.gif"), ("b.npy", r"b.npy cannot be read as a clip \(float32"), ("d.gif", "d.gif cannot be read"), ("none.gif", "none.gif cannot be read")):
        with pytest.raises(UserError, match=says):
            magvit.read_clip(tmp_path / "y" / name, TINY)


def test_training_runs_and_keeps_large_codes(tmp_path, monkeypatch, capsys):
    """Both tokenizers through the command line, without classes too; 2^18 codes come back from the file. Planted: 16 bits in the file; labels of
    the data told to a model without classes."""
    words = "--train-images 8 --test-images 4 --image-size 16 --ch 8 --groups 4 --ch-mult 1 2 --temporal 1 --width 16 --heads 2 --layers 1 --batch-size-prior 2 "
    words += "--train-steps-images 2 --batch-size-images 2 --train-steps-tokenizer 2 --train-steps-prior 12 --sample-steps 2 --disc-weight 0.1 --disc-width 4 --disc-mult 1 1 --lecam-weight 0.001 --tasks"
    for run, more in (("a", "--frames 6"), ("b", "--frames 5 --causal --frame-norm --code-dim 18 --token-bits 9 9 --num-classes 0")):
        magvit.main(["train", *words.split(), "CG FP IPD", *more.split(), "--out", str(tmp_path / run)])
        assert "samples.gif" in capsys.readouterr().out and (tmp_path / run / "report.json").exists()
        magvit.main(["edit", str(tmp_path / run)])
        assert (tmp_path / run / "FP.gif").exists() and (tmp_path / run / "IPD.png").exists()
    kept = np.load(tmp_path / "b" / "tokens.npz")["tokens"]
    run, tokenizer, _ = magvit.load_run(tmp_path / "b")
    wanted = magvit.tokenize(tokenizer, magvit.load_data(run.config).train[0], "cpu")
    assert int(wanted.max()) > 2 ** 16 and np.array_equal(kept, wanted.numpy())


# --- released configurations

@pytest.mark.parametrize("path", sorted(GOLDEN.glob("magvit_*release.json.gz")), ids=lambda path: path.name.removesuffix("_release.json.gz"))
def test_networks_have_the_released_names_and_shapes(path, monkeypatch):
    """The preset that fits is found, its counts are the recorded ones. (The weights were never published; Open-MAGVIT2's were.)"""
    release = json.load(gzip.open(path))
    shapes = release["params"]
    large = "l" if "_L" in path.name else "b"
    preset = "open-magvit2" if "om2" in path.name else f"ucf101-{large}" if "ucf" in path.name else f"bair-{large}{'-8' * ('mt8' in path.name)}"
    given = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    other = "bair-b" if preset == "ucf101-b" else "ucf101-b"                    # not all: each is built, twice
    monkeypatch.setattr(magvit, "PRESETS", {name: magvit.PRESETS[name] for name in (other, preset)})
    net = magvit.from_official(given)
    count = 370_547_349 if "om2" in path.name else release["n_params"]         # that list counts the discriminator too
    assert sum(p.numel() for p in net.parameters()) == count
    if hasattr(net, "config"):
        assert net.config == magvit.PRESETS[preset]
    wrong = dict(list(given.items())[1:]) | {"more": torch.empty(3, device="meta")}
    with pytest.raises(UserError, match="the dict is no model of this paper: 2 names or shapes do not fit"):
        magvit.from_official(wrong)


def test_presets_and_defaults_make_sense():
    for preset in magvit.PRESETS.values():
        magvit.check(preset)
    with pytest.raises(UserError, match="FP with 1 known frames leaves nothing to tell of 2"):
        build(dataclasses.replace(TINY, frames=2))
