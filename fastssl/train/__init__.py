"""A small reference trainer: real images and texts, short methods, and the same run with fused or with naive kernels.

python -m fastssl.train simclr --steps 200
python -m fastssl.train barlow_twins --help
python -m fastssl.train.demo
torchrun --nproc-per-node 2 -m fastssl.train simclr --batch-size 1024
"""

from importlib.util import find_spec

if missing := [name for name in ("PIL", "rich", "sklearn") if find_spec(name) is None]:
    raise ImportError(f'fastssl.train needs {", ".join(missing)}: in fastssl\'s folder, pip install ".[demo]"')

from fastssl.train.data.images import DataError, Images, load
from fastssl.train.loop import fit
from fastssl.train.method import Method, twins
from fastssl.train.methods import METHODS, create
from fastssl.train.run import Run
from fastssl.train.step import Step

__all__ = ["METHODS", "DataError", "Images", "Method", "Run", "Step", "create", "fit", "load", "twins"]
