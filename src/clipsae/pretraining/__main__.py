"""`python -m clipsae.pretraining`, see `train.py`."""

import logging

from clipsae.pretraining.train import parse, train

if __name__ == "__main__":
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    train(parse())
