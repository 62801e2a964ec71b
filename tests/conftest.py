"""What every test starts from: eight simulated CPU devices, shapes checked at run time, caches in a throw-away
folder."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

from tests.compiler import flags

# Before anything imports jax: the platform and the device count are read once.
os.environ["JAX_PLATFORMS"] = "cpu"
for _flag in flags(devices=8).split():
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
# As the command line does: what tracing makes lives on, and looking for garbage in it was a tenth of the time of tests.
gc.set_threshold(100_000)
os.environ["LLAMAX_CACHE"] = tempfile.mkdtemp(prefix="llamax-test-cache-")

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The array packages only: pydantic already checks the config, and command line start-up stays as users have it.
CHECKED = ["model", "text", "generate", "data", "mesh", "train", "scaling"]
install_import_hook([f"llamax.{name}" for name in CHECKED], "beartype.beartype")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the cache folder of this process."""
    import shutil

    shutil.rmtree(os.environ["LLAMAX_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """The folder of reference material (published configs, counts, fixtures), which lives outside the repository.

    `LLAMAX_REFERENCE` names it; by default `../shared/reference` beside the checkout. Tests that need it skip without
    it.
    """
    named = os.environ.get("LLAMAX_REFERENCE")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip("no reference material: set LLAMAX_REFERENCE to its folder")
    return folder
