"""The keys that every training script understands, whatever it trains: a class for each section of `--help`.

The sentence under a key is its documentation: `--help` and docs/configuration.md are made from it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from warpcore.arguments import numbers_in
from warpcore.data.buckets import parse_ratio, parse_size
from warpcore.epochs import Updates
from warpcore.from_scratch import Start
from warpcore.idle_keys import Need
from warpcore.keys import MAX_NAME, S3Url, local_paths, parts_of
from warpcore.lr_schedules import ENDING, SCHEDULES
from warpcore.mistakes import MAX_INTEGER
from warpcore.parameter_groups import ParameterGroup
from warpcore.patterns import valid_pattern

MAX_MICRO_BATCH = 100_000
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
FileName = Annotated[str, Path]
"""Text that is, or begins with, the name of a file, or is another name."""
RegularExpression = Annotated[str, AfterValidator(valid_pattern)]
ByteValue = Annotated[int, Field(ge=0, le=255)]
BatchSize = Annotated[int, Field(gt=0, le=10_000_000)]
MicroBatchSize = Annotated[int, Field(gt=0, le=MAX_MICRO_BATCH)]
Steps = Annotated[int, Field(gt=0, le=10_000)]
"""Steps of a sampler, for which tables are made."""
SidePx = Annotated[int, Field(gt=0, le=32_768)]
Gigabytes = Annotated[float, Field(gt=0, le=1e9)]
_GIB = re.compile(r"\s*(\d+(\.\d+)?)\s*(gi?b?)?\s*", re.IGNORECASE | re.ASCII)


def _in_gib(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if (found := _GIB.fullmatch(value)) is None:
        raise ValueError("the memory of a GPU is needed in GB, such as 12GB, 11.5GB or 0.5GB")
    return float(found[1])


Memory = Annotated[Gigabytes, BeforeValidator(_in_gib)]
"""In GiB, as GPUs are sold: `12GB`, `12 GiB` or 12."""
MAX_ENTRIES = 1000
"""Of lists whose entries are compared with each other, or with every parameter or row."""


class Settings(BaseModel):
    """What every configuration shares: frozen, no unknown keys, numbers are numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    unused: ClassVar[frozenset[str]] = frozenset()
    """Keys of a shared base class that a script has no use for."""
    needs: ClassVar[Mapping[str, Need]] = {}
    """Keys of this class that have no effect without others, which is said where they are given. Those that only a
    mistake can bring together are refused by a validator instead."""

    @model_validator(mode="before")
    @classmethod
    def _with_home_folders(cls, values: Any) -> Any:
        return local_paths(cls, values) if isinstance(values, dict) else values

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts True as 1, so `batch_size: yes` would train with a batch of one.
        kinds, ones = parts_of(cls.model_fields[info.field_name].annotation), [value]
        if isinstance(value, list):
            kinds, ones = set().union(*(parts_of(part) for kind in kinds for part in get_args(kind))), value
        if any(isinstance(one, bool) for one in ones) and bool not in kinds and kinds & {int, float}:
            raise ValueError("a number is needed, not true or false")
        return numbers_in(cls.model_fields[info.field_name].annotation, value)

    @field_validator("*")
    @classmethod
    def _integers_have_64_bits(cls, value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, int) and abs(one) > MAX_INTEGER:  # written as text, or as 1e300
                raise ValueError(f"integers go from {-MAX_INTEGER} to {MAX_INTEGER}")
        return value


def may_be_far(*sources: Any) -> bool:
    """Whether data are on S3, or a list of sources says where."""
    return any(place in str(sources) for place in ("s3://", ".yml", ".yaml"))


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise ValueError("write a name of letters, digits, spaces and _ . - that begins with a letter, a digit or _")
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"a folder's name has at most {MAX_NAME} bytes")
    return name


class RunKeys(Settings):
    """The run."""

    needs = {
        "scratch_path": Need("checkpoint_path: s3://...", lambda config: isinstance(config.checkpoint_path, str)),
    }

    experiment_id: Annotated[str, AfterValidator(_folder_name)]
    """Name of the run: everything is written under `checkpoint_path/experiment_id`, and a second start resumes it."""
    load: Path | None = None
    """The folder of another run that a new one goes on from: weights, averages, optimizer, position in the data and
    number of updates of its newest whole checkpoint. It stays as it is, and later starts need it no more."""
    checkpoint_path: S3Url | Path
    """Folder for checkpoints, weights, metrics and samples, or s3://bucket/prefix."""
    scratch_path: Path | None = None
    """With checkpoints on S3, a folder on each machine's disk where files wait to be sent; by default in ~/.cache."""
    output_path: Path | None = None
    """Folder for sample pictures, in a folder with the run's name; by default `samples` inside the run's folder."""
    seed: int = 0
    """All randomness of the run follows from this number."""
    updates: Updates
    """How many optimizer steps the whole run makes. This key and others that count updates (`warmup_updates`,
    `decay_updates`, `save_every`, `backup_every`, `export_every`) take epochs too: `2e` is as many as draw every row
    twice, rounded down, and `0.5e` half of the rows."""
    save_every: Updates = 1000
    """A checkpoint, sample pictures and the validation loss come after every this many updates."""
    backup_every: Updates | None = None
    """A checkpoint, and a copy of the weights that is never deleted, after every this many updates."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the exported weights files, averages included; by default that in which the weights are trained.
    What a run resumes from is always exact."""
    export_every: Updates | None = None
    """Export weights files only with the checkpoints of updates that are multiples of this, with backups and with the
    last update; between them, and where a signal stops the run, the files stay those of the export before. By default
    every checkpoint exports them."""
    export_file_gb: PositiveFloat = 20.0
    """The most GB of an exported weights file. A larger network is gathered and written tensor by tensor, to several
    files with an index (`generator.safetensors.index.json`), as diffusers and transformers read them."""
    keep_last: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    on_data_change: Literal["error", "new_epoch"] = "error"
    """What resuming does when the data or its settings changed: refuse, or start a fresh epoch with the weights."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute; `auto` takes CUDA, then MPS, then the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the computation (weights being trained stay float32); by default bfloat16 on CUDA, else float32.
    float16, for GPUs without bfloat16, scales the loss (`loss_scale` in the metrics), which skips an update now and
    then."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """What trained weights are kept in: bfloat16, which every optimizer steps with stochastic rounding, takes half the
    memory for them and their gradients."""
    fp8: bool = False
    """Multiply the linear layers of trained blocks in fp8 (needs torchao and an Ada, Hopper or later GPU)."""
    compile: bool | Literal["blocks", "graphs"] = False
    """Compile the blocks of the networks (`true` or `blocks`): a minute or more at the start, then faster updates with
    less memory. `graphs` also records what trained blocks compute as CUDA graphs, for small networks, whose kernels
    take less time than launching them: on one NVIDIA GPU, without offloading, and with memory for a graph of each
    bucket. Not yet tried on a GPU."""
    allow_tf32: bool = True
    """Let CUDA multiply float32 matrices in TF32."""
    use_fsdp: bool = False
    """With several processes, shard weights, gradients and optimizer state over them instead of replicating."""
    fsdp_shards: PositiveInt | None = None
    """With `use_fsdp`, how many neighbouring processes share one copy (8: one per 8 GPUs); by default all."""
    fsdp_cpu_offload: bool = False
    """With `use_fsdp`, on one process too: keep weights, gradients and optimizer state in the CPU's memory, where the
    optimizer steps; blocks come to the device as they are used."""
    offload: list[Literal["encoders", "activations"]] = []
    """What waits in the CPU's memory while it is not used: `encoders`, the frozen networks; `activations`, what
    activation checkpointing keeps."""
    fit: Memory | None = None
    """`12GB`: at the start, count on shapes what the run needs, and where a GPU of this size has less, write those of
    `ema_device`, `offload`, `activation_checkpointing` and `swap_blocks` that are enough and cost least. Updates stay
    the same, but for rounding. By default the config counts as it stands."""
    processes: Annotated[int, Field(gt=0, le=1024)] | Literal["all"] | None = None
    """Start that many processes on this machine (`all`: one for each GPU), without torchrun. By default, as many as
    torchrun or Slurm has started, or one. A run goes on with any number, however it is started."""
    process_timeout_seconds: Annotated[float, Field(gt=0, le=1e8)] = 1800
    """A process that waits longer than this for the others (one hangs, or a machine is gone) ends with an error."""
    activation_checkpointing: Literal[0, 1, 2, 3] = 0
    """0 keeps all activations, 3 recomputes every block in the backward pass: slower, and the least memory."""
    num_threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    """CPU threads of the main process; by default PyTorch's choice."""


class OptimisationKeys(Settings):
    """Optimisation."""

    needs = {
        "min_lr_ratio": Need(f"lr_schedule: {', '.join(ENDING)}", lambda config: config.lr_schedule in ENDING),
        "betas": Need("an optimizer other than adafactor", lambda config: config.optimizer != "adafactor"),
        "eps": Need(
            "an optimizer other than adafactor, lion and came",
            lambda config: config.optimizer not in ("adafactor", "lion", "came"),
        ),
        "muon_convolutions": Need("optimizer: muon", lambda config: config.optimizer == "muon"),
    }

    lr: PositiveFloat = 1e-4
    """Learning rate after warm-up."""
    lr_schedule: Literal[SCHEDULES] = "constant"
    """Course of the learning rate between warm-up and the last update: `rex` stays high for longer than `linear`, and
    falls at the end (arXiv:2107.04197). `polynomial` is `linear` to the `lr_power`. `warmup_stable_decay` stays at
    `lr`, and falls in the last `decay_updates` (arXiv:2404.06395). `inverse_sqrt` falls with the root of the updates,
    without an end: it is half of `lr` at four times the warm-up, or at 30,000 updates without one (arXiv:1706.03762).
    With `lambdalinear`, `lr` times a factor that goes up and down in cycles, each with an entry in the five lists
    below."""
    min_lr_ratio: Share = 0.0
    """Where `cosine`, `linear`, `rex`, `polynomial` and `warmup_stable_decay` end, as a fraction of `lr`."""
    num_cycles: Annotated[int, Field(gt=0, le=1_000_000)] = 1
    """How many times `cosine`, `linear`, `rex` and `polynomial` go down from `lr`, each time in the same number of
    updates."""
    lr_power: Annotated[float, Field(gt=0, le=100)] = 1.0
    """With `polynomial`: 1 is `linear`, more falls early."""
    decay_updates: Updates | None = None
    """With `warmup_stable_decay`: how many of the last updates the learning rate falls in; by default a tenth of
    `updates`."""
    warmup_updates: Annotated[Updates, BeforeValidator(lambda value: 1 if value in (0, "0") else value)] = 1
    """The learning rate rises linearly over this many updates. The first one learns already, so 1 (or 0) is none."""
    warm_up_steps: list[NonNegativeInt] = Field([1000], max_length=MAX_ENTRIES)
    """With `lambdalinear`: updates at the begin of each cycle in which the factor rises; fewer than the cycle has."""
    cycle_lengths: list[PositiveInt] = Field([10_000_000_000_000], max_length=MAX_ENTRIES)
    """With `lambdalinear`: updates of each cycle; `updates` may not be more than all of them."""
    f_start: list[NonNegativeFloat] = Field([1e-6], max_length=MAX_ENTRIES)
    """With `lambdalinear`: the factor of the first update of each cycle, if it has a warm-up."""
    f_max: list[NonNegativeFloat] = Field([1.0], max_length=MAX_ENTRIES)
    """With `lambdalinear`: the factor after the warm-up of each cycle."""
    f_min: list[NonNegativeFloat] = Field([1.0], max_length=MAX_ENTRIES)
    """With `lambdalinear`: the factor at the end of each cycle."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "schedulefree", "muon", "lion", "prodigy", "came"] = "adamw"
    """Optimizer: AdamW (fused), 8-bit AdamW (needs bitsandbytes), Adafactor, schedule-free AdamW, Muon (for the
    weights of linear layers; embeddings, tables and all else have AdamW), Lion (arXiv:2302.06675; with a third to a
    tenth of AdamW's `lr`, and usually `betas: [0.9, 0.99]`), Prodigy (arXiv:2306.06101; finds the learning rate
    itself, so write `lr: 1`, and usually `betas: [0.9, 0.99]`), or CAME (arXiv:2307.02047; half of AdamW's state;
    with a warm-up, and usually `betas: [0.9, 0.999]`)."""
    muon_convolutions: bool = False
    """With `muon`: the kernels of convolutions have it too, as matrices of (outputs, inputs x positions)."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of matrices and kernels; vectors (norms, biases) are not decayed."""
    parameter_groups: list[ParameterGroup] = Field([], max_length=MAX_ENTRIES)
    """Other settings for parameters by name, or frozen ones, e.g. `[{pattern: '*.norm*', lr_scale: 0.1, weight_decay:
    0}, {pattern: 'down_blocks.*', frozen: true}]`: shell patterns for whole names, the first that matches counts."""
    start_from_scratch: list[Start] = Field([], max_length=MAX_ENTRIES)
    """Parameters that start with new values in place of those of their file, once, before the first update, e.g.
    `[{pattern: 'conv_in.*'}, {pattern: '*.attn2.to_out.*', method: zeros}]`: patterns as above. `method` is `default`
    (as the network begins without a file), `xavier_uniform` or `zeros`."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """Decay of the two moments of Adam's family."""
    eps: PositiveFloat = 1e-7
    """Term added to the denominator in Adam's family."""
    clip_grad_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    clip_tensor_norm: PositiveFloat | None = None
    """In place of `clip_grad_norm`: the gradient of each tensor is scaled down alone, to this times the root of its
    share of all trained numbers, so that the norm of all is at most this."""
    fused_backward: bool = False
    """Step each tensor in the backward pass, as soon as its gradient is there, which is then freed: the gradients of
    one or two tensors are in memory in place of all. Updates stay the same. For one process and one micro-batch per
    update, with `clip_grad_norm: null`."""
    gradient_topk: Annotated[float, Field(gt=0, lt=1)] | None = None
    """After each micro-batch, of the gradients of the matrices and kernels that `gradient_topk_pattern` names, keep
    this share, the largest in size (one threshold for all of them), and set the others to zero. On one process alone,
    as with more the threshold would depend on their number."""
    gradient_topk_pattern: RegularExpression = ""
    """With `gradient_topk`: a regular expression that finds the names of those weights, e.g.
    `attn1|attn2|transformer_blocks|mid_block`; by default all."""
    max_nonfinite_updates: PositiveInt = 10
    """The run stops after this many updates in a row whose gradient is not finite; each one is skipped."""
    batch_size: BatchSize
    """Samples per update, over all processes and accumulation steps."""
    micro_batch_size: MicroBatchSize | None = None
    """Samples per forward pass; by default `batch_size / (processes x grad_accum_steps)`."""
    grad_accum_steps: BatchSize | None = None
    """Forward passes per update and process; follows from the two sizes when both are given."""


class DataKeys(Settings):
    """Data."""

    needs = {
        "bucketeer_random_ratio": Need.of("multi_aspect_ratio"),
        "cache_path": Need("data on s3://", lambda config: may_be_far(config.webdataset_path, config.validation_path)),
        "cache_size_gb": Need.of("cache_path"),
    }

    webdataset_path: str | list[str | dict[str, Any]]
    """Training data: a tar, folder, glob, brace range, URL or .yml, or a list of them ({path: ..., weight: 2})."""
    validation_path: str | list[str | dict[str, Any]] | None = None
    """Held-out data, written like `webdataset_path`."""
    validation_samples: NonNegativeInt = 0
    """Without `validation_path`: how many training samples (chosen by a hash of their key) are held out instead."""
    dataset_filters: list[tuple[str | list[str], str]] = Field([], max_length=MAX_ENTRIES)
    """Pairs of column(s) and expression, e.g. `[['width', 'height'], 'lambda w, h: w*h >= 589824']`: all must hold."""
    columns: list[str] = Field([], max_length=MAX_ENTRIES)
    """Index columns that arrive in each batch as tensors for the use case, e.g. `[aesthetic_score, fps]`: numbers and
    truth values of the .json, `width`, `height`. Every sample has to have them."""
    captions_getter: tuple[str | list[str], str] = ("txt", "identity")
    """Member(s) and expression that give the caption, e.g. `['json', 'lambda j: j["caption"]']`. Several may be index
    columns too, `json.FIELD`, `width`, `height` or `key`: `[['txt', 'json.style'], 'lambda t, s: t + ", " + s']`. Each
    draw of a sample has one caption of a list: `['txt', 'lambda t: t.splitlines()']`, `['json', 'lambda j:
    j["captions"]']`, `[['txt', 'short.txt'], 'lambda t, s: [t, s]']`."""
    image_size: SidePx | tuple[SidePx, SidePx] = 1024
    """Side of a square picture in pixels; other aspect ratios get the same area. Or the one size of all pictures, as
    width x height: `512x768`."""
    multi_aspect_ratio: list[float] | None = Field(None, max_length=MAX_ENTRIES)
    """Width to height ratios of the buckets, e.g. `[1/1, 3/4, 16/9]`; each inverse is added. Without it: squares."""
    bucketeer_random_ratio: Share = 0.0
    """Share of the pictures that go to a random bucket."""
    crop_mode: Literal["center", "random", "smart"] = "random"
    """What is kept of a picture that is longer than its bucket: the middle, a random part, the most detailed part."""
    background: tuple[ByteValue, ByteValue, ByteValue] = (255, 255, 255)
    """Colour (0-255) behind transparent pictures."""
    max_picture_pixels: PositiveInt = 200_000_000
    """Pictures with more pixels are bad samples (decompression bombs), and so are those that would take over 1 GiB of
    memory to decode, or over 5 bytes for each of these pixels if that's more."""
    max_bad_samples: PositiveInt = 100
    """The run stops after this many unreadable samples in a row."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 4
    """Processes that read and decode pictures, per training process; 0 does it in the main process."""
    lanes: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """Independent streams of shards; by default it follows from the size of the data set."""
    shard_group_rows: PositiveInt | None = None
    """Rows shuffled together, per lane; by default as many as fit in modest memory."""
    cache_path: Path | None = None
    """Folder on each machine's disk that keeps what was read from s3://; without it, every epoch reads all again."""
    cache_size_gb: Gigabytes = 100
    """What that folder may hold, in units of 10^9 bytes."""

    @field_validator("webdataset_path", "validation_path")
    @classmethod
    def _some_data(cls, value: Any) -> Any:
        if value in ([], ""):
            raise ValueError("it names no data: write a tar, a folder, a glob, a URL, or a list of them")
        return value

    @field_validator("image_size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_size(value)

    @field_validator("multi_aspect_ratio", mode="before")
    @classmethod
    def _ratios(cls, value: Any) -> Any:
        return [parse_ratio(ratio) for ratio in value] if isinstance(value, list) else value


class ReportKeys(Settings):
    """What is reported."""

    needs = {"wandb_entity": Need.of("wandb_project")}

    log_every: PositiveInt = 10
    """Metrics are fetched from the device and written after every this many updates."""
    grad_norm_groups: dict[str, RegularExpression] = Field({}, max_length=MAX_ENTRIES)
    """Extra gradient norms: a name and a regular expression on parameter names (`in_proj_weight\\.(q|k)` works)."""
    grad_mean_groups: dict[str, RegularExpression] = Field({}, max_length=MAX_ENTRIES)
    """For each name, the sum over the weights that a regular expression finds of the mean size of their gradients,
    before clipping, as `grad_mean/NAME` in the metrics: `{qk_grads_av: '\\.to_[qk]\\.weight$'}`."""
    grad_mean_per_block: bool = False
    """The same for each block of the networks too, as `grad_mean/NAME/BLOCK`."""
    weight_norm: bool = False
    """With each checkpoint, the Euclidean norm of the weights that are trained, as `weight_norm/NETWORK`."""
    wandb_project: str | None = None
    """Weights & Biases project; without it nothing is sent there."""
    wandb_entity: str | None = None
    """Weights & Biases user or team."""
    tensorboard: bool = False
    """Write TensorBoard files into the run's folder."""
    profile: bool = False
    """Write a trace of a few updates (for chrome://tracing or Perfetto), and on CUDA a memory snapshot, into `profile`
    in the run's folder."""
