"""Draws images of a prompt:  python sample.py "a photo of the face of a pilot, a person" """

import sys

from fairref.commands import cli
from fairref.commands.sample import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
