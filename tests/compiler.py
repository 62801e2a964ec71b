"""XLA's flags for tests and for the processes they start."""

from __future__ import annotations

# Tests run a program a few times on tiny arrays, so compiling is what they take: LLVM's optimizer would be three
# quarters of all test time, the emitters of fusions and cutting a program into parts three quarters of the rest.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with so many simulated devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *QUICK])
