"""What the shared suite knows of each file: one line per variant, with a Config small enough for a test.

`case` runs over all of them: case.module, case.config (tiny), case.name.
"""
import concurrent.futures
import importlib
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")     # before torch: two busy processes on two cores must not spin on each other

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(image_size=8, train_images=200, test_images=30, batch_size=8, log_every=1, save_every=5)
VQGAN = dict(ch_mult=(1, 1), code_dim=8, layers=2, heads=2, width=16, disc_layers=1, disc_width=8, warmup=2, pkeep=0.9, lr_prior=1e-2,
             batch_size_prior=8, train_steps_tokenizer=8, train_steps_prior=12)
SMALL = TINY | dict(image_size=16)
VQVAE2 = dict(channels=8, res_channels=4, res_blocks=1, code_dim=4, width=(8, 8, 8), res_width=(8, 8, 8), block_layers=(1, 1, 1), kernel=3,
              cond_width=(4, 4, 4), cond_blocks=(0, 1, 1), warmup=2, lr_prior=1e-2, batch_size_prior=8, train_steps_tokenizer=8,
              train_steps_prior=12)
RQVAE = dict(ch=32, groups=8, ch_mult=(1, 1), depth=3, code_dim=8, width=16, heads=2, body_layers=2, head_layers=1, disc_layers=1, disc_width=8, disc_start=4,
             warmup=2, warmup_tokenizer=2, lr_prior=1e-2, batch_size_prior=8, train_steps_tokenizer=8, train_steps_prior=12)
MASKGIT = dict(ch=32, ch_mult=(1, 1), layers=2, heads=2, width=16, disc_width=8, warmup=2, warmup_tokenizer=2, lr_prior=1e-2, batch_size_prior=8,
               train_steps_tokenizer=8, train_steps_prior=12)
VAR = dict(ch=32, ch_mult=(1, 1), scales=(1, 2, 4), code_dim=8, depth=2, heads=2, width=16, disc_layers=1, disc_width=8, warmup=2, warmup_tokenizer=2,
           lr_prior=1e-2, batch_size_prior=8, train_steps_tokenizer=8, train_steps_prior=12)
MAR = dict(ch=32, ch_mult=(1, 1), latent_dim=3, encoder_depth=1, decoder_depth=1, heads=2, width=16, decoder_width=24, head_width=16, head_depth=2, buffer=2,
           kl_weight=1e-6, noise_levels=4, mask_ratio_min=0.7, guidance=2.0, guidance_schedule="linear", temperature=1.0, clip_x0=4.0,
           disc_layers=1, disc_width=8, sample_steps=4, denoise_steps=10, warmup=2, warmup_tokenizer=2, lr_prior=1e-2, batch_size_prior=8,
           train_steps_tokenizer=8, train_steps_prior=12)
MAGVIT = dict(frames=6, ch=8, groups=4, ch_mult=(1, 2), temporal=(1,), code_dim=4, layers=2, heads=2, width=16, disc_width=4, disc_mult=(1, 1), sample_steps=3,
              warmup=2, warmup_tokenizer=2, lr_prior=1e-2, batch_size_images=4, batch_size_prior=8, train_steps_images=4, train_steps_tokenizer=8, train_steps_prior=12)
CASES = {   # name: (file, fields of its tiny Config)
    "pixelcnn-gated": ("pixelcnn", dict(levels=4, layers=2, width=18, head=30, train_steps_prior=12, **TINY)),
    "pixelcnn-plain": ("pixelcnn", dict(levels=4, model="pixelcnn", num_classes=0, layers=2, width=6, head=30, train_steps_prior=12, **TINY)),
    "pixelcnn-binary": ("pixelcnn", dict(levels=2, colours=1, model="pixelcnn", num_classes=0, layers=2, width=8, head=16,
                                         train_steps_prior=12, **TINY)),
    "vqgan_gpt-class": ("vqgan_gpt", dict(codebook_size=16, codebook_decay=0.0, codebook_weight=1.0, restart=3, disc_start=4, **VQGAN, **TINY)),
    "vqgan_gpt-start": ("vqgan_gpt", dict(codebook_size=16, num_classes=0, label_dropout=0.0, codebook_decay=0.9, disc_weight=0.0, **VQGAN, **TINY)),
    "vqgan_gpt-edges": ("vqgan_gpt", dict(codebook_size=16, num_classes=0, label_dropout=0.0, condition="edges", codebook_decay=0.0, disc_weight=0.0, **VQGAN, **TINY)),
    "vqgan_gpt-gumbel": ("vqgan_gpt", dict(codebook_size=16, quantizer="gumbel", z_channels=8, disc_start=4, **VQGAN, **TINY)),
    "vqvae2-two": ("vqvae2", dict(codebook_size=16, codebook="ema", restart=3, blocks=(2, 1), heads=(2, 0), out_blocks=(1, 0), **VQVAE2, **SMALL)),
    "vqvae2-one": ("vqvae2", dict(blocks=(1,), heads=(2,), out_blocks=(0,), dropout=(10,), codebook_size=16, levels=1, codebook="gradient", restart=0, num_classes=0, **VQVAE2, **SMALL)),
    "vqvae2-three": ("vqvae2", dict(blocks=(1, 1, 1), heads=(2, 2, 0), out_blocks=(0, 0, 0), dropout=(0, 10, 0), codebook_size=16, levels=3, codebook="debiased", restart=0, **VQVAE2, **SMALL | dict(image_size=32))),
    "rqvae-class": ("rqvae", dict(codebook_size=16, **RQVAE, **TINY)),
    "rqvae-start": ("rqvae", dict(codebook_size=16, num_classes=0, label_dropout=0.0, restart=False, disc_weight=0.0, soft_labels=False,
                                  stochastic_codes=False, **RQVAE, **TINY)),
    "maskgit-class": ("maskgit", dict(codebook_size=16, codebook_decay=0.0, restart=3, disc_start=4, **MASKGIT, **TINY)),
    "maskgit-start": ("maskgit", dict(codebook_size=16, num_classes=0, label_dropout=0.0, codebook_decay=0.9, restart=0, disc_start=0, gan="hinge", entropy_temperature=1.0,
                                      schedule="sqrt", **MASKGIT, **TINY)),
    "var-class": ("var", dict(codebook_size=16, codebook_decay=0.0, codebook_weight=1.0, restart=3, disc_start=4, drop_path=0.1, **VAR, **TINY)),
    "var-start": ("var", dict(codebook_size=16, num_classes=0, label_dropout=0.0, disc_weight=0.0, shared_adaln=True, progressive=0.5,
                              progressive_start=1, **VAR, **TINY)),
    "mar-class": ("mar", dict(disc_start=4, flip=True, dropout=0.1, patch_size=1, **MAR, **TINY)),
    "mar-start": ("mar", dict(num_classes=0, label_dropout=0.0, disc_weight=0.0, patch_size=2, **MAR | dict(sample_steps=2), **TINY)),
    "magvit-class": ("magvit", dict(codebook_size=16, disc_weight=0.1, disc_start=4, lecam_weight=0.001, **MAGVIT, **TINY)),
    "magvit-causal": ("magvit", dict(num_classes=0, label_dropout=0.0, causal=True, frame_norm=True, token_bits=(1, 3), tasks="CG FP IPD",
                                     **MAGVIT | dict(frames=5, train_steps_images=0), **TINY)),
    "rqvae-text": ("rqvae", dict(codebook_size=16, num_classes=0, condition="text", disc_weight=0.0, **RQVAE, **TINY)),
}
MASKED = {"maskgit", "magvit"}     # files whose priors see tokens on all sides and tell the masked ones; the others are causal
SCALES = {"var"}         # files whose priors tell a whole map of tokens in one pass, from all coarser maps
CONTINUOUS = {"mar"}     # files without a codebook: latents in place of tokens, z in place of logits
OWN_TESTS = {"mar": "no codes: tests/test_mar.py", "magvit": "clips and tasks: tests/test_magvit.py"}     # where the shared tests of a prior do not fit
FILES = sorted({file for file, _ in CASES.values()})


@dataclass
class Case:
    name: str
    module: object
    config: object

    def build(self, seed=0):
        """Tokenizer and prior of the tiny config, every weight random (also those that start at zero)."""
        torch.manual_seed(seed)
        tokenizer, prior = self.module.build_tokenizer(self.config), self.module.build_prior(self.config)
        if hasattr(self.module, "bind"):                                # the prior reads the tokenizer's codebook
            self.module.bind(prior, tokenizer)
        return tokenizer.eval(), prior.eval()

    def images(self, number=2):
        """Test images in [-1, 1] and their labels."""
        images, labels = self.module.load_data(self.config).test
        labels = labels if self.config.num_classes else torch.zeros_like(labels)
        return images[:number] / 127.5 - 1, labels[:number]

    @property
    def masked(self):
        """Does the prior tell masked tokens from all others? Else each from the earlier ones."""
        return self.module.__name__ in MASKED

    @property
    def scales(self):
        """Does the prior tell a whole map of tokens at once, from the coarser maps?"""
        return self.module.__name__ in SCALES

    @property
    def continuous(self):
        """Are tokens latents, which a diffusion model draws?"""
        return self.module.__name__ in CONTINUOUS

    @property
    def video(self):
        """Are images clips (B, 3, T, H, W)?"""
        return hasattr(self.config, "frames")

    @property
    def own_tests(self):
        """Why a test of priors that take (tokens, labels) and give logits of codes does not fit, or ""."""
        return OWN_TESTS.get(self.module.__name__, "")

    def tokens(self, tokenizer, images):
        """What the prior reads of images."""
        tokens = tokenizer.encode(images)
        return self.module.patchify(tokens, self.config.patch_size) if self.continuous else tokens.flatten(1)

    def seen_from(self, t):
        """The first position whose logit may depend on token t, of a prior that is not masked."""
        return sum(p * p for p in self.config.scales[:self.module.levels(self.config.scales)[t] + 1]) if self.scales else t + 1

    @property
    def V(self):
        """Values a token can have."""
        return getattr(self.config, "codebook_size", 0) or self.config.levels

    def condition(self, labels):
        """What prior and sampler are told: labels, or for a prior that is told a map's tokens some of these."""
        if getattr(self.config, "condition", "class") == "class":
            return labels
        if self.config.condition == "text":
            return self.module.read_captions(["a small red star at the top", "a large blue ring at the left"])[:1].repeat(len(labels), 1) + 0 * labels[:, None]
        side = self.config.image_size // self.config.f
        return torch.randint(self.V, (len(labels), side, side), generator=torch.Generator().manual_seed(0)) + 0 * labels[:, None, None]

    def flags(self, **more):
        """The tiny config as flags of the command line."""
        import dataclasses
        changed = {**dataclasses.asdict(self.config), **more}
        default = dataclasses.asdict(type(self.config)())
        words = []
        for name, value in changed.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words += [flag if value else flag.replace("--", "--no-", 1)] if value != default[name] else []
            elif value != default[name] or name in more:
                words += [flag, *map(str, value)] if isinstance(value, (tuple, list)) else [flag, str(value)]
        return words


def pytest_configure():
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    """The notebooks that were asked for start now, in a process of their own: tests take one core, their kernels the other."""
    wanted = [item for item in session.items if item.name.startswith("test_notebook_runs")]
    if wanted and not session.config.option.collectonly:
        session.config.pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        session.config.notebooks = {path: session.config.pool.submit(item.module.run_notebook, path)
                                    for item in wanted for path in [item.callspec.params["path"]]}


def pytest_unconfigure(config):
    if hasattr(config, "pool"):
        config.pool.shutdown(cancel_futures=True)                       # after -x or Ctrl-C: what has not begun


@pytest.fixture(params=CASES)
def case(request):
    file, fields = CASES[request.param]
    module = importlib.import_module(file)
    return Case(request.param, module, module.Config(**fields))


@pytest.fixture
def fails(capsys):
    """fails(module, *argv, says=[...]): the command ends with exit code 2 and one line on stderr that holds these words."""
    def run(module, *argv, says=()):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            module.main([str(word) for word in argv])
        lines = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        for word in says:
            assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
        return lines[0]
    return run
