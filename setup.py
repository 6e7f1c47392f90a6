"""Packaging for ssm_lib: every fact is read from settings.ini, where nbdev reads it too."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {name.removesuffix("_requirements"): cfg[name].split() for name in cfg if name.endswith("_requirements")}
extras["cli"] += extras["plots"] + extras["files"]  # all that the command line needs
extras["demo"] = extras["cli"] + extras["pde"]
for name in ("dev", "bench"):
    extras[name] += extras["demo"] + (extras["tensorboard"] if name == "dev" else [])


def readme():
    """README.md for a package index, where links that are relative to the repository lead nowhere."""
    text = (here / "README.md").read_text(encoding="utf-8")
    here_or_there = r"\[([^\]]*)\]\((?!https?:|#)([^)]+)\)"
    absolute = lambda kind: rf"[\1]({cfg['git_url']}/{kind}/{cfg['branch']}/\2)"
    return re.sub(here_or_there, absolute("blob"), re.sub("!" + here_or_there, "!" + absolute("raw"), text))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": ["ssm_lib=ssm_lib.cli:command"],
        "nbdev": ["ssm_lib=ssm_lib._modidx:d"],  # where nbdev looks names up: links between pages, links to the source
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering",
    ],
    zip_safe=False,
)
