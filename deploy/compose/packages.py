"""Prints what the server's image needs, one requirement a line: the core of pyproject.toml and the extras or packages
given by name. requirements.txt holds the exact versions.

    python3 packages.py search openvino > packages.txt
    pip install --constraint requirements.txt --requirement packages.txt
"""

import sys
import tomllib

INDEX = "faiss-cpu"  # for runs that were compiled with an index
BUILD = "setuptools>=77"  # installs the checkout itself

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
more = [line for name in sys.argv[1:] for line in extras.get(name, [name])]
print(*project["dependencies"], *more, INDEX, BUILD, sep="\n")
