"""The fixed prefix of a network: what it computes before any adapted parameter takes part.

If only the head adapts, the features of the support set are the same in every inner step. They are
recorded once per meta-step, and replayed in the inner steps. No code of the network is analysed: one
call tells which modules finish before the first module with an adapted parameter starts. An engine that
replays them is compared with plain autograd, as always; where it differs, nothing is recorded.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from maml_pipeline.meta_gradient.inner_loop import Parameters
from maml_pipeline.meta_gradient.stateless import stateless


class FixedPrefix(NamedTuple):
    """Names of modules that no adapted parameter influences.

    Args:
        recorded: Their outputs are recorded once and replayed.
        skipped: They lie in an `nn.Sequential` in front of a recorded module, so that nothing else reads
            their outputs: they return their input.
    """

    recorded: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


class _Frame(NamedTuple):
    """A module that is being called, and the calls that have finished directly inside it."""

    is_chain: bool
    finished: list[str]


def find_fixed_prefix(network: nn.Module, adapted: Collection[str], x: Tensor) -> FixedPrefix:
    """Call a network once, and find the modules that finish before an adapted parameter takes part.

    Of nested modules, the outermost one is recorded. A module that is called twice is not, nor one that
    returns anything but one floating-point tensor.

    Args:
        network: Its attributes may change: use it within `preserve_state`.
        adapted: Names of the parameters that the inner steps move.
        x: Inputs of one task `(S, ...)`.
    """
    parameters = dict(network.named_parameters())
    moving = {id(parameters[name]) for name in adapted}
    frames = [_Frame(_is_chain(network.forward), [])]
    calls: dict[str, int] = {}
    found: list[_Frame] = []  # the state at the first use of an adapted parameter

    def watch(name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            if not found and any(id(p) in moving for p in module.parameters(recurse=False)):
                found.extend(frames)
            frames.append(_Frame(_is_chain(forward), []))
            output = forward(*args, **kwargs)
            frames.pop()
            parts = output if isinstance(output, (tuple, list)) else (output,)
            if not found and not all(_is_fixed(part) for part in parts):
                found.extend(frames)
            if not found and isinstance(output, Tensor) and output.is_floating_point():
                frames[-1].finished.append(name)
            return output

        return watched

    theta = {
        n: p.detach().requires_grad_(id(p) in moving) for n, p in parameters.items() if p.requires_grad
    }
    if any(id(p) in moving for p in network.parameters(recurse=False)):
        return FixedPrefix()
    children = [(name, module) for name, module in network.named_modules() if name]
    with _replaced_forwards([(m, watch(name, m, m.forward)) for name, m in children]):
        stateless(network)(theta, x.clone())

    recorded: list[str] = []
    skipped: list[str] = []
    for frame in found:
        names = [name for name in frame.finished if calls[name] == 1]
        recorded += names[-1:] if frame.is_chain else names
        skipped += names[:-1] if frame.is_chain else []
    return FixedPrefix(tuple(recorded), tuple(skipped))


def record(network: nn.Module, prefix: FixedPrefix, call: Callable[[], object]) -> Parameters:
    """Return the outputs of the recorded modules in a call, which ends after the last of them."""
    features: Parameters = {}

    def keep(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **kwargs: Any) -> Any:
            features[name] = forward(*args, **kwargs)
            if len(features) == len(prefix.recorded):
                raise _Recorded
            return features[name]

        return kept

    modules = [(name, network.get_submodule(name)) for name in prefix.recorded]
    forwards = [(module, keep(name, module.forward)) for name, module in modules]
    with _replaced_forwards(forwards), suppress(_Recorded):
        call()
    return features


@contextmanager
def replayed(network: nn.Module, prefix: FixedPrefix, features: Parameters) -> Iterator[None]:
    """Let the recorded modules return their recorded outputs."""

    def replay(name: str) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: features[name]

    def skip(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    forwards = [(network.get_submodule(name), replay(name)) for name in prefix.recorded]
    forwards += [(network.get_submodule(name), skip) for name in prefix.skipped]
    with _replaced_forwards(forwards):
        yield


def _is_fixed(output: Any) -> bool:
    """Tell whether no adapted parameter influences an output; `False` if it cannot be told."""
    return output is None or (isinstance(output, Tensor) and not output.requires_grad)


def _is_chain(forward: Callable[..., Any]) -> bool:
    """Tell whether each module's output goes to the next module alone."""
    return getattr(forward, "__func__", None) is nn.Sequential.forward


class _Recorded(BaseException):
    """Ends a call; not an Exception, which the network's own code might catch."""


@contextmanager
def _replaced_forwards(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the `forward` of modules by attributes of the instances."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in forwards:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in replaced:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
