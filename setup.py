"""Package metadata; every value lives in `settings.ini`, which nbdev reads too."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

licenses = {"mit": "MIT", "apache2": "Apache-2.0", "bsd3": "BSD-3-Clause"}
python_versions = ["3.11", "3.12", "3.13", "3.14"]
package = cfg["lib_path"]


def words(key: str) -> list[str]:
    return shlex.split(cfg.get(key, ""))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=licenses[cfg["license"]],
    url=cfg["git_url"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=[package, package + ".*"]),
    # Said outright, this makes an editable install a path and not an import hook,
    # which any folder of the package's name would hide: the clone, seen from beside it.
    package_dir={"": "."},
    package_data={package: ["world/assets/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=words("requirements"),
    extras_require={"dev": words("dev_requirements"), "bench": ["trl>=1.16"], "quant": ["bitsandbytes>=0.50"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        *("Programming Language :: Python :: " + v for v in python_versions[python_versions.index(cfg["min_python"]):]),
    ],
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{package}={package}._modidx:d"],
    },
    zip_safe=False,
)
