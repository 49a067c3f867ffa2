"""What the JSON of a checkpoint has to look like: anyone may have written it, and its hash."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from warpcore.places import CheckpointError

Count = Annotated[int, Field(ge=0, lt=2**63)]
DrawNumbers = Annotated[list[Count], Field(min_length=4, max_length=4)]
"""Of `warpcore.data.lanes.Draw`."""
BucketName = Annotated[str, Field(pattern=r"^[0-9]{1,9}(x[0-9]{1,9}){1,2}$")]
LaneNumber = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]


class _Checked(BaseModel):
    """Strict of its own fields; others are of earlier or later versions."""

    model_config = ConfigDict(strict=True, extra="allow")


class _LaneState(_Checked):
    emitted: Count
    epoch: Annotated[int, Field(ge=0, lt=2**31)]
    group: Count
    cursor: Count
    counts: dict[str, Count]
    waiting: dict[BucketName, list[DrawNumbers]]


class _Feed(_Checked):
    micro_batch_size: Annotated[int, Field(gt=0, lt=2**31)] | None
    next_micro_batch: Count
    lane_states: dict[LaneNumber, _LaneState]
    fingerprint: dict[str, Any]
    bad_samples: Count
    bad_in_a_row: Count


class _Optimizer(_Checked):
    optimizers: list[str]
    values: dict[str, Any]
    groups: list[list[dict[str, Any]]]


class _Values(_Checked):
    about: dict[str, str] = {}
    kept: dict[str, Any] = {}
    feed: _Feed
    optimizer: _Optimizer
    nonfinite_updates: Count = 0
    loss_scale: dict[str, float] = {}
    samples_seen: Count | None = None
    run_id: str | None = None


def check_values(values: dict) -> None:
    """Raise CheckpointError for `state.json` of something else than a run."""
    try:
        _Values.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"state.json is not what a run wrote: {place}: {first['msg']}") from None
