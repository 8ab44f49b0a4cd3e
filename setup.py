"""What pyproject.toml cannot say: the long description, made from README.md, and every package found in the tree."""

import re
from pathlib import Path

from setuptools import find_packages, setup

LEFT_OUT = "Pictures and pages of this text are in the source checkout.\n"


def long_description(readme: str) -> str:
    """README.md without pictures and without links into the checkout, which show nothing on the page of an index.

    A link keeps its words; links to the web and fenced code stay as they are.
    """
    parts = re.split(r"(^```.*?^```$)", readme, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n+", "", parts[i], flags=re.M)
        parts[i] = re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", parts[i])
    return "".join(parts) + f"\n{LEFT_OUT}"


if __name__ == "__main__":
    setup(
        # patches/ and configs/ are packages of hf_longctx that stand beside it: see package-dir.
        packages=[*find_packages(include=["hf_longctx*"]), "hf_longctx.configs", "hf_longctx.patches"],
        long_description=long_description((Path(__file__).parent / "README.md").read_text("utf-8")),
        long_description_content_type="text/markdown",
    )
