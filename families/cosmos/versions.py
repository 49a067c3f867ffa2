"""Constructor numbers of the published networks and of the mini."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from families.common.wan_autoencoder import CONSTRUCTOR as WAN

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
"""Where the weights lie that ship."""
COMMON = {
    "in_channels": 16, "out_channels": 16, "mlp_ratio": 4.0, "text_embed_dim": 1024, "adaln_lora_dim": 256,
    "max_size": [128, 240, 240], "patch_size": [1, 2, 2], "rope_scale": [1.0, 4.0, 4.0], "concat_padding_mask": True,
    "extra_pos_embed_type": None,
}  # fmt: skip
"""Of diffusers' CosmosTransformer3DModel, in all published sizes."""
T5_11B = {
    "vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6, "architectures": ["T5EncoderModel"],
}  # fmt: skip
"""Of transformers' T5EncoderModel: the first T5 of 11 billion parameters, neither v1.1 nor UMT5."""


@dataclass(frozen=True)
class Version:
    """One size of Cosmos-Predict2."""

    transformer: Mapping[str, Any]
    """Constructor numbers of diffusers' CosmosTransformer3DModel."""
    text: Mapping[str, Any]
    """Config of transformers' T5EncoderModel; empty where its file says it."""
    text_length: int = 512
    """L: rows of the text condition. What a text lacks are zeros, which attention does not mask."""
    autoencoder: Mapping[str, Any] | None = None
    """Constructor numbers of diffusers' AutoencoderKLWan; None where an AutoencoderKL ships."""
    autoencoder_file: Path | None = None
    """Where the autoencoder is by default."""
    text_file: Path | None = None
    """Where the text encoder is by default."""


def _published(heads: int, head_size: int, blocks: int) -> Version:
    sizes = {"num_attention_heads": heads, "attention_head_dim": head_size, "num_layers": blocks}
    return Version(COMMON | sizes, T5_11B, autoencoder=WAN)


VERSIONS = {
    "0.6B": _published(20, 64, 20),
    "2B": _published(16, 128, 28),
    "14B": _published(40, 128, 36),
    "mini": Version(
        COMMON | {
            "num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 6, "text_embed_dim": 64,
            "adaln_lora_dim": 32,
            # Its 4 x 4 patches see each other by their distance alone. As published, one of five angles would turn
            # within them; these turn by 1 to 0.16 per patch: theta is 10 instead of 10,000 * 4^(10 / 8).
            "rope_scale": [1.0, 0.004, 0.004],
        },
        text={},
        text_length=32,
        autoencoder_file=MINI / "autoencoder.safetensors",
        text_file=MINI / "t5.safetensors",
    ),
}  # fmt: skip
"""By `model_version`."""


def version_of(config: Mapping[str, Any]) -> str | None:
    """Which published size constructor numbers are of; None for another one."""
    keys = ("num_attention_heads", "attention_head_dim", "num_layers")
    return next(
        (name for name, version in VERSIONS.items() if all(config.get(k) == version.transformer[k] for k in keys)),
        None,
    )
