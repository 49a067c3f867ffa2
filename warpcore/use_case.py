"""A use case: the hooks that a script overrides, and the networks, optimizers and losses that follow from them.

`warpcore.core.WarpCore` trains it; `warpcore.rehearsal` makes updates of it without data.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from warpcore import compute, gradients, optim, validation
from warpcore.config import Config
from warpcore.data.joined import FurtherTars
from warpcore.data.needs import DataNeeds
from warpcore.data.reader import Batch
from warpcore.errors import UserError
from warpcore.from_scratch import fresh_layers, start_layers
from warpcore.fused_backward import FusedBackward, check_one_process
from warpcore.loading import deferring
from warpcore.loss_scale import LossScale
from warpcore.networks import block_names, check_networks, convolution_weights, linear_weights, split_sequence
from warpcore.offload import OnDemand
from warpcore.parameter_groups import freeze, optimizer_groups
from warpcore.peers import explained
from warpcore.placement import Placement, averages
from warpcore.post_hoc_ema import post_hoc_averages
from warpcore.processes import choose_dtype, start_processes, stop_processes
from warpcore.random import SampleRandom
from warpcore.results import Losses, Sampled
from warpcore.resuming import Origin
from warpcore.state import TrainedState
from warpcore.statistics import UpdateStatistics

MATRICES = "matrices"
"""Of what a run keeps: which matrices Muon takes. Those of earlier versions took all of two dimensions."""


class UseCase:
    """A script's networks and what they learn. Scripts subclass `warpcore.core.WarpCore`, which has the hooks here."""

    Config: ClassVar[type[Config]] = Config
    trainable: ClassVar[dict[str, dict]] = {"generator": {}}
    """Names of the networks to train, each with settings of its optimizer group (`lr_scale`). Parameters of them that
    `build` freezes are neither trained, averaged nor kept in checkpoints, which makes adapters cheap."""
    needs_images: ClassVar[bool] = True
    """Whether the loader reads pictures."""
    takes_videos: ClassVar[bool] = False
    """Whether samples may be videos, of which clips are drawn. Otherwise rows of videos are left out, and counted."""
    needs_captions: ClassVar[bool] = True
    """Whether every sample needs a caption; without them `Batch.captions` are empty."""
    needs_geometry: ClassVar[bool] = False
    """Whether `Batch.geometry` is wanted: true size, size before the crop, and place of the crop of every picture."""
    cannot_draw: str | None = None
    """Why no sample pictures are drawn, which is told once; set by `build` where a network for them is missing."""
    draws_samples: bool = True
    """Whether `sample` is given samples to draw pictures for, of validation or else of the training data."""
    validation_levels: int = 0
    """At how many noise levels validation samples are looked at: those that `loss` finds in `SampleRandom.level`, in
    place of drawn ones. 0: as in training."""
    bucket_factor: int = 1
    """Sides of training pictures are multiples of this many pixels."""
    fused: FusedBackward | None = None
    """What steps the parameters in the backward pass, with `fused_backward`."""
    origin: Origin | None = None
    """The checkpoint that this start goes on from, known when `build` is called."""

    # ------------------------------------------------------------------ hooks

    def build(self) -> dict[str, nn.Module]:
        """All networks by name, with their weights. Those in `trainable` are trained, the others frozen.

        The weights of large ones are only noted here (`warpcore.loading`), and read once they are placed."""
        raise NotImplementedError

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Settle what a run keeps from its first update on, before its networks are built; may replace `config`.

        saved: values of the checkpoint that is resumed: `about` (its `file_metadata`) and `kept` (its `self.kept`).
        None in a new run.
        """

    def take_over(self) -> None:
        """In a new run: take over what another program's run has beside the weights that this one starts from, its
        averages (`self.averages`) and the number of its updates (`self.update`)."""

    def swapped_blocks(self) -> Mapping[str, int]:
        """How many blocks with frozen weights wait in the CPU's memory until they compute, by network: see
        `warpcore.block_swap`."""
        return {}

    def encode(self, batch: Batch, random: SampleRandom) -> Any:
        """Turn a batch into what `loss` needs, without gradients."""
        return batch

    def loss(self, inputs: Any, random: SampleRandom) -> Losses:
        """The loss of each sample of a micro-batch."""
        raise NotImplementedError

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        """Pictures to look at, the same ones each time. `held_out` are validation samples or, without any, a few of
        the training data; None where `draws_samples` is false."""
        return []

    def data_to_draw(self) -> Any:
        """Where the training samples for `sample` come from, written like `webdataset_path`."""
        return self.config.webdataset_path

    def drawn_captions(self, batch: Batch) -> list[str | None]:
        """The captions of a batch as an update takes them; None where one is left out. For people to look at."""
        return list(batch.captions)

    def shown_beside(self, batch: Batch) -> dict[str, Tensor]:
        """What the loader made of the pictures of a batch, by name, to look at: (B, 3, H, W) in [0, 1]."""
        return {}

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        """Change state that is not a gradient, given the statistics of all samples of an update in global order."""

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """State dicts to export as weights files, by file name."""
        return {name: self.networks[name].state_dict() for name in self.trainable}

    def file_metadata(self) -> dict[str, str]:
        """What those files should say about themselves, beside their update."""
        return {}

    def next_commands(self) -> list[str]:
        """What people may want next, each with its command: told when the last update is made."""
        return []

    def extra_fields(self) -> dict:
        """Further members of each sample to read: name -> `warpcore.data.fields` field."""
        return {}

    def further_tars(self) -> Mapping[str, Sequence[FurtherTars]]:
        """Tars with further members of the samples, beside those that the keys `webdataset_path` and
        `validation_path` name."""
        return {}

    def geometry_remedy(self) -> str:
        """What to do where features that are stored in place of pictures do not say how these were cropped
        (`needs_geometry`): the end of an error message."""
        return "store the features of its pictures again"

    def index_columns(self) -> list[str]:
        """Columns of the index for `Batch.columns`; every sample has to have them."""
        return self.config.columns

    def computed_in_workers(self) -> dict:
        """What the loader's workers compute of each batch, for `Batch.extra`: name -> picklable function of it."""
        return {}

    # ------------------------------------------------------------------ what follows from them

    def __init__(self, config: Config):
        self.config = config
        self.update = 0
        with explained():
            self.processes = start_processes(
                config.device,
                config.use_fsdp,
                config.fsdp_shards,
                config.process_timeout_seconds,
                config.fsdp_cpu_offload,
                config.processes_per_sample,
            )
        self.device = self.processes.device
        check_one_process(config.fused_backward, self.processes.count)
        compute.check_graphs(config, self.device, sharded=self.processes.mesh is not None)
        self.dtype = choose_dtype(config.precision, self.device)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self.bookkeeping: dict[str, Any] = {}  # further things with a state_dict of tensors
        self.kept: dict[str, Any] = {}  # JSON values that a run keeps when it is resumed, see `begin`

    def make_networks(self, saved: Mapping[str, Any] | None = None) -> None:
        """Networks, optimizers and averages, as they are before the first update; `saved` as in `begin`."""
        self.begin(saved)
        config = self.config
        torch.manual_seed(config.seed)
        with deferring():
            self.networks = self.build()
        check_networks(self.networks, self.trainable, config)
        if self.processes.sequence_group is not None:
            split_sequence(self.networks, self.processes.sequence_group)
        trained = {name: self.networks[name] for name in self.trainable}
        freeze(trained, config.parameter_groups)
        self.fresh_layers = fresh_layers(trained, config.start_from_scratch if saved is None else ())
        self.statistics = UpdateStatistics(self.processes, trained)
        placement = Placement(config, self.device, self.dtype, self.processes.mesh)
        self.on_demand: dict[str, OnDemand] = {}
        self.block_swaps, swapped = placement.block_swaps, self.swapped_blocks()
        for name, network in self.networks.items():
            if name in trained:
                placement.place_trained(name, network, swapped.get(name, 0))
            elif (on_demand := placement.place_frozen(name, network, swapped.get(name, 0))) is not None:
                self.on_demand[name] = on_demand
        parameters = {f"{name}.{p}": tensor for name in trained for p, tensor in trained[name].named_parameters()}
        self.parameters = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        start_layers(self.fresh_layers, self.parameters, config.seed)
        self.gradient_groups = gradients.gradient_groups(self.parameters.items(), config.grad_norm_groups)
        inner = block_names(trained) if config.grad_mean_per_block else ()
        self.mean_groups = gradients.mean_groups(self.parameters, config.grad_mean_groups, inner)
        self.thinned = self._thinned()
        if saved is None:
            self.kept[MATRICES] = "of linear layers"
        self.muon_takes_tables = MATRICES not in (self.kept if saved is None else saved.get("kept", {}))
        self.optimizers = optim.build_optimizers(
            config.optimizer, optimizer_groups(self.trainable, self.parameters, config.parameter_groups),
            lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps,
            linear=None if self.muon_takes_tables else linear_weights(trained),
            convolutions=convolution_weights(trained) if config.muon_convolutions else (),
        )  # fmt: skip
        optim.train_mode(self.optimizers)
        if config.fused_backward:
            reported = self.gradient_groups, self.mean_groups
            self.fused = FusedBackward(self.optimizers, self.parameters, *reported, config.clip_tensor_norm)
        self.loss_scale = LossScale(self.device, enabled=self.dtype == torch.float16)
        self.averages = averages(trained, config)
        post_hoc = post_hoc_averages(trained, config)
        self.state = TrainedState(trained, self.averages, self.optimizers, self.bookkeeping, post_hoc)
        if saved is None:
            self.take_over()

    def _thinned(self) -> list[Tensor]:
        """The weights of whose gradients only the largest are kept."""
        config = self.config
        if config.gradient_topk is None:
            return []
        if self.processes.mesh is not None:
            raise UserError(
                "gradient_topk: one threshold for the gradients of each micro-batch needs them whole in one process, "
                "without fsdp_cpu_offload: train with one, or remove the key"
            )
        matrices = {name: parameter for name, parameter in self.parameters.items() if parameter.dim() >= 2}
        return list(gradients.named_by(matrices, config.gradient_topk_pattern, "gradient_topk_pattern").values())

    def clipped_gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Clip the gradients; their norm before that, and what is reported of groups of them (`gradients.clipped`)."""
        limits = self.config.clip_grad_norm, self.config.clip_tensor_norm
        return gradients.clipped(list(self.parameters.values()), *limits, self.gradient_groups, self.mean_groups)

    def validation_losses(self, batch: Batch) -> dict[str, Tensor]:
        """What the validation tells of the samples of a batch: numbers (B,) by name."""
        if not (levels := validation.levels(self.validation_levels)):
            return validation.drawn(self.forward(batch))
        with self.autocast():
            inputs, random = self.encoded(batch)
            return validation.at_levels({level: self.loss(inputs, random.at(level)) for level in levels}, batch.size)

    def data_needs(self) -> DataNeeds:
        """What the hooks above say of the data."""
        return DataNeeds(
            bucket_factor=self.bucket_factor,
            images=self.needs_images,
            videos=self.takes_videos,
            captions=self.needs_captions,
            geometry=self.needs_geometry,
            extra=self.extra_fields(),
            computed=self.computed_in_workers(),
            columns=self.index_columns(),
            further=self.further_tars(),
            validation_by_key=self.validation_levels > 0,
            geometry_remedy=self.geometry_remedy(),
        )

    def autocast(self) -> AbstractContextManager:
        """Computes in the configured dtype."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def encoded(self, batch: Batch) -> tuple[Any, SampleRandom]:
        """What `loss` takes of a batch, with the random numbers of its samples. To be called inside `autocast`."""
        random = SampleRandom(batch.seeds, self.device)
        with torch.no_grad():
            return self.encode(batch, random), random

    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch, as in an update."""
        with self.autocast():
            return self.loss(*self.encoded(batch))

    def close(self) -> None:
        """Let go of networks and processes; safe at any moment."""
        if self.fused is not None:
            self.fused.close()
        self.networks = self.optimizers = self.averages = self.parameters = self.state = None
        self.on_demand = self.block_swaps = self.fused = None
        stop_processes()
