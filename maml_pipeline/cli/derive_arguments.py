"""The initial parameters and the task that the arguments of `maml derive` describe."""

import argparse
import json

import torch
from torch import Tensor

from maml_pipeline.errors import UserError
from maml_pipeline.tasks import Task, random_generator
from maml_pipeline.text import shortened

Points = list[list[float]]


def parameters_and_task(settings: argparse.Namespace) -> tuple[Tensor, Task]:
    """Build the initial parameters and the task.

    Returns:
        theta `(D + 1,)` and the task, in the chosen dtype.

    Raises:
        UserError: An argument is malformed, or their sizes do not match.
    """
    dtype = {"float32": torch.float32, "float64": torch.float64}[settings.dtype]
    support_x = _parse_points("support_x", settings.support_x)
    if settings.w0 is None:
        w0 = _random_weights(len(support_x[0]), settings.seed)
    else:
        w0 = [point[0] for point in _parse_points("w0", settings.w0, nested=False)]
    b0 = [point[0] for point in _parse_points("b0", settings.b0, nested=False)]
    if len(b0) != 1:
        raise UserError(f"b0 is {settings.b0}; a linear unit has one bias: give one number")

    inputs = len(w0)
    tensors = []
    for set_name in ("support", "query"):
        x = _parse_points(f"{set_name}_x", getattr(settings, f"{set_name}_x"))
        y = _parse_points(f"{set_name}_y", getattr(settings, f"{set_name}_y"), nested=False)
        if len(x[0]) != inputs:
            raise UserError(
                f"{set_name}_x has {len(x[0])} inputs per point, w0 has {inputs}; "
                f"give a list of points with {inputs} inputs each, such as {[[1] * inputs]}"
            )
        if len(x) != len(y):
            raise UserError(
                f"{set_name}_y has {len(y)} targets and {set_name}_x {len(x)} points; give one per point"
            )
        tensors += [_tensor(f"{set_name}_x", x, dtype), _tensor(f"{set_name}_y", y, dtype)]
    theta = torch.cat([_tensor("w0", w0, dtype), _tensor("b0", b0, dtype)])
    return theta, Task(*tensors)


def _random_weights(inputs: int, seed: int) -> list[float]:
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must be from 0 to 2^64 - 1")
    draws: list[float] = random_generator(seed, "train", 0).standard_normal(inputs).tolist()
    return draws


def _parse_points(name: str, text: object, nested: bool = True) -> Points:
    """Read a number, a list of numbers or a list of equally long lists as a list of points."""
    form = "a number or a list of numbers such as [1, 2]"
    if nested:
        form += ", or a list of points such as [[1, 2], [3, 4]]"
    try:
        value = float(str(text))
    except ValueError:
        try:
            value = json.loads(str(text))
        except (ValueError, RecursionError):
            raise UserError(f"{name} is {shortened(text, 80)}; it must be {form}") from None
    points: Points = [
        point if nested and isinstance(point, list) else [point]
        for point in (value if isinstance(value, list) else [value])
    ]
    if not points or not all(
        point and len(point) == len(points[0]) and all(_is_number(v) for v in point) for point in points
    ):
        raise UserError(f"{name} is {shortened(text, 80)}; it must be {form}")
    return [[float(v) for v in point] for point in points]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tensor(name: str, value: Points | list[float], dtype: torch.dtype) -> Tensor:
    exact = torch.tensor(value, dtype=torch.float64)
    if not exact.isfinite().all():
        raise UserError(f"{name} holds {exact[~exact.isfinite()][0].item()}; it must be finite")
    tensor = exact.to(dtype)
    if not tensor.isfinite().all():
        raise UserError(
            f"{name} holds {exact[~tensor.isfinite()][0].item()}, beyond float32's range; "
            "make it smaller or set dtype to float64"
        )
    return tensor
