"""Which folder is which package. Everything else about the distribution is in pyproject.toml.

setuptools can map a folder to another import name but cannot *find* packages below a mapped folder, so the
tree is read here: a new backend is one folder, with no list to extend.
"""

from setuptools import find_packages, setup

ROOTS = {
    "glm5_hal": "hal",
    "glm5_hal.ops": "ops",
    "glm5_hal.backends": "backends",
    "glm5_hal.conformance": "conformance",
}

setup(
    package_dir=ROOTS,
    packages=[
        name
        for package, folder in ROOTS.items()
        for name in (package, *(f"{package}.{inner}" for inner in find_packages(folder)))
    ],
)
