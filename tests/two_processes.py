"""Started by torchrun: train gates of a tiny model, write the curve. Arguments: batch, file."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "1"

import torch
from accelerate import PartialState
from tiny_models import CALIBRATION, compress, tiny

import gateskip_compress as g

torch.set_num_threads(1)
training = g.Training(steps=6, batch=int(sys.argv[1]), gate_rate=0.01)
# in double precision, so that rounding turns no decision
model = compress(tiny().double(), g.GateSkip(budget=0.7, rank=4, training=training))
assert len(CALIBRATION) == 8
if PartialState().is_main_process:
    record = model.gateskip.steps[-1]["record"]["training"]
    Path(sys.argv[2]).write_text(json.dumps({**record, "processes": PartialState().num_processes}))
