"""Each engine is compared with plain autograd when it first meets a network: exact, or rejected.

An engine calls a network with parameters other than the network's own, and vmap has rules of its own
for each operation. A few networks do not support that and would train on a wrong gradient without an
error. So the first time that an engine meets a network, a loss, a mode (training or evaluation), a
gradient order and task shapes, its losses and meta-gradient of two tasks are compared with those of
`PlainAutograd`, in float64, near the initial parameters. Second derivatives are also compared with
finite differences of first ones.

The comparison runs once per run and costs about as much as one or two meta-steps; docs/engines.md
has figures. The modules, from the entry point down:

    verification              decide which workarounds make an engine exact, or raise a `UserError`
    inspection                what one call of a network does besides predicting
    comparison                compare one computation of an engine with plain autograd
    plain_autograd            the reference: meta-gradients with parameters changed in place
    second_derivative         Hessian-vector products against finite differences
    hessian_free_error        a warning of how far the differences of `hessian_free` are off
    state, storage, layers    networks that are rejected by name
    workarounds               how an engine calls a network that needs special treatment
    preservation              restore parameters, attributes and the random state after a call
"""

from maml_pipeline.meta_gradient.exactness.comparison import Computation
from maml_pipeline.meta_gradient.exactness.layers import initialise_lazy
from maml_pipeline.meta_gradient.exactness.plain_autograd import LossesAndGradient
from maml_pipeline.meta_gradient.exactness.preservation import evaluation_mode, preserve_random_state
from maml_pipeline.meta_gradient.exactness.storage import check_copy
from maml_pipeline.meta_gradient.exactness.verification import derivative_error, verified_workarounds
from maml_pipeline.meta_gradient.exactness.workarounds import Workarounds

__all__ = [
    "Computation",
    "LossesAndGradient",
    "Workarounds",
    "check_copy",
    "derivative_error",
    "evaluation_mode",
    "initialise_lazy",
    "preserve_random_state",
    "verified_workarounds",
]
