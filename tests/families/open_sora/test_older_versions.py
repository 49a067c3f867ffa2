"""Open-Sora 1.0 and 1.1: the published losses and drawings, what networks are told, files, and long videos."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from families.common import sampling
from families.common.cache import origin_of
from families.common.family import TEXT_TO_VIDEO
from families.common.features import Origin
from families.common.library_files import CONFIG_KEY
from families.common.weight_files import FAMILY_KEY
from families.open_sora import build
from families.open_sora.autoencoder import autoencoder
from families.open_sora.conditions import FEATURE, Denoiser
from families.open_sora.config import OpenSoraConfig, OpenSoraSettings
from families.open_sora.frame_autoencoders import FrameClips, TemporallyDecoded
from families.open_sora.sampling import draw_clips
from families.open_sora.versions import VERSIONS
from families.registry import family_of, load_task
from inference.text_to_video import main
from modules.stdit import POSITIONS, STDiT, STDiT2
from tests.clips import FPS, write_clips
from tests.families.open_sora.tiny import SPATIAL, small_settings
from tests.golden import load_case, load_manifest, resolve, weights_of
from train.train_stdit import TrainStdit
from warpcore.config import ConfigError, make_config
from warpcore.data.video_headers import read_header
from warpcore.diffusion.given_frames import GivenFrames
from warpcore.diffusion.processes import discrete_process
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.errors import UserError
from warpcore.meta import only_shapes

pytestmark = pytest.mark.integration
TRAINING, TRAINING_TENSORS = load_case("opensora/iddpm_training")
SAMPLING, SAMPLING_TENSORS = load_case("opensora/iddpm_sampling")
SMALL = {
    "in_channels": 4, "patch_size": [1, 2, 2], "pred_sigma": True, "caption_channels": 64, "model_max_length": 32,
    "hidden_size": 48, "num_heads": 4, "depth": 2,
}  # fmt: skip
FRAMES = SPATIAL | {"scaling_factor": 0.18215, "force_upcast": False}
INFERENCE = Path(__file__).parents[3] / "configs" / "inference"
OLDER = ("mini-1.0", "mini-1.1")


def golden_network() -> STDiT:
    spec, _ = load_case("opensora/iddpm_small_network")
    network = STDiT(**spec["constructor"])
    tables = {name: getattr(network, name) for name in POSITIONS}
    network.load_state_dict(weights_of(spec, {}, computed=tables))
    return network


class Draws:
    """Recorded draws in place of those of seeds."""

    def __init__(self, **given):
        self.given, self.device, self.level = given, torch.device("cpu"), None

    def normal(self, name, *shape):
        found = self.given[name.split(" of")[0]]
        return next(found) if not isinstance(found, torch.Tensor) else found

    def uniform(self, name):
        return self.given[name.replace(" ", "_")]


@pytest.fixture
def small_older(monkeypatch, tmp_path) -> None:
    """Makes the minis of 1.0 and 1.1 smaller, with a small autoencoder of frames."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    tensors = {name: tensor.contiguous() for name, tensor in AutoencoderKL(**FRAMES).state_dict().items()}
    save_file(tensors, tmp_path / "frames.safetensors", {CONFIG_KEY: json.dumps(FRAMES)})
    for name, more in {
        "mini-1.0": {"input_size": [4, 4, 4]},
        "mini-1.1": {"input_sq_size": 64, "qk_norm": True, "qk_norm_legacy": True},
    }.items():
        version = replace(VERSIONS[name], network=SMALL | more, autoencoder=str(tmp_path / "frames.safetensors"))
        monkeypatch.setitem(VERSIONS, name, version)


def random_weights(version: str, path: Path) -> Path:
    torch.manual_seed(0)
    network = VERSIONS[version].kind(**VERSIONS[version].network)
    state = {
        name: tensor if name in (*POSITIONS, "rope.freqs") else tensor + 0.05 * torch.randn_like(tensor)
        for name, tensor in network.state_dict().items()
    }
    save_file(state, path, {FAMILY_KEY: "open_sora"})
    return path


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["plain", "masked"])
def test_the_loss_is_the_published_one(name, small_older, tmp_path):
    """Of every sample of the golden batch: noise, and the bound of the variance; given frames are noised by the first
    step, and left out."""
    call = next(call for call in TRAINING["calls"] if call["name"] == name)
    given = {key: resolve(call.get(key), TRAINING_TENSORS) for key in ("args", "kwargs", "integer_draw", "result")}
    run = TrainStdit(make_config(OpenSoraConfig, small_settings(tmp_path, "a.tar", model_version="mini-1.0")))
    run.begin(None)
    run.networks = {"generator": golden_network()}
    (x0,), kwargs = given["args"], given["kwargs"]["model_kwargs"]
    conditions = {"y": kwargs["y"][:, 0], "mask": kwargs["mask"]}
    conditions |= {"height": torch.full((len(x0),), 64.0), "width": torch.full((len(x0),), 64.0)}
    if "x_mask" in kwargs:
        conditions["x_mask"] = kwargs["x_mask"]
        assert not kwargs["x_mask"].all()
    draws = Draws(timestep=(given["integer_draw"] + 0.5) / 1000, caption_dropout=torch.ones(len(x0)),
                  noise=given["kwargs"]["noise"])  # fmt: skip
    with torch.no_grad():
        found = run.loss((x0, conditions), draws)
    torch.testing.assert_close(found.loss, given["result"]["loss"], rtol=0, atol=2e-4)
    torch.testing.assert_close(found.raw, given["result"]["mse"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", OLDER)
def test_it_trains_on_latents_of_frames_and_draws_what_it_learned(version, small_older, tmp_path, monkeypatch):
    seen = []

    class Recorded(TrainStdit):
        def encode(self, batch, random):
            seen.append((batch, super().encode(batch, random)))
            return seen[-1][1]

        def text_features(self, encoder, captions):
            seen.append([encoder.clean(caption) for caption in captions])
            return super().text_features(encoder, captions)

    given = small_settings(
        tmp_path, write_clips(tmp_path / "a.tar", 4, frames=4), num_frames=4, model_version=version, updates=2,
        save_every=2, mask_ratios={"mask_image_head": 1.0}, sample_steps=2, sample_prompts=["A <b>Box</b>"],
    )  # fmt: skip
    assert Recorded(make_config(Recorded.Config, given)).run() == 0
    texts = [one for one in seen if isinstance(one, list)]
    _, (latents, conditions) = next(one for one in seen if not isinstance(one, list))
    assert latents.shape == (4, 4, 4, 4, 4)
    assert (conditions["fps"] == FPS).all()
    assert not conditions["x_mask"][:, 0].any()
    assert conditions["x_mask"][:, 1:].all()
    assert (["A <b>Box</b>"] in texts) == (version == "mini-1.1")  # 1.0 cleans texts
    run = tmp_path / "runs" / "run"
    state, kind = load_file(run / "generator.safetensors"), VERSIONS[version].kind
    assert state.keys() == kind(**VERSIONS[version].network).state_dict().keys()
    monkeypatch.setattr("sys.argv", [
        "text_to_video.py", f"run={run}", "prompts=a box", "device=cpu", "steps=2", "sample_name=a",
        f"output_path={tmp_path / 'drawn'}",
    ])  # fmt: skip
    main()
    with (tmp_path / "drawn" / "a_0000.mp4").open("rb") as file:
        header = read_header(file)
    assert (header.num_frames, header.height, header.width) == (4, 32, 32)


def test_texts_that_another_version_reads_differently_are_not_taken_from_its_cache(small_older, monkeypatch):
    longer = replace(VERSIONS["mini-1.1"], network=VERSIONS["mini-1.1"].network | {"model_max_length": 48})
    monkeypatch.setitem(VERSIONS, "mini-1.1", longer)

    def origin(version: str) -> Origin:
        given = small_settings(Path("a"), "a.tar", model_version=version)
        return origin_of(TrainStdit(make_config(OpenSoraConfig, given)), [FEATURE])

    first, second = map(origin, OLDER)
    assert second.differences(second, [FEATURE]) == []
    assert "text_length is 32 in the cache, 48 here" in first.differences(second, [FEATURE])
    assert "cleans_captions is True in the cache, None here" in first.differences(second, [FEATURE])
    flow = origin("mini")
    before = replace(flow, settings={"captions_getter": flow.settings["captions_getter"], "token_ids": None})
    assert before.differences(flow, [FEATURE]) == []  # of an earlier version


def test_defaults_are_those_of_the_version():
    def config(**given):
        return make_config(OpenSoraConfig, small_settings(Path("a"), "a.tar", **given))

    settings = small_settings(Path("a"), "a.tar", model_version="STDiT2-XL/2")
    del settings["sample_steps"]
    older = make_config(OpenSoraConfig, settings)
    assert (older.sample_sampler, older.sample_steps, older.sample_guidance) == ("iddpm", 100, 7.0)
    solver = make_config(OpenSoraConfig, settings | {"sample_sampler": "dpm-solver"})
    assert (solver.sample_sampler, solver.sample_steps) == ("dpm-solver", 20)
    newer = make_config(OpenSoraConfig, settings | {"model_version": "XL/2"})
    assert (newer.sample_sampler, newer.sample_steps) == ("euler", 30)
    assert older.guided_channels("iddpm") == 3
    assert older.guided_channels("dpm-solver") is None
    names = config(mask_ratios={"mask_no": 0.5, "mask_random": 0.2, "image_head": 0.1}).mask_ratios
    assert names == {"identity": 0.5, "random": 0.2, "image_head": 0.1}
    with pytest.raises(ConfigError, match="mask_random, random name a mask twice"):
        config(mask_ratios={"mask_random": 0.1, "random": 0.2})
    with pytest.raises(ConfigError, match=r"sample_sampler: iddpm is of Open-Sora 1\.0 and 1\.1; write euler"):
        config(sample_sampler="iddpm")
    with pytest.raises(ConfigError, match=r"diffusion_target: epsilon, and the network of .* predicts rectified"):
        config(diffusion_target="epsilon")


# ---------------------------------------------------------------- drawing


def test_a_drawing_ends_where_the_published_one_does(monkeypatch):
    """Three of four channels are guided, and the empty text is the network's own, seen through the prompt's mask."""
    call = next(call for call in SAMPLING["calls"] if call["name"] == "three_channels")
    given, draws, expected = (resolve(call[key], SAMPLING_TENSORS) for key in ("kwargs", "noise_draws", "result"))
    count = len(given["z"])
    steps = iter([draw[:count] for draw in draws])
    monkeypatch.setattr(sampling, "SampleRandom", lambda *_: Draws(noise=steps))
    version = replace(VERSIONS["STDiT-XL/2"], network=SMALL)
    found = draw_clips(
        build.process(OpenSoraSettings(model_version="STDiT-XL/2")), Denoiser(golden_network(), version),
        {"y": given["y"][:, 0], "mask": given["text_mask"]}, tuple(given["z"].shape[1:]), range(count),
        steps=6, guidance=7.0, guidance_channels=3, sampler="iddpm", initial_noise=given["z"],
    )  # fmt: skip
    torch.testing.assert_close(found, expected["final"][:count], rtol=0, atol=call["result_stats"]["suggested_atol"])


def test_frames_join_by_the_share_of_steps():
    """As in the published loop: a frame of share m joins where int(m * steps) steps are left after the one to come."""
    diffusion, steps = discrete_process("linear", learned_variance=True), 6
    shares = torch.tensor([[0.0, 0.4, 0.5, 0.8, 1.0]])
    sampler = GivenFrames(DIT_SAMPLERS["ddim"](diffusion.input_scaler), shares, by_steps=True)
    sampler.start(diffusion.schedule(torch.linspace(0.999, 0.0, steps + 1)))
    noised = [sampler.noised, *sampler._later]
    for step, found in enumerate(noised):
        left = steps - 1 - step
        expected = [(share > 0) and int(share * steps) >= left for share in (0.0, 0.4, 0.5, 0.8, 1.0)]
        assert found.tolist() == [[*expected[:-1], True]], step


@pytest.fixture
def drawn(small_older, tmp_path, monkeypatch):
    """Draws by the mini of 1.1 with arguments; gives the files that were written, by name."""
    weights = random_weights("mini-1.1", tmp_path / "network.safetensors")

    def drawn(*arguments: str, folder: str = "videos") -> dict[str, Path]:
        fixed = [f"generator_checkpoint_path={weights}", "text_encoder_precision=float32", "num_frames=4",
                 "image_size=32", "device=cpu", f"output_path={tmp_path / folder}", "sample_name=a"]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["text_to_video.py", *fixed, *arguments])
        main()
        return {path.name: path for path in sorted((tmp_path / folder).iterdir())}

    return drawn


def test_numbers_of_placements_and_loops_are_frames(drawn, tmp_path, monkeypatch):
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "a.png")
    told = []

    def recorded(*arguments, given_frames, **others):
        told.append(given_frames)
        return draw_clips(*arguments, given_frames=given_frames, **others)

    monkeypatch.setattr("families.open_sora.long_videos.draw_clips", recorded)
    given = json.dumps({"reference_path": str(tmp_path / "a.png"), "mask_strategy": "0;0,0,0,-1,1,0.5"})
    files = drawn("model_version=mini-1.1", "steps=2", "--loop", "3", "--condition-frame-length", "2", "--prompts",
                  f"a box{given}")  # fmt: skip
    with files["a_0000.mp4"].open("rb") as file:
        assert read_header(file).num_frames == 3 * 4 - 2 * 2
    assert [one[1].tolist() for one in told] == [[[0, 1, 1, 0.5]], [[0, 0, 1, 1]], [[0, 0, 1, 1]]]
    first, last = told[0][0][0, :, 0], told[0][0][0, :, -1]
    torch.testing.assert_close(first, last)
    with pytest.raises(UserError, match="condition_frame_length: 4 latent frames are 4 frames, and a clip has 4"):
        drawn("model_version=mini-1.1", "prompts=a", "--loop", "2", "--condition-frame-length", "4", folder="b")


def test_dpm_solver_is_also_spelled_as_on_the_page_of_commands(drawn, tmp_path, monkeypatch):
    told = []

    def recorded(*arguments, **others):
        told.append(others)
        return draw_clips(*arguments, **others)

    monkeypatch.setattr("families.open_sora.long_videos.draw_clips", recorded)
    files = drawn("num_frames=1", "sampler=dmp-solver", "prompts=a box")
    assert "a_0000.png" in files
    assert (told[0]["sampler"], told[0]["steps"], told[0]["guidance"]) == ("dpm-solver", 20, 7.0)
    for given in (["loop=2"], ["reference_path=a.png", "mask_strategy=0"]):
        with pytest.raises(ConfigError, match="sampler: dpm-solver takes no given frames"):
            drawn("sampler=dpm-solver", "prompts=a box", *given, folder="b")
    keys = ["model_version=STDiT2-XL/2", "prompts=a", "generator_checkpoint_path=a.safetensors", "sampler=dmp-solver"]
    _, config = load_task(TEXT_TO_VIDEO, keys)  # the family follows from the keys alone
    assert config.sampler == "dpm-solver"


@pytest.mark.parametrize("file", ["open_sora_1_1", "open_sora_1_2"])
def test_configs_of_the_published_networks_are_drawn_at_any_size(file):
    def size(*keys: str) -> tuple[int, int]:
        given = [str(INFERENCE / f"{file}.yaml"), "prompts=a", "generator_checkpoint_path=a.safetensors", *keys]
        return load_task(TEXT_TO_VIDEO, given)[1].size_px

    assert size() == (240, 426)
    assert size("image_size=[480, 853]") == (480, 853)
    assert size("--resolution", "480p", "--aspect-ratio", "16:9") == (854, 480)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("version", OLDER)
def test_files_are_read_strictly_and_say_which_network_they_are(version, small_older, tmp_path, caplog):
    path = random_weights(version, tmp_path / "network.safetensors")
    state, settings = load_file(path), {"generator_checkpoint_path": path}
    assert family_of(path).name == "open_sora"
    found = build.network(OpenSoraSettings(model_version=version, **settings)).state_dict()
    own = {name for name in POSITIONS if name in state}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], one) for name, one in state.items() if name not in own)
    kind = VERSIONS[version].kind.__name__
    with pytest.raises(UserError, match=f"is an {kind}; write model_version: {version}"):
        build.network(OpenSoraSettings(model_version="mini", **settings))
    torch.save({name: one for name, one in state.items() if name not in own}, tmp_path / "published.pth")
    settings = {"generator_checkpoint_path": tmp_path / "published.pth", "model_version": version, "space_scale": 1.0}
    again = build.network(OpenSoraSettings(**settings)).state_dict()
    assert again.keys() == state.keys()
    if own:  # positions follow from the config; that a file has others is told
        assert not torch.equal(again["pos_embed"], found["pos_embed"])
        save_file(found, path)
        build.network(OpenSoraSettings(**settings | {"generator_checkpoint_path": path}))
        assert "positions of another space_scale than 1.0" in caplog.text
        assert "time_scale" not in caplog.text


@pytest.mark.parametrize(("version", "text_length"), [("STDiT-XL/2", 120), ("STDiT2-XL/2", 200)])
def test_what_stands_beside_the_published_networks(version, text_length):
    with only_shapes():
        frames = autoencoder(OpenSoraSettings(model_version=version))
    assert type(frames) is FrameClips
    assert sum(one.numel() for one in frames.model.parameters()) == 83_653_863
    assert VERSIONS[version].text_length == text_length


def test_the_decoder_that_sees_all_frames(small_older, tmp_path):
    """It has the tensors of the published file, encodes as the other one does, and decodes what the library does."""
    from diffusers import AutoencoderKLTemporalDecoder

    with torch.device("meta"):
        published = AutoencoderKLTemporalDecoder(
            block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2
        ).state_dict()
    expected = load_manifest("vae_temporal_decoder", "opensora")["tensors"]
    assert {name: list(one.shape) for name, one in published.items()} == {
        name: one["shape"] for name, one in expected.items()
    }
    torch.manual_seed(0)
    config = {key: value for key, value in FRAMES.items() if key not in ("norm_num_groups", "up_block_types")}
    library = AutoencoderKLTemporalDecoder(**config | {"block_out_channels": [32] * 4}).eval()
    library.save_pretrained(tmp_path / "decoder")
    own = autoencoder(OpenSoraSettings(model_version="mini-1.1", autoencoder_checkpoint_path=tmp_path / "decoder"))
    assert isinstance(own, TemporallyDecoded)
    clips = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    moments = own.clip_moments(clips, None)
    latents = own.scale.latents(moments, None)
    with torch.no_grad():
        posterior = library.encode(clips[1] / 127.5 - 1).latent_dist
        pixels = library.decode(latents[1].transpose(0, 1) / 0.18215, num_frames=3).sample
        apart = torch.cat([library.decode(one[None] / 0.18215, num_frames=1).sample for one in latents[1].unbind(1)])
    torch.testing.assert_close(moments[1, :4].transpose(0, 1), posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(own.decoded_clips(latents, 3)[1], (pixels / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert (pixels - apart).abs().max() > 1e-3
    assert VERSIONS["mini-1.1"].kind is STDiT2
