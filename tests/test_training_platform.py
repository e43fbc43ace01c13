"""Variables that steer numeric libraries: those that move bits are in the fingerprint, and no others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_kit import recipe

from sisa.training import platform
from sisa.training.platform import fingerprint, platform_id
from sisa.training.steering import steering

TESTS = Path(__file__).resolve().parent
TRAINING = """
import json
from training_kit import images, numbers, recipe, stage, weights_digest
from sisa.recipe import ColumnSpec
from sisa.training.platform import fingerprint, platform_id

size = {"height": 16, "width": 16, "channels": 3}
pixels = recipe(model={"name": "cnn"}, columns={"p": ColumnSpec(type="vector", size=768)}, image=size)
wide = recipe(model={"name": "mlp", "hidden": [128]}, features=100)
bits = [weights_digest(stage(pixels, images([80], size=768))), weights_digest(stage(wide, numbers([200], features=100)))]
print(json.dumps([bits, platform_id(fingerprint(wide))]))
"""
MOVING = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_DOMAIN_NUM_THREADS": "MKL_DOMAIN_BLAS=3",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4",
    "NPY_ENABLE_CPU_FEATURES": "X86_V3",
    "OMP_DYNAMIC": "true",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "TORCH_MKLDNN_MATMUL_MIN_DIM": "1",
}
HARMLESS = {
    "DNNL_VERBOSE": "1",
    "KMP_DUPLICATE_LIB_OK": "True",
    "KMP_INIT_AT_FORK": "FALSE",
    "MKL_NUM_THREADS": "3",
    "MKL_VERBOSE": "1",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "OMP_DISPLAY_ENV": "true",
    "OMP_NUM_THREADS": "3",
    "OMP_PROC_BIND": "true",
    "ONEDNN_JIT_DUMP": "1",
    "ONEDNN_VERBOSE": "all",
    "TORCH_HOME": "elsewhere",
}
"""Each is set by somebody: to see more, by Ray in its workers, by scikit-learn when it is imported."""
OF_A_GPU = {
    "CUBLASLT_WORKSPACE_SIZE": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "NVIDIA_TF32_OVERRIDE": "1",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
}


def trained(**variables):
    """Bits of two small trainings, and the platform, of a process with these variables."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), **variables}
    done = subprocess.run([sys.executable, "-c", TRAINING], env=environment, capture_output=True, text=True, check=True)
    bits, identity = json.loads(done.stdout.splitlines()[-1])
    return bits, identity


def test_whoever_steers_a_library_by_its_older_name_is_on_another_platform():
    plain, steered = trained(), trained(DNNL_MAX_CPU_ISA="SSE41")
    assert plain == trained(ONEDNN_VERBOSE="0", OMP_NUM_THREADS="3")
    assert plain[1] != steered[1]
    if "avx2" in platform._processor():
        assert plain[0] != steered[0]  # it is obeyed, which is why it counts


@pytest.mark.parametrize("name", MOVING)
def test_a_variable_that_may_move_bits_is_part_of_the_fingerprint(monkeypatch, name):
    before = fingerprint(recipe())
    monkeypatch.setenv(name, MOVING[name])
    after = fingerprint(recipe())
    assert platform_id(after) != platform_id(before)
    assert after == {**before, "environment": {**before["environment"], name: MOVING[name]}}


def test_what_moves_no_bits_changes_no_platform(monkeypatch):
    before = fingerprint(recipe())
    for name, value in {**HARMLESS, **OF_A_GPU}.items():
        monkeypatch.setenv(name, value)
    assert fingerprint(recipe()) == before


def test_a_gpu_has_variables_of_its_own_and_one_that_a_training_sets():
    everything = {**MOVING, **HARMLESS, **OF_A_GPU}
    assert steering("cuda", everything) == {**MOVING, **OF_A_GPU}
    untouched = steering("cuda", {})
    assert untouched == steering("cuda", {"CUBLAS_WORKSPACE_CONFIG": untouched["CUBLAS_WORKSPACE_CONFIG"]})
