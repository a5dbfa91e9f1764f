"""Package metadata lives in settings.ini; this file only hands it to setuptools."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]
version = re.search(r'__version__ = "(.+?)"', (here / "sensequant/__init__.py").read_text("utf-8"))


def lines(key: str) -> list[str]:
    """Entries of a multi-line field, one a line."""
    return [line.strip() for line in meta.get(key, "").splitlines() if line.strip()]


readme = here / "README.md"
setup(
    name=meta["name"],
    version=version[1],
    description=meta["description"],
    long_description=readme.read_text("utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=meta["author"],
    license=meta["license"],
    keywords=meta["keywords"],
    python_requires=f">={meta['min_python']}",
    packages=find_packages(include=["sensequant*"]),
    package_data={"sensequant": ["py.typed", "market/facts/*.csv", "govern/facts/*.json"]},
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("dask", "research", "dev")},
    entry_points={"console_scripts": lines("console_scripts")},
)
