"""Run the compiled functions on batches of tasks, on several threads."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, Parameters
from maml_pipeline.meta_gradient.native.inner_loop import (
    TASKS_PER_GROUP,
    Examples,
    Work,
    add_meta_gradients,
    predict_tasks,
    take_inner_steps,
)
from maml_pipeline.meta_gradient.native.layout import INPUTS, OUTPUTS, ROWS, FILTERS, Layout, layout
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native.schedule import schedule
from maml_pipeline.tasks import TaskBatch


def work_sizes(support, query, plan) -> dict[str, Any]:
    layouts = support, query
    dense = np.concatenate([support.dense, query.dense])
    examples = max(support.examples, query.examples)
    outputs = support.dense[-1, OUTPUTS]
    widest = max(dense[:, INPUTS].max(), dense[:, OUTPUTS].max())
    z_part = max((row[ROWS] * row[FILTERS] for row in support.blocks), default=0)
    d = 0 if plan.is_first_order else 1
    return {
        "record": max(l.record for l in layouts),
        "kept": (plan.kept, support.record),
        "tangents": max(d * support.tangents, support.parameters),
        "u_dot": d * max(support.largest_u, 1),
        "columns": max(l.columns for l in layouts),
        "columns_dot": d * support.columns,
        "sums": 2 * support.largest_weight,
        "part": d * max(2 * support.examples * widest, z_part),
        "features": examples * support.dense[0, INPUTS] if len(support.blocks) else 0,
        "prediction": (support.examples, outputs),
        "prediction_dot": d * support.examples * outputs,
        "delta_dot": d * support.examples * widest,
        "checkpoints": (plan.checkpoints, support.parameters),
        "adjoint": d * support.parameters,
    }


def make_work(sizes: dict[str, Any], like: Tensor) -> Work:
    parts = {n: int(np.prod(s)) for n, s in sizes.items()}
    flat = like.new_empty(sum(parts.values()))
    array = flat.numpy()
    fields, start = {}, 0
    for name, size in sizes.items():
        part = array[start : start + parts[name]]
        fields[name] = part.reshape(size) if isinstance(size, tuple) else part
        start += parts[name]
    fields["z_gradient"] = fields["u_dot"]
    fields["current"] = fields["tangents"][:sizes["checkpoints"][1]]
    return Work(**fields)


def examples(network: FeedForward, x: Tensor, y: Tensor) -> Examples:
    if network.blocks:
        inputs = x.movedim(-3, -1).reshape(len(x), -1, x.shape[-3]).contiguous()
    else:
        inputs = x.contiguous()
    classifies = not y.is_floating_point()
    labels = y.contiguous() if classifies else y.new_zeros(len(y), 0, dtype=torch.int64)
    targets = x.new_zeros(len(y), 0, 0) if classifies else y.contiguous()
    return Examples(inputs.numpy(), labels.numpy(), targets.numpy())


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def meta_gradient(network: FeedForward, theta: Parameters, batch: TaskBatch, inner: InnerLoop):
    packed = network.pack(theta)
    bytes_each = packed.element_size()
    classifies = not batch.support_y.is_floating_point()
    ls = layout(network, batch.support_x.shape[1:], bytes_each, classifies)
    lq = layout(network, batch.query_x.shape[1:], bytes_each, classifies)
    plan = schedule(inner.method, inner.steps)
    T = len(batch.support_x)
    groups = -(-T // TASKS_PER_GROUP)
    threads = min(torch.get_num_threads(), groups)
    sup = examples(network, batch.support_x, batch.support_y)
    qry = examples(network, batch.query_x, batch.query_y)
    predictions = packed.new_empty(T, lq.examples, network.dense[-1][1])
    losses = packed.new_empty(T, inner.steps + 1)
    totals = packed.new_empty(groups, packed.numel())
    sizes = work_sizes(ls, lq, plan)
    def run(thread):
        work = make_work(sizes, packed)
        add_meta_gradients(thread, threads, (ls, lq), packed.numpy(), sup, qry, inner.lr, plan.instructions, work, predictions.numpy(), losses.numpy(), totals.numpy())
    if threads > 1:
        fs = [pool(threads - 1).submit(run, t) for t in range(1, threads)]
        run(0)
        for f in fs: f.result()
    else:
        run(0)
    return losses, predictions, network.unpack(totals.sum(0) / T, theta)
