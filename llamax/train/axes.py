"""Whether a run's model, data and step can be cut as its mesh asks, said before anything compiles."""

from __future__ import annotations

from jax.sharding import Mesh

from llamax.accounting.pipeline import bubble
from llamax.config.components import MoeMlp
from llamax.config.run import RunConfig
from llamax.errors import UserError


def check_axes(config: RunConfig, mesh: Mesh) -> None:
    """Raises UserError where an axis of `mesh` cannot cut what it is to cut, naming field, value and fix."""
    _check_sequence(config, mesh)
    if mesh.shape["stage"] > 1:
        _check_stages(config, mesh.shape["stage"])


def _check_sequence(config: RunConfig, mesh: Mesh) -> None:
    seq, context = config.train.seq_len, mesh.shape["context"]
    if context > 1 and seq % (2 * context):
        raise UserError(
            f"train.seq_len={seq} does not divide into the {2 * context} chunks of mesh.context={context}, two a "
            f"device; choose a multiple of {2 * context}"
        )
    ways = context * mesh.shape["tensor"]
    if config.mesh.sequence_parallel and seq % ways:
        raise UserError(
            f"train.seq_len={seq} does not divide over context x tensor = {ways} devices, as "
            f"mesh.sequence_parallel=true asks; choose a multiple of {ways}, or drop it"
        )


def _check_stages(config: RunConfig, stages: int) -> None:
    for i, (repeat, _) in enumerate(config.model.blocks):
        if repeat % stages:
            raise UserError(
                f"model.segments.{i}.repeat={repeat} does not divide into mesh.stage={stages} stages; choose stages "
                "that divide the repeat of every segment, or cut the model over other axes"
            )
    if config.log.gradient_noise:
        raise UserError(
            f"log.gradient_noise=true needs the gradient of each microbatch, and with mesh.stage={stages} they are "
            "summed as they come; drop one of the two"
        )
    if config.model.mtp and isinstance(config.model.layers[-1].mlp, MoeMlp):
        raise UserError(
            f"model.mtp={config.model.mtp} with experts and mesh.stage={stages}: the modules run on the whole batch "
            "and their router losses would not be those of its microbatches; set mesh.stage=1"
        )


def pipeline_note(config: RunConfig, mesh: Mesh) -> str:
    """What the stages of a mesh cost, in words."""
    stages, parts = mesh.shape["stage"], config.train.grad_accumulation
    return (
        f"{stages} stages, {parts} microbatches: {bubble(stages, parts):.0%} of a step is their bubble, "
        "(stages - 1) / (microbatches + stages - 1); train.grad_accumulation sets the microbatches"
    )
