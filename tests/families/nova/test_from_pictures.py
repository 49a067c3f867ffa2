"""A training of clips begins with weights of pictures; what these lack is as in a new network, all else is strict."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from families.common.library_files import CONFIG_KEY
from families.common.weight_files import TARGET_KEY
from families.nova import build
from families.nova.config import NovaSettings
from modules.nova import NOVATransformer
from tests.families.nova.test_bad_input import training
from warpcore.errors import UserError


def clips(path: Path, **keys) -> NovaSettings:
    return NovaSettings(**{"model_version": "mini-video", "generator_checkpoint_path": path} | keys)


def saved(path: Path, says: bool = True, without: str = "-", **keys) -> dict[str, Tensor]:
    numbers = build.network_numbers(NovaSettings(**{"model_version": "mini"} | keys))
    state = {name: one for name, one in NOVATransformer(**numbers).state_dict().items() if without not in name}
    save_file(state, path, {CONFIG_KEY: json.dumps(numbers)} if says else None)
    return state


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_motion_and_mixer_start_from_scratch(says, rank, tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    state = saved(path, says)
    torch.manual_seed(5)
    with caplog.at_level(logging.WARNING):
        made = build.network(clips(path, video_mixer_rank=rank), from_pictures=True)
    (told,) = caplog.messages
    assert f"{path} is of pictures and has no motion_embed.flow_proj.0, " in told
    assert ("video_encoder.mixer.proj" in told) == bool(rank)
    assert made.video_pos_embed.frames == 5
    found = made.state_dict()
    assert all(torch.equal(found[name], one) for name, one in state.items())
    new = found.keys() - state.keys()
    assert {name.split(".")[0] for name in new} == {"motion_embed", *(["video_encoder"] if rank else [])}
    for name in new:  # as PyTorch's linear layers begin: uniform up to 1 / sqrt(columns)
        weight = found[name.rpartition(".")[0] + ".weight"]
        bound = weight.shape[1] ** -0.5
        assert 0.5 * bound < found[name].abs().max() <= bound
    torch.manual_seed(5)
    again = build.network(clips(path, video_mixer_rank=rank), from_pictures=True).state_dict()
    assert all(torch.equal(again[name], one) for name, one in found.items())


def test_a_training_begins_with_a_run_of_pictures(tmp_path):
    """Whose file says its version and mixer in metadata, too."""
    numbers = build.network_numbers(NovaSettings(model_version="mini"))
    about = {"model_version": "mini", "video_mixer_rank": "0", "rotary_pos_embed": "False", "family": "nova"}
    save_file(NOVATransformer(**numbers).state_dict(), tmp_path / "a.safetensors",
              about | {CONFIG_KEY: json.dumps(numbers), TARGET_KEY: "rectified_flows"})  # fmt: skip
    given = {"generator_checkpoint_path": str(tmp_path / "a.safetensors"), "video_mixer_rank": 3}
    run = training(model_version="mini-video", num_frames=5, image_size=64, **given)
    run.begin(None)
    assert run.build()["generator"].motion_embed is not None
    with pytest.raises(UserError, match="says that its network predicts rectified_flows"):
        training(model_version="mini-video", num_frames=5, image_size=64, diffusion_target="epsilon", **given).begin(
            None
        )


@pytest.mark.parametrize(
    ("of_file", "keys", "message"),
    [
        ({"without": "image_encoder.norm.bias"}, {}, r"missing in the file \(9 differences\)"),
        (
            {"model_version": "mini-video", "without": "flow_proj"},
            {},
            "flow_proj.0.weight is missing in the file|differ",
        ),
        (
            {"model_version": "mini-video"},
            {"video_mixer_rank": 3},
            "has video_mixer_rank: 0, and|have no mixer of frames",
        ),
        ({"video_mixer_rank": 2}, {}, "has video_mixer_rank: 2, and|a mixer of rank 2: write video_mixer_rank: 2"),
        ({"rotary_pos_embed": True}, {}, "has rotary_pos_embed: true, and|missing in the file"),
    ],
)
@pytest.mark.parametrize("says", [True, False])
def test_all_else_is_strict(of_file, keys, message, says, tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, says, **of_file)
    with pytest.raises(UserError, match=message):
        build.network(clips(path, **keys), from_pictures=True)


def test_drawing_takes_no_weights_of_pictures_for_clips(tmp_path):
    for says, message in ((True, "is NOVA's mini; write model_version: mini"), (False, "missing in the file")):
        saved(tmp_path / "a.safetensors", says)
        with pytest.raises(UserError, match=message):
            build.network(clips(tmp_path / "a.safetensors"))


def test_what_clips_lack_of_pictures_is_no_such_thing(tmp_path):
    saved(tmp_path / "a.safetensors", says=False, model_version="mini-video")
    with pytest.raises(UserError, match=r"motion_embed.* is only in the file"):
        build.network(clips(tmp_path / "a.safetensors", model_version="mini"), from_pictures=True)
