import pathlib
import re

from setuptools import setup

# Links between files of the repository lead there from a package index too.
readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(long_description=re.sub(r"\]\((?!https?:|#)", "](https://github.com/hkr-keras/hkr_keras/blob/main/", readme))
