"""Imported once by the fork server: everything a rank needs, and nothing that starts a thread."""

import gc
import warnings

warnings.filterwarnings("ignore")

import deepspeed.runtime.zero.stage3  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

import megatron_dept.training.setup  # noqa: E402, F401

gc.freeze()
