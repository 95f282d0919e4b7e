"""What a program sees of a vendor's software: torch's build, the packages beside it, the device's names. As data, so
that a probe can be shown any of them, and several at once, on a machine that has none.

Of real installations, as their documentation and the code that tells them apart have it; not seen on hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Identity:
    """One vendor's software.

    Attributes:
        vendor: as people know it.
        backend: whose probe should take it; "" where glm5-hal has none.
        type: torch's type of device.
        name: the product's, as the driver gives it.
        torch: torch.__version__; "" where it is the one that is here.
        version: what torch.version has beside that: cuda, hip, musa.
        extension: the module that gives torch the type, where that is no build of torch.
        packages: versions of modules that are installed, by name; the extension among them.
        loaded: those of them that take torch over, and are imported with it.
        tools: commands on the path.
        capability, properties: what the driver says of the device.
        extras: attributes of the extension's module, dotted.
    """

    vendor: str
    backend: str
    type: str
    name: str
    torch: str = ""
    version: Mapping[str, str] = field(default_factory=dict)
    extension: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    loaded: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    capability: tuple[int, int] = (8, 0)
    properties: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)


IDENTITIES: Mapping[str, Identity] = {
    "nvidia": Identity(
        "NVIDIA", "cuda", "cuda", "NVIDIA H100 80GB HBM3", "2.9.0+cu128", {"cuda": "12.8"},
        tools=("nvidia-smi",), capability=(9, 0), properties={"multi_processor_count": 132},
    ),
    "amd": Identity(
        "AMD", "", "cuda", "AMD Instinct MI300X", "2.9.0+rocm6.4", {"hip": "6.4.43482"},
        tools=("rocm-smi",), capability=(9, 4), properties={"gcnArchName": "gfx942:sramecc+:xnack-"},
    ),
    "iluvatar": Identity(
        "Iluvatar", "", "cuda", "Iluvatar BI-V150", "2.4.1+corex.4.3.0", {"cuda": "10.2"}, tools=("ixsmi",),
    ),
    "ascend": Identity(
        "Ascend", "ascend", "npu", "Ascend910B3", "2.9.0+cpu", {"cann": "8.5.0"},
        extension="torch_npu", packages={"torch_npu": "2.9.0"}, tools=("npu-smi",),
        extras={"_C._npu_get_soc_version": lambda: 223},
    ),
    "musa": Identity(
        "Moore Threads", "musa", "musa", "MTT S5000", "2.7.1", {"musa": "4.3.6"},
        extension="torch_musa", packages={"torch_musa": "2.7.1"}, tools=("mthreads-gmi",), capability=(3, 1),
    ),
    "musa by torchada": Identity(
        "Moore Threads", "musa", "musa", "MTT S5000", "2.7.1", {"musa": "4.3.6"},
        extension="torch_musa", packages={"torch_musa": "2.7.1", "torchada": "0.1.95"},
        loaded=("torchada",), tools=("mthreads-gmi",), capability=(3, 1),
    ),
    "hygon": Identity(
        "Hygon", "hygon", "cuda", "BW200", "2.9.0+das.opt1.dtk2604", {"hip": "6.1.25082"},
        tools=("hy-smi",), capability=(9, 3), properties={"gcnArchName": "gfx938:sramecc+:xnack-"},
    ),
    "cambricon": Identity(
        "Cambricon", "cambricon", "mlu", "MLU590-M9", "2.7.1+cpu",
        extension="torch_mlu", packages={"torch_mlu": "1.28.0"}, tools=("cnmon",),
    ),
    "kunlunxin": Identity(
        "Kunlunxin", "kunlunxin", "cuda", "Kunlun-XPU", "2.5.1+cu118", {"cuda": "11.8"},
        packages={"torch_xmlir": "1.0.0.1"}, loaded=("torch_xmlir",), tools=("xpu-smi",),
    ),
    "metax": Identity(
        "MetaX", "metax", "cuda", "MetaX C500", "2.8.0+metax3.5.3.9", {"cuda": "11.6"}, tools=("mx-smi",),
    ),
    "enflame": Identity(
        "Enflame", "enflame", "gcu", "Enflame S60", "2.7.0+cpu",
        extension="torch_gcu", packages={"torch_gcu": "2.7.0"}, tools=("efsmi",), capability=(1, 3),
    ),
}  # fmt: skip


class Packages(MetaPathFinder):
    """Modules that can be found, imported and asked for their version, without a file of theirs.

    ``begin`` is what their own code does when they are imported: it is given the module.
    """

    def __init__(self, versions: Mapping[str, str], begin: Callable[[ModuleType], None]) -> None:
        self._versions, self._begin = {_canonical(name): (name, v) for name, v in versions.items()}, begin

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return (
            ModuleSpec(name, self, is_package=True) if self._versions.get(_canonical(name), ("",))[0] == name else None
        )

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = self._versions[_canonical(module.__name__)][1]
        self._begin(module)

    def find_distributions(self, context: Any) -> Iterator[metadata.Distribution]:
        for key, (name, version) in self._versions.items():
            if context.name is None or _canonical(context.name) == key:
                yield _Distribution(name, version)


class _Distribution(metadata.Distribution):
    def __init__(self, name: str, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(path)


def _canonical(name: str) -> str:
    return name.lower().replace("-", "_")


def versions_of(identity: Identity) -> tuple[str, Any]:
    """torch.__version__ and torch.version, as its build has them."""
    known = {"cuda": None, "hip": None, "xpu": None, "debug": False, "git_version": "", **identity.version}
    return identity.torch, SimpleNamespace(__version__=identity.torch, **known)


def extend(module: ModuleType, identity: Identity, space: Any) -> None:
    """What an extension has beside what it does to torch."""
    setattr(module, identity.type, space)
    for path, value in identity.extras.items():
        *inner, name = path.split(".")
        place: Any = module
        for part in inner:
            place.__dict__.setdefault(part, SimpleNamespace())
            place = getattr(place, part)
        setattr(place, name, value)
