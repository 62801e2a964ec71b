"""llamax: plan, train, fit, predict, check. Scaling research on the open-weight Llama lineage, in JAX and Flax.

model, config = llamax.load("runs/tiny")      # logits = model(tokens), [batch, seq, vocab]; or a Hugging Face folder
llamax.export_hf(model, config, "folder")     # config.json and safetensors that transformers loads
runs = llamax.ledger("runs")                  # a pandas DataFrame, one row a run
llamax.ablation_runs("runs/study")            # the runs of an ablation, for llamax.scaling.ablation
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamax.errors import UserError

if TYPE_CHECKING:
    from llamax.hub.convert import load
    from llamax.hub.export import export_hf
    from llamax.hub.load import load_hf
    from llamax.report.ablation import ablation_runs
    from llamax.report.ledger import curves, ledger

    __version__: str

__all__ = ["UserError", "__version__", "ablation_runs", "curves", "export_hf", "ledger", "load", "load_hf"]

# Resolved on first use: importing llamax must not import JAX or pandas.
_LAZY = {
    "load": "llamax.hub.convert",
    "load_hf": "llamax.hub.load",
    "export_hf": "llamax.hub.export",
    "ablation_runs": "llamax.report.ablation",
    "ledger": "llamax.report.ledger",
    "curves": "llamax.report.ledger",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # reading it costs a worker process 0.03 s that few need
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("llamax")
        except PackageNotFoundError:  # run from a checkout that was never installed
            return "0+unknown"
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'llamax' has no attribute {name!r}")
