"""Films of a pipeline are those of diffusers from the same noise; each expert is asked at its own times."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("av")

from PIL import Image

import ftrain
from ftrain.bridge.native_wan import native_wan
from ftrain.bridge.pipelines import WanFolder
from ftrain.run.clip_encoders import ImageCoder, TextCoder, VideoCoder
from ftrain.run.film_sampling import Asked, Expert, Sampling, make_film, noise_of
from tests.helpers.tiny_wan import TINY
from tests.helpers.tiny_wan_pipeline import WITH_ENCODER, WITH_FRAME, write_pipeline

CPU = torch.device("cpu")
SIZE = (4, 3, 4, 6)
WORDS = ("a cat &amp; a dog", "bad")


def theirs(path, kind, **more):
    """diffusers' pipeline of a folder."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    parts = {
        name: diffusers.WanTransformer3DModel.from_pretrained(path / name) for name in WanFolder.open(path).transformers
    }
    made = getattr(diffusers, kind)(
        tokenizer=transformers.AutoTokenizer.from_pretrained(path / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(path / "text_encoder"),
        vae=diffusers.AutoencoderKLWan.from_pretrained(path / "vae"),
        scheduler=diffusers.UniPCMultistepScheduler.from_pretrained(path / "scheduler"),
        **parts, **more,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def ours(path):
    """Experts, states of `WORDS`, and the autoencoder."""
    folder = WanFolder.open(path)
    models = [(native_wan(path / name), folder.config(name)) for name in folder.transformers]
    experts = [Expert(model, model.load(), cfg) for model, cfg in models]
    with torch.no_grad():
        texts = TextCoder.open(folder, device=CPU, dtype=torch.float32).states(WORDS)
    return experts, texts, VideoCoder.open(folder, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A pipeline of two experts."""
    return write_pipeline(tmp_path_factory.mktemp("film") / "wan", boundary=0.875)


NOISE = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(5))
HOW = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 6, "guidance_scale": 4.0}


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_a_film_of_a_text_is_diffusers_film(experts, sampler):
    """Of two experts with guidance of their own, from the prompt to the pixels."""
    pipe = theirs(experts, "WanPipeline", boundary_ratio=0.875)
    if sampler == "euler":
        import diffusers

        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    wanted = pipe(*WORDS, **HOW, guidance_scale_2=3.0, latents=NOISE.clone(), output_type="pt").frames[0]
    both, texts, coder = ours(experts)
    found = make_film(Asked(SIZE, *texts), both, Sampling(sampler, 6, 3.0, 4.0, 3.0), noise_ZFHW=NOISE[0])
    with torch.no_grad():
        pixels = (coder.video(found).transpose(0, 1) + 1) / 2
    torch.testing.assert_close(pixels, wanted, atol=1e-4, rtol=0)
    assert float((found - NOISE[0]).abs().max()) > 0.5


TOLD = {"channels": WITH_FRAME, "encoder": WITH_ENCODER, "clean first": TINY}


@pytest.mark.parametrize("kind", list(TOLD))
def test_a_film_that_begins_with_a_picture_is_diffusers_film(kind, tmp_path):
    """The picture in channels of its own (2.2's 14B), as rows of an image encoder too (2.1's), or in its place at time
    0 (the 5B)."""
    clean = kind == "clean first"
    path = write_pipeline(tmp_path / "wan", transformer=TOLD[kind], expand_timesteps=clean)
    folder, more, rows = WanFolder.open(path), {}, None
    picture = torch.randint(0, 256, (32, 48, 3), generator=torch.Generator().manual_seed(1)).byte()
    video = torch.zeros(3, 9, 32, 48)
    video[:, 0] = picture.permute(2, 0, 1) / 127.5 - 1
    if kind == "encoder":
        import transformers

        encoder = ImageCoder.open(folder, device=CPU)
        more = {"image_encoder": encoder.module, "image_processor": encoder.processor}
        assert isinstance(encoder.module, transformers.CLIPVisionModel)
        with torch.no_grad():
            rows = encoder.rows(video)
    pipe = theirs(path, "WanImageToVideoPipeline", expand_timesteps=clean, **more)
    (expert,), texts, coder = ours(path)
    padded = [torch.cat([text, torch.zeros(512 - len(text), 12)])[None] for text in texts]
    told = {"prompt_embeds": padded[0], "negative_prompt_embeds": padded[1]}
    image = Image.fromarray(picture.numpy())
    wanted = pipe(image, **told, **HOW, latents=NOISE.clone(), output_type="latent").frames[0]
    with torch.no_grad():
        first = coder.latents(video[:, :1])[:, 0] if clean else None
        asked = Asked(SIZE, *texts, None if clean else coder.first_frame(video), rows, first)
    found = make_film(asked, [expert], Sampling("unipc", 6, 3.0, 4.0), noise_ZFHW=NOISE[0])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_whole_steps_are_cut_as_diffusers_cuts_them():
    """In float64: of 900.0000001 and 899.9999999 only one is step 900."""
    diffusers = pytest.importorskip("diffusers")
    for steps, shift in ((9, 1.0), (37, 3.0), (50, 5.0), (1, 2.0)):
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        scheduler.set_timesteps(steps)
        sampling = Sampling(steps=steps, shift=shift)
        assert sampling.timetable() == tuple(scheduler.sigmas.tolist())
        assert [round(1000 * sampling.seen(t)) for t in sampling.timetable()[:-1]] == scheduler.timesteps.tolist()


def test_a_distilled_model_takes_few_steps_and_new_noise(experts):
    both, texts, _ = ours(experts)
    asked, few = Asked(SIZE, *texts), Sampling("few", guidance=1.0, times=(1.0, 0.9, 0.5, 0.0))
    noise = noise_of(asked, ftrain.key(0))
    made = [make_film(asked, both, few, noise_ZFHW=noise, key=ftrain.key(k)) for k in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    with pytest.raises(ValueError, match="draws new noise: give a key"):
        make_film(asked, both, few, noise_ZFHW=noise)


def test_what_cannot_be_is_refused(experts):
    both, texts, _ = ours(experts)
    asked = Asked(SIZE, *texts)
    with pytest.raises(ValueError, match=r"no model here is for time 0.75, only for 0.875 to 1: give the"):
        make_film(asked, both[:1], Sampling(steps=4), noise_ZFHW=NOISE[0])
    with pytest.raises(ValueError, match=r"noise of \[4, 2, 4, 6\] for latents of \[4, 3, 4, 6\]"):
        make_film(asked, both, Sampling(steps=4), noise_ZFHW=NOISE[0, :, :2])
    for wrong, message in (
        ({"sampler": "dpm"}, "is none of unipc, euler, few"),
        ({"sampler": "few"}, r'times are of the sampler "few", which needs them'),
        ({"times": (1.0, 0.0)}, 'times are of the sampler "few"'),
        ({"steps": 0}, "at least one step"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(Sampling(), **wrong)
