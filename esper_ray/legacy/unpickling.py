"""The one place that hands a pickle to torch: a child process that ends with its folder.

`python -m esper_ray.legacy.unpickling IN OUT`, with numbers of files on stdin; for each number it
writes what it found and says so on stdout.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import zipfile
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torch.torch_version import TorchVersion

from esper_ray.errors import UnsafeInputError
from esper_ray.legacy.plain import Packing, to_json
from esper_ray.storage import codec

MORE_BYTES = 2**30
MAX_OUTPUT_BYTES = 2**29
_CPU_SECONDS = 600
# What torch raises for a file that is damaged, or that holds what weights_only refuses.
_REFUSALS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def bound() -> None:
    """Cap what this process may take from now on."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, held + MORE_BYTES),
        (resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def unpickle(source: Path, packed: Path, tensors: Path) -> None:
    """Write the plain values of one `.pt` file; UnsafeInputError says why it is refused."""
    packing = Packing()
    try:
        with safe_globals([TorchVersion]):
            # Never anything but weights_only: a file that needs more is refused.
            value = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        plain = packing.pack(value)
        tensors.write_bytes(codec.encode_tensors(packing.tensors))
    except _REFUSALS as error:
        raise UnsafeInputError(_reason(source, error)) from error
    packed.write_bytes(to_json(plain))


def _reason(source: Path, error: BaseException) -> str:
    try:
        culprits = sorted(get_unsafe_globals_in_checkpoint(source))
    except _REFUSALS:
        culprits = []
    culprits = [name for name in culprits if name != "torch.torch_version.TorchVersion"]
    if culprits:
        return f"it asks for {', '.join(culprits[:5])}, which is not loaded"
    return (
        f"torch refuses it: {str(error).strip().splitlines()[0][:200] if str(error) else error!r}"
    )


def main() -> None:
    """See the module."""
    incoming, outgoing = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    bound()
    print("ready", flush=True)
    for line in sys.stdin:
        number = str(int(line))
        reason = hint = None
        try:
            unpickle(
                incoming / f"{number}.pt",
                outgoing / f"{number}.json",
                outgoing / f"{number}.safetensors",
            )
        except UnsafeInputError as error:
            reason, hint = error.message, error.hint
        print(json.dumps([int(number), reason, hint]), flush=True)


if __name__ == "__main__":
    os.umask(0o077)
    main()
