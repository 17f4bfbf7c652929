"""Maps the top-level folders kernels/, memory/ and prefetch/ to subpackages of ds_offload."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("kernels", "memory", "prefetch")

packages = ["ds_offload"]
package_dir = {"ds_offload": "ds_offload"}
packages += [f"ds_offload.{name}" for name in find_namespace_packages("ds_offload")]
for folder in FOLDERS:
    package_dir[f"ds_offload.{folder}"] = folder
    packages.append(f"ds_offload.{folder}")
    packages += [f"ds_offload.{folder}.{name}" for name in find_namespace_packages(folder)]

setup(
    packages=sorted(p for p in packages if "__pycache__" not in p),
    package_dir=package_dir,
    package_data={"ds_offload": ["data/*", "data/*/*", "py.typed"]},
)
