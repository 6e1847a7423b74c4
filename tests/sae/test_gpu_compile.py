"""The GPU's kernels are compiled for an A100 and an H100, which needs neither: the interpreter
takes code that the compiler refuses."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = {"BLOCK": 2048, "ROOM": 2048, "EPS": 1e-7, "STEPS": 64, "BITS": 31, "PAIRS": 16}
WIDE = ("bound", "floor", "lists", "borders", "weights", "rows", "out", "x")
TYPES = {
    **dict.fromkeys(WIDE, "*fp32"),
    **{"taus": "*fp64", "zeroed": "*i1", "begin": "*i64", "positions": "*i64"},
    **dict.fromkeys(("ids", "counts", "sizes", "places"), "*i32"),
    **dict.fromkeys(("index", "latent"), "*i64"),
}  # all others are whole numbers
PRODUCTS = {"mix": 256, "sample": 256, "sums": 128}


def compiled(name: str, capability: int, scores: str) -> str:
    """The machine code of a kernel for scores of a type."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from clipsae.sae.engine import kernels

    kernel = getattr(kernels, name)
    signature, constants = {}, {}
    for i, parameter in enumerate(inspect.signature(kernel.fn).parameters.values()):
        if parameter.annotation is not inspect.Parameter.empty:
            zeroed = scores == "bf16"
            value = zeroed if parameter.name == "ZEROED" else SIZES[parameter.name]
            if parameter.name == "BLOCK":
                value = PRODUCTS.get(name, value)
            constants[(i,)] = value
            signature[parameter.name] = "constexpr"
        elif parameter.name == "zeroed" and scores != "bf16":
            constants[(i,)] = None
            signature[parameter.name] = "constexpr"
        elif parameter.name in ("scores", "values"):
            signature[parameter.name] = "*fp32" if name == "sums" else f"*{scores}"
        else:
            signature[parameter.name] = TYPES.get(parameter.name, "i32")
    source = ASTSource(kernel, signature, constants)
    return compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "scores"), [(80, "bf16"), (90, "fp32")])
def test_kernels_compile_without_atomics_and_libdevice(capability, scores, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability), scores]
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 9
    for name, code in found.items():
        assert ".visible .entry" in code, name
        assert "atom." not in code, name
        assert "\tred." not in code, name
        assert "__nv_" not in code, name


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    names = ("sparsemax_bound", "largest_bound", "compact", "sparsemax", "largest", "pack")
    capability, scores = int(sys.argv[1]), sys.argv[2]
    print(json.dumps({n: compiled(n, capability, scores) for n in (*names, *PRODUCTS)}))
