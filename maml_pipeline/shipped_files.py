"""Files that ship with the package beside its code: configs, and the job scripts of Slurm."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = _PACKAGE / "shipped"

SHIPPED = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent
"""The folder of `configs/` and `slurm/`: in an installed package its own, else the checkout."""

CONFIGS = SHIPPED / "configs"

SWEEP = CONFIGS / "sweep.yaml"
"""The config of a W&B sweep, for `wandb sweep`; it is none of `maml fit`."""


def shipped_configs() -> dict[str, Path]:
    """Return every shipped config by its name, such as `omniglot/5way_1shot`."""
    files = sorted(file for file in CONFIGS.rglob("*.yaml") if file != SWEEP)
    return {file.relative_to(CONFIGS).with_suffix("").as_posix(): file for file in files}
