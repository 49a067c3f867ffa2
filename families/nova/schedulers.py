"""What the scheduler of a published pipeline says of the diffusion of NOVA's tokens."""

from pathlib import Path
from typing import Any

from families.common.weight_files import GENERATOR, TARGET_KEY
from families.nova.files import PART
from families.nova.versions import EPSILON, FLOW
from warpcore.errors import UserError
from warpcore.safe_json import read_object
from warpcore.text import brief

SCHEDULER = Path("scheduler", "scheduler_config.json")
"""In a pipeline's folder."""
FLOW_SCHEDULER, DDPM_SCHEDULER = "FlowMatchEulerDiscreteScheduler", "DDPMScheduler"
DDPM = {
    "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "steps_offset": 1,
}  # fmt: skip
"""What is computed here of a DDPM; the others are refused."""


def scheduler_said(path: Path) -> dict[str, Any]:
    """Keys of ours for the scheduler beside a transformer, given by its folder or the pipeline's; none without one.

    Raises:
        UserError: it is of another diffusion than is computed here.
    """
    pipeline = path.parent if path.name == PART else path
    file = pipeline / SCHEDULER
    if not file.is_file():
        return {}
    config = read_object(file, f"{GENERATOR}: {file}")
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch"):
        shift = config.get("shift", 1.0)
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < 1e6:
            raise UserError(f"{GENERATOR}: {file} has shift: {brief(shift)}, where a number above 0 is needed")
        return {TARGET_KEY: FLOW, "shift": float(shift)}
    if not name.startswith("DDPM"):
        raise UserError(f"{GENERATOR}: {file} is of {brief(name)}; {FLOW_SCHEDULER} and {DDPM_SCHEDULER} "
                        "are known here")  # fmt: skip
    for key, wanted in DDPM.items():
        if (found := config.get(key, wanted)) != wanted:
            raise UserError(f"{GENERATOR}: {file} has {key}: {brief(found)}; here it is {wanted}")
    return {TARGET_KEY: EPSILON}


def scheduler_config(target: str, shift: float) -> dict[str, Any]:
    """What the scheduler of a pipeline says of the diffusion of a network that predicts `target`; see
    `scheduler_said`."""
    if target == FLOW:
        return {"_class_name": FLOW_SCHEDULER, "num_train_timesteps": 1000, "shift": shift}
    return {"_class_name": DDPM_SCHEDULER, **DDPM, "clip_sample": False}
