"""The environment variables by which numeric libraries choose their kernels.

A library reads dozens of them, and one release knows more than the last. So variables count by the library's prefix,
and those that are known to leave results alone are listed instead: one too many costs an upgrade, one too few costs
the promise of equal bits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from sisa.learners.flags import DETERMINISTIC_CUBLAS
from sisa.state import JSON

PREFIXES = (
    "ATEN_",
    "BLIS_",
    "DNNL_",  # the older name of oneDNN, which it still obeys
    "FBGEMM_",
    "GLIBC_TUNABLES",  # masks processor features, and with them the variants of exp, sin, pow
    "GOMP_",
    "INTEL_ISA_",
    "KMP_",
    "MKL_",
    "NPY_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "TORCH_LINEAR_",
    "TORCH_MKLDNN_",
    "_DNNL_",
    "_ONEDNN_",
)
"""Beginnings of names that count on any device."""
GPU_PREFIXES = (
    "CUBLAS",  # cuBLASLt's too
    "CUDNN_",
    "NVIDIA_TF32_",
    "TORCH_ALLOW_TF32_",
    "TORCH_BLAS_",
    "TORCH_CUDNN_",
    "TORCH_LINALG_",
)
"""Beginnings of names that count on a GPU only."""
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
HARMLESS = re.compile(
    # What is said and measured, and where it is written.
    r".*(VERBOSE|LOG|DISPLAY|PROFILE|DUMP|STATS|SETTINGS|WARNINGS|_PATH$).*"
    # How many threads: the recipe says it, and Ray sets one of these in its workers. Domains of MKL go before that.
    r"|(?!MKL_DOMAIN_).*_NUM_THREADS"
    # Where threads run, how they wait, what they may use: not what they compute.
    r"|OMP_(AFFINITY_FORMAT|PLACES|PROC_BIND|STACKSIZE|WAIT_POLICY)"
    r"|GOMP_(CPU_AFFINITY|DEBUG|SPINCOUNT|STACKSIZE)"
    # The last two are set by scikit-learn when it is imported.
    r"|KMP_(AFFINITY|BLOCKTIME|STACKSIZE|DUPLICATE_LIB_OK|INIT_AT_FORK)"
)
"""Whole names that these prefixes cover, and that leave results as they are."""


def steering(device: str, environment: Mapping[str, str] = os.environ) -> dict[str, JSON]:
    """Return the variables that steer numeric libraries on ``device``, with their values.

    On a GPU the workspace of cuBLAS counts with the value that a training gives it where nobody else did.

    >>> steering("cpu", {"DNNL_MAX_CPU_ISA": "SSE41", "DNNL_VERBOSE": "1", "OMP_NUM_THREADS": "1"})
    {'DNNL_MAX_CPU_ISA': 'SSE41'}
    """
    prefixes: tuple[str, ...] = PREFIXES
    if device == "cuda":
        prefixes = PREFIXES + GPU_PREFIXES
        environment = {WORKSPACE: DETERMINISTIC_CUBLAS, **environment}
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(prefixes) and not HARMLESS.fullmatch(name)
    }
