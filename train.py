"""Finetunes a bundle for fairness:  python train.py --attr gender  (or torchrun train.py --attr gender)"""

import sys

from fairref.commands import cli
from fairref.commands.train import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
